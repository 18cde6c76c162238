"""The paper's method: an auxiliary network's prediction, then gradient steps on the auxiliary network (Eq. 5)."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from ..adaptation import InnerLoop, InnerProblem, adapt
from ..files import source_name
from ..losses import InversionLoss
from ..models.auxiliary import AuxiliaryNetwork
from ..models.encoder import LatentEncoder
from ..precision import reduced_dtype
from ..tasks import Tasks, encode, make_tasks, predict_tasks
from .base import Generator, InversionMethod, Reconstruction, weights_of
from .registry import MethodRequest, register


class AuxiliaryAdaptation(InversionMethod):
    """The paper's method: an auxiliary network's prediction, then gradient steps on the auxiliary network (Eq. 5).

    With `steps` 0 it is the prediction alone; a hypernetwork without adaptation (HyperInverter) is that of another
    auxiliary network. A single photo is adapted by [`~metaaux.adaptation.adapt`], as in `MetaAuxInverter.invert`.

    Args:
        name: see `InversionMethod`.
        label: see `InversionMethod`.
        generator: the generator.
        encoder: gives the code, which stays fixed.
        loss: Eq. 8.
        auxiliary: the auxiliary network.
        steps: N of Eq. 5.
        learning_rate: α of Eq. 5; `None` takes the rates stored in the auxiliary network.
        source: where the auxiliary network came from, for the records.
        dtype: reduced precision of the networks; the loss has its own. `None`: theirs.
    """

    def __init__(
        self,
        name: str,
        label: str,
        generator: Generator,
        encoder: LatentEncoder,
        loss: InversionLoss,
        auxiliary: AuxiliaryNetwork,
        steps: int,
        learning_rate: float | None,
        source: str,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(name, label)
        self.dtype = dtype
        self.generator, self.encoder, self.loss, self.auxiliary = generator, encoder, loss, auxiliary
        self.steps, self.learning_rate, self.source = steps, learning_rate, source

    def settings(self) -> dict[str, Any]:
        return {
            "auxiliary": self.source,
            "steps": self.steps,
            "learning_rate": self.learning_rate,
            "loss": weights_of(self.loss),
        }

    def rates(self) -> dict[str, float]:
        """α of Eq. 5 for each tensor."""
        if self.learning_rate is not None:
            return dict.fromkeys(self.auxiliary.adaptable_parameters(), self.learning_rate)
        return self.auxiliary.inner_rate_values()

    def invert(self, image: torch.Tensor, camera: torch.Tensor) -> list[Reconstruction]:
        if len(image) > 1:
            return self._invert_batch(image, camera)
        return [self._invert_one(*one) for one in zip(image.split(1), camera.split(1))]

    def _invert_one(self, image: torch.Tensor, camera: torch.Tensor) -> Reconstruction:
        w = encode(self.encoder, self.loss.identity, image, camera, self.dtype)
        result = adapt(
            self.generator,
            self.auxiliary,
            self.loss,
            image,
            w,
            camera,
            steps=self.steps,
            learning_rates=self.rates(),
            dtype=self.dtype,
        )
        final = result.image[0].detach().clamp(-1, 1)
        return Reconstruction(final, w, camera, self.generator, result.weight_offsets, result.offset_planes)

    def _invert_batch(self, image: torch.Tensor, camera: torch.Tensor) -> list[Reconstruction]:
        generator, auxiliary = self.generator, self.auxiliary
        tasks = make_tasks(generator, self.encoder, image, camera, self.loss.identity, self.dtype)
        parameters = {name: p.detach().requires_grad_() for name, p in auxiliary.adaptable_parameters().items()}
        inner = InnerLoop.of(auxiliary, self.steps, rates=self.rates(), dtype=self.dtype, auxiliary_dtype=self.dtype)
        with torch.enable_grad():
            adapted, _ = InnerProblem(generator, auxiliary, self.loss, tasks, inner).run(parameters)
        with torch.no_grad():
            offsets = predict_tasks(auxiliary, adapted, tasks, self.dtype)
            return [self._of_task(tasks, offsets, index) for index in range(len(image))]

    def _of_task(self, tasks: Tasks, offsets, index: int) -> Reconstruction:
        part = slice(index, index + 1)
        w, camera = tasks.w[part], tasks.camera[part]
        weight_offsets = {name: offset[index] for name, offset in offsets.weight_offsets.items()}
        offset_planes = None if offsets.offset_planes is None else offsets.offset_planes[part]
        offsets = {"weight_offsets": weight_offsets, "offset_planes": offset_planes}
        output = self.generator.synthesize(w, camera, **offsets, dtype=self.dtype)
        if not torch.isfinite(output.image).all():
            raise FloatingPointError("the reconstruction is not finite: the adaptation diverged")
        return Reconstruction(output.image[0].clamp(-1, 1), w, camera, self.generator, weight_offsets, offset_planes)


Adaptation = TypeVar("Adaptation", bound=AuxiliaryAdaptation)


@register("full", "Ours (full)", stepped=True)
@register("metaaux", "Ours", stepped=True)
def make_metaaux(request: MethodRequest, cls: type[Adaptation] = AuxiliaryAdaptation) -> Adaptation:
    """The checkpoint's own auxiliary network; "full" in tables of ablations."""
    inverter = request.inverter
    rate = inverter.config.inner_learning_rate
    return make_adaptation(request, inverter.auxiliary, request.steps, rate, "pipeline", cls)


def make_from_folder(request: MethodRequest, steps: int) -> AuxiliaryAdaptation:
    """The auxiliary network of the method's folder, with the rates that were learnt with it."""
    auxiliary = request.load(AuxiliaryNetwork, image_size=request.inverter.generator.config.image_size)
    return make_adaptation(request, auxiliary, steps, None, source_name(request.folder))


def make_adaptation(
    request: MethodRequest,
    auxiliary: AuxiliaryNetwork,
    steps: int,
    learning_rate: float | None,
    source: str,
    cls: type[Adaptation] = AuxiliaryAdaptation,
) -> Adaptation:
    """An auxiliary network with the checkpoint's generator, encoder and loss."""
    inverter = request.inverter
    return cls(
        request.name,
        request.label,
        inverter.generator,
        inverter.encoder,
        inverter.inversion_loss(),
        auxiliary,
        steps,
        learning_rate,
        source,
        reduced_dtype(inverter.precision),
    )
