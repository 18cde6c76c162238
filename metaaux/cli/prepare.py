"""`python -m metaaux prepare FOLDER OUT.zip`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import check_file, echo, one_line


def prepare(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of photos, searched recursively.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.zip", help="Dataset to write, in EG3D's layout.")],
    size: Annotated[int, typer.Option(min=16, help="Side of the crops, pixels.")] = 128,
    crop_scale: Annotated[float, typer.Option(help="Size of faces in the crops; EG3D's FFHQ has about 0.93.")] = 1.0,
    pivot: Annotated[
        tuple[float, float, float],
        typer.Option(help="Point that the generator's cameras look at; EG3D's FFHQ has 0 0 0.2."),
    ] = (0.0, 0.0, 0.0),
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one a core.")] = None,
) -> None:
    """Align a folder of photos into a dataset. Photos without a usable face are left out and listed on stderr."""
    from tqdm.auto import tqdm

    from ..data.prepare import prepare as prepare_folder

    check_file(out, ".zip", option="OUT.zip")
    with tqdm(unit="photo") as bar:

        def on_photo(finished: int, photos: int) -> None:
            bar.total = photos
            bar.update(finished - bar.n)

        report = prepare_folder(
            folder, out, size=size, crop_scale=crop_scale, workers=workers, on_photo=on_photo, pivot=pivot
        )
    for photo in report.skipped:
        echo(one_line(f"left out {photo.name}: {photo.message}"), error=True)
    echo(f"{out}: {report.photos - len(report.skipped)} of {report.photos} photos")
