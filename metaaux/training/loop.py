"""The loop of all trained parts that learn by gradients: generator, identity, encoder and both phases of the auxiliary
network."""

from __future__ import annotations

import copy
import functools
import os
from abc import ABC, abstractmethod
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from torch import nn

from ..data.dataset import FaceDataset
from ..data.sampler import FaceSampler
from .distributed import FlatGradients, seed_process, start_processes
from .loading import check_packages, make_sampler
from .schedules import learning_rate_factor
from .settings import RunSettings, ScheduleSettings
from .trainer import TrainingRun


def per_process(batch: int, accelerator: Accelerator) -> int:
    """A process's share of a batch. Raises ValueError if the batch does not divide."""
    if batch % accelerator.num_processes:
        raise ValueError(f"A batch of {batch} images is not divisible by {accelerator.num_processes} processes.")
    return batch // accelerator.num_processes


class Trainer(ABC):
    """The state of a run and one step of it; `train` drives it.

    Args:
        config: the part's settings. All have `run`, `data` and `compute`.
        accelerator: of the run.

    Attributes:
        dtype: precision of what need not be float32.
        models, optimizers: saved and restored by name; each model in the form that is saved.
        gradients: of the optimisers.
        state: JSON values that are saved along, and restored.
        packages: modules that this part imports late.
        check_every: steps after which it is looked whether to stop.
        needs_cameras: whether photos must come with cameras; those for a 2D generator need none.
    """

    models: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    gradients: list[FlatGradients]
    packages: tuple[str, ...] = ()
    check_every = 16
    needs_cameras = True

    def __init__(self, config: Any, accelerator: Accelerator):
        self.config, self.accelerator, self.device = config, accelerator, accelerator.device
        reduced = config.compute.precision == "bf16" and self.device.type == "cuda"
        self.dtype = torch.bfloat16 if reduced else torch.float32
        self.graphs = config.compute.graphs
        self.state: dict[str, Any] = {}

    @property
    @abstractmethod
    def images_per_step(self) -> int:
        """Images that a step shows to all processes together."""

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Side of the photos in pixels."""

    @abstractmethod
    def step(self, images: int) -> dict[str, torch.Tensor | float]:
        """One update after `images` images; returns figures."""

    @functools.cached_property
    def dataset(self) -> FaceDataset:
        """The photos."""
        data = self.config.data
        return FaceDataset(
            data.path,
            self.image_size,
            least_sharp=data.least_sharp,
            mirrored_copies=not data.mirror,
            labelled=self.needs_cameras,
        )

    def load_data(self, images: int) -> None:
        """Reads the photos and starts this process's random streams for a run that has seen `images`; all that is
        restored from a checkpoint is in place."""
        seed = seed_process(self.accelerator, self.config.run.seed, images)
        self.sampler: FaceSampler = make_sampler(
            self.config.data, self.dataset, self.photos_per_process, self.device, seed
        )

    @property
    @abstractmethod
    def photos_per_process(self) -> int:
        """Photos that this process is shown in a step."""

    def held_out(self, limit: int) -> FaceDataset:
        """Up to `limit` photos that are not trained on, or training photos where the settings name no others."""
        if not self.config.data.validation:
            return self.dataset
        return FaceDataset(
            self.config.data.validation,
            self.image_size,
            limit=limit,
            mirrored_copies=False,
            labelled=self.needs_cameras,
        )

    def before_saving(self, run: TrainingRun) -> None:
        """What belongs into each checkpoint; called in every process."""
        return

    @abstractmethod
    def report(self, run: TrainingRun) -> None:
        """Held-out figures and sheets go to `run`. Called in the main process."""


def averaged_copy(network: nn.Module) -> nn.Module:
    """What becomes the moving average of `network`."""
    return copy.deepcopy(network).eval().requires_grad_(False)


def set_learning_rates(
    optimizer: torch.optim.Optimizer, peaks: list[float], images: int, run: RunSettings, settings: ScheduleSettings
) -> float:
    """Give each group of `optimizer` its rate after `images`, whose peak is that of `peaks`; returns the factor."""
    factor = learning_rate_factor(images, run.total_images, settings)
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * factor
    return factor


def train(part: type[Trainer], config: Any, folder: str | os.PathLike, resume: bool) -> TrainingRun:
    """Runs (or goes on with) a training in `folder`; returns the run, which is over.

    figures.jsonl has a line of training means at each interval and at the end, besides those of `Trainer.report`.

    Args:
        part: what is trained.
        config: its settings.
        folder: of the run.
        resume: go on from the folder's newest checkpoint, or start where there is none.

    Raises:
        FileExistsError: the folder holds a run and `resume` is off.
        FileNotFoundError, ValueError: data, checkpoints, settings or installed packages do not fit.
        FloatingPointError, RuntimeError: see `TrainingRun.advance`.
    """
    # 1. Processes, and precision of the GPU.
    check_packages(part.packages, config.run.trackers)
    accelerator = start(config.run, folder)

    # 2. Networks: the same in every process.
    set_seed(config.run.seed)
    trainer = part(config, accelerator)

    # 3. The run's folder and, to go on with, its checkpoint.
    run = _open_run(trainer, folder)
    try:
        if resume:
            run.resume()
        else:
            run.refuse_used_folder()
        accelerator.init_trackers(run.folder.name)

        # 4. Photos and random streams: another one in every process.
        trainer.load_data(run.images)
        run.streams["photos"] = trainer.sampler
        run.restore_random()

        # 5. Steps.
        run.before_saving(trainer.before_saving)
        run.on_interval(trainer.report)
        while run.active():
            run.advance(trainer.images_per_step, trainer.step(run.images))
        run.finish()
    finally:
        run.close()
    return run


def start(settings: RunSettings, folder: str | os.PathLike) -> Accelerator:
    """Processes and precision of a run in `folder`."""
    places = ProjectConfiguration(project_dir=str(folder), logging_dir=os.path.join(folder, "trackers"))
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return start_processes(settings.timeout_minutes, log_with=settings.trackers or None, project_config=places)


def _open_run(trainer: Trainer, folder: str | os.PathLike) -> TrainingRun:
    settings: RunSettings = trainer.config.run
    return TrainingRun(
        folder,
        trainer.accelerator,
        settings.total_images,
        settings.interval_images,
        models=trainer.models,
        optimizers=trainer.optimizers,
        config=trainer.config.model_dump(mode="json"),
        state=trainer.state,
        max_seconds=settings.max_seconds,
        keep=settings.keep,
        gradients=trainer.gradients,
        max_nonfinite_steps=settings.max_nonfinite_steps,
        check_every=trainer.check_every,
    )
