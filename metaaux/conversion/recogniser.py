"""`convert recogniser`: dlib's face recognition network to `identity/`."""

from __future__ import annotations

from pathlib import Path

import torch

from ..models.recogniser import FaceRecogniser
from .folders import ConversionSummary, Converted, convert_file, load_tensors, read_state, tensors_of


def convert_recogniser(source: str | Path, folder: str | Path, overwrite: bool = False) -> ConversionSummary:
    """Makes an identity network R (Eq. 11) of dlib's recogniser.

    Args:
        source: its weights under `FaceRecogniser`'s names, in any precision (safetensors or `torch.save`).
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
    return Converted({"identity": load_tensors(network, tensors_of(read_state(source), "it"), "it")})
