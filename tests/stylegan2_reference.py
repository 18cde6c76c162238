"""Cases of the recorded StyleGAN2 outputs in `data/stylegan2_official.safetensors`; see `eg3d_reference`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from eg3d_reference import hashed_weights


@dataclass(frozen=True)
class StyleGAN2Case:
    """One recorded generator; `psi` and `cutoff`: truncation."""

    image_size: int
    w_dim: int = 64
    mapping_layers: int = 8
    conv_clamp: float | None = None
    psi: float = 0.7
    cutoff: int | None = None
    use_noise: bool = True

    def config(self) -> dict:
        """The `StyleGAN2Generator` of this case."""
        return {
            "z_dim": 48,
            "w_dim": self.w_dim,
            "mapping_layers": self.mapping_layers,
            "image_size": self.image_size,
            "channel_base": 1024,
            "channel_max": 48,
            "use_noise": self.use_noise,
            "conv_clamp": self.conv_clamp,
        }


CASES = {
    "64": StyleGAN2Case(64),
    "128-clamped": StyleGAN2Case(128, mapping_layers=2, conv_clamp=1.5, psi=0.5, cutoff=6),
    "16-quiet": StyleGAN2Case(16, psi=1.0, use_noise=False),
}


def weights(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A value for each parameter and buffer, by this project's names."""
    return hashed_weights(tensors)
