"""Activation and resampling by kernels of their own, against PyTorch's passes; on the CPU by Triton's interpreter."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from metaaux.models import activation, resampling
from metaaux.models.activation import activated

#: [B, C, H, W]: more than one block in a row, more than one in a sample, and single pixels.
SHAPES = [(2, 3, 6, 10), (1, 70, 4, 4), (3, 1, 2, 2), (1, 5, 8, 300)]


def tensors(shape, dtype, device, bias, noise):
    """Input, and of bias, pattern and strength what is asked for; with gradients."""
    exact = dtype if dtype == torch.float64 else torch.float32
    x = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    bias = torch.randn(shape[1], dtype=exact, device=device, requires_grad=True) if bias else None
    pattern = torch.randn(shape[2:], dtype=exact, device=device) if noise else None
    strength = torch.tensor(0.3, dtype=exact, device=device, requires_grad=True) if noise else None
    return x, bias, pattern, strength


def in_parts(x, bias, pattern, strength, gain, slope, bound):
    """The definition."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = y if pattern is None else y + gain * strength * pattern
    y = F.leaky_relu(y if bias is None else y + gain * bias[:, None, None], slope)
    return (y if bound is None else y.clamp(-bound, bound)).to(x.dtype)


def check_activation(device, dtype):
    torch.manual_seed(0)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    options = itertools.product(SHAPES[:3], (False, True), (False, True), (0.2, 1.0), (None, 0.7))
    for shape, bias, noise, slope, bound in options:
        given = tensors(shape, dtype, device, bias, noise)
        y = activation._Activate.apply(*given, 1.4, slope, bound)
        expected = in_parts(*given, 1.4, slope, bound)
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, expected, **tolerance)
        if dtype == torch.bfloat16:
            continue  # of what is rounded to the bound there is a slope or none
        wanted = [t for t in given if t is not None and t.requires_grad]
        direction = torch.randn_like(expected)
        gradients = (torch.autograd.grad(value, wanted, direction) for value in (y, expected))
        for own, other in zip(*gradients):
            torch.testing.assert_close(own, other, **tolerance)
    nan = torch.tensor([float("nan"), 1.0, -9.0], device=device).reshape(1, 3, 1, 1)
    assert activation._Activate.apply(nan, None, None, None, 1.0, 0.2, 0.5).flatten().tolist()[1:] == [0.5, -0.5]
    assert activation._Activate.apply(nan, None, None, None, 1.0, 0.2, 0.5).isnan().sum() == 1


def check_derivatives(device):
    """Of both orders, and under vmap, where each sample may have a bias and a strength of its own."""
    torch.manual_seed(0)
    x, bias, pattern, strength = tensors((2, 3, 4, 5), torch.float64, device, True, True)

    def act(x, bias, strength):
        return activation._Activate.apply(x, bias, pattern, strength, 1.5, 0.25, 0.75)  # as exact in float32

    assert torch.autograd.gradcheck(act, (x, bias, strength)) and torch.autograd.gradgradcheck(
        act, (x, bias, strength)
    )
    many = [torch.randn(4, *t.shape, dtype=t.dtype, device=device, requires_grad=True) for t in (x, bias, strength)]
    for own in itertools.product((True, False), repeat=3):
        if not any(own):
            continue
        given = [several if each else one for each, several, one in zip(own, many, (x, bias, strength))]
        dims = tuple(0 if each else None for each in own)
        y = torch.func.vmap(act, dims)(*given)
        expected = torch.stack([act(*(t[i] if each else t for each, t in zip(own, given))) for i in range(4)])
        torch.testing.assert_close(y, expected)
        direction = torch.randn_like(expected)
        gradients = (torch.autograd.grad(value, given, direction) for value in (y, expected))
        for one, other in zip(*gradients):
            torch.testing.assert_close(one, other)


def check_resampling(device, dtype):
    from metaaux.models import resampling_kernels as kernels

    torch.manual_seed(0)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for shape in SHAPES:
        x = torch.randn(shape, dtype=dtype)
        pairs = [
            (kernels.blur(x.to(device), padding, gain), resampling._blur(padding, gain, x))
            for padding, gain in itertools.product(range(4), (1, 2))
            if min(shape[2:]) + 2 * padding > 3
        ]
        pairs += [(kernels.enlarge(x.to(device), 4 / divisor), resampling._up(divisor, x)) for divisor in (1, 4, 16)]
        pairs += [(kernels.reduce(x.to(device), 4 / divisor), resampling._down(divisor, x)) for divisor in (1, 4, 16)]
        for own, expected in pairs:
            assert own.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(own.cpu(), expected, **tolerance)


def check_all(device):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        check_activation(device, dtype)
        check_resampling(device, dtype)
    check_derivatives(device)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, part of PyTorch's CUDA builds")
def test_interpreted_kernels_equal_the_passes():
    # Triton's interpreter, which runs kernels on the CPU, is chosen when the kernels are defined: a fresh process.
    folder = Path(__file__).resolve().parent
    paths = [str(folder), str(folder.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    command = [sys.executable, "-W", "ignore", "-c", "import test_fused_layers as t; t.check_all('cpu')"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_equal_the_passes():
    check_all("cuda")


@pytest.mark.parametrize("options", list(itertools.product((False, True), (False, True), (0.2, 1.0), (None, 0.7))))
def test_passes_are_what_follows_a_convolution(options):
    """With gradients, and without them in the memory of the input."""
    torch.manual_seed(0)
    bias, noise, slope, bound = options
    x, bias, pattern, strength = tensors((2, 3, 4, 6), torch.float64, "cpu", bias, noise)
    expected = in_parts(x, bias, pattern, strength, 1.4, slope, bound)
    given = (bias, None if pattern is None else (pattern, strength), 1.4, slope, bound)
    torch.testing.assert_close(activated(x, *given), expected)

    def act(x):
        return activated(x, *given)

    assert torch.autograd.gradcheck(act, x) and torch.autograd.gradgradcheck(act, x)
    with torch.no_grad():
        own = x.clone()
        y = activated(own, *given)
        torch.testing.assert_close(y, expected)
        assert y.data_ptr() == own.data_ptr()


def test_each_sample_may_have_noise_of_its_own():
    x, pattern = torch.randn(2, 3, 4, 4), torch.randn(2, 1, 4, 4)
    y = activated(x.clone(), noise=(pattern, torch.tensor(0.5)), slope=1.0)
    torch.testing.assert_close(y, x + 0.5 * pattern)
