"""What a GPU's memory holds when it is fullest: the record of PyTorch's allocator, summed up by who asked for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

#: Frames of this package that tell one caller from another.
_FRAMES = 3
_PACKAGE = Path(__file__).resolve().parent.parent
#: Allocations and releases that are kept at most; of more, the first are forgotten.
MOST_EVENTS = 4_000_000


@contextmanager
def recorded(device: torch.device, most: int = 40) -> Iterator[list[dict[str, Any]]]:
    """A list that is `at_peak` of all that is allocated on a CUDA device within, once the block has ended. Each
    allocation takes longer meanwhile."""
    entries: list[dict[str, Any]] = []
    # Private names, but those of PyTorch's own guide to CUDA memory; nothing public knows where tensors were made.
    torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python", max_entries=MOST_EVENTS)
    try:
        yield entries
    finally:
        index = torch.cuda.current_device() if device.index is None else device.index
        traces = torch.cuda.memory._snapshot()["device_traces"]
        torch.cuda.memory._record_memory_history(None)
    entries += at_peak(traces[index], most)


def at_peak(trace: Sequence[dict[str, Any]], most: int = 40) -> list[dict[str, Any]]:
    """Who held the memory when it was fullest, the largest shares first.

    Args:
        trace: a device's events as `torch.cuda.memory._snapshot` has them.
        most: entries; all others are summed up in one more.

    Returns:
        {"bytes", "allocations", "where": up to three lines of this package, the innermost first} each; "where" is
        "backward pass" where no Python was running, as in autograd's threads.
    """
    now = peak = 0
    fullest, sizes = -1, {}
    for number, event in enumerate(trace):
        if event["action"] == "alloc":
            sizes[event["addr"]] = event["size"]
            now += event["size"]
            if now > peak:
                peak, fullest = now, number
        elif event["action"] == "free_completed":
            now -= sizes.pop(event["addr"], 0)
    held: dict[int, dict[str, Any]] = {}
    for event in trace[: fullest + 1]:
        if event["action"] == "alloc":
            held[event["addr"]] = event
        elif event["action"] == "free_completed":
            held.pop(event["addr"], None)
    shares: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for event in held.values():
        shares[_callers(event.get("frames", ()))].append(event["size"])
    ordered = sorted(shares.items(), key=lambda share: -sum(share[1]))
    entries = [_entry(sizes, list(where)) for where, sizes in ordered[:most]]
    if rest := [size for _, sizes in ordered[most:] for size in sizes]:
        entries.append(_entry(rest, [f"{len(ordered) - most} other places"]))
    return entries


def _entry(sizes: Sequence[int], where: list[str]) -> dict[str, Any]:
    return {"bytes": sum(sizes), "allocations": len(sizes), "where": where}


def _callers(frames: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    lines = []
    for frame in frames:
        path = Path(frame["filename"])
        if path.is_relative_to(_PACKAGE):
            lines.append(f"{path.relative_to(_PACKAGE)}:{frame['line']} {frame['name']}")
    return tuple(lines[:_FRAMES]) or (("outside this package",) if frames else ("backward pass",))
