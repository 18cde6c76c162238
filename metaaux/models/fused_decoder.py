"""Tri-plane look-up, displacement by an offset tri-plane and decoder in one CUDA kernel, in Triton.

Of a sample its position is read and its density and colours are written; what lies between, the looked-up features and
the hidden units, which the PyTorch form writes and reads several times, stays in registers. The backward pass computes
it again and adds into the planes with atomics, so that gradients of two runs may differ in their last bits; those of
the decoder's weights are summed in a fixed order.

`EG3DGenerator` uses the kernel where a look-up is left to it ("auto") and `is_supported`; its PyTorch form, for other
devices and for derivatives of any order, is `renderer.sample_planes` with `TriPlaneDecoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import triplane_cuda

if triplane_cuda.triton is not None:
    import triton
    import triton.language as tl

    from .triplane_cuda import load_points, look_up, look_up_backward, store_points

#: Samples that are worked on together.
BLOCK = 64
#: Programs of the backward pass that share the samples where weights have gradients, of which each makes a sum.
PROGRAMS = 512
#: Largest number of features and of hidden units: more would not stay in registers.
MAX_WIDTH = 128


class _Settings(NamedTuple):
    """What the kernels are told besides tensors.

    Attributes:
        axes: `triplane_cuda.packed_axes`.
        scale: from world units to those where the box is [-1, 1].
        gains: of weights and biases of the hidden layer, then of the last one.
        precision: of float32 products, "ieee" or "tf32".
    """

    axes: int
    scale: float
    gains: tuple[float, float, float, float]
    precision: str


def is_supported(
    planes: torch.Tensor, offset_planes: torch.Tensor | None, decoder: torch.nn.Module, plane_axes: Sequence[str]
) -> bool:
    """Whether the kernel can run on `planes` [B, 3, C, H, W], `offset_planes` [B, 3, 3, r, r] and this decoder."""
    on_gpu = triplane_cuda.is_supported(planes, plane_axes) and (offset_planes is None or offset_planes.is_cuda)
    return on_gpu and max(decoder.hidden.weight.shape) <= MAX_WIDTH


if triplane_cuda.triton is not None:

    @triton.jit
    def _softplus(x):
        return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))

    @triton.jit
    def _column(matrix, c, INDEX: tl.constexpr):
        return tl.sum(tl.where((c == INDEX)[None, :], matrix, 0.0), axis=1)

    @triton.jit
    def _displaced(
        offsets, x, y, z, live, height, width, scale, AXES: tl.constexpr, OFFSETS: tl.constexpr, M: tl.constexpr
    ):
        """Eq. 4: Δp is the sum of the look-ups, in world units."""
        if OFFSETS:
            c = tl.arange(0, 4)
            moved = look_up(offsets, x, y, z, live, height, width, AXES, 3, 4, M) * scale
            x += _column(moved, c, 0)
            y += _column(moved, c, 1)
            z += _column(moved, c, 2)
        return x, y, z

    @triton.jit
    def _load_hidden_layer(
        weight, bias, weight_gain, bias_gain, C: tl.constexpr, SIDE: tl.constexpr, H: tl.constexpr, WIDE: tl.constexpr
    ):
        """Weights [WIDE, SIDE] and biases [WIDE] of the hidden layer, zero beyond H and C."""
        c = tl.arange(0, SIDE)
        h = tl.arange(0, WIDE)
        mask = (h < H)[:, None] & (c < C)[None, :]
        w = tl.load(weight + h[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32) * weight_gain
        b = tl.load(bias + h, mask=h < H, other=0.0).to(tl.float32) * bias_gain
        return w, b

    @triton.jit
    def _load_last_layer(
        weight, weight_gain, C: tl.constexpr, SIDE: tl.constexpr, H: tl.constexpr, WIDE: tl.constexpr
    ):
        """Weights of the last layer: the density's [WIDE] and the colours' [SIDE, WIDE]."""
        c = tl.arange(0, SIDE)
        h = tl.arange(0, WIDE)
        mask = (c < C)[:, None] & (h < H)[None, :]
        first = tl.load(weight + h, mask=h < H, other=0.0).to(tl.float32) * weight_gain
        rest = tl.load(weight + H + c[:, None] * H + h[None, :], mask=mask, other=0.0).to(tl.float32) * weight_gain
        return first, rest

    @triton.jit
    def _forward(
        points,
        planes,
        offsets,
        hidden_weight,
        hidden_bias,
        last_weight,
        last_bias,
        density,
        logits,
        samples,
        height,
        width,
        offset_height,
        offset_width,
        scale,
        hidden_weight_gain,
        hidden_bias_gain,
        last_weight_gain,
        last_bias_gain,
        AXES: tl.constexpr,
        OFFSETS: tl.constexpr,
        C: tl.constexpr,
        SIDE: tl.constexpr,
        H: tl.constexpr,
        WIDE: tl.constexpr,
        M: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        batch = tl.program_id(1).to(tl.int64)
        m = tl.program_id(0) * M + tl.arange(0, M)
        live = m < samples
        rows = batch * samples + m
        c = tl.arange(0, SIDE)
        dtype = planes.dtype.element_ty
        x, y, z = load_points(points, rows, live, scale)
        offsets += batch * offset_height * offset_width * 9
        x, y, z = _displaced(offsets, x, y, z, live, offset_height, offset_width, scale, AXES, OFFSETS, M)
        total = look_up(planes + batch * height * width * 3 * C, x, y, z, live, height, width, AXES, C, SIDE, M)
        features = (total / 3).to(dtype)
        w, b = _load_hidden_layer(hidden_weight, hidden_bias, hidden_weight_gain, hidden_bias_gain, C, SIDE, H, WIDE)
        hidden = tl.dot(features, tl.trans(w).to(dtype), input_precision=PRECISION) + b[None, :]
        hidden = _softplus(hidden).to(dtype)
        first, rest = _load_last_layer(last_weight, last_weight_gain, C, SIDE, H, WIDE)
        sigma = tl.sum(hidden.to(tl.float32) * first.to(dtype).to(tl.float32)[None, :], axis=1)
        sigma += tl.load(last_bias).to(tl.float32) * last_bias_gain
        tl.store(density + rows, sigma, mask=live)
        b = tl.load(last_bias + 1 + c, mask=c < C, other=0.0).to(tl.float32) * last_bias_gain
        colours = tl.dot(hidden, tl.trans(rest).to(dtype), input_precision=PRECISION) + b[None, :]
        mask = live[:, None] & (c < C)[None, :]
        tl.store(logits + rows[:, None] * C + c[None, :], colours.to(dtype), mask=mask)

    @triton.jit
    def _backward(
        points,
        planes,
        offsets,
        hidden_weight,
        hidden_bias,
        last_weight,
        grad_density,
        grad_logits,
        grad_points,
        grad_planes,
        grad_offsets,
        grad_decoder,
        samples,
        height,
        width,
        offset_height,
        offset_width,
        scale,
        hidden_weight_gain,
        hidden_bias_gain,
        last_weight_gain,
        AXES: tl.constexpr,
        OFFSETS: tl.constexpr,
        C: tl.constexpr,
        SIDE: tl.constexpr,
        H: tl.constexpr,
        WIDE: tl.constexpr,
        M: tl.constexpr,
        PRECISION: tl.constexpr,
        NEED_POINTS: tl.constexpr,
        NEED_PLANES: tl.constexpr,
        NEED_OFFSETS: tl.constexpr,
        NEED_DECODER: tl.constexpr,
    ):
        batch = tl.program_id(1).to(tl.int64)
        c = tl.arange(0, SIDE)
        h = tl.arange(0, WIDE)
        dtype = planes.dtype.element_ty
        planes += batch * height * width * 3 * C
        grad_planes += batch * height * width * 3 * C
        offsets += batch * offset_height * offset_width * 9
        grad_offsets += batch * offset_height * offset_width * 9
        w, b = _load_hidden_layer(hidden_weight, hidden_bias, hidden_weight_gain, hidden_bias_gain, C, SIDE, H, WIDE)
        first, rest = _load_last_layer(last_weight, last_weight_gain, C, SIDE, H, WIDE)
        w = w.to(dtype)
        rest = rest.to(dtype)
        first = first.to(dtype).to(tl.float32)
        if NEED_DECODER:
            sum_w = tl.zeros((WIDE, SIDE), tl.float32)
            sum_b = tl.zeros((WIDE,), tl.float32)
            sum_first = tl.zeros((WIDE,), tl.float32)
            sum_rest = tl.zeros((SIDE, WIDE), tl.float32)
            sum_sigma = tl.zeros((M,), tl.float32)
            sum_colours = tl.zeros((SIDE,), tl.float32)
        for block in range(tl.program_id(0), tl.cdiv(samples, M), tl.num_programs(0)):
            m = block * M + tl.arange(0, M)
            live = m < samples
            rows = batch * samples + m
            px, py, pz = load_points(points, rows, live, scale)
            x, y, z = _displaced(offsets, px, py, pz, live, offset_height, offset_width, scale, AXES, OFFSETS, M)
            total = look_up(planes, x, y, z, live, height, width, AXES, C, SIDE, M)
            features = (total / 3).to(dtype)
            before = tl.dot(features, tl.trans(w), input_precision=PRECISION) + b[None, :]
            mask = live[:, None] & (c < C)[None, :]
            colours = tl.load(grad_logits + rows[:, None] * C + c[None, :], mask=mask, other=0.0)
            sigma = tl.load(grad_density + rows, mask=live, other=0.0)
            units = tl.dot(colours, rest, input_precision=PRECISION) + sigma[:, None] * first[None, :]
            units = units * tl.sigmoid(before)
            if NEED_DECODER:
                hidden = _softplus(before).to(dtype)
                sum_w += tl.dot(tl.trans(units.to(dtype)), features, input_precision=PRECISION)
                sum_b += tl.sum(units, axis=0)
                sum_first += tl.sum(sigma[:, None] * hidden.to(tl.float32), axis=0)
                sum_rest += tl.dot(tl.trans(colours), hidden, input_precision=PRECISION)
                sum_sigma += sigma
                sum_colours += tl.sum(colours.to(tl.float32), axis=0)
            if NEED_PLANES or NEED_OFFSETS or NEED_POINTS:
                gradient = tl.dot(units.to(dtype), w, input_precision=PRECISION) / 3
                gx, gy, gz = look_up_backward(
                    gradient,
                    planes,
                    grad_planes,
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
                    NEED_OFFSETS or NEED_POINTS,
                )
                if OFFSETS and (NEED_OFFSETS or NEED_POINTS):
                    d = tl.arange(0, 4)[None, :]
                    moved = tl.where(d == 0, gx[:, None], tl.where(d == 1, gy[:, None], gz[:, None])) * scale
                    ox, oy, oz = look_up_backward(
                        moved,
                        offsets,
                        grad_offsets,
                        px,
                        py,
                        pz,
                        live,
                        offset_height,
                        offset_width,
                        AXES,
                        3,
                        4,
                        M,
                        NEED_OFFSETS,
                        NEED_POINTS,
                    )
                    gx += ox
                    gy += oy
                    gz += oz
                if NEED_POINTS:
                    store_points(grad_points, rows, live, gx * scale, gy * scale, gz * scale)
        if NEED_DECODER:
            program = batch * tl.num_programs(0) + tl.program_id(0)
            to = grad_decoder + program * (2 * WIDE * SIDE + 2 * WIDE + 2 * SIDE)
            tl.store(to + h[:, None] * SIDE + c[None, :], sum_w)
            to += WIDE * SIDE
            tl.store(to + c[:, None] * WIDE + h[None, :], sum_rest)
            to += WIDE * SIDE
            tl.store(to + h, sum_b)
            tl.store(to + WIDE + h, sum_first)
            tl.store(to + 2 * WIDE + c, sum_colours)
            tl.store(to + 2 * WIDE + SIDE + c, tl.where(c == 0, tl.sum(sum_sigma, axis=0), 0.0))


def _sides(planes: torch.Tensor, hidden_weight: torch.Tensor) -> tuple[int, int, int, int]:
    """C and H, each with the side of its blocks, of which a product must have 16."""
    channels, hidden = planes.shape[-1], hidden_weight.shape[0]
    side, wide = (max(16, triplane_cuda.block_side(size)) for size in (channels, hidden))
    return channels, side, hidden, wide


class _Decode(torch.autograd.Function):
    """points [B, M, 3], planes [B, H, W, 3, C], offset planes [B, r, r, 3, 3] or `None`, weights and biases of the
    hidden and of the last layer → densities [B, M] in float32, colour logits [B, M, C]."""

    @staticmethod
    def forward(ctx, points, planes, offsets, hidden_weight, hidden_bias, last_weight, last_bias, settings):
        batch, height, width, _, channels = planes.shape
        count = points.shape[1]
        density = torch.empty(batch, count, device=planes.device, dtype=torch.float32)
        logits = torch.empty(batch, count, channels, device=planes.device, dtype=planes.dtype)
        ctx.save_for_backward(points, planes, offsets, hidden_weight, hidden_bias, last_weight, last_bias)
        ctx.settings = settings
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(planes):
            _forward[triton.cdiv(count, BLOCK), batch](
                points,
                planes,
                planes if offsets is None else offsets,
                hidden_weight,
                hidden_bias,
                last_weight,
                last_bias,
                density,
                logits,
                count,
                height,
                width,
                *((1, 1) if offsets is None else offsets.shape[1:3]),
                settings.scale,
                *settings.gains,
                settings.axes,
                offsets is not None,
                *_sides(planes, hidden_weight),
                BLOCK,
                settings.precision,
            )
        return density, logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_density, grad_logits):
        points, planes, offsets, *weights = ctx.saved_tensors
        need_points, need_planes, need_offsets, *need_weights = ctx.needs_input_grad[:7]
        batch, height, width = planes.shape[:3]
        sides = _sides(planes, weights[0])
        blocks = triton.cdiv(points.shape[1], BLOCK)
        programs = min(blocks, PROGRAMS) if any(need_weights) else blocks
        # What is not needed is an input, which the kernel then leaves alone.
        grad_points = torch.empty_like(points) if need_points else points
        grad_planes = torch.zeros_like(planes, dtype=torch.float32) if need_planes else planes
        if need_offsets:
            grad_offsets = torch.zeros_like(offsets)
        else:
            grad_offsets = planes if offsets is None else offsets
        size = 2 * (sides[1] * sides[3] + sides[1] + sides[3])
        sums = torch.empty(batch * programs, size, device=planes.device) if any(need_weights) else points
        with torch.cuda.device_of(planes):
            _backward[programs, batch](
                points,
                planes,
                planes if offsets is None else offsets,
                *weights[:3],
                grad_density.contiguous(),
                grad_logits.contiguous(),
                grad_points,
                grad_planes,
                grad_offsets,
                sums,
                points.shape[1],
                height,
                width,
                *((1, 1) if offsets is None else offsets.shape[1:3]),
                ctx.settings.scale,
                *ctx.settings.gains[:3],
                ctx.settings.axes,
                offsets is not None,
                *sides,
                BLOCK,
                ctx.settings.precision,
                need_points,
                need_planes,
                need_offsets,
                any(need_weights),
            )
        gradients = (grad_points, grad_planes.to(planes.dtype) if need_planes else None, grad_offsets)
        gradients += _weight_gradients(sums, sides, ctx.settings, weights) if any(need_weights) else (None,) * 4
        return *(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad)), None


def _weight_gradients(sums, sides, settings, weights) -> tuple[torch.Tensor, ...]:
    """From the programs' sums [N, ·] to the gradients of weights and biases, in the dtypes of those."""
    channels, side, hidden, wide = sides
    parts = sums.sum(dim=0).split((wide * side, wide * side, wide, wide, side, side))
    w, rest = parts[0].unflatten(0, (wide, side)), parts[1].unflatten(0, (side, wide))
    b, first, colours, sigma = parts[2:]
    gradients = (
        w[:hidden, :channels],
        b[:hidden],
        torch.cat((first[None, :hidden], rest[:channels, :hidden])),
        torch.cat((sigma[:1], colours[:channels])),
    )
    pairs = zip(gradients, settings.gains, weights, strict=True)
    return tuple((gradient * gain).to(weight.dtype) for gradient, gain, weight in pairs)


