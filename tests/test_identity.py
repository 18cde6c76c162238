"""IdentityNetwork: unit vectors, crop, second derivatives, errors, files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import metaaux
from metaaux.cameras import camera_from_pose
from metaaux.models.identity import IdentityNetwork
from metaaux.training.identity import IdentityConfig, augment, contrastive_loss, train, verification_figures
from metaaux.training.settings import load_settings

CONFIGS = Path(metaaux.__file__).parent / "configs"

TINY = {
    "input_size": 32,
    "stem_width": 16,
    "widths": (16, 16, 32, 32),
    "depths": (1, 1, 1, 1),
    "embedding_dim": 24,
    "normalization": "group",
    "dropout": 0.0,
}


def tiny_network(**changes) -> IdentityNetwork:
    torch.manual_seed(0)
    return IdentityNetwork(**TINY | changes).eval()


def images(batch: int = 3, size: int = 64) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


class TestModel:
    @pytest.mark.parametrize("normalization", ["group", "batch"])
    def test_unit_vectors(self, normalization):
        embedding = tiny_network(normalization=normalization)(images())
        assert embedding.shape == (3, 24) and embedding.dtype == torch.float32
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(3))
        assert (embedding[0] - embedding[1]).abs().max() > 1e-3

    def test_full_size_is_ir_se50(self):
        with torch.device("meta"):
            network = IdentityNetwork()
        assert sum(p.numel() for p in network.parameters()) == 43_797_696  # ArcFace's IR-SE50 for 112x112
        assert len(network.blocks) == 24

    def test_mini_size(self):
        network = IdentityNetwork(**load_settings(IdentityConfig, CONFIGS / "mini" / "identity.yaml").identity)
        assert sum(p.numel() for p in network.parameters()) <= 1_000_000

    def test_only_the_crop_counts(self):
        network = tiny_network(crop=(0.25, 0.25, 0.75, 0.75))
        image = images()
        outside = image.clone()
        outside[:, :, :16] = outside[:, :, 48:] = outside[..., :16] = outside[..., 48:] = 0
        assert torch.equal(network(image), network(outside))
        inside = image.clone()
        inside[:, :, 30:34, 30:34] = 0
        assert not torch.equal(network(image), network(inside))

    def test_default_crop_is_that_of_ffhq_inversion(self):
        with torch.device("meta"):
            network = IdentityNetwork()
        columns = torch.arange(256.0).expand(1, 3, 256, 256)
        image = (columns + 1000 * columns.mT).contiguous()
        face = image[:, :, 35:223, 32:220]
        expected = torch.nn.functional.interpolate(face, size=(112, 112), mode="bilinear", antialias=True)
        torch.testing.assert_close(network.crop_face(image), expected)

    def test_other_sizes_of_one_picture_agree(self):
        network = tiny_network()
        smooth = torch.nn.functional.interpolate(images(size=8), size=(64, 64), mode="bicubic")
        double = torch.nn.functional.interpolate(smooth, size=(128, 128), mode="bilinear")
        assert (network(smooth) * network(double)).sum(1).min() > 0.99

    def test_batch_normalisation_takes_no_part_at_inference(self):
        network = tiny_network(normalization="batch")
        torch.testing.assert_close(network(images())[:1], network(images()[:1]), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("normalization", ["group", "batch"])
    def test_second_derivatives(self, normalization):
        network = tiny_network(normalization=normalization)
        reference = network(images(1)).detach()
        x = images(2)[1:].requires_grad_()
        (first,) = torch.autograd.grad((1 - (network(x) * reference).sum()), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        assert torch.isfinite(second).all() and second.abs().max() > 0

    def test_save_and_load(self, tmp_path):
        network = tiny_network()
        network.save_pretrained(tmp_path)
        torch.testing.assert_close(IdentityNetwork.from_pretrained(tmp_path)(images()), network(images()))

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"input_size": 40}, "multiple of 16"),
            ({"crop": (0.5, 0.0, 0.25, 1.0)}, "left < right"),
            ({"normalization": "layer"}, "'layer'"),
            ({"widths": (16, 16)}, "four stages"),
            ({"widths": (16, 16, 16, 24)}, "divisible by 16, got 24"),
        ],
    )
    def test_sizes_that_do_not_fit(self, change, message):
        with pytest.raises(ValueError, match=message):
            tiny_network(**change)

    def test_wrong_images(self):
        with pytest.raises(ValueError, match=r"got \[3, 64, 64\]"):
            tiny_network()(images()[0])
        with pytest.raises(ValueError, match="too small"):
            tiny_network()(images(size=8))


def unit_vectors(count: int, dimension: int = 8) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(count, dimension, generator=random), dim=1)


class TestContrastiveLoss:
    def test_matches_its_definition(self):
        first, second = unit_vectors(10).chunk(2)
        vectors = torch.cat([first, second])
        terms = []
        for i in range(10):
            cosines = (vectors[i] @ vectors.T) / 0.2
            others = torch.tensor([j for j in range(10) if j != i])
            terms.append(cosines[others].logsumexp(0) - cosines[(i + 5) % 10])
        expected = torch.stack(terms).mean()
        torch.testing.assert_close(contrastive_loss(first, second, 0.2, Accelerator(cpu=True)), expected)

    def test_small_for_matching_pairs(self):
        accelerator = Accelerator(cpu=True)
        first, second = torch.eye(6), torch.eye(6)
        assert contrastive_loss(first, second, 0.05, accelerator) < 1e-3
        assert contrastive_loss(first, second.roll(1, 0), 0.05, accelerator) > 10


class TestVerification:
    def test_separable(self):
        figures = verification_figures(torch.eye(5), torch.eye(5))
        assert figures == {"auc": 1.0, "accuracy": 1.0, "same": 1.0, "different": 0.0}

    def test_chance(self):
        figures = verification_figures(unit_vectors(400)[:200], unit_vectors(400)[200:])
        assert 0.4 < figures["auc"] < 0.6 and 0.5 <= figures["accuracy"] < 0.65

    def test_agrees_with_counting(self):
        first = unit_vectors(6)
        second = torch.nn.functional.normalize(first + 0.8 * unit_vectors(12)[6:], dim=1)
        cosines = first @ second.T
        same = [cosines[i, i].item() for i in range(6)]
        different = [cosines[i, j].item() for i in range(6) for j in range(6) if i != j]
        figures = verification_figures(first, second)
        assert figures["auc"] == pytest.approx(sum(s > d for s in same for d in different) / (6 * 30))
        best = max((sum(s >= t for s in same) / 6 + sum(d < t for d in different) / 30) / 2 for t in same)
        assert figures["accuracy"] == pytest.approx(best)


class TestAugmentation:
    def test_changes_each_image_its_own_way(self):
        torch.manual_seed(0)
        image = torch.nn.functional.interpolate(images(1, 8), size=(64, 64), mode="bicubic").clamp(-1, 1)
        image = image.expand(6, -1, -1, -1)
        augmented = augment(image)
        assert augmented.shape == image.shape and augmented.abs().max() <= 1
        differences = (augmented[:, None] - augmented[None]).abs().mean(dim=(2, 3, 4))
        assert differences[~torch.eye(6, dtype=torch.bool)].min() > 0.02
        # Still the same picture: on the whole closer to it than to its mirror image.
        assert (augmented - image).abs().mean() < (augmented - image.flip(-1)).abs().mean()


@pytest.fixture(scope="module")
def training_settings(tiny_components, tmp_path_factory) -> dict:
    """Settings of a run of seconds: a tiny generator, and a folder of eight pictures."""
    folder = tmp_path_factory.mktemp("identity-training")
    tiny_components["generator"].save_pretrained(folder / "generator")
    (folder / "data").mkdir()
    cameras = camera_from_pose(torch.linspace(-15, 15, 8), torch.zeros(8))
    smooth = torch.nn.functional.interpolate(images(8, 4), size=(64, 64), mode="bicubic").clamp(-1, 1)
    for i, picture in enumerate(smooth):
        Image.fromarray(((picture.permute(1, 2, 0) + 1) * 127.5).byte().numpy()).save(folder / "data" / f"{i}.png")
    labels = {"labels": [[f"{i}.png", camera.tolist()] for i, camera in enumerate(cameras)]}
    (folder / "data" / "dataset.json").write_text(json.dumps(labels))
    return {
        "data": {"path": str(folder / "data")},
        "networks": {"generator": str(folder / "generator")},
        "identity": {key: value for key, value in TINY.items()},
        "batch": {"samples": 8, "photos": 4},
        "resolution": 8,
        "optimiser": {"learning_rate": 3e-3, "warmup_images": 48, "weight_decay": 0.05},
        "average": {"half_life_images": 20_000},
    }


def figures(folder: Path) -> list[dict]:
    """The lines of a run's figures.jsonl."""
    return [json.loads(line) for line in (folder / "figures.jsonl").read_text().splitlines()]


