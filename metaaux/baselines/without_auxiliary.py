"""Ablation (2) of Table 3: gradient steps on the generator's own weights in place of the auxiliary network's."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from ..losses import InversionLoss
from ..models.encoder import LatentEncoder
from ..tasks import encode
from .base import Generator, InversionMethod, Reconstruction, weights_of
from .optimization import TuningSettings, tune_to_photo
from .registry import MethodRequest, register


class GeneratorAdaptation(InversionMethod):
    """As many gradient steps as the full method's, on the generator's own weights.

    The code is the encoder's and the loss Eq. 8, as in the full method. The steps are Adam's, with one rate for all
    weights: plain gradient descent with one rate makes far less of five steps.

    Args:
        name: see `InversionMethod`.
        label: see `InversionMethod`.
        generator: the generator.
        encoder: gives the code, which stays fixed.
        loss: Eq. 8.
        tuning: of the steps.
    """

    batched = False

    def __init__(
        self,
        name: str,
        label: str,
        generator: Generator,
        encoder: LatentEncoder,
        loss: InversionLoss,
        tuning: TuningSettings,
    ):
        super().__init__(name, label)
        self.generator, self.encoder, self.loss, self.tuning = generator, encoder, loss, tuning

    def settings(self) -> dict[str, Any]:
        return {"tuning": asdict(self.tuning), "loss": weights_of(self.loss)}

    def invert(self, image: torch.Tensor, camera: torch.Tensor) -> list[Reconstruction]:
        w = encode(self.encoder, self.loss.identity, image, camera, self.loss.dtype)
        return [
            tune_to_photo(self.generator, self.loss, *one, self.tuning)
            for one in zip(image.split(1), camera.split(1), w.split(1))
        ]


@register("without_auxiliary", "without auxiliary network")
def make_without_auxiliary(request: MethodRequest) -> GeneratorAdaptation:
    """With the checkpoint's generator, encoder and loss."""
    inverter = request.inverter
    tuning = TuningSettings(steps=request.steps, learning_rate=request.options.generator_rate)
    return GeneratorAdaptation(
        request.name,
        request.label,
        inverter.generator,
        inverter.encoder,
        inverter.inversion_loss(),
        tuning,
    )
