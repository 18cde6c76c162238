"""`convert stylegan2`: NVIDIA's pickles and rosinality's checkpoints to `generator/` (and `discriminator/`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..models.discriminator import DualDiscriminator
from ..models.stylegan2 import StyleGAN2Generator
from .eg3d import (
    block_widths,
    channel_widths,
    clamp_of,
    count_layers,
    discriminator_config,
    discriminator_name,
    number,
    rename_tensors,
    setting,
)
from .folders import ConversionSummary, Converted, convert_file, load_tensors, read_state, tensors_of
from .pickles import ConversionError, Record, child, module_tensors, read_pickle


def convert_stylegan2(
    source: str | Path,
    folder: str | Path,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> ConversionSummary:
    """Converts a StyleGAN2 checkpoint; runs nothing of the file.

    Args:
        source: a pickle of NVIDIA's stylegan2-ada-pytorch (`G_ema` and `D` are taken), or a `torch.save` or
            safetensors file in the layout of rosinality's stylegan2-pytorch (`g_ema`, `latent_avg` and `d`).
        folder: `generator/` and, where the file has one, `discriminator/` are written into it.
        overwrite: replace folders of those names.
        on_progress: called now and then as (bytes read, bytes in all).

    Raises:
        FileNotFoundError: there is no such file.
        FileExistsError: see `overwrite`.
        ConversionError: the file is hostile, damaged or of another kind; nothing has been written.
    """

    def convert(path: Path) -> Converted:
        return _from_pickle(read_pickle(path, on_progress)) if path.suffix == ".pkl" else _from_state(read_state(path))

    return convert_file(source, folder, ("generator", "discriminator"), overwrite, convert)


def _from_pickle(data: Any) -> Converted:
    if not isinstance(data, dict) or not isinstance(data.get("G_ema"), Record):
        raise ConversionError("it holds no generator G_ema")
    source = data["G_ema"]
    tensors = module_tensors(source, "G_ema")
    if source.class_name != "Generator" or "synthesis.b4.const" not in tensors:
        raise ConversionError(f"its G_ema is a {source.class_name} of another kind than StyleGAN2's Generator")
    if setting(source, "c_dim", int, 0) or setting(source, "img_channels", int, 3) != 3:
        raise ConversionError("it is conditional, or its images are not RGB; only unconditional RGB is supported")
    arguments = _options(source, "synthesis_kwargs")
    clamp = clamp_of(child(source, "synthesis.b4.conv1"), number(arguments, "conv_clamp", float, 256.0))
    networks = {"generator": _generator(rename_tensors(tensors, _official_name), clamp)}
    taken = {"G_ema"}
    judge = data.get("D")
    if isinstance(judge, Record) and judge.class_name == "Discriminator":
        networks["discriminator"] = _discriminator(judge)
        taken.add("D")
    return Converted(networks, [str(name) for name in data if name not in taken])


def _options(source: Record, name: str) -> Mapping[str, Any]:
    arguments = source.state.get("_init_kwargs")
    arguments = arguments if isinstance(arguments, dict) else {}
    nested = arguments.get(name)
    return nested if isinstance(nested, dict) else arguments


def _generator(tensors: Mapping[str, torch.Tensor], clamp: float | None) -> StyleGAN2Generator:
    """A generator of the sizes that the weights, under this project's names, have."""
    widths = block_widths(tensors, "backbone.")
    layers = count_layers(tensors, "mapping_network.layers.")
    if not layers:
        raise ConversionError("it has no mapping network")
    first = tensors["mapping_network.layers.0.weight"]
    with torch.device("meta"):
        generator = StyleGAN2Generator(
            z_dim=first.shape[1],
            w_dim=first.shape[0],
            mapping_layers=layers,
            image_size=max(widths),
            **channel_widths(widths),
            use_noise="backbone.b4.conv1.noise_strength" in tensors,
            conv_clamp=clamp,
        )
    return load_tensors(generator, tensors, "the generator")


def _discriminator(source: Record) -> DualDiscriminator:
    tensors = rename_tensors(module_tensors(source, "D"), discriminator_name)
    # Neither a raw rendering nor a camera: StyleGAN2's own.
    config = discriminator_config(source, tensors, raw_size=setting(source, "img_resolution", int), dual=False)
    with torch.device("meta"):
        discriminator = DualDiscriminator(**config)
    return load_tensors(discriminator, tensors, "D")


def _official_name(name: str) -> str:
    name = name.replace("mapping.fc", "mapping_network.layers.").replace("mapping.w_avg", "mapping_network.w_avg")
    return "backbone." + name.removeprefix("synthesis.") if name.startswith("synthesis.") else name


