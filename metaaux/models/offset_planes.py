"""The 3D module of the auxiliary network (§3.3): offset tri-planes, by which the renderer's sample points are moved.

Dimensions: see `metaaux.models`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .activation import LRELU_SLOPE
from .stylegan2 import MappingNetwork, SynthesisBlock

#: The image features' side is the image's divided by this, a ResNet's.
BACKBONE_STRIDE = 32


class OffsetPlaneNetwork(nn.Module):
    """The 3D module: image features and camera → an offset tri-plane.

    StyleGAN blocks modulated by the camera of the photo raise the image features to tri-plane features; convolutions
    compare them with the generator's own planes and give three displacement vectors, one a plane, at each position.

    Args:
        in_channels: channels of the image features.
        in_resolution: their side.
        channels: width of blocks and convolutions.
        camera_channels: length of the camera's style vector.
        plane_features: channels C of each of the generator's planes.
        image_plane_features: channels of each plane of image features.
        resolution: side of the prediction, a power of two times `in_resolution`.
        bias_resolution: side r of the offset planes and of the bias that each position has; the prediction is
            interpolated to it. 0: there is no such bias, and the planes are as large as the prediction.
        bound: |Δp| never exceeds it; world units.
    """

    def __init__(
        self,
        in_channels: int,
        in_resolution: int,
        channels: int,
        camera_channels: int,
        plane_features: int,
        image_plane_features: int,
        resolution: int,
        bias_resolution: int,
        bound: float,
    ):
        super().__init__()
        num_blocks = (resolution // in_resolution).bit_length() - 1
        if num_blocks < 1 or in_resolution << num_blocks != resolution:
            raise ValueError(
                f"the offset planes' resolution {resolution} must be 2, 4, 8, … times the side {in_resolution} of the "
                f"image features (the image's side / {BACKBONE_STRIDE})"
            )
        self.resolution, self.bound = resolution, bound
        self.mapping = MappingNetwork(0, 25, camera_channels, track_average=False)
        self.blocks = nn.ModuleList(
            SynthesisBlock(
                channels if i else in_channels,
                channels,
                camera_channels,
                in_resolution << (i + 1),
                image_channels=3 * image_plane_features,
                use_noise=False,
            )
            for i in range(num_blocks)
        )
        self.compare = nn.Conv2d(3 * (image_plane_features + plane_features), channels, 3, padding=1)
        self.refine = nn.Conv2d(channels, channels, 3, padding=1)
        self.to_offsets = nn.Conv2d(channels, 9, 3, padding=1)
        # A bias a position, for the reason given for D in `HyperNetwork`. Of all that gradient steps move it counts
        # most, so it may be finer than the prediction.
        self.bias = nn.Parameter(torch.zeros(9, bias_resolution, bias_resolution)) if bias_resolution else None
        nn.init.zeros_(self.to_offsets.weight)
        nn.init.zeros_(self.to_offsets.bias)

    def forward(self, features: torch.Tensor, cameras: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
        """Features [B, in_channels, h, h], cameras [B, 25], planes [B, 3, C, R, R] → [B, 3, 3, r, r]."""
        style = self.mapping(None, cameras)
        x, image_planes = features, None
        for block in self.blocks:
            ws = style[:, None].expand(-1, block.num_convs + 1, -1)
            x, image_planes = block(x, image_planes, ws, dtype=features.dtype)
        factor = planes.shape[-1] // self.resolution
        own_planes = F.avg_pool2d(planes.flatten(1, 2), factor)
        x = torch.cat([image_planes, own_planes.to(image_planes.dtype)], dim=1)
        x = F.leaky_relu(self.compare(x), LRELU_SLOPE)
        x = F.leaky_relu(self.refine(x), LRELU_SLOPE)
        predicted = self.to_offsets(x).float()
        if self.bias is not None:
            if predicted.shape[-2:] != self.bias.shape[-2:]:
                predicted = F.interpolate(predicted, self.bias.shape[-2:], mode="bilinear", align_corners=False)
            predicted = predicted + self.bias
        vectors = predicted.unflatten(1, (3, 3))
        # Each plane's vector is kept shorter than a third of the bound. Bilinear weights sum to at most one, so
        # the sum of the three look-ups (Eq. 4) stays within the bound. Unlike a norm this has all derivatives at 0.
        return vectors * torch.rsqrt(1 + vectors.square().sum(dim=2, keepdim=True)) * (self.bound / 3)
