"""From an official pickle to a repository on the Hub and back, by the package's own commands, at a size of seconds:
convert, encoder, plain, meta, directions, assemble, push, `from_pretrained`, invert, edit, render."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from eg3d_reference import hashed_weights
from hub_server import LoopbackHub, use_hub
from official_pickles import (
    eg3d_contents,
    official_names,  # noqa: F401 (a fixture)
    stylegan2_contents,
    write,
)
from typer.testing import CliRunner

from metaaux import Inversion, MetaAuxInverter
from metaaux.cli import app
from metaaux.models.discriminator import DualDiscriminator
from metaaux.models.eg3d import EG3DGenerator
from metaaux.models.perceptual import LPIPS
from metaaux.models.stylegan2 import StyleGAN2Generator
from tests.conftest import IMAGE_SIZE, TINY_AUXILIARY, TINY_ENCODER

pytest.importorskip("mediapipe")

REPO = "someone/a-model"
PIVOT = [0.0, 0.0, 0.2]
LOSS = {"mse": 1.0, "perceptual": 0.3, "identity": 0.2, "adversarial": 0.01}
RUN = {"interval_images": 100, "trackers": []}
OFFSETS = {"offset_resolution": 8, "offset_channels": 4, "offset_image_features": 2, "camera_channels": 4}


def networks_of(kind):
    """A generator and its discriminator with random weights, as small as official pickles of this kind may be."""
    torch.manual_seed(0)
    sizes = {"image_size": IMAGE_SIZE, "channel_base": 512, "channel_max": 8}
    if kind == "eg3d":
        generator = EG3DGenerator(
            z_dim=16,
            w_dim=16,
            **sizes,
            neural_resolution=8,
            depth_samples=3,
            importance_samples=3,
            super_resolution_kind="2X",
            super_resolution_conv_clamp=None,
        )
        # Random normal weights would make fog of one colour, in which no edit is seen.
        generator.load_state_dict(hashed_weights(generator.state_dict()))
        return generator, DualDiscriminator(**sizes, raw_size=8)
    generator = StyleGAN2Generator(z_dim=16, w_dim=16, mapping_layers=2, **sizes)
    return generator, DualDiscriminator(**sizes, camera_dim=0, dual=False)


def run(*words):
    """Runs a command in this process; what it printed."""
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(params=["eg3d", "stylegan2"])
def kind(request):
    return request.param


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = LoopbackHub()
    use_hub(monkeypatch, server, tmp_path / "cache")
    yield server
    server.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no direction:UserWarning")
@pytest.mark.filterwarnings("error:the auxiliary network's inner learning rates")
def test_from_a_pickle_to_the_hub_and_back(
    kind, hub, tiny_components, face_zip, crops, cameras, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("PHOTOS", "SAMPLES"):
        monkeypatch.setattr(f"metaaux.training.encoder.EncoderEvaluation.{name}", 2)
    # 1. Convert. The identity network is one of the project's; LPIPS' backbone is SqueezeNet, with random weights.
    generator, judge = networks_of(kind)
    if kind == "eg3d":
        contents = eg3d_contents(generator, judge, avg_camera_pivot=PIVOT, avg_camera_radius=2.7)
    else:
        contents = stylegan2_contents(generator, judge)
    run("convert", kind, write(tmp_path / "model.pkl", contents), "converted")
    torch.save(LPIPS("squeeze").state_dict(), "squeezenet.pth")
    run("convert", "lpips", "squeezenet.pth", "converted")
    tiny_components["identity"].save_pretrained("converted/identity")

    # 2. Train, each part on those before.
    shared = {
        "generator": "converted/generator",
        "discriminator": "converted/discriminator",
        "identity": "converted/identity",
        "perceptual": "converted/perceptual",
    }
    inner = {"steps": 1, "loss": LOSS, "order": "second", "tasks_per_pass": 1}
    auxiliary = {
        "networks": {**shared, "encoder": "runs/encoder/latest/encoder"},
        "inner": inner,
        "outer": {"loss": LOSS, "sample_fraction": 0.5},
        "batch": 2,
        "run": {"total_images": 2, **RUN},
    }
    arguments = TINY_AUXILIARY | (OFFSETS if kind == "eg3d" else {})
    configurations = {
        "encoder": {
            "networks": shared,
            "encoder": {"input_size": IMAGE_SIZE, **TINY_ENCODER},
            "batch": {"photos": 1, "samples": 1, "rendered_samples": 1},
            "curriculum": {"latent_only_images": 2, "coarse_resolution": 4},
            "run": {"total_images": 4, **RUN},
        },
        "plain": {**auxiliary, "phase": "plain", "auxiliary": {"arguments": arguments}},
        "meta": {
            **auxiliary,
            "phase": "meta",
            "auxiliary": {"initial": "runs/plain/latest/auxiliary_average"},
        },
        "directions": {
            "generator": "converted/generator",
            "identity": "converted/identity",
            "sampling": {"heads": 2, "shard": 2, "batch": 2, "workers": 1},
            "components": 1,
            "calibration": {"heads": 1},
        },
    }
    for name, configuration in configurations.items():
        if name != "directions":
            configuration = {**configuration, "data": {"path": str(face_zip)}}
        # As a file holds it: lists, no tuples.
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(configuration))))
        part = "auxiliary" if name in ("plain", "meta") else name
        run("train", part, "--config", f"{name}.yaml", "--run", f"runs/{name}")

    # 3. Put together, publish.
    parts = {
        **shared,
        "encoder": "runs/encoder/latest/encoder",
        "auxiliary": "runs/meta/latest/auxiliary_average",
        "directions": "runs/directions/latent_directions",
    }
    options = [word for name, folder in parts.items() for word in (f"--{name}", folder)]
    run("assemble", "assembled", *options, "--variant", "fp16", "--license", "other", "--set", "inner_steps=2")
    run("push", "assembled", REPO)

    # 4. What somebody else gets.
    inverter = MetaAuxInverter.from_pretrained(REPO)
    inverter.set_progress_bar_config(disable=True)
    config = inverter.config
    weights = {"perceptual": config.weight_perceptual, "identity": config.weight_identity}
    assert {"mse": 1.0, **weights, "adversarial": config.weight_adversarial} == LOSS
    assert inverter.perceptual.kind == "features-squeeze" and "other" in inverter.card
    assert type(inverter.generator) is type(generator)
    assert all(torch.equal(a, b) for a, b in zip(inverter.generator.parameters(), generator.parameters(), strict=True))
    inversion = inverter.invert(crops[1], camera=cameras[1])
    assert [step["step"] for step in inversion.steps] == [-1, 0, 1, 2]
    assert all(torch.isfinite(torch.tensor(list(step.values()))).all() for step in inversion.steps)
    inversion.save("me.safetensors")
    loaded = Inversion.load("me.safetensors", fingerprint=inverter.fingerprint)
    plain, edited = inverter.render(loaded), inverter.render(loaded, edits={"pc1": 3})
    assert plain.size == edited.size == (IMAGE_SIZE, IMAGE_SIZE) and plain.tobytes() != edited.tobytes()
    if kind == "eg3d":
        assert list(inverter.generator.config.camera_pivot) == PIVOT
        assert inverter.render(loaded, yaw=20).tobytes() != plain.tobytes()
    else:
        assert inversion.offset_planes is None
        with pytest.raises(ValueError, match="one view"):
            inverter.render(loaded, yaw=20)
