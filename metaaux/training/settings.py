"""Settings of a training run, read from YAML."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

import yaml


def load_config(cls: type, path: str | os.PathLike):
    """Read a YAML file into the dataclass `cls`; an unknown key is a ValueError that lists the known ones."""
    values = yaml.safe_load(Path(path).read_text()) or {}
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{path}: unknown setting {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return cls(**values)
