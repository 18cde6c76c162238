"""Gradients of the auxiliary network's objectives against finite differences, in float64."""

# ruff: noqa: F811, fixtures of another module are arguments here

from __future__ import annotations

import math

import pytest
import torch

from metaaux.adaptation import InnerLoop, InnerProblem
from metaaux.cameras import camera_from_pose
from metaaux.losses import InversionLoss, LossWeights
from metaaux.models.auxiliary import AuxiliaryNetwork
from metaaux.models.discriminator import DualDiscriminator
from metaaux.models.eg3d import EG3DGenerator
from metaaux.tasks import Tasks
from metaaux.training.loading import FrozenNetworks
from metaaux.training.memory import MemoryCount
from metaaux.training.meta import meta_objective
from metaaux.training.plain import plain_objective
from tests.conftest import SMALLEST_GENERATOR
from tests.test_train_auxiliary import folders, tiny_config  # noqa: F401, one is a fixture


@pytest.fixture
def smooth_problem(tiny_components, monkeypatch):
    """Real networks in float64, so small that the outer gradient can be compared with finite differences.

    What the networks convert to float32 by `Tensor.float` stays in float64 here. The backbone's ReLUs make the
    objective only piecewise smooth; the differences are small enough to stay in one piece.
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        generator = EG3DGenerator(**SMALLEST_GENERATOR, importance_samples=0)
        auxiliary = AuxiliaryNetwork(
            **AuxiliaryNetwork.config_for(
                generator,
                prefixes=("backbone.b8.",),
                backbone_layer_type="basic",
                backbone_depths=(1, 1, 1, 1),
                backbone_embedding_size=4,
                backbone_hidden_sizes=(4, 4, 4, 4),
                neck_channels=4,
                hyper_channels=4,
                hyper_rank=2,
                hyper_convs=1,
                offset_resolution=4,
                offset_channels=4,
                offset_image_features=2,
                camera_channels=4,
                inner_learning_rate=0.05,
            )
        )
        with torch.no_grad():
            auxiliary.offset_network.to_offsets.weight.normal_(std=0.3)
            for hypernetwork in auxiliary.hypernetworks.values():
                hypernetwork.to_a.weight.normal_(std=0.3)
        discriminator = DualDiscriminator(image_size=32, channel_base=64, channel_max=4, raw_size=4)
        w = torch.randn(2, 4)
        image = torch.rand(2, 3, 32, 32) * 2 - 1
    for network in (generator, discriminator):
        network.double().eval().requires_grad_(False)
    auxiliary.double().eval()
    loss = InversionLoss(LossWeights(perceptual=0, identity=0, adversarial=0.1), None, None, discriminator)
    networks = FrozenNetworks(generator, tiny_components["encoder"], loss, loss)
    camera = torch.stack([camera_from_pose(5, 0), camera_from_pose(-12, 3)]).double()
    yield networks, auxiliary, Tasks(image, camera, w, generator.planes(w))
    torch.set_default_dtype(torch.float32)


def outer_gradients(problem, config, names):
    """Those of the named parameters, by name."""
    networks, auxiliary, tasks = problem
    objective, _ = meta_objective(networks, auxiliary, tasks, config.inner, config.outer)
    gradients = torch.autograd.grad(objective, [auxiliary.get_parameter(name) for name in names])
    return dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize("multi_step_weight", [0.0, 0.3])
def test_second_order_gradient_equals_finite_differences_and_first_order_does_not(
    smooth_problem, folders, tiny_components, multi_step_weight
):
    networks, auxiliary, tasks = smooth_problem
    config = tiny_config(folders, tiny_components, inner__steps=2, outer__multi_step_weight=multi_step_weight)
    assert meta_objective(networks, auxiliary, tasks, config.inner, config.outer)[0].dtype == torch.float64
    configs = {
        order: tiny_config(
            folders,
            tiny_components,
            inner__steps=2,
            inner__order=order,
            outer__multi_step_weight=multi_step_weight,
        )
        for order in ("first", "second")
    }
    names = ["hypernetworks.backbone-b8-conv1.bias", "offset_network.bias", "neck.bias", "log_inner_rates"]
    gradients = {order: outer_gradients(smooth_problem, configs[order], names) for order in configs}
    deviations = {"second": 0.0, "first": 0.0}
    for name in names:
        parameter = auxiliary.get_parameter(name)
        direction = gradients["second"][name] / gradients["second"][name].norm()
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(step * direction)
            values.append(meta_objective(networks, auxiliary, tasks, config.inner, config.outer)[0].item())
            with torch.no_grad():
                parameter.sub_(step * direction)
        numeric = (values[0] - values[1]) / 2e-5
        for order in deviations:
            error = abs((gradients[order][name] * direction).sum().item() - numeric) / abs(numeric)
            deviations[order] = max(deviations[order], error)
    assert deviations["second"] < 1e-3
    assert deviations["first"] > 10 * deviations["second"] and deviations["first"] > 1e-3


@pytest.mark.parametrize("momentum, rays_at_once", [(0.0, None), (0.4, 6)])
def test_checkpointed_second_order_gradient_equals_the_one_without_and_finite_differences(
    smooth_problem, folders, tiny_components, momentum, rays_at_once
):
    networks, auxiliary, tasks = smooth_problem
    auxiliary.register_to_config(inner_momentum=momentum, inner_max_gradient_norm=0.3 if momentum else None)
    config = tiny_config(folders, tiny_components, inner__steps=2, outer__multi_step_weight=0.5 * momentum)
    parameters = [*auxiliary.adaptable_parameters().values(), auxiliary.log_inner_rates]

    def objective():
        return meta_objective(networks, auxiliary, tasks, config.inner, config.outer)

    expected = objective()
    expected_gradients = torch.autograd.grad(expected[0], parameters)
    config.inner.checkpoint = True
    networks.generator.rays_at_once = rays_at_once
    actual = objective()
    gradients = torch.autograd.grad(actual[0], parameters)
    assert list(actual[1]) == list(expected[1])
    for name, value in actual[1].items():
        torch.testing.assert_close(value, expected[1][name], rtol=1e-12, atol=0)
    largest = max(gradient.abs().max() for gradient in expected_gradients).item()
    for gradient, value in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, value, rtol=1e-9, atol=1e-12 * largest)

    directions = [gradient / torch.cat([g.flatten() for g in gradients]).norm() for gradient in gradients]
    slope = sum((gradient * direction).sum() for gradient, direction in zip(gradients, directions, strict=True))
    values = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(step * direction)
            values.append(objective()[0].item())
    assert slope.item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)


def test_checkpointed_steps_hold_the_graph_of_one(smooth_problem, folders, tiny_components):
    networks, auxiliary, tasks = smooth_problem

    def peak(steps):
        config = tiny_config(folders, tiny_components, inner__steps=steps, outer__multi_step_weight=0.0)
        config.inner.checkpoint = True
        with MemoryCount() as memory:
            objective, _ = meta_objective(networks, auxiliary, tasks, config.inner, config.outer)
            torch.autograd.grad(objective, list(auxiliary.parameters()))
        return memory.peak

    # One step more is the parameters of each task once more instead of a graph, which is hundreds of times as large.
    state = len(tasks) * sum(8 * parameter.numel() for parameter in auxiliary.parameters())
    assert peak(2) - peak(1) <= 2 * state


def test_losses_on_the_way_have_first_order_gradients(smooth_problem):
    """Their gradients come from those that the steps take, and equal what derives with these for constants."""
    networks, auxiliary, tasks = smooth_problem
    parameters = auxiliary.adaptable_parameters()
    name = "hypernetworks.backbone-b8-conv1.bias"

    def losses():
        inner = InnerLoop.of(auxiliary, 2, rates=rates, losses=True)
        problem = InnerProblem(networks.generator, auxiliary, networks.inner_loss, tasks, inner)
        return [step.loss for step in problem.run(parameters)[1]]

    rates = auxiliary.inner_rates()
    before, after = losses()
    offsets = auxiliary(tasks.image, tasks.camera, tasks.planes)
    output = networks.generator.synthesize(tasks.w, tasks.camera, **vars(offsets))
    direct = networks.inner_loss(output.image, output.image_raw, tasks.image, tasks.camera)["total"].mean()
    torch.testing.assert_close(before, direct)
    expected = torch.autograd.grad(direct, list(parameters.values()))
    gradients = torch.autograd.grad(before, list(parameters.values()), retain_graph=True)
    for gradient, value in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, value)

    # The first step's gradient does not depend on its rate, so here the derivative is the whole one.
    slope = torch.autograd.grad(after, rates[name])[0]
    values = []
    for step in (1e-4, -1e-4):
        rates = {**auxiliary.inner_rates(), name: auxiliary.inner_rates()[name] + step}
        values.append(losses()[1].item())
    assert slope.item() == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-3)


@pytest.mark.parametrize("rays_at_once", [None, 6])
def test_micro_batches_have_the_gradient_of_the_whole_batch(smooth_problem, rays_at_once):
    """Batch statistics too are those of the whole batch."""
    networks, auxiliary, tasks = smooth_problem
    auxiliary.train()
    # Parts of one picture would be rendered by another formula, which rounds otherwise.
    camera, w = (torch.cat([tensor, tensor.flip(0)]) for tensor in (tasks.camera, tasks.w))
    four = Tasks(torch.cat([tasks.image, tasks.image.flip(-2)]), camera, w, networks.generator.planes(w))

    def gradients(**options):
        objective, figures = plain_objective(networks, auxiliary, four, **options)
        return torch.autograd.grad(objective, list(auxiliary.adaptable_parameters().values())), figures

    expected, expected_figures = gradients()
    networks.generator.rays_at_once = rays_at_once
    actual, actual_figures = gradients(micro_batch=2)
    largest = max(gradient.abs().max() for gradient in expected).item()
    assert math.isfinite(largest) and largest > 0
    for gradient, value in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, value, rtol=1e-9, atol=1e-10 * largest)
    for name, value in expected_figures.items():
        torch.testing.assert_close(actual_figures[name], value, rtol=1e-12, atol=0)
