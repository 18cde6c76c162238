"""What follows a convolution of StyleGAN2: noise, bias, leaky ReLU and bound, on CUDA in one kernel.

PyTorch takes four passes over the activations, and four more on the way back.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from . import triplane_cuda

if triplane_cuda.triton is not None:
    from . import activation_kernels as kernels

LRELU_SLOPE = 0.2
LRELU_GAIN = math.sqrt(2.0)


def activated(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    noise: tuple[torch.Tensor, torch.Tensor] | None = None,
    gain: float = 1.0,
    slope: float = LRELU_SLOPE,
    bound: float | None = None,
) -> torch.Tensor:
    """y = act(x + gain·(strength·pattern + bias)), clamped to ±`bound`; differentiable any number of times.

    Args:
        x: what a convolution gave, [B, C, H, W] and nobody else's: without gradients it may be overwritten.
        bias: [C].
        noise: pattern [H, W] or [B, 1, H, W], and its strength, a scalar.
        gain: of bias and noise. That of the activation belongs here and into the convolution's weights, since it is
            the same before a leaky ReLU, where it costs no pass.
        slope: of the leaky ReLU below zero; 1: there is none.
        bound: `None`: there is none.

    Returns:
        [B, C, H, W] in the dtype of `x`.
    """
    if triplane_cuda.has_kernels(x) and (noise is None or noise[0].ndim == 2):
        return _Activate.apply(x, bias, *(noise or (None, None)), gain, slope, bound)
    in_place = not torch.is_grad_enabled()  # new memory for each pass would cost more than the pass itself
    if noise is not None:
        pattern, strength = noise
        add = torch.Tensor.addcmul_ if in_place else torch.addcmul
        x = add(x, pattern.to(x.dtype), (strength * gain).to(x.dtype))
    if bias is not None:
        bias = (bias if gain == 1 else bias * gain).to(x.dtype)[:, None, None]
        x = x.add_(bias) if in_place else x + bias
    if slope != 1:
        x = F.leaky_relu_(x, slope) if in_place else F.leaky_relu(x, slope)
    if bound is None:
        return x
    # Of torch.clamp, which also knows tensors as bounds, the derivative takes five passes over x and not one.
    return x.clamp_(-bound, bound) if in_place else F.hardtanh(x, -bound, bound)


class _Activate(torch.autograd.Function):
    """`activated` by its kernel, which knows biases [B, C] and strengths [B] too."""

    @staticmethod
    def forward(x, bias, pattern, strength, gain, slope, bound):
        return kernels.activate(x, bias, pattern, strength, gain, slope, bound)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, bias, pattern, strength, ctx.gain, ctx.slope, ctx.bound = inputs
        ctx.bias_like, ctx.strength_like = ((t.dtype, t.shape) if t is not None else None for t in (bias, strength))
        ctx.save_for_backward(output, pattern)

    @staticmethod
    def backward(ctx, gradient):
        y, pattern = ctx.saved_tensors
        gradient = _Slopes.apply(gradient, y, ctx.slope, ctx.bound)
        bias = strength = None
        if ctx.needs_input_grad[1]:
            bias = gradient.sum((2, 3), dtype=ctx.bias_like[0]).sum_to_size(ctx.bias_like[1]) * ctx.gain
        if ctx.needs_input_grad[3]:
            dtype, shape = ctx.strength_like
            strength = (gradient * pattern).sum((1, 2, 3), dtype=dtype).sum_to_size(shape) * ctx.gain
        return gradient, bias, None, strength, None, None, None

    @staticmethod
    def vmap(info, in_dims, x, bias, pattern, strength, *settings):
        # As a larger batch, each sample with what is its own. The pattern is a buffer, which all have.
        x = _in_front(x, in_dims[0], info.batch_size)
        count, batch = x.shape[:2]

        def of_samples(tensor, dim):
            return tensor if dim is None else tensor.movedim(dim, 0).repeat_interleave(batch, 0)

        bias, strength = of_samples(bias, in_dims[1]), of_samples(strength, in_dims[3])
        return _Activate.apply(x.flatten(0, 1), bias, pattern, strength, *settings).unflatten(0, (count, batch)), 0


class _Slopes(torch.autograd.Function):
    """Times the slope of the activation that gave `y`, which does not depend on it but at corners."""

    @staticmethod
    def forward(gradient, y, slope, bound):
        return kernels.slopes(gradient, y, slope, bound)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, y, ctx.slope, ctx.bound = inputs
        ctx.save_for_backward(y)

    @staticmethod
    def backward(ctx, gradient):
        return _Slopes.apply(gradient, *ctx.saved_tensors, ctx.slope, ctx.bound), None, None, None

    @staticmethod
    def vmap(info, in_dims, gradient, y, slope, bound):
        gradient, y = (_in_front(t, dim, info.batch_size) for t, dim in zip((gradient, y), in_dims))
        return _Slopes.apply(gradient, y.contiguous(), slope, bound), 0


def _in_front(tensor: torch.Tensor, dim: int | None, count: int) -> torch.Tensor:
    """With the axis that vmap goes through as the first one."""
    return tensor.expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
