"""Prepared heads, kept between views within a bound of memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..head import Head

Key = tuple[str, str, tuple[tuple[str, float], ...]]


class HeadCache:
    """What all views of a head share, by its file and edits; the longest unused goes first.

    Shared by the server's threads. Each head holds tri-planes on the model's device, tens of megabytes at full size:
    a bound by bytes holds for every model, one by visitors does not.

    Args:
        max_bytes: of all tensors together. A head that is larger alone is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._heads: OrderedDict[Key, Head] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        """Memory of what is kept."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._heads)

    def get(self, model: str, path: str, edits: Mapping[str, float], make: Callable[[], Head]) -> Head:
        """The head of the file `path` of `model` with `edits`; `make` makes it where it is not kept."""
        key = (model, path, tuple(sorted(edits.items())))
        with self._lock:
            if key in self._heads:
                self._heads.move_to_end(key)
                return self._heads[key]
        # Outside of the lock: it takes a moment, and others' heads are not to wait for it.
        head = make()
        with self._lock:
            self._remove(key)
            self._heads[key] = head
            self._bytes += head_bytes(head)
            while self._bytes > self.max_bytes:
                self._remove(next(iter(self._heads)))
        return head

    def forget(self, path: str) -> None:
        """Drops the heads of a file, with whatever edits."""
        with self._lock:
            for key in [key for key in self._heads if key[1] == path]:
                self._remove(key)

    def _remove(self, key: Key) -> None:
        head = self._heads.pop(key, None)
        if head is not None:
            self._bytes -= head_bytes(head)


def head_bytes(head: Head) -> int:
    """Memory of a head's tensors."""
    tensors = [head.ws, head.planes, head.offset_planes, head.camera, *head.weight_offsets.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
