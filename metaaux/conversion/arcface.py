"""`convert arcface`: the IR-SE50 that face inversion uses (TreB1eN's, taken over by pSp) to `identity/`."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ..models.identity import IdentityNetwork
from .folders import ConversionSummary, Converted, convert_file, load_tensors, read_state, tensors_of
from .pickles import ConversionError

_INPUT = {"0": "stem", "1": "stem_norm", "2": "stem_activation"}
_OUTPUT = {"0": "head_norm", "3": "head", "4": "embedding_norm"}
_RESIDUAL = {
    "0": "norm1",
    "1": "conv1",
    "2": "activation",
    "3": "conv2",
    "4": "norm2",
    "5.fc1": "gates.reduce",
    "5.fc2": "gates.expand",
}
_SHORTCUT = {"0": "shortcut", "1": "shortcut_norm"}


def convert_arcface(source: str | Path, folder: str | Path, overwrite: bool = False) -> ConversionSummary:
    """Converts the weights of the identity network R (Eq. 11).

    Args:
        source: the state dictionary `model_ir_se50.pth` (`torch.save` or safetensors).
        folder: `identity/` is written into it.
        overwrite: replace a folder of that name.

    Raises:
        FileNotFoundError: there is no such file.
        FileExistsError: see `overwrite`.
        ConversionError: the file is hostile, damaged or of another kind; nothing has been written.
    """
    return convert_file(source, folder, ("identity",), overwrite, _convert)


def _convert(source: Path) -> Converted:
    renamed = {_name(name): tensor for name, tensor in tensors_of(read_state(source), "it").items()}
    with torch.device("meta"):
        network = IdentityNetwork()
    return Converted({"identity": load_tensors(network, renamed, "it")})


def _name(name: str) -> str:
    for pattern, prefix, names in (
        (r"input_layer\.(\d)\.(\w+)", "", _INPUT),
        (r"output_layer\.(\d)\.(\w+)", "", _OUTPUT),
        (r"body\.(\d+)\.res_layer\.(\d(?:\.fc\d)?)\.(\w+)", "blocks.{}.", _RESIDUAL),
        (r"body\.(\d+)\.shortcut_layer\.(\d)\.(\w+)", "blocks.{}.", _SHORTCUT),
    ):
        if match := re.fullmatch(pattern, name):
            *block, layer, part = match.groups()
            if layer in names:
                return f"{prefix.format(*block)}{names[layer]}.{part}"
    raise ConversionError(f"it has an unknown tensor {name[:80]!r}; expected InsightFace's IR-SE50")
