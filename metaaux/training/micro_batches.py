"""Pictures a part of a batch at a time, so that no batch is too large for a GPU.

What sees the whole batch, such as batch normalisation in the network that is trained, sees it still: only what comes
after it, where pictures do not depend on one another, is done in parts. So the gradient is that of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def pictures_at_once(image_size: int) -> int:
    """How many pictures of this side are rendered together where gradients are not wanted: 2²⁰ pixels, which are 64 of
    128² and 4 of 512²."""
    return max(1, 2**20 // image_size**2)


def in_parts(function: Callable[..., torch.Tensor], size: int, *tensors: torch.Tensor) -> torch.Tensor:
    """`function` of tensors [B, …], from `size` samples at a time to as many values [·, …]; joined."""
    return torch.cat([function(*part) for part in zip(*(tensor.split(size) for tensor in tensors), strict=True)])


def accumulated(
    function: Callable[..., dict[str, torch.Tensor]], size: int | None, *tensors: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """A loss of samples that do not depend on one another, its gradient taken `size` samples at a time.

    Each part's graph is freed before the next one is built; that of what made the tensors waits for the gradient.

    Args:
        function: from parts of the tensors to terms [·] by name, "total" among them.
        size: of a part; `None`: the whole batch at once.
        tensors: [B, …] or `None`.

    Returns:
        The terms [B]. "total" can be differentiated once with regard to the tensors; so can the others only where the
        batch is not divided.
    """
    count = len(tensors[0])
    if size is None or size >= count:
        return function(*tensors)
    wanted = [index for index, tensor in enumerate(tensors) if tensor is not None and tensor.requires_grad]
    terms, gradients = [], []
    for start in range(0, count, size):
        part = [None if tensor is None else tensor[start : start + size].detach() for tensor in tensors]
        leaves = [part[index].requires_grad_() for index in wanted]
        values = function(*part)
        gradients.append(torch.autograd.grad(values["total"].sum(), leaves))
        terms.append({name: value.detach() for name, value in values.items()})
    joined = {name: torch.cat([part[name] for part in terms]) for name in terms[0]}
    for index, parts in zip(wanted, zip(*gradients, strict=True), strict=True):
        linear = (torch.cat(parts) * tensors[index]).flatten(1).sum(1)
        joined["total"] = joined["total"] + linear - linear.detach()
    return joined
