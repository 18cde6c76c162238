"""StyleGAN2's resampling with the low-pass kernel [1, 3, 3, 1] (Karras et al. 2020; Zhang 2019 for the reason).

On a CPU one depthwise convolution is the fastest, on GPUs it is slow. On CUDA each map has a kernel of its own
(`resampling_kernels`); on others, and where `torch.compile` fuses passes itself, the filter is taken for what it is,
[1, 1] three times over: means of 2×2 pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from .. import devices
from . import triplane_cuda

if triplane_cuda.triton is not None:
    from . import resampling_kernels as kernels

Map = Callable[[torch.Tensor], torch.Tensor]


class _Linear(torch.autograd.Function):
    """A linear map of the input alone, whose way back is its transpose. Differentiable any number of times.

    Autograd would keep the input of each pass over the pixels, and PyTorch's derivative of means with borders is wrong
    for `channels_last` on CUDA before 2.13 (pytorch/pytorch#188344); on MPS it fails.
    """

    @staticmethod
    def forward(x: torch.Tensor, function: Map, transpose: Map) -> torch.Tensor:
        return function(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.function, ctx.transpose = inputs

    @staticmethod
    def backward(ctx, gradient):
        return _Linear.apply(gradient, ctx.transpose, ctx.function), None, None

    @staticmethod
    def vmap(info, in_dims, x, function, transpose):
        # Each picture by itself in any case: as a larger batch.
        x = x.movedim(in_dims[0], 0)
        return _Linear.apply(x.flatten(0, 1), function, transpose).unflatten(0, x.shape[:2]), 0


def blur2d(x: torch.Tensor, padding: int, gain: int = 1) -> torch.Tensor:
    """Low-pass filter [B, C, H, W] with the separable [1, 3, 3, 1] kernel over zero borders of width `padding`.

    `padding` is 0 to 3, and `gain`, 1 or 2, scales the amplitude per axis; the output is
    [B, C, H + 2·padding - 3, W + 2·padding - 3].
    """
    if devices.is_cpu(x):
        return F.conv2d(x, _kernels(x, gain), padding=padding, groups=x.shape[1])
    return _Linear.apply(x, partial(_blur, padding, gain), partial(_blur, 3 - padding, gain))


def _blur(padding: int, gain: int, x: torch.Tensor) -> torch.Tensor:
    if triplane_cuda.has_kernels(x):
        return kernels.blur(x, padding, gain)
    # Beyond one pixel of border a mean is zero, so that each pass can bring a border of its own.
    first, second, third = (int(padding > done) for done in range(3))
    x = F.avg_pool2d(F.avg_pool2d(x, 2, 1, first), 2, 1, second)
    return F.avg_pool2d(x, 2, 1, third, divisor_override=4 // gain**2)


def _kernels(x: torch.Tensor, gain: int = 1) -> torch.Tensor:
    """[C, 1, 4, 4]: the kernel for each channel of x [B, C, H, W], its amplitude scaled per axis by `gain`."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device) * (gain / 8)
    return (taps[:, None] * taps).expand(x.shape[1], 1, 4, 4)


def upsample2d(x: torch.Tensor, replicate: bool = False) -> torch.Tensor:
    """Upsample [B, C, H, W] by 2 with the [1, 3, 3, 1] kernel and zero borders → [B, C, 2H, 2W] in `channels_last`.

    Zero insertion followed by this kernel gives each output ¾ of its nearest and ¼ of its next nearest input. With
    borders that `replicate` the outermost pixels this is bilinear interpolation, whose backward pass is slow on CUDA.
    """
    # A tri-plane look-up reads all channels of a pixel, and would need a cache line for each were they not adjacent.
    x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    if devices.is_cpu(x):
        return _upsample_by_convolution(x, replicate)
    x = _Linear.apply(x, partial(_up, 4), partial(_down, 1))
    return x * _border_factors(x) if replicate else x


def _border_factors(x: torch.Tensor) -> torch.Tensor:
    """[H, W] for x [B, C, H, W]: what replaces the quarter that outermost pixels lack with zero borders."""
    # Padded, since a number that is put into a tensor on a GPU makes the host wait.
    inner = (torch.ones(side - 2, dtype=x.dtype, device=x.device) for side in x.shape[2:])
    rows, columns = (F.pad(ones, (1, 1), value=4 / 3) for ones in inner)
    return rows[:, None] * columns


def _upsample_by_convolution(x: torch.Tensor, replicate: bool) -> torch.Tensor:
    padding = 1
    if replicate:
        x, padding = F.pad(x, (1, 1, 1, 1), mode="replicate"), 3
    return F.conv_transpose2d(x, _kernels(x, gain=2), stride=2, padding=padding, groups=x.shape[1])


def downsample2d(x: torch.Tensor) -> torch.Tensor:
    """Downsample [B, C, H, W] by 2 with the [1, 3, 3, 1] kernel and zero borders → [B, C, H/2, W/2]."""
    if devices.is_cpu(x):
        return F.conv2d(x, _kernels(x), stride=2, padding=1, groups=x.shape[1])
    return _Linear.apply(x, partial(_down, 4), partial(_up, 16))


def _up(divisor: int, x: torch.Tensor) -> torch.Tensor:
    """Twice as many pixels: of the sum over them `divisor` 4 makes the mean."""
    if triplane_cuda.has_kernels(x):
        return kernels.enlarge(x, 4 / divisor)
    x = F.avg_pool2d(F.interpolate(x, scale_factor=2, mode="nearest"), 2, 1, 1)
    return F.avg_pool2d(x, 2, 1, divisor_override=divisor)


def _down(divisor: int, x: torch.Tensor) -> torch.Tensor:
    """Half as many pixels; `divisor` as of `_up`."""
    if triplane_cuda.has_kernels(x):
        return kernels.reduce(x, 4 / divisor)
    return F.avg_pool2d(F.avg_pool2d(F.avg_pool2d(x, 2, 1, 1), 2, 1), 2, divisor_override=divisor)
