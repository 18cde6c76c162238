"""Optimisation of the latent code alone (Eq. 1), in W or W+."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from ..losses import InversionLoss
from .base import Generator, InversionMethod, Reconstruction, render_each, weights_of
from .optimization import LatentSettings, optimize_latent, reconstruction_loss
from .registry import MethodRequest, register


class LatentOptimization(InversionMethod):
    """The code whose render is nearest to the photo, found by gradient descent in W or W+.

    Args:
        name: see `InversionMethod`.
        label: see `InversionMethod`.
        generator: the generator.
        loss: what is minimised.
        latent: of the optimiser.
        space: "w" or "w+".
    """

    def __init__(
        self,
        name: str,
        label: str,
        generator: Generator,
        loss: InversionLoss,
        latent: LatentSettings,
        space: str,
    ):
        super().__init__(name, label)
        self.generator, self.loss, self.latent, self.space = generator, loss, latent, space

    def settings(self) -> dict[str, Any]:
        return {"space": self.space, "latent": asdict(self.latent), "loss": weights_of(self.loss)}

    def invert(self, image: torch.Tensor, camera: torch.Tensor) -> list[Reconstruction]:
        w = optimize_latent(self.generator, self.loss, image, camera, self.latent, self.space)
        return render_each(self.generator, w, camera, self.loss.dtype)

    def warm_up(self, image: torch.Tensor, camera: torch.Tensor) -> None:
        latent = LatentSettings(steps=min(3, self.latent.steps))
        w = optimize_latent(self.generator, self.loss, image[:1], camera[:1], latent, self.space)
        render_each(self.generator, w, camera[:1], self.loss.dtype)


@register("w+", "optimisation (W+)")
@register("w", "optimisation (W)")
def make_latent(request: MethodRequest) -> LatentOptimization:
    """In the space that the method's name says."""
    loss = reconstruction_loss(request.inverter)
    generator = request.inverter.generator
    return LatentOptimization(request.name, request.label, generator, loss, request.options.latent, request.name)
