"""Fixtures: a complete pipeline of the real classes at tiny sizes, with random weights, and inputs for it."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path

# Libraries read it when they are imported, here and in processes that tests start; see `one_thread`.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
IMAGE_SIZE = 32
TINY_AUXILIARY = {
    "backbone_layer_type": "basic",
    "backbone_depths": (1, 1, 1, 1),
    "backbone_embedding_size": 8,
    "backbone_hidden_sizes": (8, 8, 8, 16),
    "neck_channels": 16,
    "hyper_channels": 8,
    "hyper_rank": 2,
    "hyper_convs": 1,
    "inner_learning_rate": 1e-3,
}
#: A 3D generator whose gradients can be compared with finite differences.
SMALLEST_GENERATOR = {
    "z_dim": 4,
    "w_dim": 4,
    "image_size": 32,
    "plane_resolution": 8,
    "plane_features": 4,
    "channel_base": 64,
    "channel_max": 8,
    "decoder_hidden": 4,
    "neural_resolution": 4,
    "depth_samples": 4,
    "super_resolution_kind": "2X",
    "super_resolution_channels": (8, 4),
}
TINY_ENCODER = {
    "num_queries": 2,
    "widths": (16, 16, 16, 16),
    "depths": (1, 1, 1, 1),
    "width": 16,
    "num_blocks": 1,
    "num_heads": 2,
}

#: Files that run the app: one after the other, since two browsers would wait for each other's pages, and two files
#: share a server.
APP_FILES = ("test_app_api", "test_app_browser", "test_app_turn", "test_app_zero_gpu")

# Its assertions are to say what differs, as those of test files do.
pytest.register_assert_rewrite("recordings")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Each file's tests share a process, and with it the fixtures of the file."""
    for item in items:
        name = item.path.stem
        item.add_marker(pytest.mark.xdist_group("app" if name in APP_FILES else name))


def pytest_collection_finish(session):
    """Where pytest-xdist does not group tests, files would be made twice and browsers wait for each other."""
    if hasattr(session.config, "workerinput") and session.items and "@" not in session.items[0].nodeid:
        raise pytest.UsageError("this pytest-xdist does not group the tests of this pytest: see requirements-dev.txt")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny networks are slower on several threads, much so where other programs compute too."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_components():
    """Constructor arguments of a `MetaAuxInverter`: its five networks, 32² images, random weights, eval mode.

    The auxiliary network's last layers, which start at zero, are filled, so that its offsets do something.
    """
    from metaaux.models.auxiliary import AuxiliaryNetwork
    from metaaux.models.discriminator import DualDiscriminator
    from metaaux.models.eg3d import EG3DGenerator
    from metaaux.models.encoder import LatentEncoder
    from metaaux.models.identity import IdentityNetwork

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = EG3DGenerator(
            z_dim=16,
            w_dim=16,
            image_size=IMAGE_SIZE,
            plane_resolution=16,
            plane_features=8,
            channel_base=512,
            channel_max=16,
            decoder_hidden=16,
            neural_resolution=8,
            depth_samples=4,
            importance_samples=4,
            super_resolution_kind="2X",
            # Its own 128 and 64 would take most of the time of a network of this size.
            super_resolution_channels=(32, 16),
        )
        encoder = LatentEncoder(
            image_size=IMAGE_SIZE,
            input_size=IMAGE_SIZE,
            w_dim=16,
            num_ws=generator.num_ws,
            **TINY_ENCODER,
        )
        auxiliary = AuxiliaryNetwork(
            **AuxiliaryNetwork.config_for(
                generator,
                **TINY_AUXILIARY,
                offset_resolution=8,
                offset_channels=8,
                offset_image_features=4,
                camera_channels=8,
            )
        )
        discriminator = DualDiscriminator(image_size=IMAGE_SIZE, channel_base=512, channel_max=16, raw_size=8)
        identity = IdentityNetwork(
            input_size=16, stem_width=16, widths=(16, 16, 16, 16), depths=(1, 1, 1, 1), embedding_dim=16
        )
        with torch.no_grad():
            # Sums of few random channels are far from their mean, and pictures would be cut off at black and white.
            for block in (generator.super_resolution.block0, generator.super_resolution.block1):
                block.torgb.weight *= 0.5
            for module in (encoder.to_offset, auxiliary.offset_network.to_offsets):
                module.weight.normal_(std=0.1)
            for network in auxiliary.hypernetworks.values():
                network.to_a.weight.normal_(std=0.05)
    components = {
        "generator": generator,
        "encoder": encoder,
        "auxiliary": auxiliary,
        "discriminator": discriminator,
        "identity": identity,
    }
    return {name: network.eval().requires_grad_(False) for name, network in components.items()}


