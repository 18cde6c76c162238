"""`convert age-gender`: face-api.js' age and gender network, as it is published for TensorFlow.js, to one file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..models.age_gender import AgeGenderNetwork
from .folders import ConversionSummary, ConvertedTensors, convert_to_file, load_tensors
from .pickles import ConversionError

_MAX_MANIFEST_BYTES = 2**20
#: Types that weights may be stored in: TensorFlow.js quantises them to whole numbers or to half precision.
_DTYPES = {"float32": "<f4", "float16": "<f2", "uint8": "u1", "uint16": "<u2"}
# From TensorFlow's order of dimensions to PyTorch's, by the last part of a weight's name.
_ORDERS = {
    "filters": (3, 2, 0, 1),  # [h, w, in, out]
    "depthwise_filter": (2, 3, 0, 1),  # [h, w, in, 1]
    "pointwise_filter": (3, 2, 0, 1),
    "weights": (1, 0),  # [in, out]
    "bias": (0,),
}


def convert_age_gender(source: str | Path, target: str | Path, overwrite: bool = False) -> ConversionSummary:
    """Converts the network that judges age and gender for directions and for Table 2.

    Args:
        source: `age_gender_model-weights_manifest.json`, with the file or files of weights that it names beside it.
        target: the safetensors file.
        overwrite: replace a file of that name.

    Raises:
        FileNotFoundError: there is no such file, or no folder for the target.
        FileExistsError: see `overwrite`.
        ConversionError: the files are damaged or of another network; nothing has been written.
    """
    return convert_to_file(source, target, overwrite, _convert)


def _convert(source: Path) -> ConvertedTensors:
    with source.open("rb") as file:
        text = file.read(_MAX_MANIFEST_BYTES + 1)
    try:
        groups = json.loads(text)
        weights = {}
        for group in groups:
            weights |= _read_group(source.parent, group)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"it is no weights manifest of TensorFlow.js: {str(error)[:200]}") from None
    tensors = {name.replace("/", "."): _as_pytorch(name, array) for name, array in weights.items()}
    with torch.device("meta"):
        network = AgeGenderNetwork()
    return ConvertedTensors(load_tensors(network, tensors, "the network").state_dict())


def _read_group(folder: Path, group: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Weights by name, from the files that belong to one entry of a manifest."""
    data = b""
    for name in group["paths"]:
        if Path(name).name != name:
            raise ConversionError(f"it names the weights {name[:80]!r}, which do not lie beside it")
        if not (folder / name).is_file():
            raise ConversionError(f"{name}, which it names, does not lie beside it")
        data += (folder / name).read_bytes()
    weights, start = {}, 0
    for entry in group["weights"]:
        quantization = entry.get("quantization", {})
        dtype = np.dtype(_DTYPES[quantization.get("dtype", entry["dtype"])])
        size = math.prod(entry["shape"]) * dtype.itemsize
        if start + size > len(data):
            raise ConversionError("its files of weights are shorter than it says")
        array = np.frombuffer(data[start : start + size], dtype)
        array = array.astype(np.float64) * quantization.get("scale", 1.0) + quantization.get("min", 0.0)
        weights[entry["name"]] = array.reshape(entry["shape"])
        start += size
    if start != len(data):
        raise ConversionError("its files of weights are longer than it says")
    return weights


def _as_pytorch(name: str, array: np.ndarray) -> torch.Tensor:
    order = _ORDERS.get(name.rpartition("/")[2])
    if order is None or len(order) != array.ndim:
        raise ConversionError(f"it has an unknown weight {name[:80]!r} of shape {list(array.shape)}")
    return torch.from_numpy(np.ascontiguousarray(array.transpose(order), dtype=np.float32))
