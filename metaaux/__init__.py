"""metaaux: Meta-Auxiliary Network for 3D GAN Inversion."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .head import Head
    from .inversion import Inversion, InversionFileError
    from .pipeline import MetaAuxInverter, MetaAuxInverterOutput

if sys.platform == "darwin":
    # PyTorch reads this when it is imported: see `devices.MPS_FALLBACK_OPERATORS`.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

__version__ = "0.1.0"
__all__ = ["Head", "Inversion", "InversionFileError", "MetaAuxInverter", "MetaAuxInverterOutput"]

_MODULE_OF = {
    "Head": ".head",
    "Inversion": ".inversion",
    "InversionFileError": ".inversion",
    "MetaAuxInverter": ".pipeline",
    "MetaAuxInverterOutput": ".pipeline",
}


def __getattr__(name: str):
    # Loaded at first use: PyTorch and diffusers take seconds, which neither `--help` nor a light import should cost.
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