@pytest.fixture(scope="session")
def tiny_folder(tiny_components, tmp_path_factory):
    """Folder of a saved tiny pipeline."""
    from metaaux import MetaAuxInverter

    folder = tmp_path_factory.mktemp("models") / "tiny"
    MetaAuxInverter(**tiny_components, crop_scale=1.0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smiling_folder(tiny_components, tmp_path_factory):
    """Folder of a saved tiny pipeline with one editing direction, "smile"."""
    from metaaux import MetaAuxInverter
    from metaaux.models.directions import Direction, LatentDirections

    normal = torch.nn.functional.normalize(torch.arange(1.0, 17.0), dim=0)
    smile = Direction("smile", "interfacegan", normal, 5.0, -3.0, 3.0, 0.9, "smiles more")
    folder = tmp_path_factory.mktemp("smiling-model") / "tiny"
    directions = LatentDirections.from_directions([smile])
    MetaAuxInverter(**tiny_components, latent_directions=directions).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smiling_app(smiling_folder, tmp_path_factory):
    """The demo in a process of its own, with the tiny pipeline that has an editing direction."""
    from app_server import running_app

    from tests import warm

    variables = {"METAAUX_MODELS": str(smiling_folder), "METAAUX_DEVICE": "cpu"}
    with running_app(tmp_path_factory.mktemp("app"), start=warm.Popen, **variables) as app:
        yield app


@pytest.fixture(scope="session")
def tiny_inverter(tiny_folder):
    """The tiny pipeline, loaded from its folder."""
    from metaaux import MetaAuxInverter

    inverter = MetaAuxInverter.from_pretrained(tiny_folder)
    inverter.set_progress_bar_config(disable=True)
    return inverter


@pytest.fixture(scope="session")
def tiny_2d_inverter(tiny_components):
    """A complete 2D pipeline of tiny size."""
    from metaaux import MetaAuxInverter
    from metaaux.models.auxiliary import AuxiliaryNetwork
    from metaaux.models.discriminator import DualDiscriminator
    from metaaux.models.encoder import LatentEncoder
    from metaaux.models.stylegan2 import StyleGAN2Generator

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        generator = StyleGAN2Generator(
            z_dim=16, w_dim=16, mapping_layers=2, image_size=IMAGE_SIZE, channel_base=512, channel_max=16
        )
        auxiliary = AuxiliaryNetwork(**AuxiliaryNetwork.config_for(generator, **TINY_AUXILIARY))
        encoder = LatentEncoder(
            image_size=IMAGE_SIZE, input_size=IMAGE_SIZE, w_dim=16, num_ws=generator.num_ws, **TINY_ENCODER
        )
        discriminator = DualDiscriminator(
            image_size=IMAGE_SIZE, camera_dim=0, channel_base=512, channel_max=16, dual=False
        )
    networks = {
        "generator": generator,
        "encoder": encoder,
        "auxiliary": auxiliary,
        "discriminator": discriminator,
        "identity": tiny_components["identity"],
    }
    for network in networks.values():
        network.eval().requires_grad_(False)
    inverter = MetaAuxInverter(**networks)
    inverter.set_progress_bar_config(disable=True)
    return inverter


@pytest.fixture(scope="session")
def crops():
    """Three smooth pictures that stand in for aligned crops."""
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in range(3)]
    return [image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC) for image in coarse]


@pytest.fixture(scope="session")
def cameras():
    """One camera [25] for each of `crops`."""
    from metaaux.cameras import camera_from_pose

    return torch.stack([camera_from_pose(yaw, pitch) for yaw, pitch in ((0, 0), (12, -4), (-8, 6))])


@pytest.fixture(scope="session")
def batch(crops, cameras):
    """Images [3, 3, S, S] and cameras [3, 25]."""
    from metaaux.export.images import image_to_tensor

    return torch.stack([image_to_tensor(crop) for crop in crops]), cameras


@pytest.fixture(scope="session")
def tiny_inversion(tiny_inverter, crops, cameras):
    """What the tiny pipeline makes of the second crop in two steps."""
    return tiny_inverter.invert(crops[1], steps=2, camera=cameras[1])


@pytest.fixture(scope="session")
def attribute_file(tmp_path_factory):
    """Weights file of an age and gender network with random weights."""
    from safetensors.torch import save_file

    from metaaux.models.age_gender import AgeGenderNetwork

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        network = AgeGenderNetwork()
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp("attributes") / "age_gender.safetensors"
    save_file(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def face_zip(crops, cameras, tmp_path_factory):
    """EG3D data set of `crops` and `cameras`."""
    path = tmp_path_factory.mktemp("data") / "faces.zip"
    with zipfile.ZipFile(path, "w") as archive:
        labels = []
        for index, (crop, camera) in enumerate(zip(crops, cameras)):
            data = io.BytesIO()
            crop.save(data, format="PNG")
            labels.append([f"00/{index:05d}.png", camera.tolist()])
            archive.writestr(labels[-1][0], data.getvalue())
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


@pytest.fixture(scope="module")
def engine(tiny_folder):
    """The demo's engine on the CPU, with the tiny pipeline loaded."""
    from metaaux.demo.engine import Engine
    from metaaux.demo.settings import Settings

    engine = Engine(Settings(models=(str(tiny_folder),), device="cpu"))
    engine.start()
    engine.inverter()
    return engine
