"""`python -m metaaux train PART --config FILE`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from ..files import check_output_folder
from .options import usage_error


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
        typer.Option(
            "--run",
            metavar="FOLDER",
            help="Checkpoints and logs. Default: runs/ and the name of FILE; of metaaux/configs/mini/encoder.yaml "
            "runs/mini-encoder.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Value in place of the FILE's, for example run.seed=1 (YAML after the =); may be repeated.",
        ),
    ] = None,
) -> None:
    """Train one part. Under `accelerate launch -m metaaux train ...` it uses several GPUs."""
    import importlib

    from ..training.settings import default_run_folder, load_settings

    module = importlib.import_module(f"metaaux.training.{part.value}")
    loaded = load_settings(getattr(module, f"{part.value.capitalize()}Config"), config, settings or ())
    folder = default_run_folder(config) if run is None else run
    with usage_error("--run"):
        check_output_folder(folder)
    module.train(loaded, folder, resume)
