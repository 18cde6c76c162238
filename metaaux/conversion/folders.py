"""Reading foreign weight files, and writing converted networks: all of them or nothing."""

from __future__ import annotations

import os
import pickle
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
from diffusers import ModelMixin
from safetensors.torch import load_file, save_file

from ..files import atomic_path, check_output_file
from .pickles import ConversionError

Result = TypeVar("Result")


@dataclass
class ConversionSummary:
    """What a conversion made.

    Attributes:
        folder: where the networks' folders are.
        networks: by folder name: "class", "tensors" and "parameters".
        left_out: entries of the source that were not taken.
        notes: what was assumed or is worth knowing.
    """

    folder: Path
    networks: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.folder / name}: {part['class']}, {part['tensors']} tensors, {part['parameters']:,} parameters"
            for name, part in self.networks.items()
        ]
        lines += [f"left out: {', '.join(self.left_out)}"] if self.left_out else []
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def read_state(path: str | Path) -> dict[str, Any]:
    """The dictionary in a `.safetensors` file or a file that `torch.save` wrote (read with `weights_only`).

    Raises:
        FileNotFoundError: there is no such file.
        ConversionError: the file is neither, holds no dictionary, or holds objects other than tensors, containers
            and numbers; such objects are not made.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except safetensors.SafetensorError as error:
        raise ConversionError(f"{path.name} is not a safetensors file ({error})") from None
    except pickle.UnpicklingError as error:
        # torch's message starts with advice to switch the safety off; the cause follows it.
        cause = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
        raise ConversionError(
            f"{path.name} cannot be read as plain weights: {' '.join(cause.split())[:200]} (nothing in it was run)"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise ConversionError(f"{path.name} is damaged or no file of torch.save: {str(error)[:200]}") from None
    if not isinstance(state, dict):
        raise ConversionError(f"{path.name} holds a {type(state).__name__}, expected a dictionary of tensors")
    return state


def tensors_of(state: Mapping[str, Any], what: str) -> dict[str, torch.Tensor]:
    """The tensors of a state dictionary by name, without a leading "module." of data-parallel training.

    Raises:
        ConversionError: it holds no tensors, or something else than tensors.
    """
    others = [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others or not state:
        raise ConversionError(f"{what} is no dictionary of tensors" + (f": {', '.join(others[:5])}" if others else ""))
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def load_tensors(model: ModelMixin, tensors: Mapping[str, torch.Tensor], what: str) -> ModelMixin:
    """Puts weights into a model made on the "meta" device, in float32 and eval mode; names and shapes must all fit.

    Raises:
        ConversionError: a tensor is missing, left over, of another shape, or not finite.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        parts = [f"lacks {', '.join(missing[:4])}"] * bool(missing) + [f"has {', '.join(unknown[:4])}"] * bool(unknown)
        raise ConversionError(
            f"{what} is not a supported {type(model).__name__}: it {' and '.join(parts)} "
            f"({len(missing)} missing, {len(unknown)} unknown tensors)"
        )
    state = {}
    for name, shape in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise ConversionError(f"{what}: {name} has the shape {list(tensor.shape)}, expected {list(shape)}")
        if tensor.is_floating_point():
            tensor = tensor.float()
            if not torch.isfinite(tensor).all():
                raise ConversionError(f"{what}: {name} has values that are not finite")
        state[name] = tensor
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def check_target(folder: str | Path, names: tuple[str, ...], overwrite: bool) -> None:
    """Raises FileExistsError if a network's folder is there already, before the work of a conversion begins."""
    for name in names:
        target = Path(folder) / name
        if target.exists() and not overwrite:
            raise FileExistsError(f"{target} exists already; choose another folder, or overwrite it (--overwrite)")


@dataclass
class Converted:
    """Networks by folder name; the rest as in `ConversionSummary`."""

    networks: Mapping[str, ModelMixin]
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def convert_file(
    source: str | Path,
    folder: str | Path,
    names: tuple[str, ...],
    overwrite: bool,
    convert: Callable[[Path], Converted],
) -> ConversionSummary:
    """What every conversion does: looks for the file and the folders' names first, writes once all has been read.

    Args:
        source: the foreign file. folder: where the networks' folders are written.
        names: of the folders that `convert` may make.
        overwrite: replace folders of those names.
        convert: reads the file.

    Raises:
        FileNotFoundError, FileExistsError: there is no such file; see `overwrite`.
        ConversionError: as `convert` raised it, with the file's name in front.
    """
    source = Path(source)
    check_target(folder, names, overwrite)
    return _write(folder, _read(source, convert), overwrite)


def _read(source: Path, convert: Callable[[Path], Result]) -> Result:
    """What `convert` makes of a file; its errors name the file."""
    if not source.is_file():
        raise FileNotFoundError(f"there is no file {source}")
    try:
        return convert(source)
    except ConversionError as error:
        raise ConversionError(f"{source.name} cannot be converted: {error}") from None


@dataclass
class ConvertedTensors:
    """Tensors by name; the rest as in `ConversionSummary`."""

    tensors: Mapping[str, torch.Tensor]
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def convert_to_file(
    source: str | Path, target: str | Path, overwrite: bool, convert: Callable[[Path], ConvertedTensors]
) -> ConversionSummary:
    """`convert_file` for networks that are one safetensors file, which is whole or absent.

    Args:
        source: the foreign file. target: the safetensors file.
        overwrite: replace a file of that name.
        convert: reads the foreign file.

    Raises:
        FileNotFoundError: there is no such file, or no folder for the target.
        FileExistsError: see `overwrite`.
        ConversionError: as `convert` raised it, with the file's name in front.
    """
    source, target = Path(source), Path(target)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists already; choose another name, or overwrite it (--overwrite)")
    check_output_file(target)
    converted = _read(source, convert)
    tensors = {name: tensor.contiguous() for name, tensor in converted.tensors.items()}
    with atomic_path(target) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    parameters = sum(tensor.numel() for tensor in tensors.values())
    network = {"class": "safetensors", "tensors": len(tensors), "parameters": parameters}
    return ConversionSummary(target.parent, {target.name: network}, converted.left_out, converted.notes)


def _write(folder: str | Path, converted: Converted, overwrite: bool = False) -> ConversionSummary:
    """Saves each network as `folder/name`: configuration and safetensors. Every folder is whole or absent.

    Raises:
        FileExistsError: a folder of that name is there already and `overwrite` is off.
    """
    folder, networks = Path(folder), converted.networks
    check_target(folder, tuple(networks), overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".conversion-{secrets.token_hex(4)}"
    summary = ConversionSummary(folder, left_out=converted.left_out, notes=converted.notes)
    try:
        for name, network in networks.items():
            network.save_pretrained(temporary / name)
            summary.networks[name] = {
                "class": type(network).__name__,
                "tensors": len(network.state_dict()),
                "parameters": sum(p.numel() for p in network.parameters()),
            }
        for name in networks:
            if (folder / name).exists():
                os.replace(folder / name, temporary / f"old-{name}")
            os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return summary
