"""Second phase of the auxiliary network's training: meta-learning (Alg. 1, Eq. 5-7).

MAML (Finn et al. 2017), of first or second order; learnt rates and the loss on the way are MAML++'s (Antoniou et al.
2019).
"""

from __future__ import annotations

import torch
from accelerate import Accelerator

from ..adaptation import InnerLoop, InnerProblem
from ..models.auxiliary import AuxiliaryNetwork
from ..tasks import Tasks, predict_tasks, synthesize_tasks
from .cuda_graphs import CapturedFunction
from .loading import FrozenNetworks
from .phases import AuxiliaryConfig, AuxiliaryTrainer, InnerSettings, OuterSettings


def meta_objective(
    networks: FrozenNetworks,
    auxiliary: AuxiliaryNetwork,
    tasks: Tasks,
    inner: InnerSettings,
    outer: OuterSettings,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Eq. 6 for a batch of tasks, a scalar that can be differentiated with regard to θ^Aux and the inner rates; and
    figures of it.

    With `outer.multi_step_weight` the states before the last step share that part of the objective, by their inner
    loss, whose gradient the inner loop has computed anyway.

    Args:
        networks: what it is trained against.
        auxiliary: in eval mode.
        tasks: the photos.
        inner, outer: settings.
        dtype: reduced precision of the generator; `None`: float32.
    """
    rates = auxiliary.inner_rates()
    if not inner.learn_rates:
        rates = {name: rate.detach() for name, rate in rates.items()}
    loop = InnerLoop.of(
        auxiliary,
        inner.steps,
        rates=rates,
        resolution=inner.resolution,
        differentiable=inner.order == "second",
        losses=outer.multi_step_weight > 0,
        checkpoint=inner.checkpoint,
        dtype=dtype,
    )
    problem = InnerProblem(networks.generator, auxiliary, networks.inner_loss, tasks, loop)
    adapted, seen = problem.run(auxiliary.adaptable_parameters())
    offsets = predict_tasks(auxiliary, adapted, tasks)
    last = synthesize_tasks(networks.generator, tasks, offsets, outer.resolution, dtype=dtype)

    losses = networks.outer_loss(last.image, last.image_raw, tasks.image, tasks.camera)
    objective = (1 - outer.multi_step_weight) * losses["total"].mean()
    if outer.multi_step_weight > 0:
        objective = objective + outer.multi_step_weight * torch.stack([step.loss for step in seen]).mean()
    figures = {"objective": objective, "mse_before": (seen[0].image - tasks.image).square().mean()}
    return objective, figures | {name: value.mean() for name, value in losses.items()}


def mean_of_passes(flats: list[torch.Tensor], limit: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of several passes' gradients [N], each no longer than `limit`, and which share of them was longer.

    With a limit, passes whose gradient is not finite count as longer and are left out of the mean, which is not finite
    if they all are.
    """
    stacked = torch.stack(flats)
    if limit is None:
        return stacked.mean(0), stacked.new_zeros(())
    norms = stacked.norm(dim=1)
    finite = norms.isfinite()
    stacked.mul_((limit / norms).clamp(max=1)[:, None])
    stacked[~finite] = 0
    return stacked.sum(0) / finite.sum(), (~(norms <= limit)).float().mean()


class MetaTrainer(AuxiliaryTrainer):
    """Photos as tasks, whose inner loops run side by side."""

    check_every = 1  # a step takes seconds

    def __init__(self, config: AuxiliaryConfig, accelerator: Accelerator):
        super().__init__(config, accelerator)
        if self.own_batch % config.inner.tasks_per_pass:
            raise ValueError(
                f"a batch of {config.batch} cannot be divided into {accelerator.num_processes} processes times "
                f"tasks_per_pass={config.inner.tasks_per_pass}"
            )
        self.auxiliary.eval()  # a task is one photo, which has no batch statistics
        self.captured = CapturedFunction(self.flat_gradient, self.graphs)

    @property
    def photos_per_process(self) -> int:
        """Its share of the batch."""
        return self.own_batch

    def load_data(self, images: int) -> None:
        """Likewise; at the start of a run the inner rates are calibrated."""
        super().load_data(images)
        if images == 0 and self.config.inner.calibrate_rates > 0:
            self.calibrate()

    def flat_gradient(self, image: torch.Tensor, camera: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Of tasks from photos [B, 3, S, S] seen by cameras [B, 25]."""
        objective, figures = meta_objective(
            self.networks,
            self.auxiliary,
            self.networks.tasks(image, camera),
            self.config.inner,
            self.config.outer,
            self.reduced,
        )
        return self.gradients[0].flatten(objective), {name: value.detach() for name, value in figures.items()}

    def step(self, images: int) -> dict[str, torch.Tensor | float]:
        """One update (Eq. 7, with the mean of the tasks' gradients instead of their sum); returns figures."""
        image, camera = self.sampler.next()
        size = self.config.inner.tasks_per_pass
        flats, collected = [], []
        for part in zip(image.split(size), camera.split(size), strict=True):
            flat, figures = self.captured(*part)
            # Clones, since a captured function's next call overwrites what this one returned.
            flats.append(flat.clone())
            collected.append({name: value.clone() for name, value in figures.items()})
        figures = {name: torch.stack([part[name] for part in collected]).mean() for name in collected[0]}
        limit = self.config.outer.max_gradient_norm
        flat, shortened = mean_of_passes(flats, limit)
        if limit is not None:
            figures["passes_shortened"] = shortened
        return figures | self.update(flat, images)
