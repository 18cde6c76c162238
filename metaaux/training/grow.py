"""Grow a trained generator and its discriminator: wider layers first, then twice the pixels, from the same weights.

Widening keeps both functions (Chen, Goodfellow & Shlens, "Net2Net", 2016): a doubled layer has each channel twice, and
whoever reads the two copies shares its weight among them. Doubling the pixels keeps them nearly: the super-resolution
does at twice the size what it did before, and the discriminator gets a new first block that begins as the reduction by
two followed by the old first layer.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import nn

from ..files import forget_origin
from ..models.activation import LRELU_GAIN, LRELU_SLOPE
from ..models.discriminator import Convolution, DualDiscriminator
from ..models.eg3d import EG3DGenerator
from ..models.stylegan2 import SynthesisLayer, ToRGB
from ..models.weights import constructor_arguments
from .loading import load_network

#: Relative difference between the weights by which two copies of a channel are read.
SPREAD = 0.2


def _twice(tensor: torch.Tensor, dim: int = 0, when: bool = True) -> torch.Tensor:
    """Channels of `dim` followed by their copies."""
    return torch.cat((tensor, tensor), dim) if when else tensor


def _shared(weight: torch.Tensor, random: torch.Generator, spread: float = SPREAD) -> torch.Tensor:
    """Weights [O, I, …] for inputs and their copies, [O, 2I, …]: W(1 + e) and W(1 - e), which sum up to 2W.

    e is ±`spread`, drawn for every weight. It tells copies apart (equal ones would get equal gradients and stay so),
    and its constant size makes the energy of each kernel exactly 2(1 + spread²) times what it was.
    """
    sign = torch.randint(0, 2, weight.shape, generator=random, dtype=weight.dtype) * 2 - 1
    return torch.cat((weight * (1 + spread * sign), weight * (1 - spread * sign)), dim=1)


def _fill(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    module.load_state_dict({name: value.clone() for name, value in state.items()})


def _widen_layer(old: SynthesisLayer, new: SynthesisLayer, scale: float, random: torch.Generator) -> float:
    """Fill a doubled layer whose inputs are `scale` times those of the old one; returns the scale of its outputs.

    Its sum over copies is 2Wx, which demodulation divides by the kernel's energy, √(2(1 + e²)) times the old one's. So
    the outputs are √2/√(1 + e²) times the old ones. Bias and noise follow, and the leaky ReLU lets a scale pass.
    """
    state = old.state_dict()
    doubled_in, doubled_out = new.in_channels > old.in_channels, new.out_channels > old.out_channels
    state["weight"] = _twice(state["weight"], when=doubled_out)
    if doubled_in:
        state["weight"] = _shared(state["weight"], random)
        scale *= math.sqrt(2 / (1 + SPREAD**2))
    for name in ("affine.weight", "affine.bias"):  # a style for each input
        state[name] = _twice(state[name], when=doubled_in)
    state["bias"] = _twice(state["bias"], when=doubled_out) * scale
    if "noise_strength" in state:
        state["noise_strength"] = state["noise_strength"] * scale
    _fill(new, state)
    return scale


def _widen_to_rgb(old: ToRGB, new: ToRGB, scale: float, random: torch.Generator) -> None:
    """Fill a to-RGB layer that reads doubled channels of `scale` times the old size. It is not demodulated."""
    state = old.state_dict()
    if len(new.affine.bias) > len(old.affine.bias):
        # Half for each copy; the style's gain is that of the inputs' number.
        state["weight"] = _shared(state["weight"], random) / 2 * (old.style_gain / new.style_gain)
        for name in ("affine.weight", "affine.bias"):
            state[name] = _twice(state[name])
    state["weight"] = state["weight"] / scale
    _fill(new, state)


@torch.no_grad()
def widen_generator(generator: EG3DGenerator, seed: int = 0) -> EG3DGenerator:
    """The same heads from a backbone of twice the `channel_base`: blocks below `channel_max` have twice the channels.

    Raises:
        ValueError: activations are clamped (a clamp lets no scale pass), or a block would grow by another factor.
    """
    if generator.config.conv_clamp is not None:
        raise ValueError("a generator whose activations are clamped cannot be widened")
    wide = EG3DGenerator(**constructor_arguments(generator, channel_base=generator.config.channel_base * 2))
    random = torch.Generator().manual_seed(seed)
    for name in ("mapping_network", "decoder", "super_resolution"):
        _fill(getattr(wide, name), getattr(generator, name).state_dict())
    scale = 1.0
    for r in generator.backbone.resolutions:
        old, new = getattr(generator.backbone, f"b{r}"), getattr(wide.backbone, f"b{r}")
        if new.conv1.out_channels not in (old.conv1.out_channels, 2 * old.conv1.out_channels):
            raise ValueError(f"b{r} would go from {old.conv1.out_channels} to {new.conv1.out_channels} channels")
        if old.has_conv0:
            scale = _widen_layer(old.conv0, new.conv0, scale, random)
        else:
            new.const.copy_(_twice(old.const, when=len(new.const) > len(old.const)))
        scale = _widen_layer(old.conv1, new.conv1, scale, random)
        _widen_to_rgb(old.torgb, new.torgb, scale, random)
    return wide


def _widen_convolution(old: Convolution, new: Convolution, random: torch.Generator) -> None:
    """Fill a doubled layer of the discriminator: half of the weight for each copy, and the new gain's inverse."""
    state = old.state_dict()
    doubled_out, doubled_in = (new.weight.shape[i] > old.weight.shape[i] for i in range(2))
    state = {name: _twice(value, when=doubled_out) for name, value in state.items()}
    if doubled_in:
        state["weight"] = _shared(state["weight"], random) / 2 * (old.weight_gain / new.weight_gain)
    _fill(new, state)


