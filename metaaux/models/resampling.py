"""StyleGAN2's resampling with the low-pass kernel [1, 3, 3, 1] (Karras et al. 2020; Zhang 2019 for the reason).

On a CPU one depthwise convolution is several times faster than passes over slices; on GPUs it is slower.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import devices


def blur2d(x: torch.Tensor, padding: int, gain: float = 1.0) -> torch.Tensor:
    """Low-pass filter [B, C, H, W] with the separable [1, 3, 3, 1] kernel over zero borders of width `padding`.

    `gain` scales the amplitude per axis; the output is [B, C, H + 2·padding - 3, W + 2·padding - 3].
    """
    return (_blur_by_convolution if devices.is_cpu(x) else _blur_by_slices)(x, padding, gain)


def _kernels(x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
    """[C, 1, 4, 4]: the kernel for each channel of x [B, C, H, W], its amplitude scaled per axis by `gain`."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device) * (gain / 8)
    return (taps[:, None] * taps).expand(x.shape[1], 1, 4, 4)


def _blur_by_convolution(x: torch.Tensor, padding: int, gain: float) -> torch.Tensor:
    return F.conv2d(x, _kernels(x, gain), padding=padding, groups=x.shape[1])


def _blur_by_slices(x: torch.Tensor, padding: int, gain: float) -> torch.Tensor:
    # Scaled once, and first: half precision could not hold the sums.
    x = F.pad(x * (gain / 8) ** 2, (padding, padding, padding, padding))
    for dim in (2, 3):
        n = x.shape[dim] - 3
        outer = x.narrow(dim, 0, n) + x.narrow(dim, 3, n)
        inner = x.narrow(dim, 1, n) + x.narrow(dim, 2, n)
        x = torch.add(outer, inner, alpha=3)
    return x


def upsample2d(x: torch.Tensor, replicate: bool = False) -> torch.Tensor:
    """Upsample [B, C, H, W] by 2 with the [1, 3, 3, 1] kernel and zero borders → [B, C, 2H, 2W] in `channels_last`.

    Zero insertion followed by this kernel gives each output ¾ of its nearest and ¼ of its next nearest input. With
    borders that `replicate` the outermost pixels this is bilinear interpolation, whose backward pass is slow on CUDA.
    """
    # New memory would be laid out by channels were these not the last axis: a tri-plane look-up, which reads all
    # channels of a pixel, would need a cache line for each of them.
    x = x.permute(0, 2, 3, 1)
    if devices.is_cpu(x):
        return _upsample_by_convolution(x.contiguous().permute(0, 3, 1, 2), replicate)
    if not replicate:
        x = F.pad(x, (0, 0, 1, 1, 1, 1))
    for dim in (1, 2):
        if replicate:
            x = torch.cat((x.narrow(dim, 0, 1), x, x.narrow(dim, -1, 1)), dim=dim)
        n = x.shape[dim] - 2
        before, nearest, after = (x.narrow(dim, start, n) for start in range(3))
        nearest = nearest * 0.75
        x = torch.stack((nearest + before * 0.25, nearest + after * 0.25), dim=dim + 1).flatten(dim, dim + 1)
    return x.permute(0, 3, 1, 2)


def _upsample_by_convolution(x: torch.Tensor, replicate: bool) -> torch.Tensor:
    padding = 1
    if replicate:
        x, padding = F.pad(x, (1, 1, 1, 1), mode="replicate"), 3
    return F.conv_transpose2d(x, _kernels(x, gain=2.0), stride=2, padding=padding, groups=x.shape[1])


def downsample2d(x: torch.Tensor) -> torch.Tensor:
    """Downsample [B, C, H, W] by 2 with the [1, 3, 3, 1] kernel and zero borders → [B, C, H/2, W/2]."""
    if devices.is_cpu(x):
        return F.conv2d(x, _kernels(x), stride=2, padding=1, groups=x.shape[1])
    x = F.pad(x, (1, 1, 1, 1))
    for dim in (2, 3):
        n = x.shape[dim] // 2 - 1
        taps = [x[(slice(None),) * dim + (slice(start, start + 2 * n, 2),)] for start in range(4)]
        x = (taps[0] + taps[3]) * 0.125 + (taps[1] + taps[2]) * 0.375
    return x
