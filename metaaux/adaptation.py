"""Test-time adaptation of the auxiliary network: the total loss (Eq. 8-12) and the inner loop (Eq. 5).

Nothing shared is changed: the adapted parameters live in a dictionary that belongs to the call, and
`torch.func.functional_call`, which for its duration swaps tensors inside the module it is given, only ever sees a
private shell of the auxiliary network that shares the tensors. So several threads may adapt the same network at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .cameras import mirror_camera
from .losses import InversionLoss, private_view
from .models.auxiliary import AuxiliaryOutput

StepCallback = Callable[[int, torch.Tensor, dict[str, float]], None]


@dataclass
class AdaptationResult:
    """What `adapt` found for one person.

    Attributes:
        parameters: adapted parameters of the auxiliary network, by name; detached.
        weight_offsets: δ per generator layer, as `generator.synthesize` takes it.
        offset_planes: [1, 3, 3, r, r] world units, or `None` without the 3D module.
        steps: one dictionary a step from -1 to N: "step", the loss terms of Eq. 8 ("flip" too where it takes part)
            and "seconds", the time that this step alone took.
        image: the last reconstruction [P, 3, S, S], one for each photo.
    """

    parameters: dict[str, torch.Tensor]
    weight_offsets: dict[str, torch.Tensor]
    offset_planes: torch.Tensor | None
    steps: list[dict[str, float]]
    image: torch.Tensor


def gradient_step(
    parameters: Mapping[str, torch.Tensor],
    gradients: Mapping[str, torch.Tensor],
    rates: Mapping[str, torch.Tensor | float],
    max_gradient_norm: float | None = None,
    momentum: float = 0.0,
    velocity: Mapping[str, torch.Tensor] | None = None,
    stacked: bool = False,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Eq. 5 with Polyak's momentum: v' = μ v + ∇L, θ' = θ - α v'; differentiable with regard to all its inputs.

    μ = 0 is Eq. 5 itself.

    Args:
        parameters: θ by name; with `stacked` every tensor has a leading dimension of tasks.
        gradients: the same names and shapes.
        rates: α of each tensor.
        max_gradient_norm: gradients of a larger norm (over all tensors, of each task alone) are scaled down to it.
        momentum: μ.
        velocity: v, as the step before returned it; `None` before the first.
        stacked: see `parameters`.

    Returns:
        θ' and v'.
    """
    scale = None
    if max_gradient_norm is not None:
        squares = [
            gradient.reshape(len(gradient), -1).square().sum(1) if stacked else gradient.square().sum()
            for gradient in gradients.values()
        ]
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


def adapt(
    generator: torch.nn.Module,
    auxiliary: torch.nn.Module,
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
) -> AdaptationResult:
    """Adapt the auxiliary network to the photos of one person by N gradient steps (Eq. 5, `gradient_step`).

    The steps have the momentum that is stored in the auxiliary network. Works inside `no_grad` and `inference_mode`
    too. The auxiliary network predicts from each photo and the predictions are averaged; the loss is the mean over the
    photos, so that the rates suit any number of them.

    Args:
        generator: an `EG3DGenerator`, in eval mode; not changed. Freeze it (`requires_grad_(False)`) to save memory.
        auxiliary: an `AuxiliaryNetwork`; not changed, always run with its stored batch statistics.
        loss: Eq. 8.
        target: photos of one person [P, 3, S, S] in [-1, 1].
        w: latent code of the person [1, w_dim] or [1, num_ws, w_dim]; stays fixed.
        camera: [P, 25].
        steps: N ≥ 0.
        learning_rate: one α for all tensors. Default: the rates stored in the auxiliary network.
        learning_rates: α per tensor name, in place of `learning_rate`.
        max_gradient_norm: gradients of a larger norm are scaled down to it. Default: the auxiliary network's.
        flip_share: part of the steps, from the first on and at least one, whose loss holds Eq. 12; the others are the
            photo's alone. In the paper it is all of them.
        on_step: called as (step, image [P, 3, S, S], losses) for step -1 (the encoder alone, Δθ = 0), 0 (the
            prediction before any gradient step) and 1 … N (after each); losses as in `AdaptationResult.steps`.

    Raises:
        ValueError: shapes do not fit together, `steps` is negative, `flip_share` is not above 0 and at most 1, or
            names are missing in `learning_rates`.
        FloatingPointError: the loss became infinite or not a number.
    """
    _check_inputs(generator, target, w, camera, steps, flip_share)
    flip_steps = max(1, math.ceil(flip_share * steps - 1e-6)) if flip_share < 1 else math.inf
    with torch.inference_mode(False), torch.enable_grad():
        # A tensor made in inference mode cannot be saved for backward; a clone made here can.
        target, w, camera = (tensor.detach().clone() for tensor in (target, w, camera))
        network = private_view(auxiliary).eval()
        parameters = {
            name: parameter.detach().requires_grad_() for name, parameter in network.adaptable_parameters().items()
        }
        rates = _inner_rates(network, parameters, learning_rate, learning_rates)
        if max_gradient_norm is None:
            max_gradient_norm = network.config.inner_max_gradient_norm
        session = _Session(generator, network, loss, target, w, camera, flip_steps, on_step)
        return session.run(parameters, rates, steps, max_gradient_norm)


