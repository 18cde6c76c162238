"""The inversion methods that ours is compared with (Sec. 4.1), one a module; each registers itself under its name."""

from __future__ import annotations

# Imported to register, in the order in which messages list them.
from . import (  # noqa: F401, I001
    ablations,
    encoder,
    hyperinverter,
    latent,
    metaaux,
    psp,
    pti,
    styletransformer,
    without_auxiliary,
)
from .base import InversionMethod, Reconstruction
from .registry import METHODS, MethodOptions, make_methods

__all__ = ["METHODS", "InversionMethod", "MethodOptions", "Reconstruction", "make_methods"]
