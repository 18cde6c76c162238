"""The 2D variant: `StyleGAN2Generator` against recorded official outputs, and through pipeline and adaptation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from eg3d_reference import hashed
from safetensors.torch import load_file
from stylegan2_reference import CASES, weights

from metaaux import Inversion, MetaAuxInverter
from metaaux.models.stylegan2 import StyleGAN2Generator

RECORDED = Path(__file__).resolve().parent / "data" / "stylegan2_official.safetensors"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("gradients", [False, True])
def test_equals_official(name, gradients):
    case, recorded = CASES[name], load_file(RECORDED)
    model = StyleGAN2Generator(**case.config()).eval()
    model.load_state_dict(weights(model.state_dict()))
    with torch.set_grad_enabled(gradients):
        ws = model.mapping(hashed(f"{name}/z", (2, 48)), truncation_psi=case.psi, truncation_cutoff=case.cutoff)
        image = model.synthesize(ws).image
    torch.testing.assert_close(ws[:, ::3, ::7], recorded[f"{name}/ws"], rtol=1e-5, atol=1e-5)
    part = image[..., 1::3, ::3] if case.image_size < 128 else image[..., 2::7, 1::7]
    torch.testing.assert_close(part, recorded[f"{name}/image"], rtol=1e-5, atol=1e-4)


def test_released_size():
    with torch.device("meta"):
        generator = StyleGAN2Generator()
    assert sum(p.numel() for p in generator.parameters()) == 30_370_060
    assert generator.num_ws == 18


@pytest.fixture(scope="module")
def inverter(tiny_2d_inverter):
    return tiny_2d_inverter


@pytest.fixture(scope="module")
def inversion(inverter, crops, cameras):
    return inverter.invert(crops[0], steps=3, camera=cameras[0])


class TestPipeline:
    def test_adaptation_reduces_the_loss(self, inversion):
        assert [step["step"] for step in inversion.steps] == [-1, 0, 1, 2, 3]
        assert inversion.steps[-1]["total"] < inversion.steps[1]["total"]
        assert inversion.offset_planes is None
        assert set(inversion.weight_offsets) == {
            f"backbone.b{r}.{c}" for r in (4, 8, 16, 32) for c in ("conv0", "conv1") if (r, c) != (4, "conv0")
        }

    def test_saved_and_loaded(self, inverter, inversion, tmp_path):
        inverter.save_pretrained(tmp_path / "model")
        inversion.save(tmp_path / "me.safetensors")
        loaded = MetaAuxInverter.from_pretrained(tmp_path / "model")
        again = loaded.load_inversion(tmp_path / "me.safetensors")
        assert isinstance(again, Inversion)
        assert loaded.render(again).tobytes() == inverter.render(inversion).tobytes()

    def test_offsets_matter(self, inverter, inversion):
        changed = {name: offset + 0.5 for name, offset in inversion.weight_offsets.items()}
        other = Inversion(**{**vars(inversion), "weight_offsets": changed})
        assert inverter.render(other).tobytes() != inverter.render(inversion).tobytes()

    @pytest.mark.parametrize("view", [{"yaw": 10}, {"pitch": 0}])
    def test_no_other_views(self, inverter, inversion, view):
        with pytest.raises(ValueError, match="2D generator.*one view"):
            inverter.render(inversion, **view)

    def test_no_orbit_and_no_mesh(self, inverter, inversion, tmp_path):
        with pytest.raises(ValueError, match="2D generator.*one view"):
            inverter.orbit(inversion, frames=2)
        with pytest.raises(ValueError, match="2D generator"):
            inverter.export_mesh(inversion, tmp_path / "head.glb")
        assert not list(tmp_path.iterdir())

    def test_tells_what_it_can(self, inverter, tiny_inverter):
        assert not inverter.has_viewpoints
        assert tiny_inverter.has_viewpoints


class TestArguments:
    def test_planes_are_refused(self, inverter):
        with pytest.raises(ValueError, match="no planes"):
            inverter.generator.synthesize(torch.zeros(1, 16), offset_planes=torch.zeros(1, 3, 3, 4, 4))

    @pytest.mark.parametrize(
        ("ws", "offsets", "match"),
        [
            ((1, 5), {}, "w must be"),
            ((1, 16), {"backbone.b4.torgb": torch.zeros(3, 16, 1, 1)}, "no layer 'backbone.b4.torgb'"),
            ((1, 16), {"backbone.b4.conv1": torch.zeros(3, 16, 1, 1)}, "offset of backbone.b4.conv1"),
        ],
    )
    def test_wrong_shapes(self, inverter, ws, offsets, match):
        with pytest.raises(ValueError, match=match):
            inverter.generator.synthesize(torch.zeros(ws), weight_offsets=offsets)
