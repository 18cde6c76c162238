"""HyperInverter (Dinh et al. 2022): a hypernetwork's offsets of the generator's weights, without any gradient step."""

from __future__ import annotations

from .metaaux import AuxiliaryAdaptation, make_from_folder
from .registry import MethodRequest, register


@register("hyperinverter", "HyperInverter-style (our network, no steps)", needs_folder=True)
def make_hyperinverter(request: MethodRequest) -> AuxiliaryAdaptation:
    """An auxiliary network of ours that was trained to be used as it predicts; not its authors' network."""
    return make_from_folder(request, steps=0)
