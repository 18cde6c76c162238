"""What the server keeps for one visitor between requests. Each visitor's is reached through their own session only."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from .engine import Engine

if TYPE_CHECKING:
    from ..faces import AlignedFace


@dataclass(frozen=True)
class AlignedPhotos:
    """A visitor's photos once their faces are found: what *Invert* starts from.

    Attributes:
        model: for which model they were cropped.
        faces: one a photo.
    """

    model: str
    faces: tuple[AlignedFace, ...]


@dataclass(frozen=True)
class Session:
    """A visitor's head. It holds nothing large: what views share is kept by the engine.

    Attributes:
        model: which model it belongs to.
        path: its inversion file in the cache.
        yaw, pitch: the photo's view, degrees.
    """

    model: str
    path: str
    yaw: float
    pitch: float


class SessionExpiredError(ValueError):
    """A visitor's head is no longer there."""

    def __init__(self) -> None:
        super().__init__("your head is no longer kept here; invert the photo again, or open the head file you saved")


class Visitor:
    """A visitor's head, and the order of what they asked for.

    Events read and change this one object instead of handing sessions back and forth: a view that arrives after the
    next head must not bring back the one before.

    Attributes:
        session: their head; None while another one is being made.
    """

    def __init__(self) -> None:
        self.session: Session | None = None
        self._newest = 0
        self._lock = threading.Lock()
        self._turn = threading.Lock()

    def __deepcopy__(self, memo: dict) -> Visitor:
        # Gradio copies initial values of a state; this one is the visitor's own wherever it is.
        return self

    def replace(self, session: Session | None) -> Session | None:
        """Takes another head, or none, and returns the one before. Views that are still being computed are out of
        date from now on."""
        with self._lock:
            self._newest += 1
            before, self.session = self.session, session
        return before

    @contextmanager
    def newest(self) -> Iterator[Request]:
        """A request for a view, which waits for this visitor's one before, and for nobody else's."""
        with self._lock:
            self._newest += 1
            request = Request(self, self.session, self._newest)
        with self._turn:
            yield request


@dataclass(frozen=True)
class Request:
    """One of a visitor's requests.

    Attributes:
        visitor: whose.
        session: the head that was theirs when they asked.
        number: counts their requests and heads.
    """

    visitor: Visitor
    session: Session | None
    number: int

    @property
    def is_current(self) -> bool:
        """Whether the visitor has asked for nothing else since, and has no other head by now."""
        return self.number == self.visitor._newest


def show(
    engine: Engine, session: Session | None, yaw: float | None, pitch: float | None, edits: dict[str, float]
) -> Image.Image:
    """A view; a change of the view alone reuses the tri-planes.

    Raises:
        SessionExpiredError: there is no head.
    """
    if session is None:
        raise SessionExpiredError
    try:
        return engine.view(session.model, session.path, yaw, pitch, edits)
    except FileNotFoundError:
        raise SessionExpiredError from None
