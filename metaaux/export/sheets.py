"""Pictures by which a generator is judged: heads from several sides, with their depth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from ..models.eg3d import EG3DGenerator
from .images import tensor_to_image

SHEET_YAWS = (-40, -20, 0, 20, 40)


def depth_to_image(depth: torch.Tensor, near: float = 2.35, far: float = 2.95) -> torch.Tensor:
    """Depth [B, 1, h, h] → grey image [B, 3, h, h] in [-1, 1], white at `near` and black at `far` (world units)."""
    return (1 - 2 * ((depth - near) / (far - near)).clamp(0, 1)).expand(-1, 3, -1, -1)


def grid(rows: Sequence[torch.Tensor]) -> Image.Image:
    """Rows of [N, 3, H, W] pictures in [-1, 1] → one picture, no gaps."""
    lines = [torch.cat(list(row), dim=-1) for row in rows]
    return tensor_to_image(torch.cat(lines, dim=-2))


@torch.no_grad()
def head_sheet(
    generator: EG3DGenerator, ws: torch.Tensor, yaws: Sequence[float] = SHEET_YAWS, pitch: float = 0.0
) -> Image.Image:
    """Each head of `ws` [B, num_ws, w_dim] at `yaws` (degrees), then its frontal depth; two heads a line."""
    size = generator.config.image_size
    planes = generator.planes(ws)
    columns = []
    for yaw in yaws:
        camera = generator.camera_at(float(yaw), pitch).to(ws.device).expand(len(ws), -1)
        columns.append(generator.synthesize(ws, camera, planes=planes).image.clamp(-1, 1))
    depth = generator.render(planes, generator.camera_at(0.0, 0.0).to(ws.device).expand(len(ws), -1)).depth
    depth = torch.nn.functional.interpolate(depth_to_image(depth), size=(size, size), mode="nearest")
    heads = torch.stack([*columns, depth], dim=1)
    rows = [heads[i : i + 2].flatten(0, 1) for i in range(0, len(heads), 2)]
    missing = len(rows[0]) - len(rows[-1])
    if missing:
        rows[-1] = torch.cat((rows[-1], rows[-1].new_ones(missing, *rows[-1].shape[1:])))
    return grid(rows)
