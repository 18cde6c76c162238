"""pSp (Richardson et al. 2021): an encoder with one small network a layer of the generator, on our encoder's trunk."""

from __future__ import annotations

from ..models.psp import PSPEncoder
from .encoder import EncoderMethod, make_from_folder
from .registry import MethodRequest, register


@register("psp", "pSp-style (W+, our trunk)", needs_folder=True)
def make_psp(request: MethodRequest) -> EncoderMethod:
    """pSp's heads on the trunk of our encoder, trained as ours was; not its authors' network."""
    return make_from_folder(request, PSPEncoder)