class TestTraining:
    def test_the_loss_falls_and_persons_are_told_apart(self, training_settings, tmp_path, monkeypatch):
        monkeypatch.setattr("metaaux.training.identity.IdentityTrainer.EVALUATED", 50)
        config = IdentityConfig(**training_settings, run={"total_images": 960, "interval_images": 192, "seed": 1})
        checkpoint = train(config, tmp_path)
        lines = figures(tmp_path)
        losses = [line["loss"] for line in lines if "loss" in line]
        held_out = [line for line in lines if "val/generated/auc" in line]
        assert len(losses) == 5 and losses[-1] < 0.9 * losses[0]
        assert held_out[-1]["val/photos/auc"] > 0.9
        assert 0.5 <= held_out[-1]["val/generated/accuracy"] <= 1
        assert (tmp_path / "sheets" / "pairs-000000960.png").is_file()
        embedding = IdentityNetwork.from_pretrained(checkpoint / "identity")(images())
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(3))

    def test_a_stopped_run_is_resumed(self, training_settings, tmp_path, monkeypatch):
        monkeypatch.setattr("metaaux.training.identity.IdentityTrainer.EVALUATED", 50)
        first, more = ({"total_images": total, "interval_images": 24} for total in (48, 72))
        train(IdentityConfig(**training_settings, run=first), tmp_path)
        first = IdentityNetwork.from_pretrained(tmp_path / "checkpoint-48" / "identity_raw")
        train(
            IdentityConfig(**training_settings, run={"total_images": 72, "interval_images": 24}), tmp_path, resume=True
        )
        assert [line["images"] for line in figures(tmp_path) if "loss" in line] == [24, 48, 72]
        second = IdentityNetwork.from_pretrained(tmp_path / "checkpoint-72" / "identity_raw")
        moved = (first.head.weight - second.head.weight).abs().max()
        # One step from where it stopped: further than none, not as far as a new start would be.
        assert 0 < moved < 1.5 * 3e-3 < (first.head.weight - tiny_network().head.weight).abs().max()
