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

SCRIPT = """
import importlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from metaaux.training.trainer import TrainingRun

torch.set_num_threads(1)
finish, advance, job, folder = TrainingRun.finish, TrainingRun.advance, {}, Path()


def finish_and_keep(run):
    tensors = {f"{m}.{k}": v.clone() for m, model in run.models.items() for k, v in model.state_dict().items()}
    save_file(tensors | {"images": torch.tensor(run.images)}, folder / f"{run.accelerator.process_index}.safetensors")
    return finish(run)


def advance_apart(run, images, figures=None):
    rank = run.accelerator.process_index
    run._started -= job.get("hurry", [0, 0])[rank]  # each process's clock runs ahead in its own way
    if job.get("broken") and rank == 1:
        with torch.no_grad():
            run.models["generator"].w_avg[0] += 1e-3
    advance(run, images, figures)


TrainingRun.finish, TrainingRun.advance = finish_and_keep, advance_apart
if __name__ == "__main__":
    rank = int(sys.argv[2])
    for job in json.loads(Path(sys.argv[1]).read_text()):
        folder = Path(job["name"])
        folder.mkdir(exist_ok=True)
        module = importlib.import_module(f"metaaux.training.{job['part']}")
        config = getattr(module, f"{job['part'].capitalize()}Config").model_validate(job["settings"])
        try:
            module.train(config, job["run"], resume=job.get("resume", False))
        except (OSError, RuntimeError) as error:
            (folder / f"{rank}.error").write_text(f"{type(error).__name__}: {error}")
"""


def launch(folder: Path, jobs: list[dict]) -> None:
    """Two processes, each of which does the jobs one after another."""
    (folder / "script.py").write_text(SCRIPT)
    (folder / "jobs.json").write_text(json.dumps(jobs))
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
    processes = [
        subprocess.Popen(
            [sys.executable, "script.py", "jobs.json", str(rank)],
            cwd=folder,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=900)[1] for process in processes]
    (folder / "stderr.txt").write_text("\n".join(errors))
    assert [process.returncode for process in processes] == [0, 0], errors


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


@pytest.fixture(scope="module")
def done(folders, tiny_components, tmp_path_factory):  # noqa: F811
    """A folder with what two processes left of all jobs: launched once, since importing takes longest."""
    folder = tmp_path_factory.mktemp("processes")
    tiny_components["auxiliary"].save_pretrained(folder / "initial")
    generator = generator_settings(folder)
    meta = {
        **folders,
        "phase": "meta",
        "auxiliary": {"initial": "initial"},
        "batch": 2,
        "inner": {"steps": 1, "tasks_per_pass": 1, "order": "first"},
        "optimiser": {"learning_rate": 1e-3},
        "run": {"total_images": 6, "interval_images": 4, "timeout_minutes": 5},
    }
    endless = {"run__total_images": 10**6, "run__interval_images": 10**6, "run__max_seconds": 1000.0}
    hurry = {"hurry": [300, 10_000]}
    jobs = [
        {"name": "generator", "run": "a", "settings": generator},
        {"name": "resumed", "run": "a", "resume": True, "settings": nested(generator, run__total_images=24)},
        {"name": "used", "run": "a", "settings": generator},
        {
            "name": "clock",
            "run": "b",
            "settings": nested(generator, **endless, optimiser__warmup_images=10**5),
            **hurry,
        },
        {"name": "meta", "run": "c", "part": "auxiliary", "settings": meta},
        {"name": "meta-clock", "run": "d", "part": "auxiliary", "settings": nested(meta, **endless), **hurry},
        {"name": "broken", "run": "e", "settings": generator, "broken": True},
    ]
    launch(folder, [{"part": "generator"} | job for job in jobs])
    return folder


def check_equal(folder: Path) -> int:
    """That both processes ended with the same tensors; images shown."""
    assert not list(folder.glob("*.error")), [path.read_text() for path in folder.glob("*.error")]
    first, second = (load_file(folder / f"{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys() and len(first) > 10
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    return int(first["images"])


def errors(folder: Path) -> list[str]:
    return [(folder / f"{rank}.error").read_text() for rank in range(2)]


@pytest.mark.parametrize(("name", "images"), [("generator", 16), ("resumed", 24), ("meta", 6)])
def test_both_train_the_same_parameters(done, name, images):
    assert check_equal(done / name) == images


@pytest.mark.parametrize(("name", "images"), [("clock", 64), ("meta-clock", 8)])
def test_the_main_process_decides_when_time_is_up(done, name, images):
    """After four steps, or at the next look; the other one's clock is further, but neither stops the run nor moves its
    schedules."""
    assert check_equal(done / name) == images


def test_each_goes_on_with_its_own_random_stream(done):
    assert "no random state" not in (done / "stderr.txt").read_text()
    states = [load_file(done / "a" / "latest" / "random" / f"0000{rank}-of-00002.safetensors") for rank in range(2)]
    assert not torch.equal(states[0]["photos.generator"], states[1]["photos.generator"])


def test_replicas_that_go_apart_stop_the_run(done):
    assert all("RuntimeError: the processes' networks have gone apart" in error for error in errors(done / "broken"))
    assert all("w_avg" in error for error in errors(done / "broken"))
    assert not list((done / "e").glob("checkpoint-*"))


def test_an_error_of_the_main_process_reaches_the_other(done):
    assert all("FileExistsError: a holds a run already: resume it" in error for error in errors(done / "used"))
