"""Held-out figures of the auxiliary network: photos that are not trained on, inverted as inference does."""

from __future__ import annotations

import torch
from PIL import Image

from ..adaptation import InnerLoop, InnerProblem
from ..data.dataset import FaceDataset, to_signed
from ..export.sheets import grid
from ..models.auxiliary import AuxiliaryNetwork
from ..tasks import predict_tasks, synthesize_tasks
from .loading import FrozenNetworks


class Validation:
    """Inverts photos that are not trained on: figures and a sheet (rows: photo, encoder, before and after K steps).

    Args:
        networks: the run's.
        dataset: the photos.
        steps: K.
        tasks_per_pass: photos inverted side by side.
        device: of the networks.
    """

    def __init__(
        self,
        networks: FrozenNetworks,
        dataset: FaceDataset,
        steps: int,
        tasks_per_pass: int,
        device: torch.device,
    ):
        self.networks, self.steps, self.tasks_per_pass = networks, steps, tasks_per_pass
        self.image = to_signed(dataset.load()).to(device)
        self.camera = dataset.cameras.to(device)

    def measure(self, auxiliary: AuxiliaryNetwork) -> tuple[dict[str, float], Image.Image]:
        """MSE at steps -1, 0 and K, and a sheet of the first eight photos; `auxiliary` must be in eval mode."""
        generator, loss = self.networks.generator, self.networks.inner_loss
        inner = InnerLoop.of(auxiliary, self.steps)
        images: dict[int, list[torch.Tensor]] = {-1: [], 0: [], self.steps: []}
        for part in zip(*(tensor.split(self.tasks_per_pass) for tensor in (self.image, self.camera)), strict=True):
            tasks = self.networks.tasks(*part)
            with torch.no_grad():
                images[-1].append(generator.synthesize(tasks.w, tasks.camera, planes=tasks.planes).image)
            parameters = {n: p.detach().requires_grad_() for n, p in auxiliary.adaptable_parameters().items()}
            adapted, seen = InnerProblem(generator, auxiliary, loss, tasks, inner).run(parameters)
            images[0].append(seen[0].image)
            with torch.no_grad():
                last = synthesize_tasks(generator, tasks, predict_tasks(auxiliary, adapted, tasks))
            images[self.steps].append(last.image)
        columns = {step: torch.cat(parts) for step, parts in images.items()}
        figures = {
            f"validation_mse_step_{step}": (image - self.image).square().mean().item()
            for step, image in columns.items()
        }
        return figures, grid([self.image[:8], *(image[:8] for image in columns.values())])
