"""What the page shows while an inversion runs and once it is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from .session import Visitor


@dataclass
class RunView:
    """What the page shows of an inversion; `values` are in the order of the run's outputs in the layout."""

    running: bool
    status: str
    visitor: Visitor
    compare: Any = None
    strip: Any = None
    losses: Any = None
    view: Any = None
    pose: tuple[float, float] | None = None
    head_file: str | None = None
    picture_file: str | None = None

    @property
    def values(self) -> tuple:
        """Of the outputs, in their order."""
        skip = gr.skip()
        ready = self.view is not None
        yaw, pitch = self.pose if self.pose is not None else (skip, skip)
        return (
            gr.update(visible=not self.running),
            gr.update(visible=self.running),
            self.status,
            gr.update(visible=False) if self.compare is not None else skip,
            gr.update(value=self.compare, visible=True) if self.compare is not None else skip,
            gr.update(value=self.strip, visible=True) if self.strip is not None else skip,
            gr.update(value=self.losses, visible=True) if self.losses is not None else skip,
            self.visitor,
            gr.update(visible=not ready),
            gr.update(visible=ready),
            gr.update(visible=ready),
            self.view if self.view is not None else skip,
            yaw,
            pitch,
            self.head_file if self.head_file is not None else skip,
            self.picture_file if self.picture_file is not None else skip,
        )
