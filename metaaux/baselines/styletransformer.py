"""StyleTransformer (Hu et al. 2022): an encoder whose queries attend to the image, one a layer of the generator."""

from __future__ import annotations

from ..models.encoder import LatentEncoder
from .encoder import EncoderMethod, make_from_folder
from .registry import MethodRequest, register


@register("styletransformer", "StyleTransformer-style (W+, our encoder)", needs_folder=True)
def make_styletransformer(request: MethodRequest) -> EncoderMethod:
    """Our encoder, which is built as StyleTransformer's is, trained to predict W+; not its authors' network."""
    return make_from_folder(request, LatentEncoder)
