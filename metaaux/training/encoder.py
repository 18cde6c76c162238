"""Training of the latent encoder (Sec. 3.2: the initial code lies in a well-behaved region of W).

Each step mixes two kinds of images. Of the generator's own samples the latent code is known, so the encoder learns it
by regression; of photos only the picture is, so the frozen generator renders the predicted code at the photo's camera
and the picture is compared. A penalty keeps the codes of photos as close to the average as the mapping network's own
codes are, where edits work.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from PIL import Image
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationInfo, field_validator

from ..cameras import mirror_camera
from ..data.dataset import FaceDataset, to_signed
from ..export.sheets import grid
from ..losses import InversionLoss, LossWeights, perceptual_distance
from ..models.discriminator import DualDiscriminator
from ..models.encoder import ImageEncoder, LatentEncoder
from ..models.psp import PSPEncoder
from ..models.recogniser import SAME_PERSON, FaceRecogniser
from ..tasks import Generator, embedding_for, encode
from . import loop
from .averaged import AveragedTrainer, SampleSource
from .cuda_graphs import CapturedFunction
from .loading import compile_frozen, load_identity, load_network, load_perceptual
from .loop import per_process
from .micro_batches import accumulated, in_parts, pictures_at_once
from .settings import (
    AverageSettings,
    DataSettings,
    FrozenGeneratorCompute,
    OptimiserSettings,
    RunSettings,
    Settings,
    Share,
    arguments_of,
)
from .trainer import TrainingRun

ARCHITECTURES = {"styletransformer": LatentEncoder, "psp": PSPEncoder}
#: What the generator decides.
_GIVEN = ("image_size", "w_dim", "num_ws")
_check_options = {name: arguments_of(cls, *_GIVEN) for name, cls in ARCHITECTURES.items()}


class EncoderNetworks(Settings):
    """Trained networks that are used as they are."""

    generator: str
    """Folder of the generator."""
    discriminator: str | None = None
    """Folder of its discriminator, whose features are the perceptual distance unless there is `perceptual`."""
    perceptual: str | None = None
    """Safetensors file of SqueezeNet 1.1 features with folded normalisation, or folder of an `LPIPS`."""
    identity: str | None = None
    """Folder of an identity network; none: its term takes no part."""


class EncoderBatch(Settings):
    """Images a step, over all processes."""

    photos: PositiveInt = 256
    """Photos."""
    samples: PositiveInt = 256
    """Generator samples."""
    rendered_samples: NonNegativeInt = 64
    """Of the samples, how many are also compared as pictures."""


class EncoderLoss(Settings):
    """Weights of the loss's terms."""

    mse: NonNegativeFloat = 1.0
    """Of Eq. 9."""
    perceptual: NonNegativeFloat = 0.05
    """Of Eq. 10."""
    identity: NonNegativeFloat = 0.1
    """Of Eq. 11."""
    latent: NonNegativeFloat = 0.1
    """Of the squared latent error of samples, in units of each coordinate's standard deviation."""
    prior: NonNegativeFloat = 0.02
    """Of the penalty on codes of photos farther out than the mapping network's."""


class EncoderCurriculum(Settings):
    """What is made easier at the start; counts of the run's images."""

    latent_only_images: NonNegativeInt = 150_000
    """So long all images are samples, learnt by regression alone."""
    coarse_images: NonNegativeInt = 400_000
    """So long renderings have `coarse_resolution` rays a side, not the generator's own number; a 2D generator has no
    rays to spare."""
    coarse_resolution: PositiveInt = 32
    """Rays a side."""


