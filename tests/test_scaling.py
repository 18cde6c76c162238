"""What measures how training scales, with real processes (gloo, on the CPU) at tiny size."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

from metaaux.cli import app
from metaaux.evaluation import scaling
from metaaux.evaluation.scaling import ScalingBenchmark, run_scaling_benchmark, scaling_table
from metaaux.models.discriminator import DualDiscriminator
from metaaux.models.eg3d import EG3DGenerator
from metaaux.models.perceptual import LPIPS
from metaaux.models.weights import constructor_arguments
from tests import warm
from tests.conftest import ROOT, TINY_ENCODER
from tests.test_training_generator import DISCRIMINATOR, GENERATOR

RUN = {"total_images": 1000, "interval_images": 1000, "timeout_minutes": 2, "trackers": []}
NETWORKS = {"generator": "g", "discriminator": "d", "identity": "i"}
CONFIGS = {
    "generator-tiny": {
        "data": {"path": "x", "workers": 0, "repeats": {"a": 3}, "least_sharp": {"b": -2.0}},
        "generator": GENERATOR,
        "discriminator": DISCRIMINATOR,
        "batch": 2,
        "rays": [[0, 4], [500, 8]],
        "run": RUN,
    },
    "encoder": {
        "networks": NETWORKS,
        "data": {"path": "x", "workers": 0},
        "encoder": {"input_size": 32, **TINY_ENCODER, "num_queries": 1},
        "batch": {"photos": 2, "samples": 4, "rendered_samples": 2},
        "run": RUN,
    },
    "plain": {
        "networks": NETWORKS | {"encoder": "e"},
        "data": {"path": "x", "workers": 0},
        "batch": 2,
        "run": RUN,
    },
    "meta-first": {
        "networks": NETWORKS | {"encoder": "e"},
        "phase": "meta",
        "data": {"path": "x", "workers": 0},
        "preset": "paper",
        "inner": {"steps": 1, "order": "first", "tasks_per_pass": 2},
        "batch": 2,
        "run": RUN,
    },
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for name, values in CONFIGS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return folder


class Group:
    """Processes that begin with everything imported; to `scaling` they are one, as the launcher is that it starts."""

    def __init__(self, count: int, orders: Path, errors: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
        self.returncode = None
        self.processes = [
            warm.Popen(
                ["-m", "metaaux.evaluation.scaling_worker", orders],
                stderr=subprocess.DEVNULL,
                env=os.environ
                | shared
                | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                | {"TORCHELASTIC_ERROR_FILE": str(errors) if rank == 0 else f"{errors}.{rank}"},
                cwd=ROOT,
            )
            for rank in range(count)
        ]

    def wait(self, timeout: float | None = None) -> int:
        self.returncode = max([process.wait(timeout) for process in self.processes], key=abs)
        return self.returncode

    def poll(self) -> int | None:
        return self.returncode


@pytest.fixture
def started(monkeypatch):
    """The sizes of the groups that were launched."""
    sizes = []

    def start(processes, orders, errors):
        sizes.append(processes)
        return Group(processes, orders, errors)

    monkeypatch.setattr(scaling, "launch_processes", start)
    return sizes


def settings(model, configs, **changes) -> ScalingBenchmark:
    given = {"model": model, "configs": configs, "steps": 1, "warmup": 1, "photos": 4, "processes": (1,)}
    return ScalingBenchmark(**given | changes)


def test_one_and_two_processes_weak_and_strong(tiny_folder, configs, tmp_path, started):
    out = tmp_path / "scaling.json"
    command = ["benchmark-scaling", "--model", str(tiny_folder), "--configs", str(configs), "--out", str(out)]
    command += ["--phases", "encoder", "--processes", "1,2", "--steps", "1", "--warmup", "1", "--photos", "4"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert started == [1, 2]
    results = json.loads(out.read_text())
    assert results["weights"] == "trained" and results["devices"] == 1 and results["device"] == "cpu"
    phase = results["phases"]["encoder"]
    assert phase["steps"] == 1 and phase["weak"]["1"] == phase["strong"]["1"]
    for kind, batches in (("weak", {"1": 6, "2": 12}), ("strong", {"1": 6, "2": 6})):
        assert {number: figures["batch"] for number, figures in phase[kind].items()} == batches
        for number, figures in phase[kind].items():
            assert figures["finite"] and figures["loss"][0] != figures["loss"][1]
            assert figures["per_second"] == pytest.approx(figures["batch"] / figures["seconds"])
            assert figures["speedup"] == pytest.approx(figures["per_second"] / phase["weak"]["1"]["per_second"])
            assert figures["efficiency"] == pytest.approx(figures["speedup"] / int(number))
    table = scaling_table(results)
    assert table in result.output and table.splitlines()[3].startswith("| encoder | weak | 2 | 12 images |")


def test_all_phases_of_another_generator(tiny_folder, tiny_components, configs, tmp_path, started):
    """Networks are made for it, in the configurations' shapes where these have any. A phase that fails ends its group,
    another one does the rest, and a run that is started again measures what is missing."""
    arguments = constructor_arguments(tiny_components["generator"], image_size=64, super_resolution_kind="8X")
    EG3DGenerator(**arguments).save_pretrained(tmp_path / "larger" / "generator")
    arguments = constructor_arguments(tiny_components["discriminator"], image_size=64)
    DualDiscriminator(**arguments).save_pretrained(tmp_path / "larger" / "discriminator")
    features = tmp_path / "features.safetensors"
    given = settings(
        tiny_folder,
        configs,
        phases=("meta-first", "generator-tiny", "encoder", "plain"),
        warmup=0,
        generator=tmp_path / "larger",
        overrides=[f"meta-first.outer.perceptual={features}"],
    )
    out, told = tmp_path / "scaling.json", []

    def tell(measurement, figures):
        told.append((measurement.phase, figures.get("error")))

    first = run_scaling_benchmark(given, out, tell)
    assert started == [1, 1]
    assert told == [("meta-first", told[0][1]), ("generator-tiny", None), ("encoder", None), ("plain", None)]
    assert "features.safetensors" in told[0][1]
    assert f"| failed: {told[0][1]} |" in scaling_table(first)

    save_file(LPIPS("squeeze", normalization="folded").state_dict(), features)
    second = run_scaling_benchmark(given, out, tell)
    assert started == [1, 1, 1] and told[4:] == [("meta-first", None)]
    assert (second["image_size"], second["weights"], second["generator"]) == (64, "random", "larger")
    assert [phase["unit"] for phase in second["phases"].values()] == ["tasks", "images", "images", "images"]
    assert all(phase["weak"]["1"]["finite"] for phase in second["phases"].values())
    assert second["phases"]["plain"] == first["phases"]["plain"]

    with pytest.raises(ValueError, match="holds figures of plain with another config: choose another file"):
        run_scaling_benchmark(replace(given, phases=["plain"], overrides=["plain.batch=4"]), out)


def test_the_launcher_tells_what_a_process_raised(tmp_path):
    process = scaling.launch_processes(1, tmp_path / "orders.json", tmp_path / "error.json")
    assert process.wait(timeout=300) == 1
    reason = scaling._reason(process, tmp_path / "error.json")
    assert reason.startswith("FileNotFoundError") and "orders.json" in reason


def test_a_batch_that_does_not_divide_starts_nothing(tiny_folder, configs, tmp_path, started):
    given = settings(tiny_folder, configs, phases=["encoder"], processes=(4,), scalings=["strong"])
    results = run_scaling_benchmark(given, tmp_path / "scaling.json")
    assert started == []
    assert results["phases"]["encoder"]["strong"]["4"] == {"error": "photos=2 is not divisible by 4 processes"}


def test_what_takes_too_long_is_ended(tiny_folder, configs, tmp_path, monkeypatch):
    def sleep(processes, orders, errors):
        return subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])

    monkeypatch.setattr(scaling, "launch_processes", sleep)
    given = settings(tiny_folder, configs, phases=["plain"], timeout=1.0)
    results = run_scaling_benchmark(given, tmp_path / "scaling.json")
    assert results["phases"]["plain"]["weak"]["1"] == {"error": "took longer than 1 s"}


def test_wrong_settings(tiny_folder, configs):
    for wrong, message in (({"processes": (0,)}, "at least 1"), ({"scalings": ["none"]}, "unknown scaling none")):
        with pytest.raises(ValueError, match=message):
            settings(tiny_folder, configs, **wrong)
    result = CliRunner().invoke(app, ["benchmark-scaling", "--out", "x.json", "--processes", "two"])
    assert result.exit_code == 2 and "'two' is not of the form 1,2,4" in " ".join(result.output.split())
