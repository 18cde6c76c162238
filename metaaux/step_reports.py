"""What is told of each step of an inversion, and how long the step took on its device.

On CUDA a step is told of while the GPU already computes the next one: what the host does in between, from reading the
losses to drawing the caller's picture, was a fifth of an inversion of the embedded model (docs/speed.md).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .cuda_graphs import STREAMS
from .devices import synchronize

StepCallback = Callable[[int, torch.Tensor, dict[str, float]], None]


class Timeline:
    """Points in time of what a device computes, taken when it has done all that it was given.

    Args:
        device: the device.

    Attributes:
        runs_ahead: whether points in time are noted by the device itself, so that the host need not wait.
    """

    runs_ahead = False

    def __init__(self, device: torch.device):
        self.device = device

    def mark(self) -> Any:
        """Now, in the order of what is launched."""
        synchronize(self.device)
        return time.perf_counter()

    def seconds(self, began: Any, ended: Any) -> float:
        """Between two marks; waits for the later one."""
        return ended - began

    def reading(self, mark: Any, *tensors: torch.Tensor) -> contextlib.AbstractContextManager:
        """Where tensors that were ready at a mark can be read without waiting for what was launched later."""
        return contextlib.nullcontext()

    def close(self) -> None:
        """Gives back what is its own."""
        return


class CudaTimeline(Timeline):
    """Likewise by events, and with a stream on which results are read."""

    runs_ahead = True

    def __init__(self, device: torch.device):
        super().__init__(device)
        self._stream = STREAMS.take(torch.cuda.current_stream(device).device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, began: torch.cuda.Event, ended: torch.cuda.Event) -> float:
        ended.synchronize()
        return began.elapsed_time(ended) / 1000

    @contextlib.contextmanager
    def reading(self, mark: torch.cuda.Event, *tensors: torch.Tensor) -> Iterator[None]:
        self._stream.wait_event(mark)
        for tensor in tensors:
            tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield

    def close(self) -> None:
        STREAMS.give_back(self._stream)


def timeline_of(device: torch.device) -> Timeline:
    """The device's timeline."""
    return CudaTimeline(device) if device.type == "cuda" else Timeline(device)


@dataclass
class _Step:
    number: int
    image: torch.Tensor
    losses: Mapping[str, torch.Tensor]
    began: Any
    ended: Any


class StepReports:
    """The figures of each step, in their order. A context, at whose end all have been told.

    Args:
        device: where the steps are computed, launched on the calling thread's stream.
        on_step: called as (step, image, losses) with each step's number, reconstructions [P, 3, S, S] and entry of
            `steps`. On CUDA its current stream is another one than that of the steps.

    Attributes:
        steps: one dictionary a step: "step", the losses, and "seconds", the time from `start` or the step before to
            the end of this one, without what the caller took to look at it.
    """

    def __init__(self, device: torch.device, on_step: StepCallback | None = None):
        self.steps: list[dict[str, float]] = []
        self._timeline, self._on_step = timeline_of(device), on_step
        self._began: Any = None
        self._waiting: _Step | None = None

    def __enter__(self) -> StepReports:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                self._tell_waiting()
        finally:
            self._timeline.close()

    def start(self) -> None:
        """A step's time begins."""
        self._began = self._timeline.mark()

    def add(self, step: int, image: torch.Tensor, losses: Mapping[str, torch.Tensor]) -> None:
        """A step has been launched, and its time ends with it; the next one's begins.

        Args:
            step: its number.
            image: reconstructions [P, 3, S, S].
            losses: [1] each.

        Raises:
            FloatingPointError: the loss of this step, or on CUDA of the one before, is infinite or not a number.
        """
        launched = _Step(step, image, losses, self._began, self._timeline.mark())
        self._tell_waiting()
        self._waiting = launched
        if not self._timeline.runs_ahead:
            self._tell_waiting()
        self.start()

    def _tell_waiting(self) -> None:
        told, self._waiting = self._waiting, None
        if told is None:
            return
        seconds = self._timeline.seconds(told.began, told.ended)
        with self._timeline.reading(told.ended, told.image, *told.losses.values()):
            values = dict(zip(told.losses, torch.cat(list(told.losses.values())).tolist(), strict=True))
            if not math.isfinite(values["total"]):
                raise FloatingPointError(
                    f"the loss is {values['total']} at step {told.number} of the adaptation; lower the learning rate, "
                    "set max_gradient_norm, or check that photo, code and camera are finite"
                )
            self.steps.append({"step": told.number, **values, "seconds": seconds})
            if self._on_step is not None:
                self._on_step(told.number, told.image, dict(self.steps[-1]))
