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
import torch.nn.functional as F

from ..precision import matmul_in_tf32
from . import triplane_cuda

if triplane_cuda.triton is not None:
    import triton
    import triton.language as tl

    from .triplane_cuda import load_points, look_up, look_up_backward, softplus, store_points

#: Samples that are worked on together: as many as leave all that is made of them in registers.
BLOCK = 64
BACKWARD_BLOCK = 32
#: Programs that share the samples where weights have gradients, of which each makes a sum.
PROGRAMS = 512
#: Copies of the offset planes' gradient: at most so many, with at most so many numbers together.
MAX_COPIES = 16
COPIES_SIZE = 2**22
#: Largest number of features and of hidden units: more would not stay in registers.
MAX_WIDTH = 64


class _Settings(NamedTuple):
    """What the kernels are told besides tensors.

    Attributes:
        axes: `triplane_cuda.packed_axes`.
        scale: from world units to those where the box is [-1, 1].
        gains: of weights and biases of the hidden layer, then of the last one.
        precision: of float32 products, see `product_precision`.
    """

    axes: int
    scale: float
    gains: tuple[float, float, float, float]
    precision: str


def is_supported(planes: object, offset_planes: object, decoder: torch.nn.Module, plane_axes: Sequence[str]) -> bool:
    """Whether the kernel can run on `planes`, `offset_planes` or `None`, and this decoder: on tensors [B, 3, C, H, W]
    and [B, 3, 3, r, r] rather than `renderer.PlaneTable`s.

    Not on AMD's GPUs: exact float32 products are there those of plain arithmetic, whose operands do not stay in
    registers. On an H100 that is slower than the PyTorch form.
    """
    if torch.version.hip is not None:
        return False
    on_gpu = triplane_cuda.is_supported(planes, plane_axes) and (offset_planes is None or offset_planes.is_cuda)
    return on_gpu and max(decoder.hidden.weight.shape) <= MAX_WIDTH


def product_precision() -> str:
    """Of float32 products, in Triton's words: "tf32" where `torch.backends.cuda.matmul.allow_tf32` is set.

    Else "tf32x3", the sum of three such products of the numbers' upper and lower parts: about as exact as float32's
    own, on tensor cores.
    """
    return "tf32" if matmul_in_tf32() else "tf32x3"


