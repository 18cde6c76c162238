"""The Triton kernels of `activation`, which imports them where Triton is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Numbers that a program makes.
BLOCK = 1024


@triton.jit
def _activate(
    x,
    bias,
    pattern,
    strength,
    y,
    count,
    channels,
    bias_step,
    strength_step,
    gain,
    slope,
    bound,
    BIAS: tl.constexpr,
    NOISE: tl.constexpr,
    BOUND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y [B, H, W, C] of x [B, H, W, C]; the steps lead from one sample's bias and strength to the next one's."""
    sample = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < count
    first = sample.to(tl.int64) * count
    value = tl.load(x + first + at, mask=live, other=0.0).to(tl.float64 if WIDE else tl.float32)
    if NOISE:
        noise = tl.load(pattern + at // channels, mask=live, other=0.0).to(value.dtype)
        value += noise * (tl.load(strength + sample * strength_step).to(value.dtype) * gain)
    if BIAS:
        value += tl.load(bias + sample * bias_step + at % channels, mask=live, other=0.0).to(value.dtype) * gain
    value = tl.where(value > 0, value, value * slope)
    if BOUND:
        # What is no number stays none.
        value = tl.where(value > bound, bound, tl.where(value < -bound, -bound, value))
    tl.store(y + first + at, value.to(y.dtype.element_ty), mask=live)


@triton.jit
def _slopes(gradient, y, out, count, slope, bound, BOUND: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """out = gradient · ∂y, all of `count` numbers in the same order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < count
    value = tl.load(y + at, mask=live, other=0.0).to(tl.float64 if WIDE else tl.float32)
    back = tl.load(gradient + at, mask=live, other=0.0).to(value.dtype)
    back = tl.where(value > 0, back, back * slope)
    if BOUND:
        # As `y` has it where it was clamped.
        limit = tl.full([BLOCK], bound, y.dtype.element_ty).to(value.dtype)
        back = tl.where((value >= limit) | (value <= -limit), 0.0, back)
    tl.store(out + at, back.to(out.dtype.element_ty), mask=live)


def activate(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    pattern: torch.Tensor | None,
    strength: torch.Tensor | None,
    gain: float,
    slope: float,
    bound: float | None,
) -> torch.Tensor:
    """As `activation.activated` of x [B, C, H, W], in `channels_last`; bias [C] or [B, C], pattern [H, W],
    strength [] or [B]."""
    x = x.permute(0, 2, 3, 1).contiguous()
    y = torch.empty_like(x)
    batch, height, width, channels = x.shape
    count = height * width * channels
    has_bias, has_noise = bias is not None, pattern is not None
    # Any pointer serves for what is not there.
    bias, pattern, strength = (x if t is None else t.contiguous() for t in (bias, pattern, strength))
    if y.numel():
        # Triton launches on the current device, which need not be the tensor's.
        with torch.cuda.device_of(x):
            _activate[triton.cdiv(count, BLOCK), batch](
                x,
                bias,
                pattern,
                strength,
                y,
                count,
                channels,
                channels if bias.ndim == 2 else 0,
                1 if strength.ndim == 1 else 0,
                gain,
                slope,
                0.0 if bound is None else bound,
                has_bias,
                has_noise,
                bound is not None,
                x.dtype == torch.float64,
                BLOCK,
            )
    return y.permute(0, 3, 1, 2)


def slopes(gradient: torch.Tensor, y: torch.Tensor, slope: float, bound: float | None) -> torch.Tensor:
    """The gradient before an activation that gave `y`, of the same shape in any layout without gaps."""
    if gradient.stride() != y.stride():
        gradient = torch.empty_like(y).copy_(gradient)
    out = torch.empty_like(y)
    if count := y.numel():
        with torch.cuda.device_of(y):
            _slopes[(triton.cdiv(count, BLOCK),)](
                gradient,
                y,
                out,
                count,
                slope,
                0.0 if bound is None else bound,
                bound is not None,
                y.dtype == torch.float64,
                BLOCK,
            )
    return out
