"""EG3D's networks, each part against its definition (`test_eg3d_official` has the whole against recorded outputs)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from eg3d_reference import CORRECT_AXES, RELEASED_AXES, hashed, hashed_cameras, hashed_weights

from metaaux.models import renderer, stylegan2
from metaaux.models.discriminator import minibatch_deviation
from metaaux.models.eg3d import EG3DGenerator
from metaaux.models.stylegan2 import blur2d, downsample2d, modulated_conv2d, upsample2d
from metaaux.models.super_resolution import SuperResolution

ROOT = Path(__file__).resolve().parent.parent
KERNEL = torch.outer(torch.tensor([1.0, 3, 3, 1]), torch.tensor([1.0, 3, 3, 1])) / 64

TINY = {
    "z_dim": 8,
    "w_dim": 16,
    "image_size": 32,
    "plane_resolution": 16,
    "plane_features": 4,
    "channel_base": 128,
    "channel_max": 8,
    "decoder_hidden": 8,
    "neural_resolution": 8,
    "depth_samples": 5,
    "importance_samples": 4,
    "super_resolution_kind": "2X",
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def generator():
    model = EG3DGenerator(**TINY).eval().requires_grad_(False)
    model.load_state_dict(hashed_weights(model.state_dict()))
    return model


@pytest.fixture(scope="module")
def ws(generator):
    return hashed("tiny/ws", (2, generator.num_ws, 16))


@pytest.fixture(scope="module")
def tiny_cameras():
    return hashed_cameras("tiny/camera", 2)


# Resampling and modulated convolution


def convolve(x, kernel, stride=1):
    """True convolution of every channel."""
    channels = x.shape[1]
    return F.conv2d(x, kernel.flip(0, 1).expand(channels, 1, 4, 4), stride=stride, groups=channels)


def insert_zeros(x):
    wide = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    wide[..., ::2, ::2] = x
    return wide


@pytest.mark.parametrize("size", [(4, 4), (7, 10), (1, 3)])
def test_upsample_is_zero_insertion_and_filtering(size):
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(upsample2d(x), convolve(F.pad(insert_zeros(x), (2, 1, 2, 1)), 4 * KERNEL))


@pytest.mark.parametrize("size", [(4, 4), (6, 10)])
def test_downsample_is_filtering_and_decimation(size):
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(downsample2d(x), convolve(F.pad(x, (1, 1, 1, 1)), KERNEL, stride=2))


@pytest.mark.parametrize(("padding", "gain"), [(1, 2.0), (2, 1.0)])
def test_blur_is_filtering(padding, gain):
    x = torch.randn(2, 3, 5, 9)
    expected = convolve(F.pad(x, (padding,) * 4), KERNEL * gain**2)
    torch.testing.assert_close(blur2d(x, padding, gain), expected)
    # As on GPUs, here on the CPU.
    x = x.contiguous(memory_format=torch.channels_last)
    sliced = stylegan2._blur_by_slices(x, padding, gain)
    torch.testing.assert_close(sliced, expected)
    assert sliced.is_contiguous(memory_format=torch.channels_last)
    large = torch.full((1, 1, 6, 6), 3000.0, dtype=torch.float16)
    torch.testing.assert_close(
        stylegan2._blur_by_slices(large, 0, gain), torch.full((1, 1, 3, 3), 3000 * gain**2).half()
    )


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("demodulate", [False, True])
def test_modulated_convolution_is_one_convolution_per_sample(upsample, demodulate):
    x, weight, styles = torch.randn(3, 4, 6, 6), torch.randn(5, 4, 3, 3), torch.randn(3, 4) + 1
    y = modulated_conv2d(x, weight, styles, demodulate, upsample)
    for i in range(3):
        modulated = weight * styles[i, :, None, None]
        if demodulate:
            modulated = modulated / modulated.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
        if upsample:
            expected = F.conv_transpose2d(x[i : i + 1], modulated.transpose(0, 1), stride=2)
        else:
            expected = F.conv2d(x[i : i + 1], modulated, padding=1)
        torch.testing.assert_close(y[i : i + 1], expected, rtol=1e-4, atol=1e-5)
        alone = modulated_conv2d(x[i : i + 1], weight, styles[i : i + 1], demodulate, upsample)
        torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_offset_multiplies_the_weight(upsample, per_sample):
    x, weight, styles = torch.randn(2, 4, 6, 6), torch.randn(5, 4, 3, 3), torch.randn(2, 4)
    offset = 0.5 * torch.randn(2, 5, 4, 1, 1)
    y = modulated_conv2d(x, weight, styles, True, upsample, offset if per_sample else offset[0])
    for i in range(2):
        edited = weight * (1 + (offset[i] if per_sample else offset[0]))
        expected = modulated_conv2d(x[i : i + 1], edited, styles[i : i + 1], True, upsample)
        torch.testing.assert_close(y[i : i + 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per_sample", [False, True])
def test_half_precision_survives_large_weights_and_styles(per_sample):
    x, weight, styles = torch.randn(2, 64, 6, 6), 3e4 * torch.randn(5, 64, 3, 3), 3e4 * torch.randn(2, 64)
    offset = torch.zeros(2, 5, 64, 1, 1) if per_sample else None
    y = modulated_conv2d(x.half(), weight, styles, offset=offset)
    torch.testing.assert_close(y.float(), modulated_conv2d(x, weight, styles), rtol=0, atol=1e-2)


def test_deviation_channel_sees_only_its_group():
    x = torch.randn(8, 3, 4, 4)
    channel = minibatch_deviation(x, 4)[:, 3]
    for start in (0, 1):  # groups interleave: samples 0, 2, 4, 6 and 1, 3, 5, 7
        group = x[start::2]
        expected = (group.var(dim=0, unbiased=False) + 1e-8).sqrt().mean()
        torch.testing.assert_close(channel[start::2], expected.expand(4, 4, 4))


# Tri-plane look-up


def inner_points(batch, count, reach):
    return (torch.rand(batch, count, 3) * 2 - 1) * reach


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
    ],
)
def test_fused_lookup_equals_grid_sample(device):
    # Triton's interpreter, which runs kernels on the CPU, is chosen when the kernels are defined: a fresh process.
    environment = {**os.environ, "TRITON_INTERPRET": str(int(device == "cpu")), "PYTHONPATH": str(ROOT)}
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


# The generator's contract


def test_rendering_is_deterministic_unless_jittered(generator, ws, tiny_cameras):
    first, second = (generator.synthesize(ws, tiny_cameras) for _ in range(2))
    assert torch.equal(first.image, second.image) and torch.equal(first.depth, second.depth)
    drawn = generator.synthesize(ws, tiny_cameras, jitter=True)
    assert not torch.equal(first.image_raw, drawn.image_raw)


def test_output_shapes(generator, ws, tiny_cameras):
    output = generator.synthesize(ws, tiny_cameras, resolution=12)
    assert output.image.shape == (2, 3, 32, 32)
    assert output.image_raw.shape == (2, 3, 12, 12)
    assert output.depth.shape == (2, 1, 12, 12)
    rendering = generator.render(generator.planes(ws), tiny_cameras)
    assert rendering.features.shape == (2, 4, 8, 8) and rendering.opacity.shape == (2, 1, 8, 8)
    assert 0 <= rendering.opacity.min() and rendering.opacity.max() <= 1 + 1e-6


@pytest.mark.parametrize("batch", [1, 2])
def test_channels_of_a_pixel_are_adjacent(generator, ws, tiny_cameras, batch):
    """The layout in which look-ups and convolutions are fast; results do not depend on it."""
    planes = generator.planes(ws[:batch])
    assert planes.stride(2) == 1
    features = generator.render(planes, tiny_cameras[:batch]).features
    kernel = torch.ones(5, features.shape[1], 1, 1)
    for maps in (upsample2d(features.contiguous()), F.conv2d(features, kernel)):
        assert maps.stride(1) == 1


def test_cached_planes_give_the_same_picture(generator, ws, tiny_cameras):
    planes = generator.planes(ws)
    expected = generator.synthesize(ws, tiny_cameras)
    assert torch.equal(generator.synthesize(ws, tiny_cameras, planes=planes).image, expected.image)


def test_lookups_agree(generator, ws, tiny_cameras):
    images = [generator.synthesize(ws, tiny_cameras, lookup=lookup).image for lookup in ("gather", "grid_sample")]
    torch.testing.assert_close(*images, rtol=0, atol=1e-4)


def test_gather_renders_without_grid_sample(generator, ws, tiny_cameras):
    # CUDA cannot differentiate grid_sample twice, so none may hide in the graph.
    def names(lookup):
        planes, offset_planes = generator.planes(ws).requires_grad_(), torch.zeros(2, 3, 3, 8, 8, requires_grad=True)
        rendering = generator.render(planes, tiny_cameras, offset_planes=offset_planes, lookup=lookup)
        found, queue = set(), [rendering.features.grad_fn, rendering.depth.grad_fn]
        while queue:
            node = queue.pop()
            if node is not None and node not in found:
                found.add(node)
                queue += [parent for parent, _ in node.next_functions]
        return {node.name() for node in found}

    assert any("GridSampler" in name for name in names("grid_sample"))
    assert not any("GridSampler" in name for name in names("gather"))


def test_samples_of_a_batch_are_independent(generator, ws, tiny_cameras):
    together = generator.synthesize(ws, tiny_cameras)
    for i in range(2):
        alone = generator.synthesize(ws[i : i + 1], tiny_cameras[i : i + 1])
        torch.testing.assert_close(alone.image, together.image[i : i + 1], rtol=0, atol=1e-4)


def test_w_is_broadcast(generator):
    w = hashed("w", (2, 16))
    assert torch.equal(generator.planes(w), generator.planes(w[:, None].repeat(1, generator.num_ws, 1)))
    with pytest.raises(ValueError, match=r"w must be \[B, 16\] or"):
        generator.planes(w[:, None])


def test_truncation(generator, tiny_cameras):
    z = hashed("z", (2, 8))
    full = generator.mapping(z, tiny_cameras)
    average = generator.w_avg.expand_as(full)
    torch.testing.assert_close(generator.mapping(z, tiny_cameras, 0.0), average)
    half = generator.mapping(z, tiny_cameras, 0.5, truncation_cutoff=3)
    torch.testing.assert_close(half[:, :3], (full[:, :3] + average[:, :3]) / 2)
    assert torch.equal(half[:, 3:], full[:, 3:])


def test_constant_offset_planes_move_points_by_their_sum(generator, ws, tiny_cameras):
    planes = generator.planes(ws)
    points = inner_points(2, 40, 0.3)
    shifts = 0.03 * hashed("shifts", (2, 3, 3))
    offset_planes = shifts[..., None, None].expand(2, 3, 3, 8, 8)
    moved = generator.density(planes, points, offset_planes)
    expected = generator.density(planes, points + shifts.sum(dim=1)[:, None])
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-4)
    assert (moved - generator.density(planes, points)).abs().max() > 1e-2
    plain, shifted = (generator.render(planes, tiny_cameras, offset_planes=p) for p in (None, offset_planes))
    assert (plain.depth - shifted.depth).abs().max() > 1e-3


def test_layers_that_take_offsets(generator):
    expected = [f"backbone.{layer}" for layer in ("b4.conv1", "b8.conv0", "b8.conv1", "b16.conv0", "b16.conv1")]
    expected += [f"super_resolution.block{i}.conv{j}" for i in (0, 1) for j in (0, 1)]
    assert list(generator.modulated_layers) == expected
    for name, shape in generator.modulated_layers.items():
        assert generator.get_submodule(name).weight.shape == (*shape, 3, 3)


@pytest.mark.parametrize("layer", ["backbone.b4.conv1", "backbone.b16.conv0", "super_resolution.block1.conv0"])
def test_weight_offset_equals_edited_weights(generator, ws, tiny_cameras, layer):
    offsets = 0.5 * hashed("offset", (2, *generator.modulated_layers[layer], 1, 1))
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    per_sample = generator.synthesize(ws, tiny_cameras, {layer: offsets})
    for i in range(2):
        edited = EG3DGenerator(**TINY).eval().requires_grad_(False)
        edited.load_state_dict(before)
        weight = edited.get_submodule(layer).weight
        weight.copy_(weight * (1 + offsets[i]))
        expected = edited.synthesize(ws, tiny_cameras)
        shared = generator.synthesize(ws, tiny_cameras, {layer: offsets[i]})
        for field in ("image", "image_raw", "depth"):
            reference = getattr(expected, field)
            torch.testing.assert_close(getattr(shared, field), reference, rtol=0, atol=2e-4)
            own = getattr(per_sample, field)[i : i + 1]
            torch.testing.assert_close(own, reference[i : i + 1], rtol=0, atol=2e-4)
    assert (per_sample.image - generator.synthesize(ws, tiny_cameras).image).abs().max() > 1e-2
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())


@pytest.mark.parametrize("layer", ["backbone.b16.torgb", "backbone.b32.conv0", "b8.conv0"])
def test_offset_of_an_unknown_layer_is_refused(generator, ws, tiny_cameras, layer):
    with pytest.raises(ValueError, match=f"no layer '{layer}' takes weight offsets"):
        generator.synthesize(ws, tiny_cameras, {layer: torch.zeros(8, 8, 1, 1)})


def test_offset_of_another_shape_is_refused(generator, ws):
    with pytest.raises(ValueError, match="offset of backbone.b8.conv0 must be"):
        generator.planes(ws, {"backbone.b8.conv0": torch.zeros(8, 8, 3, 3)})


@pytest.mark.parametrize("kind", ["2X", "4X", "8X", "8XDC"])
@pytest.mark.parametrize("side", [4, 16, 24])
def test_super_resolution_takes_any_size(kind, side):
    network = SuperResolution(kind, feature_channels=4, image_size=32, w_dim=8)
    assert network(torch.randn(1, 4, side, side), torch.randn(1, 8)).shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"super_resolution_kind": "16X"}, "super_resolution_kind must be one of"),
        ({"plane_axes": ("xy", "xx", "zx")}, "plane_axes holds pairs"),
        ({"plane_resolution": 20}, "resolution must be a power of two"),
    ],
)
def test_impossible_configuration_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EG3DGenerator(**{**TINY, **changes})


def test_saved_generator_is_the_same(generator, ws, tiny_cameras, tmp_path):
    generator.save_pretrained(tmp_path)
    loaded = EG3DGenerator.from_pretrained(tmp_path)
    assert loaded.num_ws == generator.num_ws and tuple(loaded.config.plane_axes) == RELEASED_AXES
    assert torch.equal(loaded.synthesize(ws, tiny_cameras).image, generator.synthesize(ws, tiny_cameras).image)
