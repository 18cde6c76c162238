"""What is asked of ZeroGPU: seconds, with which a visitor's daily quota is charged, by what was measured."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import spaces
from spaces.config import Config as spaces_config

from ..export.turntable import PITCHES, YAWS
from .validation import explained


def on_gpu(function: Callable, duration: Callable[..., int]) -> Callable:
    """`spaces.GPU`, which off ZeroGPU returns the function as it is. On ZeroGPU an error's message is lost on its way
    to the visitor unless it is a `gr.Error`, which it is therefore made where it is raised."""
    if not spaces_config.zero_gpu:
        return function
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def run(*arguments: Any) -> Iterator[Any]:
            with explained():
                yield from function(*arguments)

    else:

        @functools.wraps(function)
        def run(*arguments: Any) -> Any:
            with explained():
                return function(*arguments)

    return spaces.GPU(duration=duration)(run)


#: Measured on one H100 at full size (512 x 512 pixels), seconds: an inversion of one photo in five steps, tri-planes
#: with a view of them, a further view. An embedded model of 128 x 128 pixels took 0.67, 0.0117 and 0.0051.
INVERSION_SECONDS, SYNTHESIS_SECONDS, VIEW_SECONDS = 1.025, 0.021, 0.0074
#: Measured on a CPU with the embedded model, seconds of processor time: a textured mesh of 192 cells a side
#: (docs/results.md). A GPU takes over sampling and views, not unwrapping and baking; there it is not measured.
MESH_SECONDS = 12.5
#: What is asked for beyond that: a worker process with its first kernels, and a GPU that may be half as fast.
START_SECONDS, ALLOWANCE = 2.0, 2.0


def _asked(measured: float) -> int:
    """Seconds to ask ZeroGPU for; the visitor's quota is charged with them."""
    return min(120, math.ceil(START_SECONDS + ALLOWANCE * measured))


def seconds_of_inversion(model, crops, cameras, steps, flip, path, turntable) -> int:
    """An inversion, with or without its grid of views."""
    # The flip loss renders each photo's mirrored view as well; whether it is used by itself is found out later.
    passes = len(crops) * (1 if flip is False else 2)
    views = len(YAWS) * len(PITCHES) if turntable else 0
    return _asked(INVERSION_SECONDS * (steps + 2) / 7 * passes + VIEW_SECONDS * views)


def seconds_of_view(model, path, yaw, pitch, edits) -> int:
    """One view of a file."""
    return _asked(SYNTHESIS_SECONDS)


def seconds_of_edit(model, path, yaw, pitch, edits) -> int:
    """A view and a grid of views."""
    return _asked(SYNTHESIS_SECONDS + VIEW_SECONDS * len(YAWS) * len(PITCHES))


def seconds_of_turntable(model, path, yaws, pitches, size, edits) -> int:
    """A grid of views."""
    return _asked(SYNTHESIS_SECONDS + VIEW_SECONDS * len(yaws) * len(pitches))


def seconds_of_orbit(model, path, frames, ranges, edits, video) -> int:
    """A video."""
    # Encoding takes as long again.
    return _asked(SYNTHESIS_SECONDS + 2 * VIEW_SECONDS * frames)


def seconds_of_mesh(model, path, resolution, edits, mesh) -> int:
    """A mesh."""
    # Its surface, and with it the processor's work, grows with the square of the cells on a side.
    return math.ceil(START_SECONDS + MESH_SECONDS * max(1.0, (resolution / 192) ** 2))
