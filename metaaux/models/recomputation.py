"""Activation checkpointing: what a function's derivative needs is computed again in the backward pass instead of kept
(Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

Function = Callable[..., tuple[torch.Tensor, ...]]


# torch.utils.checkpoint spares memory in the first derivative alone: what a derivative of it needs is kept, so that a
# second-order step through a checkpointed rendering needs all that it needs without. And a gradient that is taken
# inside of a checkpointed function makes it compute all of it once more, at once.
class _Recomputed(torch.autograd.Function):
    """Keeps the inputs alone. Its derivative is such a function itself, and so is that one's."""

    @staticmethod
    def forward(ctx, function: Function, *inputs: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return tuple(output.detach() for output in function(*inputs))

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        derivative = partial(_derivative, ctx.function, wanted)
        tensors = (*ctx.saved_tensors, *gradients)
        # Only for a derivative of a derivative are gradients enabled here.
        values = iter(_Recomputed.apply(derivative, *tensors) if torch.is_grad_enabled() else derivative(*tensors))
        return None, *(next(values) if needed else None for needed in wanted)


def _derivative(function: Function, wanted: Sequence[bool], *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Of Σ ⟨outputs, gradients⟩ with regard to the `wanted` ones of `function`'s inputs.

    Args:
        tensors: the inputs, as many as `wanted`, and a gradient for each output.
    """
    differentiable = torch.is_grad_enabled()
    inputs, gradients = tensors[: len(wanted)], tensors[len(wanted) :]
    with torch.enable_grad():
        if not differentiable:
            inputs = [x.detach().requires_grad_() if needed else x for x, needed in zip(inputs, wanted, strict=True)]
        outputs = [pair for pair in zip(function(*inputs), gradients, strict=True) if pair[0].requires_grad]
        leaves = [x for x, needed in zip(inputs, wanted, strict=True) if needed]
        return torch.autograd.grad(
            [output for output, _ in outputs],
            leaves,
            [gradient for _, gradient in outputs],
            create_graph=differentiable,
            materialize_grads=True,
        )


def recomputed(function: Function, *inputs: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """`function(*inputs)`, of which nothing but the inputs is kept for the backward pass, which calls it again.

    For derivatives of any order; each keeps as little. Gradients may be taken inside of `function`.

    Args:
        function: from tensors (or `None`) to a tuple of tensors that it makes anew. It is called without gradients
            first, where it must give the same as with them; it draws no random numbers, and opens the autocast regions
            that it needs itself. Tensors that it knows otherwise than as inputs count as constants.
        inputs: its arguments.

    Returns:
        The outputs.
    """
    return _Recomputed.apply(function, *inputs)
