"""Fused tri-plane look-up for CUDA, in Triton (which PyTorch's CUDA builds bring along).

One pass reads the four corners on every plane and writes their mean, where `grid_sample` writes and re-reads a tensor
of planes × samples × channels; the backward pass adds into the planes with coalesced atomics, so that gradients of two
runs may differ in their last bits. Where Triton or CUDA is missing, `renderer.sample_planes` uses `grid_sample`.

`fused_decoder` and `fused_march` build on the same parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of PyTorch come without it
    triton = None

BLOCK = 64
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def is_supported(planes: object, plane_axes: Sequence[str]) -> bool:
    """Whether the fused look-up can run on `planes`: a tensor [B, 3, C, H, W] rather than `renderer.PlaneTable`."""
    on_gpu = triton is not None and isinstance(planes, torch.Tensor) and planes.is_cuda
    return on_gpu and planes.dtype in DTYPES and len(plane_axes) == 3


def has_kernels(x: torch.Tensor) -> bool:
    """Whether Triton's kernels can run on `x` here; where `torch.compile` traces it fuses passes itself."""
    return triton is not None and x.is_cuda and not torch.compiler.is_compiling()


def pixels_first(planes: torch.Tensor) -> torch.Tensor:
    """planes [B, 3, C, H, W] → [B, H, W, 3, C], contiguous: the kernels' layout, in which a sample's channels are one
    cache line. Costs nothing for planes whose memory format is that of channels last."""
    return planes.permute(0, 3, 4, 1, 2).contiguous()


def packed_axes(plane_axes: Sequence[str]) -> int:
    """Axes u, v of the three planes as one number of twelve bits, two for each, that kernels are compiled for."""
    return sum("xyz".index(axis) << 2 * i for i, axis in enumerate("".join(plane_axes)))


def block_side(channels: int) -> int:
    """The power of two that holds `channels`, which Triton's blocks must have as sides."""
    return triton.next_power_of_2(channels)


