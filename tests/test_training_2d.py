"""Training around a 2D generator (Sec. 4.5): encoder, both phases of the auxiliary network, directions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from metaaux.cameras import camera_from_pose, pose_of_camera
from metaaux.data.dataset import FaceDataset
from metaaux.data.sampler import FaceSampler
from metaaux.hub.loading import load_component
from metaaux.models.auxiliary import AuxiliaryNetwork
from metaaux.models.directions import LatentDirections
from metaaux.models.encoder import LatentEncoder
from metaaux.models.recogniser import FaceRecogniser
from metaaux.training import auxiliary, directions, encoder, identity
from metaaux.training.directions import DirectionsConfig
from metaaux.training.loading import sample_cameras
from metaaux.training.plain import PlainTrainer
from tests.conftest import IMAGE_SIZE, TINY_AUXILIARY, TINY_ENCODER

SHORT = {"interval_images": 8, "trackers": []}


@pytest.fixture(scope="module")
def settings(tiny_2d_inverter, face_zip, tmp_path_factory):
    """{"networks": folders of a tiny 2D pipeline's networks, "data": …}; the identity network is the one that cuts
    faces out by their cameras."""
    folder = tmp_path_factory.mktemp("training-2d")
    networks = {name: getattr(tiny_2d_inverter, name) for name in ("generator", "encoder", "discriminator")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        networks["identity"] = FaceRecogniser(widths=(8, 8), depths=(1, 1), embedding_dim=8)
    for name, network in networks.items():
        network.save_pretrained(folder / name)
    return {
        "networks": {name: str(folder / name) for name in networks},
        "data": {"path": str(face_zip), "validation": str(face_zip)},
    }


def lines_of(folder):
    return [json.loads(line) for line in (folder / "figures.jsonl").read_text().splitlines()]


def moved(network, other) -> float:
    """Largest change of a parameter."""
    pairs = zip(network.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def test_cameras_of_what_it_makes(tiny_2d_inverter, tiny_inverter, face_zip, cameras):
    sampler = FaceSampler(FaceDataset(face_zip, IMAGE_SIZE), 1, "cpu", mirror=False)
    drawn = sample_cameras(tiny_inverter.generator, sampler, 8)
    assert (
        all(any(torch.equal(camera, known) for known in cameras) for camera in drawn) and len(drawn.unique(dim=0)) > 1
    )
    made = sample_cameras(tiny_2d_inverter.generator, sampler, 8)
    assert torch.equal(made, camera_from_pose(0.0, 0.0).expand(8, 25))


def test_photos_need_no_cameras(settings, crops, tmp_path):
    """As StyleGAN2's own FFHQ has none."""
    for number, crop in enumerate(crops):
        crop.save(tmp_path / f"{number}.png")
    data = {"path": str(tmp_path), "validation": str(tmp_path)}
    config = auxiliary.AuxiliaryConfig(
        networks=settings["networks"],
        data=data,
        auxiliary={"layer_prefixes": ["backbone."], "arguments": TINY_AUXILIARY},
        run={"total_images": 8, **SHORT},
    )
    trainer = PlainTrainer(config, Accelerator(cpu=True))
    assert trainer.dataset.names == ["0.png", "1.png", "2.png"] and len(trainer.held_out(2)) == 2
    assert torch.equal(trainer.dataset.cameras, camera_from_pose(0.0, 0.0).expand(3, 25))


def test_encoder(settings, tmp_path):
    networks = {key: value for key, value in settings["networks"].items() if key != "encoder"}
    config = encoder.EncoderConfig(
        networks=networks,
        data=settings["data"],
        encoder={"input_size": IMAGE_SIZE, **TINY_ENCODER},
        batch={"photos": 2, "samples": 2, "rendered_samples": 1},
        curriculum={"latent_only_images": 8, "coarse_images": 100, "coarse_resolution": 4},
        run={"total_images": 16, **SHORT},
    )
    checkpoint = encoder.train(config, tmp_path)
    before, after = lines_of(tmp_path)[::2]
    assert "mse" not in before and {"mse", "perceptual", "identity", "latent"} <= after.keys()
    assert all(np.isfinite(value) for line in (before, after) for value in line.values())
    # Photos and their reconstructions; there is no other side to be seen.
    assert Image.open(tmp_path / "sheets" / "encoder-000000016.png").size == (3 * IMAGE_SIZE, 2 * IMAGE_SIZE)
    assert load_component(LatentEncoder, checkpoint / "encoder").to_offset.weight.abs().max() > 0


@pytest.mark.parametrize("phase", ["plain", "meta"])
def test_auxiliary(settings, tmp_path, phase):
    config = auxiliary.AuxiliaryConfig(
        phase=phase,
        networks=settings["networks"],
        data=settings["data"],
        auxiliary={"arguments": TINY_AUXILIARY},
        inner={"steps": 2, "tasks_per_pass": 2, "order": "second"},
        outer={"sample_fraction": 0.5},
        batch=2,
        validation_photos=1,
        run={"total_images": 2, **SHORT},
    )
    auxiliary.train(config, tmp_path)
    means, held_out = lines_of(tmp_path)
    assert all(np.isfinite(value) for line in (means, held_out) for value in line.values())
    assert {"validation_mse_step_-1", "validation_mse_step_0", "validation_mse_step_2"} <= held_out.keys()
    checkpoint = tmp_path / "checkpoint-2"
    trained = load_component(AuxiliaryNetwork, checkpoint / "auxiliary")
    assert trained.offset_network is None
    assert len(trained.layer_names) == 7 and trained.config.inner_loss["identity"] == "FaceRecogniser"
    assert moved(trained, load_component(AuxiliaryNetwork, checkpoint / "auxiliary_average")) > 0
    assert (trained.log_inner_rates - trained.log_inner_rates[0]).abs().max() > 0


def test_directions(settings, attribute_file, tmp_path):
    config = DirectionsConfig(
        generator=settings["networks"]["generator"],
        attributes=str(attribute_file),
        identity=settings["networks"]["identity"],
        sampling={"heads": 60, "shard": 60, "batch": 60, "workers": 1},
        boundaries={"min_accuracy": 0.0, "extremes": 0.45},
        components=2,
        calibration={"heads": 2},
    )
    with pytest.warns(UserWarning, match="no direction smile"):
        directions.train(config, tmp_path)
    found = LatentDirections.from_pretrained(tmp_path / "latent_directions").as_dict()
    report = json.loads((tmp_path / "directions.json").read_text())
    assert {"pc1", "pc2"} <= found.keys() and "age" in found.keys() | report["left_out"].keys()
    # Nobody knows how its heads are turned but those who look: here landmarks, which noise has none of.
    assert report["pose_normals"] == 0
    assert load_file(tmp_path / "samples" / "00000.safetensors")["pose"].isnan().all()


def test_poses_and_colours_of_faces_are_measured():
    pytest.importorskip("mediapipe")
    from metaaux import MetaAuxInverter
    from metaaux.training.attributes import Attributes

    inverter = MetaAuxInverter.from_pretrained()
    generator = inverter.generator
    torch.manual_seed(1)
    frontal, turned = camera_from_pose(torch.tensor([0.0, 20.0]), torch.zeros(2))
    w = generator.mapping(torch.randn(1, generator.config.z_dim), frontal[None], 0.5).detach()
    with torch.no_grad():
        images = torch.cat([generator.synthesize(w, camera[None]).image for camera in (frontal, turned)])
    attributes = Attributes(None, 1, torch.device("cpu"))
    values, colours, poses = attributes.start(images)()
    assert values.shape == (2, len(attributes.names)) and poses.isfinite().all()
    expected = torch.stack(pose_of_camera(torch.stack([frontal, turned])), dim=1)
    assert (poses - expected).abs().max() < 8
    # Skin of any kind has more red than green, and more green than blue.
    red, green, blue = colours[:, :3].unbind(1)
    assert colours.shape == (2, 6) and 0 < blue.min() and (blue < green).all() and (green < red).all()
    assert red.max() < 1


def test_no_identity_network_from_one_view(settings, tmp_path):
    config = identity.IdentityConfig(
        networks={"generator": settings["networks"]["generator"]},
        data=settings["data"],
        run={"total_images": 8, **SHORT},
    )
    with pytest.raises(ValueError, match="cannot show a person twice"):
        identity.train(config, tmp_path)
