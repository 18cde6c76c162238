"""Two real processes (gloo, on the CPU) train the same parameters, however they are stopped, and the same as one does
with the same global batch; and evaluate like one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import warm
from tests.conftest import TINY_ENCODER
from tests.nested import nested
from tests.test_identity import TINY as IDENTITY
from tests.test_train_auxiliary import folders  # noqa: F401, a fixture
from tests.test_training_data import write_dataset
from tests.test_training_generator import DISCRIMINATOR, GENERATOR


def launch(folder: Path, together: list[dict], alone: list[dict]) -> None:
    """Two processes (tests/processes.py), which do some jobs together and then each some others."""
    (folder / "jobs.json").write_text(json.dumps({"together": together, "alone": alone}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    with ExitStack() as stack:
        # Files, not pipes: a process that waits for its reader would keep the other one waiting too.
        logs = [stack.enter_context(open(folder / f"stderr-{rank}.txt", "wb")) for rank in range(2)]
        processes = [
            warm.Popen(
                ["-m", "tests.processes", "jobs.json", rank],
                stdout=subprocess.DEVNULL,
                stderr=logs[rank],
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=folder,
            )
            for rank in range(2)
        ]
        statuses = [process.wait(timeout=900) for process in processes]
    errors = [(folder / f"stderr-{rank}.txt").read_text(errors="replace") for rank in range(2)]
    assert statuses == [0, 0], errors


def generator_settings(tmp_path: Path, **changes) -> dict:
    write_dataset(tmp_path / "data.zip", count=8, size=32, yaws=[-20, -10, 0, 0, 5, 10, 15, 30])
    settings = {
        "data": {"path": "data.zip"},
        "generator": GENERATOR,
        "discriminator": DISCRIMINATOR,
        "batch": 4,
        "rays": [[0, 8]],
        "r1": {"interval": 2},
        "run": {"total_images": 16, "interval_images": 8, "timeout_minutes": 5, "trackers": []},
    }
    return nested(settings, **changes)


def phase_jobs(own: dict, tiny_components: dict) -> dict[str, dict]:
    """Two steps of every part that is trained, by name."""
    run = {"run__trackers": [], "run__timeout_minutes": 5}
    frozen = {
        "networks": own["networks"],
        "data": {"path": own["data"]["path"]},
        "optimiser": {"learning_rate": 1e-2},
        "batch": 4,
        "run": {"total_images": 8, "interval_images": 8},
    }
    given = ("layer_shapes", "image_size", "plane_features", "plane_resolution", "box_size")
    arguments = {k: v for k, v in tiny_components["auxiliary"].config.items() if k[0] != "_" and k not in given}
    images = {
        "networks": {name: own["networks"][name] for name in ("generator", "discriminator", "identity")},
        "data": frozen["data"],
        "encoder": {"input_size": 32, **TINY_ENCODER},
        "curriculum": {"latent_only_images": 8, "coarse_resolution": 8, "coarse_images": 8},
        "batch": {"photos": 4, "samples": 4, "rendered_samples": 2},
        "optimiser": {"learning_rate": 1e-2},
        "run": {"total_images": 16, "interval_images": 16},
    }
    plain = nested(
        frozen,
        phase="plain",
        auxiliary__arguments=arguments,
        batch=8,
        inner__calibrate_rates=0.0,
        outer__sample_fraction=0.5,
        run__total_images=16,
        run__interval_images=16,
    )
    meta = nested(
        frozen,
        phase="meta",
        auxiliary__initial="initial",
        inner={"steps": 1, "tasks_per_pass": 1, "calibrate_rates": 0.0},
    )
    identity = nested(
        {key: images[key] for key in ("data", "optimiser", "run")},
        networks={"generator": own["networks"]["generator"]},
        identity=IDENTITY,
        batch={"samples": 4, "photos": 4},
        resolution=8,
        run__total_images=32,
        run__interval_images=32,
    )
    generator = nested(
        {"data": {"path": "data.zip"}, "generator": GENERATOR, "discriminator": DISCRIMINATOR},
        batch=8,
        rays=[[0, 8]],
        r1={"interval": 2, "share": 1.0},
        pose_swap={"start": 0.0, "end": 0.0},
        augmentation__start=0.5,
        run={"total_images": 16, "interval_images": 16},
    )
    jobs = {
        "generator": {"settings": generator},
        "identity": {"settings": identity},
        "encoder": {"settings": images},
        "plain": {"part": "auxiliary", "settings": plain, "eval": True},
        "meta-first": {"part": "auxiliary", "settings": nested(meta, inner__order="first")},
        "meta-second": {"part": "auxiliary", "settings": nested(meta, inner__order="second")},
    }
    return {
        name: {"part": name, "one_batch": True, **job, "settings": nested(job["settings"], **run)}
        for name, job in jobs.items()
    }


def comparisons(number: int, phases: dict[str, dict], directions: dict, command: list[str]) -> list[dict]:
    """The jobs of what `number` processes shall do like any other number."""
    jobs = [job | {"name": f"{name}-by-{number}", "run": f"{name}-{number}"} for name, job in phases.items()]
    jobs.append({"name": "x", "run": f"directions-{number}", "part": "directions", "settings": directions})
    jobs.append({"name": "x", "command": [*command, "--out", f"evaluation-{number}"]})
    return jobs


@pytest.fixture(scope="module")
def done(folders, tiny_components, tiny_folder, face_zip, tmp_path_factory):  # noqa: F811
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
        "run": {"total_images": 6, "interval_images": 4, "timeout_minutes": 5, "trackers": []},
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
    phases = phase_jobs(folders, tiny_components)
    directions = {
        "generator": folders["networks"]["generator"],
        "sampling": {"heads": 40, "shard": 10, "batch": 10, "workers": 1},
        "components": 2,
    }
    evaluate = ["evaluate", "--data", str(face_zip), "--model", str(tiny_folder), "--steps", "1"]
    evaluate += ["--methods", "metaaux,encoder"]
    launch(
        folder,
        [{"part": "generator"} | job for job in jobs] + comparisons(2, phases, directions, evaluate),
        comparisons(1, phases, directions, evaluate),
    )
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
    assert all("no random state" not in (done / f"stderr-{rank}.txt").read_text() for rank in range(2))
    states = [load_file(done / "a" / "latest" / "random" / f"0000{rank}-of-00002.safetensors") for rank in range(2)]
    assert not torch.equal(states[0]["photos.generator"], states[1]["photos.generator"])


def test_replicas_that_go_apart_stop_the_run(done):
    assert all("RuntimeError: the processes' networks have gone apart" in error for error in errors(done / "broken"))
    assert all("w_avg" in error for error in errors(done / "broken"))
    assert not list((done / "e").glob("checkpoint-*"))


def test_an_error_of_the_main_process_reaches_the_other(done):
    assert all("FileExistsError: a holds a run already: resume it" in error for error in errors(done / "used"))


@pytest.mark.parametrize("name", ["generator", "identity", "encoder", "plain", "meta-first", "meta-second"])
def test_two_train_as_one_with_the_same_batch_does(done, name):
    """But for rounding, which now and then carries a value across a kink (a ReLU's, a ray's sampled depth's): by a
    hundredth of the way at most. With batch normalisation in eval mode, since it sees each process's own photos."""
    check_equal(done / f"{name}-by-2")
    two, one = (load_file(done / f"{name}-by-{number}" / "0.safetensors") for number in (2, 1))
    start, again = (load_file(done / f"{name}-by-{number}" / "start.safetensors") for number in (2, 1))
    assert all(torch.equal(start[key], again[key]) for key in start)
    moved = max((one[key] - start[key]).abs().max().item() for key in start if start[key].is_floating_point())
    apart = {key: (two[key] - one[key]).abs().max().item() for key in start if start[key].is_floating_point()}
    worst = max(apart, key=apart.get)
    assert moved > 1e-3 and apart[worst] < moved / 100, (moved, worst, apart[worst])


def test_two_find_the_directions_that_one_finds(done):
    two, one = (load_file(next(done.glob(f"directions-{n}/latent_directions/*.safetensors"))) for n in (2, 1))
    assert two.keys() == one.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key])
    assert len(list((done / "directions-2" / "samples").glob("*.safetensors"))) == 4


def test_two_evaluate_as_one_does(done):
    """Each half of the photos; one writes the summary of all."""
    two, one = (json.loads((done / f"evaluation-{number}" / "results.json").read_text()) for number in (2, 1))
    assert two["complete"] and two["photos"] == one["photos"] == 3
    for method, figures in one["methods"].items():
        for name in ("mse", "perceptual", "identity", "n", "failed"):
            assert two["methods"][method][name] == pytest.approx(figures[name], abs=1e-6)
    written = {path.name for path in (done / "evaluation-2" / "records").iterdir()}
    assert written == {f"{method}.{i}-of-2.jsonl" for method in one["methods"] for i in (1, 2)}
