"""Many inversions side by side: photos as tasks of a meta-learner, and their inner loops (Alg. 1, lines 3-7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..adaptation import gradient_step
from ..losses import InversionLoss
from ..models.auxiliary import AuxiliaryNetwork, AuxiliaryOutput
from ..models.eg3d import EG3DGenerator, GeneratorOutput
from ..models.encoder import LatentEncoder


@dataclass
class FrozenNetworks:
    """What the auxiliary network is trained against; nothing here is trained."""

    generator: EG3DGenerator
    encoder: LatentEncoder
    inner_loss: InversionLoss
    outer_loss: InversionLoss


@dataclass
class Tasks:
    """A batch of photos, each of which is a task of its own.

    `image` [B, 3, S, S], `camera` [B, 25], `w` the encoder's codes, `planes` the generator's own planes for them.
    """

    image: torch.Tensor
    camera: torch.Tensor
    w: torch.Tensor
    planes: torch.Tensor

    def split(self, size: int) -> list[Tasks]:
        """Parts of `size` tasks."""
        parts = (tensor.split(size) for tensor in (self.image, self.camera, self.w, self.planes))
        return [Tasks(*tensors) for tensors in zip(*parts, strict=True)]


@dataclass
class InnerLoop:
    """Settings of `adapt_tasks`: K steps, their rates by tensor, clipping and momentum (`gradient_step`), rays a side
    (`None`: the generator's), whether derivatives of the inner gradients are kept, whether the losses on the way are
    wanted, and the generator's precision (`None`: its own)."""

    steps: int
    rates: Mapping[str, torch.Tensor]
    max_gradient_norm: float | None = None
    momentum: float = 0.0
    resolution: int | None = None
    differentiable: bool = False
    losses: bool = False
    dtype: torch.dtype | None = None

    @classmethod
    def of(cls, auxiliary: AuxiliaryNetwork, steps: int, **changes) -> InnerLoop:
        """As the network is adapted to a photo: its own rates, as constants, clipping and momentum; with `changes`."""
        settings = {
            "rates": {name: rate.detach() for name, rate in auxiliary.inner_rates().items()},
            "max_gradient_norm": auxiliary.config.inner_max_gradient_norm,
            "momentum": auxiliary.config.inner_momentum,
        }
        return cls(steps, **{**settings, **changes})


@torch.no_grad()
def make_tasks(networks: FrozenNetworks, image: torch.Tensor, camera: torch.Tensor) -> Tasks:
    """Encode photos and synthesise the planes that their codes alone give."""
    w = networks.encoder(image)
    return Tasks(image, camera, w, networks.generator.planes(w))


def predict_tasks(
    auxiliary: AuxiliaryNetwork, parameters: Mapping[str, torch.Tensor], tasks: Tasks
) -> AuxiliaryOutput:
    """Offsets of each task from its own parameters, which carry a leading dimension of tasks."""

    def predict_one(own, image, camera, planes):
        output = torch.func.functional_call(auxiliary, own, (image[None], camera[None], planes[None]))
        return [value[0] for value in output.weight_offsets.values()], [
            value[0] for value in (output.offset_planes,) if value is not None
        ]

    # The convolutions of all tasks become grouped ones; random numbers are not drawn anywhere in the network.
    offsets, planes = torch.func.vmap(predict_one)(dict(parameters), tasks.image, tasks.camera, tasks.planes)
    return AuxiliaryOutput(dict(zip(auxiliary.layer_names, offsets, strict=True)), planes[0] if planes else None)


def synthesize_tasks(
    generator: EG3DGenerator, tasks: Tasks, offsets: AuxiliaryOutput, resolution: int | None, lookup: str = "auto",
    dtype: torch.dtype | None = None,
) -> GeneratorOutput:  # fmt: skip
    """Reconstruct each photo with its offsets."""
    return generator.synthesize(
        tasks.w, tasks.camera, weight_offsets=offsets.weight_offsets, offset_planes=offsets.offset_planes,
        resolution=resolution, lookup=lookup, dtype=dtype,
    )  # fmt: skip


def adapt_tasks(
    networks: FrozenNetworks,
    auxiliary: AuxiliaryNetwork,
    tasks: Tasks,
    parameters: Mapping[str, torch.Tensor],
    inner: InnerLoop,
) -> tuple[dict[str, torch.Tensor], list[GeneratorOutput], list[torch.Tensor]]:
    """The inner loop of Alg. 1 for many tasks side by side; each comes out as `adaptation.adapt` alone would make it.

    Args:
        parameters: θ^Aux, shared by the tasks.
        inner: its settings; `differentiable` keeps the derivatives of the inner gradients.

    Returns:
        θ_i^Aux with a leading dimension of tasks; the reconstructions before each of the steps; and, with
        `inner.losses`, the mean inner loss of each of these, differentiable with regard to `parameters` and rates.
        Without `inner.differentiable` this derivative takes inner gradients for constants and costs no backward pass
        of its own.
    """
    count = len(tasks.image)
    lookup = "gather" if inner.differentiable else "auto"  # only gathers can be differentiated twice on CUDA
    reference = networks.inner_loss.reference(tasks.image, tasks.camera)
    stacked = {name: parameter.expand(count, *parameter.shape) for name, parameter in parameters.items()}
    outputs, means, velocity = [], [], None
    for _ in range(inner.steps):
        offsets = predict_tasks(auxiliary, stacked, tasks)
        output = synthesize_tasks(networks.generator, tasks, offsets, inner.resolution, lookup, inner.dtype)
        total = networks.inner_loss(output.image, output.image_raw, reference, tasks.camera)["total"]
        # The sum's gradient holds each task's own: no task's loss depends on another's parameters.
        gradients = torch.autograd.grad(total.sum(), list(stacked.values()), create_graph=inner.differentiable)
        if inner.losses:
            means.append(total.mean() if inner.differentiable else _with_gradients(total, stacked.values(), gradients))
        stacked, velocity = gradient_step(
            stacked, dict(zip(stacked, gradients, strict=True)), inner.rates, inner.max_gradient_norm, inner.momentum,
            velocity, stacked=True,
        )  # fmt: skip
        outputs.append(output)
    return stacked, outputs, means


def _with_gradients(total, parameters, gradients) -> torch.Tensor:
    """The mean of `total` [B] with `gradients` of its sum, already known, in place of what made it."""
    linear = sum((gradient.detach() * p).sum() for p, gradient in zip(parameters, gradients, strict=True)) / len(total)
    return total.detach().mean() + linear - linear.detach()
