"""StyleGAN2's modulated convolution, to whose weights a photo's offsets are applied (this paper's §3.3)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def _conv_transpose2d(x: torch.Tensor, kernels: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """Transposed convolution of stride 2."""
    if x.device.type == "cpu" and groups == 1 and not torch.is_grad_enabled():
        # Up to nine times as fast there as in the default layout, but for the backward pass.
        # Permuted by hand, since vmap knows no memory formats.
        x, kernels = (t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for t in (x, kernels))
    return F.conv_transpose2d(x, kernels, stride=2, groups=groups)


def _per_sample_conv2d(x: torch.Tensor, kernels: torch.Tensor, upsample: bool) -> torch.Tensor:
    """Each sample of x [B, I, H, W] with its own kernel of kernels [B, O, I, k, k], as one grouped convolution."""
    batch = len(x)
    grouped = x.reshape(1, -1, *x.shape[2:]) if batch > 1 else x
    if upsample:
        y = _conv_transpose2d(grouped, kernels.transpose(1, 2).flatten(0, 1), batch)
    else:
        y = F.conv2d(grouped, kernels.flatten(0, 1), padding=kernels.shape[-1] // 2, groups=batch)
    return y.reshape(batch, -1, *y.shape[2:]) if batch > 1 else y


def modulated_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    styles: torch.Tensor,
    demodulate: bool = True,
    upsample: bool = False,
    offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """Modulated and demodulated convolution (StyleGAN2 Eq. 1-3).

    x [B, I, H, W], weight [O, I, k, k], styles [B, I] → [B, O, H', W'] in the dtype of `x`, where H' is 2H + 1 for
    `upsample` (a stride-2 transposed convolution, to be blurred by the caller) and H otherwise.
    `offset` δ of shape [O, I, 1, 1] or [O, I, k, k], or one a sample, [B, O, I, …], replaces the weight by θ·(1 + δ).

    A weight shared by the batch is applied between a scaling of its input and one of its output, which costs one
    convolution; one that differs per sample is folded with its style and applied as a grouped convolution.
    """
    batch, in_channels = x.shape[:2]
    if offset is not None:
        weight = weight * (1 + offset.to(weight.dtype))
    weight, styles = weight.float(), styles.float()
    if x.dtype == torch.float16 and demodulate:
        # Demodulation cancels any scale of weight and style; dividing by the maxima keeps half precision in range.
        peak = weight.abs().amax(dim=(-3, -2, -1), keepdim=True)
        weight = weight / (
            peak * math.sqrt(weight[0, 0].numel() * in_channels if weight.ndim == 4 else weight[0, 0].numel())
        )
        styles = styles / styles.abs().amax(dim=1, keepdim=True)
    if weight.ndim == 5 or batch == 1:
        per_sample = (weight if weight.ndim == 5 else weight[None]) * styles[:, None, :, None, None]
        if demodulate:
            # The bound on the norm is where the shared weights below have a term under the root.
            per_sample = per_sample / torch.linalg.vector_norm(per_sample, dim=(2, 3, 4), keepdim=True).clamp(min=1e-4)
        return _per_sample_conv2d(x, per_sample.to(x.dtype), upsample)

    x = x * styles.to(x.dtype)[:, :, None, None]
    if upsample:
        y = _conv_transpose2d(x, weight.to(x.dtype).transpose(0, 1))
    else:
        y = F.conv2d(x, weight.to(x.dtype), padding=weight.shape[-1] // 2)
    if demodulate:
        energy = styles.square() @ weight.square().sum(dim=(2, 3)).t()
        y = y * (energy + 1e-8).rsqrt().to(y.dtype)[:, :, None, None]
    return y
