"""Files that are either whole or absent, and what they call the places that things come from."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary name beside `path`; renames it to `path` once the block ends without an error.

    The temporary name keeps `path`'s suffix, since writers choose their format by it. After an error inside the
    block, `path` is as it was before and the temporary file is gone.

    Raises:
        FileNotFoundError: the folder of `path` does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist")
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def forget_origin(folder: str | os.PathLike) -> None:
    """Takes the path that a network was loaded from, which diffusers notes as `_name_or_path`, out of the JSON
    configurations in `folder` and its folders: it says nothing to others, and may say what it should not."""
    for path in [*Path(folder).glob("*.json"), *Path(folder).glob("*/*.json")]:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.pop("_name_or_path", None) is not None:
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def source_name(source: str | os.PathLike | None) -> str:
    """What results call a network or checkpoint: its Hub id, or its folder.

    A folder below the working directory is named as seen from there, any other by its last part: results are made to
    be shown to others, whom the rest of the path does not concern. `None`, which a pipeline made in memory has, is
    "pipeline".
    """
    if source is None:
        return "pipeline"
    if not Path(source).is_dir():
        return str(source)
    folder = Path(source).resolve()
    inside = folder.is_relative_to(Path.cwd()) and folder != Path.cwd()
    return folder.relative_to(Path.cwd()).as_posix() if inside else folder.name


def write_json(value: Any, path: Path) -> None:
    """Writes JSON, whole or not at all. Raises ValueError for values that are not finite."""
    write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Writes a text file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
