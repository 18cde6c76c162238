"""Adaptation of the auxiliary network: the inner loop, Eq. 5, of inference and of training (Alg. 1, lines 3-7) alike.

The loop is MAML's (Finn et al. 2017): gradient steps from parameters that were learnt to be a good start. From MAML++
(Antoniou et al. 2019) come learning rates of each tensor's own and, for training, the losses of the steps on the way.
It works on a batch of tasks, each of them one person; a visitor's photo is a batch of one task.

Nothing shared is changed: the adapted parameters live in a dictionary that belongs to the call, and `functional_call`,
which for its duration swaps tensors inside the module it is given, only ever sees a private view of the auxiliary
network. So several threads may adapt one network at once. Dimensions: see `metaaux.models`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from .cameras import mirror_camera
from .losses import InversionLoss, Reference
from .models.auxiliary import AuxiliaryNetwork, AuxiliaryOutput
from .models.eg3d import GeneratorOutput
from .models.recomputation import recomputed
from .models.stylegan2 import ImageOutput
from .models.views import private_view
from .step_reports import StepCallback, StepReports
from .tasks import Generator, Tasks, predict_tasks, synthesize_tasks


@dataclass
class InnerLoop:
    """Settings of the inner loop.

    Attributes:
        steps: N of Eq. 5 (K of Alg. 1), 0 or more.
        rates: α of each tensor by name, numbers or scalar tensors (with `checkpoint` the latter).
        max_gradient_norm: gradients of a larger norm (over all tensors, of each task alone) are scaled down to it.
        momentum: μ of `gradient_step`.
        flip_share: part of the steps, from the first on and at least one, whose loss holds Eq. 12, if the loss has it.
        resolution: rays a side; `None`: the generator's.
        dtype: the generator's precision; `None`: its own.
        auxiliary_dtype: that of the auxiliary network's products; `None`: its own.
        differentiable: whether derivatives of the inner gradients are kept, as second-order meta-gradients need them.
        losses: whether the losses on the way are wanted for training (MAML++'s multi-step loss).
        checkpoint: whether a differentiable step keeps its parameters alone and is computed again in the backward
            pass, so that the graph of one step is held at a time and not those of all.
    """

    steps: int
    rates: Mapping[str, torch.Tensor | float]
    max_gradient_norm: float | None = None
    momentum: float = 0.0
    flip_share: float = 1.0
    resolution: int | None = None
    dtype: torch.dtype | None = None
    auxiliary_dtype: torch.dtype | None = None
    differentiable: bool = False
    losses: bool = False
    checkpoint: bool = False

    @classmethod
    def of(cls, auxiliary: AuxiliaryNetwork, steps: int, **changes) -> InnerLoop:
        """As the network is adapted to a photo: its own rates, as constants, clipping and momentum; with `changes`."""
        changes.setdefault("momentum", auxiliary.config.inner_momentum)
        if changes.get("max_gradient_norm") is None:
            changes["max_gradient_norm"] = auxiliary.config.inner_max_gradient_norm
        if "rates" not in changes:
            changes["rates"] = {name: rate.detach() for name, rate in auxiliary.inner_rates().items()}
        return cls(steps, **changes)

    def has_flip(self, step: int) -> bool:
        """Whether Eq. 12 takes part in the loss of the state after so many steps."""
        return self.flip_share >= 1 or step < max(1, math.ceil(self.flip_share * self.steps - 1e-6))


def gradient_step(
    parameters: Mapping[str, torch.Tensor],
    gradients: Mapping[str, torch.Tensor],
    rates: Mapping[str, torch.Tensor | float],
    max_gradient_norm: float | None = None,
    momentum: float = 0.0,
    velocity: Mapping[str, torch.Tensor] | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Eq. 5 with Polyak's momentum: v' = μ v + ∇L, θ' = θ - α v'; differentiable with regard to all its inputs.

    μ = 0 is Eq. 5 itself.

    Args:
        parameters: θ by name, every tensor with a leading dimension of tasks.
        gradients: the same names and shapes.
        rates: α of each tensor.
        max_gradient_norm: gradients of a larger norm (over all tensors, of each task alone) are scaled down to it.
        momentum: μ.
        velocity: v, as the step before returned it; `None` before the first.

    Returns:
        θ' and v'.
    """
    scale = None
    if max_gradient_norm is not None:
        squares = [gradient.reshape(len(gradient), -1).square().sum(1) for gradient in gradients.values()]
        # The constant keeps the square root's derivative finite at a gradient of zero.
        norm = (torch.stack(squares).sum(0) + 1e-12).sqrt()
        scale = (max_gradient_norm / norm).clamp(max=1)
    changes = [gradients[name] for name in parameters]
    if scale is not None:
        changes = [change * scale.view(scale.shape + (1,) * (change.ndim - scale.ndim)) for change in changes]
    # One launch for many tensors: one by one, hundreds of them would be a fifth of a step's kernels.
    if momentum and velocity is not None:
        changes = torch._foreach_add(changes, [velocity[name] for name in parameters], alpha=momentum)
    alphas = [rates[name] for name in parameters]
    if all(isinstance(alpha, float) for alpha in alphas):
        moves = torch._foreach_mul(changes, alphas)
    else:
        moves = [alpha * change for alpha, change in zip(alphas, changes, strict=True)]
    adapted = torch._foreach_sub(list(parameters.values()), moves)
    return dict(zip(parameters, adapted, strict=True)), dict(zip(parameters, changes, strict=True))


@dataclass
class InnerStep:
    """What was seen on the way of one gradient step, before it.

    Attributes:
        image: the reconstructions [T·P, 3, S, S], detached.
        losses: the terms of `InnerProblem.evaluate`, detached.
        loss: with `InnerLoop.losses` the mean loss, differentiable with regard to parameters and rates.
    """

    image: torch.Tensor
    losses: dict[str, torch.Tensor]
    loss: torch.Tensor | None


class InnerProblem:
    """What the steps of one inner loop share, and one method a step.

    Args:
        generator: in eval mode; not changed. Freeze it (`requires_grad_(False)`) to save memory.
        auxiliary: in eval mode, a `private_view` where threads share the network; not changed.
        loss: Eq. 8 and, with weights for it, Eq. 12.
        tasks: the photos; without `planes` these are made here.
        inner: the settings.
        references: `references` of an earlier problem with the same photos.

    Raises:
        ValueError: the auxiliary network is in training mode.
    """

    def __init__(
        self,
        generator: Generator,
        auxiliary: AuxiliaryNetwork,
        loss: InversionLoss,
        tasks: Tasks,
        inner: InnerLoop,
        references: list[Reference] | None = None,
    ):
        if auxiliary.training:
            raise ValueError("the auxiliary network is in training mode, but a task has no batch statistics: .eval()")
        if tasks.planes is None:
            with torch.no_grad():
                tasks = replace(tasks, planes=generator.planes(tasks.w))
        self.generator, self.auxiliary, self.loss, self.tasks, self.inner = generator, auxiliary, loss, tasks, inner
        self.lookup = "gather" if inner.differentiable else "auto"  # only gathers can be differentiated twice on CUDA
        self.mirrored_camera = mirror_camera(tasks.camera) if loss.weights.uses_flip else None
        if references is None:
            references = [loss.reference(tasks.image, tasks.camera)]
            if loss.weights.uses_flip:
                references.append(loss.reference(tasks.image.flip(-1), self.mirrored_camera))
        #: What the loss needs of the photos and, with Eq. 12, of their mirror images.
        self.references = references

    def evaluate(
        self, step: int, offsets: AuxiliaryOutput, planes: torch.Tensor | None = None
    ) -> tuple[GeneratorOutput | ImageOutput, dict[str, torch.Tensor]]:
        """The reconstructions with these offsets, and the loss of each task, term by term.

        Args:
            step: gradient steps that led to the offsets; -1: none and no prediction.
            offsets, planes: see `synthesize_tasks`.

        Returns:
            Reconstructions [T·P, …]; the terms of `InversionLoss` and, where Eq. 12 takes part, "flip", each [T], the
            mean over a task's photos.
        """
        inner, tasks = self.inner, self.tasks
        if planes is None:
            planes = self.generator.planes(tasks.w, offsets.weight_offsets, dtype=inner.dtype)
        view = {"resolution": inner.resolution, "lookup": self.lookup, "dtype": inner.dtype, "planes": planes}
        output = synthesize_tasks(self.generator, tasks, offsets, **view)
        losses = self.loss(output.image, output.image_raw, self.references[0], tasks.camera)
        if self.loss.weights.uses_flip and inner.has_flip(step):
            other = synthesize_tasks(self.generator, tasks, offsets, camera=self.mirrored_camera, **view)
            losses["flip"] = self.loss.flip(other.image, other.image_raw, self.references[1], self.mirrored_camera)
            losses["total"] = losses["total"] + losses["flip"]  # L_all = L + L_f
        if tasks.photos > 1:
            losses = {name: value.unflatten(0, (-1, tasks.photos)).mean(1) for name, value in losses.items()}
        return output, losses

    @torch.no_grad()
    def start(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The reconstructions [T·P, 3, S, S] of the codes alone, with Δθ = 0, and the terms of `evaluate`."""
        output, losses = self.evaluate(-1, AuxiliaryOutput({}, None), self.tasks.planes)
        return output.image, losses

    @torch.no_grad()
    def finish(
        self, parameters: Mapping[str, torch.Tensor]
    ) -> tuple[AuxiliaryOutput, torch.Tensor, dict[str, torch.Tensor]]:
        """What parameters after all steps predict, and as `start`."""
        offsets = predict_tasks(self.auxiliary, parameters, self.tasks, self.inner.auxiliary_dtype)
        output, losses = self.evaluate(self.inner.steps, offsets)
        return offsets, output.image, losses

    def step(
        self,
        step: int,
        parameters: Mapping[str, torch.Tensor],
        velocity: Mapping[str, torch.Tensor] | None,
        rates: Mapping[str, torch.Tensor | float],
        differentiable: bool,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], InnerStep]:
        """Eq. 5 once: θ' and v' (`gradient_step`) of the state θ, v after `step` steps; `differentiable` as
        `InnerLoop` has it."""
        inner = self.inner
        offsets = predict_tasks(self.auxiliary, parameters, self.tasks, inner.auxiliary_dtype)
        output, losses = self.evaluate(step, offsets)
        total = losses["total"]
        # The sum's gradient holds each task's own: no task's loss depends on another's parameters.
        gradients = torch.autograd.grad(
            total, list(parameters.values()), torch.ones_like(total), create_graph=differentiable
        )
        loss = None
        if inner.losses:
            loss = total.mean() if inner.differentiable else _with_gradients(total, parameters.values(), gradients)
        adapted, velocity = gradient_step(
            parameters,
            dict(zip(parameters, gradients, strict=True)),
            rates,
            inner.max_gradient_norm,
            inner.momentum,
            velocity,
        )
        terms = {name: value.detach() for name, value in losses.items()}
        return adapted, velocity, InnerStep(output.image.detach(), terms, loss)

    def checkpointed_step(
        self, step: int, parameters: Mapping[str, torch.Tensor], velocity: Mapping[str, torch.Tensor] | None
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None, InnerStep]:
        """A differentiable `step` of which θ, v and the rates alone are kept for the backward pass."""
        inner, names = self.inner, list(parameters)
        groups = [parameters, inner.rates] if velocity is None else [parameters, velocity, inner.rates]
        seen: list[InnerStep] = []

        def compute(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            theta, *v, rates = (
                dict(zip(names, tensors[start : start + len(names)], strict=True))
                for start in range(0, len(tensors), len(names))
            )
            differentiable = torch.is_grad_enabled()
            with torch.enable_grad():  # the step's own gradient is wanted in any case
                if not differentiable:
                    theta = {name: tensor.detach().requires_grad_() for name, tensor in theta.items()}
                adapted, moved, before = self.step(step, theta, *(v or [None]), rates, differentiable)
            if not seen:
                seen.append(InnerStep(before.image, before.losses, None))
            after = [*adapted.values(), *(moved.values() if inner.momentum else ())]
            return (*after, before.loss) if inner.losses else tuple(after)

        outputs = recomputed(compute, *(group[name] for group in groups for name in names))
        before = seen[0]
        if inner.losses:
            *outputs, before.loss = outputs
        adapted = dict(zip(names, outputs, strict=False))
        # Without momentum nobody needs v'.
        velocity = dict(zip(names, outputs[len(names) :], strict=True)) if inner.momentum else None
        return adapted, velocity, before

    def run(
        self, parameters: Mapping[str, torch.Tensor], on_step: Callable[[int, InnerStep], None] | None = None
    ) -> tuple[dict[str, torch.Tensor], list[InnerStep]]:
        """The inner loop (Alg. 1, lines 3-7): all tasks side by side, each coming out as it would alone.

        Args:
            parameters: θ^Aux, shared by the tasks; with gradients.
            on_step: called as (step, what was seen before it).

        Returns:
            θ_i^Aux with a leading dimension of tasks, and what was seen before each step. With
            `InnerLoop.differentiable` they are differentiable with regard to `parameters` and rates. Without it their
            derivative takes inner gradients for constants and costs no backward pass of its own.
        """
        adapted = {name: p.expand(len(self.tasks), *p.shape) for name, p in parameters.items()}
        velocity, seen = None, []
        for step in range(self.inner.steps):
            if self.inner.checkpoint and self.inner.differentiable:
                adapted, velocity, before = self.checkpointed_step(step, adapted, velocity)
            else:
                rates = (self.inner.rates, self.inner.differentiable)
                adapted, velocity, before = self.step(step, adapted, velocity, *rates)
            seen.append(before)
            if on_step is not None:
                on_step(step, before)
        return adapted, seen


def _with_gradients(total, parameters, gradients) -> torch.Tensor:
    """The mean of `total` [T] with `gradients` of its sum, already known, in place of what made it."""
    linear = sum((gradient.detach() * p).sum() for p, gradient in zip(parameters, gradients, strict=True)) / len(total)
    return total.detach().mean() + linear - linear.detach()


@dataclass
class AdaptationResult:
    """What `adapt` found for one person.

    Attributes:
        parameters: adapted parameters of the auxiliary network, by name; detached.
        weight_offsets: δ per generator layer, as `generator.synthesize` takes it.
        offset_planes: [1, 3, 3, r, r] world units, or `None` without the 3D module.
        steps: one dictionary a step from -1 to N: "step", the terms of `InnerProblem.evaluate`, and "seconds", the
            time that this step alone took.
        image: the last reconstruction of each photo [P, 3, S, S].
    """

    parameters: dict[str, torch.Tensor]
    weight_offsets: dict[str, torch.Tensor]
    offset_planes: torch.Tensor | None
    steps: list[dict[str, float]]
    image: torch.Tensor


def adapt(
    generator: Generator,
    auxiliary: AuxiliaryNetwork,
    loss: InversionLoss,
    target: torch.Tensor,
    w: torch.Tensor,
    camera: torch.Tensor,
    steps: int = 5,
    learning_rate: float | None = None,
    learning_rates: Mapping[str, torch.Tensor | float] | None = None,
    max_gradient_norm: float | None = None,
    flip_share: float = 1.0,
    on_step: StepCallback | None = None,
    dtype: torch.dtype | None = None,
    make_problem: Callable[..., InnerProblem] = InnerProblem,
) -> AdaptationResult:
    """Adapt the auxiliary network to the photos of one person by N gradient steps (Eq. 5, `gradient_step`).

    A batch of one task, with the network's own momentum; works inside `no_grad` and `inference_mode` too.

    Args:
        generator, loss: see `InnerProblem`.
        auxiliary: not changed, always run with its stored batch statistics.
        target, camera: photos of one person [P, 3, S, S] in [-1, 1], and their cameras [P, 25].
        w: latent code of the person [1, w_dim] or [1, num_ws, w_dim]; stays fixed.
        steps: N ≥ 0.
        learning_rate: one α for all tensors. Default: the rates stored in the auxiliary network.
        learning_rates: α per tensor name, in place of `learning_rate`.
        max_gradient_norm: gradients of a larger norm are scaled down to it. Default: the auxiliary network's.
        flip_share: see `InnerLoop`; in the paper it is 1.
        on_step: called as (step, image [P, 3, S, S], losses) for step -1 (the encoder alone, Δθ = 0), 0 (the
            prediction before any gradient step) and 1 … N (after each); losses as in `AdaptationResult.steps`. On
            CUDA it is called while the next step is computed, on another stream.
        dtype: reduced precision of the generator and the auxiliary network; the loss has its own. `None`: theirs.
        make_problem: makes an `InnerProblem`, or what takes its steps in another way, of its arguments.

    Raises:
        ValueError: shapes do not fit together, a setting is out of range, or `learning_rates` lacks names.
        FloatingPointError: the loss became infinite or not a number.
    """
    _check_inputs(generator, target, w, camera, steps, flip_share)
    with torch.inference_mode(False), torch.enable_grad(), StepReports(target.device, on_step) as reports:
        # A tensor made in inference mode cannot be saved for backward; a clone made here can.
        target, w, camera = (tensor.detach().clone() for tensor in (target, w, camera))
        network = private_view(auxiliary).eval()
        parameters = {name: p.detach().requires_grad_() for name, p in network.adaptable_parameters().items()}
        rates = _inner_rates(network, parameters, learning_rate, learning_rates)
        changes = {"rates": rates, "max_gradient_norm": max_gradient_norm, "flip_share": flip_share}
        changes |= {"dtype": dtype, "auxiliary_dtype": dtype}
        inner = InnerLoop.of(network, steps, **changes)
        reports.start()
        with torch.no_grad():
            problem = make_problem(generator, network, loss, Tasks(target, camera, w, None), inner)
        reports.add(-1, *problem.start())
        adapted, _ = problem.run(parameters, lambda step, seen: reports.add(step, seen.image, seen.losses))
        offsets, image, losses = problem.finish(adapted)
        reports.add(steps, image, losses)
    parameters = {name: parameter.detach().squeeze(0) for name, parameter in adapted.items()}
    weight_offsets = {name: offset.squeeze(0) for name, offset in offsets.weight_offsets.items()}
    return AdaptationResult(parameters, weight_offsets, offsets.offset_planes, reports.steps, image)


def _inner_rates(network, parameters, learning_rate, learning_rates) -> dict[str, float]:
    if learning_rates is not None:
        missing = sorted(set(parameters) - set(learning_rates))
        if missing:
            raise ValueError(
                f"learning_rates lacks {len(missing)} of the auxiliary network's tensors, among them {missing[:3]}"
            )
        return {name: float(learning_rates[name]) for name in parameters}
    if learning_rate is not None:
        return dict.fromkeys(parameters, float(learning_rate))
    return network.inner_rate_values()


def _check_inputs(generator, target, w, camera, steps, flip_share) -> None:
    size = generator.config.image_size
    if target.ndim != 4 or len(target) < 1 or target.shape[1:] != (3, size, size):
        raise ValueError(
            f"target is {tuple(target.shape)}, expected photos [P, 3, {size}, {size}] as the generator makes them"
        )
    if camera.shape != (len(target), 25):
        raise ValueError(f"camera is {tuple(camera.shape)}, expected one camera a photo, {(len(target), 25)}")
    if w.ndim not in (2, 3) or len(w) != 1:
        raise ValueError(
            f"w is {tuple(w.shape)}, expected the one code of the person, [1, w_dim] or [1, num_ws, w_dim]; "
            "average the codes of several photos"
        )
    if steps < 0:
        raise ValueError(f"steps is {steps}, expected 0 or more")
    if not 0 < flip_share <= 1:
        raise ValueError(f"flip_share is {flip_share}, expected a part of the steps above 0 and at most 1")
