"""The tri-plane decoder as it is fast on a CPU: a block of samples at a time, which stays in the processor's cache."""

from __future__ import annotations

import torch

#: Samples of a block: with 64 hidden units, a megabyte.
BLOCK = 4096


def decode(
    features: torch.Tensor,
    hidden_weight: torch.Tensor,
    hidden_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softplus(features·hidden_weightᵀ + hidden_bias)·weightᵀ + bias, once differentiable in all of them.

    Args:
        features: [..., C] in float32, as all others.
        hidden_weight, hidden_bias: [H, C] and [H].
        weight, bias: [1 + D, H] and [1 + D].

    Returns:
        The first column [...] and the others [..., D].
    """
    first, others = _Decoding.apply(features.flatten(0, -2), hidden_weight, hidden_bias, weight, bias)
    return first.view(features.shape[:-1]), others.view(*features.shape[:-1], -1)


class _Decoding(torch.autograd.Function):
    """Keeps the hidden units alone: softplus' = 1 - exp(-softplus)."""

    @staticmethod
    def forward(ctx, features, hidden_weight, hidden_bias, weight, bias):
        count = len(features)
        kept = count if any(ctx.needs_input_grad) else min(count, BLOCK)
        hidden = features.new_empty(kept, len(hidden_weight))
        first, others = features.new_empty(count), features.new_empty(count, len(weight) - 1)
        for start in range(0, count, BLOCK):
            block = slice(start, min(start + BLOCK, count))
            units = hidden[block] if kept == count else hidden[: block.stop - start]
            torch.addmm(hidden_bias, features[block], hidden_weight.t(), out=units)
            torch.ops.aten.softplus.out(units, out=units)
            torch.addmv(bias[0], units, weight[0], out=first[block])
            torch.addmm(bias[1:], units, weight[1:].t(), out=others[block])
        if kept == count:
            ctx.save_for_backward(features, hidden_weight, weight, hidden)
        return first, others

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, first_gradient, others_gradient):
        features, hidden_weight, weight, hidden = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        features_gradient = torch.empty_like(features) if wanted[0] else None
        sums = [torch.zeros_like(tensor) for tensor in (hidden_weight, hidden_weight[:, 0], weight)]
        minus, scratch = -hidden_weight, hidden.new_empty(2, min(BLOCK, len(hidden)), len(hidden_weight))
        for start in range(0, len(features), BLOCK):
            block = slice(start, min(start + BLOCK, len(features)))
            units, (slope, flow) = hidden[block], scratch[:, : block.stop - start]
            torch.neg(units, out=slope).expm1_()  # minus the slope
            torch.mm(others_gradient[block], weight[1:], out=flow)
            flow.addr_(first_gradient[block], weight[0]).mul_(slope)
            if wanted[0]:
                torch.mm(flow, minus, out=features_gradient[block])
            if wanted[1] or wanted[2]:
                sums[0].addmm_(flow.t(), features[block], alpha=-1)
                sums[1].sub_(flow.sum(0))
            if wanted[3]:
                sums[2][0].addmv_(units.t(), first_gradient[block])
                sums[2][1:].addmm_(others_gradient[block].t(), units)
        bias_gradient = None
        if wanted[4]:
            bias_gradient = torch.cat((first_gradient.sum()[None], others_gradient.sum(0)))
        gradients = (features_gradient, *sums, bias_gradient)
        return tuple(gradient if needed else None for gradient, needed in zip(gradients, wanted, strict=True))
