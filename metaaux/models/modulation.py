"""StyleGAN2's modulated convolution, to whose weights a photo's offsets are applied (this paper's §3.3)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .. import devices

#: Whether gradients of kernels are fast in the activations' layout.
_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


class _Convolution(torch.autograd.Function):
    """A convolution that keeps the size, or a transposed one of stride 2, as it is fast on a CPU.

    oneDNN is up to four times as fast where a pixel's channels are adjacent, but without AVX-512 it is, towards the
    kernels, where a channel's pixels are, and PyTorch goes back in the layout in which it came. Differentiable any
    number of times.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, kernels, transposed):
        if transposed:
            # Permuted by hand, since vmap knows no memory formats.
            x, kernels = (t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for t in (x, kernels))
            return F.conv_transpose2d(x, kernels, stride=2)
        return F.conv2d(x, kernels, padding=kernels.shape[-1] // 2)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, kernels, ctx.transposed = inputs
        ctx.save_for_backward(x, kernels)

    @staticmethod
    def backward(ctx, gradient):
        x, kernels = ctx.saved_tensors
        stride, padding = ((2, 2), (0, 0)) if ctx.transposed else ((1, 1), (kernels.shape[-1] // 2,) * 2)
        settings = (None, stride, padding, (1, 1), ctx.transposed, (0, 0), 1)
        backward = torch.ops.aten.convolution_backward
        x_gradient = kernel_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = backward(gradient, x, kernels, *settings, (True, False, False))[0]
        if ctx.needs_input_grad[1]:
            given = (gradient, x, kernels)
            if not _AVX512:
                given = (tensor.contiguous() for tensor in given)
            kernel_gradient = backward(*given, *settings, (False, True, False))[1]
        return x_gradient, kernel_gradient, None


def _conv2d(x: torch.Tensor, kernels: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """Convolution that keeps the size."""
    if devices.is_cpu(x) and groups == 1:
        return _Convolution.apply(x, kernels, False)
    return F.conv2d(x, kernels, padding=kernels.shape[-1] // 2, groups=groups)


def _conv_transpose2d(x: torch.Tensor, kernels: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """Transposed convolution of stride 2."""
    if devices.is_cpu(x) and groups == 1:
        return _Convolution.apply(x, kernels, True)
    return F.conv_transpose2d(x, kernels, stride=2, groups=groups)


def _per_sample_conv2d(x: torch.Tensor, kernels: torch.Tensor, upsample: bool) -> torch.Tensor:
    """Each sample of x [B, I, H, W] with its own kernel of kernels [B, O, I, k, k], as one grouped convolution."""
    batch = len(x)
    grouped = x.reshape(1, -1, *x.shape[2:]) if batch > 1 else x
    if upsample:
        y = _conv_transpose2d(grouped, kernels.transpose(1, 2).flatten(0, 1), batch)
    else:
        y = _conv2d(grouped, kernels.flatten(0, 1), batch)
    return y.reshape(batch, -1, *y.shape[2:]) if batch > 1 else y


def modulated_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    styles: torch.Tensor,
    demodulate: bool = True,
    upsample: bool = False,
    offset: torch.Tensor | None = None,
    gain: float = 1.0,
) -> torch.Tensor:
    """Modulated and demodulated convolution (StyleGAN2 Eq. 1-3).

    x [B, I, H, W], weight [O, I, k, k], styles [B, I] → [B, O, H', W'] in the dtype of `x`, where H' is 2H + 1 for
    `upsample` (a stride-2 transposed convolution, to be blurred by the caller) and H otherwise.
    `offset` δ of shape [O, I, 1, 1] or [O, I, k, k], or one a sample, [B, O, I, …], replaces the weight by θ·(1 + δ).
    The result is scaled by `gain`, at no cost.

    A weight shared by the batch is applied between a scaling of its input and one of its output, which costs one
    convolution; one that differs per sample is folded with its style and applied as a grouped convolution.
    """
    batch, in_channels = x.shape[:2]
    factor = None if offset is None else 1 + offset.to(weight.dtype)
    per_sample = batch == 1 or (offset is not None and offset.ndim == 5)
    if factor is not None and not (per_sample and factor.shape[-1] == 1):
        weight, factor = weight * factor, None
    weight, styles = weight.float(), styles.float()
    if x.dtype == torch.float16 and demodulate:
        # Demodulation cancels any scale of weight and style; dividing by the maxima keeps half precision in range.
        peak = weight.abs().amax(dim=(-3, -2, -1), keepdim=True)
        weight = weight / (peak * math.sqrt(weight.shape[-1] * weight.shape[-2] * in_channels))
        styles = styles / styles.abs().amax(dim=1, keepdim=True)
    if per_sample:
        # All that scales whole kernels is gathered in one number a kernel, so that the weight is passed over once.
        scales = styles[:, None] if factor is None else styles[:, None] * factor.flatten(-3).float()
        if demodulate:
            energy = (scales.square() * weight.square().sum(dim=(-2, -1))).sum(dim=-1, keepdim=True)
            scales = scales * ((energy + 1e-8).rsqrt() * gain)
        elif gain != 1:
            scales = scales * gain
        return _per_sample_conv2d(x, (weight * scales[..., None, None]).to(x.dtype), upsample)

    x = x * styles.to(x.dtype)[:, :, None, None]
    if upsample:
        y = _conv_transpose2d(x, weight.to(x.dtype).transpose(0, 1))
    else:
        y = _conv2d(x, weight.to(x.dtype))
    if demodulate:
        with torch.autocast(x.device.type, enabled=False):
            energy = styles.square() @ weight.square().sum(dim=(2, 3)).t()
        y = y * ((energy + 1e-8).rsqrt() * gain).to(y.dtype)[:, :, None, None]
    return y if demodulate or gain == 1 else y * gain
