"""The presets "paper" and "extended": told from a network, and filled into settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from metaaux.models.auxiliary import AuxiliaryNetwork
from metaaux.models.presets import inner_loop_of, preset_of
from metaaux.training.auxiliary import AuxiliaryConfig
from metaaux.training.phases import InnerSettings, make_auxiliary
from metaaux.training.settings import load_settings
from tests.nested import nested

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "metaaux" / "configs" / "mini"
FOLDERS = {name: name for name in ("generator", "encoder", "discriminator", "identity")}
SETTINGS = {"networks": FOLDERS, "data": {"path": "data"}, "run": {"total_images": 4, "interval_images": 4}}


@pytest.fixture(scope="module")
def plain(tiny_components, tmp_path_factory):
    """Folder of a network of the plain phase."""
    folder = tmp_path_factory.mktemp("plain")
    tiny_components["auxiliary"].with_offset_bias_resolution(0).save_pretrained(folder)
    return str(folder)


def trained(tiny_components, plain, **changes) -> AuxiliaryNetwork:
    config = AuxiliaryConfig(**nested(SETTINGS | {"phase": "meta", "auxiliary": {"initial": plain}}, **changes))
    return make_auxiliary(config, tiny_components["generator"])


@pytest.mark.parametrize("model, preset", [("metaaux-mini", "extended"), ("metaaux-ffhq", "paper")])
def test_published_configurations(model, preset):
    config = json.loads((ROOT / "hub_configs" / model / "auxiliary" / "config.json").read_text())
    with torch.device("meta"):
        network = AuxiliaryNetwork(**{name: value for name, value in config.items() if not name.startswith("_")})
    assert preset_of(network) == preset


EXTENDED = {
    "preset": "extended",
    "auxiliary__offset_bias_resolution": 16,
    "auxiliary__full_kernel_layers": ["backbone"],
}


def test_presets_fill_what_the_settings_leave_out(tiny_components, plain, tmp_path):
    paper = trained(tiny_components, plain, preset="paper")
    assert preset_of(paper) == "paper"
    assert inner_loop_of(paper) == {
        "full_kernel_layers": [],
        "position_bias": None,
        "momentum": 0.0,
        "max_gradient_norm": None,
        "training": {"steps": 5, "order": "second", "multi_step_weight": 0.0},
    }
    extended = trained(tiny_components, plain, **EXTENDED)
    assert preset_of(extended) == "extended"
    assert inner_loop_of(extended) == {
        "full_kernel_layers": ["backbone"],
        "position_bias": 16,
        "momentum": 0.4,
        "max_gradient_norm": None,
        "training": {"steps": 5, "order": "first", "multi_step_weight": 0.2},
    }
    extended.save_pretrained(tmp_path)
    assert preset_of(AuxiliaryNetwork.from_pretrained(tmp_path)) == "extended"


@pytest.mark.parametrize(
    "changes",
    [
        {"preset": "paper", "inner__momentum": 0.1},
        {"preset": "paper", "inner__order": "first"},
        {"preset": "paper", "inner__max_gradient_norm": 1.0},
        {"preset": "paper", "outer__multi_step_weight": 0.1},
        {"preset": "paper", "auxiliary__full_kernel_layers": ["backbone.b8"]},
        EXTENDED | {"inner__order": "second"},
        EXTENDED | {"inner__momentum": 0.0},
        EXTENDED | {"auxiliary__offset_bias_resolution": None},
    ],
)
def test_settings_of_ones_own_take_precedence_and_are_told(tiny_components, plain, changes):
    with pytest.warns(UserWarning, match=f"preset: {changes['preset']}, but .* custom"):
        assert preset_of(trained(tiny_components, plain, **changes)) == "custom"


def test_settings_with_a_preset_can_be_assigned():
    config = AuxiliaryConfig(**SETTINGS, phase="meta", preset="paper")
    config.batch = config.batch * 2
    config.inner.steps = 3
    config.inner = InnerSettings(steps=2)
    assert (config.inner.steps, config.inner.order, config.auxiliary.full_kernel_layers) == (2, "second", ())
    with pytest.raises(ValueError, match="steps"):
        config.inner = {"steps": -1}
    assert config.inner.steps == 2


def test_a_network_of_the_plain_phase_is_no_preset_yet(tiny_components):
    config = AuxiliaryConfig(**nested(SETTINGS, preset="paper", inner__momentum=0.0))
    config.auxiliary.arguments = {
        name: value
        for name, value in tiny_components["auxiliary"].config.items()
        if name.startswith(("backbone_", "neck_", "hyper_", "offset_r", "offset_c", "offset_i", "camera_"))
    }
    network = make_auxiliary(config, tiny_components["generator"])
    assert network.offset_network.bias is None and network.config.inner_training is None
    assert preset_of(network) == "custom"


@pytest.mark.parametrize(("size", "alike"), [("", ("run",)), ("-256", ())])
def test_shipped_configurations_are_of_the_presets_that_they_name(size, alike):
    plain, extended, paper = (
        load_settings(AuxiliaryConfig, CONFIGS / f"{name}{size}.yaml") for name in ("plain", "meta", "meta-paper")
    )
    assert plain.auxiliary.offset_bias_resolution == paper.auxiliary.offset_bias_resolution == 0
    assert (paper.inner.order, paper.inner.momentum, paper.outer.multi_step_weight) == ("second", 0.0, 0.0)
    assert (extended.inner.order, extended.inner.momentum, extended.outer.multi_step_weight) == ("first", 0.4, 0.2)
    assert extended.auxiliary.full_kernel_layers and extended.auxiliary.offset_bias_resolution == 64
    for name in ("networks", "data", "batch", "average", *alike):
        assert getattr(extended, name) == getattr(paper, name), name
    # Plain steps of second order need shorter ones of the optimiser too.
    assert paper.optimiser.learning_rate <= extended.optimiser.learning_rate
    assert paper.optimiser.model_copy(update={"learning_rate": extended.optimiser.learning_rate}) == extended.optimiser


def test_wrong_names_and_sections(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(json.dumps(SETTINGS | {"preset": "none"}))
    with pytest.raises(ValueError, match="preset: expected 'paper' or 'extended'"):
        load_settings(AuxiliaryConfig, path)
    path.write_text(json.dumps(SETTINGS | {"preset": "paper", "inner": 3}))
    with pytest.raises(ValueError, match="inner: expected a section"):
        load_settings(AuxiliaryConfig, path)


def test_the_position_bias_comes_and_goes(tiny_components, cameras):
    network = tiny_components["auxiliary"]
    seed = torch.Generator().manual_seed(1)
    batch = (
        torch.rand(2, 3, 32, 32, generator=seed),
        cameras[:2],
        torch.randn(2, 3, 8, 16, 16, generator=seed),
    )
    without = network.with_offset_bias_resolution(0)
    assert without.offset_network.bias is None
    before, after = network(*batch), without(*batch)
    # The bias is zero so far, so that nothing but the tensor is lost.
    torch.testing.assert_close(after.offset_planes, before.offset_planes)
    own = without.inner_rates()
    assert "offset_network.bias" not in own
    assert all(torch.equal(rate, network.inner_rates()[name]) for name, rate in own.items())

    again = without.with_offset_bias_resolution(16)
    assert again(*batch).offset_planes.shape == (2, 3, 3, 16, 16)
    torch.testing.assert_close(
        again.inner_rates()["offset_network.bias"], 256 * own["offset_network.to_offsets.bias"], rtol=1e-5, atol=0
    )
    # A bias that is the same everywhere is one of the last convolution.
    with torch.no_grad():
        again.offset_network.bias.copy_(torch.linspace(-1, 1, 9)[:, None, None].expand(9, 16, 16))
    folded = again.with_offset_bias_resolution(0)
    torch.testing.assert_close(
        folded.get_parameter("offset_network.to_offsets.bias"),
        without.get_parameter("offset_network.to_offsets.bias") + torch.linspace(-1, 1, 9),
    )
