"""Inversion methods by name, built on the networks of a pipeline."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..files import source_name
from ..losses import InversionLoss, LossWeights, perceptual_distance
from ..models.auxiliary import AuxiliaryNetwork
from ..models.encoder import LatentEncoder
from ..models.psp import PSPEncoder
from ..training.tasks import FrozenNetworks
from .methods import (
    AuxiliaryAdaptation,
    EncoderMethod,
    GeneratorAdaptation,
    InversionMethod,
    LatentOptimization,
    PivotalTuning,
)
from .optimization import LatentSettings, TuningSettings

if TYPE_CHECKING:
    from ..pipeline import MetaAuxInverter

#: λ_lpips of the paper. A checkpoint whose perceptual distance has another scale has another weight; their ratio turns
#: distances into units of LPIPS.
PAPER_PERCEPTUAL_WEIGHT = 0.8
#: PTI ends tuning once LPIPS is at or below this.
PTI_STOP_DISTANCE = 0.06


@dataclass(frozen=True)
class MethodOptions:
    """What methods need beside the pipeline.

    Attributes:
        steps: gradient steps of the adapted methods; `None`: the checkpoint's.
        psp, styletransformer: folders of W+ encoders.
        hyperinverter: folder of an auxiliary network that was trained to be used without adaptation.
        without_meta, without_2d, without_3d: folders of auxiliary networks trained without that part.
        latent: of "w", "w+" and PTI's pivot.
        tuning_steps: PTI's.
        pti_stop_share: where the perceptual distance is not LPIPS, PTI ends tuning at this share of the distance
            between photo and average face; `None`: never. The default asks for half of what PTI's own threshold of
            LPIPS amounts to, so that a distance that falls faster than LPIPS does not cut PTI short.
        generator_rate: Adam's rate in "without_auxiliary"; of 3e-4, 6e-4, 1e-3, 3e-3, 6e-3, 1e-2 and 2e-2 the default
            made most of five steps with metaaux-mini, on training photos.
    """

    steps: int | None = None
    psp: str | os.PathLike | None = None
    styletransformer: str | os.PathLike | None = None
    hyperinverter: str | os.PathLike | None = None
    without_meta: str | os.PathLike | None = None
    without_2d: str | os.PathLike | None = None
    without_3d: str | os.PathLike | None = None
    latent: LatentSettings = LatentSettings()
    tuning_steps: int = 350
    pti_stop_share: float | None = 0.05
    generator_rate: float = 1e-3


#: Methods by name, with the label of each. Those after "pti" need a folder, which an option of their name gives.
METHODS = {
    "metaaux": "Ours",
    "full": "Ours (full)",
    "encoder": "encoder (W)",
    "w": "optimisation (W)",
    "w+": "optimisation (W+)",
    "without_auxiliary": "without auxiliary network",
    "pti": "PTI",
    "psp": "pSp",
    "styletransformer": "StyleTransformer",
    "hyperinverter": "HyperInverter",
    "without_meta": "without meta-learning",
    "without_2d": "without 2D module",
    "without_3d": "without 3D module",
}
#: Methods of which "NAME-N" takes N steps.
_STEPPED_METHODS = ("metaaux", "full", "without_meta", "without_2d", "without_3d")
_FOLDER_METHODS = ("psp", "styletransformer", "hyperinverter", "without_meta", "without_2d", "without_3d")


def make_methods(
    names: list[str],
    inverter: MetaAuxInverter,
    options: MethodOptions = MethodOptions(),  # noqa: B008
) -> list[InversionMethod]:
    """The methods of these names on a pipeline's generator.

    "metaaux" and "full" are the same, the latter for tables of ablations. "metaaux-N" takes N steps whatever `options`
    say, and so do "full-N", "without_meta-N", "without_2d-N" and "without_3d-N"; with N = 0 it is the prediction.

    Raises:
        ValueError: an unknown or repeated name, a method whose folder is not given, or a network that does not fit.
        OSError: a folder without a network.
    """
    methods = [_split(name)[0] for name in names]
    unknown = [name for name, method in zip(names, methods) if method not in METHODS]
    if unknown:
        raise ValueError(f"unknown methods {unknown}; there are {', '.join(METHODS)}, and metaaux-N for N steps")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"methods must be named once each, got {names}")
    lacking = [method for method in methods if method in _FOLDER_METHODS and getattr(options, method) is None]
    if lacking:
        flags = ", ".join("--" + name.replace("_", "-") for name in lacking)
        raise ValueError(f"the methods {lacking} need the folder of their network: give {flags}")
    return [_make_method(name, inverter, options) for name in names]


def _split(name: str) -> tuple[str, int | None]:
    """("metaaux", 3) of "metaaux-3"; a name without steps of its own and `None`."""
    match = re.fullmatch(rf"({'|'.join(_STEPPED_METHODS)})-(0|[1-9]\d*)", name)
    return (match[1], int(match[2])) if match else (name, None)


def _make_method(name: str, inverter: MetaAuxInverter, options: MethodOptions) -> InversionMethod:
    generator, encoder = inverter.generator, inverter.encoder
    method, steps = _split(name)
    label = METHODS[method]
    if steps is not None:
        label += f", {steps} step{'s' * (steps > 1)}" if steps else ", no adaptation"
    elif method == "hyperinverter":
        steps = 0
    else:
        steps = inverter.config.inner_steps if options.steps is None else options.steps
    if method == "encoder":
        return EncoderMethod(name, label, generator, encoder, "pipeline")
    if method in ("psp", "styletransformer"):
        architecture = PSPEncoder if method == "psp" else LatentEncoder
        found = architecture.load_config(getattr(options, method)).get("_class_name")
        if found != architecture.__name__:
            raise ValueError(f"{getattr(options, method)} holds a {found}, {name} needs a {architecture.__name__}")
        network = architecture.from_pretrained(getattr(options, method))
        expected = {"image_size": generator.config.image_size, "w_dim": generator.config.w_dim}
        _check_config(getattr(options, method), network, expected | {"num_ws": generator.num_ws})
        return EncoderMethod(name, label, generator, _frozen(network, inverter), source_name(getattr(options, method)))
    if method in ("w", "w+"):
        return LatentOptimization(name, label, generator, reconstruction_loss(inverter), options.latent, name)
    if method == "pti":
        is_lpips = inverter.perceptual is not None and inverter.perceptual.config.calibrated
        tuning = TuningSettings(steps=options.tuning_steps, stop_distance=PTI_STOP_DISTANCE if is_lpips else None)
        share = None if is_lpips else options.pti_stop_share
        return PivotalTuning(generator, reconstruction_loss(inverter), options.latent, tuning, share)
    loss = inverter.inversion_loss()
    if method == "without_auxiliary":
        tuning = TuningSettings(steps=steps, learning_rate=options.generator_rate)
        return GeneratorAdaptation(generator, encoder, loss, tuning)
    networks = FrozenNetworks(generator, encoder, loss, loss)
    if method in ("metaaux", "full"):
        rate = inverter.config.inner_learning_rate
        return AuxiliaryAdaptation(name, label, networks, inverter.auxiliary, steps, rate, "pipeline")
    folder = getattr(options, method)
    network = AuxiliaryNetwork.from_pretrained(folder)
    _check_config(folder, network, {"image_size": generator.config.image_size})
    if method == "without_2d" and network.config.use_weight_offsets:
        raise ValueError(f"{folder} holds an auxiliary network with a 2D module, not one without")
    if method == "without_3d" and network.config.use_offset_planes:
        raise ValueError(f"{folder} holds an auxiliary network with a 3D module, not one without")
    return AuxiliaryAdaptation(name, label, networks, _frozen(network, inverter), steps, None, source_name(folder))


def reconstruction_loss(inverter: MetaAuxInverter) -> InversionLoss:
    """PTI's loss, L2 + λ·LPIPS with λ = 1, on the checkpoint's perceptual distance brought to the scale of LPIPS.

    PTI finds its pivot by LPIPS alone; here both terms guide it, since the distance need not be LPIPS.
    """
    unit = inverter.config.weight_perceptual / PAPER_PERCEPTUAL_WEIGHT
    weights = LossWeights(perceptual=unit, identity=0.0, adversarial=0.0)
    return InversionLoss(weights, perceptual_distance(inverter.perceptual, inverter.discriminator), None, None)


def _frozen(network: torch.nn.Module, inverter: MetaAuxInverter) -> torch.nn.Module:
    return network.to(inverter.device).float().eval().requires_grad_(False)


def _check_config(folder: str | os.PathLike, network: torch.nn.Module, expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        if network.config[key] != value:
            raise ValueError(f"{folder}: its {key} is {network.config[key]}, the pipeline's generator needs {value}")
