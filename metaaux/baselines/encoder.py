"""Encoders: the code that one pass predicts, and the generator as it is."""

from __future__ import annotations

from typing import Any

import torch

from ..files import source_name
from ..models.encoder import ImageEncoder
from ..precision import reduced_dtype
from ..tasks import encode
from .base import Generator, InversionMethod, Reconstruction, render_each
from .registry import MethodRequest, register


class EncoderMethod(InversionMethod):
    """The code that an encoder predicts, and the generator as it is. pSp and StyleTransformer are such encoders.

    Args:
        name: see `InversionMethod`.
        label: see `InversionMethod`.
        generator: the generator.
        encoder: predicts W or W+.
        source: where the encoder came from, for the records.
        dtype: reduced precision of both networks; `None`: theirs.
        identity: whose embeddings the encoder is told, if it asks for them.
    """

    def __init__(
        self,
        name: str,
        label: str,
        generator: Generator,
        encoder: ImageEncoder,
        source: str,
        dtype: torch.dtype | None = None,
        identity: torch.nn.Module | None = None,
    ):
        super().__init__(name, label)
        self.dtype, self.identity = dtype, identity
        self.generator, self.encoder, self.source = generator, encoder, source

    def settings(self) -> dict[str, Any]:
        return {"encoder": self.source, "space": self.encoder.latent_space}

    @torch.no_grad()
    def invert(self, image: torch.Tensor, camera: torch.Tensor) -> list[Reconstruction]:
        w = encode(self.encoder, self.identity, image, camera, self.dtype)
        return render_each(self.generator, w, camera, self.dtype)


@register("encoder", "encoder (W)")
def make_encoder(request: MethodRequest) -> EncoderMethod:
    """The checkpoint's own encoder, with which our method starts."""
    inverter = request.inverter
    dtype = reduced_dtype(inverter.precision)
    networks = inverter.generator, inverter.encoder
    return EncoderMethod(request.name, request.label, *networks, "pipeline", dtype, inverter.identity)


def make_from_folder(request: MethodRequest, cls: type[ImageEncoder]) -> EncoderMethod:
    """A baseline's encoder, of class `cls`, from the method's folder."""
    generator, dtype = request.inverter.generator, reduced_dtype(request.inverter.precision)
    encoder = request.load(
        cls,
        image_size=generator.config.image_size,
        w_dim=generator.config.w_dim,
        num_ws=generator.num_ws,
    )
    source, identity = source_name(request.folder), request.inverter.identity
    return EncoderMethod(request.name, request.label, generator, encoder, source, dtype, identity)
