"""A grid of views of one head in one picture: what a page turns without asking for a view at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..files import atomic_path, write_json

#: Degrees of the usual grid's columns and rows: finer from side to side, where heads are turned most.
YAWS = tuple(float(yaw) for yaw in range(-45, 46, 3))
PITCHES = tuple(float(pitch) for pitch in range(-30, 31, 10))
#: Side of a view in the grid unless the generator's pictures are smaller: larger grids are hard on phones.
VIEW_SIZE = 256
# Longest side of a WebP picture.
_MAX_SIDE = 16383


@dataclass(frozen=True, eq=False)
class Turntable:
    """Views of a head, each row at one pitch and each column at one yaw.

    Attributes:
        picture: RGB, the views without a gap: row r, column c shows the head at `pitches[r]` and `yaws[c]`.
        yaws: degrees of the head, one a column.
        pitches: degrees of the head, one a row.
    """

    picture: Image.Image
    yaws: tuple[float, ...]
    pitches: tuple[float, ...]

    @property
    def size(self) -> int:
        """Side of one view, pixels."""
        return self.picture.width // len(self.yaws)

    @property
    def angles(self) -> dict[str, list[float] | int]:
        """`yaws`, `pitches` and `size`: what a program needs beside the picture, as JSON holds it."""
        return {"yaws": list(self.yaws), "pitches": list(self.pitches), "size": self.size}

    def view(self, yaw: float, pitch: float) -> Image.Image:
        """The view nearest to `yaw` and `pitch`, degrees."""
        column = int(np.abs(np.subtract(self.yaws, yaw)).argmin())
        row = int(np.abs(np.subtract(self.pitches, pitch)).argmin())
        left, top = column * self.size, row * self.size
        return self.picture.crop((left, top, left + self.size, top + self.size))

    def save(self, path: str | os.PathLike, quality: int = 95) -> None:
        """Writes the picture, and `angles` beside it under the same name with `.json`, each whole or not at all.

        Args:
            path: ends in `.webp`, or in `.png` for a picture without any loss.
            quality: of a WebP, 0 to 100.

        Raises:
            ValueError: another file ending, or a side too long for WebP.
            FileNotFoundError: the folder of `path` does not exist.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix not in (".webp", ".png"):
            raise ValueError(f"a turntable is a WebP or a PNG: {path.name!r} must end in .webp or .png")
        if suffix == ".webp" and max(self.picture.size) > _MAX_SIDE:
            width, height = self.picture.size
            raise ValueError(
                f"a WebP's sides have up to {_MAX_SIDE} pixels, and these views take {width}x{height}: ask for fewer "
                "or smaller views, or for a PNG"
            )
        with atomic_path(path) as temporary:
            if suffix == ".webp":
                self.picture.save(temporary, format="WEBP", quality=quality, method=2)
            else:
                self.picture.save(temporary, format="PNG")
        write_json(self.angles, path.with_suffix(".json"))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Turntable:
        """What `save` wrote.

        Raises:
            FileNotFoundError: one of the two files is not there.
            ValueError: they do not belong together.
        """
        path = Path(path)
        angles = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        with Image.open(path) as picture:
            table = cls(picture.convert("RGB"), tuple(angles["yaws"]), tuple(angles["pitches"]))
        expected = (len(table.yaws) * angles["size"], len(table.pitches) * angles["size"])
        if table.picture.size != expected:
            raise ValueError(f"{path.name} has {table.picture.size} pixels, its angles are those of {expected}")
        return table


def render_turntable(
    render: Callable[[float, float], Image.Image],
    image_size: int,
    yaws: Sequence[float] = YAWS,
    pitches: Sequence[float] = PITCHES,
    size: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Turntable:
    """Renders a grid of views.

    Args:
        render: the view at a yaw and a pitch in degrees, `image_size` pixels wide.
        image_size: of the generator.
        yaws: degrees of the grid's columns.
        pitches: degrees of its rows.
        size: side of one view in pixels, up to `image_size`. Default: `image_size`, but not above `VIEW_SIZE`.
        progress: called with the share that is done, 0 to 1; an exception from it ends the computation.

    Raises:
        ValueError: no yaw or no pitch, or a size out of range.
    """
    size = min(image_size, VIEW_SIZE) if size is None else size
    if not 1 <= size <= image_size:
        raise ValueError(f"size must lie between 1 and {image_size}, the side of this model's pictures, got {size}")
    if len(yaws) == 0 or len(pitches) == 0:
        raise ValueError("a turntable needs at least one yaw and one pitch")
    picture = Image.new("RGB", (len(yaws) * size, len(pitches) * size))
    for row, pitch in enumerate(pitches):
        for column, yaw in enumerate(yaws):
            view = render(float(yaw), float(pitch))
            if view.width != size:
                view = view.resize((size, size), Image.Resampling.LANCZOS)
            picture.paste(view, (column * size, row * size))
            if progress is not None:
                progress((row * len(yaws) + column + 1) / (len(yaws) * len(pitches)))
    return Turntable(picture, tuple(map(float, yaws)), tuple(map(float, pitches)))
