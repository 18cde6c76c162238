"""Activation checkpointing: derivatives of every order, and memory."""

from __future__ import annotations

import pytest
import torch

from metaaux.cameras import camera_from_pose
from metaaux.models.eg3d import EG3DGenerator
from metaaux.models.recomputation import recomputed
from metaaux.training.memory import MemoryCount
from tests.conftest import SMALLEST_GENERATOR


def mixture(x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    x = x if scale is None else x * scale
    return torch.tanh(x) * y, x.square().sum(-1) + y.sum()


@pytest.fixture
def inputs():
    seed = torch.Generator().manual_seed(3)
    return [torch.randn(3, 2, dtype=torch.float64, generator=seed).requires_grad_() for _ in range(2)]


def test_first_and_second_derivatives_equal_finite_differences(inputs):
    assert torch.autograd.gradcheck(lambda x, y: recomputed(mixture, x, y, None), inputs)
    assert torch.autograd.gradgradcheck(lambda x, y: recomputed(mixture, x, y, None), inputs)


def test_third_derivatives_and_nested_recomputation_are_those_of_the_function_itself(inputs):
    def nested(x, y, scale):
        return recomputed(lambda x, y: tuple(recomputed(mixture, x, y, scale)), x, y)

    def third(function):
        first, second = function(*inputs, torch.tensor(0.5))
        value = first.square().sum() + second.prod()
        for _ in range(2):
            gradients = torch.autograd.grad(value, inputs, create_graph=True)
            value = sum(gradient.square().sum() for gradient in gradients)
        return torch.autograd.grad(value, inputs)

    for actual, expected in zip(third(nested), third(mixture), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def test_only_what_is_wanted_has_a_derivative(inputs):
    x, y = inputs
    first, second = recomputed(mixture, x, y.detach(), None)
    expected = torch.autograd.grad(mixture(x, y, None)[0].sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(first.sum(), x, retain_graph=True)[0], expected)
    first, second = recomputed(lambda x: (x * 2, torch.ones(2)), x)  # the second output depends on nothing
    torch.testing.assert_close(torch.autograd.grad(first.sum() + second.sum(), x)[0], torch.full_like(x, 2))
    assert not recomputed(mixture, x.detach(), y.detach(), None)[0].requires_grad


def test_no_order_of_derivative_keeps_what_it_can_compute_again():
    def body(x):
        for _ in range(8):
            x = torch.tanh(x) * x
        return (x,)

    def peaks(function):
        """Most that the first derivative and then the second one hold, in tensors of the size of x."""
        x = torch.randn(1000, device="meta", requires_grad=True)
        with MemoryCount() as memory:
            y = x
            for _ in range(6):
                (y,) = function(y)
            (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            kept = memory.bytes
            torch.autograd.grad(first.square().sum(), x)
        return kept / 4000, memory.peak / 4000

    plain, spared = peaks(body), peaks(lambda x: recomputed(body, x))
    assert plain[0] > 150 and plain[1] >= plain[0]
    assert spared[0] < 15  # inputs of bodies and of their derivatives
    assert spared[1] < 0.3 * plain[1]


def test_memory_is_counted_while_it_is_held():
    with MemoryCount() as memory:
        first = torch.zeros(1000, device="meta")
        second = first.view(10, 100) + 1
        assert memory.bytes == 8000  # a view has no memory of its own
        del first, second
        torch.ones(500, device="meta")
    assert (memory.bytes, memory.peak) == (0, 8000)


@pytest.mark.parametrize("order", [1, 2])
def test_rays_in_groups_have_the_derivatives_of_all_at_once(monkeypatch, order):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        generator = EG3DGenerator(**SMALLEST_GENERATOR, importance_samples=3)
        generator.double().eval().requires_grad_(False)
        inputs = [torch.randn(2, 3, 4, 8, 8).double(), 0.1 * torch.randn(2, 3, 3, 4, 4).double()]
    camera = torch.stack([camera_from_pose(5, 0), camera_from_pose(-12, 3)]).double()

    def derivative(rays_at_once):
        generator.rays_at_once = rays_at_once
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        rendering = generator.render(leaves[0], camera, offset_planes=leaves[1], lookup="gather")
        value = rendering.features.square().sum() + rendering.depth.sum() + rendering.opacity.sum()
        for _ in range(order - 1):
            value = sum(g.square().sum() for g in torch.autograd.grad(value, leaves, create_graph=True))
        return [value, *torch.autograd.grad(value, leaves)]

    for actual, expected in zip(derivative(5), derivative(None), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_jitter_is_drawn_once(tiny_components):
    """The backward pass must see the samples that the forward pass saw."""
    generator = EG3DGenerator(**{k: v for k, v in tiny_components["generator"].config.items() if k[0] != "_"}).eval()
    generator.requires_grad_(False).rays_at_once = 16
    planes = torch.randn(1, 3, 8, 16, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    camera = camera_from_pose(0, 0)[None]

    def render(planes):
        torch.manual_seed(2)
        return generator.render(planes, camera, jitter=True).features.square().sum()

    (gradient,) = torch.autograd.grad(render(planes), planes)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        values = [render(planes + step * direction) for step in (1e-2, -1e-2)]
    assert (gradient * direction).sum().item() == pytest.approx((values[0] - values[1]).item() / 2e-2, rel=2e-2)
