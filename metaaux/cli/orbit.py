"""`python -m metaaux orbit INVERSION --out MP4`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    DeviceOption,
    EditOption,
    InversionArgument,
    ModelOption,
    PrecisionOption,
    check_file,
    load_inverter,
    parse_edits,
)


class ViewPath(str, enum.Enum):
    """Ways of the camera of a video."""

    ellipse = "ellipse"
    swing = "swing"
    nod = "nod"


def orbit(
    inversion: InversionArgument,
    out: Annotated[Path, typer.Option("--out", metavar="MP4", help="Video to write (H.264).")],
    frames: Annotated[int, typer.Option(min=1, help="Views of the loop.")] = 60,
    fps: Annotated[int, typer.Option(min=1, max=120, help="Frames a second.")] = 30,
    yaw_range: Annotated[float, typer.Option(min=0, max=89, help="Degrees to either side.")] = 25.0,
    pitch_range: Annotated[float, typer.Option(min=0, max=89, help="Degrees up and down.")] = 10.0,
    path: Annotated[ViewPath, typer.Option(help="Way of the camera.")] = ViewPath.ellipse,
    edit: EditOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
) -> None:
    """Write a video of the camera circling an inverted head."""
    from ..export.video import write_video

    check_file(out, ".mp4")
    edits = parse_edits(edit)
    inverter = load_inverter(model, device, precision)
    head = inverter.prepare(inverter.load_inversion(inversion), edits)
    views = inverter.orbit(head, frames, yaw_range=yaw_range, pitch_range=pitch_range, path=path.value)
    write_video(views, out, fps=fps)
