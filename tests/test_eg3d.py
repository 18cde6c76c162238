"""EG3D's generator: its contract (`test_eg3d_official` compares it with recorded outputs of the official one)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from eg3d_reference import RELEASED_AXES, hashed, hashed_cameras, hashed_weights, inner_points

from metaaux.models.eg3d import EG3DGenerator
from metaaux.models.resampling import upsample2d
from metaaux.models.super_resolution import SuperResolution

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
        generator.planes(ws, {"backbone.b8.conv0": torch.zeros(8, 8, 2, 2)})


@pytest.mark.parametrize("kind", ["2X", "4X", "8X", "8XDC"])
@pytest.mark.parametrize("side", [4, 16, 24])
def test_super_resolution_takes_any_size(kind, side):
    network = SuperResolution(kind, feature_channels=4, image_size=32, w_dim=8)
    assert network(torch.randn(1, 4, side, side), torch.randn(1, 8)).shape == (1, 3, 32, 32)


def test_super_resolution_of_other_channels(generator, tmp_path):
    def shapes(model):
        return [model.modulated_layers[f"super_resolution.{layer}"] for layer in ("block0.conv1", "block1.conv1")]

    assert generator.config.super_resolution_channels is None and shapes(generator) == [(128, 128), (64, 64)]
    narrow = EG3DGenerator(**TINY, super_resolution_channels=(16, 8))
    narrow.save_pretrained(tmp_path)
    assert shapes(EG3DGenerator.from_pretrained(tmp_path)) == shapes(narrow) == [(16, 16), (8, 8)]
    # A configuration from before there was this setting.
    del (config := dict(generator.config))["super_resolution_channels"]
    assert shapes(EG3DGenerator.from_config(config)) == shapes(generator)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"super_resolution_kind": "16X"}, "super_resolution_kind must be one of"),
        ({"super_resolution_channels": (8, 8, 8)}, "super_resolution_channels must be two numbers"),
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
