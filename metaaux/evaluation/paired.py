"""Two revisions of this package timed in turn on one device, so that what else goes on there slows both alike."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

#: What a revision's process runs. It uses what `evaluation.benchmark` has had under these names since November 2026.
_WORKER = """
import json, sys
sys.path.insert(0, sys.argv[1])
settings, answers = json.loads(sys.argv[2]), sys.stdout
sys.stdout = sys.stderr  # answers alone go out
import torch
if settings["threads"] is not None:
    torch.set_num_threads(settings["threads"])
from metaaux.evaluation.benchmark import _Work, _seconds, load_for_benchmark
inverter, random_weights = load_for_benchmark(settings["model"], settings["device"], getattr(torch, settings["dtype"]))
if settings["cuda_graphs"] and hasattr(inverter, "enable_cuda_graphs"):
    inverter.enable_cuda_graphs()
if hasattr(inverter, "precision"):
    inverter.precision = settings["precision"]
work = _Work(inverter, settings["steps"], random_weights)
measures = ["synthesis", "adaptation", "tuning_step"] + ["cached_view"] * inverter.has_viewpoints
print(json.dumps(measures), file=answers, flush=True)
for line in sys.stdin:
    work.step_seconds.clear()
    seconds = _seconds(getattr(work, line.strip()), inverter.device)
    print(json.dumps([seconds, *work.step_seconds]), file=answers, flush=True)
"""


@dataclass(frozen=True)
class PairedSettings:
    """What both revisions do.

    Attributes:
        model: see `benchmark.load_for_benchmark`; by default each revision's own embedded checkpoint.
        device, dtype: see there; the latter by name.
        steps: gradient steps of an inversion.
        threads: CPU threads. Default: PyTorch's.
        precision: the pipeline's, of the revisions that have a choice.
        cuda_graphs: whether passes are recorded and replayed on CUDA, by the revisions that can.
    """

    model: str | None = None
    device: str | None = None
    dtype: str = "float32"
    steps: int = 5
    threads: int | None = None
    cuda_graphs: bool = False
    precision: str | None = None


class _Revision:
    """A process that times what it is asked for."""

    def __init__(self, folder: Path, settings: PairedSettings):
        self.folder = folder
        arguments = [sys.executable, "-c", _WORKER, str(folder), json.dumps(asdict(settings))]
        # Not the interpreter's usual first entry of the path: the working directory may hold the other revision.
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(arguments, **pipes, text=True, cwd=folder, env=environment)

    def answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the benchmark of {self.folder} ended with code {self.process.wait()}; see above")
        return json.loads(line)

    def measure(self, name: str) -> dict[str, float]:
        """Seconds of one run, by measure: an adaptation gives its steps' median too."""
        print(name, file=self.process.stdin, flush=True)
        seconds, *steps = self.answer()
        return {name: seconds, **({f"{name}_step": statistics.median(steps)} if steps else {})}

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def revision_folder(folder: Path) -> Path:
    """The absolute path of a checkout of this package.

    Raises:
        ValueError: the folder holds none.
    """
    folder = folder.resolve()
    if not (folder / "metaaux" / "evaluation" / "benchmark.py").is_file():
        raise ValueError(f"{folder} holds no checkout of metaaux: there is no metaaux/evaluation/benchmark.py")
    return folder


def run_paired(other: Path, settings: PairedSettings, repeats: int = 10, warmup: int = 3) -> dict[str, dict[str, Any]]:
    """Times this revision against another one, run after run in turn.

    Args:
        other: folder of the other revision's checkout, from November 2026 on.
        settings: of both.
        repeats: runs of each measure in each revision.
        warmup: runs before.

    Returns:
        {measure: {"median_ms", "other_median_ms", "speedup", "speedup_min", "speedup_max", "repeats"}}; a speed-up is
        the other revision's time over this one's, of runs that followed each other, and its median counts.

    Raises:
        ValueError: there is no revision in the folder.
        RuntimeError: a revision's process failed; its messages are on the standard error stream.
    """
    other = revision_folder(other)
    revisions: list[_Revision] = []
    try:
        for folder in (Path(__file__).resolve().parents[2], other):
            revisions.append(_Revision(folder, settings))
        measures = [revision.answer() for revision in revisions][0]
        return {
            measure: pair for name in measures for measure, pair in _compare(revisions, name, repeats, warmup).items()
        }
    finally:
        for revision in revisions:
            revision.close()


def _compare(revisions: list[_Revision], name: str, repeats: int, warmup: int) -> dict[str, dict[str, Any]]:
    runs = []
    for index in range(warmup + repeats):
        # Whoever comes second may find the machine warmer: they take turns in that too.
        order = (0, 1) if index % 2 else (1, 0)
        results = {which: revisions[which].measure(name) for which in order}
        if index >= warmup:
            runs.append(results)
    figures = {}
    for measure in runs[0][0]:
        own, other = ([run[which][measure] for run in runs] for which in (0, 1))
        ratios = [theirs / ours for ours, theirs in zip(own, other, strict=True)]
        figures[measure] = {
            "median_ms": 1000 * statistics.median(own),
            "other_median_ms": 1000 * statistics.median(other),
            "speedup": statistics.median(ratios),
            "speedup_min": min(ratios),
            "speedup_max": max(ratios),
            "repeats": repeats,
        }
    return figures
