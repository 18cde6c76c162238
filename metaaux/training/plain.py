"""First phase of the auxiliary network's training: its own prediction, before any gradient step, by Eq. 8."""

from __future__ import annotations

import contextlib

import torch
from accelerate import Accelerator

from ..models.auxiliary import AuxiliaryNetwork, AuxiliaryOutput
from ..tasks import Tasks, synthesize_tasks
from .cuda_graphs import CapturedFunction
from .distributed import average_buffers, batch_statistics
from .loading import FrozenNetworks, sample_cameras
from .micro_batches import accumulated, in_parts, pictures_at_once
from .phases import AuxiliaryConfig, AuxiliaryTrainer
from .trainer import TrainingRun


def plain_objective(
    networks: FrozenNetworks,
    auxiliary: AuxiliaryNetwork,
    tasks: Tasks,
    resolution: int | None = None,
    dtype: torch.dtype | None = None,
    micro_batch: int | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Eq. 8 of the prediction before any gradient step, a scalar; and figures of it.

    Args:
        networks: what it is trained against.
        auxiliary: in training mode, or in eval mode.
        tasks: a photo each.
        resolution: rays a side; `None`: the generator's.
        dtype: reduced precision of both networks; `None`: float32.
        micro_batch: pictures rendered and compared at once; `None`: all.
    """
    with torch.autocast(tasks.image.device.type, dtype=dtype) if dtype else contextlib.nullcontext():
        offsets = auxiliary(tasks.image, tasks.camera, tasks.planes)

    def compare(image, camera, w, offset_planes, *weight_offsets):
        parts = AuxiliaryOutput(dict(zip(offsets.weight_offsets, weight_offsets, strict=True)), offset_planes)
        tasks = Tasks(image, camera, w, None)
        output = synthesize_tasks(networks.generator, tasks, parts, resolution, dtype=dtype)
        return networks.outer_loss(output.image, output.image_raw, image, camera)

    weight_offsets = [offset.float() for offset in offsets.weight_offsets.values()]
    samples = (tasks.image, tasks.camera, tasks.w, offsets.offset_planes, *weight_offsets)
    losses = accumulated(compare, micro_batch, *samples)
    figures = {name: value.mean() for name, value in losses.items()}
    return figures["total"], figures


class PlainTrainer(AuxiliaryTrainer):
    """Photos and the generator's own pictures, each predicted once."""

    def __init__(self, config: AuxiliaryConfig, accelerator: Accelerator):
        super().__init__(config, accelerator)
        self.generated = round(config.outer.sample_fraction * self.own_batch)
        if self.generated == self.own_batch:
            raise ValueError(
                f"outer.sample_fraction={config.outer.sample_fraction} leaves no photo of {self.own_batch} a process"
            )
        self.auxiliary.train()
        self.captured = CapturedFunction(self.flat_gradient, self.graphs)

    def compile(self) -> None:
        """Likewise, and of the auxiliary network, which in the meta phase has other weights for each task."""
        super().compile()
        self.auxiliary.compile(dynamic=False)

    @property
    def photos_per_process(self) -> int:
        """Its share of the batch but for what is generated."""
        return self.own_batch - self.generated

    def picture(self, w: torch.Tensor, camera: torch.Tensor) -> torch.Tensor:
        """Generated heads [G, 3, S, S] of codes w [G, …] seen by cameras [G, 25]."""
        return self.networks.generator.synthesize(w, camera, dtype=self.reduced).image

    def flat_gradient(
        self, image: torch.Tensor, camera: torch.Tensor, sample_camera: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Of photos [B, 3, S, S] seen by cameras [B, 25], and of generated heads seen by others [G, 25]."""
        generator = self.networks.generator
        if len(sample_camera):
            with torch.no_grad():
                z = torch.randn(len(sample_camera), generator.config.z_dim, device=sample_camera.device)
                w = generator.mapping(z, sample_camera)
                samples = in_parts(self.picture, pictures_at_once(self.image_size), w, sample_camera).clamp(-1, 1)
            image, camera = torch.cat([image, samples]), torch.cat([camera, sample_camera])
        tasks = self.networks.tasks(image, camera)
        objective, figures = plain_objective(
            self.networks,
            self.auxiliary,
            tasks,
            self.config.outer.resolution,
            self.reduced,
            self.config.compute.micro_batch,
        )
        return self.gradients[0].flatten(objective), {name: value.detach() for name, value in figures.items()}

    def step(self, images: int) -> dict[str, torch.Tensor | float]:
        """One update; returns figures."""
        cameras = sample_cameras(self.networks.generator, self.sampler, self.generated)
        flat, figures = self.captured(*self.sampler.next(), cameras)
        average_buffers(self.accelerator, batch_statistics(self.auxiliary))
        return figures | self.update(flat, images)

    def before_saving(self, run: TrainingRun) -> None:
        """Inner rates, so that each checkpoint can be adapted."""
        if self.config.inner.calibrate_rates > 0:
            self.calibrate()
