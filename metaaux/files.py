"""Files that are either whole or absent."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
