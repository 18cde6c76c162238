"""What the server keeps for one visitor between requests. Each visitor's is reached through their own session only."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from PIL import Image

from .engine import Engine, is_absent

if TYPE_CHECKING:
    from ..faces import AlignedFace
    from ..head import Head


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
    """A visitor's head.

    Attributes:
        model: which model it belongs to.
        path: its inversion file in the cache.
        yaw, pitch: the photo's view, degrees.
        edits: those that `head` was prepared with.
        head: tri-planes and all else that its views share, or `None` where the engine keeps none.
    """

    model: str
    path: str
    yaw: float
    pitch: float
    edits: dict[str, float] = field(default_factory=dict)
    head: Head | None = None


class SessionExpiredError(ValueError):
    """A visitor's head is no longer there."""

    def __init__(self) -> None:
        super().__init__("your head is no longer kept here; invert the photo again, or open the head file you saved")


def show(
    engine: Engine, session: Session | None, yaw: float | None, pitch: float | None, edits: dict[str, float]
) -> tuple[Image.Image, Session]:
    """A view, and the session with what was computed for it: a change of the view alone reuses the tri-planes.

    Raises:
        SessionExpiredError: there is no head.
    """
    if session is None:
        raise SessionExpiredError
    if session.head is None or session.edits != edits:
        if is_absent(session.path):
            raise SessionExpiredError
        if engine.keeps_heads:
            session = replace(session, head=engine.prepare(session.model, session.path, edits), edits=edits)
    source = session.path if session.head is None else session.head
    return engine.render(session.model, source, yaw, pitch, edits), session
