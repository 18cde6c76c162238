"""Ablations of Table 3: (3) to (5), auxiliary networks that were trained without a part of the method; and the
checkpoint's own, of whose tensors the gradient steps move a part."""

from __future__ import annotations

from typing import Any, Literal

from .metaaux import AuxiliaryAdaptation, make_from_folder, make_metaaux
from .registry import MethodRequest, register


@register("without_meta", "without meta-learning", needs_folder=True, stepped=True)
def make_without_meta(request: MethodRequest) -> AuxiliaryAdaptation:
    """An auxiliary network of the plain phase."""
    return make_from_folder(request, request.steps)


@register("without_2d", "without 2D module", needs_folder=True, stepped=True)
def make_without_2d(request: MethodRequest) -> AuxiliaryAdaptation:
    """An auxiliary network that predicts no weight offsets.

    Raises:
        ValueError: the folder's network predicts them.
    """
    method = make_from_folder(request, request.steps)
    if method.auxiliary.config.use_weight_offsets:
        raise ValueError(f"{request.folder} holds an auxiliary network with a 2D module, not one without")
    return method


@register("without_3d", "without 3D module", needs_folder=True, stepped=True)
def make_without_3d(request: MethodRequest) -> AuxiliaryAdaptation:
    """An auxiliary network that predicts no offset planes.

    Raises:
        ValueError: the folder's network predicts them.
    """
    method = make_from_folder(request, request.steps)
    if method.auxiliary.config.use_offset_planes:
        raise ValueError(f"{request.folder} holds an auxiliary network with a 3D module, not one without")
    return method


class PartialAdaptation(AuxiliaryAdaptation):
    """The checkpoint's own adaptation, but the rates of the other tensors are zero: what a part brings of the gain.

    The free tensors are those that are added to the offsets whatever the photo shows
    (`AuxiliaryNetwork.free_parameters`): with the preset "paper" ordinary biases of last layers alone. All others,
    which the predicted part of the offsets is made with, depend on the photo in what they do. The prediction before
    the first step is the whole network's in either case.

    Attributes:
        moved: "predicted" or "free", the tensors that steps move.
    """

    moved: Literal["predicted", "free"]

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"moved": self.moved}

    def rates(self) -> dict[str, float]:
        free = self.auxiliary.free_parameters()
        return {name: rate * ((name in free) == (self.moved == "free")) for name, rate in super().rates().items()}


class PredictedOnly(PartialAdaptation):
    """Steps on what the predicted part of the offsets is made with."""

    moved = "predicted"


class FreeOnly(PartialAdaptation):
    """Steps on the tensors that do not depend on the photo."""

    moved = "free"


@register("predicted_only", "steps on the predicted part alone", stepped=True)
def make_predicted_only(request: MethodRequest) -> PartialAdaptation:
    """The checkpoint's auxiliary network, its free tensors kept as they are."""
    return make_metaaux(request, PredictedOnly)


@register("free_only", "steps on image-independent tensors alone", stepped=True)
def make_free_only(request: MethodRequest) -> PartialAdaptation:
    """The checkpoint's auxiliary network, all but its free tensors kept as they are."""
    return make_metaaux(request, FreeOnly)
