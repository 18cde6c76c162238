"""Nested mappings and sequences of tensors and constants, which passes take and give."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
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


def joined(values: Sequence[Any]) -> Any:
    """Nested values of equal layout as one whose tensors are theirs, one after the other along the first dimension.
    A single value stays as it is, its tensors too."""
    if len(values) == 1:
        return values[0]
    columns: list[list[torch.Tensor]] = [[] for _ in values]
    for value, column in zip(values, columns):
        flatten(value, column)
    return with_tensors(values[0], map(torch.cat, zip(*columns, strict=True)))


def divided(value: Any, number: int) -> list[Any]:
    """So many nested values with equal parts of the tensors of `value`, along their first dimension; views of them.

    Raises:
        RuntimeError: a tensor's first dimension cannot be divided so.
    """
    if number == 1:
        return [value]
    tensors: list[torch.Tensor] = []
    flatten(value, tensors)
    parts = zip(*(tensor.unflatten(0, (number, -1)).unbind(0) for tensor in tensors), strict=True)
    return [with_tensors(value, iter(part)) for part in parts]
