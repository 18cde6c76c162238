"""Held-out figures of the auxiliary network: photos that are not trained on, inverted as inference does."""

from __future__ import annotations

import torch
from PIL import Image

from ..adaptation import InnerLoop, InnerProblem
from ..cameras import pose_of_camera
from ..data.dataset import FaceDataset, to_signed
from ..export.sheets import grid
from ..models.auxiliary import AuxiliaryNetwork
from ..models.recogniser import SAME_PERSON, FaceRecogniser
from ..tasks import Tasks, predict_tasks, synthesize_tasks
from .loading import FrozenNetworks

#: Degrees by which inverted heads are turned away from their photo's view, to see whether they stay that person ...
TURNS = (-20, 20)
#: ... and the farthest yaw that they are turned to: beyond, nobody asks for views.
LARGEST_YAW = 80


class Validation:
    """Inverts photos that are not trained on: figures and a sheet (rows: photo, encoder, before and after K steps and,
    if there are other views, the last turned by `TURNS`).

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
        identity = networks.inner_loss.identity
        self.recogniser = identity if isinstance(identity, FaceRecogniser) else None

    def measure(self, auxiliary: AuxiliaryNetwork) -> tuple[dict[str, float], Image.Image]:
        """Means over the photos, and a sheet of the first eight; `auxiliary` must be in eval mode.

        Returns:
            "validation_mse_step_…" at steps -1, 0 and K. Where the identity network is a `FaceRecogniser`, whose
            distances mean something by themselves, also its distance to the photo at these steps,
            "validation_distance_step_…", and of the heads turned by `TURNS` after K steps,
            "validation_distance_turned_…"; and "validation_same_person", the share of reconstructions after K steps
            that it takes for the photo's person. Where steps led nowhere, which rates may that do not fit the network
            (yet), "validation_failed" counts such photos; they are black on the sheet and take no part in the means.
        """
        images: dict[str, list[torch.Tensor]] = {}
        distances: dict[str, list[torch.Tensor]] = {}
        for image, camera in zip(*(t.split(self.tasks_per_pass) for t in (self.image, self.camera)), strict=True):
            tasks = self.networks.tasks(image, camera)
            pictures = self._pictures(auxiliary, tasks)
            for name, (picture, _) in pictures.items():
                images.setdefault(name, []).append(picture)
            for name, distance in self._distances(tasks, pictures).items():
                distances.setdefault(name, []).append(distance)
        columns = {name: torch.cat(parts) for name, parts in images.items()}
        finite = torch.stack([column.isfinite().flatten(1).all(1) for column in columns.values()]).all(0)
        figures = {
            f"validation_mse_{name}": (column - self.image)[finite].square().mean().item()
            for name, column in columns.items()
            if name.startswith("step")
        }
        values = {name: torch.cat(parts)[finite] for name, parts in distances.items()}
        figures |= {f"validation_distance_{name}": value.mean().item() for name, value in values.items()}
        if values:
            figures["validation_same_person"] = (values[f"step_{self.steps}"] < SAME_PERSON).float().mean().item()
        if failed := int((~finite).sum()):
            figures = {"validation_failed": failed} | (figures if finite.any() else {})
        sheet = grid([self.image[:8], *(column[:8].nan_to_num(-1, -1, -1) for column in columns.values())])
        return figures, sheet

    def _pictures(self, auxiliary: AuxiliaryNetwork, tasks: Tasks) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Reconstructions [T, 3, S, S] and their cameras [T, 25]: "step_-1", "step_0", "step_K", and "turned_…"."""
        generator, loss = self.networks.generator, self.networks.inner_loss
        inner = InnerLoop.of(auxiliary, self.steps)
        parameters = {n: p.detach().requires_grad_() for n, p in auxiliary.adaptable_parameters().items()}
        adapted, seen = InnerProblem(generator, auxiliary, loss, tasks, inner).run(parameters)
        views = {f"step_{self.steps}": tasks.camera}
        if generator.has_viewpoints:
            yaw, pitch = pose_of_camera(tasks.camera)
            for turn in TURNS:
                turned = (yaw + turn).clamp(-LARGEST_YAW, LARGEST_YAW)
                views[f"turned_{turn}"] = generator.camera_at(turned, pitch)
        with torch.no_grad():
            start = generator.synthesize(tasks.w, tasks.camera, planes=tasks.planes).image
            offsets = predict_tasks(auxiliary, adapted, tasks)
            planes = generator.planes(tasks.w, offsets.weight_offsets)
            after = {
                name: (synthesize_tasks(generator, tasks, offsets, camera=view, planes=planes).image, view)
                for name, view in views.items()
            }
        return {"step_-1": (start, tasks.camera), "step_0": (seen[0].image, tasks.camera), **after}

    @torch.no_grad()
    def _distances(
        self, tasks: Tasks, pictures: dict[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Of each picture to its photo by the recogniser, [T]; none without one."""
        if self.recogniser is None:
            return {}
        photo = self.recogniser(tasks.image, tasks.camera)
        return {
            name: self.recogniser.distance(self.recogniser(picture, view), photo)
            for name, (picture, view) in pictures.items()
        }
