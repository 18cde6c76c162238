"""Volume rendering of tri-planes, each part against its definition."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from eg3d_reference import CORRECT_AXES, RELEASED_AXES, hashed_cameras, inner_points

from metaaux.models import renderer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# Tri-plane look-up


@pytest.mark.parametrize("box", [1.0, 1.6])
@pytest.mark.parametrize("axes", [RELEASED_AXES, CORRECT_AXES, ("yx", "zy")])
def test_gather_equals_grid_sample(axes, box):
    planes = torch.randn(2, len(axes), 4, 6, 9, requires_grad=True)
    points = inner_points(2, 50, 0.7 * box).requires_grad_()
    values = [renderer.sample_planes(planes, points, axes, box, lookup) for lookup in ("gather", "grid_sample")]
    torch.testing.assert_close(*values)
    seed = torch.randn_like(values[0])
    gradients = [torch.autograd.grad((value * seed).sum(), (planes, points)) for value in values]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    assert gradients[0][1].abs().max() > 0.1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_gather_of_a_point_that_is_nowhere(value):
    """Adapted weights that diverge give such points; an index outside would end a process that has a GPU."""
    uv = torch.zeros(1, 2, 2)
    uv[0, 1, 0] = value
    found = renderer.bilinear_gather(torch.ones(1, 3, 4, 4), uv)
    assert (found[0, 0] == 1).all()
    assert found[0, 1].isnan().all() if value != -1e30 else (found[0, 1] == 0).all()


def test_gather_derivatives():
    table = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    # Points off the grid lines, where the look-up has kinks, and some outside
    cell = torch.tensor([[-0.7, 0.3], [0.4, 1.6], [2.5, 2.2], [3.7, 3.4], [9.0, -4.0]], dtype=torch.float64)
    uv = (2 * cell + 1) / torch.tensor([5.0, 4.0], dtype=torch.float64) - 1
    uv = uv.expand(2, -1, -1).clone().requires_grad_()
    assert torch.autograd.gradcheck(renderer.bilinear_gather, (table, uv))
    assert torch.autograd.gradgradcheck(renderer.bilinear_gather, (table, uv))


def test_planes_are_indexed_by_their_axes():
    # A plane that holds its own u coordinate in one channel and v in the other returns the projection.
    side = 64
    centres = (torch.arange(side) + 0.5) / side * 2 - 1
    v, u = torch.meshgrid(centres, centres, indexing="ij")
    plane = torch.stack((u, v))[None, None]
    points = inner_points(1, 20, 0.45)
    for axes in ("xy", "xz", "zx", "zy"):
        expected = points[..., ["xyz".index(a) for a in axes]] * 2
        torch.testing.assert_close(renderer.sample_planes(plane, points, (axes,), 1.0), expected)


def test_unknown_lookup_is_refused():
    with pytest.raises(ValueError, match="lookup must be"):
        renderer.sample_planes(torch.zeros(1, 3, 4, 4, 4), torch.zeros(1, 2, 3), RELEASED_AXES, 1.0, "nearest")


FUSED_LOOKUP = """
import sys

import torch
from metaaux.models import renderer, triplane_cuda

torch.manual_seed(0)
torch.set_default_device(sys.argv[1])
for axes, last, channels, dtype, tolerance in (
    (("xy", "xz", "zx"), False, 4, torch.float32, 1e-5),
    (("xy", "xz", "zy"), True, 4, torch.float32, 1e-5),
    (("xy", "xz", "zy"), False, 3, torch.float32, 1e-5),
    (("yz", "zx", "xy"), True, 4, torch.bfloat16, 2e-2),
):
    image = torch.randn(2, 3 * channels, 6, 10)
    if last:
        image = image.contiguous(memory_format=torch.channels_last)
    image = image.to(dtype)
    points = (torch.rand(2, 70, 3) * 2 - 1) * 1.3  # more than one block, some outside
    points[:, :3] = torch.tensor([[1.0, 1, 1], [-1, -1, -1], [1e9, -1e9, 0]])
    seed = torch.randn(2, 70, channels).to(dtype).float()

    def derive(lookup, dtype):
        planes = image.to(dtype).unflatten(1, (3, channels)).detach().requires_grad_()
        where = points.clone().requires_grad_()
        value = lookup(planes, where)
        value.backward(seed.to(value.dtype))
        return value.float(), planes.grad.float(), where.grad

    expected = derive(lambda a, b: renderer.sample_planes(a, b, axes, 2.0, "grid_sample"), torch.float32)
    for a, b in zip(derive(lambda a, b: triplane_cuda.sample_planes(a, b, axes), dtype), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, part of PyTorch's CUDA builds")
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
        pytest.param(  # while the first one is current
            "cuda:1",
            marks=[pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")],
        ),
    ],
)
def test_fused_lookup_equals_grid_sample(device):
    # Triton's interpreter, which runs kernels on the CPU, is chosen when the kernels are defined: a fresh process.
    paths = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = {**os.environ, "TRITON_INTERPRET": str(int(device == "cpu")), "PYTHONPATH": paths}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FUSED_LOOKUP, device],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.stdout.strip() == "equal", result.stderr[-3000:]


# Volume rendering


