"""LatentEncoder: shapes, the average face at the start, batch independence, errors, files."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import metaaux
from metaaux.cameras import camera_from_pose
from metaaux.data.dataset import FaceDataset, to_signed
from metaaux.models.eg3d import EG3DGenerator
from metaaux.models.encoder import LatentEncoder
from metaaux.models.psp import PSPEncoder
from metaaux.models.recogniser import SAME_PERSON, FaceRecogniser
from metaaux.tasks import encode
from metaaux.training.encoder import (
    ARCHITECTURES,
    EncoderConfig,
    EncoderEvaluation,
    EncoderTrainer,
    LatentDistribution,
    latent_error,
    train,
)
from metaaux.training.schedules import learning_rate_factor
from metaaux.training.settings import ScheduleSettings, load_settings
from tests.nested import nested

CONFIGS = Path(metaaux.__file__).parent / "configs"

TINY = {
    "image_size": 32,
    "input_size": 32,
    "w_dim": 24,
    "num_ws": 5,
    "num_queries": 5,
    "widths": (16, 16, 32, 32),
    "depths": (1, 1, 1, 1),
    "width": 32,
    "num_blocks": 1,
    "num_heads": 2,
}


def tiny_encoder(trained: bool = True, **changes) -> LatentEncoder:
    torch.manual_seed(0)
    encoder = LatentEncoder(**TINY | changes)
    if trained:
        torch.nn.init.normal_(encoder.to_offset.weight, std=0.1)
    return encoder.eval()


def images(batch: int = 3, size: int = 32) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


class TestModel:
    def test_shapes(self):
        assert tiny_encoder()(images()).shape == (3, 24)
        assert tiny_encoder(space="w+")(images()).shape == (3, 5, 24)

    def test_untrained_encoder_gives_the_average_face(self):
        encoder = tiny_encoder(trained=False)
        w_avg = torch.linspace(-1, 1, 24)
        encoder.set_latent_statistics(w_avg, torch.full((24,), 0.5))
        assert torch.equal(encoder(images()), w_avg.expand(3, -1))

    def test_offsets_scale_with_the_standard_deviation(self):
        encoder = tiny_encoder()
        plain = encoder(images())
        encoder.set_latent_statistics(torch.ones(24), torch.full((24,), 0.5))
        torch.testing.assert_close(encoder(images()), 1 + 0.5 * plain)

    def test_an_image_is_encoded_alike_in_any_batch_and_mode(self):
        encoder = tiny_encoder()
        together = encoder(images())
        torch.testing.assert_close(encoder(images()[1:2]), together[1:2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(encoder.train()(images()), together)

    def test_images_are_told_apart_by_place(self):
        """A face's left and right differ: mirroring changes the code."""
        encoder = tiny_encoder()
        assert (encoder(images()) - encoder(images().flip(-1))).abs().max() > 1e-3

    @pytest.mark.parametrize("space", ["w", "w+"])
    def test_every_parameter_gets_a_gradient(self, space):
        encoder = tiny_encoder(space=space)
        encoder(images()).square().sum().backward()
        assert [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []

    def test_other_image_sizes_are_resized(self):
        encoder = tiny_encoder(image_size=64)
        large = images(size=64)
        small = torch.nn.functional.interpolate(large, size=(32, 32), mode="bilinear", antialias=True)
        torch.testing.assert_close(encoder(large), tiny_encoder()(small))

    def test_bfloat16_autocast_answers_in_float32(self):
        encoder = tiny_encoder()
        with torch.autocast("cpu", torch.bfloat16):
            w = encoder(images())
        assert w.dtype == torch.float32
        torch.testing.assert_close(w, encoder(images()), rtol=0.1, atol=0.05)

    def test_mini_size(self):
        config = load_settings(EncoderConfig, CONFIGS / "mini" / "encoder.yaml")
        encoder = LatentEncoder(image_size=128, w_dim=512, num_ws=14, **config.encoder)
        assert sum(p.numel() for p in encoder.parameters()) <= 2_500_000

    @pytest.mark.parametrize("name", ["psp", "styletransformer"])
    def test_baselines(self, name):
        config = load_settings(EncoderConfig, CONFIGS / "baselines" / f"{name}.yaml")
        encoder = ARCHITECTURES[name](image_size=128, w_dim=256, num_ws=12, **config.encoder)
        assert config.architecture == name and encoder.latent_space == "w+"
        told = torch.randn(1, encoder.identity_size) if encoder.identity_size else None
        assert encoder(images(1, 128), told).shape == (1, 12, 256)

    def test_save_and_load(self, tmp_path):
        encoder = tiny_encoder()
        encoder.set_latent_statistics(torch.rand(24), torch.rand(24))
        encoder.save_pretrained(tmp_path)
        loaded = LatentEncoder.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(images()), encoder(images()))

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"space": "z"}, "space 'z'"),
            ({"space": "w+", "num_queries": 4}, "num_queries=4"),
            ({"input_size": 40}, "multiple of 16"),
            ({"num_heads": 3}, "divisible"),
            ({"widths": (16, 16, 16)}, "four stages"),
        ],
    )
    def test_sizes_that_do_not_fit(self, change, message):
        with pytest.raises(ValueError, match=message):
            tiny_encoder(**change)

    @pytest.mark.parametrize("space, num_queries", [("w", 3), ("w+", 5)])
    def test_embeddings_tell_it_the_person(self, space, num_queries, tmp_path):
        encoder = tiny_encoder(space=space, num_queries=num_queries, identity_size=6)
        one, other = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
        w = encoder(images(), one)
        assert w.shape == tiny_encoder(space=space, num_queries=num_queries)(images()).shape
        assert (w - encoder(images(), other)).abs().amax(-1).min() > 1e-3
        torch.testing.assert_close(encoder(images(), 7 * one), w, rtol=1e-3, atol=1e-3)  # of any network's length
        w.square().sum().backward()
        assert encoder.to_queries.weight.grad.abs().sum() > 0
        encoder.save_pretrained(tmp_path)
        torch.testing.assert_close(LatentEncoder.from_pretrained(tmp_path)(images(), one), w)
        for given, length in ((None, 0), (one[:, :5], 5)):
            with pytest.raises(ValueError, match=f"embeddings of length 6, got {length}"):
                encoder(images(), given)
        with pytest.raises(ValueError, match="embeddings of length 0, got 6"):
            tiny_encoder()(images(), one)
        with pytest.raises(ValueError, match="needs the identity network"):
            encode(encoder, None, images(), torch.zeros(3, 25))

    def test_wrong_inputs(self):
        encoder = tiny_encoder()
        with pytest.raises(ValueError, match=r"\[B, 3, 32, 32\], got \[3, 3, 48, 48\]"):
            encoder(images(size=48))
        with pytest.raises(ValueError, match="w_std"):
            encoder.set_latent_statistics(torch.zeros(24), torch.zeros(1))


