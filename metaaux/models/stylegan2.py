"""StyleGAN2 building blocks (Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020).

EG3D's backbone, super-resolution and discriminator, the auxiliary network's 3D module and the 2D variant are all made
of these. Activations are `channels_last`; the dtype of the activations decides the precision of a convolution, while
styles and modulation are computed in the dtype of `w` (float32).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..cameras import CAMERA_FOCAL, CAMERA_RADIUS, camera_from_pose
from .activation import LRELU_GAIN, LRELU_SLOPE, activated
from .modulation import modulated_conv2d
from .resampling import blur2d, upsample2d
from .weights import full_dtype, note_origin

KERNEL_SIZE = 3  # of the convolutions that take weight offsets


class FullyConnected(nn.Module):
    """Linear layer with equalised learning rate: y = act(x·Wᵀ·(lr/√in) + b·lr).

    `activation` is "linear" or "lrelu". Weights are drawn from N(0, 1)/`lr_multiplier`, biases start at `bias_init`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: str = "linear",
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
    ):
        super().__init__()
        if activation not in ("linear", "lrelu"):
            raise ValueError(f"activation must be 'linear' or 'lrelu', got {activation!r}")
        self.activation = activation
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), float(bias_init)))

    def scaled(self, dtype: torch.dtype, gain: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [out, in] and bias [out] as they are applied, `gain` times."""
        return self.weight.to(dtype) * (self.weight_gain * gain), self.bias.to(dtype) * (self.bias_gain * gain)

    def forward(self, x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        """[..., in] → [..., out], computed in the dtype of `x`; weights and biases count `gain` times."""
        if x.is_cuda:
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            weight_gain, bias_gain = self.weight_gain * gain, self.bias_gain * gain
            # One kernel: at a batch of one, a generator's time is that of its kernels' launches.
            y = torch.addmm(bias, x.flatten(0, -2), weight.t(), beta=bias_gain, alpha=weight_gain)
            y = y.unflatten(0, x.shape[:-1])
        else:
            # New memory is aligned, that of loaded weights not always, by which a product's rounding would differ.
            y = F.linear(x, *self.scaled(x.dtype, gain))
        return F.leaky_relu(y, LRELU_SLOPE) * LRELU_GAIN if self.activation == "lrelu" else y


def normalize_second_moment(x: torch.Tensor) -> torch.Tensor:
    """Scale the last axis to a mean square of one."""
    return x * (x.square().mean(dim=-1, keepdim=True) + 1e-8).rsqrt()


class MappingNetwork(nn.Module):
    """z (and a condition) → w (StyleGAN2 §2; EG3D conditions on the camera).

    Either input may be absent (`z_dim` or `condition_dim` 0). `w_avg` tracks the mean of w for truncation; it is
    updated by the trainer only, never by a call.
    """

    def __init__(
        self,
        z_dim: int,
        condition_dim: int,
        w_dim: int,
        num_layers: int = 2,
        lr_multiplier: float = 0.01,
        track_average: bool = True,
    ):
        super().__init__()
        self.z_dim, self.condition_dim = z_dim, condition_dim
        features = [z_dim + (w_dim if condition_dim else 0)] + [w_dim] * num_layers
        if condition_dim:
            self.embed = FullyConnected(condition_dim, w_dim)
        self.layers = nn.ModuleList(
            FullyConnected(a, b, activation="lrelu", lr_multiplier=lr_multiplier)
            for a, b in zip(features[:-1], features[1:], strict=True)
        )
        if track_average:
            self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(self, z: torch.Tensor | None, condition: torch.Tensor | None) -> torch.Tensor:
        """z [B, z_dim] and condition [B, condition_dim] → w [B, w_dim] in float32."""
        parts = []
        if self.z_dim:
            parts.append(normalize_second_moment(z.float()))
        if self.condition_dim:
            parts.append(normalize_second_moment(self.embed(condition.float())))
        x = torch.cat(parts, dim=1)
        for layer in self.layers:
            x = layer(x)
        return x


class SynthesisLayer(nn.Module):
    """Style-modulated 3×3 convolution with noise, bias and leaky ReLU; `up` doubles the resolution first.

    `resolution` is the output's side in pixels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        up: bool = False,
        use_noise: bool = True,
        conv_clamp: float | None = None,
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.resolution, self.up, self.use_noise, self.conv_clamp = resolution, up, use_noise, conv_clamp
        self.affine = FullyConnected(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, KERNEL_SIZE, KERNEL_SIZE))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        if use_noise:
            self.register_buffer("noise_const", torch.randn(resolution, resolution))
            self.noise_strength = nn.Parameter(torch.zeros(()))

    def forward(self, x, w, noise="const", offset=None):
        """x [B, in, R, R] (R/2 if `up`), w [B, w_dim] → [B, out, R, R]; noise: "const", "random" or "none"."""
        x = modulated_conv2d(x, self.weight, self.affine(w), upsample=self.up, offset=offset, gain=LRELU_GAIN)
        if self.up:
            x = blur2d(x, padding=1, gain=2)
        added = None
        if self.use_noise and noise != "none":
            pattern = self.noise_const
            if noise == "random":
                pattern = torch.randn(
                    x.shape[0], 1, self.resolution, self.resolution, dtype=torch.float32, device=x.device
                )
            added = pattern, self.noise_strength
        return activated(x, self.bias, added, LRELU_GAIN, bound=self.conv_clamp)


