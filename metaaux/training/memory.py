"""How much memory a pass takes: on the meta device, where nothing is computed, that of a full-size step is counted on
any machine in minutes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


# torch.cuda.max_memory_allocated needs the GPU and the memory; torch.distributed's own tracker knows no meta tensors.
class MemoryCount(TorchDispatchMode):
    """Counts the bytes of the tensors that come and go while it is entered, backward passes included.

    What an allocator rounds up, and what kernels take for their own use, is not known here.

    Attributes:
        bytes: of the tensors that there are.
        peak: the most that there were at once.
    """

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size
