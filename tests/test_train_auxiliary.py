"""Training of the auxiliary network: task batching, calibration, both phases, resumption. Its gradients are tested in
test_meta_gradients.py."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from metaaux.adaptation import InnerLoop, InnerProblem, adapt
from metaaux.losses import InversionLoss, LossWeights
from metaaux.models.auxiliary import AuxiliaryNetwork
from metaaux.models.perceptual import DiscriminatorPerceptualDistance
from metaaux.models.views import private_view
from metaaux.tasks import predict_tasks
from metaaux.training.auxiliary import AuxiliaryConfig, train
from metaaux.training.calibration import calibrate_rates
from metaaux.training.loading import FrozenNetworks
from metaaux.training.meta import mean_of_passes, meta_objective
from metaaux.training.phases import InnerSettings, OuterSettings, make_auxiliary
from metaaux.training.plain import plain_objective
from tests.nested import nested

CONFIGS = Path(__file__).resolve().parent.parent / "metaaux" / "configs"


@pytest.fixture(scope="module")
def networks(tiny_components):
    parts = tiny_components
    distance = DiscriminatorPerceptualDistance(parts["discriminator"])
    losses = [
        InversionLoss(weights, distance, parts["identity"], parts["discriminator"])
        for weights in (LossWeights(), LossWeights(perceptual=0.1))
    ]
    return FrozenNetworks(parts["generator"], parts["encoder"], *losses)


@pytest.fixture(scope="module")
def tasks(networks, cameras):
    size = networks.generator.config.image_size
    coarse = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(7)) * 2 - 1
    image = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(-1, 1)
    return networks.tasks(image, cameras[:2])


@pytest.fixture(scope="module")
def folders(tiny_components, tmp_path_factory):
    """The networks' folders and a data set of four pictures, as settings of a configuration."""
    root = tmp_path_factory.mktemp("auxiliary")
    settings = {}
    for name in ("generator", "encoder", "discriminator", "identity"):
        tiny_components[name].save_pretrained(root / name)
        settings[name] = str(root / name)
    data = root / "data"
    data.mkdir()
    size = tiny_components["generator"].config.image_size
    from metaaux.cameras import camera_from_pose

    labels = []
    for index, yaw in enumerate((0, 8, -14, 22)):
        Image.linear_gradient("L").rotate(90 * index).resize((size, size)).convert("RGB").save(data / f"{index}.png")
        labels.append([f"{index}.png", camera_from_pose(yaw, 0).tolist()])
    (data / "dataset.json").write_text(json.dumps({"labels": labels}))
    return {"networks": settings, "data": {"path": str(data), "validation": str(data)}}


def tiny_config(folders, tiny_components, **changes) -> AuxiliaryConfig:
    network = {k: v for k, v in tiny_components["auxiliary"].config.items() if not k.startswith("_")}
    for key in ("layer_shapes", "image_size", "plane_features", "plane_resolution", "box_size"):
        del network[key]  # the generator's
    settings = {
        **folders,
        "auxiliary": {"arguments": network},
        "batch": 2,
        "inner": {"steps": 1, "tasks_per_pass": 2},
        "optimiser": {"learning_rate": 5e-4, "final_learning_rate": 0.05, "warmup_images": 1},
        "average": {"half_life_images": 10},
        "validation_photos": 2,
        "run": {"total_images": 4, "interval_images": 4},
    }
    return AuxiliaryConfig(**nested(settings, **changes))


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "figures.jsonl").read_text().splitlines()]


