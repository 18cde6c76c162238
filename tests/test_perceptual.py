"""LPIPS and the discriminator's perceptual distance: layer lists, the distance itself, derivatives, files."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch import nn

from metaaux.models.discriminator import DualDiscriminator
from metaaux.models.perceptual import LPIPS, DiscriminatorPerceptualDistance, resize_antialiased, unit_channels

BACKBONE_PARAMETERS = {"squeeze": 722_496, "alex": 2_469_696, "vgg": 14_714_688}  # torchvision's, features only
TAP_SIZES = {"squeeze": [31, 15, 7, 3, 3, 3, 3], "alex": [15, 7, 3, 3, 3], "vgg": [64, 32, 16, 8, 4]}


def image_pair(size: int = 64, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, 3, size, size, generator=generator) * 2 - 1
    return x, (x + 0.3 * torch.randn(x.shape, generator=generator)).clamp(-1, 1)


@pytest.fixture(scope="module")
def squeeze() -> LPIPS:
    torch.manual_seed(0)
    return LPIPS("squeeze").eval()


class TestBackbones:
    @pytest.mark.parametrize("backbone", ["squeeze", "alex", "vgg"])
    def test_layers_match_the_papers(self, backbone):
        model = LPIPS(backbone).eval()
        assert sum(p.numel() for p in model.features.parameters()) == BACKBONE_PARAMETERS[backbone]
        taps = model.taps(torch.zeros(1, 3, 64, 64))
        assert [t.shape[1] for t in taps] == list(model.tap_channels)
        assert [t.shape[2] for t in taps] == TAP_SIZES[backbone]
        assert all((t >= 0).all() for t in taps)  # every tap lies behind its ReLU

    def test_keys_are_torchvisions(self, squeeze):
        keys = set(squeeze.state_dict())
        assert {"features.0.weight", "features.3.squeeze.bias", "features.12.expand3x3.weight"} <= keys
        assert "features.28.weight" in LPIPS("vgg").state_dict()

    def test_unknown_names_are_refused(self):
        with pytest.raises(ValueError, match="backbone 'resnet'"):
            LPIPS("resnet")
        with pytest.raises(ValueError, match="normalization 'caffe'"):
            LPIPS("squeeze", normalization="caffe")


class TestDistance:
    def test_zero_only_for_equal_images(self, squeeze):
        x, y = image_pair()
        distance = squeeze(x, y)
        assert distance.shape == (2,) and (distance > 0.01).all()
        assert torch.equal(squeeze(x, x), torch.zeros(2))
        torch.testing.assert_close(distance, squeeze(y, x))

    def test_grows_with_the_difference(self, squeeze):
        x, y = image_pair()
        distances = torch.stack([squeeze(x, torch.lerp(x, y, t)) for t in (0.25, 0.5, 1.0)])
        assert (distances.diff(dim=0) > 0).all()

    def test_matches_its_definition(self, squeeze):
        x, y = image_pair()
        expected = torch.zeros(2)
        for a, b in zip(squeeze.taps(x), squeeze.taps(y)):
            a, b = (t / t.norm(dim=1, keepdim=True).clamp_min(1e-8) for t in (a, b))
            expected += ((a - b) ** 2).sum(1).mean((1, 2))
        torch.testing.assert_close(squeeze(x, y), expected, rtol=1e-3, atol=1e-5)

    def test_calibration_weights_channels(self):
        torch.manual_seed(0)
        model = LPIPS("alex", calibrated=True).eval()
        plain = LPIPS("alex").eval()
        plain.features.load_state_dict(model.features.state_dict())
        x, y = image_pair()
        with torch.no_grad():
            for layer in model.calibration:
                layer.weight.fill_(1.0)
            torch.testing.assert_close(model(x, y), plain(x, y))
            model.calibration[2].weight.zero_()
            a, b = unit_channels(plain.taps(x)[2]), unit_channels(plain.taps(y)[2])
            torch.testing.assert_close(model(x, y), plain(x, y) - (a - b).square().sum(1).mean((1, 2)))

    def test_random_calibration_is_a_distance(self):
        model = LPIPS("alex", calibrated=True)
        for layer in model.calibration:
            assert layer.weight.min() >= 0 and layer.weight.max() > 0
        first, second = image_pair()
        assert (model(first, second) > 0).all()

    def test_folded_normalization_takes_the_image_as_it_is(self):
        torch.manual_seed(0)
        folded, imagenet = LPIPS("squeeze", normalization="folded"), LPIPS("squeeze", normalization="imagenet")
        imagenet.load_state_dict(folded.state_dict())
        shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
        x, _ = image_pair()
        torch.testing.assert_close(imagenet.taps(x * scale + shift)[-1], folded.taps(x)[-1], rtol=1e-4, atol=1e-5)

    def test_shapes_must_agree(self, squeeze):
        with pytest.raises(ValueError, match="one shape"):
            squeeze(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 32, 32))

    def test_pooled_features(self, squeeze):
        x, _ = image_pair()
        pooled = squeeze.pooled_features(x)
        assert pooled.shape == (2, 512)
        torch.testing.assert_close(pooled, squeeze.taps(x)[-1].mean((2, 3)))

    def test_bfloat16_autocast(self, squeeze):
        x, y = image_pair()
        with torch.autocast("cpu", torch.bfloat16):
            distance = squeeze(x, y)
        assert distance.dtype == torch.float32
        torch.testing.assert_close(distance, squeeze(x, y), rtol=0.05, atol=1e-3)


class TestFiles:
    def test_features_file(self, squeeze, tmp_path):
        path = tmp_path / "features.safetensors"
        safetensors.torch.save_file(squeeze.state_dict() | {"classifier.1.weight": torch.zeros(2)}, path)
        loaded = LPIPS.from_features_file(path)
        assert loaded.config.normalization == "folded" and not any(p.requires_grad for p in loaded.parameters())
        x, y = image_pair()
        assert torch.equal(loaded.features[0].weight, squeeze.features[0].weight)
        assert (loaded(x, y) > 0).all()

    def test_incomplete_features_file(self, squeeze, tmp_path):
        path = tmp_path / "features.safetensors"
        state = squeeze.state_dict()
        del state["features.9.squeeze.bias"]
        safetensors.torch.save_file(state, path)
        with pytest.raises(ValueError, match="features.9.squeeze.bias"):
            LPIPS.from_features_file(path)
        with pytest.raises(FileNotFoundError, match="absent"):
            LPIPS.from_features_file(tmp_path / "absent.safetensors")

    def test_save_and_load(self, tmp_path):
        model = LPIPS("alex", calibrated=True).eval()
        model.save_pretrained(tmp_path)
        loaded = LPIPS.from_pretrained(tmp_path)
        x, y = image_pair()
        torch.testing.assert_close(loaded(x, y), model(x, y))


class TinyDiscriminator(nn.Module):
    """Two convolutions over image and enlarged raw image, smooth enough for a finite-difference check."""

    class config:
        raw_size = 4

    def __init__(self):
        super().__init__()
        self.fine = nn.Conv2d(6, 5, 3, padding=1)
        self.coarse = nn.Conv2d(5, 7, 3, stride=2, padding=1)

    def features(self, image, image_raw, dtype=None):
        raw = nn.functional.interpolate(image_raw, size=image.shape[-2:], mode="nearest")
        fine = nn.functional.silu(self.fine(torch.cat([image, raw], 1)))
        return [fine, nn.functional.silu(self.coarse(fine))]


class TestDiscriminatorDistance:
    def test_distance(self):
        torch.manual_seed(0)
        distance = DiscriminatorPerceptualDistance(TinyDiscriminator())
        x, y = image_pair(8)
        assert distance(x, y).shape == (2,) and (distance(x, y) > 1e-4).all()
        assert torch.equal(distance(x, x), torch.zeros(2))
        torch.testing.assert_close(distance.distance(distance.taps(x), distance.taps(y)), distance(x, y))
        with pytest.raises(ValueError, match="one shape"):
            distance(x, y[:1])

    def test_raw_image_has_the_discriminators_size(self):
        seen = []

        class Recorder(TinyDiscriminator):
            def features(self, image, image_raw, dtype=None):
                seen.append(tuple(image_raw.shape))
                return super().features(image, image_raw)

        x, _ = image_pair(8)
        DiscriminatorPerceptualDistance(Recorder()).taps(x)
        DiscriminatorPerceptualDistance(Recorder(), raw_size=2).taps(x)
        assert seen == [(2, 3, 4, 4), (2, 3, 2, 2)]

    def test_downsampling_is_antialiased(self):
        checkerboard = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(8, 8).expand(1, 3, 16, 16)
        assert resize_antialiased(checkerboard, 8)[..., 2:-2, 2:-2].abs().max() < 1e-6

    @pytest.mark.parametrize("dtype", [None, torch.bfloat16])
    def test_with_the_dual_discriminator(self, dtype):
        torch.manual_seed(0)
        sizes = {"image_size": 32, "channel_base": 512, "channel_max": 32, "mapping_layers": 1, "raw_size": 16}
        discriminator = DualDiscriminator(**sizes)
        distance = DiscriminatorPerceptualDistance(discriminator.requires_grad_(False), dtype=dtype)
        x, target = image_pair(32)
        x.requires_grad_()
        value = distance(x, target)
        assert value.shape == (2,) and value.dtype == torch.float32 and (value > 1e-3).all()
        (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        assert torch.isfinite(second).all() and second.abs().max() > 0

    def test_second_derivative_matches_finite_differences(self):
        torch.manual_seed(0)
        distance = DiscriminatorPerceptualDistance(TinyDiscriminator())
        x, target = image_pair(8)
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

        def gradient(image: torch.Tensor, create_graph: bool = False) -> torch.Tensor:
            image = image if image.requires_grad else image.clone().requires_grad_()
            return torch.autograd.grad(distance(image, target).sum(), image, create_graph=create_graph)[0]

        x.requires_grad_()
        (product,) = torch.autograd.grad((gradient(x, create_graph=True) * direction).sum(), x)
        step = 1e-2
        expected = (gradient((x + step * direction).detach()) - gradient((x - step * direction).detach())) / (2 * step)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(product, expected, rtol=0.05, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("autocast", [False, True])
def test_lpips_has_finite_second_derivatives(squeeze, autocast):
    """Features that are all zero at a place (a flat image, say) must not make them infinite."""
    target, _ = image_pair(32, 1)
    x = torch.zeros(1, 3, 32, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (first,) = torch.autograd.grad(squeeze(x, target).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
    assert first.abs().max() > 0 and second.abs().max() > 0
    assert torch.isfinite(first).all() and torch.isfinite(second).all()
