"""`python -m metaaux benchmark-scaling --out JSON`."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .benchmark_training import TrainingBenchmarkOptions
from .options import check_file, echo, split_names, with_options

if TYPE_CHECKING:
    from ..evaluation.scaling import Measurement, ScalingBenchmark


@dataclass
class ScalingOptions(TrainingBenchmarkOptions):
    """What `benchmark-scaling` is told."""

    generator: Annotated[
        Path | None,
        typer.Option(
            "--generator",
            metavar="FOLDER",
            help="Generator and discriminator in place of the model's, such as a run's latest or what grow made; the "
            "other networks are random ones that fit them.",
        ),
    ] = None
    processes: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Numbers of processes, one a GPU, in the order in which they are measured. Default: 1, 2, 4 … up to "
            "all GPUs.",
        ),
    ] = None
    scaling: Annotated[
        str,
        typer.Option(help="weak: the batch is that of each process; strong: that of all together; or both."),
    ] = "weak,strong"
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PHASE.KEY=VALUE",
            help="Value in place of a configuration's, for example plain.batch=32; may be repeated.",
        ),
    ] = None
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds after which a measurement counts as failed, compilation included.")
    ] = 600

    def numbers(self) -> list[int]:
        """`--processes`, or 1, 2, 4 … up to all GPUs."""
        import torch

        if self.processes is None:
            return [2**i for i in range(max(torch.cuda.device_count(), 1).bit_length())]
        if not all(word.isdecimal() for word in split_names(self.processes)):
            raise typer.BadParameter(f"{self.processes!r} is not of the form 1,2,4", param_hint="--processes")
        return [int(word) for word in split_names(self.processes)]

    def settings(self) -> ScalingBenchmark:
        """What is measured.

        Raises:
            ValueError: as `ScalingBenchmark`.
        """
        from ..evaluation.scaling import ScalingBenchmark

        return ScalingBenchmark(
            **self.arguments(),
            overrides=self.overrides or (),
            processes=self.numbers(),
            scalings=split_names(self.scaling),
            generator=self.generator,
            timeout=self.timeout,
        )


@with_options(ScalingOptions)
def benchmark_scaling(
    options: ScalingOptions,
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="JSON", help="File for the figures; what it lacks is measured, or failed before."
        ),
    ],
) -> None:
    """Measure how training scales with the GPUs of this host: speed, speed-up, efficiency, memory of each phase.

    On random weights and synthetic photos; on a CPU, processes share it. Run again with the same --out, it measures
    what is missing. Exit code 1 if a phase failed; the file says why.
    """
    check_file(out)
    from ..evaluation.scaling import run_scaling_benchmark, scaling_table

    settings = options.settings()
    failed = False

    def tell(measurement: Measurement, figures: dict[str, Any]) -> None:
        nonlocal failed
        failed = failed or "error" in figures
        _echo_figures(measurement, figures)

    # Whoever ends this command means the processes too that it has launched, which hold the GPUs.
    earlier = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        results = run_scaling_benchmark(settings, out, tell)
    finally:
        signal.signal(signal.SIGTERM, earlier)
    echo(scaling_table(results))
    if failed:
        raise typer.Exit(1)


def _echo_figures(measurement: Measurement, figures: dict[str, Any]) -> None:
    which = f"{measurement.phase} on {measurement.processes}, {' and '.join(measurement.scalings)}:"
    if "error" in figures:
        echo(f"{which} failed: {figures['error']}", error=True)
        return
    speedup = "" if figures["speedup"] is None else f", {figures['speedup']:.2f} times one process"
    echo(f"{which} {figures['per_second']:.3f}/s{speedup}{'' if figures['finite'] else ', NOT FINITE'}", error=True)
