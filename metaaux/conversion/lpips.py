"""`convert lpips`: torchvision's backbone weights and LPIPS' linear layers to `perceptual/`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from ..models.perceptual import BACKBONES, LPIPS
from .folders import ConversionSummary, Converted, convert_file, load_tensors, read_state, tensors_of
from .pickles import ConversionError

# A tensor of the backbone by which it is recognised, and its shape.
_SIGNS = {
    "alex": ("features.0.weight", (64, 3, 11, 11)),
    "vgg": ("features.28.weight", (512, 512, 3, 3)),
    "squeeze": ("features.12.expand3x3.weight", (256, 64, 3, 3)),
}


def convert_lpips(
    source: str | Path, folder: str | Path, linear: str | Path | None = None, overwrite: bool = False
) -> ConversionSummary:
    """Converts the weights of a perceptual distance (Eq. 10).

    Args:
        source: torchvision's state dictionary of VGG-16, AlexNet or SqueezeNet 1.1, ImageNet-trained (`torch.save` or
            safetensors; which one it is is recognised), or one with both `features.*` and `lin*` tensors.
        folder: `perceptual/` is written into it.
        linear: LPIPS' linear layers for these backbone weights, as its package ships them (`vgg.pth`, …). Without
            them the distance is LPIPS' uncalibrated baseline.
        overwrite: replace a folder of that name.

    Raises:
        FileNotFoundError: there is no such file.
        FileExistsError: see `overwrite`.
        ConversionError: a file is hostile, damaged or of another kind; nothing has been written.
    """
    return convert_file(source, folder, ("perceptual",), overwrite, lambda path: _convert(path, linear))


def _convert(source: Path, linear: str | Path | None) -> Converted:
    tensors = tensors_of(read_state(source), "it")
    calibration = _calibration(tensors)
    if linear is not None:
        calibration = _calibration(tensors_of(read_state(linear), Path(linear).name))
        if not calibration:
            raise ConversionError(f"{Path(linear).name} holds no linear layers of LPIPS (lin0.model.1.weight, …)")
    features = {name: tensor for name, tensor in tensors.items() if name.startswith("features.")}
    backbone = next(
        (b for b, (name, shape) in _SIGNS.items() if name in features and features[name].shape == shape), None
    )
    if backbone is None:
        raise ConversionError(f"it holds none of torchvision's {', '.join(BACKBONES)} backbones")
    with torch.device("meta"):
        model = LPIPS(backbone=backbone, calibrated=bool(calibration))
    load_tensors(model, features | calibration, f"the {backbone} backbone with {len(calibration)} linear layers")
    if any((weight < 0).any() for weight in calibration.values()):
        raise ConversionError("its linear layers have negative weights, which LPIPS' have not")
    left_out = sorted({name.partition(".")[0] for name in tensors if not re.match(r"features\.|lin\d", name)})
    notes = [] if calibration else ["no linear layers were given: the distance is LPIPS' uncalibrated baseline"]
    return Converted({"perceptual": model}, left_out, notes)


def _calibration(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"lins?\.?(\d+)\.model\.1\.weight", name):
            found[f"calibration.{match[1]}.weight"] = tensor
    return found