@pytest.fixture(scope="module")
def training_settings(tiny_components, tmp_path_factory) -> dict:
    """Settings of a run of seconds: a tiny generator with its discriminator, a zip of eight of its pictures."""
    folder = tmp_path_factory.mktemp("encoder-training")
    generator = tiny_components["generator"]
    for name in ("generator", "discriminator", "identity"):
        tiny_components[name].save_pretrained(folder / name)
    random = torch.Generator().manual_seed(0)
    yaw, pitch = (torch.rand(2, 8, generator=random) * 2 - 1) * 15
    cameras = camera_from_pose(yaw, pitch)
    z = torch.randn(8, generator.config.z_dim, generator=random)
    with torch.no_grad():
        pictures = generator(z, cameras).image.clamp(-1, 1)
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        for i, picture in enumerate(pictures):
            data = io.BytesIO()
            Image.fromarray(((picture.permute(1, 2, 0) + 1) * 127.5).byte().numpy()).save(data, "PNG")
            archive.writestr(f"{i}.png", data.getvalue())
        labels = [[f"{i}.png", camera.tolist()] for i, camera in enumerate(cameras)]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    settings = {
        "data": {"path": str(folder / "data.zip")},
        "networks": {name: str(folder / name) for name in ("generator", "discriminator", "identity")},
        "encoder": {key: value for key, value in TINY.items() if key not in ("image_size", "w_dim", "num_ws")},
        "curriculum": {"latent_only_images": 0, "coarse_resolution": 8, "coarse_images": 80},
        "batch": {"photos": 4, "samples": 4, "rendered_samples": 2},
        "optimiser": {"learning_rate": 3e-3, "warmup_images": 8, "weight_decay": 0.01},
        "loss": {"latent": 1.0},
        "run": {"total_images": 16, "interval_images": 16},
    }
    settings["encoder"]["num_queries"] = 2
    return settings


