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

    from . import fused_decoder_kernels as kernels

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
            kernels.forward[triton.cdiv(count, BLOCK), batch](
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
                kernels.features_backward[triton.cdiv(count, BLOCK), batch](
                    *tensors, features, *numbers, BLOCK, settings.precision
                )
                layout = settings.axes, offsets is not None, *sides[:2], BACKWARD_BLOCK
                copies = _copies(offsets) if need_offsets else 1
                needs = need_points, need_planes, need_offsets
                kernels.inputs_backward[triton.cdiv(count, BACKWARD_BLOCK), batch](
                    *inputs, features, *gradients, *sizes, settings.scale, *layout, copies, *needs
                )
            if any(need_weights):
                programs = min(triton.cdiv(count, BACKWARD_BLOCK), PROGRAMS)
                size = 2 * (sides[1] * sides[3] + sides[1] + sides[3])
                sums = torch.empty(batch * programs, size, device=planes.device, dtype=torch.float32)
                # Loads ahead of time would take the memory that lets several programs run on a multiprocessor.
                kernels.weights_backward[programs, batch](
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
