"""Precisions with and without CUDA graphs in one run, what they change of the result, and threads side by side."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from ..devices import synchronize
from ..pipeline import MetaAuxInverter
from ..precision import check_precision
from .benchmark import Work, random_picture, run_benchmark

#: Times that threads are compared with one.
ROUNDS = 3
#: Rounds at most in which recordings are still made; one that is refused could be tried for ever.
MOST_WARM_UPS = 10


def run_sweep(
    inverter: MetaAuxInverter,
    precisions: Sequence[str],
    random_weights: bool = False,
    steps: int = 5,
    repeats: int = 10,
    warmup: int = 3,
    counts: bool = False,
    threads: int = 0,
) -> dict[str, Any]:
    """Times a pipeline in several precisions, launched kernel by kernel and, on CUDA, by CUDA graphs too.

    Args:
        inverter: left as it was.
        precisions: names, see `precision.PRECISIONS`.
        random_weights, steps, repeats, warmup, counts: see `run_benchmark`.
        threads: inversions at once, see `run_threads`, on CUDA of the configurations with graphs; 0: none.

    Returns:
        What `run_benchmark` does of the first precision without graphs, and "configurations", a list of {"precision",
        "cuda_graphs", "measures", "difference"} and, where they were asked for, "threads_at_once". "difference" is
        from an inversion in float32 without graphs: "image", the largest of the last reconstruction's values in
        [-1, 1], and "loss", of its total loss, relative.

    Raises:
        ValueError: there is no such precision on the pipeline's device.
    """
    on_cuda, first, entries = inverter.device.type == "cuda", {}, []
    for precision in precisions:
        check_precision(precision, inverter.device)
    with _restored(inverter):
        inverter.precision = "float32"
        inverter.disable_cuda_graphs()
        work = Work(inverter, steps, random_weights)
        work.adaptation()
        reference = work.image, work.loss
        for precision, graphs in itertools.product(precisions, (False, True) if on_cuda else (False,)):
            inverter.precision = precision
            inverter.enable_cuda_graphs() if graphs else inverter.disable_cuda_graphs()
            figures = run_benchmark(inverter, random_weights, steps, repeats, warmup, counts, work)
            first = first or figures
            entry = {key: figures[key] for key in ("precision", "cuda_graphs", "measures")}
            entry["difference"] = _difference(reference, (work.image, work.loss))
            if threads and graphs == on_cuda:
                entry["threads_at_once"] = run_threads(work, threads)
            entries.append(entry)
    return first | {"configurations": entries}


def run_threads(work: Work, threads: int) -> dict[str, Any]:
    """Inverts as many different pictures as there are threads, one after the other and all at once, `ROUNDS` times in
    turn.

    Returns:
        "threads"; "one_per_second" and "all_per_second", inversions by the medians; "ratio" of the two; "difference"
        of results of all at once from those of the same pictures alone (see `run_sweep`, the largest of all pictures),
        and "difference_alone", that of two runs alone, which sums in varying order (atomics) may cause.
    """
    inverter = work.inverter
    size = inverter.generator.config.image_size
    pictures = [random_picture(size, seed).to(inverter.device) for seed in range(threads)]

    def invert(picture: torch.Tensor) -> tuple[torch.Tensor, float]:
        return work.invert(picture)[:2]

    def timed_results(run) -> tuple[list[tuple[torch.Tensor, float]], float]:
        synchronize(inverter.device)
        started = time.perf_counter()
        results = list(run(invert, pictures))
        synchronize(inverter.device)
        return results, time.perf_counter() - started

    with ThreadPoolExecutor(threads) as pool:
        first, _ = timed_results(map)
        # Until each lane has its recordings: which records what depends on who comes when.
        for _ in range(MOST_WARM_UPS):
            before = _captures(inverter)
            timed_results(pool.map)
            if _captures(inverter) == before:
                break
        rounds = [(timed_results(map), timed_results(pool.map)) for _ in range(ROUNDS)]
    (again, _), (together, _) = rounds[0]
    alone, at_once = (statistics.median(seconds for _, seconds in column) for column in zip(*rounds))
    return {
        "threads": threads,
        "one_per_second": threads / alone,
        "all_per_second": threads / at_once,
        "ratio": alone / at_once,
        "difference": _largest(first, together),
        "difference_alone": _largest(first, again),
    }


def _captures(inverter: MetaAuxInverter) -> int:
    return 0 if inverter._graphs is None else inverter._graphs.captures


@contextmanager
def _restored(inverter: MetaAuxInverter) -> Iterator[None]:
    precision, graphs = inverter.precision, inverter._graphs
    try:
        yield
    finally:
        inverter.precision = precision
        inverter.disable_cuda_graphs() if graphs is None else inverter.enable_cuda_graphs(graphs.concurrency)


def _difference(a: tuple[torch.Tensor, float], b: tuple[torch.Tensor, float]) -> dict[str, float]:
    return {"image": (a[0] - b[0]).abs().max().item(), "loss": abs(b[1] - a[1]) / abs(a[1])}


def _largest(first: list, second: list) -> dict[str, float]:
    differences = [_difference(a, b) for a, b in zip(first, second, strict=True)]
    return {name: max(difference[name] for difference in differences) for name in ("image", "loss")}
