"""Held-out figures of the auxiliary network's phases, and their compiled passes."""

# ruff: noqa: F811, fixtures of another module are arguments here

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from metaaux.adaptation import adapt
from metaaux.cameras import camera_from_pose, pose_of_camera
from metaaux.data.dataset import FaceDataset, to_signed
from metaaux.losses import InversionLoss, LossWeights
from metaaux.models.auxiliary import AuxiliaryNetwork
from metaaux.models.recogniser import SAME_PERSON, FaceRecogniser
from metaaux.training.auxiliary import train
from metaaux.training.meta import MetaTrainer
from metaaux.training.validation import Validation
from tests.test_train_auxiliary import (  # noqa: F401, some are fixtures
    folders,
    lines_of,
    networks,
    tiny_config,
)


def test_held_out_figures_are_the_adapted_networks_distances_by_the_recogniser(folders, tiny_components, tmp_path):
    torch.manual_seed(0)
    recogniser = FaceRecogniser(widths=(4, 6, 8), depths=(1, 1, 1), embedding_dim=5).eval().requires_grad_(False)
    # So that distances lie on both sides of the limit.
    torch.nn.init.normal_(recogniser.fc.weight, std=1.65)
    recogniser.save_pretrained(tmp_path / "recogniser")
    config = tiny_config(
        folders,
        tiny_components,
        networks__identity=str(tmp_path / "recogniser"),
        inner__steps=2,
        inner__loss={"identity": 3.0, "perceptual": 0.1},
        validation_photos=4,
        run__trackers=[],
        run__total_images=2,
        run__interval_images=2,
    )
    train(config, tmp_path / "run")
    network = AuxiliaryNetwork.from_pretrained(tmp_path / "run" / "checkpoint-2" / "auxiliary_average").eval()
    parts = dict(tiny_components, identity=recogniser)
    generator, weights = parts["generator"], LossWeights(**config.inner.loss)
    loss = InversionLoss.from_components(weights, parts["discriminator"], recogniser)
    dataset = FaceDataset(config.data.validation, generator.config.image_size, mirrored_copies=False)
    distances = {name: [] for name in ("step_-1", "step_0", "step_2", "turned_-20", "turned_20")}
    for photo, camera in zip(to_signed(dataset.load()).split(1), dataset.cameras.split(1), strict=True):
        pictures = {}
        result = adapt(
            generator,
            network,
            loss,
            photo,
            parts["encoder"](photo),
            camera,
            steps=2,
            on_step=lambda step, image, losses, kept=pictures: kept.update({f"step_{step}": image}),
        )
        yaw, pitch = pose_of_camera(camera)
        views = {f"turned_{turn}": camera_from_pose(yaw + turn, pitch) for turn in (-20, 20)}
        for name, view in views.items():
            pictures[name] = generator.synthesize(
                parts["encoder"](photo),
                view,
                weight_offsets=result.weight_offsets,
                offset_planes=result.offset_planes,
            ).image
        for name, values in distances.items():
            seen = recogniser(pictures[name], views.get(name, camera))
            values.append(recogniser.distance(seen, recogniser(photo, camera)))
    last = lines_of(tmp_path / "run")[-1]
    for name, values in distances.items():
        assert last[f"validation_distance_{name}"] == pytest.approx(torch.cat(values).mean().item(), rel=1e-3), name
    same = (torch.cat(distances["step_2"]) < SAME_PERSON).float().mean().item()
    assert last["validation_same_person"] == pytest.approx(same)
    assert 0 < same < 1
    sheet = Image.open(tmp_path / "run" / "sheets" / "inversion-000000002.png")
    assert sheet.size == (4 * dataset[0][0].shape[-1], 6 * dataset[0][0].shape[-1])


def test_compiled_meta_phase_has_the_same_gradient(folders, tiny_components, monkeypatch):
    config = tiny_config(folders, tiny_components, phase="meta", inner__order="first", inner__momentum=0.4)
    flats, graphs = [], []

    def traced(graph, inputs):
        graphs.append(graph)
        return graph.forward

    # What a compiler would make of the graphs takes minutes on a CPU; that they are traced whole is what counts here.
    compile_function, compile_module = torch.compile, torch.nn.Module.compile
    monkeypatch.setattr(torch, "compile", partial(compile_function, backend=traced, fullgraph=True))
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: compile_module(self, backend=traced, fullgraph=True, **how)
    )
    for compiled in (False, True):
        torch.manual_seed(0)
        trainer = MetaTrainer(config, Accelerator())
        trainer.load_data(1)
        if compiled:
            trainer.compile()
        flats.append(trainer.flat_gradient(*trainer.sampler.next())[0])
        # The backbone without and with offsets, colours, super-resolution, the discriminator for both losses.
        assert len(graphs) == (5 if compiled else 0)
    torch.testing.assert_close(*flats)
    trainer.calibrate()
    assert len(graphs) == 5  # other batches than a step's are not compiled


def test_held_out_photos_whose_steps_lead_nowhere_are_counted(folders, networks, tiny_components):
    generator = networks.generator
    dataset = FaceDataset(folders["data"]["path"], generator.config.image_size, limit=2, mirrored_copies=False)
    validation = Validation(networks, dataset, steps=2, tasks_per_pass=2, device=torch.device("cpu"))
    network = copy.deepcopy(tiny_components["auxiliary"])
    assert "validation_failed" not in validation.measure(network)[0]
    network.log_inner_rates.data.fill_(80.0)
    figures, sheet = validation.measure(network)
    assert figures == {"validation_failed": 2}
    size = generator.config.image_size
    assert sheet.crop((0, 3 * size, 2 * size, 4 * size)).getextrema() == ((0, 0),) * 3  # after the steps
    assert sheet.crop((0, size, 2 * size, 2 * size)).getextrema() != ((0, 0),) * 3  # the encoder
