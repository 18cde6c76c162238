"""An inverted head made ready for rendering."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Head:
    """An inversion made ready for rendering: what every view of it shares, on the pipeline's device.

    Attributes:
        ws: latent code [1, w_dim] or [1, num_ws, w_dim], edits included.
        planes: tri-planes [1, 3, C, R, R] of the adapted backbone.
        weight_offsets: δ of each adapted layer, [C_out, C_in, 1, 1] or [C_out, C_in, 3, 3].
        offset_planes: offset tri-plane [1, 3, 3, r, r], world units, or `None`.
        camera: camera of the photo [25], on the CPU.
    """

    ws: torch.Tensor
    planes: torch.Tensor
    weight_offsets: dict[str, torch.Tensor]
    offset_planes: torch.Tensor | None
    camera: torch.Tensor