class _Session:
    """The constants of one `adapt` call and its loop."""

    def __init__(self, generator, network, loss, target, w, camera, flip_steps, on_step):
        self.generator, self.network, self.loss, self.on_step = generator, network, loss, on_step
        self.flip_steps = flip_steps
        self.target, self.camera, self.w = target, camera, w
        self.reports: list[dict[str, float]] = []
        self.started = self._now()
        self.photo_w = w.expand(len(target), *w.shape[1:])
        self.reference = loss.reference(target, camera)
        self.flipped = None
        if loss.weights.uses_flip:
            mirrored = mirror_camera(camera)
            self.flipped = (loss.reference(target.flip(-1), mirrored), mirrored)
        with torch.no_grad():
            self.base_planes = generator.planes(w)

    def run(self, parameters, rates, steps, max_gradient_norm) -> AdaptationResult:
        momentum, velocity = self.network.config.inner_momentum, None
        with torch.no_grad():
            image, losses = self._losses(-1, {}, None, self.base_planes)
        self._report(-1, image, losses)

        for step in range(steps + 1):
            last = step == steps
            with torch.set_grad_enabled(not last):
                offsets = self._predict(parameters)
                planes = self.generator.planes(self.w, weight_offsets=offsets.weight_offsets)
                image, losses = self._losses(step, offsets.weight_offsets, offsets.offset_planes, planes)
            self._report(step, image, losses)
            if not last:
                gradients = torch.autograd.grad(losses["total"], list(parameters.values()))
                with torch.no_grad():
                    named = dict(zip(parameters, gradients, strict=True))
                    parameters, velocity = gradient_step(
                        parameters, named, rates, max_gradient_norm, momentum, velocity
                    )
                parameters = {name: parameter.requires_grad_() for name, parameter in parameters.items()}

        return AdaptationResult(
            parameters={name: parameter.detach() for name, parameter in parameters.items()},
            weight_offsets=offsets.weight_offsets,
            offset_planes=offsets.offset_planes,
            steps=self.reports,
            image=image,
        )

    def _predict(self, parameters: dict[str, torch.Tensor]) -> AuxiliaryOutput:
        photo_planes = self._for_each_photo(self.base_planes)
        output = torch.func.functional_call(self.network, parameters, (self.target, self.camera, photo_planes))
        # Averaged to one prediction for the person, in the shape that all samples of a generator call share.
        weight_offsets = {name: offset.mean(0) for name, offset in output.weight_offsets.items()}
        offset_planes = None if output.offset_planes is None else output.offset_planes.mean(0, keepdim=True)
        return AuxiliaryOutput(weight_offsets, offset_planes)

    def _losses(self, step, weight_offsets, offset_planes, planes) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        output = self._synthesize(self.camera, weight_offsets, offset_planes, planes)
        losses = self.loss(output.image, output.image_raw, self.reference, self.camera)
        if self.flipped is not None and step < self.flip_steps:
            reference, camera = self.flipped
            view = self._synthesize(camera, weight_offsets, offset_planes, planes)
            losses["flip"] = self.loss.flip(view.image, view.image_raw, reference, camera)
            losses["total"] = losses["total"] + losses["flip"]  # L_all = L + L_f
        return output.image, {name: value.mean() for name, value in losses.items()}

    def _synthesize(self, camera, weight_offsets, offset_planes, planes):
        return self.generator.synthesize(
            self.photo_w,
            camera,
            weight_offsets=weight_offsets,
            offset_planes=None if offset_planes is None else self._for_each_photo(offset_planes),
            planes=self._for_each_photo(planes),
        )

    def _report(self, step: int, image: torch.Tensor, losses: dict[str, torch.Tensor]) -> None:
        values = {name: value.item() for name, value in losses.items()}
        if not math.isfinite(values["total"]):
            raise FloatingPointError(
                f"the loss is {values['total']} at step {step} of the adaptation; lower the learning rate, set "
                "max_gradient_norm, or check that photo, code and camera are finite"
            )
        self.reports.append({"step": step, **values, "seconds": self._now() - self.started})
        if self.on_step is not None:
            self.on_step(step, image.detach(), dict(self.reports[-1]))
        self.started = self._now()  # the caller's drawing is not counted

    def _for_each_photo(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:  # the planes of a 2D generator
            return None
        return tensor.expand(len(self.target), *tensor.shape[1:])

    def _now(self) -> float:
        if self.target.is_cuda:
            torch.cuda.synchronize(self.target.device)
        return time.perf_counter()


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
    rates = network.inner_rates()
    # Read at once: one by one, each would make the host wait for a GPU.
    return dict(zip(rates, torch.stack(list(rates.values())).tolist(), strict=True))


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
