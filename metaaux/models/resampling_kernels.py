"""The Triton kernels of `resampling`, which imports them where Triton is: each map in one pass over the pixels.

PyTorch's means of 2×2 pixels take three passes, each of them ten times as long as the memory needs where a pixel's
channels are adjacent (an H100, PyTorch 2.11: half of the time of a view of 512² pixels).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Numbers of a row that a program makes.
BLOCK = 1024


@triton.jit
def _filter(
    x,
    y,
    height,
    out_height,
    length,
    out_length,
    channels,
    scale,
    STEP: tl.constexpr,
    PADDING: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y [B, H', W', C]: the sums of 4×4 pixels of x [B, H, W, C] by [1, 3, 3, 1] in both axes, times `scale`; each
    STEP pixels after the last, the first PADDING pixels before the border. Lengths are of rows: W·C and W'·C."""
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    top = row % out_height * STEP - PADDING
    first = row // out_height * height
    left = at + (STEP - 1) * (at // channels * channels) - PADDING * channels
    total = tl.zeros([BLOCK], tl.float64 if WIDE else tl.float32)
    for i in tl.static_range(4):
        line = top + i
        end = tl.where((line >= 0) & (line < height), length, 0)
        own = x + (first + line).to(tl.int64) * length
        for j in tl.static_range(4):
            column = left + j * channels
            value = tl.load(own + column, mask=(column >= 0) & (column < end), other=0.0)
            total += value.to(total.dtype) * ((3 if i % 3 else 1) * (3 if j % 3 else 1))
    tl.store(y + row.to(tl.int64) * out_length + at, (total * scale).to(y.dtype.element_ty), mask=at < out_length)


@triton.jit
def _enlarge(x, y, height, out_height, length, out_length, channels, scale, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """y [B, 2H, 2W, C]: in both axes thrice the nearest pixel of x [B, H, W, C] plus the next, times `scale`."""
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    line = row % out_height
    first = row // out_height * height
    pixel = at // channels
    near = (pixel // 2) * channels + at - pixel * channels
    total = tl.zeros([BLOCK], tl.float64 if WIDE else tl.float32)
    for i in tl.static_range(2):
        source = line // 2 + i * (line % 2 * 2 - 1)
        end = tl.where((source >= 0) & (source < height), length, 0)
        own = x + (first + source).to(tl.int64) * length
        for j in tl.static_range(2):
            column = near + j * (pixel % 2 * 2 - 1) * channels
            value = tl.load(own + column, mask=(column >= 0) & (column < end), other=0.0)
            total += value.to(total.dtype) * ((1 if i else 3) * (1 if j else 3))
    tl.store(y + row.to(tl.int64) * out_length + at, (total * scale).to(y.dtype.element_ty), mask=at < out_length)


def blur(x: torch.Tensor, padding: int, gain: int) -> torch.Tensor:
    """As `resampling.blur2d`."""
    height, width = (side + 2 * padding - 3 for side in x.shape[2:])
    return _launch(_filter, x, height, width, gain**2 / 64, 1, padding)


def reduce(x: torch.Tensor, gain: float) -> torch.Tensor:
    """[B, C, 2H, 2W] → [B, C, H, W]: filtered, and every second pixel; a constant comes out times `gain`."""
    return _launch(_filter, x, x.shape[2] // 2, x.shape[3] // 2, gain / 64, 2, 1)


def enlarge(x: torch.Tensor, gain: float) -> torch.Tensor:
    """[B, C, H, W] → [B, C, 2H, 2W]: zeros inserted and filtered; inside a constant comes out times `gain`."""
    return _launch(_enlarge, x, 2 * x.shape[2], 2 * x.shape[3], gain / 16)


def _launch(kernel, x: torch.Tensor, out_height: int, out_width: int, scale: float, *settings: int) -> torch.Tensor:
    """[B, C, H, W] → [B, C, H', W'], in `channels_last`."""
    batch, channels, height, width = x.shape
    x = x.permute(0, 2, 3, 1).contiguous()
    y = torch.empty(batch, out_height, out_width, channels, dtype=x.dtype, device=x.device)
    if y.numel():
        grid = batch * out_height, triton.cdiv(out_width * channels, BLOCK)
        lengths = width * channels, out_width * channels
        # Triton launches on the current device, which need not be the tensor's.
        with torch.cuda.device_of(x):
            kernel[grid](
                x, y, height, out_height, *lengths, channels, scale, *settings, x.dtype == torch.float64, BLOCK
            )
    return y.permute(0, 3, 1, 2)
