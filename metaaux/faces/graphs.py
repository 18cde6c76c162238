"""MediaPipe's graphs: one pool a process, from which all detectors borrow, and which is emptied with the last of them.

A set of graphs costs a third of a second to build and 50 MB, and is freed only when it is closed: its callbacks refer
back to it. It keeps nothing from one picture to the next, so sets are lent to whichever thread of whichever detector
needs one, and no more of them exist than processors can use.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import re
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mediapipe.python.solution_base import SolutionBase

# Sets of graphs at most. Each computes in the thread that borrows it.
_MOST_SETS = max(1, min(8, os.cpu_count() or 1))
# What MediaPipe and TensorFlow Lite write about themselves, which no setting of theirs turns off.
_CHATTER = re.compile(rb"INFO: Created TensorFlow Lite|WARNING: All log messages before absl|[IW]\d{4} .*\.cc:\d+\] ")

_stderr_lock = threading.Lock()


class FaceGraphs:
    """A set of MediaPipe's face graphs, for one thread at a time.

    Settings as MediaPipe's own classes take them, which cannot say where a graph computes: short-range and full-range
    detectors with a lowest score of 0.5; FaceMesh for single pictures, up to four faces, with refined landmarks, which
    are those that the training crops' cameras come from.
    """

    def __init__(self) -> None:
        # Imported here: loading it takes a second, and training and conversion run without it.
        from mediapipe.modules.face_detection import face_detection_pb2

        self._silent: set[SolutionBase] = set()
        detection = face_detection_pb2.FaceDetectionOptions(min_score_thresh=0.5)
        with contextlib.ExitStack() as opened:
            self.near, self.far = (
                opened.enter_context(
                    _graph(
                        f"face_detection/face_detection_{kind}_cpu", graph_options=detection, outputs=["detections"]
                    )
                )
                for kind in ("short_range", "full_range")
            )
            detector = "facedetectionshortrangecpu__facedetectionshortrange__facedetection__"
            self.mesh = opened.enter_context(
                _graph(
                    "face_landmark/face_landmark_front_cpu",
                    side_inputs={"num_faces": 4, "with_attention": True, "use_prev_landmarks": False},
                    calculator_params={
                        f"{detector}TensorsToDetectionsCalculator.min_score_thresh": 0.5,
                        "facelandmarkcpu__ThresholdingCalculator.threshold": 0.5,
                    },
                    outputs=["multi_face_landmarks"],
                )
            )
            self._opened = opened.pop_all()

    def process(self, graph: SolutionBase, pixels: np.ndarray) -> list[Any]:
        """What a graph finds in RGB pixels [H, W, 3] uint8: detections, or lists of landmarks.

        Raises:
            RuntimeError: the graph failed; it stays failed.
        """
        # The calculators have their say at their first picture, and at the first face.
        with contextlib.nullcontext() if graph in self._silent else _without_chatter():
            outputs = graph.process(pixels)
        found = (outputs.multi_face_landmarks if graph is self.mesh else outputs.detections) or []
        if found:
            self._silent.add(graph)
        return found

    def close(self) -> None:
        """Frees the graphs, failed ones too."""
        for graph in (self.near, self.far, self.mesh):
            try:
                graph.close()
            # A failed graph raises its error once more, and would be kept.
            except Exception:
                graph._graph = None


def _graph(name: str, **options: Any) -> SolutionBase:
    from mediapipe.framework import calculator_pb2
    from mediapipe.python.solution_base import SolutionBase

    description = resources.files("mediapipe").joinpath("modules", f"{name}.binarypb").read_bytes()
    config = calculator_pb2.CalculatorGraphConfig.FromString(description)
    # In the thread that calls: by default each graph has as many threads as the machine has cores, and each of these
    # its own heap.
    config.executor.add(type="ApplicationThreadExecutor")
    return SolutionBase(graph_config=config, **options)


class _Pool:
    """The process's graphs. Nothing here takes a lock, since owners may vanish in the midst of anything."""

    def __init__(self) -> None:
        self._idle: collections.deque[FaceGraphs] = collections.deque()
        self._places = threading.BoundedSemaphore(_MOST_SETS)
        self._owners: weakref.WeakSet[object] = weakref.WeakSet()
        # The process that has used MediaPipe: in a fork of it, graphs abort.
        self._process: int | None = None

    def join(self, owner: object) -> None:
        """Counts an object among those whose life the graphs share."""
        if owner not in self._owners:
            self._owners.add(owner)
            weakref.finalize(owner, self._close_if_unowned).atexit = False

    def leave(self, owner: object) -> None:
        """Takes an object off that count."""
        self._owners.discard(owner)
        self._close_if_unowned()

    @contextlib.contextmanager
    def lend(self) -> Iterator[FaceGraphs]:
        """A set of graphs for the calling thread, which waits while all are in use.

        Raises:
            RuntimeError: this process was forked from one that had used MediaPipe.
        """
        if self._process not in (None, os.getpid()):
            raise RuntimeError(
                "faces cannot be detected in this process: it was forked from one that had used MediaPipe, and would "
                "crash; align photos before the fork (on a Space: outside the GPU function), or spawn processes"
            )
        self._process = os.getpid()
        with self._places:
            try:
                graphs = self._idle.pop()
            except IndexError:
                with _without_chatter():
                    graphs = FaceGraphs()
            try:
                yield graphs
            # Whatever it was: a graph that failed, or was left in the middle, stays in that state.
            except BaseException:
                graphs.close()
                raise
            self._idle.append(graphs)
        self._close_if_unowned()

    def _close_if_unowned(self) -> None:
        if self._process != os.getpid() or any(True for _ in self._owners):
            return
        closed = False
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()
                closed = True
        if closed and sys.platform == "linux":
            # Some 30 MB of the graphs' memory stay with the process otherwise. Only glibc has this call.
            with contextlib.suppress(AttributeError, OSError):
                ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Keeps what MediaPipe's C++ code says of itself out of the process's standard error; all else comes through,
    afterwards."""
    with _stderr_lock, contextlib.ExitStack() as stack:
        try:
            sys.stderr.flush()
            saved = os.dup(2)
        # A process without standard error.
        except (AttributeError, OSError, ValueError):
            saved = None
        if saved is None:
            yield
            return
        stack.callback(os.close, saved)
        heard = stack.enter_context(tempfile.TemporaryFile())
        os.dup2(heard.fileno(), 2)
        try:
            yield
        finally:
            with contextlib.suppress(AttributeError, OSError, ValueError):
                sys.stderr.flush()
            os.dup2(saved, 2)
            heard.seek(0)
            for line in heard:
                if not _CHATTER.match(line):
                    os.write(2, line)


POOL = _Pool()