@torch.no_grad()
def widen_discriminator(discriminator: DualDiscriminator, seed: int = 0) -> DualDiscriminator:
    """The same logits from twice the `channel_base`.

    Raises:
        ValueError: a block would grow by another factor than two, or the last one would grow.
    """
    wide = DualDiscriminator(
        **constructor_arguments(discriminator, channel_base=discriminator.config.channel_base * 2)
    )
    random = torch.Generator().manual_seed(seed)
    for name in ("conv", "fc", "out", "mapping_network"):
        if hasattr(discriminator, name):
            old, new = getattr(discriminator, name), getattr(wide, name)
            if any(a.shape != b.shape for a, b in zip(old.parameters(), new.parameters(), strict=True)):
                raise ValueError("a discriminator whose last block would grow cannot be widened")
            _fill(new, old.state_dict())
    for r in discriminator.resolutions:
        block = getattr(discriminator, f"b{r}")
        for name, old in block.named_children():
            new = getattr(getattr(wide, f"b{r}"), name)
            if any(b not in (a, 2 * a) for a, b in zip(old.weight.shape[:2], new.weight.shape[:2])):
                raise ValueError(f"b{r}.{name} would go from {list(old.weight.shape)} to {list(new.weight.shape)}")
            _widen_convolution(old, new, random)
    return wide


@torch.no_grad()
def enlarge_generator(generator: EG3DGenerator) -> EG3DGenerator:
    """Twice the pixels: super-resolution "2X" becomes "4X", whose layers have the same shapes.

    They work at twice the size from there on, on features that are interpolated first; reduced by two, the image is
    about the old one.

    Raises:
        ValueError: the super-resolution is of another kind.
    """
    if generator.config.super_resolution_kind != "2X":
        raise ValueError(f"only a 2X super-resolution can become 4X, not {generator.config.super_resolution_kind}")
    size = generator.config.image_size * 2
    large = EG3DGenerator(**constructor_arguments(generator, image_size=size, super_resolution_kind="4X"))
    state = generator.state_dict()
    # Noise of the super-resolution is never applied; its constants are of the new size.
    fresh = {n: v for n, v in large.state_dict().items() if n not in state or v.shape != state[n].shape}
    if not all(n.startswith("super_resolution.") and n.endswith(".noise_const") for n in fresh):
        raise ValueError(f"shapes differ: {', '.join(fresh)}")
    _fill(large, state | fresh)
    return large


