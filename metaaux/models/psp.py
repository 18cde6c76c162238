"""pSp's encoder (Richardson et al. 2021), a baseline: one small convolutional network a layer of the generator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from .encoder import ImageEncoder

# The first layers of the generator, pSp's coarse and middle ones, read the pyramid's two lower levels.
COARSE, MIDDLE = 3, 7


class MapToStyle(nn.Module):
    """pSp's map2style: strided convolutions down to one pixel, then a linear layer, which starts at zero."""

    def __init__(self, width: int, side: int, w_dim: int):
        super().__init__()
        self.convs = nn.Sequential()
        while side > 1:
            self.convs += nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.LeakyReLU())
            side = -(-side // 2)
        self.to_offset = nn.Linear(width, w_dim)
        nn.init.zeros_(self.to_offset.weight)
        nn.init.zeros_(self.to_offset.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, width, side, side] → [B, w_dim]."""
        return self.to_offset(self.convs(x).flatten(1))


class PSPEncoder(ImageEncoder):
    """Predicts latent codes in W+ as pSp does, on the trunk and pyramid of this project's encoder.

    Args:
        image_size: side of the images it is given.
        input_size: side at which it looks at them, a multiple of 16.
        w_dim: length of a latent vector.
        num_ws: latent vectors the generator takes.
        widths, depths: channels and residual blocks of the four stages.
        width: channels of pyramid and heads, divisible by 16.

    Raises:
        ValueError: for sizes that do not fit together.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 512,
        input_size: int = 256,
        w_dim: int = 512,
        num_ws: int = 14,
        widths: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (3, 4, 14, 3),
        width: int = 512,
    ):
        super().__init__(input_size, widths, depths, width, w_dim)
        self.levels = [0 if i < COARSE else 1 if i < MIDDLE else 2 for i in range(num_ws)]
        self.heads = nn.ModuleList(MapToStyle(width, (input_size // 16) << level, w_dim) for level in self.levels)

    @property
    def latent_space(self) -> str:
        """See `ImageEncoder`."""
        return "w+"

    def offsets(self, pyramid: list[torch.Tensor], identity: torch.Tensor | None) -> torch.Tensor:
        """See `ImageEncoder`."""
        return torch.stack([head(pyramid[level]) for head, level in zip(self.heads, self.levels)], dim=1)
