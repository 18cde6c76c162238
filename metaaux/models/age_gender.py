"""Apparent age and gender of faces: face-api.js' age and gender network (TinyXception), weights given by path."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

# Mean RGB and scale of the network's training, for images of 0 to 255.
_MEAN = (122.782, 117.001, 104.298)
_SCALE = 256.0
_SIDE = 112


def pad_same(x: torch.Tensor, kernel: int, stride: int, value: float = 0.0) -> torch.Tensor:
    """Pads [B, C, H, W] as TensorFlow's "same" does: ceil(side / stride) outputs, an odd pixel right and below."""
    pads = []
    for side in (x.shape[3], x.shape[2]):
        total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value)


class SameConv(nn.Module):
    """Convolution with TensorFlow's "same" padding."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1):
        super().__init__()
        self.stride = stride
        self.filters = nn.Parameter(torch.zeros(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in, H, W] → [B, out, ⌈H / stride⌉, ⌈W / stride⌉]."""
        x = pad_same(x, self.filters.shape[-1], self.stride)
        return F.conv2d(x, self.filters, self.bias, stride=self.stride)


class SeparableConv(nn.Module):
    """3×3 depthwise, then 1×1 convolution with bias."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.depthwise_filter = nn.Parameter(torch.zeros(in_channels, 1, 3, 3))
        self.pointwise_filter = nn.Parameter(torch.zeros(out_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in, H, W] → [B, out, H, W]."""
        x = F.conv2d(x, self.depthwise_filter, padding=1, groups=x.shape[1])
        return F.conv2d(x, self.pointwise_filter, self.bias)


class ReductionBlock(nn.Module):
    """Two separable convolutions and a max pool, added to a strided 1×1 convolution of the input."""

    def __init__(self, in_channels: int, out_channels: int, leading_relu: bool = True):
        super().__init__()
        self.leading_relu = leading_relu
        self.separable_conv0 = SeparableConv(in_channels, out_channels)
        self.separable_conv1 = SeparableConv(out_channels, out_channels)
        self.expansion_conv = SameConv(in_channels, out_channels, 1, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in, H, W] → [B, out, ⌈H / 2⌉, ⌈W / 2⌉]."""
        y = self.separable_conv0(F.relu(x) if self.leading_relu else x)
        y = self.separable_conv1(F.relu(y))
        y = F.max_pool2d(pad_same(y, 3, 2, value=float("-inf")), 3, stride=2)
        return y + self.expansion_conv(x)


class MainBlock(nn.Module):
    """Three times ReLU and separable convolution, with a residual connection."""

    def __init__(self, channels: int):
        super().__init__()
        self.separable_conv0 = SeparableConv(channels, channels)
        self.separable_conv1 = SeparableConv(channels, channels)
        self.separable_conv2 = SeparableConv(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] → the same shape."""
        y = self.separable_conv0(F.relu(x))
        y = self.separable_conv1(F.relu(y))
        return self.separable_conv2(F.relu(y)) + x


class Head(nn.Module):
    """Linear layer under the names of the weights file."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in] → [B, out]."""
        return F.linear(x, self.weights, self.bias)


class AgeGenderNetwork(nn.Module):
    """Age in years and probability of being male, as this network judges a face.

    Parameters are named as in face-api.js' `age_gender_model`. It sees the central `crop` of an image's side.

    Args:
        crop: fraction of the image's side; 0.6875 is 88 of 128 pixels, which suits crops of this project's framing.
    """

    def __init__(self, crop: float = 0.6875):
        super().__init__()
        self.crop = crop
        self.entry_flow = nn.ModuleDict(
            {
                "conv_in": SameConv(3, 32, 3, stride=2),
                "reduction_block_0": ReductionBlock(32, 64, leading_relu=False),
                "reduction_block_1": ReductionBlock(64, 128),
            }
        )
        self.middle_flow = nn.ModuleDict({"main_block_0": MainBlock(128), "main_block_1": MainBlock(128)})
        self.exit_flow = nn.ModuleDict(
            {"reduction_block": ReductionBlock(128, 256), "separable_conv": SeparableConv(256, 512)}
        )
        self.fc = nn.ModuleDict({"age": Head(512, 1), "gender": Head(512, 2)})

    @classmethod
    def from_file(cls, path: str | os.PathLike, crop: float = 0.6875) -> AgeGenderNetwork:
        """Loads the weights from a safetensors file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no safetensors file, or it holds other weights.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no attribute network at {path}")
        network = cls(crop)
        try:
            network.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as error:
            message = " ".join(str(error).split())
            raise ValueError(f"{path} does not hold face-api.js' age and gender network: {message:.300}") from None
        return network.eval().requires_grad_(False)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [B, 3, S, S] in [-1, 1] → age in years [B] and P(male) [B]."""
        side = image.shape[-1]
        kept = round(side * self.crop)
        start = (side - kept) // 2
        x = image[:, :, start : start + kept, start : start + kept].float()
        if kept != _SIDE:
            x = F.interpolate(x, size=(_SIDE, _SIDE), mode="bilinear", antialias=True)
        mean = torch.tensor(_MEAN, dtype=torch.float32, device=x.device).view(1, 3, 1, 1)
        x = (x.clamp(-1, 1) * 127.5 + 127.5 - mean) / _SCALE
        x = F.relu(self.entry_flow["conv_in"](x))
        x = self.entry_flow["reduction_block_1"](self.entry_flow["reduction_block_0"](x))
        x = self.middle_flow["main_block_1"](self.middle_flow["main_block_0"](x))
        x = F.relu(self.exit_flow["separable_conv"](self.exit_flow["reduction_block"](x)))
        x = x.mean(dim=(2, 3))  # 7×7 average pool of a 7×7 map
        return self.fc["age"](x)[:, 0], self.fc["gender"](x).softmax(dim=1)[:, 0]
