"""`python -m metaaux benchmark-training --out JSON`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import check_file, echo, split_names, with_options


@dataclass
class TrainingBenchmarkOptions:
    """What is measured of training."""

    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            metavar="FOLDER",
            help="Pipeline whose networks' shapes count; without weights it gets random ones. Default: metaaux-ffhq, "
            "the paper's.",
        ),
    ] = None
    configs: Annotated[
        Path | None,
        typer.Option(
            "--configs",
            metavar="FOLDER",
            help="The phases' NAME.yaml. Default: metaaux/configs/ffhq.",
        ),
    ] = None
    phases: Annotated[
        str,
        typer.Option(
            help="What to measure, separated by commas: names of configurations, which begin with generator, encoder, "
            "plain or meta."
        ),
    ] = "encoder,plain,meta-paper,meta-extended"
    steps: Annotated[int, typer.Option(min=1, help="Timed optimiser steps of each measurement.")] = 30
    warmup: Annotated[
        int, typer.Option(min=0, help="Steps before them; the generator takes more until all is captured.")
    ] = 5
    batch: Annotated[int | None, typer.Option(min=1, help="Photos or tasks a step. Default: the configuration's.")] = (
        None
    )
    photos: Annotated[int, typer.Option(min=1, help="Synthetic photos, shown again and again.")] = 64

    def arguments(self) -> dict[str, Any]:
        """Of `TrainingBenchmark`."""
        from .. import configs as shipped
        from ..hub.loading import embedded_model_folder

        return {
            "model": self.model or embedded_model_folder("metaaux-ffhq"),
            "configs": self.configs or Path(shipped.__file__).parent / "ffhq",
            "phases": split_names(self.phases),
            "steps": self.steps,
            "warmup": self.warmup,
            "batch": self.batch,
            "photos": self.photos,
        }


@with_options(TrainingBenchmarkOptions)
def benchmark_training(
    options: TrainingBenchmarkOptions,
    out: Annotated[
        Path,
        typer.Option("--out", metavar="JSON", help="File for the figures; phases that it has are kept or replaced."),
    ],
    allocations: Annotated[
        bool,
        typer.Option("--allocations", help="Tell what held a GPU's memory when it was fullest; makes steps slower."),
    ] = False,
) -> None:
    """Measure training: speed, memory, GPU hours of each phase, on random weights and synthetic photos.

    Uses the first GPU, without one the CPU. Exit code 1 if a phase failed; the file says why.
    """
    check_file(out)
    from ..evaluation.full_size import TrainingBenchmark, run_training_benchmark

    settings = TrainingBenchmark(**options.arguments())
    results = run_training_benchmark(settings, out, _echo_phase, allocations)
    for preset, hours in results["gpu_hours"].items():
        if hours is not None:
            echo(f"all phases, {preset:<12} {hours:10.1f} GPU hours")
    if any("error" in results["phases"][name] for name in settings.phases):
        raise typer.Exit(1)


def _echo_phase(name: str, figures: dict[str, Any]) -> None:
    if "error" in figures:
        echo(f"{name:<14} failed: {figures['error']}", error=True)
        return
    memory = figures["peak_memory"]
    echo(
        f"{name:<14} {figures['per_second']:10.3f} {figures['unit']}/s"
        + ("" if memory is None else f", {memory / 2**30:.1f} GiB")
        + f", {figures['gpu_hours']:.1f} GPU hours"
        + ("" if figures["finite"] else ", NOT FINITE")
    )
