"""Inversion methods by name: each module of this package registers its own, built on the networks of a pipeline."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..training.loading import load_network
from .base import InversionMethod
from .optimization import LatentSettings

if TYPE_CHECKING:
    from ..pipeline import MetaAuxInverter

Network = TypeVar("Network", bound=torch.nn.Module)


@dataclass(frozen=True)
class MethodOptions:
    """What methods need beside the pipeline.

    Attributes:
        steps: gradient steps of the adapted methods; `None`: the checkpoint's.
        psp: folder of a W+ encoder.
        styletransformer: folder of a W+ encoder.
        hyperinverter: folder of an auxiliary network that was trained to be used without adaptation.
        without_meta: folder of an auxiliary network of the plain phase.
        without_2d: folder of an auxiliary network trained without the 2D module.
        without_3d: folder of an auxiliary network trained without the 3D module.
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


@dataclass(frozen=True)
class MethodRequest:
    """What a method is made from.

    Attributes:
        name: as it was asked for, for example "metaaux-3".
        label: as in pictures and tables.
        inverter: the pipeline.
        options: what methods need beside it.
        steps: gradient steps of an adapted method.
        folder: of the method's network, a run's `latest` followed; `None` for methods that have none of their own.
    """

    name: str
    label: str
    inverter: MetaAuxInverter
    options: MethodOptions
    steps: int
    folder: Path | None

    def load(self, cls: type[Network], **expected: Any) -> Network:
        """The network of the method's folder, frozen, on the pipeline's device.

        Args:
            cls: its class.
            **expected: values that its configuration must have for the pipeline's generator.

        Raises:
            ValueError: a network of another class, or one that does not fit.
            OSError: a folder without a network.
        """
        network = load_network(cls, self.folder)
        for key, value in expected.items():
            if network.config[key] != value:
                raise ValueError(
                    f"{self.folder}: its {key} is {network.config[key]}, the pipeline's generator needs {value}"
                )
        return network.to(self.inverter.device)


@dataclass(frozen=True)
class MethodEntry:
    """A registered method.

    Attributes:
        label: as in pictures and tables.
        make: builds it.
        needs_folder: whether it has a network of its own, whose folder the option of the method's name gives.
        stepped: whether "NAME-N" is the method with N steps.
    """

    label: str
    make: Callable[[MethodRequest], InversionMethod]
    needs_folder: bool
    stepped: bool


#: Methods by name, in the order in which they registered.
METHODS: dict[str, MethodEntry] = {}


def register(
    name: str, label: str, needs_folder: bool = False, stepped: bool = False
) -> Callable[[Callable[[MethodRequest], InversionMethod]], Callable[[MethodRequest], InversionMethod]]:
    """Decorator: the function makes the method of this name; see `MethodEntry` for the arguments.

    Raises:
        ValueError: the name is taken, or `MethodOptions` has no folder for it.
    """
    if name in METHODS:
        raise ValueError(f"there is a method {name!r} already")
    if needs_folder and name not in MethodOptions.__dataclass_fields__:
        raise ValueError(f"MethodOptions has no folder for the method {name!r}")

    def add(make: Callable[[MethodRequest], InversionMethod]) -> Callable[[MethodRequest], InversionMethod]:
        METHODS[name] = MethodEntry(label, make, needs_folder, stepped)
        return make

    return add


def make_methods(
    names: list[str],
    inverter: MetaAuxInverter,
    options: MethodOptions = MethodOptions(),  # noqa: B008
) -> list[InversionMethod]:
    """The methods of these names on a pipeline's generator.

    "metaaux" and "full" are the same, the latter for tables of ablations. "metaaux-N" takes N steps whatever `options`
    say, and so do "full-N", "predicted_only-N", "free_only-N", "without_meta-N", "without_2d-N" and "without_3d-N";
    with N = 0 it is the prediction.

    Raises:
        ValueError: an unknown or repeated name, a method whose folder is not given, or a network that does not fit.
        OSError: a folder without a network.
    """
    parts = [_split(name) for name in names]
    unknown = [name for name, (method, _) in zip(names, parts) if method not in METHODS]
    if unknown:
        raise ValueError(f"unknown methods {unknown}; there are {', '.join(METHODS)}, and metaaux-N for N steps")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"methods must be named once each, got {names}")
    folders = {method: getattr(options, method) for method, _ in parts if METHODS[method].needs_folder}
    lacking = [method for method, folder in folders.items() if folder is None]
    if lacking:
        flags = ", ".join("--" + name.replace("_", "-") for name in lacking)
        raise ValueError(f"the methods {lacking} need the folder of their network: give {flags}")
    return [_make(name, *part, inverter, options, folders) for name, part in zip(names, parts)]


def _split(name: str) -> tuple[str, int | None]:
    """("metaaux", 3) of "metaaux-3"; a name without steps of its own and `None`."""
    match = re.fullmatch(r"(.+)-(0|[1-9]\d*)", name)
    if match and match[1] in METHODS and METHODS[match[1]].stepped:
        return match[1], int(match[2])
    return name, None


def _make(
    name: str,
    method: str,
    steps: int | None,
    inverter: MetaAuxInverter,
    options: MethodOptions,
    folders: Mapping[str, str | os.PathLike],
) -> InversionMethod:
    label = METHODS[method].label
    if steps is not None:
        label += f", {steps} step{'s' * (steps > 1)}" if steps else ", no adaptation"
    else:
        steps = inverter.config.inner_steps if options.steps is None else options.steps
    folder = Path(folders[method]) if method in folders else None
    return METHODS[method].make(MethodRequest(name, label, inverter, options, steps, folder))
