"""EG3D's generator (Chan et al., "Efficient Geometry-aware 3D Generative Adversarial Networks", 2022).

z and a camera → w → three feature planes → volume-rendered features at any camera → super-resolved image. Every step
is a method of its own, so that a new camera reuses the planes. Weight offsets and an offset tri-plane (this paper's
§3.3) are arguments: nothing in the generator is changed by a call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from .. import devices
from ..cameras import CAMERA_RADIUS
from . import decoder_cpu, fused_decoder, fused_march, renderer, triplane_cuda
from .recomputation import recomputed
from .stylegan2 import (
    FullyConnected,
    LatentCodes,
    MappingNetwork,
    SynthesisNetwork,
    modulated_layer_shapes,
    split_offsets,
)
from .super_resolution import SuperResolution
from .weights import full_dtype, half_dtype


@dataclass
class Rendering:
    """Volume-rendered maps of side h: `features` [B, C, h, h] in [-1, 1] (the first three are the raw image), `depth`
    [B, 1, h, h] (distance along the ray, world units) and `opacity` [B, 1, h, h] in [0, 1]."""

    features: torch.Tensor
    depth: torch.Tensor
    opacity: torch.Tensor


@dataclass
class GeneratorOutput:
    """`image` [B, 3, S, S] and `image_raw` [B, 3, h, h], both around [-1, 1]; `depth` [B, 1, h, h] in world units."""

    image: torch.Tensor
    image_raw: torch.Tensor
    depth: torch.Tensor


# Samples of the rays that are rendered together on the CPU.
SAMPLES_AT_ONCE = 36864


def _spans(count: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, count)) for start in range(0, count, size)]


class TriPlaneDecoder(nn.Module):
    """Sampled features → density and colour features through one hidden layer of softplus units (EG3D §4.2)."""

    def __init__(
        self,
        features: int,
        hidden: int,
        lr_multiplier: float,
    ):
        super().__init__()
        self.hidden = FullyConnected(features, hidden, lr_multiplier=lr_multiplier)
        self.out = FullyConnected(hidden, 1 + features, lr_multiplier=lr_multiplier)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[..., C] → densities [...] in float32 before activation, colour logits [..., C]."""
        weight, bias = self.out.scaled(features.dtype)
        x = F.softplus(self.hidden(features))
        # Apart, so that the wide product has aligned sides and the density is neither copied nor rounded twice.
        density = (x @ weight[0]).float() + bias[0].float()
        return density, F.linear(x, weight[1:], bias[1:])

    def in_blocks(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for float32 on a CPU, once differentiable."""
        return decoder_cpu.decode(features, *self.hidden.scaled(features.dtype), *self.out.scaled(features.dtype))


def shade(logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Colours of samples, summed along each ray.

    logits [B, M, S, C], weights [B, M, S] → [B, M, C] float32 in about [0, 1]: sigmoid widened to [-0.001, 1.001]
    (mip-NeRF's clamp) times weight.
    """
    colours = torch.sigmoid(logits.float())
    if devices.is_cpu(logits):
        total = (weights[..., None, :] @ colours)[..., 0, :]
    else:  # not as a product, which may be set to TF32
        total = (colours * weights[..., None]).sum(dim=-2)
    # Few passes over memory: Σ w·(1.002·s - 0.001) = 1.002·Σ w·s - 0.001·Σ w.
    return total * 1.002 - 0.001 * weights.sum(dim=-1, keepdim=True)


class EG3DGenerator(LatentCodes, ModelMixin, ConfigMixin):
    """Tri-plane generator; the default configuration is the released ffhq512-128's.

    With weights in float16 the super-resolution alone computes in it, as in EG3D's own training (`sr_num_fp16_res` 4,
    `num_fp16_res` 0), and only where it suffices: on GPUs and without gradients, which would underflow.

    Args:
        z_dim, w_dim: latent sizes.
        camera_dim: length of the camera condition of the mapping (25).
        mapping_layers: layers of the mapping network.
        pose_conditioning: whether the mapping sees its camera (else zeros); `camera_scale` scales it.
        image_size: side of the final image in pixels.
        plane_resolution, plane_features: side and channels of each plane.
        channel_base, channel_max: widths of the backbone, min(base / resolution, max).
        backbone_noise, super_resolution_noise: whether those layers own noise (the latter's is never applied).
        conv_clamp, super_resolution_conv_clamp: clamp of activations or None.
        plane_axes: projection of each plane. Released checkpoints were trained with ("xy", "xz", "zx").
        box_size: side of the cube that the planes cover, world units.
        decoder_hidden, decoder_lr_multiplier: of the tri-plane decoder.
        neural_resolution: side in rays of a rendering.
        depth_samples, importance_samples: samples a ray, first and second pass.
        stratified_importance: whether jittered samples of the second pass are spread over strata, which makes
            renderings with few samples flicker half as much; EG3D's are not.
        ray_start, ray_end: distances between which rays are sampled, world units.
        super_resolution_kind: "2X", "4X", "8X" or "8XDC"; super_resolution_antialias as EG3D's `sr_antialias`.
        super_resolution_channels: of the super-resolution's two blocks; the kind's unless given, as all released
            checkpoints have them.
        camera_radius, camera_pivot: distance of its training's cameras from the origin, and the point [3] that they
            looked at, world units (EG3D's `avg_camera_radius` and `avg_camera_pivot`); see `camera_at`.
    """

    config_name = "config.json"
    #: Whether what it makes can be seen from other sides.
    has_viewpoints = True
    # Attributes, so that a training run can set its own generator's.
    shade = staticmethod(shade)
    #: Where it is set and there are gradients, no more rays of each picture are marched at a time, and what their
    #: derivative needs is computed again in the backward pass (`recomputation`).
    rays_at_once: int | None = None

    @register_to_config
    def __init__(
        self,
        z_dim: int = 512,
        w_dim: int = 512,
        camera_dim: int = 25,
        mapping_layers: int = 2,
        pose_conditioning: bool = True,
        camera_scale: float = 1.0,
        image_size: int = 512,
        plane_resolution: int = 256,
        plane_features: int = 32,
        channel_base: int = 32768,
        channel_max: int = 512,
        backbone_noise: bool = True,
        super_resolution_noise: bool = True,
        conv_clamp: float | None = None,
        super_resolution_conv_clamp: float | None = 256.0,
        plane_axes: tuple[str, ...] = ("xy", "xz", "zx"),
        box_size: float = 1.0,
        decoder_hidden: int = 64,
        decoder_lr_multiplier: float = 1.0,
        neural_resolution: int = 128,
        depth_samples: int = 48,
        importance_samples: int = 48,
        stratified_importance: bool = False,
        ray_start: float = 2.25,
        ray_end: float = 3.3,
        super_resolution_kind: str = "8XDC",
        super_resolution_antialias: bool = True,
        camera_radius: float = CAMERA_RADIUS,
        camera_pivot: Sequence[float] = (0.0, 0.0, 0.0),
        super_resolution_channels: tuple[int, int] | None = None,
    ):
        super().__init__()
        for axes in plane_axes:
            if len(axes) != 2 or axes[0] == axes[1] or not set(axes) <= set("xyz"):
                raise ValueError(f"plane_axes holds pairs of two of x, y and z, got {axes!r}")
        self.mapping_network = MappingNetwork(z_dim, camera_dim, w_dim, mapping_layers)
        self.backbone = SynthesisNetwork(
            w_dim,
            plane_resolution,
            plane_features * len(plane_axes),
            channel_base,
            channel_max,
            backbone_noise,
            conv_clamp,
        )
        self.decoder = TriPlaneDecoder(plane_features, decoder_hidden, decoder_lr_multiplier)
        self.super_resolution = SuperResolution(
            super_resolution_kind,
            plane_features,
            image_size,
            w_dim,
            super_resolution_noise,
            super_resolution_conv_clamp,
            super_resolution_antialias,
            super_resolution_channels,
        )
        self.num_ws = self.backbone.num_ws

    @property
    def modulated_layers(self) -> dict[str, tuple[int, int]]:
        """{layer name: (C_out, C_in)} of the convolutions that take weight offsets, in order of evaluation."""
        return {
            **modulated_layer_shapes(self.backbone, "backbone."),
            **modulated_layer_shapes(self.super_resolution, "super_resolution."),
        }

    def mapping(
        self,
        z: torch.Tensor,
        cameras: torch.Tensor,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
    ) -> torch.Tensor:
        """z [B, z_dim], cameras [B, 25] → ws [B, num_ws, w_dim].

        `truncation_psi` 1 leaves w, 0 gives the average; `truncation_cutoff` limits it to the first so many layers.
        """
        condition = cameras * self.config.camera_scale
        if not self.config.pose_conditioning:
            condition = torch.zeros_like(condition)
        return self._truncated(self.mapping_network(z, condition), truncation_psi, truncation_cutoff)

    def planes(
        self,
        ws: torch.Tensor,
        weight_offsets: Mapping[str, torch.Tensor] | None = None,
        noise: str = "const",
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """w [B, w_dim] or [B, num_ws, w_dim] → feature planes [B, P, C, R, R] in float32.

        `weight_offsets` maps names of `modulated_layers` to δ [C_out, C_in, 1, 1] or [C_out, C_in, 3, 3], or one a
        sample; layers without an entry keep their weight. `noise` is "const", "random" or "none". `dtype` of the
        convolutions: that of the weights unless given, but float32 for float16.

        Raises:
            ValueError: a w or an offset of the wrong shape, an offset for a layer that there is not.
        """
        self._check_offsets(weight_offsets)
        image = self.backbone(
            self._broadcast(ws).float(), dtype or full_dtype(self), noise, split_offsets(weight_offsets, "backbone.")
        )
        # unflatten keeps the memory format, in which a pixel's channels stay adjacent for the look-up.
        return image.unflatten(1, (len(self.config.plane_axes), self.config.plane_features))

    def _decode(self, planes, points, offset_planes, lookup, dtype):
        config = self.config
        if lookup == "auto" and fused_decoder.is_supported(planes, offset_planes, self.decoder, config.plane_axes):
            return fused_decoder.decode(
                planes.to(dtype), points, offset_planes, self.decoder, config.plane_axes, config.box_size
            )
        if offset_planes is not None:
            # Eq. 4: Δp is the sum of the planes' look-ups, sample_planes' mean times their number.
            if isinstance(offset_planes, torch.Tensor):
                offset_planes = offset_planes.float()
            deformation = renderer.sample_planes(offset_planes, points, config.plane_axes, config.box_size, lookup)
            points = points + deformation * len(config.plane_axes)
        features = renderer.sample_planes(planes, points, config.plane_axes, config.box_size, lookup)
        if isinstance(planes, renderer.PlaneTable):
            return self.decoder.in_blocks(features)
        return self.decoder(features.to(dtype))

    def density(
        self, planes: torch.Tensor, points: torch.Tensor, offset_planes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Density before activation at points [B, M, 3] in world units → [B, M, 1] (softplus(· - 1) is σ)."""
        return self._decode(planes, points, offset_planes, "auto", planes.dtype)[0][..., None]

    def render(
        self,
        planes: torch.Tensor,
        cameras: torch.Tensor,
        resolution: int | None = None,
        offset_planes: torch.Tensor | None = None,
        jitter: bool = False,
        lookup: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> Rendering:
        """Volume-render planes [B, P, C, R, R] at cameras [B, 25] → `Rendering` of side `resolution`.

        `offset_planes` [B, P, 3, r, r] deforms the sample points by the sum of their look-ups (Eq. 3, 4), world units.
        Rendering is deterministic unless `jitter` draws the sample distances from the global random state, as training
        does. `lookup`: see `renderer.sample_planes`; "auto" takes `fused_decoder` and `fused_march` where they run.
        `dtype` of the decoder: that of `planes` unless given.
        """
        config = self.config
        side = resolution or config.neural_resolution
        dtype = dtype or planes.dtype
        origins, directions = renderer.camera_rays(cameras, side)
        batch, rays = directions.shape[:2]
        planes = planes.to(dtype)
        depths = renderer.stratified_depths(
            origins, rays, config.ray_start, config.ray_end, config.depth_samples, jitter
        )
        march = partial(self._march, lookup=lookup, dtype=dtype, jitter=jitter)
        size = self.rays_at_once if torch.is_grad_enabled() else None
        if devices.is_cpu(planes) and dtype == torch.float32 and lookup == "auto" and size is None:
            planes = renderer.PlaneTable.of(planes)
            offset_planes = None if offset_planes is None else renderer.PlaneTable.of(offset_planes.float())
            if not torch.is_grad_enabled():
                # A group of rays at a time, so that what is made of its samples stays in the processor's cache.
                size = max(1, SAMPLES_AT_ONCE // max(config.depth_samples, config.importance_samples))
        if size is None:
            colours, distance, opacity = march(planes, offset_planes, origins, directions, depths)
        else:
            uniform = (
                torch.rand(batch, rays, config.importance_samples, dtype=torch.float32, device=cameras.device)
                if jitter
                else None
            )
            march = partial(march, limits=torch.stack((depths.min(), depths.max())))
            if torch.is_grad_enabled():
                march = partial(recomputed, march)
            parts = [
                march(
                    planes,
                    offset_planes,
                    origins,
                    directions[:, start:end],
                    depths[:, start:end],
                    None if uniform is None else uniform[:, start:end],
                )
                for start, end in _spans(rays, size)
            ]
            colours, distance, opacity = (torch.cat(part, dim=1) for part in zip(*parts))
        # Not by contiguous(): at a batch of one it is content with strides that convolutions do not recognise.
        features = (colours * 2 - 1).unflatten(1, (side, side)).permute(0, 3, 1, 2)
        return Rendering(features, distance.reshape(batch, 1, side, side), opacity.reshape(batch, 1, side, side))

    def _marches_fused(self, planes) -> bool:
        """Whether the rays' kernels, which have no derivative, can composite."""
        config = self.config
        on_gpu = triplane_cuda.is_supported(planes, config.plane_axes) and not torch.is_grad_enabled()
        return on_gpu and fused_march.is_supported(config.depth_samples, config.importance_samples)

    def _march(
        self, planes, offset_planes, origins, directions, depths, uniform=None, *, lookup, dtype, jitter, limits=None
    ):
        """Samples and composites rays: colours [B, M, C] in about [0, 1], distance [B, M], opacity [B, M]."""
        config = self.config

        def evaluate(depths):
            points = origins[:, None, None] + depths[..., None] * directions[:, :, None]
            density, logits = self._decode(planes, points.flatten(1, 2), offset_planes, lookup, dtype)
            return density.reshape(depths.shape), logits.reshape(*depths.shape, -1)

        densities, logits = evaluate(depths)
        if lookup == "auto" and self._marches_fused(planes):
            if limits is None:
                limits = torch.stack((depths.min(), depths.max()))
            samples, quantiles = config.importance_samples, None
            if jitter:
                quantiles = renderer.random_quantiles(depths, samples, uniform, config.stratified_importance)
            fine_depths = fused_march.importance_depths(depths, densities, samples, quantiles)
            fine = fine_depths, *evaluate(fine_depths)
            return fused_march.composite((depths, densities, logits), fine, limits)
        if not config.importance_samples:
            weights, distance, opacity = renderer.merge_and_weigh(depths, densities, limits)
            return self.shade(logits, weights), distance, opacity
        coarse = renderer.compositing_weights(depths, densities.detach())
        fine_depths = renderer.importance_depths(
            depths, coarse, config.importance_samples, jitter, uniform, config.stratified_importance
        )
        fine_densities, fine_logits = evaluate(fine_depths)
        weights, distance, opacity = renderer.merge_and_weigh(
            torch.cat((depths, fine_depths), dim=-1), torch.cat((densities, fine_densities), dim=-1), limits
        )
        coarse_weights, fine_weights = weights.split((config.depth_samples, config.importance_samples), dim=-1)
        return self.shade(logits, coarse_weights) + self.shade(fine_logits, fine_weights), distance, opacity

    def super_resolve(
        self,
        features: torch.Tensor,
        ws: torch.Tensor,
        weight_offsets: Mapping[str, torch.Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Rendered features [B, C, h, h] and w → image [B, 3, image_size, image_size] in float32."""
        self._check_offsets(weight_offsets)
        return self.super_resolution(
            features,
            self._broadcast(ws)[:, -1].float(),
            dtype or half_dtype(self),
            "none",
            split_offsets(weight_offsets, "super_resolution."),
        )

    def synthesize(
        self,
        ws: torch.Tensor,
        cameras: torch.Tensor,
        weight_offsets: Mapping[str, torch.Tensor] | None = None,
        offset_planes: torch.Tensor | None = None,
        planes: torch.Tensor | None = None,
        resolution: int | None = None,
        noise: str = "const",
        jitter: bool = False,
        lookup: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> GeneratorOutput:
        """w → picture at the cameras [B, 25]; `planes` of an earlier call spare the backbone."""
        if planes is None:
            planes = self.planes(ws, weight_offsets, noise, dtype)
        rendering = self.render(planes, cameras, resolution, offset_planes, jitter, lookup, dtype or full_dtype(self))
        image = self.super_resolve(rendering.features, ws, weight_offsets, dtype)
        return GeneratorOutput(image, rendering.features[:, :3], rendering.depth)

    def forward(self, z: torch.Tensor, cameras: torch.Tensor, truncation_psi: float = 1.0) -> GeneratorOutput:
        """Random heads: z [B, z_dim] seen from, and conditioned on, cameras [B, 25]."""
        return self.synthesize(self.mapping(z, cameras, truncation_psi), cameras)
