"""Files that are either whole or absent, and what they call the places that things come from."""

from __future__ import annotations

import json
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: Bytes of the longest suffix that a writer may choose its format by; what is longer only looks like one.
_LONGEST_SUFFIX = 16


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary name beside `path`; renames it to `path` once the block ends without an error.

    The temporary name keeps `path`'s suffix, since writers choose their format by it, and nothing else of its name,
    which may be as long as the file system allows or mean something to the writer (`-x`, `%d`). After an error inside
    the block, `path` is as it was before and the temporary file is gone.

    Raises:
        FileNotFoundError: the folder of `path` does not exist.
        IsADirectoryError: `path` is a folder.
        OSError: the name is longer than the file system allows.
    """
    path = Path(path)
    check_output_file(path)
    suffix = path.suffix if len(os.fsencode(path.suffix)) <= _LONGEST_SUFFIX else ""
    temporary = path.with_name(f".{secrets.token_hex(8)}{suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Yields a new folder beside `path`, which takes that name once the block ends without an error.

    After an error inside the block, `path` is as it was before and the new folder is gone. Folders above `path` are
    made.

    Args:
        path: of the folder.
        overwrite: whether a folder that is there already is replaced; it goes once the new one has its name.

    Raises:
        FileExistsError: there is something of that name, and `overwrite` is off or it is no folder.
    """
    path = Path(path)
    if path.exists() and not (overwrite and path.is_dir()):
        raise FileExistsError(f"{path} exists already" + (" and is no folder" if overwrite else ""))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-") as place:
        made, old = Path(place, "new"), Path(place, "old")
        made.mkdir()
        yield made
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(made, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise


def check_output_file(path: str | os.PathLike) -> None:
    """Checks that a file can come to lie at `path`, before the work that its content takes.

    Raises:
        FileNotFoundError: the folder of `path` does not exist.
        IsADirectoryError: `path` is a folder.
        OSError: the name is longer than the file system allows, or nothing can be written into the folder.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist")
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        is_folder = False
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from None
    if is_folder:
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    _check_writable(path.parent)


def check_output_folder(path: str | os.PathLike) -> None:
    """Checks that `path` is a folder for results or can become one; makes nothing.

    Raises:
        NotADirectoryError: `path`, or what should be a folder above it, is a file.
        OSError: nothing can be written there.
    """
    path = Path(path)
    for place in (path, *path.absolute().parents):
        try:
            mode = place.stat().st_mode
        except FileNotFoundError:
            continue
        except NotADirectoryError:  # a file lies further up
            continue
        except OSError as error:
            raise OSError(error.errno, f"cannot write into {path}: {error.strerror}") from None
        if not stat.S_ISDIR(mode):
            raise NotADirectoryError(f"cannot write into {path}: {place} is a file")
        _check_writable(place)
        return


def _check_writable(folder: Path) -> None:
    # By writing: what os.access says is not so for read-only mounts on some systems, and for Windows' folders.
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, f"cannot write into the folder {folder}: {error.strerror}") from None


def forget_origin(folder: str | os.PathLike) -> None:
    """Takes the path that a network was loaded from, which diffusers notes as `_name_or_path`, out of the JSON
    configurations in `folder` and its folders: it says nothing to others, and may say what it should not."""
    for path in [*Path(folder).glob("*.json"), *Path(folder).glob("*/*.json")]:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.pop("_name_or_path", None) is not None:
            write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", path)


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
    """Writes a text file as UTF-8 with `\\n` at the end of lines on every system, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
