"""`python -m metaaux benchmark --out JSON`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from .options import DeviceOption, check_file, echo


class Precision(str, enum.Enum):
    """Precisions of generator and discriminator."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def benchmark(
    out: Annotated[Path, typer.Option("--out", metavar="JSON", help="File for the figures.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="Hub id or folder; a folder without weights gets random ones. Default: metaaux-mini."
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: Annotated[Precision, typer.Option("--dtype", help="Of generator and discriminator.")] = Precision.float32,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each measure; the median counts.")] = 10,
    warmup: Annotated[int, typer.Option(min=1, help="Runs before them.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps of an inversion.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's.")] = None,
) -> None:
    """Time inversion, synthesis, a cached view and a tuning step: warmed up, synchronised medians."""
    import torch

    from ..evaluation.benchmark import load_for_benchmark, run_benchmark
    from ..files import write_json

    check_file(out)
    if threads is not None:
        torch.set_num_threads(threads)
    inverter, random_weights = load_for_benchmark(model, device, getattr(torch, dtype.value))
    figures = run_benchmark(inverter, random_weights, steps=steps, repeats=repeats, warmup=warmup)
    write_json(figures, out)
    for name, measure in figures["measures"].items():
        echo(f"{name:<16} {measure['median_ms']:10.2f} ms")
    if random_weights:
        echo("weights are random: times count, pictures do not")
