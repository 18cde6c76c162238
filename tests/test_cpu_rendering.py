"""The CPU's way of rendering without gradients gives what the way with gradients gives."""

from __future__ import annotations

import pytest
import torch
from eg3d_reference import hashed, hashed_cameras

from metaaux.models import decoder_cpu, eg3d, renderer, triplane_cuda

AXES = ("xy", "xz", "zy")


@pytest.mark.parametrize("shape", [(2, 3, 5, 16, 16), (1, 3, 4, 8, 12)])
def test_table_equals_grid_sample(shape):
    planes = hashed("planes", shape)
    points = 0.6 * hashed("points", (shape[0], 400, 3))  # many outside of the box
    points[:, 0], points[:, 1] = 0.5, -1e9
    table = renderer.sample_planes(renderer.PlaneTable.of(planes), points, AXES, 1.0)
    torch.testing.assert_close(table, renderer.sample_planes(planes, points, AXES, 1.0), rtol=1e-5, atol=1e-5)


def test_table_keeps_what_is_not_a_number():
    planes, points = hashed("planes", (1, 3, 2, 8, 8)), torch.zeros(1, 2, 3)
    points[0, 1, 0] = float("nan")
    result = renderer.PlaneTable.of(planes).sample(points, AXES, 1.0)
    assert torch.isfinite(result[0, 0]).all() and torch.isnan(result[0, 1]).all()


@pytest.mark.parametrize("jitter", [False, True])
@pytest.mark.parametrize("with_offsets", [False, True])
def test_with_and_without_gradients(tiny_components, monkeypatch, jitter, with_offsets):
    monkeypatch.setattr(eg3d, "SAMPLES_AT_ONCE", 24 * 4)  # 64 rays: two groups and a rest
    generator = tiny_components["generator"]
    ws, cameras = hashed("w", (2, 16)), hashed_cameras("camera", 2)
    offsets = 0.02 * hashed("offsets", (2, 3, 3, 8, 8)) if with_offsets else None
    results = []
    for gradients in (True, False):
        torch.manual_seed(3)
        with torch.set_grad_enabled(gradients):
            results.append(generator.synthesize(ws, cameras, offset_planes=offsets, jitter=jitter))
    for name in ("image", "image_raw", "depth"):
        first, second = (getattr(result, name) for result in results)
        torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_the_decoder_in_blocks_and_its_gradients_equal_the_plain_one(monkeypatch):
    monkeypatch.setattr(decoder_cpu, "BLOCK", 40)  # 100 samples: two blocks and a rest
    decoder = eg3d.TriPlaneDecoder(5, 8, 0.7)
    features = (9 * hashed("features", (2, 50, 5))).requires_grad_()
    features.data[0, 0] = 200.0  # where exp overflows
    factors = hashed("densities", (2, 50)), hashed("colours", (2, 50, 5))
    inputs = (features, *decoder.parameters())
    results = []
    for way in (decoder, decoder.in_blocks):
        outputs = way(features)
        gradients = torch.autograd.grad(sum((a * b).sum() for a, b in zip(outputs, factors, strict=True)), inputs)
        results.append((*outputs, *gradients))
    with torch.no_grad():
        results.append((*decoder.in_blocks(features), *gradients))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert first.abs().max() > 0.1
            torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_cpu_does_the_same_where_triton_is_installed(tiny_components, monkeypatch, gradients):
    generator, cameras = tiny_components["generator"], hashed_cameras("camera", 1)
    images = []
    for triton in (None, object()):
        monkeypatch.setattr(triplane_cuda, "triton", triton)
        with torch.set_grad_enabled(gradients):
            images.append(generator.synthesize(hashed("w", (1, 16)), cameras).image)
    assert torch.equal(*images)


def test_arguments_stay_as_they_are(tiny_components):
    generator = tiny_components["generator"]
    with torch.no_grad():
        ws, cameras = hashed("w", (1, 16)), hashed_cameras("camera", 1)
        planes = generator.planes(ws)
        kept = planes.clone()
        first = generator.synthesize(ws, cameras, planes=planes).image
        assert torch.equal(planes, kept) and torch.equal(ws, hashed("w", (1, 16)))
        assert torch.equal(generator.synthesize(ws, cameras, planes=planes).image, first)


def test_gradients_of_the_table_equal_those_of_grid_sample():
    planes = hashed("planes", (2, 3, 5, 8, 12)).requires_grad_()
    points = (0.6 * hashed("points", (2, 300, 3))).requires_grad_()  # many outside of the box
    factors = hashed("factors", (2, 300, 5))
    results = []
    for source in (planes, renderer.PlaneTable.of(planes)):
        values = renderer.sample_planes(source, points, AXES, 1.0)
        results.append(torch.autograd.grad((values * factors).sum(), (planes, points)))
    for first, second in zip(*results, strict=True):
        assert first.abs().max() > 0.1
        torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5)