if triplane_cuda.triton is not None:

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
            moved = look_up(offsets, x, y, z, live, height, width, AXES, 4, 4, M) * scale
            x += _column(moved, c, 0)
            y += _column(moved, c, 1)
            z += _column(moved, c, 2)
        return x, y, z

    @triton.jit
    def _features(
        points,
        planes,
        offsets,
        batch,
        m,
        sizes,
        scale,
        AXES: tl.constexpr,
        OFFSETS: tl.constexpr,
        C: tl.constexpr,
        SIDE: tl.constexpr,
        M: tl.constexpr,
    ):
        """What the decoder reads of samples m [M], [M, SIDE]: the planes' mean in their dtype."""
        samples, height, width, offset_height, offset_width = sizes
        live = m < samples
        x, y, z = load_points(points, batch * samples + m, live, scale)
        offsets += batch * offset_height * offset_width * 12
        x, y, z = _displaced(offsets, x, y, z, live, offset_height, offset_width, scale, AXES, OFFSETS, M)
        total = look_up(planes + batch * height * width * 3 * C, x, y, z, live, height, width, AXES, C, SIDE, M)
        return (total / 3).to(planes.dtype.element_ty)

    @triton.jit
    def _store_sums(sums, w, rest, b, first, colours, sigma, SIDE: tl.constexpr, WIDE: tl.constexpr):
        """To this program's row of the sums that `_weight_gradients` adds up."""
        program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        c = tl.arange(0, SIDE)
        h = tl.arange(0, WIDE)
        sums += program * (2 * WIDE * SIDE + 2 * WIDE + 2 * SIDE)
        tl.store(sums + h[:, None] * SIDE + c[None, :], w)
        sums += WIDE * SIDE
        tl.store(sums + c[:, None] * WIDE + h[None, :], rest)
        sums += WIDE * SIDE
        tl.store(sums + h, b)
        tl.store(sums + WIDE + h, first)
        tl.store(sums + 2 * WIDE + c, colours)
        tl.store(sums + 2 * WIDE + SIDE + c, tl.where(c == 0, tl.sum(sigma, axis=0), 0.0))

    @triton.jit
    def _hidden_layer(
        features,
        weight,
        bias,
        gains,
        C: tl.constexpr,
        SIDE: tl.constexpr,
        H: tl.constexpr,
        WIDE: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """Hidden units before activation [M, WIDE] in float32; zero beyond H."""
        c = tl.arange(0, SIDE)
        h = tl.arange(0, WIDE)
        mask = (c < C)[:, None] & (h < H)[None, :]
        w = tl.load(weight + h[None, :] * C + c[:, None], mask=mask, other=0.0).to(tl.float32) * gains[0]
        b = tl.load(bias + h, mask=h < H, other=0.0).to(tl.float32) * gains[1]
        return tl.dot(features, w.to(features.dtype), input_precision=PRECISION) + b[None, :]

    @triton.jit
    def _density_weight(weight, gain, H: tl.constexpr, WIDE: tl.constexpr):
        h = tl.arange(0, WIDE)
        return tl.load(weight + h, mask=h < H, other=0.0).to(tl.float32) * gain

    @triton.jit
    def _units_backward(
        units,
        sigma,
        colours,
        weight,
        gain,
        C: tl.constexpr,
        SIDE: tl.constexpr,
        H: tl.constexpr,
        WIDE: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """From the gradients of density [M] and colours [M, SIDE] to that of hidden units before activation."""
        c = tl.arange(0, SIDE)
        h = tl.arange(0, WIDE)
        mask = (c < C)[:, None] & (h < H)[None, :]
        rest = tl.load(weight + H + c[:, None] * H + h[None, :], mask=mask, other=0.0).to(tl.float32) * gain
        slope = tl.dot(colours, rest.to(colours.dtype), input_precision=PRECISION)
        slope += sigma[:, None] * _density_weight(weight, gain, H, WIDE)[None, :]
        return slope * tl.sigmoid(units)

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
        gain,
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
        h = tl.arange(0, WIDE)
        dtype = planes.dtype.element_ty
        sizes = samples, height, width, offset_height, offset_width
        gains = hidden_weight_gain, hidden_bias_gain
        features = _features(points, planes, offsets, batch, m, sizes, scale, AXES, OFFSETS, C, SIDE, M)
        units = _hidden_layer(features, hidden_weight, hidden_bias, gains, C, SIDE, H, WIDE, PRECISION)
        hidden = softplus(units).to(dtype)
        sigma = tl.sum(hidden.to(tl.float32) * _density_weight(last_weight, gain, H, WIDE)[None, :], axis=1)
        tl.store(density + rows, sigma + tl.load(last_bias).to(tl.float32) * last_bias_gain, mask=live)
        mask = (h < H)[:, None] & (c < C)[None, :]
        w = tl.load(last_weight + H + c[None, :] * H + h[:, None], mask=mask, other=0.0).to(tl.float32) * gain
        b = tl.load(last_bias + 1 + c, mask=c < C, other=0.0).to(tl.float32) * last_bias_gain
        colours = tl.dot(hidden, w.to(dtype), input_precision=PRECISION) + b[None, :]
        mask = live[:, None] & (c < C)[None, :]
        tl.store(logits + rows[:, None] * C + c[None, :], colours.to(dtype), mask=mask)

    @triton.jit
    def _features_backward(
        points,
        planes,
        offsets,
        hidden_weight,
        hidden_bias,
        last_weight,
        grad_density,
        grad_logits,
        grad_features,
        samples,
        height,
        width,
        offset_height,
        offset_width,
        scale,
        hidden_weight_gain,
        hidden_bias_gain,
        gain,
        AXES: tl.constexpr,
        OFFSETS: tl.constexpr,
        C: tl.constexpr,
        SIDE: tl.constexpr,
        H: tl.constexpr,
        WIDE: tl.constexpr,
        M: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """To the gradient of the planes' sum, [B, M, C]."""
        batch = tl.program_id(1).to(tl.int64)
        m = tl.program_id(0) * M + tl.arange(0, M)
        live = m < samples
        rows = batch * samples + m
        c = tl.arange(0, SIDE)
        h = tl.arange(0, WIDE)
        dtype = planes.dtype.element_ty
        sizes = samples, height, width, offset_height, offset_width
        gains = hidden_weight_gain, hidden_bias_gain
        features = _features(points, planes, offsets, batch, m, sizes, scale, AXES, OFFSETS, C, SIDE, M)
        units = _hidden_layer(features, hidden_weight, hidden_bias, gains, C, SIDE, H, WIDE, PRECISION)
        mask = live[:, None] & (c < C)[None, :]
        place = rows[:, None] * C + c[None, :]
        colours = tl.load(grad_logits + place, mask=mask, other=0.0)
        sigma = tl.load(grad_density + rows, mask=live, other=0.0)
        units = _units_backward(units, sigma, colours, last_weight, gain, C, SIDE, H, WIDE, PRECISION)
        w_mask = (h < H)[:, None] & (c < C)[None, :]
        w = tl.load(hidden_weight + h[:, None] * C + c[None, :], mask=w_mask, other=0.0).to(tl.float32) * gains[0]
        gradient = tl.dot(units.to(dtype), w.to(dtype), input_precision=PRECISION) / 3
        tl.store(grad_features + place, gradient, mask=mask)

    @triton.jit
    def _weights_backward(
        points,
        planes,
        offsets,
        hidden_weight,
        hidden_bias,
        last_weight,
        grad_density,
        grad_logits,
        sums,
        samples,
        height,
        width,
        offset_height,
        offset_width,
        scale,
        hidden_weight_gain,
        hidden_bias_gain,
        gain,
        AXES: tl.constexpr,
        OFFSETS: tl.constexpr,
        C: tl.constexpr,
        SIDE: tl.constexpr,
        H: tl.constexpr,
        WIDE: tl.constexpr,
        M: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """What this program's samples add to the gradients of weights and biases."""
        batch = tl.program_id(1).to(tl.int64)
        c = tl.arange(0, SIDE)
        sizes = samples, height, width, offset_height, offset_width
        gains = hidden_weight_gain, hidden_bias_gain
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
            features = _features(points, planes, offsets, batch, m, sizes, scale, AXES, OFFSETS, C, SIDE, M)
            units = _hidden_layer(features, hidden_weight, hidden_bias, gains, C, SIDE, H, WIDE, PRECISION)
            mask = live[:, None] & (c < C)[None, :]
            colours = tl.load(grad_logits + rows[:, None] * C + c[None, :], mask=mask, other=0.0)
            sigma = tl.load(grad_density + rows, mask=live, other=0.0)
            hidden = softplus(units).to(features.dtype)
            sum_first += tl.sum(sigma[:, None] * hidden.to(tl.float32), axis=0)
            sum_rest += tl.dot(tl.trans(colours), hidden, input_precision=PRECISION)
            sum_sigma += sigma
            sum_colours += tl.sum(colours.to(tl.float32), axis=0)
            units = _units_backward(units, sigma, colours, last_weight, gain, C, SIDE, H, WIDE, PRECISION)
            sum_b += tl.sum(units, axis=0)
            sum_w += tl.dot(tl.trans(units).to(features.dtype), features, input_precision=PRECISION)
        _store_sums(sums, sum_w, sum_rest, sum_b, sum_first, sum_colours, sum_sigma, SIDE, WIDE)

    @triton.jit
    def _look_up_backward(
        points,
        planes,
        offsets,
        grad_features,
        grad_points,
        grad_planes,
        grad_offsets,
        samples,
        height,
        width,
        offset_height,
        offset_width,
        scale,
        AXES: tl.constexpr,
        OFFSETS: tl.constexpr,
        C: tl.constexpr,
        SIDE: tl.constexpr,
        M: tl.constexpr,
        COPIES: tl.constexpr,
        NEED_POINTS: tl.constexpr,
        NEED_PLANES: tl.constexpr,
        NEED_OFFSETS: tl.constexpr,
    ):
        """From the gradient of the planes' sum [B, M, C] to those of planes, offset planes and points."""
        batch = tl.program_id(1).to(tl.int64)
        m = tl.program_id(0) * M + tl.arange(0, M)
        c = tl.arange(0, SIDE)
        live = m < samples
        rows = batch * samples + m
        planes += batch * height * width * 3 * C
        grad_planes += batch * height * width * 3 * C
        offsets += batch * offset_height * offset_width * 12
        copy = (tl.program_id(0) % COPIES).to(tl.int64)
        grad_offsets += (copy * tl.num_programs(1) + batch) * offset_height * offset_width * 12
        px, py, pz = load_points(points, rows, live, scale)
        x, y, z = _displaced(offsets, px, py, pz, live, offset_height, offset_width, scale, AXES, OFFSETS, M)
        mask = live[:, None] & (c < C)[None, :]
        gradient = tl.load(grad_features + rows[:, None] * C + c[None, :], mask=mask, other=0.0)
        MOVES: tl.constexpr = NEED_OFFSETS or NEED_POINTS
        gx, gy, gz = look_up_backward(
            gradient, planes, grad_planes, x, y, z, live, height, width, AXES, C, SIDE, M, NEED_PLANES, MOVES
        )
        if OFFSETS and MOVES:
            d = tl.arange(0, 4)[None, :]
            moved = tl.where(d == 0, gx[:, None], tl.where(d == 1, gy[:, None], gz[:, None])) * scale
            moved = tl.where(d == 3, 0.0, moved)
            h, w = offset_height, offset_width
            ox, oy, oz = look_up_backward(
                moved, offsets, grad_offsets, px, py, pz, live, h, w, AXES, 4, 4, M, NEED_OFFSETS, NEED_POINTS
            )
            gx += ox
            gy += oy
            gz += oz
        if NEED_POINTS:
            store_points(grad_points, rows, live, gx * scale, gy * scale, gz * scale)


def _sides(planes: torch.Tensor, hidden_weight: torch.Tensor) -> tuple[int, int, int, int]:
    """C and H, each with the side of its blocks, of which a product must have 16."""
    channels, hidden = planes.shape[-1], hidden_weight.shape[0]
    side, wide = (max(16, triplane_cuda.block_side(size)) for size in (channels, hidden))
    return channels, side, hidden, wide


class _Decode(torch.autograd.Function):
    """points [B, M, 3], planes [B, H, W, 3, C], offset planes [B, r, r, 3, 4] or `None`, weights and biases of the
    hidden and of the last layer → densities [B, M] in float32, colour logits [B, M, C]."""

    @staticmethod
    def forward(ctx, points, planes, offsets, hidden_weight, hidden_bias, last_weight, last_bias, settings):
        batch, count = points.shape[:2]
        density = torch.empty(batch, count, device=planes.device, dtype=torch.float32)
        logits = torch.empty(batch, count, planes.shape[-1], device=planes.device, dtype=planes.dtype)
        ctx.settings = settings
        ctx.save_for_backward(points, planes, offsets, hidden_weight, hidden_bias, last_weight, last_bias)
        tensors = points, planes, planes if offsets is None else offsets, hidden_weight, hidden_bias, last_weight
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(planes):
            _forward[triton.cdiv(count, BLOCK), batch](
                *tensors,
                last_bias,
                density,
                logits,
                *_sizes(points, planes, offsets),
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
        settings, batch, count = ctx.settings, *points.shape[:2]
        sizes, sides = _sizes(points, planes, offsets), _sides(planes, weights[0])
        inputs = points, planes, planes if offsets is None else offsets
        tensors = *inputs, *weights[:3], grad_density.contiguous(), grad_logits.contiguous()
        numbers = *sizes, settings.scale, *settings.gains[:3], settings.axes, offsets is not None, *sides
        # What is not needed is an input, which the kernel then leaves alone.
        gradients = (
            torch.empty_like(points) if need_points else points,
            torch.zeros_like(planes, dtype=torch.float32) if need_planes else planes,
            offsets.new_zeros(_copies(offsets), *offsets.shape) if need_offsets else inputs[2],
        )
        weight_gradients = (None,) * 4
        with torch.cuda.device_of(planes):
            if need_points or need_planes or need_offsets:
                features = torch.empty(batch, count, sides[0], device=planes.device, dtype=torch.float32)
                _features_backward[triton.cdiv(count, BLOCK), batch](
                    *tensors, features, *numbers, BLOCK, settings.precision
                )
                layout = settings.axes, offsets is not None, *sides[:2], BACKWARD_BLOCK
                copies = _copies(offsets) if need_offsets else 1
                needs = need_points, need_planes, need_offsets
                _look_up_backward[triton.cdiv(count, BACKWARD_BLOCK), batch](
                    *inputs, features, *gradients, *sizes, settings.scale, *layout, copies, *needs
                )
            if any(need_weights):
                programs = min(triton.cdiv(count, BACKWARD_BLOCK), PROGRAMS)
                size = 2 * (sides[1] * sides[3] + sides[1] + sides[3])
                sums = torch.empty(batch * programs, size, device=planes.device, dtype=torch.float32)
                # Loads ahead of time would take the memory that lets several programs run on a multiprocessor.
                _weights_backward[programs, batch](
                    *tensors, sums, *numbers, BACKWARD_BLOCK, settings.precision, num_warps=8, num_stages=1
                )
                weight_gradients = _weight_gradients(sums, sides, settings, weights)
        grad_points, grad_planes, grad_offsets = gradients
        grad_offsets = grad_offsets.sum(dim=0) if need_offsets else None
        gradients = grad_points, grad_planes.to(planes.dtype), grad_offsets, *weight_gradients
        return *(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad)), None


def _copies(offsets: torch.Tensor) -> int:
    """Among how many copies the gradient of offset planes is shared out: there are so few positions that the additions
    of all samples to one copy would wait for each other."""
    return max(1, min(MAX_COPIES, COPIES_SIZE // offsets.numel()))


def _sizes(points, planes, offsets) -> tuple[int, ...]:
    """Numbers of samples, and height and width of planes and of offset planes."""
    return points.shape[1], *planes.shape[1:3], *((1, 1) if offsets is None else offsets.shape[1:3])


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


def _pixels_first_of_four(offset_planes: torch.Tensor) -> torch.Tensor:
    """offset planes [B, 3, 3, r, r] → [B, r, r, 3, 4] with a zero each: four numbers are read and added at once."""
    return F.pad(offset_planes.permute(0, 3, 4, 1, 2), (0, 1)).contiguous()


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
    raises PyTorch's error for it. Precision of float32 products: `product_precision`.

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
        product_precision(),
    )
    return _Decode.apply(
        points.float().contiguous(),
        triplane_cuda.pixels_first(planes),
        None if offset_planes is None else _pixels_first_of_four(offset_planes.float()),
        *(tensor.contiguous() for layer in (hidden, last) for tensor in (layer.weight, layer.bias)),
        settings,
    )
