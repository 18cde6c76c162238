"""What a click on an example has made once: the next visitor gets a turning head at once, without a GPU."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from .session import Sheet
from .uploads import new_file

#: A model and a photo.
Key = tuple[str, str]


@dataclass(frozen=True)
class Kept:
    """A finished inversion with all that the page shows of it.

    Attributes:
        head: path of the inversion's file.
        photo: path of the aligned photo.
        picture: path of the photo's own view.
        steps: path and name of each step's picture.
        losses: entries of `Inversion.steps`.
        yaw, pitch: of the photo's camera, degrees.
        sheets: all views that the page turns by itself, or none of them.
    """

    head: str
    photo: str
    picture: str
    steps: tuple[tuple[str, str], ...]
    losses: tuple[dict[str, float], ...]
    yaw: float
    pitch: float
    sheets: tuple[Sheet, ...] = ()

    def copied(self, copy: Callable[[str], str]) -> Kept:
        """The same with each file where `copy` has put it."""
        return replace(
            self,
            head=copy(self.head),
            photo=copy(self.photo),
            picture=copy(self.picture),
            steps=tuple((copy(path), name) for path, name in self.steps),
            sheets=_copied(self.sheets, copy),
        )


class ExampleStore:
    """Results by model and photo, in a folder that is gone with the process: a model that was replaced meanwhile has
    no results of its predecessor. Gradio's own cache of examples holds what components show, not a visitor's state.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="metaaux-examples-")
        self._kept: dict[Key, Kept] = {}
        self._lock = threading.Lock()

    def put(self, key: Key, kept: Kept) -> None:
        """Keeps copies of the files: a visitor's own are deleted after a while."""
        kept = kept.copied(self._keep)
        with self._lock:
            self._kept.setdefault(key, kept)

    def put_sheets(self, key: Key, sheets: tuple[Sheet, ...]) -> None:
        """Adds the views of a result that is kept, once all of them are there."""
        sheets = _copied(sheets, self._keep)
        with self._lock:
            if key in self._kept and not self._kept[key].sheets:
                self._kept[key] = replace(self._kept[key], sheets=sheets)

    def get(self, key: Key) -> Kept | None:
        """A result with files of the visitor's own, if there is one."""
        with self._lock:
            kept = self._kept.get(key)
        return None if kept is None else kept.copied(_give)

    def _keep(self, path: str) -> str:
        kept = Path(self._folder.name) / f"{secrets.token_hex(8)}-{Path(path).name}"
        shutil.copyfile(path, kept)
        return str(kept)


def _give(path: str) -> str:
    given = new_file(os.path.basename(path).split("-", 1)[1])
    shutil.copyfile(path, given)
    return given


def _copied(sheets: tuple[Sheet, ...], copy: Callable[[str], str]) -> tuple[Sheet, ...]:
    return tuple(replace(sheet, picture=copy(sheet.picture)) for sheet in sheets)
