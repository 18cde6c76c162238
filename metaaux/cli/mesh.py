"""`python -m metaaux mesh INVERSION --out GLB`, or OBJ or PLY."""

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
    echo,
    load_inverter,
    parse_edits,
)


def mesh(
    inversion: InversionArgument,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="GLB",
            help="File to write: .glb, .obj (with .mtl and .png beside it) or .ply (with vertex colours).",
        ),
    ],
    resolution: Annotated[int, typer.Option(min=16, max=512, help="Cells along each side of the cube.")] = 192,
    texture: Annotated[int, typer.Option(min=0, max=2048, help="Side in texels; 0: vertex colours instead.")] = 1024,
    edit: EditOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
) -> None:
    """Write an inverted head as a closed mesh with a texture baked from rendered views."""
    from tqdm.auto import tqdm

    check_file(out, ".glb", ".obj", ".ply")
    edits = parse_edits(edit)
    inverter = load_inverter(model, device, precision)
    loaded = inverter.load_inversion(inversion)
    with tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}") as bar:
        result = inverter.export_mesh(
            loaded,
            out,
            resolution=resolution,
            edits=edits,
            progress=lambda share: bar.update(round(100 * share) - bar.n),
            texture=texture,
        )
    echo(f"{out}: {len(result.vertices)} vertices, {len(result.faces)} faces")
