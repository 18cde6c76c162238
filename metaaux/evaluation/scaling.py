"""How training scales: images or tasks a second of each phase on 1, 2, 4 … GPUs of one host, on random weights and
synthetic photos.

Weak scaling keeps what each process does (the configuration's batch is that of one), strong scaling what all do
together (its batch is that of all). For each number of processes a group is launched, which measures phase after
phase; one that fails ends its group, is told in its place, and another group goes on with the rest.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.launcher.api import LaunchConfig

from ..devices import best_device
from ..files import source_name, write_json
from ..hub.layout import read_json
from ..models.auxiliary import AuxiliaryNetwork
from ..models.discriminator import DualDiscriminator
from ..models.eg3d import EG3DGenerator
from ..models.encoder import LatentEncoder
from ..models.weights import constructor_arguments
from ..pipeline import MetaAuxInverter
from ..training.encoder import EncoderConfig
from ..training.loading import find_folder, load_network
from ..training.phases import GIVEN_ARGUMENTS, AuxiliaryConfig
from ..training.settings import Settings
from .benchmark import load_for_benchmark
from .full_size import (
    TrainingBenchmark,
    begin,
    phase_of,
    prepare,
    without_paths,
)

#: What is kept when processes are added: the batch of each, or that of all.
SCALINGS = ("weak", "strong")


@dataclass(frozen=True)
class ScalingBenchmark(TrainingBenchmark):
    """What is measured.

    Attributes:
        processes: numbers of processes, one a GPU, in the order in which they are measured.
        scalings: of `SCALINGS`.
        generator: folder of a generator and its discriminator in place of the model's, of another size for example;
            then the other networks are random ones that fit it.
        timeout: seconds after which a measurement, compilation included, counts as failed.

    Raises:
        ValueError: see `TrainingBenchmark`; or processes that this host has no GPUs for.
    """

    processes: Sequence[int] = (1, 2, 4)
    scalings: Sequence[str] = SCALINGS
    generator: Path | None = None
    timeout: float = 600.0

    def __post_init__(self):
        super().__post_init__()
        if not self.processes or min(self.processes) < 1:
            raise ValueError("processes must be at least 1")
        if unknown := sorted(set(self.scalings) - set(SCALINGS)):
            raise ValueError(f"unknown scaling {', '.join(unknown)}; there are {', '.join(SCALINGS)}")
        available = torch.cuda.device_count()
        if best_device() == "cuda" and max(self.processes) > available:
            raise ValueError(f"{max(self.processes)} processes need as many GPUs; this host has {available}")


@dataclass(frozen=True)
class Measurement:
    """One figure to be: a phase, on so many processes, with `config` as they all have it.

    Attributes:
        scalings: where it belongs: one process is where both begin.
    """

    phase: str
    processes: int
    scalings: tuple[str, ...]
    config: Settings


def run_scaling_benchmark(
    settings: ScalingBenchmark,
    out: str | os.PathLike,
    on_measured: Callable[[Measurement, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measures what `out` lacks. It is written after each measurement, so that a run that was cut off goes on where it
    was; what failed is tried again.

    Args:
        settings: what is measured.
        out: JSON file.
        on_measured: called with each measurement and its figures, or {"error"}.

    Returns:
        What `out` holds: the machine, and under "phases" by name {"unit", "steps", "config" (the settings of one
        process), "weak", "strong"}, the last two {number of processes: figures}. Figures are those of
        `full_size.measure_phase` from "batch" to "loss", with "speedup" over one process and "efficiency" (that
        divided by the number of processes; both `None` where one process has not been measured); or {"error"}.

    Raises:
        FileNotFoundError, OSError, ValueError: model or configurations are missing or damaged, or `out` holds the
            figures of another model, device or configuration.
    """
    out = Path(out)
    with tempfile.TemporaryDirectory(prefix="metaaux-") as temporary:
        configs, machine = _prepare(settings, Path(temporary))
        results = begin(out, machine)
        for name, config in configs.items():
            _begin_phase(out, results["phases"], name, config, settings.steps)
        write_json(results, out)
        for processes in settings.processes:
            waiting = [m for m in _measurements(settings, configs, processes) if not _is_measured(results, m)]
            for measurement in waiting:
                if reason := _refusal(measurement):
                    _record(out, measurement, {"error": reason}, on_measured)
            waiting = [measurement for measurement in waiting if not _refusal(measurement)]
            while waiting:
                waiting = _run_group(settings, waiting, out, Path(temporary), on_measured)
    return read_json(out)