class ToRGB(nn.Module):
    """Style-modulated 1×1 convolution to image (or tri-plane) channels, without demodulation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        conv_clamp: float | None = None,
    ):
        super().__init__()
        self.conv_clamp = conv_clamp
        self.style_gain = 1 / math.sqrt(in_channels)
        self.affine = FullyConnected(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x, w):
        """x [B, in, R, R], w [B, w_dim] → [B, out, R, R]."""
        x = modulated_conv2d(x, self.weight, self.affine(w, self.style_gain), demodulate=False)
        return activated(x, self.bias, slope=1.0, bound=self.conv_clamp)


class SynthesisBlock(nn.Module):
    """One resolution of a skip-architecture generator: up to two convolutions and a to-RGB branch.

    `in_channels` 0 makes the first block, which starts from a learnt constant. `up=False` keeps the resolution
    (EG3D's 2X and 4X super-resolution begin with such a block).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        image_channels: int,
        up: bool = True,
        use_noise: bool = True,
        conv_clamp: float | None = None,
    ):
        super().__init__()
        self.up = up
        if in_channels:
            self.conv0 = SynthesisLayer(in_channels, out_channels, w_dim, resolution, up, use_noise, conv_clamp)
        else:
            self.const = nn.Parameter(torch.randn(out_channels, resolution, resolution))
        self.has_conv0 = bool(in_channels)
        self.conv1 = SynthesisLayer(out_channels, out_channels, w_dim, resolution, False, use_noise, conv_clamp)
        self.torgb = ToRGB(out_channels, image_channels, w_dim, conv_clamp)
        self.num_convs = 2 if in_channels else 1

    def forward(self, x, image, ws, dtype, noise="const", offsets: Mapping[str, torch.Tensor] | None = None):
        """x [B, in, ·, ·] or None, image skip [B, c, ·, ·] or None, ws [B, num_convs + 1, w_dim] → (x, image).

        The image skip is accumulated in float32, the activations have `dtype`. `offsets` maps "conv0" and "conv1" to
        weight offsets δ.
        """
        offsets = offsets or {}
        w = iter(ws.unbind(dim=1))
        if self.has_conv0:
            x = self.conv0(x.to(dtype), next(w), noise, offsets.get("conv0"))
        else:
            x = self.const.to(dtype)[None].expand(ws.shape[0], -1, -1, -1)
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.conv1(x, next(w), noise, offsets.get("conv1"))
        if image is not None and self.up:
            image = upsample2d(image)
        rgb = self.torgb(x, next(w)).float()
        return x, rgb if image is None else image + rgb


