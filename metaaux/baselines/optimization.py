"""Inversion by optimisation: of the latent code, and of the generator's weights (PTI, Roich et al. 2022).

A batch holds photos that have nothing to do with each other: each one's result is what it would get alone.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..losses import InversionLoss, LossWeights, perceptual_distance
from ..precision import reduced_dtype
from .base import Generator, Reconstruction, render_each

if TYPE_CHECKING:
    from ..pipeline import MetaAuxInverter

#: λ_lpips of the paper. A checkpoint whose perceptual distance has another scale has another weight; their ratio turns
#: distances into units of LPIPS.
PAPER_PERCEPTUAL_WEIGHT = 0.8


@dataclass(frozen=True)
class LatentSettings:
    """Optimisation of a latent code by Adam from the generator's average.

    The defaults are those with which PTI finds its pivot: StyleGAN2's projector with 450 steps. Its noise maps and its
    random moves of w are left out, since they serve the search among a 2D generator's noise inputs: the result is
    deterministic.

    Attributes:
        steps: number of steps.
        learning_rate: the largest, reached after `rampup` of the steps, and left by a cosine in the last `rampdown`.
        rampup: share of the steps.
        rampdown: share of the steps.
    """

    steps: int = 450
    learning_rate: float = 5e-3
    rampup: float = 0.05
    rampdown: float = 0.25

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"a latent code is optimised for 1 step or more, got {self.steps}")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        progress = step / self.steps
        ramp = min(1.0, (1 - progress) / self.rampdown)
        return self.learning_rate * (0.5 - 0.5 * math.cos(ramp * math.pi)) * min(1.0, progress / self.rampup)


@dataclass(frozen=True)
class TuningSettings:
    """Optimisation of the generator's weights by Adam.

    Attributes:
        steps: the most steps. PTI: 350.
        learning_rate: PTI: 3e-4, for weights of unit variance.
        stop_distance: no further step once the loss' weighted perceptual distance is at or below it; `None`: never.
            PTI stops at an LPIPS of 0.06.
    """

    steps: int = 350
    learning_rate: float = 3e-4
    stop_distance: float | None = None

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"a generator is tuned for 0 steps or more, got {self.steps}")


def reconstruction_loss(inverter: MetaAuxInverter) -> InversionLoss:
    """PTI's loss, L2 + λ·LPIPS with λ = 1, on the checkpoint's perceptual distance brought to the scale of LPIPS.

    PTI finds its pivot by LPIPS alone; here both terms guide it, since the distance need not be LPIPS.
    """
    unit = inverter.config.weight_perceptual / PAPER_PERCEPTUAL_WEIGHT
    weights = LossWeights(perceptual=unit, identity=0.0, adversarial=0.0)
    distance = perceptual_distance(inverter.perceptual, inverter.discriminator)
    return InversionLoss(weights, distance, None, None, dtype=reduced_dtype(inverter.precision))


def optimize_latent(
    generator: Generator,
    loss: InversionLoss,
    image: torch.Tensor,
    camera: torch.Tensor,
    settings: LatentSettings,
    space: str = "w",
) -> torch.Tensor:
    """Latent codes of photos [B, 3, S, S] in [-1, 1] seen by cameras [B, 25].

    Args:
        generator: in eval mode; not changed.
        loss: what is minimised; the generator computes in its precision.
        image, camera: the photos.
        settings: of the optimiser.
        space: "w" gives [B, w_dim], "w+" a code for each layer [B, num_ws, w_dim].

    Raises:
        ValueError: another space.
        FloatingPointError: a loss became infinite or not a number.
    """
    if space not in ("w", "w+"):
        raise ValueError(f"the latent space is 'w' or 'w+', got {space!r}")
    start = generator.w_avg.detach().float()
    shape = (len(image), generator.num_ws) if space == "w+" else (len(image),)
    with torch.enable_grad():
        w = start.expand(*shape, -1).clone().requires_grad_()
        optimizer = torch.optim.Adam([w], lr=settings.learning_rate)
        reference = loss.reference(image, camera)
        for step in range(settings.steps):
            optimizer.param_groups[0]["lr"] = settings.rate(step)
            output = generator.synthesize(w, camera, dtype=loss.dtype)
            losses = loss(output.image, output.image_raw, reference, camera)
            optimizer.zero_grad(set_to_none=True)
            losses["total"].sum().backward()
            optimizer.step()
    if not torch.isfinite(w).all():
        raise FloatingPointError(f"the latent code diverged within {settings.steps} steps; lower the learning rate")
    return w.detach()


def tune_generator(
    generator: Generator,
    loss: InversionLoss,
    image: torch.Tensor,
    camera: torch.Tensor,
    w: torch.Tensor,
    settings: TuningSettings,
) -> tuple[Generator, int]:
    """A copy of the generator whose weights reproduce one photo from a fixed code, and the steps that it took.

    All weights behind the mapping network are tuned, as in PTI.

    Args:
        generator: in eval mode; not changed.
        loss: what is minimised; the generator computes in its precision.
        image: the photo [1, 3, S, S] in [-1, 1].
        camera: [1, 25].
        w: its code [1, w_dim] or [1, num_ws, w_dim].
        settings: of the optimiser.

    Raises:
        ValueError: more than one photo.
        FloatingPointError: the loss became infinite or not a number.
    """
    if len(image) != 1:
        raise ValueError(f"a generator is tuned to one photo, got {len(image)}")
    tuned = copy.deepcopy(generator)
    parameters = [
        parameter.requires_grad_()
        for name, parameter in tuned.named_parameters()
        if not name.startswith("mapping_network.")
    ]
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    reference = loss.reference(image, camera)
    steps = 0
    with torch.enable_grad():
        for _ in range(settings.steps):
            output = tuned.synthesize(w, camera, dtype=loss.dtype)
            losses = loss(output.image, output.image_raw, reference, camera)
            distance = loss.weights.perceptual * losses["perceptual"].item()
            if not math.isfinite(losses["total"].item()):
                raise FloatingPointError(
                    f"the loss is {losses['total'].item()} after {steps} steps of tuning; lower the learning rate"
                )
            if settings.stop_distance is not None and distance <= settings.stop_distance:
                break
            optimizer.zero_grad(set_to_none=True)
            losses["total"].sum().backward()
            optimizer.step()
            steps += 1
    tuned.requires_grad_(False)
    return tuned, steps


def tune_to_photo(
    generator: Generator,
    loss: InversionLoss,
    image: torch.Tensor,
    camera: torch.Tensor,
    w: torch.Tensor,
    settings: TuningSettings,
) -> Reconstruction:
    """What [`tune_generator`] makes of one photo, as a reconstruction; arguments and errors are the same."""
    tuned, steps = tune_generator(generator, loss, image, camera, w, settings)
    return replace(render_each(tuned, w, camera, loss.dtype)[0], tuning_steps=steps)
