"""`convert recogniser`: dlib's face recognition network to `identity/`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..models.recogniser import ChannelAffine, FaceRecogniser
from .folders import ConversionSummary, Converted, convert_file, load_tensors, read_state, tensors_of
from .pickles import ConversionError

#: dlib's own file has 22 MB.
_MAX_BYTES = 64 * 2**20
#: What dlib writes in front of a layer's parameters, by the module that has them here.
_TAGS = {nn.Conv2d: b"\x01\x05con_4", ChannelAffine: b"\x01\x07affine_", nn.Linear: b"\x01\x04fc_2"}


def convert_recogniser(source: str | Path, folder: str | Path, overwrite: bool = False) -> ConversionSummary:
    """Makes an identity network R (Eq. 11) of dlib's recogniser.

    Args:
        source: `dlib_face_recognition_resnet_model_v1.dat`, or its weights under `FaceRecogniser`'s names, in any
            precision (safetensors or `torch.save`).
        folder: `identity/` is written into it.
        overwrite: replace a folder of that name.

    Raises:
        FileNotFoundError: there is no such file.
        FileExistsError: see `overwrite`.
        ConversionError: the file is hostile, damaged or of another kind; nothing has been written.
    """
    return convert_file(source, folder, ("identity",), overwrite, _convert)


def _convert(source: Path) -> Converted:
    with torch.device("meta"):
        network = FaceRecogniser()
    if source.suffix == ".dat":
        tensors = _read_dlib(source, network)
    else:
        tensors = tensors_of(read_state(source), "it")
    return Converted({"identity": load_tensors(network, tensors, "it")})


def _read_dlib(source: Path, network: FaceRecogniser) -> dict[str, torch.Tensor]:
    """The parameters in a file that dlib's `serialize` wrote, by the names of `network`.

    dlib writes a network from its input on: for each layer that has parameters a tag, then a tensor with all of them,
    filters or factors before biases. What lies between them describes settings and caches, and is passed over.
    """
    with source.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ConversionError(f"it is larger than {_MAX_BYTES // 2**20} MiB")
    tensors: dict[str, torch.Tensor] = {}
    position = 0
    for name, module in network.named_modules():
        tag = _TAGS.get(type(module))
        if tag is None:
            continue
        start = data.find(tag, position)
        if start < 0:
            raise ConversionError(f"it ends before the layer that {name} is here; expected dlib's ResNet of 29 layers")
        position = start + len(tag)
        if isinstance(module, nn.Linear):  # its sizes come first
            for _ in range(2):
                _, position = _integer(data, position)
        values, position = _tensor(data, position, sum(p.numel() for p in module.parameters()), name)
        if isinstance(module, nn.Linear):
            tensors[f"{name}.weight"] = values.view(module.in_features, module.out_features).mT.contiguous()
            continue
        weight, bias = module.weight, module.bias
        tensors[f"{name}.weight"] = values[: weight.numel()].view(weight.shape).clone()
        tensors[f"{name}.bias"] = values[weight.numel() :].view(bias.shape).clone()
    if any(data.find(tag, position) >= 0 for tag in _TAGS.values()):
        raise ConversionError("it has more layers than dlib's face recognition network")
    return tensors


def _integer(data: bytes, position: int) -> tuple[int, int]:
    """A whole number as dlib packs it (how many bytes, then these, the lowest first), and the place behind it."""
    size = data[position] & 0x0F if position < len(data) else 0
    if not 1 <= size <= 8 or data[position] & 0x80:
        raise ConversionError("a size in it is none")
    end = position + 1 + size
    return int.from_bytes(data[position + 1 : end], "little"), end


def _tensor(data: bytes, position: int, count: int, name: str) -> tuple[torch.Tensor, int]:
    """A tensor of `count` numbers, flat, and the place behind it; `name` is the layer's in messages."""
    version, position = _integer(data, position)
    shape = []
    for _ in range(4):
        side, position = _integer(data, position)
        shape.append(side)
    end = position + 4 * count
    if version != 2 or np.prod(shape, dtype=object) != count or end > len(data):
        raise ConversionError(f"the layer that {name} is here has the shape {shape}, expected {count} numbers")
    return torch.from_numpy(np.frombuffer(data[position:end], "<f4").copy()), end
