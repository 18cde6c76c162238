"""Importance sampling and compositing of a ray in one CUDA kernel each, in Triton, without gradients.

A ray's samples fit into registers: what the PyTorch form, `renderer.importance_depths` and `renderer.merge_and_weigh`
with `eg3d.shade`, does in about a hundred launches, most of which write and read the samples once more, needs two.
`EG3DGenerator` uses them where nothing is differentiated; with gradients the PyTorch form stays.
"""

from __future__ import annotations

import torch

from . import triplane_cuda

if triplane_cuda.triton is not None:
    import triton
    import triton.language as tl

    from .triplane_cuda import softplus

#: Most samples of a ray: more would not stay in registers.
MAX_SAMPLES = 256


def is_supported(depth_samples: int, importance_samples: int) -> bool:
    """Whether the kernels can do rays with so many samples, where Triton's others run."""
    return depth_samples >= 4 and importance_samples > 0 and depth_samples + importance_samples <= MAX_SAMPLES


if triplane_cuda.triton is not None:

    @triton.jit
    def _at(values, index):
        """Values at other places; what lies outside is the nearest one's."""
        return tl.gather(values, tl.minimum(tl.maximum(index, 0), values.shape[0] - 1), 0)

    @triton.jit
    def _optical(density, next_density, depth, next_depth):
        x = (density + next_density) / 2 - 1
        return softplus(x) * (next_depth - depth)

    @triton.jit
    def _weights(optical, i):
        """Loss of transmittance over each interval."""
        through = tl.cumsum(optical, 0)
        before = tl.where(i == 0, 0.0, _at(through, i - 1))
        return tl.exp(-before) - tl.exp(-through)

    @triton.jit
    def _importance(
        depths,
        densities,
        uniform,
        fine_depths,
        S: tl.constexpr,
        SIDE: tl.constexpr,
        F: tl.constexpr,
        FINE: tl.constexpr,
        GIVEN: tl.constexpr,
    ):
        ray = tl.program_id(0).to(tl.int64)
        i = tl.arange(0, SIDE)
        depth = tl.load(depths + ray * S + i, mask=i < S, other=0.0)
        density = tl.load(densities + ray * S + i, mask=i < S, other=0.0)
        next_depth = _at(depth, i + 1)
        optical = tl.where(i < S - 1, _optical(density, _at(density, i + 1), depth, next_depth), 0.0)
        weight = _weights(optical, i)
        # A max filter followed by a mean keeps the neighbours of a surface likely; 0.01 keeps the rest possible.
        # Place i is the renderer's mass i - 1, between intervals i - 1 and i + 1.
        wider = tl.maximum(_at(weight, i - 1), weight) + tl.maximum(weight, _at(weight, i + 1))
        mass = tl.where((i >= 1) & (i <= S - 3), wider / 2 + 0.01 + 1e-5, 0.0)
        cdf = tl.cumsum(mass / tl.sum(mass, axis=0), 0)
        bins = (depth + next_depth) / 2
        f = tl.arange(0, FINE)
        if GIVEN:
            u = tl.load(uniform + ray * F + f, mask=f < F, other=0.5)
        else:
            u = (f.to(tl.float32) + 0.5) / F
        reached = (cdf[None, :] <= u[:, None]) & (i <= S - 3)[None, :]
        index = tl.sum(reached.to(tl.int32), axis=1)
        below = tl.maximum(index - 1, 0)
        above = tl.minimum(index, S - 3)
        cdf_below = _at(cdf, below)
        width = _at(cdf, above) - cdf_below
        width = tl.where(width < 1e-5, 1.0, width)
        low = _at(bins, below)
        drawn = low + (u - cdf_below) / width * (_at(bins, above) - low)
        tl.store(fine_depths + ray * F + f, drawn, mask=f < F)

    @triton.jit
    def _composite(
        depths,
        densities,
        logits,
        fine_depths,
        fine_densities,
        fine_logits,
        limits,
        colours,
        distance,
        opacity,
        S: tl.constexpr,
        F: tl.constexpr,
        SIDE: tl.constexpr,
        C: tl.constexpr,
        WIDE: tl.constexpr,
    ):
        ray = tl.program_id(0).to(tl.int64)
        i = tl.arange(0, SIDE)
        depth = tl.load(depths + ray * S + i, mask=i < S, other=0.0)
        depth += tl.load(fine_depths + ray * F + i - S, mask=(i >= S) & (i < S + F), other=0.0)
        depth = tl.where(i < S + F, depth, float("inf"))
        # Bits of positive numbers are in the numbers' order; below them stands the place where a sample came from.
        key = tl.sort((depth.to(tl.int32, bitcast=True).to(tl.int64) << 32) + i)
        depth = (key >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        place = key.to(tl.int32)
        coarse = place < S
        fine = (place >= S) & (place < S + F)
        density = tl.load(densities + ray * S + place, mask=coarse, other=0.0)
        density += tl.load(fine_densities + ray * F + place - S, mask=fine, other=0.0)
        inner = i < S + F - 1
        next_depth = _at(depth, i + 1)
        optical = tl.where(inner, _optical(density, _at(density, i + 1), depth, next_depth), 0.0)
        weight = tl.where(inner, _weights(optical, i), 0.0)
        total = tl.sum(weight, axis=0)
        near = tl.load(limits)
        far = tl.load(limits + 1)
        # A ray that meets nothing ends at the farthest sample.
        mean = tl.sum(tl.where(inner, weight * (depth + next_depth) / 2, 0.0), axis=0)
        mean = tl.where(total <= 0, far, mean / tl.where(total <= 0, 1.0, total))
        tl.store(opacity + ray, total)
        tl.store(distance + ray, tl.minimum(tl.maximum(mean, near), far))
        share = (weight + tl.where(i == 0, 0.0, _at(weight, i - 1))) / 2
        c = tl.arange(0, WIDE)
        wanted = (c < C)[None, :]
        at = (ray * S + place)[:, None] * C + c[None, :]
        value = tl.load(logits + at, mask=coarse[:, None] & wanted, other=0.0).to(tl.float32)
        at = (ray * F + place - S)[:, None] * C + c[None, :]
        value += tl.load(fine_logits + at, mask=fine[:, None] & wanted, other=0.0).to(tl.float32)
        colour = tl.sum((tl.sigmoid(value) * 1.002 - 0.001) * share[:, None], axis=0)
        tl.store(colours + ray * C + c, colour, mask=c < C)


def importance_depths(
    depths: torch.Tensor, densities: torch.Tensor, samples: int, uniform: torch.Tensor | None = None
) -> torch.Tensor:
    """As `renderer.importance_depths` of the coarse samples' `compositing_weights`.

    Args:
        depths: ascending distances [B, M, S].
        densities: before activation, likewise.
        samples: how many to draw a ray.
        uniform: where in [0, 1) of the cumulative distribution, [B, M, samples]; default: evenly spaced.

    Returns:
        Distances [B, M, samples].
    """
    batch, rays, count = depths.shape
    fine = torch.empty(batch, rays, samples, device=depths.device, dtype=torch.float32)
    depths, densities = depths.contiguous(), densities.contiguous()
    given = depths if uniform is None else uniform.contiguous()
    sides = count, triton.next_power_of_2(count), samples, triton.next_power_of_2(samples)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(depths):
        _importance[batch * rays,](depths, densities, given, fine, *sides, uniform is not None, num_warps=1)
    return fine


def composite(
    coarse: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    fine: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    limits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `renderer.merge_and_weigh` and `eg3d.shade` of both passes' samples.

    Args:
        coarse, fine: distances [B, M, S], all positive, densities before activation [B, M, S] and colour logits
            [B, M, S, C] of each pass.
        limits: smallest and largest of the picture's distances [2].

    Returns:
        Colours [B, M, C] in about [0, 1], expected distance [B, M] and opacity [B, M], all in float32.
    """
    (batch, rays, count), samples, channels = coarse[0].shape, fine[0].shape[2], coarse[2].shape[3]
    colours = torch.empty(batch, rays, channels, device=limits.device, dtype=torch.float32)
    distance, opacity = (torch.empty(batch, rays, device=limits.device, dtype=torch.float32) for _ in range(2))
    tensors = [tensor.contiguous() for tensor in (*coarse, *fine, limits)]
    sides = count, samples, triton.next_power_of_2(count + samples), channels, triton.next_power_of_2(channels)
    with torch.cuda.device_of(limits):
        _composite[batch * rays,](*tensors, colours, distance, opacity, *sides)
    return colours, distance, opacity
