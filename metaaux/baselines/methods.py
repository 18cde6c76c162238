"""Inversion methods behind one interface: ours, its ablations, and those it is compared with (Sec. 4.1).

All of them invert into the same generator and know a photo's camera. They use the networks and losses of one
`MetaAuxInverter`; none changes it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ..adaptation import InnerLoop, InnerProblem, Tasks, adapt, make_tasks, predict_tasks
from ..losses import InversionLoss
from ..models.auxiliary import AuxiliaryNetwork
from ..models.eg3d import EG3DGenerator
from ..models.encoder import ImageEncoder, LatentEncoder
from .optimization import LatentSettings, TuningSettings, optimize_latent, tune_generator


@dataclass(eq=False)
class Reconstruction:
    """One inverted photo, and what it takes to render it again.

    Attributes:
        image: [3, S, S], clipped to [-1, 1].
        w: latent code [1, w_dim] or [1, num_ws, w_dim].
        camera: the photo's [1, 25].
        generator: the one to render with, tuned or not.
        weight_offsets: δ by layer, [C_out, C_in, 1, 1] or [C_out, C_in, 3, 3].
        offset_planes: [1, 3, 3, r, r] or `None`.
        tuning_steps: steps that the generator's weights took, `None` where they took none.
    """

    image: torch.Tensor
    w: torch.Tensor
    camera: torch.Tensor
    generator: EG3DGenerator
    weight_offsets: Mapping[str, torch.Tensor] = field(default_factory=dict)
    offset_planes: torch.Tensor | None = None
    tuning_steps: int | None = None

    @torch.no_grad()
    def views(self, cameras: torch.Tensor, w: torch.Tensor | None = None) -> torch.Tensor:
        """The head seen by cameras [V, 25], of its own or of an edited code: [V, 3, S, S] in [-1, 1]."""
        w = self.w if w is None else w
        planes = self.generator.planes(w, weight_offsets=self.weight_offsets)
        images = [
            self.generator.synthesize(
                w, camera[None], weight_offsets=self.weight_offsets, offset_planes=self.offset_planes, planes=planes
            ).image
            for camera in cameras.to(w.device)
        ]
        return torch.cat(images).clamp(-1, 1)


class InversionMethod(ABC):
    """A way to invert photos.

    Attributes:
        name: as on the command line and in the results.
        label: as in pictures and tables.
        batched: whether a batch takes less time than its photos one by one.
    """

    name: str
    label: str
    batched = True

    @abstractmethod
    def invert(self, image: torch.Tensor, camera: torch.Tensor) -> list[Reconstruction]:
        """Inverts photos [B, 3, S, S] in [-1, 1] seen by cameras [B, 25], each for itself.

        Raises:
            FloatingPointError: the optimisation diverged.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What results depend on beside the pipeline, for the records; plain JSON values."""

    def warm_up(self, image: torch.Tensor, camera: torch.Tensor) -> None:
        """Runs once what `invert` runs, so that its time is not spent on compilation and allocation."""
        self.invert(image[:1], camera[:1])


class EncoderMethod(InversionMethod):
    """The code that an encoder predicts, and the generator as it is. pSp and StyleTransformer are such encoders.

    Args:
        name, label: see `InversionMethod`.
        generator: the generator.
        encoder: predicts W or W+.
        source: where the encoder came from, for the records.
    """

    def __init__(self, name: str, label: str, generator: EG3DGenerator, encoder: ImageEncoder, source: str):
        self.name, self.label, self.source = name, label, source
        self.generator, self.encoder = generator, encoder

    def settings(self) -> dict[str, Any]:
        return {"encoder": self.source, "space": self.encoder.latent_space}

    @torch.no_grad()
    def invert(self, image: torch.Tensor, camera: torch.Tensor) -> list[Reconstruction]:
        w = self.encoder(image)
        return _render_each(self.generator, w, camera)


class LatentOptimization(InversionMethod):
    """The code whose render is nearest to the photo, found by gradient descent in W or W+."""

    def __init__(
        self, name: str, label: str, generator: EG3DGenerator, loss: InversionLoss, latent: LatentSettings, space: str
    ):
        self.name, self.label = name, label
        self.generator, self.loss, self.latent, self.space = generator, loss, latent, space

    def settings(self) -> dict[str, Any]:
        return {"space": self.space, "latent": asdict(self.latent), "loss": _weights_of(self.loss)}

    def invert(self, image: torch.Tensor, camera: torch.Tensor) -> list[Reconstruction]:
        w = optimize_latent(self.generator, self.loss, image, camera, self.latent, self.space)
        return _render_each(self.generator, w, camera)

    def warm_up(self, image: torch.Tensor, camera: torch.Tensor) -> None:
        latent = LatentSettings(steps=min(3, self.latent.steps))
        w = optimize_latent(self.generator, self.loss, image[:1], camera[:1], latent, self.space)
        _render_each(self.generator, w, camera[:1])


class PivotalTuning(InversionMethod):
    """PTI (Roich et al. 2022): a code in W by optimisation (the pivot), then the generator's weights for this code.

    Without its locality regularisation, which its authors leave off by default. Pivots of a batch are found side by
    side; the generator is tuned to one photo at a time.

    PTI ends tuning at an LPIPS of 0.06, about a tenth of LPIPS between faces of different persons. `stop_share` states
    that rule for perceptual distances of any scale: a share of the distance between the photo and the average face.

    Args:
        generator: the generator.
        loss: of both phases.
        latent: the pivot's optimisation.
        tuning: the weights' optimisation; its `stop_distance` holds where `stop_share` is `None`.
        stop_share: see above.
    """

    name, label = "pti", "PTI"

    def __init__(
        self, generator: EG3DGenerator, loss: InversionLoss, latent: LatentSettings, tuning: TuningSettings,
        stop_share: float | None = None,
    ):  # fmt: skip
        self.generator, self.loss, self.latent, self.tuning = generator, loss, latent, tuning
        self.stop_share = stop_share

    def settings(self) -> dict[str, Any]:
        return {
            "space": "w", "latent": asdict(self.latent), "tuning": asdict(self.tuning), "stop_share": self.stop_share,
            "loss": _weights_of(self.loss),
        }  # fmt: skip

    def invert(self, image: torch.Tensor, camera: torch.Tensor) -> list[Reconstruction]:
        w = optimize_latent(self.generator, self.loss, image, camera, self.latent)
        return self._tune(image, camera, w, self.tuning)

    def warm_up(self, image: torch.Tensor, camera: torch.Tensor) -> None:
        latent = LatentSettings(steps=min(3, self.latent.steps))
        w = optimize_latent(self.generator, self.loss, image[:1], camera[:1], latent)
        self._tune(image[:1], camera[:1], w, TuningSettings(steps=min(3, self.tuning.steps)))

    def _tune(self, image, camera, w, tuning) -> list[Reconstruction]:
        results = []
        for photo, view, code in zip(image.split(1), camera.split(1), w.split(1)):
            if self.stop_share is not None:
                tuning = replace(tuning, stop_distance=self.stop_share * self._average_distance(photo, view))
            results.append(_tune_one(self.generator, self.loss, photo, view, code, tuning))
        return results

    @torch.no_grad()
    def _average_distance(self, photo, view) -> float:
        output = self.generator.synthesize(self.generator.w_avg[None].float(), view)
        losses = self.loss(output.image, output.image_raw, photo, view)
        return self.loss.weights.perceptual * losses["perceptual"].item()


class GeneratorAdaptation(InversionMethod):
    """Ablation (2), without the auxiliary network: as many gradient steps on the generator's own weights.

    The code is the encoder's and the loss Eq. 8, as in the full method. The steps are Adam's, with one rate for all
    weights: plain gradient descent with one rate makes far less of five steps.
    """

    name, label, batched = "without_auxiliary", "without auxiliary network", False

    def __init__(self, generator: EG3DGenerator, encoder: LatentEncoder, loss: InversionLoss, tuning: TuningSettings):
        self.generator, self.encoder, self.loss, self.tuning = generator, encoder, loss, tuning

    def settings(self) -> dict[str, Any]:
        return {"tuning": asdict(self.tuning), "loss": _weights_of(self.loss)}

    def invert(self, image: torch.Tensor, camera: torch.Tensor) -> list[Reconstruction]:
        with torch.no_grad():
            w = self.encoder(image)
        return [
            _tune_one(self.generator, self.loss, *one, self.tuning)
            for one in zip(image.split(1), camera.split(1), w.split(1))
        ]


class AuxiliaryAdaptation(InversionMethod):
    """The paper's method: an auxiliary network's prediction, then gradient steps on the auxiliary network (Eq. 5).

    With `steps` 0 it is the prediction alone; a hypernetwork without adaptation (HyperInverter) is that of another
    auxiliary network. A single photo is adapted by [`~metaaux.adaptation.adapt`], as in `MetaAuxInverter.invert`.

    Args:
        name, label: see `InversionMethod`.
        generator: the generator.
        encoder: gives the code, which stays fixed.
        loss: Eq. 8.
        auxiliary: the auxiliary network.
        steps: N of Eq. 5.
        learning_rate: α of Eq. 5; `None` takes the rates stored in the auxiliary network.
        source: where the auxiliary network came from, for the records.
    """

    def __init__(
        self,
        name: str,
        label: str,
        generator: EG3DGenerator,
        encoder: LatentEncoder,
        loss: InversionLoss,
        auxiliary: AuxiliaryNetwork,
        steps: int,
        learning_rate: float | None,
        source: str,
    ):
        self.name, self.label, self.source = name, label, source
        self.generator, self.encoder, self.loss, self.auxiliary = generator, encoder, loss, auxiliary
        self.steps, self.learning_rate = steps, learning_rate

    def settings(self) -> dict[str, Any]:
        return {
            "auxiliary": self.source,
            "steps": self.steps,
            "learning_rate": self.learning_rate,
            "loss": _weights_of(self.loss),
        }

    def invert(self, image: torch.Tensor, camera: torch.Tensor) -> list[Reconstruction]:
        if len(image) > 1:
            return self._invert_batch(image, camera)
        return [self._invert_one(*one) for one in zip(image.split(1), camera.split(1))]

    def _invert_one(self, image, camera) -> Reconstruction:
        with torch.no_grad():
            w = self.encoder(image)
        result = adapt(
            self.generator,
            self.auxiliary,
            self.loss,
            image,
            w,
            camera,
            steps=self.steps,
            learning_rate=self.learning_rate,
        )
        final = result.image[0].detach().clamp(-1, 1)
        return Reconstruction(final, w, camera, self.generator, result.weight_offsets, result.offset_planes)

    def _invert_batch(self, image, camera) -> list[Reconstruction]:
        generator, auxiliary = self.generator, self.auxiliary
        tasks = make_tasks(generator, self.encoder, image, camera)
        parameters = {name: p.detach().requires_grad_() for name, p in auxiliary.adaptable_parameters().items()}
        inner = InnerLoop.of(auxiliary, self.steps)
        if self.learning_rate is not None:
            inner.rates = dict.fromkeys(inner.rates, torch.tensor(self.learning_rate, device=image.device))
        with torch.enable_grad():
            adapted, _ = InnerProblem(generator, auxiliary, self.loss, tasks, inner).run(parameters)
        with torch.no_grad():
            offsets = predict_tasks(auxiliary, adapted, tasks)
            return [self._of_task(tasks, offsets, index) for index in range(len(image))]

    def _of_task(self, tasks: Tasks, offsets, index: int) -> Reconstruction:
        part = slice(index, index + 1)
        w, camera = tasks.w[part], tasks.camera[part]
        weight_offsets = {name: offset[index] for name, offset in offsets.weight_offsets.items()}
        offset_planes = None if offsets.offset_planes is None else offsets.offset_planes[part]
        output = self.generator.synthesize(w, camera, weight_offsets=weight_offsets, offset_planes=offset_planes)
        if not torch.isfinite(output.image).all():
            raise FloatingPointError("the reconstruction is not finite: the adaptation diverged")
        return Reconstruction(output.image[0].clamp(-1, 1), w, camera, self.generator, weight_offsets, offset_planes)


def _weights_of(loss: InversionLoss) -> dict[str, float]:
    return {name: value for name, value in asdict(loss.weights).items() if value}


def _tune_one(generator, loss, photo, view, code, tuning: TuningSettings) -> Reconstruction:
    tuned, steps = tune_generator(generator, loss, photo, view, code, tuning)
    return replace(_render_each(tuned, code, view)[0], tuning_steps=steps)


@torch.no_grad()
def _render_each(generator: EG3DGenerator, w: torch.Tensor, camera: torch.Tensor) -> list[Reconstruction]:
    results = []
    for one, view in zip(w.split(1), camera.split(1)):
        image = generator.synthesize(one, view).image[0]
        if not torch.isfinite(image).all():
            raise FloatingPointError("the reconstruction is not finite: the optimisation diverged")
        results.append(Reconstruction(image.clamp(-1, 1), one, view, generator))
    return results
