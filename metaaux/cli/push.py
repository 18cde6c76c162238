"""`python -m metaaux push FOLDER ORG/NAME`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import echo


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A pipeline, as assemble or save_pretrained made it.")
    ],
    repo_id: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Repository on the Hub; made if missing.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is a private one.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="Made if missing. Default: main.")
    ] = None,
    variant: Annotated[
        str | None, typer.Option("--variant", help="Only the weights of this variant, such as fp16. Default: all.")
    ] = None,
    message: Annotated[str | None, typer.Option("--message", help="Of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list the files; upload nothing.")] = False,
) -> None:
    """Publish a pipeline's folder on the Hugging Face Hub, as it stands, in one commit.

    Every network is loaded first, so that what is published can be loaded. Log in with `hf auth login`, or set
    HF_TOKEN.
    """
    from ..hub.card import CARD, licence_of
    from ..hub.publishing import files_to_push, push_folder
    from ..pipeline import MetaAuxInverter

    files = files_to_push(folder, variant)
    inverter = MetaAuxInverter.from_pretrained(folder, variant=variant)
    if licence_of(inverter.card) == "unknown":
        echo(f"note: {folder / CARD} does not state under which licence the weights may be used", error=True)
    if dry_run:
        for name in files:
            echo(f"{(folder / name).stat().st_size:>12,}  {name}")
        echo(f"{repo_id}: {len(files)} files, {sum((folder / name).stat().st_size for name in files):,} bytes")
        return
    address = push_folder(
        folder,
        repo_id,
        variant=variant,
        revision=revision,
        commit_message=message,
        private=private or None,
    )
    echo(address)