def test_rays_pass_through_pixel_centres():
    cameras = hashed_cameras("rays", 2)
    origins, directions = renderer.camera_rays(cameras, 4)
    extrinsics, intrinsics = cameras[:, :16].reshape(2, 4, 4), cameras[:, 16:].reshape(2, 3, 3)
    points = origins[:, None] + 2.5 * directions
    local = (points - extrinsics[:, None, :3, 3]) @ extrinsics[:, :3, :3]
    pixels = local @ intrinsics.transpose(1, 2)
    row, column = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    expected = ((torch.stack((column, row), dim=-1) + 0.5) / 4).reshape(1, 16, 2).expand(2, -1, -1)
    torch.testing.assert_close(pixels[..., :2] / pixels[..., 2:], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(2, 16))


def test_stratified_jitter_stays_within_a_step():
    origins = torch.zeros(2, 3)
    middle = renderer.stratified_depths(origins, 30, 2.25, 3.3, 8, jitter=False)
    drawn = renderer.stratified_depths(origins, 30, 2.25, 3.3, 8, jitter=True)
    half = 0.5 * (3.3 - 2.25) / 7
    assert middle.shape == drawn.shape == (2, 30, 8)
    assert (drawn - middle).abs().max() <= half + 1e-6
    assert (drawn - middle).std() > 0.4 * half
    torch.testing.assert_close(middle[0, 0, 0].item(), 2.25 + half)


@pytest.mark.parametrize(("jitter", "stratified"), [(False, False), (True, False), (True, True)])
def test_importance_samples_gather_at_the_surface(jitter, stratified):
    depths = torch.linspace(2.25, 3.3, 20).expand(1, 40, 20)
    weights = torch.full((1, 40, 19), 1e-4)
    weights[..., 9] = 1
    fine = renderer.importance_depths(depths, weights, 24, jitter, stratified=stratified)
    step = depths[0, 0, 1] - depths[0, 0, 0]
    assert fine.min() >= depths.min() and fine.max() <= depths.max()
    near = (fine - (depths[0, 0, 9] + step / 2)).abs() < 2 * step
    assert near.float().mean() > 0.8
    if stratified or not jitter:
        assert (fine.diff(dim=-1) > 0).all()


def test_strata_hold_one_sample_each():
    """Under even weights the strata of the quantiles are strata of the distance."""
    depths = torch.linspace(2.25, 3.3, 20).expand(1, 40, 20)
    weights = torch.full((1, 40, 19), 0.05)
    centres = ((depths[..., 1:] + depths[..., :-1]) / 2)[..., :-1]  # EG3D's never reaches the last one
    fine = renderer.importance_depths(depths, weights, 9, jitter=True, stratified=True)
    strata = (fine - centres[..., :1]) / (centres[..., -1:] - centres[..., :1]) * 9
    assert strata.floor().equal(torch.arange(9.0).expand_as(strata))
    given = renderer.importance_depths(depths, weights, 9, True, torch.full((1, 40, 9), 0.5), stratified=True)
    torch.testing.assert_close(given, renderer.importance_depths(depths, weights, 9, jitter=False))


def test_compositing_follows_the_quadrature():
    depths = torch.tensor([2.3, 2.5, 2.6, 3.0])
    densities = torch.tensor([-1.0, 4.0, 2.0, 0.5])
    transmittance, expected = 1.0, []
    for i in range(3):
        sigma = F.softplus((densities[i] + densities[i + 1]) / 2 - 1)
        alpha = 1 - torch.exp(-sigma * (depths[i + 1] - depths[i]))
        expected.append(transmittance * alpha)
        transmittance = transmittance * (1 - alpha)
    weights = renderer.compositing_weights(depths[None, None], densities[None, None])
    torch.testing.assert_close(weights[0, 0], torch.stack(expected))


def test_merged_weights_shade_like_sorted_samples():
    depths, densities, colours = torch.rand(1, 5, 9) + 2.3, 6 * torch.randn(1, 5, 9), torch.rand(1, 5, 9)
    share, distance, opacity = renderer.merge_and_weigh(depths, densities)
    sorted_depths, order = depths.sort(dim=-1)
    weights = renderer.compositing_weights(sorted_depths, densities.gather(-1, order))
    sorted_colours = colours.gather(-1, order)
    expected = (weights * (sorted_colours[..., 1:] + sorted_colours[..., :-1]) / 2).sum(dim=-1)
    torch.testing.assert_close((share * colours).sum(dim=-1), expected)
    torch.testing.assert_close(share.sum(dim=-1), opacity)
    middles = (sorted_depths[..., 1:] + sorted_depths[..., :-1]) / 2
    torch.testing.assert_close(distance, (weights * middles).sum(dim=-1) / weights.sum(dim=-1))


def test_empty_ray_is_far_and_differentiable():
    depths = torch.linspace(2.25, 3.3, 6).expand(1, 2, 6)
    densities = torch.stack((torch.full((6,), -60.0), torch.full((6,), 3.0)))[None].requires_grad_()
    _, distance, opacity = renderer.merge_and_weigh(depths, densities)
    assert opacity[0, 0] == 0 and distance[0, 0] == 3.3
    (gradient,) = torch.autograd.grad(distance.sum(), densities)
    assert gradient.isfinite().all() and gradient[0, 1].abs().max() > 0