def test_tasks_side_by_side_come_out_as_alone(networks, tasks, tiny_components):
    """The batched inner loop of training and `adapt` of inference are the same algorithm."""
    auxiliary = private_view(tiny_components["auxiliary"])
    auxiliary.register_to_config(inner_momentum=0.4, inner_max_gradient_norm=0.5)
    rates = {name: torch.tensor(1e-3) for name in auxiliary.adaptable_parameters()}
    leaves = {n: p.detach().clone().requires_grad_() for n, p in auxiliary.adaptable_parameters().items()}
    inner = InnerLoop.of(auxiliary, 2, rates=rates)
    adapted, seen = InnerProblem(networks.generator, auxiliary, networks.inner_loss, tasks, inner).run(leaves)
    offsets = predict_tasks(auxiliary, adapted, tasks)
    for i in range(2):
        part = slice(i, i + 1)
        images = {}
        result = adapt(
            networks.generator,
            auxiliary,
            networks.inner_loss,
            tasks.image[part],
            tasks.w[part],
            tasks.camera[part],
            steps=2,
            learning_rates=rates,
            on_step=lambda step, image, _, images=images: images.update({step: image}),
        )
        for name, parameter in result.parameters.items():
            torch.testing.assert_close(adapted[name][i], parameter, atol=1e-5, rtol=1e-4)
        for step in range(2):
            torch.testing.assert_close(seen[step].image[part], images[step], atol=1e-4, rtol=1e-3)
        for name, offset in result.weight_offsets.items():
            torch.testing.assert_close(offsets.weight_offsets[name][i], offset, atol=1e-5, rtol=1e-3)


def test_plain_objective_is_the_loss_of_the_prediction(networks, tasks, tiny_components):
    auxiliary = tiny_components["auxiliary"]
    objective, figures = plain_objective(networks, auxiliary, tasks)
    output = auxiliary(tasks.image, tasks.camera, tasks.planes)
    view = networks.generator.synthesize(tasks.w, tasks.camera, output.weight_offsets, output.offset_planes)
    expected = networks.outer_loss(view.image, view.image_raw, tasks.image, tasks.camera)
    torch.testing.assert_close(objective, expected["total"].mean())
    torch.testing.assert_close(figures["mse"], (view.image - tasks.image).square().mean())


def test_inner_loop_with_a_generator_in_half_precision(networks, tasks, tiny_components):
    auxiliary = tiny_components["auxiliary"]
    rates = {name: torch.tensor(1e-3) for name in auxiliary.adaptable_parameters()}
    images = {}
    for dtype in (None, torch.bfloat16):
        leaves = {n: p.detach().clone().requires_grad_() for n, p in auxiliary.adaptable_parameters().items()}
        inner = InnerLoop(2, rates, 0.5, dtype=dtype)
        problem = InnerProblem(networks.generator, auxiliary, networks.inner_loss, tasks, inner)
        images[dtype] = problem.run(leaves)[1][-1].image
    difference = (images[None] - images[torch.bfloat16]).abs()
    assert 0 < difference.max() < 0.05


def test_calibrated_rates_move_each_tensor_by_the_same_fraction(networks, tasks, tiny_components):
    from accelerate import Accelerator

    config = {k: v for k, v in tiny_components["auxiliary"].config.items() if not k.startswith("_")}
    auxiliary = AuxiliaryNetwork(**config).eval()
    auxiliary.load_state_dict(tiny_components["auxiliary"].state_dict())
    part = tasks.split(1)[0]
    calibrate_rates(networks, auxiliary, part, 1e-3, Accelerator())
    result = adapt(networks.generator, auxiliary, networks.inner_loss, part.image, part.w, part.camera, steps=1)
    moved = 0
    for name, parameter in auxiliary.adaptable_parameters().items():
        change = (result.parameters[name] - parameter).square().mean().sqrt()
        size = parameter.square().mean().sqrt().clamp(min=0.01)
        if change > 0:
            moved += 1
            torch.testing.assert_close(change / size, torch.tensor(1e-3), rtol=0.05, atol=0)
    assert moved > 0.9 * len(auxiliary.adaptable_parameters())
    rates = []
    for at_once in (None, 1):
        calibrate_rates(networks, auxiliary, tasks, 1e-3, Accelerator(), at_once)
        rates.append(auxiliary.log_inner_rates.clone())
    torch.testing.assert_close(*rates, rtol=0, atol=1e-3)
    calibrate_rates(networks, auxiliary, tasks, 1e-3, Accelerator(), 1, backbone=0.1)
    less = (auxiliary.log_inner_rates - rates[1]).exp()
    of_backbone = torch.tensor([name.startswith("backbone.") for name in auxiliary.adaptable_parameters()])
    assert of_backbone.any() and not of_backbone.all()
    torch.testing.assert_close(less, torch.where(of_backbone, 0.1, 1.0))


