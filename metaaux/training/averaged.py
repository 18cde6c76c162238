"""What the trainers of the encoder and of the identity network share: the frozen generator's samples, and a network
with a moving average."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..data.sampler import FaceSampler
from ..tasks import Generator
from .distributed import FlatGradients, average_buffers, batch_statistics, broadcast_module
from .loading import load_generator, sample_cameras
from .loop import Trainer, averaged_copy, per_process, set_learning_rates
from .micro_batches import in_parts, pictures_at_once
from .schedules import average_decay, update_average
from .trainer import TrainingRun


class SampleSource:
    """Endless pictures of the frozen generator with their latent codes."""

    def __init__(self, generator: Generator, sampler: FaceSampler, min_truncation: float, dtype: torch.dtype):
        """sampler: of the photos, whose cameras give the views and the mapping's conditions."""
        self.generator, self.sampler, self.min_truncation, self.dtype = generator, sampler, min_truncation, dtype

    def cameras(self, count: int) -> torch.Tensor:
        """Cameras [count, 25], to condition the mapping or to see heads by; see `loading.sample_cameras`."""
        return sample_cameras(self.generator, self.sampler, count)

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

        def picture(w: torch.Tensor, cameras: torch.Tensor) -> torch.Tensor:
            return self.generator.synthesize(w, cameras, resolution=resolution, dtype=self.dtype).image

        return w, in_parts(picture, pictures_at_once(self.generator.config.image_size), w, cameras).clamp(-1, 1)


class AveragedTrainer(Trainer):
    """A network trained with AdamW beside a frozen generator, and its moving average, which is what is published.

    Args:
        config: with the sections that `EncoderConfig` and `IdentityConfig` share.
        accelerator: of the run.
    """

    #: Of the network's folder in a checkpoint.
    name: str

    def __init__(self, config: Any, accelerator: Accelerator):
        super().__init__(config, accelerator)
        self.batch_photos = per_process(config.batch.photos, accelerator)
        self.batch_samples = per_process(config.batch.samples, accelerator)
        self.generator = load_generator(config.networks.generator).to(self.device)

    def adopt(self, network: nn.Module) -> None:
        """Make `network` the one that is trained; every process starts from the main one's."""
        network = network.to(self.device, memory_format=torch.channels_last)
        broadcast_module(self.accelerator, network)
        self.network = network.train().requires_grad_(True)
        self.average = averaged_copy(network)
        self.gradients = [FlatGradients(network.parameters())]
        self.optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=self.config.optimiser.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=self.config.optimiser.weight_decay,
            fused=self.device.type == "cuda",
        )
        self.models = {self.name: self.average, f"{self.name}_raw": self.network}
        self.optimizers = {self.name: self.optimizer}

    @property
    def needs_cameras(self) -> bool:
        """Not for a 2D generator."""
        return self.generator.has_viewpoints

    @property
    def image_size(self) -> int:
        """The generator's."""
        return self.generator.config.image_size

    @property
    def photos_per_process(self) -> int:
        """Its share of the photos."""
        return self.batch_photos

    def load_data(self, images: int) -> None:
        """Likewise, and the generator's samples."""
        super().load_data(images)
        self.samples = SampleSource(self.generator, self.sampler, self.config.min_truncation, self.dtype)

    def run_network(self, *inputs: torch.Tensor | None) -> torch.Tensor:
        """Output of the network in training, in the run's precision."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.network(*inputs)

    @abstractmethod
    def compute(self, images: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Flat gradient and figures of a batch, at this point of the run."""

    @abstractmethod
    def evaluate(self, run: TrainingRun) -> dict[str, float]:
        """Held-out figures of the average; sheets go to `run`."""

    def step(self, images: int) -> dict[str, torch.Tensor | float]:
        """One update at this point of the run; returns figures."""
        config = self.config
        peaks = [config.optimiser.learning_rate]
        set_learning_rates(self.optimizer, peaks, images, config.run, config.optimiser)
        flat, figures = self.compute(images)
        average_buffers(self.accelerator, batch_statistics(self.network))
        self.gradients[0].set(flat, self.accelerator.num_processes)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), config.optimiser.max_gradient_norm)
        self.optimizer.step()
        update_average(self.average, self.network, average_decay(images, self.images_per_step, config.average))
        return figures | {"gradient_norm": norm}

    def report(self, run: TrainingRun) -> None:
        """Held-out figures ("val/...") and sheets."""
        figures = {f"val/{name}": round(value, 6) for name, value in self.evaluate(run).items()}
        run.record({"images": run.images} | figures)
