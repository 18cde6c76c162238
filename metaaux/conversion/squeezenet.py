"""`convert squeezenet`: SqueezeNet 1.1's features to one file that takes RGB in [-1, 1] as it is.

Such a file is a perceptual distance without calibration, the second discriminator's network and that of the Fréchet
distance. The normalisation of the images is folded into the first convolution, exactly, since it has no padding.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ..models.perceptual import IMAGENET_SCALE, IMAGENET_SHIFT, LPIPS
from .folders import ConversionSummary, ConvertedTensors, convert_to_file, load_tensors, read_state, tensors_of
from .pickles import ConversionError

#: Means of blue, green and red in 0 to 255 that the original Caffe model subtracts (its train_val.prototxt).
CAFFE_MEAN = (104.0, 117.0, 123.0)
# Index in torchvision's `features` of each of Caffe's fire modules.
_FIRES = {"2": 3, "3": 4, "4": 6, "5": 7, "6": 9, "7": 10, "8": 11, "9": 12}


def convert_squeezenet(source: str | Path, target: str | Path, overwrite: bool = False) -> ConversionSummary:
    """Converts SqueezeNet 1.1 without its classifier, ImageNet-trained.

    Args:
        source: a state dictionary (`torch.save` or safetensors): torchvision's `squeezenet1_1`, whose images are
            normalised by ImageNet's mean and deviation; or the original Caffe model's, with Caffe's names
            (`conv1.weight`, `fire2/squeeze1x1.weight`, … or with dots or underscores), whose images are BGR in 0 to
            255 less their mean.
        target: the safetensors file.
        overwrite: replace a file of that name.

    Raises:
        FileNotFoundError: there is no such file, or no folder for the target.
        FileExistsError: see `overwrite`.
        ConversionError: the file is hostile, damaged or of another kind; nothing has been written.
    """
    return convert_to_file(source, target, overwrite, _convert)


def _convert(source: Path) -> ConvertedTensors:
    tensors = tensors_of(read_state(source), "it")
    from_caffe = "conv1.weight" in tensors
    if from_caffe:
        tensors = {_torchvision_name(name): tensor for name, tensor in tensors.items()}
    features = {name: tensor for name, tensor in tensors.items() if name.startswith("features.")}
    with torch.device("meta"):
        model = LPIPS("squeeze", normalization="folded")
    state = load_tensors(model, features, "SqueezeNet 1.1's features").state_dict()
    weight, bias = state["features.0.weight"].double(), state["features.0.bias"].double()
    # The network sees scale · x + shift of the image x in [-1, 1].
    if from_caffe:
        weight = weight.flip(1)
        scale, shift = [127.5] * 3, [127.5 - mean for mean in reversed(CAFFE_MEAN)]
    else:
        scale = [1 / deviation for deviation in IMAGENET_SCALE]
        shift = [-mean / deviation for mean, deviation in zip(IMAGENET_SHIFT, IMAGENET_SCALE, strict=True)]
    scale, shift = (weight.new_tensor(values)[:, None, None] for values in (scale, shift))
    state["features.0.weight"] = (weight * scale).float()
    state["features.0.bias"] = (bias + (weight * shift).sum((1, 2, 3))).float()
    normalisation = "Caffe's: BGR less its mean" if from_caffe else "torchvision's: ImageNet's mean and deviation"
    return ConvertedTensors(
        state,
        left_out=sorted({name.partition(".")[0] for name in tensors.keys() - features.keys()}),
        notes=[f"folded into the first layer is the normalisation of images, {normalisation}"],
    )


def _torchvision_name(name: str) -> str:
    if match := re.fullmatch(r"conv1\.(weight|bias)", name):
        return f"features.0.{match[1]}"
    if match := re.fullmatch(r"fire([2-9])[/._](squeeze|expand)(1x1|3x3)\.(weight|bias)", name):
        layer = match[2] if match[2] == "squeeze" else match[2] + match[3]
        return f"features.{_FIRES[match[1]]}.{layer}.{match[4]}"
    if name.startswith("conv10."):
        return f"classifier.{name.partition('.')[2]}"
    raise ConversionError(f"it has an unknown tensor {name[:80]!r}; expected SqueezeNet 1.1's of Caffe")
