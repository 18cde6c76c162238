"""The processes of `accelerate launch`, of any number of GPUs and nodes, share the photos of an evaluation."""

from __future__ import annotations

import os
from pathlib import Path

from accelerate import Accelerator

from ..training.distributed import check_shared_folder, start_processes

# How long those that are through wait for the slowest: PTI takes minutes a photo.
_TIMEOUT_MINUTES = 24 * 60


class EvaluationProcesses:
    """Those that were launched together; a process that was started by itself is alone.

    Args:
        folder: of the evaluation, which all of them must see.

    Attributes:
        device: this process's, such as "cuda:1"; `None` alone, where any may be chosen.
        is_main: whether this is the one that writes the summary.

    Raises:
        ValueError: in each process, where one does not see the folder.
    """

    def __init__(self, folder: str | os.PathLike):
        self._accelerator: Accelerator | None = None
        self.device, self.is_main = None, True
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            self._accelerator = start_processes(_TIMEOUT_MINUTES)
            self.device, self.is_main = str(self._accelerator.device), self._accelerator.is_main_process
            check_shared_folder(self._accelerator, Path(folder))

    def shard(self, part: tuple[int, int] = (1, 1)) -> tuple[int, int]:
        """This process's photos, as (number from 1, count), of the `part` that all of them do."""
        if self._accelerator is None:
            return part
        number, count = part
        processes = self._accelerator.num_processes
        return (number - 1) * processes + self._accelerator.process_index + 1, count * processes

    def wait(self) -> None:
        """Until each has come here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()
