"""EG3D's hybrid super-resolution (EG3D §4.3): two StyleGAN2 blocks from rendered features to the final image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .resampling import upsample2d
from .stylegan2 import SynthesisBlock, split_offsets

# kind: (input side / output side, whether the first block doubles the resolution, channels of the two blocks)
KINDS = {
    "2X": (2, False, (128, 64)),
    "4X": (2, False, (128, 64)),
    "8X": (4, True, (128, 64)),
    "8XDC": (4, True, (256, 128)),
}


def block_channels(kind: str, channels: Sequence[int] | None = None) -> tuple[int, int]:
    """Channels of the two blocks: `channels`, or the kind's.

    Raises:
        ValueError: there is no such kind, or `channels` are not two.
    """
    if kind not in KINDS:
        raise ValueError(f"super_resolution_kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if channels is None:
        return KINDS[kind][2]
    if len(channels) != 2:
        raise ValueError(f"super_resolution_channels must be two numbers, got {channels!r}")
    return tuple(channels)


class SuperResolution(nn.Module):
    """Features and raw image of any size → image of `image_size`.

    `kind` names the released variants: "2X" (64 → 128 pixels), "4X" (128 → 256), "8X" and "8XDC" (128 → 512, the
    latter with twice the channels). Inputs of another size are resampled to the input side first. `antialias` is
    EG3D's `sr_antialias`. `channels` of the two blocks are the kind's unless given; no released variant has others.
    Every layer is styled by the last w.
    """

    def __init__(
        self,
        kind: str,
        feature_channels: int,
        image_size: int,
        w_dim: int,
        use_noise: bool = True,
        conv_clamp: float | None = 256.0,
        antialias: bool = True,
        channels: Sequence[int] | None = None,
    ):
        super().__init__()
        wide, narrow = block_channels(kind, channels)
        factor, first_up, _ = KINDS[kind]
        self.input_size = image_size // factor
        self.antialias = antialias
        first = self.input_size * 2 if first_up else self.input_size
        self.block0 = SynthesisBlock(feature_channels, wide, w_dim, first, 3, first_up, use_noise, conv_clamp)
        self.block1 = SynthesisBlock(wide, narrow, w_dim, image_size, 3, True, use_noise, conv_clamp)

    def forward(
        self, features, w, dtype=torch.float32, noise="none", offsets: Mapping[str, torch.Tensor] | None = None
    ):
        """features [B, C, h, h] whose first three channels are the raw image, w [B, w_dim] → image [B, 3, S, S]."""
        if features.shape[-1] * 2 == self.input_size:
            features = upsample2d(features, replicate=True)
        elif features.shape[-1] != self.input_size:
            features = F.interpolate(
                features, size=(self.input_size, self.input_size), mode="bilinear", antialias=self.antialias
            )
        ws = w[:, None].expand(-1, 3, -1)
        x, image = features, features[:, :3].float()
        x, image = self.block0(x, image, ws, dtype, noise, split_offsets(offsets, "block0."))
        x, image = self.block1(x, image, ws, dtype, noise, split_offsets(offsets, "block1."))
        return image