def test_tensors_without_a_gradient_get_the_least_calibrated_rate(networks, tasks, tiny_components):
    """Those before layers that are zero yet: a step with the rate they had would lead far once these are not."""
    from accelerate import Accelerator

    config = {k: v for k, v in tiny_components["auxiliary"].config.items() if not k.startswith("_")}
    auxiliary = AuxiliaryNetwork(**config).eval()
    calibrate_rates(networks, auxiliary, tasks.split(1)[0], 1e-3, Accelerator())
    rates = auxiliary.inner_rates()
    behind_zeros = {
        rate.item() for name, rate in rates.items() if ".convs." in name or "backbone" in name.split(".")[0]
    }
    others = {rate.item() for name, rate in rates.items() if name.endswith("to_a.weight")}
    assert len(behind_zeros) == 1 and len(others) > 1
    assert behind_zeros == {min(rate.item() for rate in rates.values())}
    with torch.no_grad():
        auxiliary.log_inner_rates.fill_(0.5)
    parts = tiny_components["discriminator"], tiny_components["identity"]
    nothing = InversionLoss.from_components(LossWeights(0.0, 0.0, 0.0, 0.0), *parts)
    blind = FrozenNetworks(networks.generator, networks.encoder, nothing, nothing)
    with pytest.raises(ValueError, match="nothing to calibrate"):
        calibrate_rates(blind, auxiliary, tasks.split(1)[0], 1e-3, Accelerator())
    assert (auxiliary.log_inner_rates == 0.5).all()


def test_plain_phase_trains_saves_and_resumes(folders, tiny_components, tmp_path):
    config = tiny_config(folders, tiny_components, outer__sample_fraction=0.5)
    assert train(config, tmp_path) is True
    first = tmp_path / "checkpoint-4"
    network = AuxiliaryNetwork.from_pretrained(first / "auxiliary")
    statistics = network.backbone.embedder.embedder.normalization
    assert statistics.running_mean.abs().max() > 0  # learnt in training mode
    assert network.log_inner_rates.unique().numel() > 1  # calibrated
    figures = {name: value for line in lines_of(tmp_path) for name, value in line.items()}
    assert {"mse", "total", "validation_mse_step_-1", "validation_mse_step_0", "validation_mse_step_1"} <= set(figures)
    assert all(math.isfinite(value) for value in figures.values())
    assert any((tmp_path / "sheets").glob("inversion-*.png"))

    with pytest.raises(FileExistsError, match="resume"):
        train(config, tmp_path)
    config.run.total_images = 8
    assert train(config, tmp_path, resume=True) is True
    second = AuxiliaryNetwork.from_pretrained(tmp_path / "checkpoint-8" / "auxiliary")
    assert any(not torch.equal(a, b) for a, b in zip(network.parameters(), second.parameters(), strict=True))
    assert [line["images"] for line in lines_of(tmp_path) if "mse" in line] == [4, 8]


