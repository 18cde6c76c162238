"""Threads that find faces in pictures, while the device goes on with the next photo."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

# `faces.graphs` lends so many sets of MediaPipe's graphs.
_MOST_THREADS = 8


def face_threads(device: torch.device) -> ThreadPoolExecutor:
    """Threads for MediaPipe, which takes a tenth of a second of a core a picture and leaves Python to the others.

    As many as this process's share of the cores has use for; one where PyTorch computes on these cores itself.

    Args:
        device: the one that PyTorch computes on.
    """
    if device.type == "cpu":
        return ThreadPoolExecutor(1)
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return ThreadPoolExecutor(max(1, min(_MOST_THREADS, cores)))


def futures_in(value: Any) -> Iterator[Future]:
    """The futures in dictionaries and lists of any depth."""
    if isinstance(value, Future):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from futures_in(item)


def settled(value: Any) -> Any:
    """A value whose futures, in dictionaries and lists of any depth, have given way to their results.

    Raises:
        Exception: what a future raised.
    """
    if isinstance(value, Future):
        return value.result()
    if isinstance(value, dict):
        return {key: settled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [settled(item) for item in value]
    return value
