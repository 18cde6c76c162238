"""Growing a generator and its discriminator: wider at the same function, larger at nearly the same."""

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from metaaux.cameras import camera_from_pose
from metaaux.cli import app
from metaaux.models.discriminator import DualDiscriminator
from metaaux.models.eg3d import EG3DGenerator
from metaaux.models.resampling import downsample2d
from metaaux.training.grow import (
    enlarge_discriminator,
    enlarge_generator,
    grow,
    widen_discriminator,
    widen_generator,
)

GENERATOR = dict(
    z_dim=8,
    w_dim=16,
    image_size=32,
    plane_resolution=16,
    plane_features=4,
    channel_base=32,
    channel_max=8,
    neural_resolution=16,
    depth_samples=4,
    importance_samples=4,
    super_resolution_kind="2X",
    super_resolution_channels=(16, 8),
    super_resolution_conv_clamp=None,
)
DISCRIMINATOR = dict(image_size=32, channel_base=128, channel_max=16, conv_clamp=None, mapping_layers=2, raw_size=16)


def shaken(model, seed=0):
    """The model with biases and noise strengths other than the zeros they start with."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "noise_strength")):
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture
def generator():
    torch.manual_seed(1)
    return shaken(EG3DGenerator(**GENERATOR))


@pytest.fixture
def discriminator():
    torch.manual_seed(2)
    return shaken(DualDiscriminator(**DISCRIMINATOR))


@pytest.fixture
def ws(generator):
    with torch.no_grad():
        return generator.mapping(torch.randn(3, 8), cameras())


def cameras():
    return camera_from_pose(torch.tensor([-30.0, 0.0, 20.0]), torch.zeros(3))


def pictures(size):
    torch.manual_seed(3)
    return torch.randn(3, 3, size, size), torch.randn(3, 3, 16, 16)


class TestWiden:
    def test_generator_keeps_its_planes(self, generator, ws):
        wide = widen_generator(generator)
        channels = [getattr(wide.backbone, f"b{r}").conv1.out_channels for r in (4, 8, 16)]
        assert channels == [8, 8, 4] and wide.config.channel_base == 64
        with torch.no_grad():
            for noise in ("none", "const"):
                assert torch.allclose(wide.planes(ws, noise=noise), generator.planes(ws, noise=noise), atol=2e-5)
            assert torch.allclose(
                wide.synthesize(ws, cameras()).image, generator.synthesize(ws, cameras()).image, atol=2e-4
            )

    def test_copies_get_other_gradients(self, generator, ws):
        wide = widen_generator(generator)
        weight = wide.backbone.b16.conv0.weight
        first, second = torch.autograd.grad(wide.planes(ws).square().mean(), weight)[0].chunk(2)
        assert not torch.allclose(first, second, rtol=1e-2)

    def test_discriminator_keeps_its_logits(self, discriminator):
        wide = widen_discriminator(discriminator)
        assert len(wide.b32.conv0.weight) == 2 * len(discriminator.b32.conv0.weight)
        image, raw = pictures(32)
        with torch.no_grad():
            assert torch.allclose(wide(image, raw, cameras()), discriminator(image, raw, cameras()), atol=1e-4)

    def test_refuses_clamped_activations(self):
        with pytest.raises(ValueError, match="clamped"):
            widen_generator(EG3DGenerator(**GENERATOR, conv_clamp=256.0))

    def test_refuses_other_factors(self):
        with pytest.raises(ValueError, match="would go from 6 to 8"):
            widen_generator(EG3DGenerator(**GENERATOR | dict(channel_base=48)))
        with pytest.raises(ValueError, match="last block"):
            widen_discriminator(DualDiscriminator(**DISCRIMINATOR | dict(channel_max=64)))


class TestEnlarge:
    def test_generator_has_twice_the_pixels_and_the_same_weights(self, generator, ws):
        large = enlarge_generator(generator)
        old, new = generator.state_dict(), large.state_dict()
        assert all(torch.equal(old[n], v) for n, v in new.items() if not n.startswith("super_resolution."))
        with torch.no_grad():
            image = large.synthesize(ws, cameras()).image
            before = generator.synthesize(ws, cameras()).image
        assert image.shape == (3, 3, 64, 64)
        reduced = F.interpolate(image, size=(32, 32), mode="bilinear", antialias=True)
        assert F.cosine_similarity(reduced.flatten(1), before.flatten(1)).min() > 0.9

    def test_discriminator_judges_the_reduced_picture(self, discriminator):
        large = enlarge_discriminator(discriminator, first_channels=16)
        image, raw = pictures(64)
        raw = F.interpolate(raw, size=(64, 64), mode="bilinear")
        with torch.no_grad():
            logits = large(image, raw, cameras())
            expected = discriminator(downsample2d(image), downsample2d(raw), cameras())
        assert torch.allclose(logits, expected, atol=1e-4)

    def test_new_block_learns(self, discriminator):
        large = enlarge_discriminator(discriminator, first_channels=16)
        large(*pictures(64), cameras()).sum().backward()
        assert all(p.grad.abs().sum() > 0 for n, p in large.b64.named_parameters() if "conv1" in n or "skip" in n)

    def test_needs_room_for_the_pairs(self, discriminator):
        with pytest.raises(ValueError, match="12 channels"):
            enlarge_discriminator(discriminator, first_channels=8)

    def test_refuses_other_kinds(self):
        generator = EG3DGenerator(**GENERATOR | dict(super_resolution_kind="4X"))
        with pytest.raises(ValueError, match="4X"):
            enlarge_generator(generator)


class TestCheckpoint:
    def test_grows_a_folder(self, generator, discriminator, tmp_path):
        generator.save_pretrained(tmp_path / "old/generator")
        discriminator.save_pretrained(tmp_path / "old/discriminator")
        grow(tmp_path / "old", tmp_path / "new", wider=True, larger=True, first_channels=16)
        large = EG3DGenerator.from_pretrained(tmp_path / "new/generator")
        assert (large.config.image_size, large.config.channel_base) == (64, 64)
        judge = DualDiscriminator.from_pretrained(tmp_path / "new/discriminator")
        assert judge.config.first_channels == 16 and judge.config.image_size == 64
        assert str(tmp_path) not in (tmp_path / "new/generator/config.json").read_text()

    def test_command(self, generator, discriminator, tmp_path):
        generator.save_pretrained(tmp_path / "old/generator")
        discriminator.save_pretrained(tmp_path / "old/discriminator")
        result = CliRunner().invoke(app, ["grow", str(tmp_path / "old"), str(tmp_path / "wide"), "--wider"])
        assert result.exit_code == 0, result.output
        assert EG3DGenerator.from_pretrained(tmp_path / "wide/generator").config.image_size == 32
        refused = CliRunner().invoke(app, ["grow", str(tmp_path / "old"), str(tmp_path / "other")])
        assert refused.exit_code == 2 and "--larger" in refused.output and not (tmp_path / "other").exists()
