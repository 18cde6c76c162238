"""What a recording takes for granted of networks, and whether it still holds."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch

#: What is compared of a module beside its tensors.
_PLAIN = frozenset((bool, int, float, str, torch.dtype, type(None)))


def state_of(parts: Sequence[Any]) -> list:
    """All that a recording takes from networks for granted: where their tensors lie, in which layout, and what numbers
    and words their modules hold. Values of tensors are no part of it: a replay reads them anew."""
    state, stack, seen = [], list(parts), set()
    while stack:
        part = stack.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        own = vars(part)
        state.append((type(part), [(name, value) for name, value in own.items() if type(value) in _PLAIN]))
        if isinstance(part, torch.nn.Module):
            tensors = [*own["_parameters"].values(), *own["_buffers"].values()]
            state.append([(t.data_ptr(), t.dtype, t.shape) for t in tensors if t is not None])
            state.append(dict(own.get("_internal_dict", ())))  # diffusers' configuration
            stack.extend(child for child in own["_modules"].values() if child is not None)
        else:
            stack.extend(value for value in own.values() if hasattr(value, "__dict__") and not isinstance(value, type))
    return state


class KnownState:
    """What `state_of` said of networks, and a look whether it still would, in a third of the time: a view takes a GPU
    two milliseconds, and waits for this.

    Args:
        serial: number of the recordings that were made of this state.
        state: see `state_of`.
        parts: the networks; of other objects a look says nothing.
    """

    def __init__(self, serial: int, state: list, parts: Sequence[Any]):
        self.serial, self.state, self._parts = serial, state, parts
        self._networks = all(isinstance(part, torch.nn.Module) for part in parts)
        modules = [module for part in parts for module in part.modules()] if self._networks else []
        self._owns = [vars(module) for module in modules]
        self._inner = [own[name] for own in self._owns for name in ("_modules", "_parameters", "_buffers")]
        # Kept, so that nothing new can have the identity of what is gone.
        self._members = list(itertools.chain.from_iterable(members.values() for members in self._inner))
        self._tensors = [member for member in self._members if isinstance(member, torch.Tensor)]
        self._seen = self._look()

    def holds(self, parts: Sequence[Any]) -> bool:
        """Whether these are the same networks, unchanged; where it cannot be told so fast, it is said not to be."""
        if not self._networks or len(parts) != len(self._parts) or not all(map(operator.is_, parts, self._parts)):
            return False
        try:
            return self._look() == self._seen
        except (RuntimeError, ValueError):  # tensors or arrays that are others now
            return False

    def _look(self) -> tuple[list, ...]:
        return (
            [list(own.values()) for own in self._owns],
            list(map(id, itertools.chain.from_iterable(members.values() for members in self._inner))),
            [tensor.data_ptr() for tensor in self._tensors],
            [tensor.shape for tensor in self._tensors],
        )
