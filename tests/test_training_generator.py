"""The generator's trainer and the loop that all trainers share, on a tiny model."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save_file

from metaaux.cameras import camera_from_pose
from metaaux.models.discriminator import DualDiscriminator
from metaaux.models.eg3d import EG3DGenerator
from metaaux.models.feature_discriminator import FeatureDiscriminator
from metaaux.models.perceptual import squeezenet_features
from metaaux.training.generator import GeneratorConfig, GeneratorTrainer, train
from metaaux.training.grow import enlarge_discriminator, enlarge_generator, widen_discriminator, widen_generator
from metaaux.training.schedules import faded, update_average
from metaaux.training.settings import load_settings
from metaaux.training.trainer import TrainingRun
from tests import warm
from tests.test_training_data import write_dataset

GENERATOR = dict(
    z_dim=8,
    w_dim=16,
    image_size=32,
    plane_resolution=16,
    channel_base=128,
    channel_max=8,
    neural_resolution=16,
    depth_samples=4,
    importance_samples=4,
    super_resolution_kind="2X",
    super_resolution_channels=(16, 8),
    super_resolution_conv_clamp=None,
)
DISCRIMINATOR = dict(image_size=32, channel_base=128, channel_max=8, conv_clamp=None, mapping_layers=2, raw_size=16)
#: In place of two intervals of two steps one, where a checkpoint is all that counts.
SHORT = {"total_images": 8}


@pytest.fixture(autouse=True)
def few_heads(monkeypatch):
    """On sheets, which would take longer than the steps."""
    monkeypatch.setattr(GeneratorTrainer, "HEADS", 3)


def tiny_config(tmp_path, **settings):
    data = tmp_path / "data.zip"
    if not data.exists():
        write_dataset(data, count=8, size=32, yaws=[-20, -10, 0, 0, 5, 10, 15, 30])
    run = {"total_images": 16, "interval_images": 8} | settings.pop("run", {})
    settings = {"batch": 4, "rays": [[0, 8]], "r1": {"interval": 2}} | settings
    models = {"generator": GENERATOR, "discriminator": DISCRIMINATOR}
    return GeneratorConfig(data={"path": str(data)}, run=run, **models | settings)


def weights(folder):
    return EG3DGenerator.from_pretrained(folder / "generator").state_dict()


class TestRun:
    def test_writes_checkpoint_figures_and_sheet(self, tmp_path):
        checkpoint = train(tiny_config(tmp_path), tmp_path / "run")
        assert checkpoint.name == "checkpoint-16"
        lines = [json.loads(line) for line in (tmp_path / "run/figures.jsonl").read_text().splitlines()]
        assert [line["images"] for line in lines] == [8, 16]
        names = {"loss_generator", "loss_discriminator", "r1_penalty", "depth_error", "images_per_second"}
        assert names <= set(lines[0])
        assert all(torch.isfinite(torch.tensor(float(v))) for line in lines for v in line.values())
        sheets = [Image.open(path) for path in (tmp_path / "run/sheets").glob("heads-*.png")]
        # Three heads, two a line, from five sides and in depth.
        assert [sheet.size for sheet in sheets] == [(2 * 6 * 32, 2 * 32)] * 2
        DualDiscriminator.from_pretrained(checkpoint / "discriminator")

    def test_moves_both_networks(self, tmp_path):
        config = tiny_config(tmp_path)
        trainer = GeneratorTrainer(config, Accelerator())
        trainer.load_data(0)
        before = [p.clone() for m in (trainer.generator, trainer.discriminator) for p in m.parameters()]
        trainer.step(1000)
        after = [p for m in (trainer.generator, trainer.discriminator) for p in m.parameters()]
        moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert sum(moved) > 0.9 * len(moved)

    def test_resumes_where_it_stopped(self, tmp_path):
        config = tiny_config(tmp_path)
        train(config, tmp_path / "run")
        first = weights(tmp_path / "run/checkpoint-16")
        config.run.total_images = 24
        checkpoint = train(config, tmp_path / "run", resume=True)
        assert checkpoint.name == "checkpoint-24"
        state = json.loads((checkpoint / "state.json").read_text())
        assert state["images"] == 24 and state["state"]["step"] == 6
        assert any(not torch.equal(first[k], v) for k, v in weights(checkpoint).items())

    def test_optimizer_state_survives(self, tmp_path):
        config = tiny_config(tmp_path)
        train(config, tmp_path / "run")
        trainer = GeneratorTrainer(config, Accelerator())
        run = TrainingRun(
            tmp_path / "run",
            Accelerator(),
            16,
            8,
            {"generator_raw": trainer.generator},
            {"generator": trainer.optimizers["generator"]},
        )
        assert run.resume() and run.images == 16
        run.finish()
        states = trainer.optimizers["generator"].state_dict()["state"]
        assert len(states) == len(list(trainer.generator.parameters()))
        assert {float(state["step"]) for state in states.values()} == {4.0}
        for index, parameter in enumerate(trainer.generator.parameters()):
            assert states[index]["exp_avg_sq"].shape == parameter.shape

    def test_starts_from_a_published_checkpoint(self, tmp_path):
        checkpoint = train(tiny_config(tmp_path, run=SHORT), tmp_path / "run")
        config = tiny_config(tmp_path, run=SHORT, init=str(checkpoint))
        config.generator = config.discriminator = {}
        trainer = GeneratorTrainer(config, Accelerator())
        published = weights(checkpoint)
        assert all(torch.equal(published[k], v) for k, v in trainer.generator.state_dict().items())
        goes_on = train(config, tmp_path / "more")
        assert str(checkpoint) not in (goes_on / "generator" / "config.json").read_text()

    def test_second_discriminator_on_features(self, tmp_path):
        features = tmp_path / "features.safetensors"
        torch.manual_seed(0)
        save_file({f"features.{k}": v for k, v in squeezenet_features().state_dict().items()}, features)
        config = tiny_config(tmp_path, features=str(features), feature_weight=1.0)
        checkpoint = train(config, tmp_path / "run")
        line = json.loads((tmp_path / "run/figures.jsonl").read_text().splitlines()[-1])
        assert {f"feature_logits_{kind}_{i}" for kind in ("real", "fake") for i in range(3)} <= set(line)
        saved = FeatureDiscriminator.from_pretrained(checkpoint / "feature_discriminator").state_dict()
        trainer = GeneratorTrainer(config, Accelerator())
        fresh = trainer.judges["feature_discriminator"].state_dict()
        assert all(not torch.equal(saved[k], v) for k, v in fresh.items() if k.endswith("original"))
        assert not any(p.requires_grad for p in trainer.features.parameters())
        config.run.total_images = 24
        assert train(config, tmp_path / "run", resume=True).name == "checkpoint-24"

    def test_features_reach_the_generator(self, tmp_path):
        features = tmp_path / "features.safetensors"
        save_file({f"features.{k}": v for k, v in squeezenet_features().state_dict().items()}, features)
        gradients = []
        for weight in (0.0, 1.0):
            torch.manual_seed(0)
            trainer = GeneratorTrainer(
                tiny_config(tmp_path, features=str(features), feature_weight=weight), Accelerator()
            )
            trainer.load_data(0)
            trainer._prepare(0)
            cameras = trainer.sampler.sample_cameras(4)
            gradients.append(trainer.generator_pass(torch.randn(4, 8), cameras, cameras)[0])
        assert gradients[0].norm() > 0 and not torch.allclose(*gradients)

    def test_second_discriminator_goes_on_where_it_was_saved(self, tmp_path):
        features = tmp_path / "features.safetensors"
        save_file({f"features.{k}": v for k, v in squeezenet_features().state_dict().items()}, features)
        checkpoint = train(tiny_config(tmp_path, run=SHORT, features=str(features)), tmp_path / "run")
        trainer = GeneratorTrainer(tiny_config(tmp_path, features=str(features), init=str(checkpoint)), Accelerator())
        saved = FeatureDiscriminator.from_pretrained(checkpoint / "feature_discriminator").state_dict()
        goes_on = trainer.judges["feature_discriminator"].state_dict()
        assert all(torch.equal(saved[k], v) for k, v in goes_on.items() if k.endswith("original"))

    def test_second_discriminator_sees_a_part_or_all_of_it(self, tmp_path):
        trainer = GeneratorTrainer(tiny_config(tmp_path, feature_side=8), Accelerator())
        image = torch.randn(16, 3, 32, 32)
        seen = trainer._part(image)
        assert seen.shape == (16, 3, 8, 8)
        parts = image.unfold(2, 8, 1).unfold(3, 8, 1)
        copied = [(parts[i] - seen[i][:, None, None]).abs().amax((0, 3, 4)).min() < 1e-5 for i in range(16)]
        assert 0 < sum(copied) < 16
        trainer.config.feature_side = 32
        assert trainer._part(image) is image

    def test_rates_fall_and_augmentation_starts_as_asked(self, tmp_path):
        config = tiny_config(tmp_path, optimiser={"final_learning_rate": 0.5}, augmentation={"start": 0.25})
        trainer = GeneratorTrainer(config, Accelerator())
        assert trainer.augment.p == trainer.state["augmentation"] == 0.25
        rates = []
        for images in (0, 8, 16):
            trainer._prepare(images)
            rates.append(trainer.optimizers["generator"].param_groups[0]["lr"] / config.optimiser.generator_rate)
        assert rates == pytest.approx([1.0, 0.75, 0.5])

    def test_odd_batch(self, tmp_path):
        class TwoProcesses:
            num_processes, device = 2, torch.device("cpu")

        with pytest.raises(ValueError, match="not divisible by 2"):
            GeneratorTrainer(tiny_config(tmp_path, batch=5), TwoProcesses())

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
    def test_killed_run_resumes(self, tmp_path, number):
        """Killed at any moment, no more than the last interval is lost; interrupted, nothing is."""
        tiny_config(tmp_path)
        script = tmp_path / "script.py"
        script.write_text(
            "import sys\nfrom pathlib import Path\nimport torch\ntorch.set_num_threads(1)\n"
            "from tests.test_training_generator import tiny_config\nfrom metaaux.training.generator import train\n"
            "if __name__ == '__main__':\n    here = Path(sys.argv[1])\n"
            "    train(tiny_config(here, run={'total_images': 1_000_000}), here / 'run', resume=True)\n"
        )
        run = tmp_path / "run"
        process = warm.Popen([script, tmp_path], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while not list(run.glob("checkpoint-*")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 0), errors.decode()[-2000:]
        saved = max(int(p.name.split("-")[1]) for p in run.glob("checkpoint-*"))
        shown = [json.loads(line)["images"] for line in (run / "figures.jsonl").read_text().splitlines()]
        assert saved >= shown[-1] - 8
        config = tiny_config(tmp_path, run={"total_images": saved + 8})
        assert train(config, run, resume=True).name == f"checkpoint-{saved + 8}"


class TestLosses:
    def trainer(self, tmp_path):
        trainer = GeneratorTrainer(tiny_config(tmp_path), Accelerator())
        trainer.load_data(0)
        trainer._prepare(0)
        return trainer

    def test_depth_error_measures_the_distance_to_the_mean_face(self, tmp_path):
        trainer = self.trainer(tmp_path)
        camera = camera_from_pose(0.0, 0.0)[None]
        # A wall at 2.5: each vertex is off by the difference between 2.5 and its distance from (0, 0, 2.7).
        distance = (trainer.vertices - torch.tensor([0, 0, 2.7])).norm(dim=-1)
        error = trainer.depth_error(torch.full((1, 1, 16, 16), 2.5), camera)
        assert error.item() == pytest.approx((distance - 2.5).abs().mean().item(), abs=1e-5)
        assert trainer.depth_error(torch.full((1, 1, 16, 16), 2.5), camera, margin=1.0).item() == 0

    def test_r1_gradient_is_that_of_the_penalty(self, tmp_path):
        trainer = self.trainer(tmp_path)
        image, camera = trainer.sampler.next()
        flat, figures = trainer.r1_pass(image, camera)
        assert figures["r1_penalty"] > 0 and flat.abs().sum() > 0
        # A small step against the gradient lowers the penalty.
        offset = 0
        with torch.no_grad():
            for p in trainer.discriminator.parameters():
                p -= 1e-4 / flat.norm() * flat[offset : offset + p.numel()].view_as(p)
                offset += p.numel()
        assert trainer.r1_pass(image, camera)[1]["r1_penalty"] < figures["r1_penalty"]

    def test_faded(self):
        assert [faded(i, 20.0, 2.0, 100, delay=50) for i in (0, 50, 100, 150, 900)] == [20, 20, 11, 2, 2]

    def test_average_follows(self):
        model, average = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        start, target = average.weight.clone(), model.weight.clone()
        update_average(average, model, 0.75)
        assert torch.allclose(average.weight, 0.75 * start + 0.25 * target)


def test_unknown_setting_is_an_error(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "data: {path: x}\nrun: {total_images: 1, interval_images: 1}\nlerning_rate: 1\n"
    )
    with pytest.raises(ValueError, match="lerning_rate.*optimiser"):
        load_settings(GeneratorConfig, tmp_path / "config.yaml")


def test_shipped_configurations_make_the_published_networks():
    root = Path(__file__).parents[1]
    folder, published = root / "metaaux/configs", root / "hub_configs/metaaux-mini"
    assert sorted(path.name for path in folder.glob("mini/generator*.yaml")) == [
        "generator-256.yaml",
        "generator-continue.yaml",
        "generator.yaml",
    ]
    fresh = load_settings(GeneratorConfig, folder / "mini/generator.yaml")
    generator = enlarge_generator(widen_generator(EG3DGenerator(**fresh.generator)))
    discriminator = widen_discriminator(DualDiscriminator(**fresh.discriminator))
    networks = {"generator": generator, "discriminator": enlarge_discriminator(discriminator, 32)}
    for name, network in networks.items():
        config = json.loads((published / name / "config.json").read_text())
        made = json.loads(network.to_json_string())
        assert {key: config[key] for key in config if key[0] != "_" and made[key] != config[key]} == {}
    more = load_settings(GeneratorConfig, folder / "mini/generator-continue.yaml")
    assert (root / more.init).samefile(published)
    assert fresh.rays[-1][1] == more.rays[-1][1] == generator.config.neural_resolution
    load_settings(GeneratorConfig, folder / "mini/generator-256.yaml")