class SynthesisNetwork(nn.Module):
    """StyleGAN2 synthesis: blocks `b4` … `b{resolution}` with min(`channel_base`/resolution, `channel_max`) channels.

    `num_ws` counts the w vectors it takes: one a convolution and one for the last to-RGB.
    """

    def __init__(
        self,
        w_dim: int,
        resolution: int,
        image_channels: int,
        channel_base: int,
        channel_max: int,
        use_noise: bool = True,
        conv_clamp: float | None = None,
    ):
        super().__init__()
        if resolution < 8 or resolution & (resolution - 1):
            raise ValueError(f"resolution must be a power of two of at least 8, got {resolution}")
        self.resolutions = [2**i for i in range(2, resolution.bit_length())]
        channels = {r: min(channel_base // r, channel_max) for r in self.resolutions}
        for r in self.resolutions:
            block = SynthesisBlock(
                channels.get(r // 2, 0),
                channels[r],
                w_dim,
                r,
                image_channels,
                use_noise=use_noise,
                conv_clamp=conv_clamp,
            )
            self.add_module(f"b{r}", block)
        self.num_ws = sum(getattr(self, f"b{r}").num_convs for r in self.resolutions) + 1

    def forward(self, ws, dtype=torch.float32, noise="const", offsets: Mapping[str, torch.Tensor] | None = None):
        """ws [B, num_ws, w_dim] → image [B, image_channels, R, R] in float32.

        `offsets` maps layer names such as "b8.conv0" to weight offsets δ.
        """
        x = image = None
        start = 0
        for r in self.resolutions:
            block = getattr(self, f"b{r}")
            own = split_offsets(offsets, f"b{r}.")
            x, image = block(x, image, ws[:, start : start + block.num_convs + 1], dtype, noise, own)
            start += block.num_convs
        return image


def offset_shapes(layer: tuple[int, int]) -> list[list[int]]:
    """The shapes that δ may have for a modulated layer (C_out, C_in): one number a kernel, or one a tap of it."""
    return [[*layer, side, side] for side in (1, KERNEL_SIZE)]


def split_offsets(offsets: Mapping[str, torch.Tensor] | None, prefix: str) -> dict[str, torch.Tensor]:
    """The entries of `offsets` whose name starts with `prefix`, with the prefix taken off."""
    return {name[len(prefix) :]: value for name, value in (offsets or {}).items() if name.startswith(prefix)}


def modulated_layer_shapes(network: nn.Module, prefix: str = "") -> dict[str, tuple[int, int]]:
    """{name: (C_out, C_in)} of every `SynthesisLayer` of `network`, in order of evaluation."""
    return {
        prefix + name: (layer.out_channels, layer.in_channels)
        for name, layer in network.named_modules()
        if isinstance(layer, SynthesisLayer)
    }


class LatentCodes:
    """What generators of both kinds do with w: one code or one a layer, truncation, checks of weight offsets."""

    def _apply(self, fn, recurse=True):
        # Every change of device or precision comes through here.
        note_origin(self, fn)
        return super()._apply(fn, recurse)

    @property
    def w_avg(self) -> torch.Tensor:
        """Mean of w [w_dim], towards which truncation pulls."""
        return self.mapping_network.w_avg

    def camera_at(
        self,
        yaw: float | torch.Tensor,
        pitch: float | torch.Tensor,
        radius: float | None = None,
        focal: float = CAMERA_FOCAL,
    ) -> torch.Tensor:
        """Camera [..., 25] of a view of its heads, as its training's cameras stood (`cameras.camera_from_pose`). A 2D
        generator has no use for it, but identity networks may.

        Args:
            yaw, pitch: degrees of the head in the picture.
            radius: distance from the origin. Default: the training's.
            focal: focal length in units of the image side.
        """
        radius = self.config.get("camera_radius", CAMERA_RADIUS) if radius is None else radius
        return camera_from_pose(yaw, pitch, radius, focal, self.config.get("camera_pivot", (0.0, 0.0, 0.0)))

    def _truncated(self, w: torch.Tensor, truncation_psi: float, truncation_cutoff: int | None) -> torch.Tensor:
        """w [B, w_dim] → ws [B, num_ws, w_dim], the first `truncation_cutoff` (all) of them pulled to the average."""
        ws = w[:, None].repeat(1, self.num_ws, 1)
        if truncation_psi != 1:
            cutoff = self.num_ws if truncation_cutoff is None else truncation_cutoff
            ws[:, :cutoff] = self.w_avg.to(ws.dtype).lerp(ws[:, :cutoff], truncation_psi)
        return ws

    def _broadcast(self, ws: torch.Tensor) -> torch.Tensor:
        if ws.ndim == 2:
            ws = ws[:, None].expand(-1, self.num_ws, -1)
        if ws.ndim != 3 or ws.shape[1:] != (self.num_ws, self.config.w_dim):
            raise ValueError(
                f"w must be [B, {self.config.w_dim}] or [B, {self.num_ws}, {self.config.w_dim}], got {list(ws.shape)}"
            )
        return ws

    def _check_offsets(self, weight_offsets: Mapping[str, torch.Tensor] | None):
        known = self.modulated_layers
        for name, offset in (weight_offsets or {}).items():
            if name not in known:
                raise ValueError(f"no layer {name!r} takes weight offsets; those that do: {', '.join(known)}")
            shapes = offset_shapes(known[name])
            if list(offset.shape[-4:]) not in shapes:
                raise ValueError(f"offset of {name} must be {shapes[0]} or {shapes[1]}, got {list(offset.shape)}")


@dataclass
class ImageOutput:
    """`image` [B, 3, S, S], around [-1, 1]. A 2D generator has no raw rendering and no depth."""

    image: torch.Tensor
    image_raw: None = None
    depth: None = None


class StyleGAN2Generator(LatentCodes, ModelMixin, ConfigMixin):
    """StyleGAN2's generator (skip architecture): the 2D variant of the paper's section 4.5.

    It offers what inversion needs of `EG3DGenerator` under the same names. There are no cameras, planes and depth:
    arguments for them exist so that callers need not tell the two apart, and only their empty values are accepted;
    a camera is ignored, for a picture has one view.

    Args:
        z_dim, w_dim: latent sizes.
        mapping_layers: layers of the mapping network.
        image_size: side of the image in pixels, a power of two.
        channel_base, channel_max: widths, min(base / resolution, max). The released 1024² model has base 32768.
        use_noise: whether layers own noise.
        conv_clamp: clamp of activations or None.
    """

    config_name = "config.json"
    #: Whether what it makes can be seen from other sides.
    has_viewpoints = False

    @register_to_config
    def __init__(
        self,
        z_dim: int = 512,
        w_dim: int = 512,
        mapping_layers: int = 8,
        image_size: int = 1024,
        channel_base: int = 32768,
        channel_max: int = 512,
        use_noise: bool = True,
        conv_clamp: float | None = None,
    ):
        super().__init__()
        self.mapping_network = MappingNetwork(z_dim, 0, w_dim, mapping_layers)
        self.backbone = SynthesisNetwork(w_dim, image_size, 3, channel_base, channel_max, use_noise, conv_clamp)
        self.num_ws = self.backbone.num_ws

    @property
    def modulated_layers(self) -> dict[str, tuple[int, int]]:
        """{layer name: (C_out, C_in)} of the convolutions that take weight offsets, in order of evaluation."""
        return modulated_layer_shapes(self.backbone, "backbone.")

    def mapping(
        self,
        z: torch.Tensor,
        cameras: torch.Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
    ) -> torch.Tensor:
        """z [B, z_dim] → ws [B, num_ws, w_dim]; truncation as `EG3DGenerator.mapping` has it."""
        return self._truncated(self.mapping_network(z, None), truncation_psi, truncation_cutoff)

    def planes(
        self,
        ws: torch.Tensor,
        weight_offsets: Mapping[str, torch.Tensor] | None = None,
        noise: str = "const",
        dtype: torch.dtype | None = None,
    ) -> None:
        """`None`: there is nothing that views could share."""
        return None

    def synthesize(
        self,
        ws: torch.Tensor,
        cameras: torch.Tensor | None = None,
        weight_offsets: Mapping[str, torch.Tensor] | None = None,
        offset_planes: torch.Tensor | None = None,
        planes: None = None,
        resolution: None = None,
        noise: str = "const",
        lookup: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> ImageOutput:
        """w [B, w_dim] or [B, num_ws, w_dim] → picture.

        `weight_offsets`, `noise` and `dtype` are those of `EG3DGenerator.planes`. Nothing is looked up in planes, so
        any `lookup` will do.

        Raises:
            ValueError: a w or an offset of the wrong shape, an offset for a layer that there is not, or planes.
        """
        if resolution is not None:
            raise ValueError(f"a 2D generator renders no rays: leave the resolution out, got {resolution}")
        if planes is not None or offset_planes is not None:
            raise ValueError("a 2D generator has no planes; the auxiliary network needs use_offset_planes=False")
        ws = self._broadcast(ws)
        self._check_offsets(weight_offsets)
        offsets = split_offsets(weight_offsets, "backbone.")
        return ImageOutput(self.backbone(ws.float(), dtype or full_dtype(self), noise, offsets))

    def forward(self, z: torch.Tensor, truncation_psi: float = 1.0) -> ImageOutput:
        """Random pictures from z [B, z_dim]."""
        return self.synthesize(self.mapping(z, truncation_psi=truncation_psi))
