"""Ablations (3) to (5) of Table 3: auxiliary networks that were trained without a part of the method."""

from __future__ import annotations

from .metaaux import AuxiliaryAdaptation, make_from_folder
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
