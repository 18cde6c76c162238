"""`python -m metaaux benchmark --out JSON`."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Annotated

import typer


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
    device: Annotated[str | None, typer.Option("--device", help="For example cuda or cpu. Default: a GPU.")] = None,
    dtype: Annotated[Precision, typer.Option("--dtype", help="Of generator and discriminator.")] = Precision.float32,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each measure; the median counts.")] = 10,
    warmup: Annotated[int, typer.Option(min=1, help="Runs before them.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps of an inversion.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's.")] = None,
) -> None:
    """Time inversion, synthesis, a cached view and a tuning step: warmed up, synchronised medians."""
    import torch

    from ..evaluation.benchmark import load_for_benchmark, run_benchmark
    from ..files import atomic_path

    if not out.resolve().parent.is_dir():
        raise typer.BadParameter(f"the folder {out.parent} does not exist")
    if threads is not None:
        torch.set_num_threads(threads)
    inverter, random_weights = load_for_benchmark(model, device, getattr(torch, dtype.value))
    figures = run_benchmark(inverter, random_weights, steps=steps, repeats=repeats, warmup=warmup)
    with atomic_path(out) as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    for name, measure in figures["measures"].items():
        print(f"{name:<14} {measure['median_ms']:10.2f} ms")
    if random_weights:
        print("weights are random: times count, pictures do not")
