"""A run's folder: refusal, order of saving and reporting, `latest`, resumption, gradients that are not finite."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from accelerate import Accelerator

from metaaux.cameras import camera_from_pose
from metaaux.models.eg3d import EG3DGenerator
from metaaux.models.encoder import LatentEncoder
from metaaux.training import distributed, loading, trainer
from metaaux.training.distributed import FlatGradients, check_replicas
from metaaux.training.generator import GeneratorConfig, GeneratorTrainer, train
from metaaux.training.loading import check_packages, find_folder, load_network
from metaaux.training.trainer import TrainingRun
from tests.conftest import TINY_ENCODER
from tests.test_training_generator import SHORT, few_heads, tiny_config, weights  # noqa: F401, one is a fixture


def lines(folder):
    return [json.loads(line) for line in (folder / "figures.jsonl").read_text().splitlines()]


class TestUsedFolder:
    def test_is_refused_and_left_as_it_is(self, tmp_path):
        train(tiny_config(tmp_path, run=SHORT), tmp_path / "run")
        before = sorted(path.relative_to(tmp_path) for path in (tmp_path / "run").rglob("*") if path.is_file())
        with pytest.raises(FileExistsError, match="resume it, or choose another folder"):
            train(tiny_config(tmp_path), tmp_path / "run")
        after = sorted(path.relative_to(tmp_path) for path in (tmp_path / "run").rglob("*") if path.is_file())
        assert after == before

    def test_checkpoints_of_others_are_not_pruned(self, tmp_path):
        run = self.run(tmp_path, {})
        for images in (99, 100, 101):
            (tmp_path / f"checkpoint-{images}").mkdir()
        assert run.active()
        for _ in range(4):
            run.advance(1)
        run.close()
        assert [path.name for path in run.checkpoints] == [f"checkpoint-{i}" for i in (3, 4, 99, 100, 101)]

    def test_a_checkpoint_of_the_same_name_is_not_replaced(self, tmp_path):
        run = self.run(tmp_path, {})
        (tmp_path / "checkpoint-1").mkdir()
        assert run.active()
        with pytest.raises(FileExistsError, match="checkpoint-1 exists"):
            run.advance(1)
        run.close()

    def run(self, folder, models, **settings):
        return TrainingRun(folder, Accelerator(), 4, 1, models, {}, **settings)


class TestInterval:
    def test_a_checkpoint_is_saved_before_anything_is_reported(self, tmp_path, monkeypatch):
        def fail(self, run):
            raise OSError("no room for the sheet")

        monkeypatch.setattr(GeneratorTrainer, "report", fail)
        with pytest.raises(OSError, match="no room"):
            train(tiny_config(tmp_path), tmp_path / "run")
        assert [path.name for path in sorted((tmp_path / "run").glob("checkpoint-*"))] == ["checkpoint-8"]
        monkeypatch.undo()
        assert train(tiny_config(tmp_path), tmp_path / "run", resume=True).name == "checkpoint-16"

    def test_missing_packages_are_named_at_the_start(self, tmp_path, monkeypatch):
        monkeypatch.setattr(loading, "get_available_trackers", lambda: [])
        with pytest.raises(ValueError, match=r"needs tensorboard: install metaaux\[train\].*run.trackers: \[\]"):
            train(tiny_config(tmp_path), tmp_path / "run")
        assert not (tmp_path / "run").exists()
        with pytest.raises(ValueError, match="needs no_such_module"):
            check_packages(["no_such_module", "json"])
        train(tiny_config(tmp_path, run=SHORT | {"trackers": []}), tmp_path / "run")
        assert not (tmp_path / "run" / "trackers").exists()

    def test_figures_go_to_tensorboard(self, tmp_path):
        train(tiny_config(tmp_path, run=SHORT), tmp_path / "run")
        assert list((tmp_path / "run" / "trackers").rglob("events.out.tfevents.*"))


class TestLatest:
    def test_leads_to_the_newest_checkpoint(self, tmp_path):
        checkpoint = train(tiny_config(tmp_path), tmp_path / "run")
        latest = tmp_path / "run" / "latest"
        assert latest.is_symlink() and latest.resolve() == checkpoint.resolve()
        moved = tmp_path / "moved"
        shutil.move(tmp_path / "run", moved)  # a relative link
        assert (moved / "latest" / "generator" / "config.json").is_file()

    def test_is_a_text_file_where_links_cannot_be_made(self, tmp_path, monkeypatch):
        def refuse(*arguments, **settings):
            raise OSError("a required privilege is not held by the client")

        monkeypatch.setattr(trainer.Path, "symlink_to", refuse)
        checkpoint = train(tiny_config(tmp_path, run=SHORT), tmp_path / "run")
        latest = tmp_path / "run" / "latest"
        assert latest.read_text() == checkpoint.name
        assert find_folder(latest / "generator") == checkpoint / "generator"
        network = load_network(EG3DGenerator, latest / "generator")
        assert all(torch.equal(weights(checkpoint)[k], v) for k, v in network.state_dict().items())
        config = tiny_config(tmp_path, init=str(latest), generator={}, discriminator={})
        GeneratorTrainer(config, Accelerator())

    def test_other_paths_stay(self, tmp_path):
        assert find_folder(tmp_path / "a" / "latest" / "b") == tmp_path / "a" / "latest" / "b"
        with pytest.raises(FileNotFoundError):
            load_network(EG3DGenerator, tmp_path / "latest" / "generator")


def test_schedules_follow_the_images_where_the_clock_ends_the_run(tmp_path, monkeypatch):
    step, rates = GeneratorTrainer.step, {}

    def step_and_look(trainer, images):
        figures = step(trainer, images)
        rates[images] = trainer.optimizers["generator"].param_groups[0]["lr"]
        return figures

    monkeypatch.setattr(GeneratorTrainer, "step", step_and_look)
    run = {"total_images": 1000, "interval_images": 1000, "max_seconds": 0.0}
    checkpoint = train(tiny_config(tmp_path, batch=2, run=run, optimiser={"warmup_images": 99}), tmp_path / "run")
    assert checkpoint.name == "checkpoint-32"  # the clock is looked at every 16 steps
    assert rates == {images: pytest.approx(0.0025 * (images + 1) / 100) for images in range(0, 32, 2)}


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_run_that_was_stopped_comes_out_as_one_that_was_not(tmp_path, in_memory):
    """Weights, optimisers, order of the photos, random codes, augmentation: to the bit, on a CPU."""
    settings = {"path": str(tmp_path / "data.zip"), "in_memory": in_memory, "workers": 0}
    config = tiny_config(tmp_path, batch=2, augmentation={"ramp_images": 25})
    config = GeneratorConfig.model_validate(config.model_dump() | {"data": settings})
    config.run.total_images = 44
    config.run.interval_images = 20
    whole = train(config, tmp_path / "whole")
    config.run.total_images = 20
    train(config, tmp_path / "parts")
    config.run.total_images = 44
    parts = train(config, tmp_path / "parts", resume=True)
    states = [json.loads((folder / "state.json").read_text()) for folder in (whole, parts)]
    assert states[0] == states[1] and len(states[0]["state"]["signs"]) == 22 - 16
    for name in ("generator", "generator_raw"):
        first, second = (EG3DGenerator.from_pretrained(folder / name).state_dict() for folder in (whole, parts))
        assert all(torch.equal(first[key], second[key]) for key in first), name
    assert [line["images"] for line in lines(tmp_path / "parts")] == [20, 40, 44]


def test_an_optimiser_comes_back_in_the_layout_of_its_parameters(tmp_path):
    """A fused one takes that for granted: on CUDA it refuses another, on a CPU it mixes numbers up."""
    torch.manual_seed(0)
    network = LatentEncoder(image_size=32, input_size=32, w_dim=16, num_ws=4, **TINY_ENCODER).to(
        memory_format=torch.channels_last
    )
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    gradients = FlatGradients(network.parameters())
    steps = torch.randn(2, gradients.buffer.numel())

    def run():
        return TrainingRun(tmp_path, Accelerator(), 2, 1, {"encoder": network}, {"encoder": optimizer})

    def step(flat):
        gradients.set(flat)
        optimizer.step()

    first = run()
    assert first.active()
    step(steps[0])
    first.advance(1)
    first.close()
    step(steps[1])
    expected = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    assert run().resume()
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].stride() == state["exp_avg_sq"].stride() == parameter.stride()
    step(steps[1])
    assert any(p.ndim == 4 and not p.is_contiguous() for p in network.parameters())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())


def test_another_number_of_processes_draws_anew(tmp_path):
    checkpoint = train(tiny_config(tmp_path, run=SHORT), tmp_path / "run")
    (state,) = (checkpoint / "random").iterdir()
    state.rename(state.with_name("00000-of-00002.safetensors"))
    config = tiny_config(tmp_path)
    with pytest.warns(UserWarning, match="no random state for process 0 of 1"):
        train(config, tmp_path / "run", resume=True)


class TestNotFinite:
    def test_is_counted_and_reported(self, tmp_path, monkeypatch):
        self.spoil(monkeypatch, steps={0, 1})
        with pytest.warns(UserWarning, match="2 gradients were not finite"):
            train(tiny_config(tmp_path), tmp_path / "run")
        assert [line.get("nonfinite_gradients") for line in lines(tmp_path / "run")] == [2, None]

    def test_ends_the_run_after_the_stated_number(self, tmp_path, monkeypatch):
        self.spoil(monkeypatch, steps=set(range(3, 100)))
        config = tiny_config(tmp_path, run={"total_images": 400, "interval_images": 8, "max_nonfinite_steps": 1})
        with pytest.raises(FloatingPointError, match="2 gradients .* not finite, at 24 images; .*checkpoint-16"):
            train(config, tmp_path / "run")
        assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-16"}

    def test_ends_the_run_within_a_long_interval(self, tmp_path, monkeypatch):
        self.spoil(monkeypatch, steps=set(range(100)))
        config = tiny_config(tmp_path, batch=2, run={"total_images": 4000, "interval_images": 4000})
        with pytest.raises(FloatingPointError, match="at 64 images; .* none"):  # looked at every 16 steps
            train(config, tmp_path / "run")

    def test_weights_that_are_not_finite_are_never_saved(self, tmp_path):
        layer = torch.nn.Linear(2, 2)
        layer.weight.data[0, 0] = float("nan")
        with pytest.raises(FloatingPointError, match="part.weight"):
            check_replicas(Accelerator(), {"part": layer})
        run = TrainingRun(tmp_path, Accelerator(), 4, 1, {"part": layer}, {})
        assert run.active()
        with pytest.raises(FloatingPointError):
            run.advance(1)
        run.close()
        assert run.checkpoints == []

    def test_the_count(self):
        layer = torch.nn.Linear(1, 1)
        gradients = FlatGradients(layer.parameters())
        for flat in ([1.0, 2.0], [float("nan"), 0.0], [float("inf"), 0.0], [3.0, 4.0]):
            gradients.set(torch.tensor(flat))
        assert gradients.nonfinite_steps == 2 and layer.weight.grad == 3

    def spoil(self, monkeypatch, steps):
        """The generator's gradients of these steps hold an infinite number."""
        original = GeneratorTrainer.generator_pass

        def spoiled(trainer, *inputs):
            flat, *rest = original(trainer, *inputs)
            if trainer.state["step"] in steps:
                flat[0] = float("inf")
            return flat, *rest

        monkeypatch.setattr(GeneratorTrainer, "generator_pass", spoiled)


def test_shading_can_be_replaced_in_one_generator_alone(tmp_path):
    first, second = (GeneratorTrainer(tiny_config(tmp_path), Accelerator()).generator for _ in range(2))
    first.shade = lambda logits, weights: torch.zeros_like(second.shade(logits, weights))
    camera, planes = camera_from_pose(0.0, 0.0)[None], torch.randn(1, 3, 32, 16, 16)
    with torch.no_grad():
        assert first.render(planes, camera, 8).features.unique().numel() == 1
        assert second.render(planes, camera, 8).features.unique().numel() > 1


def test_time_out_of_the_group_is_set(monkeypatch):
    seen = {}
    monkeypatch.setattr(distributed, "Accelerator", lambda **settings: seen.update(settings))
    distributed.start_processes(90, log_with=[])
    assert seen["kwargs_handlers"][0].timeout.total_seconds() == 5400
