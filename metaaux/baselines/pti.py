"""PTI (Roich et al. 2022), pivotal tuning: a code by optimisation, then the generator's weights for it (Eq. 2)."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from ..losses import InversionLoss
from .base import Generator, InversionMethod, Reconstruction, weights_of
from .optimization import LatentSettings, TuningSettings, optimize_latent, reconstruction_loss, tune_to_photo
from .registry import MethodRequest, register

#: PTI ends tuning once LPIPS is at or below this.
PTI_STOP_DISTANCE = 0.06


class PivotalTuning(InversionMethod):
    """PTI: a code in W by optimisation (the pivot), then the generator's weights for this code.

    Without its locality regularisation, which its authors leave off by default. Pivots of a batch are found side by
    side; the generator is tuned to one photo at a time.

    PTI ends tuning at an LPIPS of 0.06, about a tenth of LPIPS between faces of different persons. `stop_share` states
    that rule for perceptual distances of any scale: a share of the distance between the photo and the average face.

    Args:
        name: see `InversionMethod`.
        label: see `InversionMethod`.
        generator: the generator.
        loss: of both phases.
        latent: the pivot's optimisation.
        tuning: the weights' optimisation; its `stop_distance` holds where `stop_share` is `None`.
        stop_share: see above.
    """

    def __init__(
        self,
        name: str,
        label: str,
        generator: Generator,
        loss: InversionLoss,
        latent: LatentSettings,
        tuning: TuningSettings,
        stop_share: float | None = None,
    ):
        super().__init__(name, label)
        self.generator, self.loss, self.latent, self.tuning = generator, loss, latent, tuning
        self.stop_share = stop_share

    def settings(self) -> dict[str, Any]:
        return {
            "space": "w",
            "latent": asdict(self.latent),
            "tuning": asdict(self.tuning),
            "stop_share": self.stop_share,
            "loss": weights_of(self.loss),
        }

    def invert(self, image: torch.Tensor, camera: torch.Tensor) -> list[Reconstruction]:
        w = optimize_latent(self.generator, self.loss, image, camera, self.latent)
        return self._tune(image, camera, w, self.tuning)

    def warm_up(self, image: torch.Tensor, camera: torch.Tensor) -> None:
        latent = LatentSettings(steps=min(3, self.latent.steps))
        w = optimize_latent(self.generator, self.loss, image[:1], camera[:1], latent)
        self._tune(image[:1], camera[:1], w, TuningSettings(steps=min(3, self.tuning.steps)))

    def _tune(
        self, image: torch.Tensor, camera: torch.Tensor, w: torch.Tensor, tuning: TuningSettings
    ) -> list[Reconstruction]:
        results = []
        for photo, view, code in zip(image.split(1), camera.split(1), w.split(1)):
            if self.stop_share is not None:
                tuning = replace(tuning, stop_distance=self.stop_share * self._average_distance(photo, view))
            results.append(tune_to_photo(self.generator, self.loss, photo, view, code, tuning))
        return results

    @torch.no_grad()
    def _average_distance(self, photo: torch.Tensor, view: torch.Tensor) -> float:
        output = self.generator.synthesize(self.generator.w_avg[None].float(), view, dtype=self.loss.dtype)
        losses = self.loss(output.image, output.image_raw, photo, view)
        return self.loss.weights.perceptual * losses["perceptual"].item()


@register("pti", "PTI")
def make_pti(request: MethodRequest) -> PivotalTuning:
    """Ended by PTI's own rule where the checkpoint has LPIPS, and by the share that stands for it elsewhere."""
    inverter, options = request.inverter, request.options
    is_lpips = inverter.perceptual is not None and inverter.perceptual.config.calibrated
    tuning = TuningSettings(steps=options.tuning_steps, stop_distance=PTI_STOP_DISTANCE if is_lpips else None)
    return PivotalTuning(
        request.name,
        request.label,
        inverter.generator,
        reconstruction_loss(inverter),
        options.latent,
        tuning,
        None if is_lpips else options.pti_stop_share,
    )
