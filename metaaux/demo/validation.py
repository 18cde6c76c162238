"""Checks of everything that visitors send, and their wording of errors. Nothing here trusts a type or a range."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from .settings import Settings

if TYPE_CHECKING:
    from ..models.directions import Direction

logger = logging.getLogger(__name__)

#: Degrees to which views are offered; farther out the generator has seen no faces.
MAX_YAW, MAX_PITCH = 45.0, 30.0
FLIP_CHOICES = {"automatic": None, "on": True, "off": False}


@contextmanager
def explained() -> Iterator[None]:
    """Turns errors into messages for visitors: what was wrong with their input in full, anything else without
    details, which go to the log."""
    try:
        yield
    except gr.Error:
        raise
    except (ValueError, FloatingPointError) as error:
        message = " ".join(str(error).split())
        raise gr.Error(message[:1].upper() + message[1:], print_exception=False) from None
    except Exception:
        logger.exception("a request failed")
        raise gr.Error(
            "Something went wrong on the server. It has been logged; please try again.", print_exception=False
        ) from None


def read_photos(paths: Sequence[str | None], settings: Settings) -> list[Image.Image]:
    """Uploaded files as upright RGB images.

    Raises:
        ValueError: none or too many of them, or one that is no photo; the message names it as its owner did.
    """
    from ..faces import load_photo

    paths = [path for path in paths if path]
    if not paths:
        raise ValueError("there is no photo yet; add one first")
    if len(paths) > settings.max_photos:
        raise ValueError(f"up to {settings.max_photos} photos of one person can be used, got {len(paths)}")
    photos = []
    for path in paths:
        name = os.path.basename(path)
        _check_file_size(path, settings)
        try:
            photos.append(load_photo(path, max_pixels=settings.max_megapixels * 1_000_000))
        except ValueError as error:
            # The server's paths are none of the visitor's business.
            raise type(error)(str(error).replace(path, name)) from None
    return photos


def check_inversion_file(path: str | None, settings: Settings) -> str:
    """The path of an uploaded inversion file, whose contents the pipeline checks when it loads it.

    Raises:
        ValueError: none was given, or it is too large.
    """
    if not path:
        raise ValueError("there is no inversion file; make one with /invert first")
    _check_file_size(path, settings)
    return path


def check_integer(name: str, value: Any, low: int, high: int) -> int:
    """A whole number from `low` to `high`.

    Raises:
        ValueError: it is not.
    """
    number = _number(name, value)
    if number != int(number) or not low <= number <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r:.40}")
    return int(number)


def check_angle(name: str, value: Any, limit: float) -> float | None:
    """Degrees within ±`limit`, or None for the photo's own.

    Raises:
        ValueError: anything else.
    """
    if value is None:
        return None
    number = _number(name, value)
    if not abs(number) <= limit:
        raise ValueError(f"{name} must lie between -{limit:g} and {limit:g} degrees, got {number:g}")
    return number


def check_angles(name: str, values: Any, default: Sequence[float], limit: float) -> list[float]:
    """Degrees within ±`limit`, at least one and at most 64 of them; `default` where none are given.

    Raises:
        ValueError: anything else.
    """
    if values is None:
        return list(default)
    if not isinstance(values, (list, tuple)) or not 1 <= len(values) <= 64:
        raise ValueError(f"{name} must be a list of 1 to 64 angles in degrees, got {values!r:.40}")
    return [check_angle(name, _number(name, value), limit) for value in values]


def check_edits(edits: Any, directions: Mapping[str, Direction]) -> dict[str, float]:
    """Amounts by name of a direction, without those that are 0.

    Raises:
        ValueError: no dictionary, an unknown name (the message lists those there are), or an amount that is no number
            in the direction's range.
    """
    if edits is None:
        return {}
    if not isinstance(edits, Mapping):
        raise ValueError(f'edits must be a dictionary like {{"smile": 1.0}}, got {type(edits).__name__}')
    checked = {}
    for name, value in edits.items():
        direction = directions.get(name)
        if direction is None:
            known = ", ".join(directions) or "none, as this model has no directions"
            raise ValueError(f"there is no direction {name!r:.60}; available: {known}")
        amount = _number(f"the amount of {name}", value)
        if not direction.low <= amount <= direction.high:
            raise ValueError(f"{name} must lie between {direction.low:g} and {direction.high:g}, got {amount:g}")
        if amount != 0:
            checked[name] = amount
    return checked


def check_flip(flip: Any) -> bool | None:
    """The flip loss's setting: True, False, or None for the model's own choice.

    Raises:
        ValueError: none of "automatic", "on" and "off".
    """
    if not isinstance(flip, str) or flip not in FLIP_CHOICES:
        raise ValueError(f"flip must be one of {', '.join(FLIP_CHOICES)}, got {flip!r:.40}")
    return FLIP_CHOICES[flip]


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a number, got {value!r:.40}")
    return float(value)


def _check_file_size(path: str, settings: Settings) -> None:
    size = os.path.getsize(path)
    if size > settings.max_file_mb * 1_000_000:
        raise ValueError(
            f"{os.path.basename(path)} has {size / 1e6:.0f} MB; files up to {settings.max_file_mb} MB are accepted"
        )
    if size == 0:
        raise ValueError(f"{os.path.basename(path)} is empty")
