"""Fréchet distance, attribute network and figures of a photo, on inputs whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import safetensors.torch
import scipy.linalg
import torch
from conftest import IMAGE_SIZE

from metaaux.evaluation.frechet import FeatureStatistics, frechet_between, frechet_distance, load_feature_extractor
from metaaux.evaluation.metrics import ReconstructionMetrics, timed
from metaaux.models.age_gender import AgeGenderNetwork, pad_same
from metaaux.models.perceptual import LPIPS


@pytest.fixture(scope="module")
def squeezenet_file(tmp_path_factory):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = LPIPS("squeeze", normalization="folded")
    path = tmp_path_factory.mktemp("features") / "squeeze.safetensors"
    safetensors.torch.save_file(network.state_dict(), path)
    return path


class TestFrechet:
    def test_of_gaussians_in_one_dimension(self):
        # (3 - 0)² + (2 - 1)² for N(0, 1) and N(3, 4)
        distance = frechet_distance(np.zeros(1), np.eye(1), np.full(1, 3.0), np.full((1, 1), 4.0))
        assert distance == pytest.approx(10)

    def test_of_gaussians_that_do_not_commute_equals_the_definition(self):
        rng = np.random.default_rng(0)
        a, b = rng.normal(size=(2, 6, 6))
        a, b = a @ a.T, b @ b.T
        mean = rng.normal(size=6)
        expected = mean @ mean + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
        assert frechet_distance(np.zeros(6), a, mean, b) == pytest.approx(expected, rel=1e-6)

    def test_of_a_set_with_itself_is_zero_also_with_fewer_images_than_features(self):
        features = np.random.default_rng(0).normal(size=(5, 40))
        statistics = FeatureStatistics()
        statistics.add(features)
        assert frechet_between(statistics, statistics) == pytest.approx(0, abs=1e-6)

    def test_shift_of_all_features(self):
        features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
        a, b = FeatureStatistics(), FeatureStatistics()
        a.add(features)
        b.add(features + 2)
        assert frechet_between(a, b) == pytest.approx(8 * 4, rel=1e-5)

    def test_statistics_in_batches_are_numpys_also_with_a_large_mean(self):
        features = np.random.default_rng(0).normal(size=(30, 4)) + 1e6
        statistics = FeatureStatistics()
        for part in np.array_split(features, 7):
            statistics.add(part)
        np.testing.assert_allclose(statistics.mean, features.mean(0))
        np.testing.assert_allclose(statistics.covariance, np.cov(features.T), rtol=1e-6)

    def test_of_less_than_two_images_is_not_a_number(self):
        one, two = FeatureStatistics(), FeatureStatistics()
        one.add(np.zeros((1, 3)))
        two.add(np.zeros((2, 3)))
        assert math.isnan(frechet_between(one, two))

    def test_bad_features_and_shapes(self):
        statistics = FeatureStatistics()
        with pytest.raises(ValueError, match="finite"):
            statistics.add(np.full((2, 3), np.nan))
        statistics.add(np.zeros((2, 3)))
        with pytest.raises(ValueError, match="one D throughout"):
            statistics.add(np.zeros((2, 4)))
        with pytest.raises(ValueError, match="different dimensions"):
            frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
class TestFeatureExtractors:
    def test_squeezenet(self, squeezenet_file):
        extractor = load_feature_extractor(squeezenet_file)
        images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
        network = LPIPS.from_features_file(squeezenet_file)
        expected = network.taps(images.float() / 127.5 - 1)[-1].mean((2, 3))
        torch.testing.assert_close(extractor(images), expected)
        assert extractor(images).shape == (2, 512) and "squeeze.safetensors" in extractor.name

    def test_torchscript(self, tmp_path):
        class Mean(torch.nn.Module):
            def forward(self, images: torch.Tensor, return_features: bool = False):
                return images.float().mean((2, 3)) if return_features else images.float()

        path = tmp_path / "inception.pt"
        torch.jit.script(Mean()).save(path)
        images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
        extractor = load_feature_extractor(path)
        torch.testing.assert_close(extractor(images), images.float().mean((2, 3)))
        assert "inception.pt" in extractor.name

    def test_files_that_are_none(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="absent.pt"):
            load_feature_extractor(tmp_path / "absent.pt")
        with pytest.raises(ValueError, match=r"\.safetensors"):
            load_feature_extractor(tmp_path / "weights.bin")
        (tmp_path / "text.pt").write_text("no network")
        with pytest.raises(ValueError, match="not a TorchScript file"):
            load_feature_extractor(tmp_path / "text.pt")


class TestAgeGenderNetwork:
    @pytest.mark.parametrize(("side", "stride", "padded"), [(112, 2, 113), (7, 2, 9), (56, 1, 58)])
    def test_padding_is_tensorflows(self, side, stride, padded):
        x = pad_same(torch.ones(1, 1, side, side), 3, stride)
        assert x.shape[-1] == padded
        # An odd pixel lies right and below.
        assert x[0, 0, :, 0].any() == (stride == 2 and side % 2 == 0)

    def test_biases_alone(self):
        network = AgeGenderNetwork().eval()
        with torch.no_grad():
            network.fc["age"].bias.fill_(42)
            network.fc["gender"].bias.copy_(torch.tensor([math.log(3), 0.0]))
            age, male = network(torch.zeros(2, 3, 128, 128))
        assert age.tolist() == [42, 42] and male.tolist() == pytest.approx([0.75, 0.75])

    def test_sees_the_middle_only(self, attribute_file):
        network = AgeGenderNetwork.from_file(attribute_file)
        image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
        border = image.clone()
        border[:, :, :20] = border[:, :, :, -20:] = 1
        centre = image.clone()
        centre[:, :, 40:80, 40:80] = 1
        torch.testing.assert_close(network(border), network(image))
        assert not torch.allclose(network(centre)[0], network(image)[0])

    def test_other_files(self, tmp_path, squeezenet_file):
        with pytest.raises(FileNotFoundError, match="no attribute network"):
            AgeGenderNetwork.from_file(tmp_path / "absent.safetensors")
        with pytest.raises(ValueError, match="face-api"):
            AgeGenderNetwork.from_file(squeezenet_file)


class TestReconstructionMetrics:
    def test_known_answers(self, tiny_inverter):
        metrics = ReconstructionMetrics(tiny_inverter)
        target = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)
        (figures,) = metrics.measure(target + 0.5, target)
        assert figures["mse"] == pytest.approx(0.25)
        image = torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
        same, other = metrics.measure(image.repeat(2, 1, 1, 1), torch.cat((image, -image)))
        assert same["mse"] == 0 and same["perceptual"] == pytest.approx(0, abs=1e-6)
        assert same["identity"] == pytest.approx(1)
        assert other["perceptual"] > 0.01 and other["distance"] is None

    def test_says_which_networks_it_uses(self, tiny_inverter, squeezenet_file, tmp_path):
        assert "discriminator" in ReconstructionMetrics(tiny_inverter).names["perceptual"]
        from_file = ReconstructionMetrics(tiny_inverter, squeezenet_file)
        assert from_file.names["perceptual"] == "uncalibrated LPIPS on squeeze (squeeze.safetensors)"
        LPIPS("alex", calibrated=True).save_pretrained(tmp_path / "lpips")
        calibrated = ReconstructionMetrics(tiny_inverter, tmp_path / "lpips")
        assert calibrated.names["perceptual"].startswith("LPIPS on alex")

    def test_networks_that_are_not_there(self, tiny_inverter, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            ReconstructionMetrics(tiny_inverter, str(tmp_path / "absent"))
        (tmp_path / "config.json").write_text('{"_class_name": "LPIPS"}')
        (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
        with pytest.raises(FileNotFoundError, match="no safetensors file"):
            ReconstructionMetrics(tiny_inverter, tmp_path)

    def test_time_is_measured(self):
        result, seconds = timed(lambda: sum(range(10)), torch.device("cpu"))
        assert result == 45 and 0 < seconds < 1
