"""First values of the inner learning rates (α of Eq. 5), from which meta-learning goes on."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator

from ..adaptation import InnerLoop, InnerProblem
from ..models.auxiliary import AuxiliaryNetwork
from ..tasks import Tasks, predict_tasks
from .loading import FrozenNetworks


@torch.no_grad()
def calibrate_rates(
    networks: FrozenNetworks,
    auxiliary: AuxiliaryNetwork,
    tasks: Tasks,
    relative_step: float,
    accelerator: Accelerator,
    tasks_at_once: int | None = None,
    backbone: float = 1.0,
) -> None:
    """Set the inner rates such that a step changes each tensor by `relative_step` of its root mean square: in the root
    mean square over all tasks and processes, of which `tasks_at_once` are computed side by side (default: all). Those
    of the ResNet change by `backbone` times as much.

    The scales of gradients differ by orders of magnitude between tensors (a tensor at zero counts as 0.01), which
    one rate for all cannot suit and learning them from there would take long. Tensors without gradient, such as those
    before a layer that is zero yet, get the least rate of the others: with what theirs had been, steps might lead far
    once that layer is not zero any more.

    Raises:
        ValueError: no tensor has a gradient.
    """
    parameters = auxiliary.adaptable_parameters()
    was_training = auxiliary.training
    auxiliary.eval()
    squares = torch.zeros_like(auxiliary.log_inner_rates)
    for part in tasks.split(tasks_at_once or len(tasks)):
        with torch.enable_grad():
            stacked = {n: p.detach().expand(len(part), *p.shape).requires_grad_() for n, p in parameters.items()}
            loop = InnerLoop.of(auxiliary, 0)
            problem = InnerProblem(networks.generator, auxiliary, networks.inner_loss, part, loop)
            _, losses = problem.evaluate(0, predict_tasks(auxiliary, stacked, part))
            gradients = torch.autograd.grad(losses["total"].sum(), list(stacked.values()))
        squares += torch.stack([gradient.square().mean() for gradient in gradients]) * len(part) / len(tasks)
    auxiliary.train(was_training)
    sizes = torch.stack([parameter.square().mean().sqrt() for parameter in parameters.values()]).clamp(min=0.01)
    slopes = accelerator.reduce(squares, reduction="mean").sqrt()
    known = slopes > 1e-9
    if not known.any():
        raise ValueError("no tensor of the auxiliary network has a gradient by the inner loss: nothing to calibrate")
    logs = (relative_step * sizes / slopes.clamp(min=1e-9)).log()
    logs = logs.where(known, logs[known].min())
    of_backbone = torch.tensor([name.startswith("backbone.") for name in parameters], device=logs.device)
    logs += math.log(backbone) * of_backbone
    auxiliary.log_inner_rates.copy_(logs)
