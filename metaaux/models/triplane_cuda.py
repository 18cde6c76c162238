"""Fused tri-plane look-up for CUDA, in Triton (which PyTorch's CUDA builds bring along).

One pass reads the four corners on every plane and writes their mean, where `grid_sample` writes and re-reads a tensor
of planes × samples × channels; the backward pass adds into the planes with coalesced atomics. Where Triton or CUDA is
missing, `renderer.sample_planes` uses `grid_sample`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of PyTorch come without it
    triton = None

BLOCK = 64


def is_supported(planes: torch.Tensor, plane_axes: Sequence[str]) -> bool:
    """Whether the fused look-up can run on `planes` [B, 3, C, H, W]."""
    return triton is not None and planes.is_cuda and len(plane_axes) == 3


if triton is not None:

    @triton.jit
    def _corner(coordinate_u, coordinate_v, height, width):
        x = ((coordinate_u + 1) * width - 1) * 0.5
        y = ((coordinate_v + 1) * height - 1) * 0.5
        # Far outside every corner is masked; bounding the value keeps the conversion to integers defined.
        x = tl.minimum(tl.maximum(x, -2.0), width + 1.0)
        y = tl.minimum(tl.maximum(y, -2.0), height + 1.0)
        x0 = tl.floor(x)
        y0 = tl.floor(y)
        return x0.to(tl.int32), y0.to(tl.int32), x - x0, y - y0

    @triton.jit
    def _forward(
        planes,
        points,
        out,
        samples,
        height,
        width,
        s_b,
        s_p,
        s_c,
        s_h,
        s_w,
        U0: tl.constexpr,
        V0: tl.constexpr,
        U1: tl.constexpr,
        V1: tl.constexpr,
        U2: tl.constexpr,
        V2: tl.constexpr,
        C: tl.constexpr,
        BLOCK_M: tl.constexpr,
    ):
        batch = tl.program_id(1).to(tl.int64)
        m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        c = tl.arange(0, C)
        live = m < samples
        base = points + (batch * samples + m) * 3
        total = tl.zeros((BLOCK_M, C), tl.float32)
        for k in tl.static_range(3):
            u = tl.load(base + (U0 if k == 0 else (U1 if k == 1 else U2)), mask=live, other=0.0)
            v = tl.load(base + (V0 if k == 0 else (V1 if k == 1 else V2)), mask=live, other=0.0)
            x0, y0, fx, fy = _corner(u, v, height, width)
            plane = planes + batch * s_b + k * s_p
            for corner in tl.static_range(4):
                x = x0 + (corner % 2)
                y = y0 + (corner // 2)
                weight = (fx if corner % 2 else 1 - fx) * (fy if corner // 2 else 1 - fy)
                inside = live & (x >= 0) & (x < width) & (y >= 0) & (y < height)
                address = plane + (y * s_h + x * s_w)[:, None] + (c * s_c)[None, :]
                value = tl.load(address, mask=inside[:, None], other=0.0).to(tl.float32)
                total += value * weight[:, None]
        row = (batch * samples + m)[:, None] * C + c[None, :]
        tl.store(out + row, (total / 3).to(out.dtype.element_ty), mask=live[:, None])

    @triton.jit
    def _backward(
        planes,
        points,
        grad_out,
        grad_planes,
        grad_points,
        samples,
        height,
        width,
        s_b,
        s_p,
        s_c,
        s_h,
        s_w,
        U0: tl.constexpr,
        V0: tl.constexpr,
        U1: tl.constexpr,
        V1: tl.constexpr,
        U2: tl.constexpr,
        V2: tl.constexpr,
        C: tl.constexpr,
        BLOCK_M: tl.constexpr,
        NEED_PLANES: tl.constexpr,
        NEED_POINTS: tl.constexpr,
    ):
        batch = tl.program_id(1).to(tl.int64)
        m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        c = tl.arange(0, C)
        live = m < samples
        base = points + (batch * samples + m) * 3
        row = (batch * samples + m)[:, None] * C + c[None, :]
        gradient = tl.load(grad_out + row, mask=live[:, None], other=0.0).to(tl.float32) / 3
        for k in tl.static_range(3):
            u = tl.load(base + (U0 if k == 0 else (U1 if k == 1 else U2)), mask=live, other=0.0)
            v = tl.load(base + (V0 if k == 0 else (V1 if k == 1 else V2)), mask=live, other=0.0)
            x0, y0, fx, fy = _corner(u, v, height, width)
            # Gradients lie [B, H, W, P·C]: one sample's channels are one cache line.
            plane = grad_planes + batch * height * width * 3 * C + k * C
            slope_u = tl.zeros((BLOCK_M,), tl.float32)
            slope_v = tl.zeros((BLOCK_M,), tl.float32)
            for corner in tl.static_range(4):
                x = x0 + (corner % 2)
                y = y0 + (corner // 2)
                along_u = fx if corner % 2 else 1 - fx
                along_v = fy if corner // 2 else 1 - fy
                inside = live & (x >= 0) & (x < width) & (y >= 0) & (y < height)
                if NEED_PLANES:
                    address = plane + ((y * width + x) * 3 * C)[:, None] + c[None, :]
                    tl.atomic_add(
                        address, gradient * (along_u * along_v)[:, None], mask=inside[:, None], sem="relaxed"
                    )
                if NEED_POINTS:
                    source = planes + batch * s_b + k * s_p + (y * s_h + x * s_w)[:, None] + (c * s_c)[None, :]
                    value = tl.load(source, mask=inside[:, None], other=0.0).to(tl.float32)
                    dot = tl.sum(value * gradient, axis=1)
                    slope_u += dot * (along_v if corner % 2 else -along_v)
                    slope_v += dot * (along_u if corner // 2 else -along_u)
            if NEED_POINTS:
                tl.atomic_add(
                    grad_points + (batch * samples + m) * 3 + (U0 if k == 0 else (U1 if k == 1 else U2)),
                    slope_u * (width * 0.5),
                    mask=live,
                    sem="relaxed",
                )
                tl.atomic_add(
                    grad_points + (batch * samples + m) * 3 + (V0 if k == 0 else (V1 if k == 1 else V2)),
                    slope_v * (height * 0.5),
                    mask=live,
                    sem="relaxed",
                )


class _SamplePlanes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, planes, points, axes, dtype):
        batch, _, channels, height, width = planes.shape
        ctx.source_dtype = planes.dtype
        planes, points = planes.to(dtype), points.contiguous()
        out = torch.empty(batch, points.shape[1], channels, device=planes.device, dtype=dtype)
        grid = (triton.cdiv(points.shape[1], BLOCK), batch)
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(planes):
            _forward[grid](
                planes, points, out, points.shape[1], height, width, *planes.stride(), *axes, C=channels, BLOCK_M=BLOCK
            )
        ctx.save_for_backward(planes, points)
        ctx.axes = axes
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        planes, points = ctx.saved_tensors
        batch, count, channels, height, width = planes.shape
        need_planes, need_points = ctx.needs_input_grad[:2]
        shape = (batch, height, width, count, channels) if need_planes else (1,)
        grad_planes = torch.zeros(shape, device=planes.device, dtype=torch.float32)
        grad_points = torch.zeros_like(points) if need_points else points
        grid = (triton.cdiv(points.shape[1], BLOCK), batch)
        with torch.cuda.device_of(planes):
            _backward[grid](
                planes,
                points,
                grad_out.contiguous(),
                grad_planes,
                grad_points,
                points.shape[1],
                height,
                width,
                *planes.stride(),
                *ctx.axes,
                C=channels,
                BLOCK_M=BLOCK,
                NEED_PLANES=need_planes,
                NEED_POINTS=need_points,
            )
        if need_planes:
            grad_planes = grad_planes.permute(0, 3, 4, 1, 2).to(ctx.source_dtype)
        return grad_planes if need_planes else None, grad_points if need_points else None, None, None


def sample_planes(
    planes: torch.Tensor, points: torch.Tensor, plane_axes: Sequence[str], dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Mean of the bilinear look-ups on the three planes, zero outside of them.

    planes [B, 3, C, H, W] (fastest where a pixel's channels are adjacent), points [B, M, 3] in units where the box is
    [-1, 1] → [B, M, C] in `dtype` (that of `planes` where left out), to which the planes are rounded for reading.
    Once differentiable in planes (accumulated in float32) and points.
    """
    axes = tuple("xyz".index(a) for pair in plane_axes for a in pair)
    channels = planes.shape[2]
    missing = (1 << (channels - 1).bit_length()) - channels
    if missing:  # Triton's blocks have powers of two as sides
        planes = F.pad(planes.movedim(2, -1), (0, missing)).movedim(-1, 2)
    features = _SamplePlanes.apply(planes, points.float(), axes, dtype or planes.dtype)
    return features[..., :channels] if missing else features
