"""A second discriminator on the features of a frozen image network (Kumari et al., "Ensembling Off-the-shelf Models
for GAN Training", 2022; Sauer et al., "Projected GANs Converge Faster", 2021). Used in training only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from .activation import LRELU_SLOPE
from .perceptual import unit_channels


class FeatureHead(nn.Module):
    """Realism of each position of a feature map: [B, C, H, W] → logits [B, 1, H, W]. Spectrally normalised, so that it
    cannot grow steep where few photos are known."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.squeeze = spectral_norm(nn.Conv2d(channels, width, 1))
        self.conv = spectral_norm(nn.Conv2d(width, width, 3, padding=1))
        self.out = spectral_norm(nn.Conv2d(width, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.leaky_relu(self.squeeze(x), LRELU_SLOPE)
        return self.out(F.leaky_relu(self.conv(x), LRELU_SLOPE))


class FeatureDiscriminator(ModelMixin, ConfigMixin):
    """Patch discriminators over several taps of a frozen network; the network itself is no part of it.

    Args:
        taps: which of the network's taps are judged, by index.
        channels: of each of those taps.
        width: of the heads.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self, taps: tuple[int, ...] = (1, 2, 6), channels: tuple[int, ...] = (128, 256, 512), width: int = 128
    ):
        super().__init__()
        if len(taps) != len(channels):
            raise ValueError(f"{len(taps)} taps need as many channels, got {list(channels)}")
        self.heads = nn.ModuleList(FeatureHead(c, width) for c in channels)

    def forward(self, taps: list[torch.Tensor]) -> list[torch.Tensor]:
        """The network's taps [B, C, H, W] → for each judged one, logits [B, 1, H, W] in float32, higher for photos.

        Every position's features are brought to unit mean square first, whatever scale the network gives them.
        """
        chosen = [taps[index] for index in self.config.taps]
        return [head(unit_channels(x) * x.shape[1] ** 0.5) for head, x in zip(self.heads, chosen, strict=True)]
