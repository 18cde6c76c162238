"""`python -m metaaux train PART --config FILE`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from .options import check_folder


class Part(str, enum.Enum):
    """Parts that are trained one by one."""

    generator = "generator"
    encoder = "encoder"
    identity = "identity"
    auxiliary = "auxiliary"
    directions = "directions"


def train(
    part: Annotated[Part, typer.Argument(help="What to train.")],
    config: Annotated[Path, typer.Option("--config", metavar="FILE", help="YAML, see metaaux/configs.")],
    run: Annotated[
        Path | None,
        typer.Option("--run", metavar="FOLDER", help="Checkpoints and logs. Default: runs/<name of FILE>."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="In place of FILE's, such as run.total_images=1000."),
    ] = None,
) -> None:
    """Train one part. Under `accelerate launch -m metaaux train ...` it uses several GPUs."""
    import importlib

    from ..training.settings import default_run_folder, load_settings

    module = importlib.import_module(f"metaaux.training.{part.value}")
    settings = load_settings(getattr(module, f"{part.value.capitalize()}Config"), config, overrides or ())
    folder = default_run_folder(config) if run is None else run
    check_folder(folder)
    module.train(settings, folder, resume)