def decode(
    planes: torch.Tensor,
    points: torch.Tensor,
    offset_planes: torch.Tensor | None,
    decoder: torch.nn.Module,
    plane_axes: Sequence[str],
    box_size: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Densities and colours at displaced points, as the generator's PyTorch form gives them.

    Once differentiable in planes, points, offset planes and the decoder's weights and biases; a second derivative
    raises PyTorch's error for it. Products of float32 are exact unless `torch.backends.cuda.matmul.allow_tf32`.

    Args:
        planes: [B, 3, C, H, W]; the decoder computes in their dtype, with sums in float32.
        points: [B, M, 3], world units.
        offset_planes: [B, 3, 3, r, r], world units; the sum of their look-ups at a point moves it (Eq. 4).
        decoder: a `TriPlaneDecoder`.
        plane_axes, box_size: see `EG3DGenerator`.

    Returns:
        Densities [B, M] in float32 before activation, colour logits [B, M, C] in the dtype of `planes`.
    """
    hidden, last = decoder.hidden, decoder.out
    settings = _Settings(
        triplane_cuda.packed_axes(plane_axes),
        2 / box_size,
        (hidden.weight_gain, hidden.bias_gain, last.weight_gain, last.bias_gain),
        "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
    )
    return _Decode.apply(
        points.float().contiguous(),
        triplane_cuda.pixels_first(planes),
        None if offset_planes is None else triplane_cuda.pixels_first(offset_planes.float()),
        *(tensor.contiguous() for layer in (hidden, last) for tensor in (layer.weight, layer.bias)),
        settings,
    )
