"""Figures of an evaluation, photo by photo, in files that survive an interruption at any moment."""

from __future__ import annotations

import collections
import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..files import write_text
from .threads import face_threads, futures_in, settled

# Records that may wait for what threads still measure: of a few photos, all that an interruption at once would lose.
_MOST_WAITING = 16


class Records:
    """One JSON line a photo and method, in `FOLDER/records/METHOD.I-of-N.jsonl`.

    Shards of one evaluation write files of their own and read those of all. A line that an interruption left
    unfinished is dropped when the file is opened again.

    Args:
        folder: of the evaluation; made if missing.
        settings: what the figures depend on. Kept in `settings.json`; another run in the same folder must agree.
        shard: (number from 1, count).

    Raises:
        ValueError: the folder holds an evaluation with other settings, or `shard` is not within its count.
    """

    def __init__(self, folder: str | os.PathLike, settings: dict[str, Any], shard: tuple[int, int] = (1, 1)):
        self.folder = Path(folder)
        self.shard = shard
        self._waiting: collections.deque[tuple[str, dict[str, Any]]] = collections.deque()
        if not 1 <= shard[0] <= shard[1]:
            raise ValueError(f"a shard is a number from 1 to the count of shards, got {shard[0]}/{shard[1]}")
        (self.folder / "records").mkdir(parents=True, exist_ok=True)
        self._check_settings(settings)

    def _check_settings(self, settings: dict[str, Any]) -> None:
        path = self.folder / "settings.json"
        settings = json.loads(json.dumps(settings))
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for name, value in settings.items():
            if name != "methods" and known.get(name, value) != value:
                raise ValueError(
                    f"{self.folder} holds an evaluation with another {name} ({known[name]}, now {value}): choose "
                    "another folder, or delete this one"
                )
        methods = known.get("methods", {})
        for name, value in settings["methods"].items():
            if methods.get(name, value) != value:
                raise ValueError(
                    f"{self.folder} holds figures of {name} with other settings ({methods[name]}, now {value}): "
                    "choose another folder, or delete this one"
                )
        merged = known | settings | {"methods": methods | settings["methods"]}
        if merged != known:
            write_text(json.dumps(merged, indent=2) + "\n", path)

    def _path(self, method: str) -> Path:
        number, count = self.shard
        return self.folder / "records" / f"{method}.{number}-of-{count}.jsonl"

    def read(self, method: str) -> dict[int, dict[str, Any]]:
        """All records of a method, of every shard, by the photo's index."""
        records = {}
        for path in sorted((self.folder / "records").glob(f"{method}.*-of-*.jsonl")):
            for line in path.read_bytes().splitlines(keepends=True):
                # Lines are written with their end in one go: without it, the writer was interrupted or is at work.
                if line.endswith(b"\n"):
                    record = json.loads(line)
                    records[record["index"]] = record
        return records

    def summarize(self, write: Callable[[], dict[str, Any]], methods: Iterable[str], photos: int) -> dict[str, Any]:
        """Calls `write`, which writes a summary of all records and returns it with "complete", so that the last
        summary stands that holds every method's record of each of the first `photos` photos."""
        results = write()
        if not results["complete"] and all(
            sum(index < photos for index in self.read(method)) == photos for method in methods
        ):
            # Another shard ended meanwhile, and its summary of all may have been overwritten.
            results = write()
        return results

    def append_later(self, method: str, record: dict[str, Any]) -> None:
        """`append` in its turn, as soon as the futures among the record's values are done, with their results
        (`threads.settled`). Waits where many records do; within `measuring`."""
        self._waiting.append((method, record))
        self.settle(_MOST_WAITING)

    def settle(self, most: int = 0) -> None:
        """Writes the records that wait, in their order: those that are done, and more until no more than `most` wait.

        Raises:
            Exception: what a future raised; its record is dropped, those behind it wait.
        """
        while self._waiting:
            method, record = self._waiting[0]
            if len(self._waiting) <= most and not all(future.done() for future in futures_in(record)):
                break
            self._waiting.popleft()
            self.append(method, settled(record))

    @contextlib.contextmanager
    def measuring(self, device: torch.device) -> Iterator[ThreadPoolExecutor]:
        """Threads whose futures records may hold (`threads.face_threads`); all have been written when it ends."""
        with face_threads(device) as threads:
            try:
                yield threads
            finally:
                self.settle()

    def append(self, method: str, record: dict[str, Any]) -> None:
        """Adds a record, which must have the photo's `index`; on disk when this returns."""
        line = json.dumps(record).encode() + b"\n"
        # Appending and unbuffered: the line is written in one go.
        with self._path(method).open("a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write(line)
            os.fsync(file.fileno())
