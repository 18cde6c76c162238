"""The fused kernels give what the generator's PyTorch form gives, and that of look-up and decoder its gradients."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from metaaux.models import fused_decoder, fused_march, renderer
from metaaux.models.eg3d import TriPlaneDecoder, shade

AXES = ("xy", "xz", "zx")
BOX = 1.6
needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def reference(planes, points, offset_planes, decoder, axes):
    if offset_planes is not None:
        points = points + 3 * renderer.sample_planes(offset_planes, points, axes, BOX, "grid_sample")
    return decoder(renderer.sample_planes(planes, points, axes, BOX, "grid_sample"))


def kinks(points, offset_planes, sides, axes):
    """Which points lie so near a pixel's centre line, where the derivative jumps, that rounding decides the side."""
    near = torch.zeros(points.shape[:2], dtype=torch.bool, device=points.device)
    places = [(points, offset_planes.shape[-2:])] if offset_planes is not None else []
    if offset_planes is not None:
        points = points + 3 * renderer.sample_planes(offset_planes, points, axes, BOX, "grid_sample")
    for where, (height, width) in (*places, (points, sides)):
        sizes = torch.tensor([width, height], device=points.device)
        pixels = ((renderer.project_to_planes(where, axes, BOX) + 1) * sizes - 1) / 2
        near |= ((pixels - pixels.round()).abs() < 2e-3).any(dim=-1).any(dim=1)
    return near


def check(device, channels, hidden, sides, offset_sides, samples, axes=AXES, dtype=torch.float32, tolerance=1e-5):
    """Values and all gradients of both forms: errors relative to the largest, within `tolerance` or twice the PyTorch
    form's own in float32, whose positions are no more exact."""
    torch.manual_seed(0)
    decoder = TriPlaneDecoder(channels, hidden, 0.5).to(device)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    planes = torch.randn(2, 3 * channels, *sides, device=device).contiguous(memory_format=torch.channels_last)
    planes = planes.to(dtype).unflatten(1, (3, channels))
    offsets = None if offset_sides is None else 0.02 * torch.randn(2, 3, 3, *offset_sides, device=device)
    points = (torch.rand(2, samples, 3, device=device) - 0.5) * 1.2 * BOX  # some outside
    corners = torch.tensor([[0.5, 0.5, 0.5], [-0.5, -0.5, -0.5], [1e9, -1e9, 0.0]], device=device) * BOX
    points[:, :3] = corners[:samples]
    smooth = ~kinks(points, offsets, sides, axes)
    seeds = torch.randn(2, samples, device=device) * smooth, torch.randn(2, samples, channels, device=device)
    seeds = seeds[0], (seeds[1] * smooth[..., None]).to(dtype).float()

    def derive(function, decoder, dtype):
        leaves = [planes.to(dtype), points, *([] if offsets is None else [offsets])]
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        values = function(leaves[0], leaves[1], leaves[2] if offsets is not None else None, decoder)
        inputs = (*leaves, *decoder.parameters())
        gradients = torch.autograd.grad(
            values, inputs, [s.to(value.dtype) for s, value in zip(seeds, values, strict=True)]
        )
        return *values, *gradients

    fused = derive(lambda *a: fused_decoder.decode(*a, axes, BOX), decoder, dtype)
    exact = derive(lambda *a: reference(*a, axes), copy.deepcopy(decoder).double(), torch.float64)
    names = ("density", "logits", "planes", "points", *(["offsets"] if offsets is not None else []), *"wbwb")
    plain = derive(lambda *a: reference(*a, axes), decoder, torch.float32)
    for name, value, usual, expected in zip(names, fused, plain, exact, strict=True):
        assert value.isfinite().all() and expected.abs().max() > 0, name
        error, own = (((x.double() - expected.double()).abs().max() / expected.abs().max()) for x in (value, usual))
        assert error < max(tolerance, 2 * own), f"{name}: {error:.1e}, in float32 {own:.1e}"


