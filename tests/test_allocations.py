"""What a GPU's memory holds at its fullest, from the record of PyTorch's allocator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import metaaux
from metaaux.evaluation.allocations import at_peak, recorded

PACKAGE = Path(metaaux.__file__).resolve().parent


def event(action: str, address: int, size: int, *frames: tuple[Path, int, str]) -> dict:
    named = [{"filename": str(path), "line": line, "name": name} for path, line, name in frames]
    return {"action": action, "addr": address, "size": size, "frames": named}


def test_what_is_held_at_the_fullest_moment_by_who_asked():
    inner, outer = (PACKAGE / "losses.py", 7, "loss"), (PACKAGE / "training" / "meta.py", 9, "step")
    library = (PACKAGE.parent / "torch" / "functional.py", 3, "conv")
    trace = [
        event("alloc", 1, 100, library, inner, outer),
        event("alloc", 2, 50, inner, outer),
        event("free_requested", 2, 50),
        event("free_completed", 2, 50),
        event("segment_alloc", 9, 10_000),
        event("alloc", 2, 70, outer),  # at an address that was another's
        event("alloc", 3, 30, library, inner, outer),
        event("alloc", 4, 20),
        event("alloc", 5, 10, library),
        event("free_completed", 1, 100),
        event("alloc", 6, 99, outer),
        event("free_completed", 77, 5),  # from before the record
    ]
    assert at_peak(trace) == [
        {"bytes": 130, "allocations": 2, "where": ["losses.py:7 loss", "training/meta.py:9 step"]},
        {"bytes": 70, "allocations": 1, "where": ["training/meta.py:9 step"]},
        {"bytes": 20, "allocations": 1, "where": ["backward pass"]},
        {"bytes": 10, "allocations": 1, "where": ["outside this package"]},
    ]
    assert at_peak(trace, most=2)[2:] == [{"bytes": 30, "allocations": 2, "where": ["2 other places"]}]
    assert at_peak([]) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_record():
    from metaaux.cameras import camera_from_pose

    device = torch.device("cuda")
    with recorded(device) as entries:
        yaws = torch.linspace(-1, 1, 100_000, device=device)
        cameras = camera_from_pose(yaws, 0.0)
        del cameras
    assert sum(entry["bytes"] for entry in entries) >= 100_000 * 25 * 4
    assert any("cameras.py" in entry["where"][0] for entry in entries)
