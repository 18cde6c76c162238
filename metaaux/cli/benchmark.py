"""`python -m metaaux benchmark --out JSON`."""

from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import DeviceOption, Precision, PrecisionOption, check_file, echo


class WeightsPrecision(str, enum.Enum):
    """Precisions of the weights of generator and discriminator."""

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
    dtype: Annotated[
        WeightsPrecision, typer.Option("--dtype", help="Of the weights of generator and discriminator.")
    ] = WeightsPrecision.float32,
    precision: PrecisionOption = Precision.float32,
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
    sweep: Annotated[
        bool,
        typer.Option("--sweep", help="Time every precision too, on CUDA with and without CUDA graphs, and compare."),
    ] = False,
    at_once: Annotated[
        int, typer.Option(min=0, metavar="N", help="Invert N pictures in N threads at once too, and compare.")
    ] = 0,
    official: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Checkout of github.com/NVlabs/eg3d, whose generator of the same shape is timed too.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
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

    from ..evaluation.benchmark import Work, load_for_benchmark, run_benchmark
    from ..files import write_json

    check_file(out)
    if threads is not None:
        torch.set_num_threads(threads)
    inverter, random_weights = load_for_benchmark(model, device, getattr(torch, dtype.value), precision.value)
    if cuda_graphs:
        inverter.enable_cuda_graphs()
    if official is not None:
        from ..evaluation.official import official_arguments, run_official

        official_arguments(inverter.generator)  # says before any work whether there is such a generator
    settings = {"steps": steps, "repeats": repeats, "warmup": warmup}
    work = Work(inverter, steps, random_weights)
    figures = run_benchmark(inverter, random_weights, **settings, counts=counts, work=work)
    if sweep or at_once:
        from ..evaluation.sweep import run_sweep, run_threads

        if at_once:
            figures["threads_at_once"] = run_threads(work, at_once)
        if sweep:
            figures["sweep"] = run_sweep(inverter, random_weights, **settings, threads=at_once)
    if official is not None:
        figures["official"] = run_official(official, inverter.generator, inverter.device, repeats, warmup)
    if against is not None:
        from ..evaluation.paired import PairedSettings, run_paired

        model = os.path.abspath(model) if model is not None and os.path.isdir(model) else model
        paired = PairedSettings(model, str(inverter.device), dtype.value, steps, threads, cuda_graphs, precision.value)
        del inverter, work  # the processes need their memory
        figures["against"] = {"folder": str(against), "measures": run_paired(against, paired, repeats, warmup)}
    write_json(figures, out)
    _print(figures)


def _print(figures: dict[str, Any]) -> None:
    for name, measure in figures["measures"].items():
        echo(f"{name:<16} {measure['median_ms']:10.2f} ms")
    for entry in figures.get("sweep", []):
        medians = ", ".join(f"{name} {measure['median_ms']:.2f}" for name, measure in entry["measures"].items())
        graphs = "CUDA graphs" if entry["cuda_graphs"] else "kernel by kernel"
        change = entry["difference"]
        echo(f"{entry['precision']}, {graphs}: {medians} ms; image ±{change['image']:.1e}, loss {change['loss']:.1e}")
    if threads := figures.get("threads_at_once"):
        echo(f"{threads['threads']} threads at once: {threads['ratio']:.2f} x one thread's inversions a second")
    if official := figures.get("official"):
        for configuration, measures in official["measures"].items():
            medians = ", ".join(f"{name} {measure['median_ms']:.2f}" for name, measure in measures.items())
            echo(f"official code, {official['operations']}, {configuration}: {medians} ms")
    for name, pair in figures.get("against", {"measures": {}})["measures"].items():
        spread = f"{pair['speedup_min']:.2f} to {pair['speedup_max']:.2f}"
        echo(f"{name:<16} {pair['speedup']:10.2f} x as fast as the other revision ({spread})")
    if figures["weights"] == "random":
        echo("weights are random: times count, pictures do not")
