"""`python -m metaaux benchmark --out JSON`."""

from __future__ import annotations

import enum
import os
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
    counts: Annotated[
        bool, typer.Option("--count", help="Count operations, bytes and operators (on CUDA kernels too) as well.")
    ] = False,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="On CUDA, record passes once and replay them.")
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Another revision's checkout, timed in turn with this one in processes of their own: how much faster "
            "this one is.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
) -> None:
    """Time inversion, synthesis, a cached view and a tuning step: warmed up, synchronised medians."""
    import torch

    from ..evaluation.benchmark import load_for_benchmark, run_benchmark
    from ..files import write_json

    check_file(out)
    if threads is not None:
        torch.set_num_threads(threads)
    inverter, random_weights = load_for_benchmark(model, device, getattr(torch, dtype.value))
    if cuda_graphs:
        inverter.enable_cuda_graphs()
    figures = run_benchmark(inverter, random_weights, steps=steps, repeats=repeats, warmup=warmup, counts=counts)
    if against is not None:
        from ..evaluation.paired import PairedSettings, run_paired

        model = os.path.abspath(model) if model is not None and os.path.isdir(model) else model
        settings = PairedSettings(model, str(inverter.device), dtype.value, steps, threads, cuda_graphs)
        del inverter  # the processes need its memory
        figures["against"] = {"folder": str(against), "measures": run_paired(against, settings, repeats, warmup)}
    write_json(figures, out)
    for name, measure in figures["measures"].items():
        echo(f"{name:<16} {measure['median_ms']:10.2f} ms")
    for name, pair in figures.get("against", {"measures": {}})["measures"].items():
        spread = f"{pair['speedup_min']:.2f} to {pair['speedup_max']:.2f}"
        echo(f"{name:<16} {pair['speedup']:10.2f} x as fast as the other revision ({spread})")
    if random_weights:
        echo("weights are random: times count, pictures do not")
