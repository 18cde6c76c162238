"""`convert eg3d`: the official EG3D pickles to `generator/` and `discriminator/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..cameras import CAMERA_RADIUS
from ..models.discriminator import DualDiscriminator
from ..models.eg3d import EG3DGenerator
from .folders import ConversionSummary, Converted, convert_file, load_tensors
from .pickles import ConversionError, Record, child, module_tensors, read_pickle

# Planes that the code of the released checkpoints looks up; see `EG3DGenerator`.
RELEASED_AXES = ("xy", "xz", "zx")
_SUPER_RESOLUTION = {f"SuperresolutionHybrid{kind}": kind for kind in ("2X", "4X", "8X", "8XDC")}
_DISCRIMINATORS = {"DualDiscriminator": True, "SingleDiscriminator": False}
_REQUIRED = object()


def convert_eg3d(
    source: str | Path,
    folder: str | Path,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> ConversionSummary:
    """Converts an official EG3D pickle; takes G_ema and D, runs nothing of the file.

    Args:
        source: a `.pkl` of EG3D's training, with `G_ema` and, where there is one, `D`.
        folder: `generator/` and `discriminator/` are written into it.
        overwrite: replace folders of those names.
        on_progress: called now and then as (bytes read, bytes in all).

    Raises:
        FileNotFoundError: there is no such file.
        FileExistsError: see `overwrite`.
        ConversionError: the file is hostile, damaged or of another kind; nothing has been written.
    """
    return convert_file(
        source,
        folder,
        ("generator", "discriminator"),
        overwrite,
        lambda path: _convert(read_pickle(path, on_progress)),
    )


def _convert(data: Any) -> Converted:
    if not isinstance(data, dict) or not isinstance(data.get("G_ema"), Record):
        raise ConversionError("it holds no generator G_ema")
    source = data["G_ema"]
    if source.class_name != "TriPlaneGenerator":
        raise ConversionError(f"its G_ema is a {source.class_name}, expected EG3D's TriPlaneGenerator")
    notes: list[str] = []
    config = generator_config(source, notes)
    with torch.device("meta"):
        generator = EG3DGenerator(**config)
    networks = {
        "generator": load_tensors(generator, rename_tensors(module_tensors(source, "G_ema"), _generator_name), "G_ema")
    }
    taken = {"G_ema"}
    judge = data.get("D")
    if isinstance(judge, Record) and judge.class_name in _DISCRIMINATORS:
        tensors = rename_tensors(module_tensors(judge, "D"), discriminator_name)
        with torch.device("meta"):
            discriminator = DualDiscriminator(
                **discriminator_config(judge, tensors, config["neural_resolution"], _DISCRIMINATORS[judge.class_name])
            )
        networks["discriminator"] = load_tensors(discriminator, tensors, "D")
        taken.add("D")
    elif judge is not None:
        notes.append(
            f"the discriminator {getattr(judge, 'class_name', judge)} is of an unknown kind and was not taken"
        )
    return Converted(networks, [str(name) for name in data if name not in taken], notes)


def _check_supported(source: Record, rendering: Mapping[str, Any]) -> None:
    """Raises `ConversionError` where a `TriPlaneGenerator` renders in a way that `EG3DGenerator` does not."""
    expected = {
        "clamp_mode": "softplus",
        "disparity_space_sampling": False,
        "white_back": False,
        "superresolution_noise_mode": "none",
    }
    for name, value in expected.items():
        if rendering.get(name, value) != value:
            raise ConversionError(
                f"its rendering has {name} = {repr(rendering[name])[:40]}; only {value!r} is supported"
            )
    if setting(source, "img_channels", int, 3) != 3:
        raise ConversionError("its images have other channels than red, green and blue")


def generator_config(source: Record, notes: list[str]) -> dict[str, Any]:
    """`EG3DGenerator`'s arguments for a `TriPlaneGenerator`; what was assumed is appended to `notes`.

    Raises:
        ConversionError: a setting that `EG3DGenerator` does not have.
    """
    rendering = setting(source, "rendering_kwargs", dict)
    _check_supported(source, rendering)
    enlarger = child(source, "superresolution")
    kind = _SUPER_RESOLUTION.get(enlarger.class_name if enlarger else "")
    if kind is None:
        raise ConversionError(
            f"its super-resolution is {enlarger and enlarger.class_name}, expected one of "
            f"{', '.join(_SUPER_RESOLUTION)}"
        )
    tensors = module_tensors(source, "G_ema")
    widths = block_widths(tensors, "backbone.synthesis.")
    if max(widths) != 256 or tensors[f"backbone.synthesis.b{max(widths)}.torgb.bias"].shape != (96,):
        raise ConversionError("its planes are not three of 32 channels at 256 x 256")
    enlarger_clamp = child(source, "superresolution.block0.conv1")
    default_clamp = 256.0 if setting(source, "sr_num_fp16_res", int, 0) > 0 else None
    return {
        "z_dim": setting(source, "z_dim", int),
        "w_dim": setting(source, "w_dim", int),
        "camera_dim": setting(source, "c_dim", int),
        "mapping_layers": count_layers(tensors, "backbone.mapping.fc"),
        "pose_conditioning": not number(rendering, "c_gen_conditioning_zero", bool, False),
        # The official code's default is 0: it multiplies the condition by it.
        "camera_scale": number(rendering, "c_scale", float, 0.0),
        "image_size": setting(source, "img_resolution", int),
        "plane_resolution": 256,
        "plane_features": 32,
        **channel_widths(widths),
        "backbone_noise": "backbone.synthesis.b4.conv1.noise_strength" in tensors,
        "super_resolution_noise": "superresolution.block0.conv1.noise_strength" in tensors,
        "conv_clamp": clamp_of(
            child(source, "backbone.synthesis.b4.conv1"), setting(source, "conv_clamp", float, 256.0)
        ),
        "super_resolution_conv_clamp": clamp_of(enlarger_clamp, default_clamp),
        "plane_axes": _plane_axes(child(source, "renderer"), notes),
        "box_size": number(rendering, "box_warp", float),
        "decoder_hidden": tensors["decoder.net.0.weight"].shape[0] if "decoder.net.0.weight" in tensors else 64,
        "decoder_lr_multiplier": number(rendering, "decoder_lr_mul", float, 1.0),
        "neural_resolution": setting(source, "neural_rendering_resolution", int, 64),
        "depth_samples": number(rendering, "depth_resolution", int),
        "importance_samples": number(rendering, "depth_resolution_importance", int),
        "ray_start": number(rendering, "ray_start", float),
        "ray_end": number(rendering, "ray_end", float),
        "super_resolution_kind": kind,
        "super_resolution_antialias": number(rendering, "sr_antialias", bool, True),
        "camera_radius": number(rendering, "avg_camera_radius", float, CAMERA_RADIUS),
        "camera_pivot": _pivot(rendering),
    }


def _pivot(rendering: Mapping[str, Any]) -> list[float]:
    value = rendering.get("avg_camera_pivot", [0.0, 0.0, 0.0])
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise ConversionError(f"its avg_camera_pivot is {str(value)[:40]!r}, expected three numbers")
    return [number({"avg_camera_pivot": part}, "avg_camera_pivot", float) for part in value]


def discriminator_config(
    source: Record, tensors: Mapping[str, torch.Tensor], raw_size: int, dual: bool
) -> dict[str, Any]:
    """`DualDiscriminator`'s arguments for an official discriminator; `tensors` have this project's names."""
    size = setting(source, "img_resolution", int)
    widths = {}
    while f"b{size >> len(widths)}.conv0.weight" in tensors:
        side = size >> len(widths)
        widths[side] = tensors[f"b{side}.conv0.weight"].shape[0]
    if not widths or "conv.bias" not in tensors:
        raise ConversionError("its discriminator D is not a residual one of StyleGAN2")
    group = child(source, "b4.mbstd")
    return {
        "image_size": size,
        "camera_dim": setting(source, "c_dim", int, 25),
        **channel_widths(widths | {4: tensors["conv.bias"].shape[0]}),
        "conv_clamp": clamp_of(child(source, f"b{size}.conv0"), setting(source, "conv_clamp", float, 256.0)),
        "mapping_layers": count_layers(tensors, "mapping_network.layers."),
        "deviation_group": number(group.state, "group_size", int, 4) if group else 4,
        "raw_size": raw_size,
        "dual": dual,
    }


def setting(source: Record, name: str, kind: type, default: Any = _REQUIRED) -> Any:
    """An attribute of a module, or the argument it was made with, as a plain value of that kind.

    Raises:
        ConversionError: it is missing and there is no default, or it is of another kind.
    """
    arguments = source.state.get("_init_kwargs")
    values = (arguments if isinstance(arguments, dict) else {}) | {
        key: value for key, value in source.state.items() if type(key) is str and not key.startswith("_")
    }
    if kind is dict:
        if not isinstance(values.get(name), dict):
            raise ConversionError(f"it does not say its {name}")
        return values[name]
    return number(values, name, kind, default)


def number(values: Mapping[str, Any], name: str, kind: type, default: Any = _REQUIRED) -> Any:
    """`values[name]` as int, float or bool; `None` stays where it is given for a float. Raises as `setting`."""
    value = values.get(name, default)
    if value is _REQUIRED:
        raise ConversionError(f"it does not say its {name}")
    if value is None and default is not _REQUIRED:
        return None
    if kind is bool and type(value) in (bool, int):
        return bool(value)
    if type(value) not in (int, float) or not abs(value) <= 1e9 or (kind is int and value != int(value)):
        raise ConversionError(f"its {name} is {str(value)[:40]!r}, expected a number")
    return kind(value)


def count_layers(tensors: Mapping[str, torch.Tensor], prefix: str) -> int:
    """How many layers `<prefix>0`, `<prefix>1`, … there are."""
    count = 0
    while f"{prefix}{count}.weight" in tensors:
        count += 1
    return count


def block_widths(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[int, int]:
    """{resolution: channels} of a synthesis network's blocks.

    Raises:
        ConversionError: there are none.
    """
    widths, side = {}, 4
    while f"{prefix}b{side}.conv1.weight" in tensors:
        widths[side] = tensors[f"{prefix}b{side}.conv1.weight"].shape[0]
        side *= 2
    if len(widths) < 2 or f"{prefix}b{max(widths)}.torgb.bias" not in tensors:
        raise ConversionError("it has no synthesis network of StyleGAN2's skip architecture")
    return widths


def channel_widths(widths: Mapping[int, int]) -> dict[str, int]:
    """`channel_base` and `channel_max` that give these {resolution: channels}.

    Raises:
        ConversionError: the widths do not follow min(base / resolution, max).
    """
    top = max(widths.values())
    narrow = [side * width for side, width in widths.items() if width < top]
    base = narrow[0] if narrow else top * max(widths)
    if any(min(base // side, top) != width for side, width in widths.items()):
        raise ConversionError(f"its widths {dict(widths)} do not follow StyleGAN2's rule")
    return {"channel_base": base, "channel_max": top}


def clamp_of(layer: Record | None, default: float | None) -> float | None:
    """The clamp of a layer's activations, from the layer itself where it says so."""
    if layer is not None and "conv_clamp" in layer.state:
        return number(layer.state, "conv_clamp", float, None)
    return default


