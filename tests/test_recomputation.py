"""Activation checkpointing: derivatives of every order, and memory."""

from __future__ import annotations

import pytest
import torch

from metaaux.cameras import camera_from_pose
from metaaux.models.eg3d import EG3DGenerator
from metaaux.models.recomputation import recomputed


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


@pytest.mark.parametrize("order", [1, 2])
def test_rays_in_groups_have_the_derivatives_of_all_at_once(monkeypatch, order):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        generator = EG3DGenerator(
            z_dim=4,
            w_dim=4,
            image_size=32,
            plane_resolution=8,
            plane_features=4,
            channel_base=64,
            channel_max=8,
            decoder_hidden=4,
            neural_resolution=4,
            depth_samples=4,
            importance_samples=3,
            super_resolution_kind="2X",
        )
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
