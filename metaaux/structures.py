"""Nested mappings and sequences of tensors and constants, which passes take and give."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch


def flatten(value: Any, tensors: list[torch.Tensor]) -> Hashable:
    """Appends the tensors of a nested value to `tensors`; returns what else it holds, and the tensors' layouts."""
    # torch.utils._pytree knows which tensors there are, but its description of dictionaries cannot be hashed.
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return value.dtype, value.shape, value.stride(), value.device
    if isinstance(value, Mapping):
        return dict, tuple((name, flatten(entry, tensors)) for name, entry in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(flatten(entry, tensors) for entry in value)
    return value


def with_tensors(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """The same nested value with other tensors, in the order of `flatten`."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, Mapping):
        return {name: with_tensors(entry, tensors) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(with_tensors(entry, tensors) for entry in value)
    return value
