"""Training of the auxiliary network: first plainly (Eq. 8), then by meta-learning (Alg. 1, Eq. 5-7)."""

from __future__ import annotations

import os

from . import loop
from .meta import MetaTrainer
from .phases import AuxiliaryConfig
from .plain import PlainTrainer

__all__ = ["AuxiliaryConfig", "train"]

TRAINERS = {"plain": PlainTrainer, "meta": MetaTrainer}


def train(config: AuxiliaryConfig, run_folder: str | os.PathLike, resume: bool = False) -> bool:
    """Train one phase in `run_folder`; with `resume` from its newest checkpoint. True where the run reached its end.

    The networks are saved as `auxiliary` and, for use, `auxiliary_average`.

    Raises:
        FileExistsError, FileNotFoundError, ValueError, FloatingPointError, RuntimeError: see `loop.train`.
    """
    run = loop.train(TRAINERS[config.phase], config, run_folder, resume)
    return run.images >= run.total_images
