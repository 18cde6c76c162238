"""Persons to invert side by side: what the auxiliary network predicts for each, and what it makes of each photo.

Dimensions: see `metaaux.models`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .models.auxiliary import AuxiliaryNetwork, AuxiliaryOutput
from .models.eg3d import EG3DGenerator, GeneratorOutput
from .models.encoder import ImageEncoder
from .models.stylegan2 import ImageOutput, StyleGAN2Generator
from .precision import autocast

Generator = EG3DGenerator | StyleGAN2Generator


@dataclass
class Tasks:
    """T persons to invert side by side, each from P photos; the photos of a person stand together.

    Attributes:
        image: photos [T·P, 3, S, S] in [-1, 1].
        camera: of each photo, [T·P, 25].
        w: latent code of each person, [T, w_dim] or [T, num_ws, w_dim]; stays fixed.
        planes: the generator's own planes for these codes [T, 3, C, R, R]; `None` with a 2D generator, or where
            they are still to be made.
    """

    image: torch.Tensor
    camera: torch.Tensor
    w: torch.Tensor
    planes: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.w)

    @property
    def photos(self) -> int:
        """P, the photos of each person."""
        return len(self.image) // len(self.w)

    def split(self, size: int) -> list[Tasks]:
        """Parts of `size` tasks."""
        planes = [None] * -(-len(self) // size) if self.planes is None else self.planes.split(size)
        photos = (self.image.split(size * self.photos), self.camera.split(size * self.photos))
        return [Tasks(*tensors) for tensors in zip(*photos, self.w.split(size), planes, strict=True)]

    def for_photos(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """A tensor [T, …] with each task's entry once a photo, [T·P, …]; `None` stays."""
        if tensor is None or self.photos == 1:
            return tensor
        return tensor[:, None].expand(-1, self.photos, *tensor.shape[1:]).flatten(0, 1)


@torch.no_grad()
def encode(
    encoder: ImageEncoder,
    identity: torch.nn.Module | None,
    image: torch.Tensor,
    camera: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The encoder's codes [B, …] of images [B, 3, S, S] seen by cameras [B, 25], without gradients.

    `dtype` of the networks' products: by autocast, or, `None`, their own.

    Raises:
        ValueError: the encoder wants to be told the person, and there is no `identity` network to tell it.
    """
    with autocast(image.device, dtype):
        return encoder(image, embedding_for(encoder, identity, image, camera))


@torch.no_grad()
def embedding_for(
    encoder: ImageEncoder, identity: torch.nn.Module | None, image: torch.Tensor, camera: torch.Tensor
) -> torch.Tensor | None:
    """What `encoder` is told of the faces beside their images: embeddings by the `identity` network, or `None`; see
    `encode`."""
    if not encoder.identity_size:
        return None
    if identity is None:
        raise ValueError("the encoder needs the identity network's embeddings, and there is no such network")
    return identity(image, camera)


@torch.no_grad()
def make_tasks(
    generator: Generator,
    encoder: ImageEncoder,
    image: torch.Tensor,
    camera: torch.Tensor,
    identity: torch.nn.Module | None = None,
    dtype: torch.dtype | None = None,
) -> Tasks:
    """Photos [T, 3, S, S] seen by cameras [T, 25] as a task each, with the codes that `encode` gives them."""
    w = encode(encoder, identity, image, camera, dtype)
    return Tasks(image, camera, w, generator.planes(w))


def predict_tasks(
    auxiliary: AuxiliaryNetwork,
    parameters: Mapping[str, torch.Tensor],
    tasks: Tasks,
    dtype: torch.dtype | None = None,
) -> AuxiliaryOutput:
    """Offsets of each task, [T, …], from its own parameters [T, …] by name: the mean of what its photos give.

    `dtype` of the network's products: by autocast, or, `None`, its own.
    """
    photos = tasks.photos

    def predict_one(own, image, camera, planes):
        planes = None if planes is None else planes[None].expand(photos, *planes.shape)
        with autocast(image.device, dtype):
            output = torch.func.functional_call(auxiliary, own, (image, camera, planes), tie_weights=False)
        values = [*output.weight_offsets.values()]
        if output.offset_planes is not None:
            values.append(output.offset_planes)
        return [value.squeeze(0) if photos == 1 else value.mean(0) for value in values]

    if len(tasks) == 1:
        # Views of the tensors: vmap would add kernels, and each step here is bound by their launches.
        own = {name: parameter.squeeze(0) for name, parameter in parameters.items()}
        planes = None if tasks.planes is None else tasks.planes.squeeze(0)
        values = [value[None] for value in predict_one(own, tasks.image, tasks.camera, planes)]
    else:
        # The convolutions of all tasks become grouped ones; random numbers are not drawn anywhere in the network.
        image, camera = (tensor.unflatten(0, (-1, photos)) for tensor in (tasks.image, tasks.camera))
        in_dims = (0, 0, 0, None if tasks.planes is None else 0)
        values = torch.func.vmap(predict_one, in_dims)(dict(parameters), image, camera, tasks.planes)
    layers = auxiliary.layer_names
    weight_offsets = dict(zip(layers, values, strict=False))
    return AuxiliaryOutput(weight_offsets, values[-1] if len(values) > len(layers) else None)


def synthesize_tasks(
    generator: Generator,
    tasks: Tasks,
    offsets: AuxiliaryOutput,
    resolution: int | None = None,
    lookup: str = "auto",
    dtype: torch.dtype | None = None,
    camera: torch.Tensor | None = None,
    planes: torch.Tensor | None = None,
) -> GeneratorOutput | ImageOutput:
    """Each photo reconstructed with the offsets of its task, [T·P, 3, S, S].

    Args:
        generator, tasks, offsets: as `predict_tasks` gives the last.
        resolution, dtype: see `InnerLoop`.
        lookup: see `renderer.sample_planes`.
        camera: in place of the photos' own, [T·P, 25].
        planes: of each task's adapted backbone [T, 3, C, R, R], where known already.
    """
    if planes is None:
        planes = generator.planes(tasks.w, offsets.weight_offsets, dtype=dtype)
    # The only task's δ is passed without its dimension: weights that all samples share are faster.
    each = tasks.for_photos if len(tasks) > 1 else lambda offset: offset.squeeze(0)
    return generator.synthesize(
        tasks.for_photos(tasks.w),
        tasks.camera if camera is None else camera,
        weight_offsets={name: each(offset) for name, offset in offsets.weight_offsets.items()},
        offset_planes=tasks.for_photos(offsets.offset_planes),
        planes=tasks.for_photos(planes),
        resolution=resolution,
        lookup=lookup,
        dtype=dtype,
    )
