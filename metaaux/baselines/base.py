"""What an inversion method is, and what it gives: one interface for ours, its ablations and the baselines (Sec. 4.1).

All methods invert into the same generator and know a photo's camera. They use the networks and losses of one
`MetaAuxInverter`; none changes it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..losses import InversionLoss
from ..models.eg3d import EG3DGenerator
from ..models.stylegan2 import StyleGAN2Generator

Generator = EG3DGenerator | StyleGAN2Generator
#: More, of 512² pixels, would take memory that an inversion beside them needs.
_VIEWS_AT_ONCE = 4


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
    generator: Generator
    weight_offsets: Mapping[str, torch.Tensor] = field(default_factory=dict)
    offset_planes: torch.Tensor | None = None
    tuning_steps: int | None = None

    @torch.no_grad()
    def views(self, cameras: torch.Tensor, w: torch.Tensor | None = None) -> torch.Tensor:
        """The head seen by cameras [V, 25], of its own code or of edited ones [1 or V, …]: [V, 3, S, S] in [-1, 1]."""
        w = self.w if w is None else w
        planes = self.generator.planes(w, weight_offsets=self.weight_offsets) if len(w) == 1 else None
        codes = w.expand(len(cameras), *w.shape[1:])
        images = []
        for part, own in zip(cameras.to(w.device).split(_VIEWS_AT_ONCE), codes.split(_VIEWS_AT_ONCE), strict=True):
            offset_planes, shared = (
                None if tensor is None else tensor.expand(len(part), *tensor.shape[1:])
                for tensor in (self.offset_planes, planes)
            )
            images.append(self.generator.synthesize(own, part, self.weight_offsets, offset_planes, shared).image)
        return torch.cat(images).clamp(-1, 1)


class InversionMethod(ABC):
    """A way to invert photos.

    Attributes:
        name: as on the command line and in the results.
        label: as in pictures and tables.
        batched: whether a batch takes less time than its photos one by one.
    """

    batched = True

    def __init__(self, name: str, label: str):
        self.name, self.label = name, label

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


def weights_of(loss: InversionLoss) -> dict[str, float]:
    """The constants of a loss that are not 0, for the records."""
    return {name: value for name, value in asdict(loss.weights).items() if value}


@torch.no_grad()
def render_each(
    generator: Generator, w: torch.Tensor, camera: torch.Tensor, dtype: torch.dtype | None = None
) -> list[Reconstruction]:
    """What a generator makes of codes [B, …] seen by cameras [B, 25], one by one; `dtype` of its products.

    Raises:
        FloatingPointError: a picture is not finite.
    """
    results = []
    for one, view in zip(w.split(1), camera.split(1)):
        image = generator.synthesize(one, view, dtype=dtype).image[0]
        if not torch.isfinite(image).all():
            raise FloatingPointError("the reconstruction is not finite: the optimisation diverged")
        results.append(Reconstruction(image.clamp(-1, 1), one, view, generator))
    return results