def _pass_pairs(weight: torch.Tensor, runtime: torch.Tensor, gain: float) -> None:
    """Write `runtime` weights [O, I] into the centre of the first channels of a layer's stored ones."""
    centre = weight.shape[-1] // 2
    weight[: runtime.shape[0]] = 0
    weight[: runtime.shape[0], : runtime.shape[1], centre, centre] = runtime / gain


@torch.no_grad()
def enlarge_discriminator(
    discriminator: DualDiscriminator, first_channels: int | None = None, seed: int = 0
) -> DualDiscriminator:
    """Twice the pixels: a new block of `first_channels`, which begins as the old first layer on the reduced image.

    A leaky ReLU of slope a loses nothing if v and -v both go through it: act(v) - act(-v) = (1 + a)·v. Such pairs
    carry image and raw rendering through the block to its last layer, whose blurring stride is the reduction by two,
    and which takes over the weights of the old fromRGB. The block's other channels are random, and read with weight
    zero at first, as is its skip connection.

    Raises:
        ValueError: fewer channels than the pairs need, or clamped activations.
    """
    config = discriminator.config
    if config.conv_clamp is not None:
        raise ValueError("a discriminator whose activations are clamped cannot be enlarged so")
    size = config.image_size * 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        large = DualDiscriminator(
            **constructor_arguments(discriminator, image_size=size, first_channels=first_channels)
        )
    state = {n: v for n, v in discriminator.state_dict().items() if ".fromrgb." not in n}
    own = large.state_dict()
    _fill(large, state | {n: v for n, v in own.items() if n.startswith(f"b{size}.")})
    block, former = getattr(large, f"b{size}"), getattr(discriminator, f"b{config.image_size}").fromrgb
    colours = former.weight.shape[1]
    if len(block.fromrgb.weight) < 2 * colours:
        raise ValueError(f"the new block needs {2 * colours} channels at least, got {len(block.fromrgb.weight)}")
    pair = torch.eye(colours)
    both = torch.cat((pair, -pair))  # [2C, C]: v → (v, -v)
    value = torch.cat((pair, -pair), dim=1) / (1 + LRELU_SLOPE)  # [C, 2C]: (act(v), act(-v)) → v
    _pass_pairs(block.fromrgb.weight, both / LRELU_GAIN, block.fromrgb.weight_gain)
    _pass_pairs(block.conv0.weight, both @ value / LRELU_GAIN, block.conv0.weight_gain)
    # conv1's activation is scaled by √½ for the sum with the skip, which is zero here: fromRGB's √2 comes from inside.
    runtime = former.weight[:, :, 0, 0] * former.weight_gain * LRELU_GAIN
    _pass_pairs(block.conv1.weight, runtime @ value, block.conv1.weight_gain)
    block.conv1.bias.copy_(former.bias * LRELU_GAIN)
    block.skip.weight.zero_()
    return large


def grow(
    source: str | os.PathLike,
    target: str | os.PathLike,
    wider: bool = True,
    larger: bool = True,
    first_channels: int | None = None,
) -> None:
    """Read `generator` and `discriminator` of a checkpoint, write the grown ones to `target` in float32.

    Raises:
        FileNotFoundError, OSError: a network is missing.
        ValueError: they cannot be grown so.
    """
    source, target = Path(source), Path(target)
    generator = load_network(EG3DGenerator, source / "generator")
    discriminator = load_network(DualDiscriminator, source / "discriminator")
    if wider:
        generator, discriminator = widen_generator(generator), widen_discriminator(discriminator)
    if larger:
        generator = enlarge_generator(generator)
        discriminator = enlarge_discriminator(discriminator, first_channels)
    generator.save_pretrained(target / "generator")
    discriminator.save_pretrained(target / "discriminator")
    forget_origin(target)