class EncoderConfig(Settings):
    """Settings of the encoder's training; images are photos and samples, of all processes together."""

    networks: EncoderNetworks
    """What it is trained with."""
    data: DataSettings
    """Photos."""
    initial: str | None = None
    """Folder of an encoder to go on from, such as that of the generator's earlier state."""
    architecture: Literal["styletransformer", "psp"] = "styletransformer"
    """`LatentEncoder` or `PSPEncoder`."""
    encoder: dict[str, Any] = {}
    """Without `initial`, arguments of that class beside image_size, w_dim and num_ws, the generator's."""
    batch: EncoderBatch = EncoderBatch()
    """Batches."""
    min_truncation: Share = 0.6
    """Each sample's truncation is uniform from here to 1."""
    curriculum: EncoderCurriculum = EncoderCurriculum()
    """The start."""
    loss: EncoderLoss = EncoderLoss()
    """Weights."""
    optimiser: OptimiserSettings = OptimiserSettings(learning_rate=1e-3, warmup_images=10_000, weight_decay=0.01)
    """AdamW."""
    average: AverageSettings = AverageSettings(half_life_images=10_000)
    """The averaged encoder."""
    compute: FrozenGeneratorCompute = FrozenGeneratorCompute()
    """Precision."""
    run: RunSettings
    """Length and folder."""

    @field_validator("encoder")
    @classmethod
    def _options(cls, values: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "architecture" not in info.data:  # which is wrong by itself
            return values
        return _check_options[info.data["architecture"]](values)


class LatentDistribution:
    """Gaussian fit of the mapping network's codes: the average that truncation uses, spread, principal axes.

    Attributes:
        w_avg, w_std: mean and standard deviation of each coordinate, [w_dim].
    """

    # Axes with less than this share of the largest variance count as having that share: they hold rounding errors.
    VARIANCE_FLOOR = 1e-3

    def __init__(self, generator: Generator, cameras: torch.Tensor, samples: int = 16384, seed: int = 0):
        """Draws `samples` codes conditioned on random ones of cameras [N, 25]; one seed gives one fit."""
        device = cameras.device
        random = torch.Generator(device="cpu").manual_seed(seed)
        z = torch.randn(samples, generator.config.z_dim, generator=random).to(device)
        chosen = torch.randint(len(cameras), (samples,), generator=random).to(device)
        with torch.no_grad():
            w = generator.mapping(z, cameras[chosen])[:, 0].double()
            self.w_avg = generator.w_avg.detach().float().clone()
            centred = w - self.w_avg.double()
            self.w_std = centred.square().mean(dim=0).sqrt().float()
            variances, axes = torch.linalg.eigh(centred.mT @ centred / samples)
            variances = variances.clamp_min(self.VARIANCE_FLOOR * variances[-1])
            self._whiten = (axes / variances.sqrt()).float()

    def mahalanobis(self, w: torch.Tensor) -> torch.Tensor:
        """Mean squared whitened coordinate of codes [..., w_dim]; at most about 1 for the mapping network's."""
        return ((w - self.w_avg) @ self._whiten).square().mean(dim=-1)


def reconstruction_loss(config: EncoderConfig, device: torch.device, dtype: torch.dtype) -> InversionLoss:
    """Eq. 8 without its adversarial term, by the networks that `config` names; those that it does not take no part.

    Raises:
        ValueError: the perceptual term has a weight and no network.
    """
    networks, weights = config.networks, config.loss
    distance = identity = None
    if networks.perceptual:
        distance = perceptual_distance(load_perceptual(networks.perceptual).to(device), None)
    elif networks.discriminator:
        discriminator = load_network(DualDiscriminator, networks.discriminator).to(device)
        distance = perceptual_distance(None, discriminator, dtype)
    elif weights.perceptual:
        raise ValueError("loss.perceptual needs networks.discriminator or networks.perceptual; give one, or weight 0")
    if networks.identity:
        identity = load_identity(networks.identity).to(device)
    weights = LossWeights(
        mse=weights.mse,
        perceptual=weights.perceptual,
        identity=0.0 if identity is None else weights.identity,
        adversarial=0.0,
    )
    return InversionLoss(weights, distance, identity, None, dtype)


def latent_error(predicted: torch.Tensor, w: torch.Tensor, w_std: torch.Tensor) -> torch.Tensor:
    """Mean squared error of codes [B, w_dim] or [B, num_ws, w_dim] against w [B, w_dim], in units of w_std."""
    if predicted.ndim == 3:
        w = w[:, None]
    return ((predicted - w) / w_std).square().mean()


class EncoderEvaluation:
    """Held-out figures and the sample sheet: photos over reconstructions over turned heads."""

    PHOTOS = 256
    SAMPLES = 64

    def __init__(
        self, dataset: FaceDataset, samples: SampleSource, distribution: LatentDistribution, loss: InversionLoss
    ):
        device = samples.generator.device
        self.generator, self.dtype = samples.generator, samples.dtype
        self.distribution, self.loss = distribution, loss
        self.at_once = pictures_at_once(samples.generator.config.image_size)
        shown = range(min(self.PHOTOS, len(dataset)))
        self.photos = to_signed(torch.stack([dataset[i][0] for i in shown])).to(device)
        self.cameras = dataset.cameras[: len(self.photos)].to(device)
        conditions, self.sample_cameras = (samples.cameras(self.SAMPLES) for _ in range(2))
        self.w, self.samples = samples.pictures(conditions, self.sample_cameras, None)

    @torch.no_grad()
    def figures(self, encoder: ImageEncoder) -> dict[str, float]:
        """Losses on the photos, their codes' `mahalanobis`, and the `latent` error on samples.

        Where the identity network is a `FaceRecogniser`, whose distances mean something by themselves, also its mean
        `distance` to the photos, and the share of reconstructions that it takes for the `same_person`.
        """
        predicted = self.codes(encoder, self.photos, self.cameras)
        names = (*self.loss.terms, "total")
        recogniser = self.loss.identity if isinstance(self.loss.identity, FaceRecogniser) else None

        def compare(w, camera, photo):
            picture = self.picture(w, camera)
            terms = self.loss(picture, None, photo, camera)
            columns = [terms[name] for name in names]
            if recogniser is not None:  # in its own precision, not the run's
                distance = recogniser.distance(recogniser(picture, camera), recogniser(photo, camera))
                columns += [distance, (distance < SAME_PERSON).float()]
            return torch.stack(columns, dim=1)

        means = in_parts(compare, self.at_once, predicted, self.cameras, self.photos).mean(0)
        if recogniser is not None:
            names += ("distance", "same_person")
        figures = dict(zip(names, means.tolist(), strict=True))
        figures["mahalanobis"] = self.distribution.mahalanobis(predicted).mean().item()
        predicted = self.codes(encoder, self.samples, self.sample_cameras)
        figures["latent"] = latent_error(predicted, self.w, self.distribution.w_std).item()
        return figures

    def codes(self, encoder: ImageEncoder, images: torch.Tensor, cameras: torch.Tensor) -> torch.Tensor:
        """Codes of images [B, 3, S, S] seen by cameras [B, 25]."""
        return in_parts(functools.partial(encode, encoder, self.loss.identity), self.at_once, images, cameras)

    def picture(self, w: torch.Tensor, camera: torch.Tensor) -> torch.Tensor:
        """Heads [B, 3, S, S] of codes w [B, …] seen by cameras [B, 25]."""
        return self.generator.synthesize(w, camera, dtype=self.dtype).image

    @torch.no_grad()
    def sheet(self, encoder: ImageEncoder, columns: int = 16) -> Image.Image:
        """`columns` photos, their reconstructions, and, if there are other views, these with the head turned by 25
        degrees."""
        photos, cameras = self.photos[:columns], self.cameras[:columns]
        w = self.codes(encoder, photos, cameras)
        views = [cameras]
        if self.generator.has_viewpoints:
            views.append(self.generator.camera_at(25.0, 0.0).to(cameras).expand_as(cameras))
        return grid([photos] + [in_parts(self.picture, self.at_once, w, view) for view in views])


class EncoderTrainer(AveragedTrainer):
    """The state of a run and one method a phase."""

    name = "encoder"

    def __init__(self, config: EncoderConfig, accelerator: Accelerator):
        super().__init__(config, accelerator)
        batch = config.batch
        self.rendered_samples = per_process(batch.rendered_samples, accelerator)
        if self.rendered_samples > self.batch_samples:
            raise ValueError(f"batch.rendered_samples={batch.rendered_samples} exceed batch.samples={batch.samples}")
        self.loss = reconstruction_loss(config, self.device, self.dtype)
        cameras = torch.cat([self.dataset.cameras, mirror_camera(self.dataset.cameras)]).to(self.device)
        self.distribution = LatentDistribution(self.generator, cameras, seed=config.run.seed)
        self.generator.rays_at_once = config.compute.rays_at_once
        architecture = ARCHITECTURES[config.architecture]
        if config.initial is None:
            generator = self.generator
            encoder = architecture(
                image_size=generator.config.image_size,
                w_dim=generator.config.w_dim,
                num_ws=generator.num_ws,
                **config.encoder,
            )
        else:
            encoder = load_network(architecture, config.initial)
        encoder.set_latent_statistics(self.distribution.w_avg.cpu(), self.distribution.w_std.cpu())
        self.adopt(encoder)
        self.phase: tuple | None = None
        if config.compute.compile and self.device.type == "cuda":
            self.compile()

    def compile(self) -> None:
        """Fuse the passes of the encoder, where each normalisation would change the memory layout and back, and of the
        generator."""
        compile_frozen(self.generator)
        self.network.compile(dynamic=False)

    @property
    def images_per_step(self) -> int:
        """Photos and samples."""
        return self.config.batch.photos + self.config.batch.samples

    def load_data(self, images: int) -> None:
        """Likewise, and what it is evaluated on."""
        super().load_data(images)
        held_out = self.held_out(EncoderEvaluation.PHOTOS)
        # Other sizes than the steps' are not worth a compilation.
        with torch.compiler.set_stance("force_eager"):
            self.evaluation = EncoderEvaluation(held_out, self.samples, self.distribution, self.loss)

    def codes(self, images: torch.Tensor, cameras: torch.Tensor) -> torch.Tensor:
        """The encoder's of images [B, 3, S, S] seen by cameras [B, 25]."""
        return self.run_network(images, embedding_for(self.network, self.loss.identity, images, cameras))

    def latent_pass(self, resolution, conditions, cameras):
        """Flat gradient and figures of samples alone, seen at `cameras`; `conditions` are the mapping's."""
        w, images = self.samples.pictures(conditions, cameras, resolution)
        latent = latent_error(self.codes(images, cameras), w, self.distribution.w_std)
        return self._gradient(self.config.loss.latent * latent, {"latent": latent})

    def mixed_pass(self, resolution, conditions, cameras, photos, photo_cameras):
        """Flat gradient and figures of photos and samples; the figures of pictures are the photos'."""
        config = self.config
        w, samples = self.samples.pictures(conditions, cameras, resolution)
        images = torch.cat([photos, samples])
        predicted = self.codes(images, torch.cat([photo_cameras, cameras]))
        latent = latent_error(predicted[len(photos) :], w, self.distribution.w_std)
        # Nearer to the average than the mapping network's codes is no fault: only what lies beyond them is penalised.
        distance = self.distribution.mahalanobis(predicted[: len(photos)])
        prior = (distance - 1).relu().mean()

        rendered = len(photos) + self.rendered_samples
        views = torch.cat([photo_cameras, cameras[: self.rendered_samples]])

        def compare(w, camera, target):
            image = self.generator.synthesize(w, camera, resolution=resolution, dtype=self.dtype).image
            return self.loss(image, None, target, camera)

        terms = accumulated(compare, config.compute.micro_batch, predicted[:rendered], views, images[:rendered])
        loss = terms["total"].mean() + config.loss.latent * latent + config.loss.prior * prior
        figures = {name: terms[name][: len(photos)] for name in self.loss.terms}
        return self._gradient(loss, figures | {"latent": latent, "mahalanobis": distance, "prior": prior})

    def _gradient(self, loss, figures):
        figures = {"loss": loss, **figures}
        return self.gradients[0].flatten(loss), {name: value.detach() for name, value in figures.items()}

    def _prepare(self, images: int) -> bool:
        """Choose the phase's pass, captured anew at each change; whether it takes photos."""
        curriculum = self.config.curriculum
        coarse = images < curriculum.coarse_images and self.generator.has_viewpoints
        resolution = curriculum.coarse_resolution if coarse else None
        with_photos = images >= curriculum.latent_only_images
        if self.phase != (with_photos, resolution):
            self.phase = (with_photos, resolution)
            function = self.mixed_pass if with_photos else self.latent_pass
            self.captured = CapturedFunction(functools.partial(function, resolution), self.graphs)
        return with_photos

    def compute(self, images: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Flat gradient and figures of the pass that is due."""
        with_photos = self._prepare(images)
        count = self.batch_samples if with_photos else self.batch_photos + self.batch_samples
        conditions, cameras = (self.samples.cameras(count) for _ in range(2))
        photos = self.sampler.next() if with_photos else ()
        return self.captured(conditions, cameras, *photos)

    def evaluate(self, run: TrainingRun) -> dict[str, float]:
        """`EncoderEvaluation`'s figures and sheet."""
        with torch.compiler.set_stance("force_eager"):
            run.sheet("encoder", self.evaluation.sheet(self.average))
            return self.evaluation.figures(self.average)


def train(config: EncoderConfig, run_folder: str | os.PathLike, resume: bool = False) -> Path:
    """Runs (or goes on with) an encoder's training in `run_folder`; returns the newest checkpoint.

    The checkpoint's `encoder` is the averaged one, which is published. Held-out figures are those of
    `EncoderEvaluation.figures`.

    Raises:
        FileExistsError, FileNotFoundError, ValueError, FloatingPointError, RuntimeError: see `loop.train`.
    """
    return loop.train(EncoderTrainer, config, run_folder, resume).checkpoints[-1]
