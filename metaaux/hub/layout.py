"""What the folder of a pipeline or network must hold, checked before any of it is used: it may be a stranger's."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

INDEX = "model_index.json"
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model"
PIPELINE = "MetaAuxInverter"
#: Package of the networks. Only classes from there are ever imported for a name in a file.
NETWORKS = "metaaux.models."
#: An index of ten thousand tensors is far below it.
_MAX_JSON_BYTES = 8 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file that may come from a stranger.

    Raises:
        ValueError: it is larger than any of this project's, is no JSON, or holds something else than an object.
    """
    with path.open("rb") as file:
        data = file.read(_MAX_JSON_BYTES + 1)
    if len(data) > _MAX_JSON_BYTES:
        raise ValueError(f"{path} is larger than {_MAX_JSON_BYTES // 2**20} MiB")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected an object")
    return values


def check_model_index(folder: str | os.PathLike) -> dict[str, str]:
    """Checks that a folder holds one of this project's pipelines; returns the module of each component in it.

    diffusers imports whatever module a component names, so only this package's networks may be named.

    Raises:
        FileNotFoundError: there is no `model_index.json`.
        ValueError: it is damaged, is of another kind of pipeline, or names modules from outside this package.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no pipeline: there is no {INDEX} in it")
    index = read_json(path)
    if index.get("_class_name") != PIPELINE:
        raise ValueError(f"{folder} holds no {PIPELINE}, as its {INDEX} says")
    modules = {name: value[0] for name, value in index.items() if isinstance(value, list) and value and value[0]}
    for name, module in modules.items():
        if not str(module).startswith(NETWORKS) or not name.isidentifier():
            raise ValueError(f"{folder} names {module!r} as the module of {name}; components come from metaaux.models")
    return modules


def check_components(folder: str | os.PathLike, components: Sequence[str], name: str | None = None) -> None:
    """Checks that configuration and weights of each component are there, every shard of them.

    Args:
        folder: of the pipeline.
        components: names of its components.
        name: what error messages call the pipeline. Default: the folder.

    Raises:
        FileNotFoundError: a file is missing.
    """
    without_weights = []
    for component in components:
        place = Path(folder, component)
        if not (place / CONFIG).is_file():
            raise FileNotFoundError(f"{name or folder} lacks the component {component}: no {component}/{CONFIG}")
        for index in sorted(place.glob("*.index*.json")):
            try:
                shards = sorted({str(shard) for shard in read_json(index)["weight_map"].values()})
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{name or folder}: {component}/{index.name} is damaged") from None
            # Indices of other variants travel along without their shards.
            present = [shard for shard in shards if (place / shard).is_file()]
            if present and present != shards:
                missing = sorted(set(shards) - set(present))
                raise FileNotFoundError(f"{name or folder} lacks {component}/{missing[0]}, a part of its weights")
        if not any(place.glob("*.safetensors")):
            without_weights.append(component)
    if len(without_weights) == len(components):
        raise FileNotFoundError(f"{name or folder} is a configuration without weights (no safetensors files)")
    if without_weights:
        raise FileNotFoundError(
            f"{name or folder} lacks the weights of {', '.join(without_weights)}: no safetensors file in the folder"
        )


def variant_files(variant: str | None) -> tuple[str, str]:
    """Names of a network's weights: the file, and the index where they are split into several.

    Raises:
        ValueError: the variant is more than a word, and so could name files elsewhere.
    """
    if variant is not None and re.fullmatch(r"\w+", variant, re.ASCII) is None:
        raise ValueError(f"a variant is a word such as fp16, got {variant!r:.80}")
    marks = f".{variant}" if variant else ""
    return f"{WEIGHTS}{marks}.safetensors", f"{WEIGHTS}.safetensors.index{marks}.json"


def has_variant(folder: Path, variant: str | None) -> bool:
    """Whether a network's folder has weights of that variant; `None`: those without a variant's name."""
    return any((folder / name).is_file() for name in variant_files(variant))
