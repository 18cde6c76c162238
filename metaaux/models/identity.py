"""Identity network R of Eq. 11: an image's face to a unit vector whose cosine tells persons apart.

IR-SE residual network of ArcFace (Deng et al. 2019). With the default configuration it is IR-SE50 on 112x112 crops,
the network that face inversion commonly uses; narrower widths and group normalisation give a small one that trains in
minutes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .perceptual import resize_antialiased

# Sides of the crop, as fractions of the image: left, top, right, bottom. The default is the one used with FFHQ-aligned
# 256x256 images (columns 32 to 220, rows 35 to 223).
FFHQ_CROP = (0.125, 0.13671875, 0.859375, 0.87109375)


def normalization_layer(kind: str, channels: int) -> nn.Module:
    """Batch normalisation, or group normalisation of 16 channels a group. Raises ValueError for another kind."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        if channels % 16:
            raise ValueError(f"Group normalisation needs widths divisible by 16, got {channels}.")
        return nn.GroupNorm(channels // 16, channels)
    raise ValueError(f"Unknown normalization {kind!r}: choose 'batch' or 'group'.")


class SqueezeExcitation(nn.Module):
    """Channel gates from the spatial mean (Hu et al. 2018)."""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.expand = nn.Conv2d(channels // reduction, channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> the same shape, each channel scaled by a gate in (0, 1)."""
        # On single positions a convolution is a matrix product, which is the cheaper call.
        means = F.relu(F.linear(x.mean(dim=(2, 3)), self.reduce.weight.flatten(1)))
        gates = F.linear(means, self.expand.weight.flatten(1))
        return x * torch.sigmoid(gates)[..., None, None]


class ImprovedResidualBlock(nn.Module):
    """ArcFace's "improved residual" unit with squeeze-excitation: norm, conv, PReLU, strided conv, norm, gates."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, normalization: str):
        super().__init__()
        self.stride = stride
        self.norm1 = normalization_layer(normalization, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.activation = nn.PReLU(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm2 = normalization_layer(normalization, out_channels)
        self.gates = SqueezeExcitation(out_channels)
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.shortcut_norm = normalization_layer(normalization, out_channels)
        else:
            self.shortcut = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C_in, H, W] -> [B, C_out, H / stride, W / stride]."""
        residual = self.activation(self.conv1(self.norm1(x)))
        residual = self.gates(self.norm2(self.conv2(residual)))
        if self.shortcut is None:
            shortcut = x[:, :, :: self.stride, :: self.stride]
        else:
            shortcut = self.shortcut_norm(self.shortcut(x))
        return shortcut + residual


class IdentityNetwork(ModelMixin, ConfigMixin):
    """Embeds the face of an image as a unit vector; 1 - cosine of two embeddings is the identity loss (Eq. 11).

    Args:
        input_size: side in pixels of the square the network sees, a multiple of 16.
        crop: left, top, right, bottom of the face region in fractions of the image's sides, cut before resizing.
        stem_width: channels of the first convolution.
        widths: channels of the four stages, each of which halves the resolution.
        depths: residual units of each stage; (3, 4, 14, 3) is IR-SE50.
        embedding_dim: length D of the embedding.
        normalization: "batch" (ArcFace) or "group" (independent of the batch, in training too).
        dropout: probability of dropping a value before the embedding layer, in training.

    Raises:
        ValueError: for sizes, crops or normalisations that do not fit together.
    """

    @register_to_config
    def __init__(
        self,
        input_size: int = 112,
        crop: Sequence[float] = FFHQ_CROP,
        stem_width: int = 64,
        widths: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (3, 4, 14, 3),
        embedding_dim: int = 512,
        normalization: str = "batch",
        dropout: float = 0.5,
    ):
        super().__init__()
        if input_size % 16:
            raise ValueError(f"input_size must be a multiple of 16, got {input_size}.")
        if len(widths) != 4 or len(depths) != 4:
            raise ValueError(f"widths and depths need four stages each, got {list(widths)} and {list(depths)}.")
        left, top, right, bottom = crop
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError(f"crop must be left < right, top < bottom in fractions of the image, got {list(crop)}.")

        self.stem = nn.Conv2d(3, stem_width, 3, padding=1, bias=False)
        self.stem_norm = normalization_layer(normalization, stem_width)
        self.stem_activation = nn.PReLU(stem_width)
        blocks = []
        channels = stem_width
        for width, depth in zip(widths, depths):
            for unit in range(depth):
                blocks.append(ImprovedResidualBlock(channels, width, 2 if unit == 0 else 1, normalization))
                channels = width
        self.blocks = nn.ModuleList(blocks)
        self.head_norm = normalization_layer(normalization, channels)
        self.head_dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels * (input_size // 16) ** 2, embedding_dim)
        # Batch normalisation of the embedding centres it; a group variant would only rescale what is made unit length
        # anyway.
        self.embedding_norm = nn.BatchNorm1d(embedding_dim) if normalization == "batch" else nn.Identity()

    def crop_face(self, image: torch.Tensor) -> torch.Tensor:
        """The configured face region of images [B, 3, H, W], resized with antialiasing to [B, 3, input_size,
        input_size].

        Raises:
            ValueError: if image is no RGB batch, or so small that the region has less than 8 pixels a side.
        """
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"The identity network takes images [B, 3, H, W], got {list(image.shape)}.")
        height, width = image.shape[2:]
        left, top, right, bottom = self.config.crop
        left, right = round(left * width), round(right * width)
        top, bottom = round(top * height), round(bottom * height)
        if min(right - left, bottom - top) < 8:
            raise ValueError(f"An image of {width}x{height} is too small: its crop is {right - left}x{bottom - top}.")
        face = image[:, :, top:bottom, left:right]
        return resize_antialiased(face, self.config.input_size).to(image.dtype)

    def embed_crop(self, face: torch.Tensor) -> torch.Tensor:
        """Unit vectors [B, D] (float32) of crops [B, 3, input_size, input_size] in [-1, 1]."""
        x = self.stem_activation(self.stem_norm(self.stem(face)))
        for block in self.blocks:
            x = block(x)
        x = self.head_dropout(self.head_norm(x)).flatten(1)
        x = self.embedding_norm(self.head(x))
        return F.normalize(x.float(), dim=1)

    def forward(self, image: torch.Tensor, cameras: torch.Tensor | None = None) -> torch.Tensor:
        """Unit vectors [B, D] (float32) of images [B, 3, H, W] in [-1, 1]. Raises ValueError as `crop_face` does.

        The crop is the same for all views, so the `cameras` [B, 25] that `losses.IdentityEmbedding` passes are unused.
        """
        return self.embed_crop(self.crop_face(image))
