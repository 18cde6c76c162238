"""Two real processes (gloo, on the CPU) train the same parameters, however they are stopped."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.nested import nested
from tests.test_train_auxiliary import folders  # noqa: F401, a fixture
from tests.test_training_data import write_dataset
from tests.test_training_generator import DISCRIMINATOR, GENERATOR

SCRIPT = '''
import importlib, json, sys
import torch
from pathlib import Path
from safetensors.torch import save_file

torch.set_num_threads(1)

from metaaux.training.trainer import TrainingRun

part, settings, folder = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
delay, broken = float(sys.argv[4]), sys.argv[5] == "broken"
finish, advance, runs = TrainingRun.finish, TrainingRun.advance, []


def finish_and_keep(run):
    rank = run.accelerator.process_index
    tensors = {f"{m}.{k}": v.clone() for m, model in run.models.items() for k, v in model.state_dict().items()}
    save_file(tensors | {"images": torch.tensor(run.images)}, folder / f"{rank}.safetensors")
    return finish(run)


def advance_apart(run, images, figures=None):
    """One process's clock is ahead of the other's; or one process's weights change."""
    if run.accelerator.process_index == 1:
        run._started -= delay
        if broken:
            next(iter(run.models.values())).float()
            with torch.no_grad():
                next(next(iter(run.models.values())).parameters()).view(-1)[0] += 1e-3
    advance(run, images, figures)


TrainingRun.finish, TrainingRun.advance = finish_and_keep, advance_apart
if __name__ == "__main__":
    module = importlib.import_module(f"metaaux.training.{part}")
    config = getattr(module, f"{part.capitalize()}Config").model_validate(settings)
    module.train(config, folder / "run", resume="resume" in sys.argv)
'''


def launch(tmp_path: Path, part: str, settings: dict, *arguments: str, delay: float = 0.0, broken: bool = False):
    """Exit codes and standard errors of two processes that train `part`."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "script.py", part, "settings.json", ".", str(delay), "broken" if broken else "-"]
    processes = [
        subprocess.Popen(
            [*command, *arguments],
            cwd=tmp_path,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=400)[1] for process in processes]
    return [process.returncode for process in processes], errors


def check_equal(tmp_path: Path) -> int:
    """That both processes ended with the same tensors; images shown."""
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys() and len(first) > 10
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    assert differing == []
    return int(first["images"])


def generator_settings(tmp_path: Path, **changes) -> dict:
    write_dataset(tmp_path / "data.zip", count=8, size=32, yaws=[-20, -10, 0, 0, 5, 10, 15, 30])
    settings = {
        "data": {"path": "data.zip"},
        "generator": GENERATOR,
        "discriminator": DISCRIMINATOR,
        "batch": 4,
        "rays": [[0, 8]],
        "r1": {"interval": 2},
        "run": {"total_images": 16, "interval_images": 8, "timeout_minutes": 5},
    }
    return nested(settings, **changes)


@pytest.fixture
def meta_settings(folders, tiny_components, tmp_path):  # noqa: F811
    tiny_components["auxiliary"].save_pretrained(tmp_path / "initial")
    return {
        **folders,
        "phase": "meta",
        "auxiliary": {"initial": "initial"},
        "batch": 2,
        "inner": {"steps": 1, "tasks_per_pass": 1, "order": "first"},
        "optimiser": {"learning_rate": 1e-3},
        "run": {"total_images": 6, "interval_images": 4, "timeout_minutes": 5},
    }


ENDLESS = {"run__total_images": 10**6, "run__interval_images": 10**6}


class TestEqualParameters:
    def test_generator(self, tmp_path):
        codes, errors = launch(tmp_path, "generator", generator_settings(tmp_path))
        assert codes == [0, 0], errors
        assert check_equal(tmp_path) == 16
        saved = load_file(next((tmp_path / "run" / "latest" / "generator").glob("*.safetensors")))
        ended = load_file(tmp_path / "0.safetensors")
        assert all(torch.equal(ended[f"generator.{name}"], value) for name, value in saved.items())
        # Goes on with both processes' own random streams.
        codes, errors = launch(tmp_path, "generator", generator_settings(tmp_path, run__total_images=24), "resume")
        assert codes == [0, 0] and not any("no random state" in error for error in errors), errors
        assert check_equal(tmp_path) == 24

    def test_generator_stopped_by_the_clock(self, tmp_path):
        """The other process's clock runs far ahead, which neither stops the run nor moves its schedules."""
        settings = generator_settings(tmp_path, **ENDLESS, run__max_seconds=6.0, optimiser__warmup_images=10**5)
        codes, errors = launch(tmp_path, "generator", settings, delay=3.0)
        assert codes == [0, 0], errors
        assert check_equal(tmp_path) >= 64

    def test_meta(self, tmp_path, meta_settings):
        codes, errors = launch(tmp_path, "auxiliary", meta_settings)
        assert codes == [0, 0], errors
        assert check_equal(tmp_path) == 6

    def test_meta_stopped_by_the_clock(self, tmp_path, meta_settings):
        settings = nested(meta_settings, **ENDLESS, run__max_seconds=6.0)
        codes, errors = launch(tmp_path, "auxiliary", settings, delay=3.0)
        assert codes == [0, 0], errors
        assert check_equal(tmp_path) > 2


def test_replicas_that_go_apart_stop_the_run(tmp_path):
    codes, errors = launch(tmp_path, "generator", generator_settings(tmp_path), broken=True)
    assert codes == [1, 1]
    assert all("networks have gone apart" in error and "generator" in error for error in errors), errors
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_errors_of_one_process_end_both(tmp_path):
    settings = generator_settings(tmp_path)
    (tmp_path / "run" / "checkpoint-8").mkdir(parents=True)
    codes, errors = launch(tmp_path, "generator", settings)
    assert codes == [1, 1] and all("holds a run already: resume it" in error for error in errors), errors