def _record(
    out: Path,
    measurement: Measurement,
    figures: dict[str, Any],
    on_measured: Callable[[Measurement, dict[str, Any]], None] | None = None,
) -> None:
    """Puts a measurement's figures, or {"error"}, into `out`, and tells of them."""
    results = read_json(out)
    phase = results["phases"][measurement.phase]
    for scaling in measurement.scalings:
        phase[scaling][str(measurement.processes)] = figures
        _compare(phase[scaling])
    write_json(results, out)
    if on_measured is not None:
        on_measured(measurement, phase[measurement.scalings[0]][str(measurement.processes)])


def _compare(by_processes: dict[str, dict[str, Any]]) -> None:
    """Gives all figures of a phase their speed-up over those of one process, and their efficiency."""
    one = by_processes.get("1", {}).get("per_second")
    for processes, figures in by_processes.items():
        if "error" not in figures:
            figures["speedup"] = None if one is None else figures["per_second"] / one
            figures["efficiency"] = None if one is None else figures["speedup"] / int(processes)


def scaling_table(results: dict[str, Any]) -> str:
    """What `run_scaling_benchmark` returns as a table in Markdown: a line for each phase, scaling and number of
    processes."""
    lines = [
        "| phase | scaling | GPUs | a step | speed | speed-up | efficiency | memory of a GPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, phase in results["phases"].items():
        for scaling in SCALINGS:
            for processes, figures in sorted(phase[scaling].items(), key=lambda item: int(item[0])):
                cells = [name, scaling, processes, *_cells(figures, phase["unit"])]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(figures: dict[str, Any], unit: str) -> list[str]:
    if "error" in figures:
        return ["", f"failed: {figures['error'].replace('|', '/')}", "", "", ""]
    return [
        f"{figures['batch']} {unit}",
        f"{figures['per_second']:.3g} {unit}/s"
        if figures["per_second"] < 100
        else f"{figures['per_second']:,.0f} {unit}/s",
        "" if figures["speedup"] is None else f"{figures['speedup']:.2f}",
        "" if figures["efficiency"] is None else f"{figures['efficiency']:.0%}",
        "" if figures["peak_memory"] is None else f"{figures['peak_memory'] / 1e9:.1f} GB",
    ]


def _prepare(settings: ScalingBenchmark, folder: Path) -> tuple[dict[str, Settings], dict[str, Any]]:
    """Photos and networks in `folder`, which all processes share; each phase's settings for one process; and what is
    to be known of the machine."""
    inverter, random_weights = load_for_benchmark(str(settings.model), "cpu")
    if settings.generator is not None:
        inverter, random_weights = _with_generator(inverter, settings.generator), True
    configs, machine = prepare(settings, inverter, random_weights, folder)
    for config in configs.values():
        # Shapes that a configuration asks for are those of its run; the model's are for one that asks for none.
        if isinstance(config, EncoderConfig) and config.encoder:
            config.initial = None
        elif isinstance(config, AuxiliaryConfig) and config.auxiliary.arguments:
            config.auxiliary.initial = None
    on_gpus = best_device() == "cuda"
    machine["generator"] = None if settings.generator is None else source_name(settings.generator)
    machine["devices"] = torch.cuda.device_count() if on_gpus else 1
    machine["versions"]["cuda"] = torch.version.cuda if on_gpus else None
    machine["versions"]["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if on_gpus else None
    return configs, machine


def _with_generator(inverter: MetaAuxInverter, folder: Path) -> MetaAuxInverter:
    """Random networks like those of `inverter`, around another generator and discriminator."""
    folder = find_folder(folder)
    generator = load_network(EG3DGenerator, folder / "generator")
    given = {"image_size": generator.config.image_size, "w_dim": generator.config.w_dim, "num_ws": generator.num_ws}
    arguments = {k: v for k, v in constructor_arguments(inverter.auxiliary).items() if k not in GIVEN_ARGUMENTS}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = LatentEncoder(**constructor_arguments(inverter.encoder) | given)
        auxiliary = AuxiliaryNetwork(**AuxiliaryNetwork.config_for(generator, **arguments))
    return MetaAuxInverter(
        generator=generator,
        encoder=encoder.eval(),
        auxiliary=auxiliary.eval(),
        discriminator=load_network(DualDiscriminator, folder / "discriminator"),
        identity=inverter.identity,
        perceptual=inverter.perceptual,
    )


def _begin_phase(out: Path, phases: dict[str, Any], name: str, config: Settings, steps: int) -> None:
    begun = {"unit": phase_of(name).unit, "steps": steps, "config": without_paths(config)}
    # As it comes back from the file: without tuples, and with text for keys.
    begun = json.loads(json.dumps(begun))
    earlier = phases.setdefault(name, begun | {scaling: {} for scaling in SCALINGS})
    if changed := sorted(key for key in begun if earlier[key] != begun[key]):
        raise ValueError(f"{out} holds figures of {name} with another {', '.join(changed)}: choose another file")


def _measurements(settings: ScalingBenchmark, configs: dict[str, Settings], processes: int) -> Iterator[Measurement]:
    """All that is asked for on so many processes."""
    for scaling in SCALINGS[:1] if processes == 1 else settings.scalings:
        for name, config in configs.items():
            scalings = SCALINGS if processes == 1 else (scaling,)
            yield Measurement(name, processes, scalings, _scaled(config, processes, scaling))


def _is_measured(results: dict[str, Any], measurement: Measurement) -> bool:
    phase = results["phases"][measurement.phase]
    return "error" not in phase[measurement.scalings[0]].get(str(measurement.processes), {"error": None})


def _scaled(config: Settings, processes: int, scaling: str) -> Settings:
    """The settings of one process as those of `processes`."""
    values = config.model_dump(mode="json")
    if scaling == "weak":
        section, names = _counts(values)
        for name in names:
            section[name] *= processes
    if values.get("phase") == "meta":
        own = max(values["batch"] // processes, 1)
        values["inner"]["tasks_per_pass"] = math.gcd(values["inner"]["tasks_per_pass"], own)
    return type(config).model_validate(values)


def _counts(values: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The section of a configuration, and names in it, that count what all processes do in a step."""
    if isinstance(values["batch"], dict):
        return values["batch"], ("photos", "samples", "rendered_samples")
    return values, ("batch",)


def _refusal(measurement: Measurement) -> str | None:
    """Why so many processes cannot share the batch; `None` if they can."""
    section, names = _counts(measurement.config.model_dump(mode="json"))
    for name in names:
        if section[name] % measurement.processes:
            return f"{name}={section[name]} is not divisible by {measurement.processes} processes"
    return None


def _run_group(
    settings: ScalingBenchmark,
    waiting: list[Measurement],
    out: Path,
    folder: Path,
    on_measured: Callable[[Measurement, dict[str, Any]], None] | None,
) -> list[Measurement]:
    """Measures in one group of processes until one fails; returns what is left after that."""
    lines, errors = folder / "figures.jsonl", folder / "error.json"
    for path in (lines, errors):
        path.unlink(missing_ok=True)
    lines.touch()
    jobs = [{"phase": m.phase, "config": m.config.model_dump(mode="json")} for m in waiting]
    orders = {"jobs": jobs, "steps": settings.steps, "warmup": settings.warmup, "figures": str(lines)}
    write_json(orders | {"folder": str(folder)}, folder / "orders.json")
    process = launch_processes(waiting[0].processes, folder / "orders.json", errors)
    done, deadline, late = 0, time.monotonic() + settings.timeout, False
    try:
        while not late:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.5)
            ended = process.returncode is not None
            for line in lines.read_text(encoding="utf-8").split("\n")[done:-1]:
                _record(out, waiting[done], json.loads(line), on_measured)
                done, deadline = done + 1, time.monotonic() + settings.timeout
            if ended:
                break
            late = time.monotonic() > deadline
    finally:
        _end(process)
    if done < len(waiting):
        error = f"took longer than {settings.timeout:g} s" if late else _reason(process, errors)
        _record(out, waiting[done], {"error": error}, on_measured)
    return waiting[done + 1 :]


def launch_processes(processes: int, orders: Path, errors: Path) -> subprocess.Popen:
    """Starts `processes` of `scaling_worker` on `orders` with PyTorch's launcher, which ends all when one fails and
    leaves in `errors` what the first to fail raised."""
    on_gpus = best_device() == "cuda"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    if on_gpus and "virtual_local_rank" in LaunchConfig.__dataclass_fields__:
        # Each sees its GPU as the first one, so that they compile the same code and keep it for one another.
        command.append("--virtual-local-rank")
    command += ["-m", "metaaux.evaluation.scaling_worker", str(orders)]
    package = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH")))),
        "TORCHELASTIC_ERROR_FILE": str(errors),
        # As the launcher sets it for several processes, but not for one.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    if not on_gpus:
        environment["ACCELERATE_USE_CPU"] = "true"
    return subprocess.Popen(command, env=environment)


def _end(process: subprocess.Popen) -> None:
    """Ends a group that has not ended by itself."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _reason(process: subprocess.Popen, errors: Path) -> str:
    if errors.exists():
        message = read_json(errors)["message"]
        message = message["message"] if isinstance(message, dict) else message
        return " ".join(str(message).split())[:500]
    return f"its processes ended with code {process.returncode}; their messages are on the standard error stream"
