"""Views of a network: module objects of their own over tensors that are shared."""

from __future__ import annotations

import copy
import itertools

import torch


def private_view(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of `module` that shares every parameter and buffer with it but no module object.

    `functional_call` replaces entries of the modules' parameter tables while it runs, which another thread would see;
    on a private view it disturbs nobody. The view's mode can be changed freely too.
    """
    tensors = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