@pytest.mark.parametrize("order", ["first", "second"])
def test_meta_phase_starts_from_a_network_and_learns_rates(folders, tiny_components, tmp_path, order):
    tiny_components["auxiliary"].save_pretrained(tmp_path / "initial")
    config = tiny_config(
        folders,
        tiny_components,
        phase="meta",
        inner__order=order,
        inner__max_gradient_norm=2.0,
        inner__resolution=4,
        inner__tasks_per_pass=1,
        outer__max_gradient_norm=1e-6,
        optimiser__learning_rate=1e-3,
        auxiliary={
            "initial": str(tmp_path / "initial"),
            "offset_bias_resolution": 16,
            "full_kernel_layers": ["backbone.b8"],
        },
    )
    assert train(config, tmp_path / "run") is True
    saved = AuxiliaryNetwork.from_pretrained(tmp_path / "run" / "checkpoint-4" / "auxiliary")
    averaged = AuxiliaryNetwork.from_pretrained(tmp_path / "run" / "checkpoint-4" / "auxiliary_average")
    initial = tiny_components["auxiliary"]
    ablation = config.model_copy(update={"auxiliary": config.auxiliary.model_copy(update={"without": "2d"})})
    ablation.auxiliary.full_kernel_layers = ()
    assert not make_auxiliary(ablation, tiny_components["generator"]).layer_names
    assert saved.config.inner_max_gradient_norm == averaged.config.inner_max_gradient_norm == 2.0
    assert saved.config.offset_bias_resolution == averaged.config.offset_bias_resolution == 16
    assert saved.get_parameter("hypernetworks.backbone-b8-conv0.bias").shape[2:] == (3, 3)
    for name, parameter in saved.adaptable_parameters().items():
        before = initial.get_parameter(name)
        assert torch.isfinite(parameter).all()
        if name.endswith("to_a.weight"):
            assert not torch.equal(parameter, before), name
    buffers = dict(initial.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in saved.named_buffers())  # eval statistics
    figures = lines_of(tmp_path / "run")
    assert any("validation_mse_step_1" in line for line in figures)
    assert any("mse_before" in line and line["images"] == 4 for line in figures)
    assert all(line["passes_shortened"] == 1 and line["gradient_norm"] < 1.1e-6 for line in figures if "mse" in line)


def test_a_pass_that_ran_apart_counts_no_more_than_the_others():
    usual, long = torch.tensor([0.3, 0.4]), torch.tensor([0.0, -1e6])
    mean, share = mean_of_passes([usual, long], None)
    assert torch.equal(mean, torch.tensor([0.15, -499_999.8])) and share == 0
    mean, share = mean_of_passes([usual, long], 1.0)
    torch.testing.assert_close(mean, torch.tensor([0.15, -0.3]))
    assert share == 0.5
    for broken in (torch.tensor([math.nan, 1.0]), torch.tensor([math.inf, 1.0])):
        mean, share = mean_of_passes([usual, broken, 2 * usual], 1.0)
        torch.testing.assert_close(mean, 1.5 * usual)
        assert share == pytest.approx(1 / 3)
        assert not mean_of_passes([broken, broken], 1.0)[0].isfinite().any()


def test_rates_can_stay_fixed(networks, tasks, tiny_components):
    auxiliary = tiny_components["auxiliary"]
    auxiliary.requires_grad_(True)
    try:
        for learn in (True, False):
            auxiliary.zero_grad(set_to_none=True)
            inner = InnerSettings(steps=1, learn_rates=learn, order="first")
            outer = OuterSettings(multi_step_weight=0.0)
            meta_objective(networks, auxiliary, tasks, inner, outer)[0].backward()
            assert (auxiliary.log_inner_rates.grad is not None) == learn
    finally:
        auxiliary.zero_grad(set_to_none=True)
        auxiliary.requires_grad_(False)


def test_configuration_errors(folders, tiny_components, tmp_path):
    for wrong in ({"phase": "both"}, {"inner__order": "third"}, {"compute__precision": "fp16"}, {"inner__steps": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong)).replace("__", ".")):
            tiny_config(folders, tiny_components, **wrong)
    for wrong in (
        {"inner__checkpoint": True},
        {"compute__rays_at_once": 64},
        {"compute__graphs": False, "compute__micro_batch": 2},
    ):
        with pytest.raises(ValueError, match="compute.graphs: false|graphs: false|tasks_per_pass divides"):
            tiny_config(folders, tiny_components, phase="meta", **wrong)
    compiled = {"phase": "meta", "compute__compile": True}
    assert tiny_config(folders, tiny_components, inner__order="first", **compiled).compute.compile
    with pytest.raises(ValueError, match="no second derivative"):
        tiny_config(folders, tiny_components, inner__order="second", **compiled)
    with pytest.raises(ValueError, match="tasks_per_pass"):
        train(tiny_config(folders, tiny_components, phase="meta", batch=3), tmp_path / "run")
