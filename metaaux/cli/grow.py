"""`python -m metaaux grow SOURCE TARGET`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import check_folder


def grow(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Checkpoint with the folders generator and discriminator.")
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Folder for the grown ones; made if missing.")],
    wider: Annotated[bool, typer.Option("--wider", help="Double the channels.")] = False,
    larger: Annotated[bool, typer.Option("--larger", help="Double the pixels.")] = False,
    first_channels: Annotated[
        int | None, typer.Option(min=12, help="Of the discriminator's new block. Default: by its channel_base.")
    ] = None,
) -> None:
    """Make a trained generator and its discriminator larger, to train on from the same weights."""
    from ..training.grow import grow as grow_checkpoint

    if not wider and not larger:
        raise typer.BadParameter("say in which way: --wider, --larger or both")
    check_folder(target, "TARGET")
    grow_checkpoint(source, target, wider, larger, first_channels)
