"""`python -m metaaux train PART --config FILE`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

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
) -> None:
    """Train one part. Under `accelerate launch -m metaaux train ...` it uses several GPUs."""
    import importlib

    module = importlib.import_module(f"metaaux.training.{part.value}")
    settings = _read(getattr(module, f"{part.value.capitalize()}Config"), config)
    folder = Path("runs") / config.stem if run is None else run
    check_folder(folder)
    module.train(settings, folder, resume)


def _read(cls: type, path: Path) -> Any:
    import yaml

    from ..training.settings import load_config

    try:
        return load_config(cls, path)
    except (TypeError, yaml.YAMLError) as error:  # a missing setting, or no YAML
        raise ValueError(f"{path} is not a valid configuration: {error}") from None
