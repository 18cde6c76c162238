"""Image encoder: the initial latent code w of a photo (Sec. 3.2), after StyleTransformer (Hu et al. 2022).

A convolutional trunk gives features at three scales; learnt queries gather what each part of the latent code needs
from them, coarse to fine, in transformer blocks. The encoder is trained first and stays fixed afterwards.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .perceptual import resize_antialiased


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation, 16 channels a group: the same in training and at batch 1."""
    return nn.GroupNorm(channels // 16, channels)


class ResidualBlock(nn.Module):
    """Pre-activation residual block; halves the resolution if `stride` is 2 (average-pooled shortcut)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.stride = stride
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C_in, H, W] -> [B, C_out, H / stride, W / stride]."""
        residual = self.conv1(F.silu(self.norm1(x)))
        residual = self.conv2(F.silu(self.norm2(residual)))
        shortcut = F.avg_pool2d(x, 2) if self.stride == 2 else x
        return self.shortcut(shortcut) + residual


class FeaturePyramid(nn.Module):
    """Features of `width` channels at 1/16, 1/8 and 1/4 of the input's side, with top-down additions."""

    def __init__(self, widths: Sequence[int], depths: Sequence[int], width: int):
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, stride=2, padding=1)
        stages = []
        channels = widths[0]
        for index, (stage_width, depth) in enumerate(zip(widths, depths)):
            blocks = []
            for unit in range(depth):
                blocks.append(ResidualBlock(channels, stage_width, stride=2 if index > 0 and unit == 0 else 1))
                channels = stage_width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.laterals = nn.ModuleList(
            nn.Sequential(group_norm(channels), nn.Conv2d(channels, width, 1)) for channels in reversed(widths[1:])
        )

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """[B, 3, S, S] -> three maps [B, width, S/16, S/16], [B, width, S/8, S/8], [B, width, S/4, S/4]."""
        x = self.stem(image)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        pyramid = []
        for feature, lateral in zip(reversed(features[1:]), self.laterals):
            level = lateral(feature)
            if pyramid:
                level = level + F.interpolate(pyramid[-1], scale_factor=2.0, mode="nearest")
            pyramid.append(level)
        return pyramid


class Attention(nn.Module):
    """Multi-head scaled dot-product attention of queries [B, Q, D] over tokens [B, T, D]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_query = nn.Linear(width, width)
        self.to_key_value = nn.Linear(width, 2 * width)
        self.to_out = nn.Linear(width, width)

    def forward(self, queries: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Attended values [B, Q, D]."""
        query = self.to_query(queries).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.to_key_value(tokens).chunk(2, dim=-1)
        key = key.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        value = value.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.to_out(attended.transpose(1, 2).flatten(2))


class StyleTransformerBlock(nn.Module):
    """Self-attention among queries, cross-attention to each pyramid level from coarse to fine, feed-forward."""

    def __init__(self, width: int, heads: int, levels: int, expansion: int):
        super().__init__()
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads)
        self.cross_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(levels))
        self.cross_attentions = nn.ModuleList(Attention(width, heads) for _ in range(levels))
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, expansion * width), nn.GELU(), nn.Linear(expansion * width, width)
        )

    def forward(self, queries: torch.Tensor, levels: list[torch.Tensor]) -> torch.Tensor:
        """Queries [B, Q, D] and tokens of each level [B, T_l, D] -> queries [B, Q, D]."""
        normed = self.self_norm(queries)
        queries = queries + self.self_attention(normed, normed)
        for norm, attention, tokens in zip(self.cross_norms, self.cross_attentions, levels):
            queries = queries + attention(norm(queries), tokens)
        return queries + self.feed_forward(queries)


