"""The Space: a Gradio app over one or several [`~metaaux.MetaAuxInverter`], and its API."""

from __future__ import annotations

from .layout import build_demo
from .server import launch
from .settings import Settings

__all__ = ["Settings", "build_demo", "launch"]
