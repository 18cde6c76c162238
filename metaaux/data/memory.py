"""Where decoded pictures have room: on the GPU, in the host's memory, or nowhere."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import psutil
import torch

#: Share of a device's free memory that decoded pictures may take by themselves: training has yet to claim its own.
MEMORY_SHARE = 1 / 3

#: Folder of this process's control group, where a container has it. Elsewhere the host's figure counts.
CGROUP = Path("/sys/fs/cgroup")
# Its limit, its use, its statistics, and what these call cached files that can be dropped; versions 2 and 1.
_CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on `device`: of a GPU what is free; of the host what is free within its
    container's limit, divided among the run's processes on this host."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    for limit, used, statistics, cached in _CGROUP_FILES:
        # No such file, or "max" in it: no limit.
        with suppress(OSError, ValueError, KeyError):
            counts = dict(line.split() for line in (CGROUP / statistics).read_text(encoding="ascii").splitlines())
            in_use = int((CGROUP / used).read_text(encoding="ascii")) - int(counts[cached])
            free = min(free, int((CGROUP / limit).read_text(encoding="ascii")) - in_use)
    return max(free, 0) // local_processes()


def local_processes() -> int:
    """Processes of the run on this host, as its launcher (accelerate's, torchrun) tells each of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def place_for(size: int, device: torch.device) -> torch.device | None:
    """Where so many bytes of decoded pictures take no more than `MEMORY_SHARE` of what is free: `device`, else the
    host, else nowhere (`None`)."""
    for place in dict.fromkeys((device, torch.device("cpu"))):
        if size <= MEMORY_SHARE * free_memory(place):
            return place
    return None


def default_workers() -> int:
    """Processes that decode pictures for one of the run's: eight, or fewer where the host has fewer cores for each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // local_processes()))
