"""EG3D's dual discriminator (EG3D §4.4): StyleGAN2's, judging the image together with its raw rendering."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from .activation import LRELU_GAIN, activated
from .resampling import blur2d, downsample2d
from .stylegan2 import FullyConnected, MappingNetwork
from .weights import full_dtype


class Convolution(nn.Module):
    """Convolution with equalised learning rate, optional ×½ resampling, bias and leaky ReLU (`activate`)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        down: bool = False,
        activate: bool = True,
        conv_clamp: float | None = None,
    ):
        super().__init__()
        self.down, self.conv_clamp = down, conv_clamp
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if activate else None

    def forward(self, x, gain=1.0):
        if self.bias is None:
            weight = (self.weight * (self.weight_gain * gain)).to(x.dtype)
            return F.conv2d(downsample2d(x) if self.down else x, weight)
        # Gains are the same before a leaky ReLU, where they cost no pass over the activations.
        weight = (self.weight * (self.weight_gain * gain * LRELU_GAIN)).to(x.dtype)
        bias = (self.bias * (gain * LRELU_GAIN)).to(x.dtype)
        if self.down:
            x = F.conv2d(blur2d(x, padding=2), weight, bias, stride=2)
        else:
            x = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
        return activated(x, bound=None if self.conv_clamp is None else self.conv_clamp * gain)


class DiscriminatorBlock(nn.Module):
    """Residual block that halves the resolution; the first one also turns the picture into features."""

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        image_channels: int,
        conv_clamp: float | None,
    ):
        super().__init__()
        if not in_channels:
            self.fromrgb = Convolution(image_channels, mid_channels, 1, conv_clamp=conv_clamp)
        self.conv0 = Convolution(mid_channels, mid_channels, 3, conv_clamp=conv_clamp)
        self.conv1 = Convolution(mid_channels, out_channels, 3, down=True, conv_clamp=conv_clamp)
        self.skip = Convolution(mid_channels, out_channels, 1, down=True, activate=False)
        self.first = not in_channels

    def forward(self, x):
        if self.first:
            x = self.fromrgb(x)
        return self.skip(x, math.sqrt(0.5)) + self.conv1(self.conv0(x), math.sqrt(0.5))


def minibatch_deviation(x: torch.Tensor, group: int) -> torch.Tensor:
    """Append a channel with the standard deviation over groups of the batch (Karras et al. 2018, §3).

    The group is the largest divisor of the batch up to `group`.
    """
    batch, _, height, width = x.shape
    group = next(g for g in range(min(group, batch), 0, -1) if batch % g == 0)
    y = x.reshape(group, -1, *x.shape[1:])
    y = ((y - y.mean(dim=0)).square().mean(dim=0) + 1e-8).sqrt().mean(dim=(1, 2, 3), keepdim=True)
    return torch.cat((x, y.repeat(group, 1, height, width)), dim=1)


class DualDiscriminator(ModelMixin, ConfigMixin):
    """Realism of (image, raw rendering) pairs under a camera.

    Args:
        image_size: side of the image in pixels.
        camera_dim: length of the camera condition (25; 0 for none).
        channel_base, channel_max: widths, min(base / resolution, max).
        first_channels: width at the image's own resolution, if it is to be another.
        conv_clamp: clamp of activations or None.
        mapping_layers: layers of the camera's mapping network.
        deviation_group: batch group of the minibatch deviation, which couples the samples of a call.
        raw_size: side of the raw rendering that it was trained with; photos are reduced to it for comparison.
        dual: False makes the plain StyleGAN2 discriminator, which ignores `image_raw`.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        image_size: int = 512,
        camera_dim: int = 25,
        channel_base: int = 32768,
        channel_max: int = 512,
        conv_clamp: float | None = 256.0,
        mapping_layers: int = 8,
        deviation_group: int = 4,
        raw_size: int = 128,
        dual: bool = True,
        first_channels: int | None = None,
    ):
        super().__init__()
        image_channels = 6 if dual else 3
        self.resolutions = [2**i for i in range(image_size.bit_length() - 1, 2, -1)]
        channels = {r: min(channel_base // r, channel_max) for r in [*self.resolutions, 4]}
        channels[image_size] = first_channels or channels[image_size]
        for r in self.resolutions:
            block = DiscriminatorBlock(
                channels[r] if r < image_size else 0, channels[r], channels[r // 2], image_channels, conv_clamp
            )
            self.add_module(f"b{r}", block)
        self.conv = Convolution(channels[4] + 1, channels[4], 3, conv_clamp=conv_clamp)
        self.fc = FullyConnected(channels[4] * 16, channels[4], activation="lrelu")
        self.out = FullyConnected(channels[4], channels[4] if camera_dim else 1)
        if camera_dim:
            self.mapping_network = MappingNetwork(0, camera_dim, channels[4], mapping_layers, track_average=False)

    def features(
        self, image: torch.Tensor, image_raw: torch.Tensor | None, dtype: torch.dtype | None = None
    ) -> list[torch.Tensor]:
        """image [B, 3, S, S], raw rendering [B, 3, h, h] → each block's output [B, C, S/2 … 4, ·], fine to coarse."""
        x = image
        if self.config.dual:
            side = image.shape[-1]
            if image_raw.shape[-1] != side:
                image_raw = F.interpolate(image_raw, size=(side, side), mode="bilinear", antialias=True)
            x = torch.cat((image, image_raw), dim=1)
        x = x.to(dtype or full_dtype(self)).contiguous(memory_format=torch.channels_last)
        features = []
        for r in self.resolutions:
            x = getattr(self, f"b{r}")(x)
            features.append(x)
        return features

    def forward(
        self,
        image: torch.Tensor,
        image_raw: torch.Tensor | None,
        cameras: torch.Tensor | None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """→ logits [B, 1] in float32, higher for photos. `dtype`: of the blocks, the weights' by default,
        but float32 for float16, in which gradients would underflow."""
        return self.judge(self.features(image, image_raw, dtype)[-1], cameras)

    def judge(self, features: torch.Tensor, cameras: torch.Tensor | None) -> torch.Tensor:
        """The last of `features` [B, C, 4, 4], cameras [B, 25] → logits [B, 1] in float32."""
        x = features.float()
        x = self.conv(minibatch_deviation(x, self.config.deviation_group))
        x = self.out(self.fc(x.flatten(1)))
        if self.config.camera_dim:
            condition = self.mapping_network(None, cameras)
            x = (x * condition).sum(dim=1, keepdim=True) / math.sqrt(x.shape[1])
        return x
