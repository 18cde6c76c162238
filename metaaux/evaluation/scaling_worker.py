"""One of the processes of `scaling`: measures phase after phase, together with the others of its group. PyTorch's
launcher runs it as `-m metaaux.evaluation.scaling_worker ORDERS`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import record


@record
def main() -> None:
    """Does the jobs of the file ORDERS. The main process appends a line of JSON to its "figures" after each.

    Raises:
        Exception: whatever a measurement raises. The group ends with it, since the other processes may wait for this
            one in the middle of a step.
    """
    orders = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))

    # Here, so that an import that fails is told like all else.
    import torch
    from accelerate import PartialState

    from .full_size import free, measure_phase, phase_of

    for job in orders["jobs"]:
        if torch.cuda.is_available():
            # Sizes that an earlier measurement saw would be taken for ones that vary, and slower kernels made.
            torch.compiler.reset()
        config = phase_of(job["phase"]).config.model_validate(job["config"])
        figures = measure_phase(job["phase"], config, orders["steps"], orders["warmup"], orders["folder"])
        free()
        if PartialState().is_main_process:
            with open(orders["figures"], "a", encoding="utf-8") as lines:
                lines.write(json.dumps(_kept(figures)) + "\n")
    PartialState().destroy_process_group()


def _kept(figures: dict[str, Any]) -> dict[str, Any]:
    """All but what stands beside them for all numbers of processes, or can be had from `benchmark-training`."""
    return {
        name: value for name, value in figures.items() if name not in ("unit", "steps", "config", "total", "gpu_hours")
    }


if __name__ == "__main__":
    main()
