"""StyleGAN2's building blocks, each against its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from metaaux import devices
from metaaux.models import modulation
from metaaux.models.discriminator import minibatch_deviation
from metaaux.models.modulation import modulated_conv2d
from metaaux.models.resampling import blur2d, downsample2d, upsample2d

KERNEL = torch.outer(torch.tensor([1.0, 3, 3, 1]), torch.tensor([1.0, 3, 3, 1])) / 64


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def convolve(x, kernel, stride=1):
    """True convolution of every channel."""
    channels = x.shape[1]
    return F.conv2d(x, kernel.flip(0, 1).expand(channels, 1, 4, 4), stride=stride, groups=channels)


def insert_zeros(x):
    wide = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    wide[..., ::2, ::2] = x
    return wide


@pytest.fixture(params=["cpu", "gpu"])
def way(request, monkeypatch):
    """As on a CPU, or as on a GPU, here on the CPU."""
    if request.param == "gpu":
        monkeypatch.setattr(devices, "is_cpu", lambda x: False)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("size", [(4, 4), (7, 10), (1, 3)])
def test_upsample_is_zero_insertion_and_filtering(size):
    x = torch.randn(2, 3, *size)
    maps = upsample2d(x)
    torch.testing.assert_close(maps, convolve(F.pad(insert_zeros(x), (2, 1, 2, 1)), 4 * KERNEL))
    assert maps.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("way")
def test_upsampling_with_replicated_borders_is_bilinear():
    x = torch.randn(2, 3, 5, 7)
    expected = F.interpolate(x, scale_factor=2, mode="bilinear", antialias=True)
    torch.testing.assert_close(upsample2d(x, replicate=True), expected)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("size", [(4, 4), (6, 10)])
def test_downsample_is_filtering_and_decimation(size):
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(downsample2d(x), convolve(F.pad(x, (1, 1, 1, 1)), KERNEL, stride=2))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("padding", "gain"), [(0, 1), (1, 2), (2, 1), (3, 2)])
def test_blur_is_filtering(padding, gain):
    x = torch.randn(2, 3, 5, 9).contiguous(memory_format=torch.channels_last)
    maps = blur2d(x, padding, gain)
    torch.testing.assert_close(maps, convolve(F.pad(x, (padding,) * 4), KERNEL * gain**2))
    assert maps.is_contiguous(memory_format=torch.channels_last)
    large = torch.full((1, 1, 6, 6), 3000.0, dtype=torch.float16)
    torch.testing.assert_close(blur2d(large, 0, gain), torch.full((1, 1, 3, 3), 3000 * gain**2).half())


RESAMPLINGS = [
    lambda x: blur2d(x, padding=1, gain=2),
    lambda x: blur2d(x, padding=2),
    upsample2d,
    lambda x: upsample2d(x, replicate=True),
    downsample2d,
]


@pytest.mark.parametrize("resample", RESAMPLINGS)
def test_resampling_on_a_gpu_is_that_on_a_cpu(resample, monkeypatch):
    """With derivatives of both orders, and under vmap; no map is kept for them."""
    x = torch.randn(2, 3, 4, 6, dtype=torch.double, requires_grad=True)
    expected = resample(x)
    monkeypatch.setattr(devices, "is_cpu", lambda x: False)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = resample(x)
    torch.testing.assert_close(y, expected)
    assert all(tensor.ndim < 4 for tensor in kept)
    assert torch.autograd.gradcheck(resample, x) and torch.autograd.gradgradcheck(resample, x)
    mapped = torch.func.vmap(lambda own: resample(own[None])[0])(x)
    torch.testing.assert_close(mapped, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("resample", RESAMPLINGS)
def test_derivatives_of_resampling_on_cuda(resample, layout):
    x = torch.randn(2, 3, 4, 6, dtype=torch.double, requires_grad=True)
    y = resample(x)
    seed = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, seed)
    moved = x.detach().cuda().contiguous(memory_format=layout).requires_grad_()
    (gradient,) = torch.autograd.grad(resample(moved), moved, seed.cuda().contiguous(memory_format=layout))
    torch.testing.assert_close(gradient.cpu(), expected)


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


@pytest.mark.parametrize("avx512", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_derivatives_of_the_convolutions_on_a_cpu(transposed, avx512, monkeypatch):
    monkeypatch.setattr(modulation, "_AVX512", avx512)
    inputs = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in ((2, 2, 3, 3), (2, 2, 3, 3))]

    def convolution(x, kernels):
        return modulation._Convolution.apply(x, kernels, transposed)

    assert torch.autograd.gradcheck(convolution, inputs) and torch.autograd.gradgradcheck(convolution, inputs)
    alone = torch.stack([convolution(x[None], inputs[1])[0] for x in inputs[0]])
    mapped = torch.func.vmap(convolution, (0, None))(inputs[0][:, None], inputs[1])[:, 0]
    torch.testing.assert_close(mapped, alone)
    x = inputs[0].detach().contiguous(memory_format=torch.channels_last)
    ours = torch.autograd.grad(convolution(x, inputs[1]).square().sum(), inputs[1])[0]
    plain = F.conv_transpose2d(x, inputs[1], stride=2) if transposed else F.conv2d(x, inputs[1], padding=1)
    torch.testing.assert_close(ours, torch.autograd.grad(plain.square().sum(), inputs[1])[0])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("demodulate", [False, True])
def test_gain_scales_the_result(batch, demodulate):
    inputs = torch.randn(batch, 4, 6, 6), torch.randn(5, 4, 3, 3), torch.randn(batch, 4), demodulate
    torch.testing.assert_close(modulated_conv2d(*inputs, gain=3.0), 3 * modulated_conv2d(*inputs))


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