def figures(folder: Path) -> list[dict]:
    """The lines of a run's figures.jsonl."""
    return [json.loads(line) for line in (folder / "figures.jsonl").read_text().splitlines()]


class TestPSP:
    def tiny(self, **changes):
        torch.manual_seed(0)
        sizes = {key: TINY[key] for key in ("image_size", "input_size", "w_dim", "widths", "depths", "width")}
        return PSPEncoder(**sizes | {"num_ws": 9} | changes)

    def test_untrained_encoder_gives_the_average_face_in_every_layer(self):
        encoder = self.tiny()
        encoder.set_latent_statistics(torch.linspace(-1, 1, 24), torch.ones(24))
        assert torch.equal(encoder(images()), torch.linspace(-1, 1, 24).expand(3, 9, -1))

    def test_layers_read_the_pyramid_as_in_the_paper(self):
        assert self.tiny().levels == [0, 0, 0, 1, 1, 1, 1, 2, 2]

    def test_every_parameter_gets_a_gradient(self):
        encoder = self.tiny()
        for head in encoder.heads:
            torch.nn.init.normal_(head.to_offset.weight)
        encoder(images()).square().sum().backward()
        assert [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []

    def test_sizes_that_do_not_fit(self):
        with pytest.raises(ValueError, match="four stages"):
            self.tiny(widths=(16, 16))


def tiny_recogniser() -> FaceRecogniser:
    """With embeddings of length 5."""
    torch.manual_seed(0)
    return FaceRecogniser(widths=(4, 6, 8), depths=(1, 1, 1), embedding_dim=5).eval()


def held_out(settings) -> tuple[EG3DGenerator, torch.Tensor, torch.Tensor]:
    """A run's generator, and the photos and cameras of its data."""
    generator = EG3DGenerator.from_pretrained(settings["networks"]["generator"])
    dataset = FaceDataset(settings["data"]["path"], generator.config.image_size, mirrored_copies=False)
    return generator, to_signed(dataset.load()), dataset.cameras


class TestTraining:
    @pytest.fixture(autouse=True)
    def few_samples(self, monkeypatch):
        """Held out: to render and encode the usual 64 would take as long as the steps."""
        monkeypatch.setattr(EncoderEvaluation, "SAMPLES", 8)

    def test_the_losses_fall(self, training_settings, tmp_path):
        config = EncoderConfig(
            **nested(
                training_settings,
                run__total_images=240,
                run__interval_images=80,
                curriculum__latent_only_images=80,
            )
        )
        checkpoint = train(config, tmp_path)
        assert checkpoint == tmp_path / "checkpoint-240"
        lines = figures(tmp_path)
        means = [line for line in lines if "loss" in line]
        held_out = [line for line in lines if "val/total" in line]
        assert [line["images"] for line in held_out] == [80, 160, 240]
        assert "mse" not in means[0] and {"mse", "perceptual", "identity", "latent", "mahalanobis"} <= set(means[1])
        assert held_out[-1]["val/total"] < 0.7 * held_out[0]["val/total"]
        assert all(0 < line["val/latent"] < 1.2 for line in held_out)
        size = EG3DGenerator.from_pretrained(config.networks.generator).config.image_size
        assert Image.open(tmp_path / "sheets" / "encoder-000000240.png").size == (8 * size, 3 * size)
        encoder = LatentEncoder.from_pretrained(checkpoint / "encoder")
        assert encoder(images(2, size)).shape == (2, encoder.config.w_dim)
        assert encoder.w_std.min() > 0

    def test_held_out_figures_are_the_saved_encoders_distances_by_the_recogniser(self, training_settings, tmp_path):
        recogniser = tiny_recogniser()
        torch.nn.init.normal_(recogniser.fc.weight, std=3.6)  # so that distances lie on both sides of the limit
        recogniser.save_pretrained(tmp_path / "recogniser")
        settings = nested(training_settings, networks__identity=str(tmp_path / "recogniser"))
        checkpoint = train(EncoderConfig(**settings), tmp_path / "run")
        encoder = LatentEncoder.from_pretrained(checkpoint / "encoder")
        generator, photos, cameras = held_out(settings)
        with torch.no_grad():
            pictures = generator.synthesize(encoder(photos), cameras).image
            distances = recogniser.distance(recogniser(pictures, cameras), recogniser(photos, cameras))
        last = figures(tmp_path / "run")[-1]
        assert last["val/distance"] == pytest.approx(distances.mean().item(), rel=1e-3)
        assert last["val/same_person"] == pytest.approx((distances < SAME_PERSON).float().mean().item())
        assert 0 < last["val/same_person"] < 1

    def test_with_embeddings(self, training_settings, tmp_path):
        """In training and held out each picture is told with its own camera."""
        recogniser = tiny_recogniser()
        recogniser.save_pretrained(tmp_path / "recogniser")
        settings = nested(training_settings, networks__identity=str(tmp_path / "recogniser"))
        settings["encoder"] = settings["encoder"] | {"identity_size": 5}
        checkpoint = train(EncoderConfig(**settings), tmp_path / "run")
        encoder = LatentEncoder.from_pretrained(checkpoint / "encoder")
        generator, photos, cameras = held_out(settings)
        with torch.no_grad():
            pictures = generator.synthesize(encode(encoder, recogniser, photos, cameras), cameras).image
        error = (pictures - photos).square().mean().item()
        assert figures(tmp_path / "run")[-1]["val/mse"] == pytest.approx(error, rel=1e-3)
        settings["encoder"] = settings["encoder"] | {"identity_size": 6}
        with pytest.raises(ValueError, match="length 6, got 5"):
            train(EncoderConfig(**settings), tmp_path / "other")

    def test_latent_codes_are_learnt_from_samples(self, training_settings):
        config = EncoderConfig(
            **nested(training_settings, curriculum__latent_only_images=10**6, run__total_images=600_000)
        )
        trainer = EncoderTrainer(config, Accelerator(cpu=True))
        trainer.load_data(0)
        errors = []
        for images in range(80, 280, 8):
            torch.manual_seed(0)  # the same heads at each step
            trainer.sampler.generator.manual_seed(0)
            errors.append(trainer.step(images)["latent"].item())
        assert errors[-1] < 0.5 * errors[0]

    def test_micro_batches_and_groups_of_rays_have_the_gradient_of_the_whole_batch(self, training_settings):
        config = EncoderConfig(**nested(training_settings, compute__graphs=False))
        trainer = EncoderTrainer(config, Accelerator(cpu=True))
        trainer.load_data(0)
        inputs = (*(trainer.sampler.sample_cameras(4) for _ in range(2)), *trainer.sampler.next())

        def gradient():
            torch.manual_seed(0)  # the same heads
            return trainer.mixed_pass(None, *inputs)

        expected, expected_figures = gradient()
        config.compute.micro_batch, trainer.generator.rays_at_once = 4, 24  # 4 and 2 of 6 pictures
        actual, actual_figures = gradient()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
        for name, value in expected_figures.items():
            torch.testing.assert_close(actual_figures[name], value, rtol=1e-4, atol=1e-5)

    def test_a_stopped_run_is_resumed(self, training_settings, tmp_path):
        train(EncoderConfig(**nested(training_settings, run__total_images=32)), tmp_path)
        first = LatentEncoder.from_pretrained(tmp_path / "checkpoint-32" / "encoder_raw")
        train(EncoderConfig(**nested(training_settings, run__total_images=48)), tmp_path, resume=True)
        assert [line["images"] for line in figures(tmp_path) if "loss" in line] == [16, 32, 48]
        second = LatentEncoder.from_pretrained(tmp_path / "checkpoint-48" / "encoder_raw")
        moved = (first.to_offset.weight - second.to_offset.weight).abs().max()
        # Two steps from where it stopped: further than none, not as far as a new start would be.
        assert 0 < moved < 2.5 * 3e-3

    def test_starts_from_another_run(self, training_settings, tmp_path):
        first = train(EncoderConfig(**nested(training_settings, run__total_images=32)), tmp_path / "first")
        settings = nested(training_settings, initial=str(first / "encoder"), optimiser__learning_rate=0.0)
        second = train(EncoderConfig(**settings), tmp_path / "second")
        before, after = (LatentEncoder.from_pretrained(folder / "encoder") for folder in (first, second))
        assert all(a.equal(b) for a, b in zip(before.parameters(), after.parameters(), strict=True))

    def test_max_seconds_stops_with_a_checkpoint(self, training_settings, tmp_path):
        run = {"total_images": 10**6, "interval_images": 10**6, "max_seconds": 0.0}
        checkpoint = train(EncoderConfig(**nested(training_settings, run=run)), tmp_path)
        assert checkpoint.name == "checkpoint-128"  # the clock is looked at every 16 steps
        assert "val/mse" in figures(tmp_path)[-1]

    @pytest.mark.parametrize("architecture", ["styletransformer", "psp"])
    def test_wplus(self, training_settings, tmp_path, tiny_components, architecture):
        generator = tiny_components["generator"]
        num_ws, size = generator.num_ws, generator.config.image_size
        settings = nested(training_settings)
        if architecture == "psp":
            sizes = {key: settings["encoder"][key] for key in ("input_size", "widths", "depths", "width")}
            settings |= {"architecture": "psp", "encoder": sizes}
        else:
            settings["encoder"] = settings["encoder"] | {"space": "w+", "num_queries": num_ws}
        checkpoint = train(EncoderConfig(**settings), tmp_path)
        encoder = ARCHITECTURES[architecture].from_pretrained(checkpoint / "encoder")
        assert encoder(images(1, size)).shape[:2] == (1, num_ws)

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"networks__discriminator": None}, "loss.perceptual needs"),
            ({"batch__rendered_samples": 5}, "rendered_samples=5"),
            ({"architecture": "resnet"}, "'styletransformer' or 'psp'.*'resnet'"),
        ],
    )
    def test_settings_that_do_not_fit(self, training_settings, tmp_path, change, message):
        with pytest.raises(ValueError, match=message):
            train(EncoderConfig(**nested(training_settings, **change)), tmp_path)

    def test_latent_distribution(self, tiny_components):
        generator = tiny_components["generator"]
        cameras = camera_from_pose(torch.linspace(-20, 20, 5), torch.zeros(5))
        distribution = LatentDistribution(generator, cameras, samples=2000)
        random = torch.Generator().manual_seed(1)
        chosen = torch.randint(5, (500,), generator=random)
        with torch.no_grad():
            w = generator.mapping(torch.randn(500, generator.config.z_dim, generator=random), cameras[chosen])[:, 0]
        own = distribution.mahalanobis(w).mean()
        assert 0.5 < own < 1.1
        assert distribution.mahalanobis(distribution.w_avg) == 0
        doubled = distribution.mahalanobis(distribution.w_avg + 2 * (w - distribution.w_avg)).mean()
        torch.testing.assert_close(doubled, 4 * own)
        # A step off along the axis of least variance is rarer than an equal one along that of most.
        _, axes = torch.linalg.eigh(torch.cov(w.T))
        rare, common = (distribution.mahalanobis(distribution.w_avg + axis) for axis in (axes[:, 0], axes[:, -1]))
        assert rare > 2 * common

    def test_latent_error_is_in_standard_deviations(self):
        w, w_std = torch.zeros(4, 3), torch.tensor([0.5, 1.0, 2.0])
        assert latent_error(w_std.expand(4, 3), w, w_std) == 1
        assert latent_error(w_std.expand(4, 7, 3), w, w_std) == 1

    def test_learning_rate_schedule(self):
        schedule = ScheduleSettings(warmup_images=100)
        rates = np.array([0.5 * learning_rate_factor(images, 1000, schedule) for images in range(0, 1001, 10)])
        assert rates.argmax() == 10 and rates.max() == 0.5 and rates[-1] < 1e-9
        assert (np.diff(rates[:11]) > 0).all() and (np.diff(rates[10:]) < 0).all()
