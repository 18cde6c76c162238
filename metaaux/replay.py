"""The inner loop of inference as passes that `cuda_graphs` records once and replays for every photo."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from .adaptation import InnerLoop, InnerProblem, InnerStep
from .cuda_graphs import CudaGraphs
from .losses import InversionLoss, Reference
from .models.auxiliary import AuxiliaryNetwork, AuxiliaryOutput
from .tasks import Generator, Tasks

# Numbers to whose multiples tensors are padded in a pack: kernels are fastest on memory aligned to 256 bytes.
_ALIGNMENT = 64


class PackedTensors(Mapping[str, torch.Tensor]):
    """Tensors of one precision by name, as views of a single one: hundreds of them are copied at once.

    Args:
        shapes: of each by name.
        flat: all of them in a row, each padded to a multiple of `_ALIGNMENT`.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], flat: torch.Tensor):
        self.shapes, self.flat = dict(shapes), flat
        ends = itertools.accumulate(map(self._padded, self.shapes.values()))
        self._starts = dict(zip(self.shapes, itertools.chain([0], ends)))

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> PackedTensors:
        """A copy of tensors of one precision and device."""
        first = next(iter(tensors.values()))
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        packed = cls(shapes, first.new_zeros(sum(map(cls._padded, shapes.values()))))
        packed.fill(tensors)
        return packed

    def with_flat(self, flat: torch.Tensor) -> PackedTensors:
        """Tensors of the same names and shapes in another pack."""
        other = copy.copy(self)
        other.flat = flat
        return other

    @staticmethod
    def _padded(shape: torch.Size) -> int:
        return -(-shape.numel() // _ALIGNMENT) * _ALIGNMENT

    def __getitem__(self, name: str) -> torch.Tensor:
        start, shape = self._starts[name], self.shapes[name]
        return self.flat[start : start + shape.numel()].view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes over the values of tensors of the same names and shapes."""
        torch._foreach_copy_(list(self.values()), [tensors[name] for name in self])


class ReplayedProblem(InnerProblem):
    """An `InnerProblem` without derivatives of its gradients, whose passes are those of `graphs`.

    Three kinds of passes make an inversion: the start (planes, the loss' view of the photos, the code alone), a step
    with and one without Eq. 12, and the end. Photos, codes, cameras, parameters and velocities are their inputs;
    learning rates and the other settings of `inner` are recorded, so that others have recordings of their own.

    Args:
        graphs: keeps the recordings.
        generator, auxiliary, loss: see `InnerProblem`.
        tasks: without planes.
        inner: with numbers as rates, and without `differentiable` and `losses`.
        networks: all that generator, auxiliary network and loss consist of, where these are private views or made for
            each photo: whether the same ones have changed is looked up faster. Default: the three themselves.
    """

    def __init__(
        self,
        graphs: CudaGraphs,
        generator: Generator,
        auxiliary: AuxiliaryNetwork,
        loss: InversionLoss,
        tasks: Tasks,
        inner: InnerLoop,
        networks: Sequence[torch.nn.Module] | None = None,
    ):
        # The weights stand for whether there is Eq. 12: photos with and without it come in turn; so do precisions.
        kind = ("adaptation", loss.weights, loss.dtype)
        self.run_pass = graphs.bind(kind, *(networks or (generator, auxiliary, loss)))
        self.loss, self.inner = loss, inner

        def begin(given: dict[str, Any]) -> dict[str, Any]:
            problem = InnerProblem(generator, auxiliary, loss, Tasks(**given["photos"], planes=None), inner)
            image, losses = problem.start()
            references = [(r.image, r.taps, r.identity) for r in problem.references]
            return {"planes": problem.tasks.planes, "references": references, "image": image, "losses": losses}

        photos = {"image": tasks.image, "camera": tasks.camera, "w": tasks.w}
        begun = self.run_pass("start", begin, {"photos": photos, "settings": self._settings(-1)})
        references = [Reference(*reference) for reference in begun["references"]]
        super().__init__(generator, auxiliary, loss, Tasks(**photos, planes=begun["planes"]), inner, references)
        self._started = begun["image"], begun["losses"]

    def start(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `InnerProblem.start`."""
        return self._started

    def step(
        self,
        step: int,
        parameters: Mapping[str, torch.Tensor],
        velocity: Mapping[str, torch.Tensor] | None,
        rates: Mapping[str, torch.Tensor | float],
        differentiable: bool,
    ) -> tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor] | None, InnerStep]:
        """See `InnerProblem.step`; what it returns are `PackedTensors`."""
        inner, packed = self.inner, self._packed(parameters)
        if not inner.momentum:
            velocity = None  # nobody reads it
        elif velocity is None:
            # With which the first step is the same as without any.
            velocity = packed.with_flat(torch.zeros_like(packed.flat))

        def descend(given: dict[str, Any]) -> dict[str, Any]:
            theta = packed.with_flat(given["parameters"])
            v = None if given["velocity"] is None else packed.with_flat(given["velocity"])
            with torch.enable_grad():
                leaves = {name: tensor.detach().requires_grad_() for name, tensor in theta.items()}
                adapted, moved, before = self._problem(given).step(step, leaves, v, rates, differentiable)
            theta.fill(adapted)
            if v is not None:
                v.fill(moved)
            state = {name: given[name] for name in ("parameters", "velocity")}
            return {**state, "image": before.image, "losses": before.losses}

        given = {
            **self._given(step),
            "parameters": packed.flat,
            "velocity": None if velocity is None else velocity.flat,
            "rates": (inner.max_gradient_norm, inner.momentum, *(rates[name] for name in packed)),
        }
        after = self.run_pass("step", descend, given)
        velocity = None if velocity is None else packed.with_flat(after["velocity"])
        return packed.with_flat(after["parameters"]), velocity, InnerStep(after["image"], after["losses"], None)

    def finish(
        self, parameters: Mapping[str, torch.Tensor]
    ) -> tuple[AuxiliaryOutput, torch.Tensor, dict[str, torch.Tensor]]:
        """See `InnerProblem.finish`."""
        packed = self._packed(parameters)

        def end(given: dict[str, Any]) -> tuple:
            theta = packed.with_flat(given["parameters"])
            offsets, image, losses = self._problem(given).finish(theta)
            return offsets.weight_offsets, offsets.offset_planes, image, losses

        given = {**self._given(self.inner.steps), "parameters": packed.flat}
        weight_offsets, offset_planes, image, losses = self.run_pass("end", end, given)
        return AuxiliaryOutput(weight_offsets, offset_planes), image, losses

    @staticmethod
    def _packed(parameters: Mapping[str, torch.Tensor]) -> PackedTensors:
        return parameters if isinstance(parameters, PackedTensors) else PackedTensors.of(parameters)

    def _settings(self, step: int) -> tuple:
        """What `evaluate` depends on beside tensors."""
        inner = self.inner
        return (
            self.loss.weights.uses_flip and inner.has_flip(step),
            inner.resolution,
            inner.dtype,
            inner.auxiliary_dtype,
        )

    def _given(self, step: int) -> dict[str, Any]:
        """What all passes after the start are given, in the state after so many steps."""
        tasks = self.tasks
        photos = {"image": tasks.image, "camera": tasks.camera, "w": tasks.w, "planes": tasks.planes}
        references = [(r.image, r.taps, r.identity) for r in self.references]
        return {"tasks": photos, "references": references, "settings": self._settings(step)}

    def _problem(self, given: dict[str, Any]) -> InnerProblem:
        """The same problem of the tensors that a pass was given."""
        references = [Reference(*reference) for reference in given["references"]]
        return InnerProblem(self.generator, self.auxiliary, self.loss, Tasks(**given["tasks"]), self.inner, references)