class ImageEncoder(ModelMixin, ConfigMixin, ABC):
    """What encoders of all kinds share: codes are offsets from the generator's average latent code, in its standard
    deviations. The buffers `w_avg` and `w_std` [w_dim] are the generator's (`set_latent_statistics`).

    Subclasses have `image_size`, `input_size` and `w_dim` in their configuration and make the offsets in `offsets`.
    `tasks.encode` calls them with all that they ask for.
    """

    def __init__(self, input_size: int, widths: Sequence[int], depths: Sequence[int], width: int, w_dim: int):
        super().__init__()
        if input_size % 16:
            raise ValueError(f"input_size must be a multiple of 16, got {input_size}.")
        if len(widths) != 4 or len(depths) != 4:
            raise ValueError(f"widths and depths need four stages each, got {list(widths)} and {list(depths)}.")
        if any(channels % 16 for channels in (*widths, width)):
            raise ValueError(f"widths {list(widths)} and width {width} must be divisible by 16.")
        self.pyramid = FeaturePyramid(widths, depths, width)
        self.register_buffer("w_avg", torch.zeros(w_dim))
        self.register_buffer("w_std", torch.ones(w_dim))

    @torch.no_grad()
    def set_latent_statistics(self, w_avg: torch.Tensor, w_std: torch.Tensor) -> None:
        """Stores the mean and standard deviation [w_dim] of the generator's latent codes.

        Raises:
            ValueError: if either is of another shape.
        """
        for name, value in (("w_avg", w_avg), ("w_std", w_std)):
            if value.shape != self.w_avg.shape:
                raise ValueError(f"{name} must be of shape {list(self.w_avg.shape)}, got {list(value.shape)}.")
        self.w_avg.copy_(w_avg)
        self.w_std.copy_(w_std)

    @property
    def identity_size(self) -> int:
        """Length of the embedding that it is to be told beside the image; 0: none."""
        return self.config.get("identity_size", 0)

    def forward(self, image: torch.Tensor, identity: torch.Tensor | None = None) -> torch.Tensor:
        """Latent codes (float32) of images [B, 3, image_size, image_size] in [-1, 1]: [B, w_dim], or [B, num_ws,
        w_dim] in "w+". `identity` [B, identity_size]: the faces' embeddings by the identity network.

        Raises:
            ValueError: for images of another size, or embeddings other than those that it was made for.
        """
        size = self.config.image_size
        if image.ndim != 4 or tuple(image.shape[1:]) != (3, size, size):
            raise ValueError(f"The encoder takes images [B, 3, {size}, {size}], got {list(image.shape)}.")
        given = 0 if identity is None else identity.shape[-1]
        if given != self.identity_size:
            raise ValueError(f"The encoder takes embeddings of length {self.identity_size}, got {given}.")
        if self.config.input_size != size:
            image = resize_antialiased(image, self.config.input_size).to(image.dtype)
        return self.w_avg.float() + self.w_std.float() * self.offsets(self.pyramid(image), identity).float()

    @property
    @abstractmethod
    def latent_space(self) -> str:
        """One code for all layers, "w", or one a layer, "w+"."""

    @abstractmethod
    def offsets(self, pyramid: list[torch.Tensor], identity: torch.Tensor | None) -> torch.Tensor:
        """Features of the three levels (see `FeaturePyramid`) and embeddings → offsets [B, w_dim] or [B, num_ws,
        w_dim]."""


#: Queries that are made of an embedding.
IDENTITY_QUERIES = 4