def check_march(device, batch, rays, samples, fine_samples, channels, jitter):
    """Drawn distances, colours, distance and opacity of both forms."""
    torch.manual_seed(0)
    depths = renderer.stratified_depths(torch.zeros(batch, 3, device=device), rays, 2.25, 3.3, samples, jitter)
    quantiles = renderer.random_quantiles(depths, fine_samples) if jitter else None
    coarse, fine = (
        (6 * torch.randn(batch, rays, n, device=device), torch.randn(batch, rays, n, channels, device=device))
        for n in (samples, fine_samples)
    )
    coarse[0][0, 0], fine[0][0, 0] = -80, -80  # an empty ray
    weights = renderer.compositing_weights(depths, coarse[0])
    expected = renderer.importance_depths(depths, weights, fine_samples, jitter, quantiles)
    drawn = fused_march.importance_depths(depths, coarse[0], fine_samples, quantiles)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-5)
    all_depths = torch.cat((depths, expected), dim=-1)
    weights, *maps = renderer.merge_and_weigh(all_depths, torch.cat((coarse[0], fine[0]), dim=-1))
    colours = shade(torch.cat((coarse[1], fine[1]), dim=2), weights)
    limits = torch.stack((depths.min(), depths.max()))
    fused = fused_march.composite((depths, *coarse), (expected, *fine), limits)
    torch.testing.assert_close(fused, (colours, *maps), rtol=0, atol=1e-5)


def odd_marches(device):
    check_march(device, 1, 3, 48, 48, 32, False)
    check_march(device, 2, 3, 7, 5, 3, True)
    check_march(device, 1, 4, 8, 8, 4, True)


def odd_shapes(device):
    check(device, 32, 64, (6, 10), (5, 4), 70)  # more than one block
    check(device, 3, 5, (6, 10), (4, 4), 1, ("xy", "zy", "zx"))
    check(device, 5, 20, (7, 3), None, 65, ("yz", "xz", "yx"))
    check(device, 4, 16, (6, 10), (5, 4), 33, dtype=torch.float16, tolerance=1e-2)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, part of PyTorch's CUDA builds")
def test_interpreted_kernels_equal_the_pytorch_form():
    # Triton's interpreter, which runs kernels on the CPU, is chosen when the kernels are defined: a fresh process.
    folder = Path(__file__).resolve().parent
    paths = [str(folder), str(folder.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    result = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            "import test_fused_kernels as t; t.odd_shapes('cpu'); t.odd_marches('cpu')",
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]


class TestOnCuda:
    pytestmark = needs_cuda

    def test_odd_shapes(self):
        odd_shapes("cuda")

    def test_marches(self):
        odd_marches("cuda")
        check_march("cuda", 1, 128 * 128, 48, 48, 32, False)
        check_march("cuda", 2, 64 * 64, 48, 48, 32, True)

    def test_bfloat16(self):
        check("cuda", 32, 64, (64, 64), (16, 16), 5000, dtype=torch.bfloat16, tolerance=3e-2)

    # The last bit of a displaced coordinate is some 1e-5 of a pixel here, and neighbours' difference makes as much of
    # a density: the PyTorch form itself is 0.9e-5 off on a GPU and 4.1e-5 on a CPU, the kernel 3.3e-5 and 1.1e-5.
    @pytest.mark.parametrize(("offset_sides", "tolerance"), [(None, 1e-5), ((64, 64), 5e-5)])
    def test_full_size(self, offset_sides, tolerance):
        check("cuda", 32, 64, (256, 256), offset_sides, 64 * 64 * 96, tolerance=tolerance)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_on_another_than_the_current_device(self):
        check("cuda:1", 32, 64, (6, 10), (5, 4), 70)

    def test_a_second_derivative_is_refused(self):
        decoder = TriPlaneDecoder(4, 8, 1.0).cuda()
        planes = torch.randn(1, 3, 4, 8, 8, device="cuda", requires_grad=True)
        points = torch.rand(1, 9, 3, device="cuda") - 0.5
        density, _ = fused_decoder.decode(planes, points, None, decoder, AXES, BOX)
        (gradient,) = torch.autograd.grad(density.square().sum(), planes, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.square().sum().backward()

    def test_a_generator_renders_with_it(self, tiny_components):
        generator = copy.deepcopy(tiny_components["generator"]).cuda()
        cameras = torch.eye(4, device="cuda").flatten()[None]
        cameras[0, 11] = -2.7
        cameras = torch.cat((cameras, torch.tensor([[4.2, 0, 0.5, 0, 4.2, 0.5, 0, 0, 1]], device="cuda")), dim=1)
        side, features = generator.config.plane_resolution, generator.config.plane_features
        planes = torch.randn(1, 3, features, side, side, device="cuda")
        offsets = 0.02 * torch.randn(1, 3, 3, 8, 8, device="cuda")
        with torch.no_grad():
            fused, plain = (
                generator.render(planes, cameras, offset_planes=offsets, lookup=lookup)
                for lookup in ("auto", "grid_sample")
            )
        for name in ("features", "depth", "opacity"):
            torch.testing.assert_close(getattr(fused, name), getattr(plain, name), rtol=1e-4, atol=2e-5)
