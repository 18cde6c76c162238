"""`python -m metaaux render INVERSION --out PNG`."""

from __future__ import annotations

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


def render(
    inversion: InversionArgument,
    out: Annotated[Path, typer.Option("--out", metavar="PNG", help="Picture to write.")],
    yaw: Annotated[float | None, typer.Option(help="Degrees; above 0: nose to the right. Default: photo's.")] = None,
    pitch: Annotated[float | None, typer.Option(help="Degrees; above 0: nods down. Default: photo's.")] = None,
    edit: EditOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
) -> None:
    """Render an inverted head from any side."""
    from ..export.images import save_image

    check_file(out, ".png")
    edits = parse_edits(edit)
    inverter = load_inverter(model, device, precision)
    save_image(inverter.render(inverter.load_inversion(inversion), yaw=yaw, pitch=pitch, edits=edits), out)