def _from_state(state: Mapping[str, Any]) -> Converted:
    """rosinality's layout: `g_ema`, `latent_avg` and `d`, or the generator's state dictionary alone."""
    left_out, notes, networks = [], [], {}
    weights, average = state, state.get("latent_avg")
    if isinstance(state.get("g_ema"), dict):
        weights = state["g_ema"]
        judge = state.get("d")
        if isinstance(judge, dict) and "final_linear.1.weight" in judge:
            networks["discriminator"] = _rosinality_discriminator(tensors_of(judge, "the discriminator"))
        taken = ("g_ema", "latent_avg", *(["d"] if networks else []))
        left_out = sorted(str(name) for name in state if name not in taken)
    tensors = tensors_of({name: value for name, value in weights.items() if name != "latent_avg"}, "the generator")
    if "input.input" not in tensors:
        raise ConversionError("it holds no generator in the layout of rosinality's stylegan2-pytorch")
    renamed = {}
    for name, tensor in tensors.items():
        if not name.endswith(".kernel"):  # of the resampling filters
            ours, shape = _rosinality_name(name, tensor)
            renamed[ours] = tensor.reshape(shape)
    w_dim = tensors["style.1.weight"].shape[0] if "style.1.weight" in tensors else 0
    if not isinstance(average, torch.Tensor):
        notes.append("the file has no latent_avg: w_avg is zero, and truncation would pull towards it")
        average = torch.zeros(w_dim, dtype=torch.float32, device="cpu")
    if average.ndim > 1:  # one a layer, all alike, as encoders store it
        average = average.reshape(-1, average.shape[-1])[0]
    renamed["mapping_network.w_avg"] = average
    return Converted({"generator": _generator(renamed, None), **networks}, left_out, notes)


def _rosinality_discriminator(tensors: Mapping[str, torch.Tensor]) -> DualDiscriminator:
    """Its layer `convs.0` is from-RGB, `convs.n` the residual block of resolution size / 2^(n - 1)."""
    blocks = len({name.split(".")[1] for name in tensors if name.startswith("convs.")}) - 1
    if not 1 <= blocks <= 10:
        raise ConversionError(f"its discriminator has {blocks} residual blocks, expected 1 to 10")
    size = 4 << blocks
    layers = {"final_conv": "conv", "final_linear.0": "fc", "final_linear.1": "out", "convs.0": f"b{size}.fromrgb"}
    for index in range(1, blocks + 1):
        block = f"b{size >> (index - 1)}"
        for theirs, ours in (("conv1", "conv0"), ("conv2", "conv1"), ("skip", "skip")):
            layers[f"convs.{index}.{theirs}"] = f"{block}.{ours}"
    renamed = {}
    for name, tensor in tensors.items():
        layer, _, rest = name.rpartition(".")
        # Inside of a layer, blur, convolution and activation are numbered.
        ours = layers.get(layer) or layers.get(layer.rpartition(".")[0])
        if ours is None:
            raise ConversionError(f"its discriminator has an unknown tensor {name[:80]!r}")
        if rest != "kernel":  # of the resampling filters
            renamed[f"{ours}.{rest}"] = tensor
    widths = {}
    for side in (4, *(size >> index for index in range(blocks))):
        name = f"b{side}.conv0.weight" if side > 4 else "conv.weight"
        if name not in renamed:
            raise ConversionError(f"its discriminator lacks {name}, as it is called here")
        widths[side] = renamed[name].shape[0]
    with torch.device("meta"):
        discriminator = DualDiscriminator(
            image_size=size,
            camera_dim=0,
            **channel_widths(widths),
            conv_clamp=None,
            raw_size=size,
            dual=False,
        )
    return load_tensors(discriminator, renamed, "the discriminator")


def _rosinality_name(name: str, tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    """This project's name of a tensor and its shape there.

    Layer n of `convs`, `to_rgbs` and `noises` belongs to resolution 8·2^(n // 2), 8·2^n and 4·2^((n + 1) // 2).
    """
    parts = {
        "conv.weight": "weight",
        "conv.modulation.weight": "affine.weight",
        "conv.modulation.bias": "affine.bias",
        "noise.weight": "noise_strength",
        "activate.bias": "bias",
        "bias": "bias",
    }
    shapes = {"weight": tensor.shape[1:], "noise_strength": (), "bias": (tensor.numel(),)}
    if name == "input.input":
        return "backbone.b4.const", tensor.shape[1:]
    if match := re.fullmatch(r"style\.(\d+)\.(weight|bias)", name):
        return f"mapping_network.layers.{int(match[1]) - 1}.{match[2]}", tensor.shape
    if match := re.fullmatch(r"noises\.noise_(\d+)", name):
        index = int(match[1])
        layer = "conv1" if index % 2 == 0 else "conv0"
        return f"backbone.b{4 << ((index + 1) // 2)}.{layer}.noise_const", tensor.shape[2:]
    match = re.fullmatch(r"(?:conv1|to_rgb1|(convs|to_rgbs)\.(\d+))\.(.+)", name)
    if not match or match[3] not in parts:
        raise ConversionError(f"it has an unknown tensor {name[:80]!r}")
    part = parts[match[3]]
    if match[1] == "convs":
        layer = f"b{8 << (int(match[2]) // 2)}.conv{int(match[2]) % 2}"
    elif match[1] == "to_rgbs":
        layer = f"b{8 << int(match[2])}.torgb"
    else:
        layer = "b4.conv1" if name.startswith("conv1") else "b4.torgb"
    return f"backbone.{layer}.{part}", tuple(shapes.get(part, tensor.shape))
