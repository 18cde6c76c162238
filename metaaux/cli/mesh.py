"""`python -m metaaux mesh INVERSION --out GLB`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    DeviceOption,
    EditOption,
    InversionArgument,
    ModelOption,
    check_file,
    echo,
    load_inverter,
    parse_edits,
)


def mesh(
    inversion: InversionArgument,
    out: Annotated[Path, typer.Option("--out", metavar="GLB", help="Binary glTF file to write.")],
    resolution: Annotated[int, typer.Option(min=16, max=512, help="Cells along each side of the cube.")] = 192,
    edit: EditOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
) -> None:
    """Write an inverted head as a closed, coloured mesh."""
    from tqdm.auto import tqdm

    check_file(out, ".glb")
    edits = parse_edits(edit)
    inverter = load_inverter(model, device)
    loaded = inverter.load_inversion(inversion)
    with tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}") as bar:
        result = inverter.export_mesh(
            loaded, out, resolution, edits, progress=lambda share: bar.update(round(100 * share) - bar.n)
        )
    echo(f"{out}: {len(result.vertices)} vertices, {len(result.faces)} faces")