if triton is not None:

    @triton.jit
    def _pixel(coordinate, size):
        """The pixel before a coordinate where the image is [-1, 1], and the share of the next one."""
        # Far outside every corner is masked; bounding the value keeps the conversion to integers defined.
        coordinate = tl.minimum(tl.maximum(coordinate, -3.0), 3.0)
        half, middle = size * 0.5, (size - 1) * 0.5
        first = tl.floor(coordinate * half + middle)
        # Not the position less its whole part, whose last bit is hundreds of times as coarse as the share's.
        return first.to(tl.int32), coordinate * half + (middle - first)

    @triton.jit
    def _coordinate(x, y, z, AXIS: tl.constexpr):
        return x if AXIS == 0 else (y if AXIS == 1 else z)

    @triton.jit
    def _position(x, y, z, height, width, AXES: tl.constexpr, PLANE: tl.constexpr):
        """On a plane: column and row of the pixel before, and the shares of the next ones."""
        x0, fx = _pixel(_coordinate(x, y, z, (AXES >> (4 * PLANE)) & 3), width)
        y0, fy = _pixel(_coordinate(x, y, z, (AXES >> (4 * PLANE + 2)) & 3), height)
        return x0, y0, fx, fy

    @triton.jit
    def _corner(x0, y0, fx, fy, live, height, width, CORNER: tl.constexpr):
        """One of the four pixels around a position: its number, whether it is on the plane, its shares in u and v."""
        column = x0 + (CORNER % 2)
        row = y0 + (CORNER // 2)
        share_u = fx if CORNER % 2 else 1 - fx
        share_v = fy if CORNER // 2 else 1 - fy
        inside = live & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        return row * width + column, inside, share_u, share_v

    @triton.jit
    def _add_along(x, y, z, slope, AXIS: tl.constexpr):
        if AXIS == 0:
            x += slope
        elif AXIS == 1:
            y += slope
        else:
            z += slope
        return x, y, z

    @triton.jit
    def rows_of(block, samples, M: tl.constexpr):
        """This program's batch entry, which of a block's M samples there are, and their rows in [B · samples, .]."""
        batch = tl.program_id(1).to(tl.int64)
        m = block * M + tl.arange(0, M)
        return batch, m < samples, batch * samples + m

    @triton.jit
    def load_points(points, rows, live, scale):
        """x, y, z [M] of points [., 3], in units where the box is [-1, 1]."""
        x = tl.load(points + rows * 3, mask=live, other=0.0) * scale
        y = tl.load(points + rows * 3 + 1, mask=live, other=0.0) * scale
        z = tl.load(points + rows * 3 + 2, mask=live, other=0.0) * scale
        return x, y, z

    @triton.jit
    def look_up(
        planes, x, y, z, live, height, width, AXES: tl.constexpr, C: tl.constexpr, SIDE: tl.constexpr, M: tl.constexpr
    ):
        """Sum of the bilinear look-ups on planes [H, W, 3, C] at M points, [M, SIDE], of which the first C count."""
        c = tl.arange(0, SIDE)
        total = tl.zeros((M, SIDE), tl.float32)
        for k in tl.static_range(3):
            x0, y0, fx, fy = _position(x, y, z, height, width, AXES, k)
            for corner in tl.static_range(4):
                pixel, inside, share_u, share_v = _corner(x0, y0, fx, fy, live, height, width, corner)
                weight = share_u * share_v
                mask = inside[:, None] & (c < C)[None, :]
                address = planes + (pixel * (3 * C) + k * C)[:, None] + c[None, :]
                total += tl.load(address, mask=mask, other=0.0).to(tl.float32) * weight[:, None]
        return total

    @triton.jit
    def look_up_backward(
        gradient,
        planes,
        grad_planes,
        x,
        y,
        z,
        live,
        height,
        width,
        AXES: tl.constexpr,
        C: tl.constexpr,
        SIDE: tl.constexpr,
        M: tl.constexpr,
        NEED_PLANES: tl.constexpr,
        NEED_POINTS: tl.constexpr,
    ):
        """Of `look_up`, for the sum's gradient [M, SIDE]: adds to `grad_planes` and returns that of x, y, z."""
        c = tl.arange(0, SIDE)
        along_x = tl.zeros((M,), tl.float32)
        along_y = tl.zeros((M,), tl.float32)
        along_z = tl.zeros((M,), tl.float32)
        for k in tl.static_range(3):
            x0, y0, fx, fy = _position(x, y, z, height, width, AXES, k)
            slope_u = tl.zeros((M,), tl.float32)
            slope_v = tl.zeros((M,), tl.float32)
            for corner in tl.static_range(4):
                pixel, inside, share_u, share_v = _corner(x0, y0, fx, fy, live, height, width, corner)
                mask = inside[:, None] & (c < C)[None, :]
                place = (pixel * (3 * C) + k * C)[:, None] + c[None, :]
                if NEED_PLANES:
                    tl.atomic_add(
                        grad_planes + place, gradient * (share_u * share_v)[:, None], mask=mask, sem="relaxed"
                    )
                if NEED_POINTS:
                    value = tl.load(planes + place, mask=mask, other=0.0).to(tl.float32)
                    dot = tl.sum(value * gradient, axis=1)
                    slope_u += dot * (share_v if corner % 2 else -share_v)
                    slope_v += dot * (share_u if corner // 2 else -share_u)
            if NEED_POINTS:
                along_x, along_y, along_z = _add_along(
                    along_x, along_y, along_z, slope_u * (width * 0.5), (AXES >> (4 * k)) & 3
                )
                along_x, along_y, along_z = _add_along(
                    along_x, along_y, along_z, slope_v * (height * 0.5), (AXES >> (4 * k + 2)) & 3
                )
        return along_x, along_y, along_z

    @triton.jit
    def softplus(x):
        return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))

    @triton.jit
    def store_points(points, rows, live, x, y, z):
        tl.store(points + rows * 3, x, mask=live)
        tl.store(points + rows * 3 + 1, y, mask=live)
        tl.store(points + rows * 3 + 2, z, mask=live)

    @triton.jit
    def _forward(
        planes,
        points,
        out,
        samples,
        height,
        width,
        AXES: tl.constexpr,
        C: tl.constexpr,
        SIDE: tl.constexpr,
        M: tl.constexpr,
    ):
        batch, live, rows = rows_of(tl.program_id(0), samples, M)
        c = tl.arange(0, SIDE)
        x, y, z = load_points(points, rows, live, 1.0)
        total = look_up(planes + batch * height * width * 3 * C, x, y, z, live, height, width, AXES, C, SIDE, M)
        mask = live[:, None] & (c < C)[None, :]
        tl.store(out + rows[:, None] * C + c[None, :], (total / 3).to(out.dtype.element_ty), mask=mask)

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
        AXES: tl.constexpr,
        C: tl.constexpr,
        SIDE: tl.constexpr,
        M: tl.constexpr,
        NEED_PLANES: tl.constexpr,
        NEED_POINTS: tl.constexpr,
    ):
        batch, live, rows = rows_of(tl.program_id(0), samples, M)
        c = tl.arange(0, SIDE)
        x, y, z = load_points(points, rows, live, 1.0)
        mask = live[:, None] & (c < C)[None, :]
        gradient = tl.load(grad_out + rows[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32) / 3
        first = batch * height * width * 3 * C
        x, y, z = look_up_backward(
            gradient,
            planes + first,
            grad_planes + first,
            x,
            y,
            z,
            live,
            height,
            width,
            AXES,
            C,
            SIDE,
            M,
            NEED_PLANES,
            NEED_POINTS,
        )
        if NEED_POINTS:
            store_points(grad_points, rows, live, x, y, z)


class _SamplePlanes(torch.autograd.Function):
    """planes [B, H, W, 3, C], points [B, M, 3] → [B, M, C]."""

    @staticmethod
    def forward(ctx, planes, points, axes):
        batch, height, width, _, channels = planes.shape
        count = points.shape[1]
        out = torch.empty(batch, count, channels, device=planes.device, dtype=planes.dtype)
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(planes):
            _forward[triton.cdiv(count, BLOCK), batch](
                planes, points, out, count, height, width, axes, channels, block_side(channels), BLOCK
            )
        ctx.save_for_backward(planes, points)
        ctx.axes = axes
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        planes, points = ctx.saved_tensors
        batch, height, width, _, channels = planes.shape
        count = points.shape[1]
        need_planes, need_points = ctx.needs_input_grad[:2]
        # What is not needed is an input, which the kernel then leaves alone.
        grad_planes = torch.zeros_like(planes, dtype=torch.float32) if need_planes else planes
        grad_points = torch.empty_like(points) if need_points else points
        sizes = (count, height, width, ctx.axes, channels, block_side(channels), BLOCK)
        with torch.cuda.device_of(planes):
            _backward[triton.cdiv(count, BLOCK), batch](
                planes, points, grad_out.contiguous(), grad_planes, grad_points, *sizes, need_planes, need_points
            )
        return grad_planes.to(planes.dtype) if need_planes else None, grad_points if need_points else None, None


def sample_planes(planes: torch.Tensor, points: torch.Tensor, plane_axes: Sequence[str]) -> torch.Tensor:
    """Mean of the bilinear look-ups on the three planes, zero outside of them.

    planes [B, 3, C, H, W] (fastest where a pixel's channels are adjacent), points [B, M, 3] in units where the box is
    [-1, 1] → [B, M, C] in the dtype of `planes`. Once differentiable in planes (accumulated in float32) and points.
    """
    return _SamplePlanes.apply(pixels_first(planes), points.float().contiguous(), packed_axes(plane_axes))
