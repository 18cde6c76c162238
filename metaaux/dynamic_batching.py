"""Dynamic batching, as inference servers do it: passes that several threads ask for while the GPU is busy with one of
the same kind run as one, whose batch is that of all.

A batch of one photo leaves most of a GPU idle, and passes of several threads side by side share it rather than fill
it. Here nobody waits for company: a thread that finds nobody at work begins at once, and what has gathered by the time
that its pass is done goes together. Inversions join each other at any of their steps.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from .structures import divided, flatten, joined


@dataclass(eq=False)
class _Request:
    """A pass that a thread waits for.

    Attributes:
        inputs: what it computes on.
        ready: on a GPU, when these are; once it is launched, when its results are.
        outputs: its results, once it is launched.
        settled: whether it is, or nobody waits for it any more.
    """

    inputs: Any
    ready: torch.cuda.Event | None
    outputs: Any = None
    settled: bool = False


class DynamicBatching:
    """Runs passes of equal keys, asked for by several threads, together.

    A pass takes and gives nested mappings and sequences of tensors (`structures`), and treats the entries along their
    first dimension apart. The thread whose request is the oldest leads: on a GPU it waits until the pass before has
    been computed, unless that was its own alone, takes what has gathered meanwhile, up to the largest power of two,
    and launches it on its own stream; the others' streams wait for that. Outputs of a batch are views of the same
    tensors, nobody's to change.

    Args:
        most: so many requests at most in a pass. Powers of two alone are taken, since each number has a recording of
            its own. It shrinks where the memory does not suffice.

    Attributes:
        batches: how often so many requests were run as one.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, most: int):
        if most < 1:
            raise ValueError(f"most must be 1 or more, got {most}")
        self.most = most
        self.batches: Counter[int] = Counter()
        self._changed = threading.Condition()
        self._waiting: defaultdict[Hashable, deque[_Request]] = defaultdict(deque)
        self._led: set[Hashable] = set()
        #: When what was launched last of a key is done, and whose it was, if one thread's alone.
        self._last: dict[Hashable, tuple[torch.cuda.Event | None, int | None]] = {}

    def run(self, key: Hashable, compute: Callable[[Any], Any], inputs: Any) -> Any:
        """What `compute` makes of `inputs`.

        Args:
            key: equal for those that one pass can serve, whichever thread's `compute` it is; that is for the same
                function, constants, and layouts of tensors.
            compute: inputs → outputs, launched on the calling thread's stream.
            inputs: of this request, at most on one device.

        Raises:
            Exception: what `compute` raised of a pass that this thread led. The others of that pass are tried anew.
        """
        tensors: list[torch.Tensor] = []
        flatten(inputs, tensors)
        device = tensors[0].device
        request = _Request(inputs, _event(device))
        with self._changed:
            queue = self._waiting[key]
            queue.append(request)
            try:
                self._changed.wait_for(lambda: request.settled or (key not in self._led and queue[0] is request))
            except BaseException:
                self._forget(key, request)
                raise
            if not request.settled:
                self._led.add(key)
        if request.settled:
            _receive(request.outputs, request.ready, device)
            return request.outputs
        return self._lead(key, request, compute, device)

    def _lead(self, key: Hashable, request: _Request, compute: Callable[[Any], Any], device: torch.device) -> Any:
        queue, batch = self._waiting[key], []
        try:
            before, owner = self._last.get(key, (None, None))
            # A thread that is alone runs ahead of the GPU, as without batches.
            if before is not None and owner != threading.get_ident():
                before.synchronize()
            with self._changed:
                size = 1 << (min(len(queue), self.most).bit_length() - 1)
                batch = [queue.popleft() for _ in range(size)]
            try:
                outputs = _compute(batch, compute, device)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                with self._changed:
                    self.most = min(self.most, len(batch) // 2)
                outputs = _compute([request], compute, device)
            done = _event(device)
            with self._changed:
                self.batches[len(outputs)] += 1
                self._last[key] = done, threading.get_ident() if len(outputs) == 1 else None
                for served, own in zip(batch, outputs, strict=False):
                    served.outputs, served.ready, served.settled = own, done, True
            return request.outputs
        finally:
            with self._changed:
                self._led.discard(key)
                queue.extendleft(other for other in reversed(batch) if not other.settled)
                self._forget(key, request)

    def _forget(self, key: Hashable, request: _Request) -> None:
        """Nobody waits for a request any more: the next one may lead."""
        request.settled = True
        if request in self._waiting[key]:
            self._waiting[key].remove(request)
        self._changed.notify_all()


def _compute(batch: list[_Request], compute: Callable[[Any], Any], device: torch.device) -> list[Any]:
    """What `compute` makes of the inputs of all, for each."""
    for request in batch:
        if request.ready is not None:
            torch.cuda.current_stream(device).wait_event(request.ready)
    with torch.inference_mode(False), torch.no_grad():
        together = joined([request.inputs for request in batch])
    outputs = compute(together)
    with torch.inference_mode(False), torch.no_grad():
        return divided(outputs, len(batch))


def _receive(outputs: Any, ready: torch.cuda.Event | None, device: torch.device) -> None:
    """Lets the thread's stream have what another thread has launched."""
    if ready is None:
        return
    stream, tensors = torch.cuda.current_stream(device), []
    stream.wait_event(ready)
    flatten(outputs, tensors)
    for tensor in tensors:
        # Else their memory could be another's as soon as this thread lets go of them, before its stream has read them.
        tensor.record_stream(stream)


def _event(device: torch.device) -> torch.cuda.Event | None:
    """When what has been launched on the thread's stream is done."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