def _plane_axes(renderer: Record | None, notes: list[str]) -> list[str]:
    axes = renderer.state.get("plane_axes") if renderer else None
    if not isinstance(axes, torch.Tensor):
        notes.append(f"the file does not say its plane axes; the released checkpoints' {RELEASED_AXES} were assumed")
        return list(RELEASED_AXES)
    if axes.shape != (3, 3, 3) or not torch.equal(
        axes.float() @ axes.float().mT, torch.eye(3, dtype=torch.float32, device=axes.device).expand(3, 3, 3)
    ):
        raise ConversionError("its plane axes are not permutations of x, y and z")
    # A plane's first two rows are the unit vectors along its columns and rows.
    return ["".join("xyz"[int(row.argmax())] for row in plane[:2]) for plane in axes]


def rename_tensors(tensors: Mapping[str, torch.Tensor], rename: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """This project's names; resampling filters, which are constants here, are checked and left out.

    Raises:
        ConversionError: another resampling filter than [1, 3, 3, 1].
    """
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float32, device="cpu") / 8
    renamed = {}
    for name, tensor in tensors.items():
        if name.rpartition(".")[2] == "resample_filter":
            if tensor.shape != (4, 4) or not torch.allclose(tensor.float(), taps[:, None] * taps, atol=1e-6):
                raise ConversionError(f"{name} is another filter than [1, 3, 3, 1]")
        else:
            renamed[rename(name)] = tensor
    return renamed


def _generator_name(name: str) -> str:
    prefixes = {
        "backbone.mapping.fc": "mapping_network.layers.",
        "backbone.mapping.": "mapping_network.",
        "backbone.synthesis.": "backbone.",
        "superresolution.": "super_resolution.",
        "decoder.net.0.": "decoder.hidden.",
        "decoder.net.2.": "decoder.out.",
    }
    for official, ours in prefixes.items():
        if name.startswith(official):
            return ours + name.removeprefix(official)
    return name


def discriminator_name(name: str) -> str:
    """Name in `DualDiscriminator` of a tensor of the official discriminators."""
    if name.startswith("mapping.fc"):
        return "mapping_network.layers." + name.removeprefix("mapping.fc")
    if name.startswith("mapping."):
        return "mapping_network." + name.removeprefix("mapping.")
    return name.removeprefix("b4.")