class LatentEncoder(ImageEncoder):
    """Predicts a generator's latent code from an aligned image, as an offset from its average latent code.

    The last layer starts at zero: an untrained encoder answers `w_avg`, the average face.

    Args:
        image_size: side of the images it is given.
        input_size: side at which it looks at them, a multiple of 16; other images are resized, antialiased.
        w_dim: length of a latent vector.
        num_ws: latent vectors the generator takes.
        space: "w": one vector for all layers; "w+": one a layer.
        num_queries: learnt queries. In "w+" each gives its layer's vector, so it must be num_ws; in "w" all of them
            together give one.
        widths: channels of the four convolutional stages at 1/2, 1/4, 1/8 and 1/16 of the input's side, divisible by
            16.
        depths: residual blocks of each stage.
        width: channels of pyramid and transformer, divisible by 16 and by `num_heads`.
        num_blocks: transformer blocks.
        num_heads: attention heads.
        expansion: hidden width of the feed-forward layers, in multiples of `width`.
        identity_size: length of an identity network's embedding of the face, from which further queries are made; 0:
            it has the image alone. What a network that was trained on millions of people knows of a face need not be
            learnt anew from a few thousand photos.

    Raises:
        ValueError: for a space or sizes that do not fit together.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 512,
        input_size: int = 256,
        w_dim: int = 512,
        num_ws: int = 14,
        space: str = "w",
        num_queries: int = 14,
        widths: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (3, 4, 14, 3),
        width: int = 512,
        num_blocks: int = 3,
        num_heads: int = 8,
        expansion: int = 2,
        identity_size: int = 0,
    ):
        super().__init__(input_size, widths, depths, width, w_dim)
        if space not in ("w", "w+"):
            raise ValueError(f"Unknown latent space {space!r}: choose 'w' or 'w+'.")
        if space == "w+" and num_queries != num_ws:
            raise ValueError(f"In 'w+' num_queries must be num_ws={num_ws}, got num_queries={num_queries}.")
        if width % num_heads:
            raise ValueError(f"width {width} must be divisible by num_heads={num_heads}.")
        self.token_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.queries = nn.Parameter(torch.randn(num_queries, width))
        if identity_size:
            self.identity_norm = nn.LayerNorm(identity_size, elementwise_affine=False)
            self.to_queries = nn.Linear(identity_size, IDENTITY_QUERIES * width)
        self.blocks = nn.ModuleList(StyleTransformerBlock(width, num_heads, 3, expansion) for _ in range(num_blocks))
        self.out_norm = nn.LayerNorm(width)
        self.to_offset = nn.Linear(width * num_queries if space == "w" else width, w_dim)
        nn.init.zeros_(self.to_offset.weight)
        nn.init.zeros_(self.to_offset.bias)

    @property
    def latent_space(self) -> str:
        """See `ImageEncoder`."""
        return self.config.space

    def offsets(self, pyramid: list[torch.Tensor], identity: torch.Tensor | None) -> torch.Tensor:
        """See `ImageEncoder`."""
        levels = []
        for level, norm in zip(pyramid, self.token_norms):
            tokens = norm(level.flatten(2).transpose(1, 2))
            levels.append(tokens + position_encoding(*level.shape[2:], level.shape[1], tokens))
        queries = self.queries.expand(len(pyramid[0]), -1, -1)
        if identity is not None:
            person = self.to_queries(self.identity_norm(identity.to(queries.dtype))).unflatten(
                1, (IDENTITY_QUERIES, -1)
            )
            queries = torch.cat((queries, person.to(queries.dtype)), dim=1)
        for block in self.blocks:
            queries = block(queries, levels)
        queries = self.out_norm(queries[:, : len(self.queries)])

        return self.to_offset(queries.flatten(1) if self.config.space == "w" else queries)


def position_encoding(height: int, width: int, channels: int, like: torch.Tensor) -> torch.Tensor:
    """Sinusoids of row and column [height * width, channels], with the dtype and device of `like`.

    Wavelengths run from the whole side to two positions of a 64-wide map, so the same place of a face has the same
    code at any scale.
    """
    frequencies = math.pi * 2 ** torch.linspace(0, 6, channels // 4, dtype=torch.float32, device=like.device)
    rows = (torch.arange(height, dtype=torch.float32, device=like.device) + 0.5) / height
    columns = (torch.arange(width, dtype=torch.float32, device=like.device) + 0.5) / width
    rows = (rows[:, None] * frequencies)[:, None].expand(height, width, -1)
    columns = (columns[:, None] * frequencies)[None].expand(height, width, -1)
    encoding = torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], dim=-1)
    return encoding.flatten(0, 1).to(like.dtype)
