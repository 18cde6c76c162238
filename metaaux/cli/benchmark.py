"""`python -m metaaux benchmark --out JSON`."""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import DeviceOption, check_file, echo, split_names, with_options


class WeightsPrecision(str, enum.Enum):
    """Precisions of the weights of generator and discriminator."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@dataclass
class BenchmarkOptions:
    """What `benchmark` is told."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="Hub id or folder; a folder without weights gets random ones. Default: metaaux-mini."
        ),
    ] = None
    device: DeviceOption = None
    dtype: Annotated[
        WeightsPrecision, typer.Option("--dtype", help="Of the weights of generator and discriminator.")
    ] = WeightsPrecision.float32
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            metavar="NAME[,NAME...]",
            help="As of invert. Several, such as float32,tf32,bfloat16, are timed in one run, on CUDA with and "
            "without CUDA graphs, and their results compared with float32's.",
        ),
    ] = None
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each measure; the median counts.")] = 10
    warmup: Annotated[int, typer.Option(min=1, help="Runs before them.")] = 3
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps of an inversion.")] = 5
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's.")] = None
    counts: Annotated[
        bool, typer.Option("--count", help="Count operations, bytes and operators (on CUDA kernels too) as well.")
    ] = False
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="On CUDA, record passes once and replay them.")
    ] = False
    threads_at_once: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Invert N pictures in N threads at once too, and compare with one after the other; of several "
            "precisions on CUDA, those with CUDA graphs.",
        ),
    ] = 0
    official: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Checkout of github.com/NVlabs/eg3d, whose generator of the same shape is timed too.",
            exists=True,
            file_okay=False,
        ),
    ] = None
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Another revision's checkout, timed in turn with this one in processes of their own: how much faster "
            "this one is.",
            exists=True,
            file_okay=False,
        ),
    ] = None


@with_options(BenchmarkOptions)
def benchmark(
    options: BenchmarkOptions,
    out: Annotated[Path, typer.Option("--out", metavar="JSON", help="File for the figures.")],
) -> None:
    """Time inversion, synthesis, a cached view and a tuning step: warmed up, synchronised medians."""
    import torch

    from ..devices import usable_device
    from ..evaluation.benchmark import Work, load_for_benchmark, run_benchmark
    from ..evaluation.official import official_arguments, official_code, run_official
    from ..evaluation.paired import PairedSettings, revision_folder, run_paired
    from ..evaluation.sweep import run_sweep, run_threads
    from ..files import source_name, write_json
    from ..precision import check_precision

    check_file(out)
    device, precisions = usable_device(options.device), split_names(options.precision or "") or [None]
    for name in precisions:
        check_precision(name, device)
    if options.against is not None and len(precisions) > 1:
        raise typer.BadParameter("revisions are compared in one precision", param_hint="--against")
    # What is wrong with anything given is said before the long work.
    if options.against is not None:
        revision_folder(options.against)
    if options.official is not None:
        official_code(options.official)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype.value)
    inverter, random_weights = load_for_benchmark(options.model, device, dtype, precisions[0])
    if options.cuda_graphs:
        inverter.enable_cuda_graphs()
    if options.official is not None:
        official_arguments(inverter.generator)
    repeats, warmup, at_once = options.repeats, options.warmup, options.threads_at_once
    settings = {"steps": options.steps, "repeats": repeats, "warmup": warmup, "counts": options.counts}
    if len(precisions) > 1:
        figures = run_sweep(inverter, precisions, random_weights, **settings, threads=at_once)
    else:
        work = Work(inverter, options.steps, random_weights)
        figures = run_benchmark(inverter, random_weights, **settings, work=work)
        if at_once:
            figures["threads_at_once"] = run_threads(work, at_once)
        del work
    write_json(figures, out)  # kept whatever happens to what is compared
    if options.official is not None:
        figures["official"] = run_official(options.official, inverter.generator, inverter.device, repeats, warmup)
    if options.against is not None:
        model = options.model
        model = os.path.abspath(model) if model is not None and os.path.isdir(model) else model
        paired = PairedSettings(
            model, device, options.dtype.value, options.steps, options.threads, options.cuda_graphs, precisions[0]
        )
        del inverter  # the processes need its memory
        figures["against"] = {
            "folder": source_name(options.against),
            "measures": run_paired(options.against, paired, repeats, warmup),
        }
    write_json(figures, out)
    _print(figures)


def _print(figures: dict[str, Any]) -> None:
    for entry in figures.get("configurations", [figures]):
        if "difference" in entry:
            change = entry["difference"]
            graphs = "CUDA graphs" if entry["cuda_graphs"] else "kernel by kernel"
            differences = f"image {change['image']:.1e}, loss {change['loss']:.1e} from float32"
            echo(f"{entry['precision']}, {graphs} ({differences})")
        for name, measure in entry["measures"].items():
            echo(f"{name:<16} {measure['median_ms']:10.2f} ms")
        if at_once := entry.get("threads_at_once"):
            echo(f"{at_once['threads']} threads at once: {at_once['ratio']:.2f} x one thread's inversions a second")
    if official := figures.get("official"):
        for configuration, measures in official["measures"].items():
            medians = ", ".join(f"{name} {measure['median_ms']:.2f}" for name, measure in measures.items())
            echo(f"official code, {official['operations']}, {configuration}: {medians} ms")
    for name, pair in figures.get("against", {"measures": {}})["measures"].items():
        spread = f"{pair['speedup_min']:.2f} to {pair['speedup_max']:.2f}"
        echo(f"{name:<16} {pair['speedup']:10.2f} x as fast as the other revision ({spread})")
    if figures["weights"] == "random":
        echo("weights are random: times count, pictures do not")
