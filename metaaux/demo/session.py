"""What the server keeps for one visitor between requests. Each visitor's is reached through their own session only."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

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


@dataclass(frozen=True, eq=False)
class Session:
    """A visitor's head. It holds nothing large: what views share is kept by the engine.

    Attributes:
        model: which model it belongs to.
        path: its inversion file in the cache.
        yaw, pitch: the photo's view, degrees.
        example: what it is kept as, where it came from an example.
        number: tells it from others.
    """

    model: str
    path: str
    yaw: float
    pitch: float
    example: tuple[str, str] | None = None
    number: int = field(default_factory=itertools.count().__next__)


@dataclass(frozen=True)
class Sheet:
    """A turntable's picture in the cache.

    Attributes:
        picture: its path.
        yaws, pitches: degrees of its columns and rows.
        size: side of one view, pixels.
    """

    picture: str
    yaws: tuple[float, ...]
    pitches: tuple[float, ...]
    size: int


@dataclass(frozen=True)
class Shown:
    """What a visitor's page shows of their head.

    Attributes:
        session: the head.
        edits: amounts by name of a direction.
        picture: path of the exact view.
        yaw, pitch: of that view, degrees as the sliders have them.
        sheets: views that the page can turn by itself, all with `edits`.
        complete: whether these are all that there will be.
    """

    session: Session
    edits: dict[str, float]
    picture: str
    yaw: float
    pitch: float
    sheets: tuple[Sheet, ...] = ()
    complete: bool = False

    def is_alike(self, other: Shown | None) -> bool:
        """Whether another one shows the same head with the same edits, so that sheets suit both."""
        return other is not None and self.session is other.session and self.edits == other.edits


#: Orders messages to pages: one with a smaller number came late. All visitors share it, as heads outlive none of them.
_versions = itertools.count(1)


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
        shown: what their page shows of it; None before the first view.
        waiting_for: the example whose inversion they wait for.
        making_sheets: for which `shown` sheets are being made.
        heads: counts their heads, those that are being made included: an inversion whose visitor has asked for another
            head since has nothing to show any more.
    """

    def __init__(self) -> None:
        self.session: Session | None = None
        self.shown: Shown | None = None
        self.waiting_for: tuple[str, str] | None = None
        self.making_sheets: Shown | None = None
        self.heads = 0
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
            self.heads += 1
            before, self.session = self.session, session
            self.shown = self.waiting_for = None
        return before

    def show(self, shown: Shown, request: Request | None = None) -> dict[str, Any] | None:
        """Takes a new view and returns the page's message about it; None where the visitor has moved on meanwhile.

        Args:
            shown: sheets that arrived while it was being computed stay.
            request: which one it answers.
        """
        with self._lock:
            if shown.session is not self.session or (request is not None and request.number != self._newest):
                return None
            if shown.is_alike(self.shown):
                shown = replace(shown, sheets=self.shown.sheets, complete=self.shown.complete)
            self.shown = shown
            return self._message()

    def add_sheet(self, shown: Shown, sheet: Sheet, complete: bool) -> dict[str, Any] | None:
        """Takes a further sheet of what was `shown` when it was asked for, and returns the page's message; None where
        the visitor has another head or other edits by now."""
        with self._lock:
            if self.shown is None or not shown.is_alike(self.shown):
                return None
            self.shown = replace(self.shown, sheets=(*self.shown.sheets, sheet), complete=complete)
            return self._message()

    def _message(self) -> dict[str, Any]:
        """All that the page shows of the head, so that a message that gets lost behind a newer one is not missed."""
        shown = self.shown
        sheets = [
            {"picture": _file(sheet.picture), "yaws": sheet.yaws, "pitches": sheet.pitches, "size": sheet.size}
            for sheet in shown.sheets
        ]
        return {
            "version": next(_versions),
            "head": str(shown.session.number),
            "view": _file(shown.picture),
            "yaw": shown.yaw,
            "pitch": shown.pitch,
            "sheets": sheets,
        }

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


def _file(path: str) -> dict[str, Any]:
    # Gradio adds the address to what is marked so, however deep it lies.
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


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
