"""What the trainers of the encoder and of the identity network share: the frozen generator's samples, a network with a
moving average, and the main loop."""

from __future__ import annotations

import copy
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from ..data.dataset import FaceDataset
from ..data.sampler import FaceSampler
from ..models.eg3d import EG3DGenerator
from .distributed import FlatGradients, broadcast_module, seed_process
from .trainer import TrainingRun, update_average


def warmup_cosine(images: int, total: int, warmup: int, peak: float) -> float:
    """Learning rate after `images` of `total`: linear from 0 to `peak` over `warmup`, then half a cosine back to 0."""
    if images < warmup:
        return peak * (images + 1) / (warmup + 1)
    progress = min((images - warmup) / max(total - warmup, 1), 1.0)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def per_process(batch: int, accelerator: Accelerator) -> int:
    """A process's share of a batch. Raises ValueError if the batch does not divide."""
    if batch % accelerator.num_processes:
        raise ValueError(f"A batch of {batch} images does not divide by {accelerator.num_processes} processes.")
    return batch // accelerator.num_processes


class SampleSource:
    """Endless pictures of the frozen generator with their latent codes."""

    def __init__(self, generator: EG3DGenerator, sampler: FaceSampler, min_truncation: float, dtype: torch.dtype):
        """sampler: of the photos, whose cameras give the views and the mapping's conditions."""
        self.generator, self.sampler, self.min_truncation, self.dtype = generator, sampler, min_truncation, dtype

    @torch.no_grad()
    def latents(self, conditions: torch.Tensor) -> torch.Tensor:
        """Codes [B, w_dim] of random heads under `conditions` (cameras [B, 25]), truncated at random from
        `min_truncation` to 1."""
        batch, device = len(conditions), self.generator.device
        z = torch.randn(batch, self.generator.config.z_dim, device=device)
        w = self.generator.mapping(z, conditions)[:, 0]
        truncation = torch.empty(batch, 1, device=device).uniform_(self.min_truncation, 1)
        return self.generator.w_avg.lerp(w, truncation)

    @torch.no_grad()
    def pictures(
        self, conditions: torch.Tensor, cameras: torch.Tensor, resolution: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """w [B, w_dim] and images [B, 3, S, S] in [-1, 1] of random heads at `cameras`; `resolution` rays a side.

        Draw the cameras apart from the mapping's `conditions`, so that a code does not tell its view.
        """
        w = self.latents(conditions)
        image = self.generator.synthesize(w, cameras, resolution=resolution, dtype=self.dtype).image
        return w, image.clamp(-1, 1)


class AveragedTrainer(ABC):
    """A network trained with AdamW beside a frozen generator, and its moving average, which is what is published.

    Args:
        config: with the fields that `EncoderConfig` and `IdentityConfig` share.
        accelerator: of the run.
    """

    #: Of the network's folder in a checkpoint.
    name: str

    def __init__(self, config: Any, accelerator: Accelerator):
        self.config, self.accelerator, self.device = config, accelerator, accelerator.device
        self.batch_photos = per_process(config.batch_photos, accelerator)
        self.batch_samples = per_process(config.batch_samples, accelerator)
        self.dtype = torch.bfloat16 if config.bf16 and self.device.type == "cuda" else torch.float32
        generator = EG3DGenerator.from_pretrained(config.generator, torch_dtype=torch.float32)
        self.generator = generator.to(self.device).eval().requires_grad_(False)
        self.dataset = FaceDataset(config.data, generator.config.image_size)

    def adopt(self, network: nn.Module) -> None:
        """Make `network` the one that is trained; every process starts from the main one's."""
        network = network.to(self.device, memory_format=torch.channels_last)
        broadcast_module(self.accelerator, network)
        self.network = network.train()
        self.average = copy.deepcopy(network).eval().requires_grad_(False)
        self.gradients = FlatGradients(network.parameters())
        self.optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=self.config.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=self.config.weight_decay,
            fused=self.device.type == "cuda",
        )

    def load_data(self, images: int) -> None:
        """Decodes the photos and starts this process' random streams for a run that has seen `images`."""
        seed = seed_process(self.accelerator, self.config.seed, images)
        self.sampler = FaceSampler(self.dataset, self.batch_photos, self.device, seed)
        self.samples = SampleSource(self.generator, self.sampler, self.config.min_truncation, self.dtype)

    def held_out(self, limit: int) -> FaceDataset:
        """Up to `limit` photos that are not trained on, or all training photos where the settings name no others."""
        if not self.config.validation:
            return self.dataset
        return FaceDataset(self.config.validation, self.dataset.image_size, limit=limit)

    def run_network(self, image: torch.Tensor) -> torch.Tensor:
        """Output of the network in training, in the run's precision."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.network(image)

    @property
    @abstractmethod
    def images_per_step(self) -> int:
        """Images that a step shows to all processes together."""

    @abstractmethod
    def compute(self, images: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Flat gradient and figures of a batch, at this point of the run."""

    @abstractmethod
    def evaluate(self, run: TrainingRun) -> dict[str, float]:
        """Held-out figures of the average; sheets go to `run`. Called in the main process."""

    def step(self, images: int) -> dict[str, torch.Tensor]:
        """One update at this point of the run; returns figures."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = warmup_cosine(images, config.total_images, config.warmup_images, config.learning_rate)
        flat, figures = self.compute(images)
        self.gradients.set(flat, self.accelerator.num_processes)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), config.max_gradient_norm)
        self.optimizer.step()
        half_life = min(config.average_images, (images + self.images_per_step) / 10)
        update_average(self.average, self.network, 0.5 ** (self.images_per_step / half_life))
        return figures | {"gradient_norm": norm}


def train_averaged(
    make_trainer: Callable[[Any, Accelerator], AveragedTrainer], config: Any, folder: str | os.PathLike, resume: bool
) -> Path:
    """Runs (or goes on with) a training in `folder`; returns the newest checkpoint.

    figures.jsonl has, at each interval and at the end, a line of training means and one of held-out figures
    ("val/...").
    """
    accelerator = Accelerator()
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    set_seed(config.seed)
    trainer = make_trainer(config, accelerator)
    run = TrainingRun(
        folder,
        accelerator,
        config.total_images,
        config.interval_images,
        models={trainer.name: trainer.average, f"{trainer.name}_raw": trainer.network},
        optimizers={trainer.name: trainer.optimizer},
        config=config,
        max_seconds=config.max_seconds,
    )
    if resume:
        run.resume()
    trainer.load_data(run.images)
    evaluated = run.images

    def evaluate(run: TrainingRun) -> None:
        nonlocal evaluated
        evaluated = run.images
        if accelerator.is_main_process:
            figures = {f"val/{name}": round(value, 6) for name, value in trainer.evaluate(run).items()}
            run.record({"images": run.images} | figures)

    run.on_interval(evaluate)
    while run.active():
        run.advance(trainer.images_per_step, trainer.step(run.schedule_images))
    if evaluated != run.images:
        evaluate(run)
    run.finish()
    return run.checkpoints[-1]
