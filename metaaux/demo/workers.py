"""Computations of several visitors at once: who has a worker, who gives way, and how one ends that nobody wants."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Cancelled(BaseException):
    """Ends a computation whose visitor has gone or has cancelled; not an error."""


class Count:
    """How many computations are running that others give way to: each is a `with` block of this."""

    def __init__(self) -> None:
        self._number = 0
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        with self._changed:
            self._number += 1

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._number -= 1
            self._changed.notify_all()

    def wait_for_none(self) -> None:
        """Returns once none is running."""
        with self._changed:
            self._changed.wait_for(lambda: self._number == 0)


class Workers:
    """Computations in threads of their own, each of which holds a worker.

    Args:
        number: how many compute at once; the others wait.
        count: in which they are counted while they compute.
    """

    def __init__(
        self,
        number: int,
        count: Count,
    ) -> None:
        self._places = threading.BoundedSemaphore(number)
        self._count = count

    def stream(self, run: Callable[[Callable[[Any], None]], None]) -> Iterator[Any]:
        """Runs `run(report)` in a thread and yields what it reports, as it does. Once the iterator is closed the next
        report ends the computation; until then it keeps its worker, so no more than `number` ever compute.

        Raises:
            BaseException: what `run` raised.
        """
        events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        closed = threading.Event()

        def report(value: Any) -> None:
            if closed.is_set():
                raise Cancelled
            events.put(("report", value))

        def work() -> None:
            try:
                with self._places, self._count:
                    if not closed.is_set():
                        run(report)
                events.put(("end", None))
            except Cancelled:
                pass
            # Whatever happens belongs to the one who waits for it.
            except BaseException as error:
                events.put(("error", error))

        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(work,), name="compute", daemon=True).start()
        try:
            while True:
                kind, value = events.get()
                if kind == "end":
                    return
                if kind == "error":
                    raise value
                yield value
        finally:
            closed.set()
