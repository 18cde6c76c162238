"""Training of the latent encoder (Sec. 3.2: the initial code lies in a well-behaved region of W).

Each step mixes two kinds of images. Of the generator's own samples the latent code is known, so the encoder learns it
by regression; of photos only the picture is, so the frozen generator renders the predicted code at the photo's camera
and the picture is compared. A penalty keeps the codes of photos as close to the average as the mapping network's own
codes are, where edits work.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image

from ..cameras import camera_from_pose, mirror_camera
from ..data.dataset import FaceDataset, to_signed
from ..export.sheets import grid
from ..losses import InversionLoss, LossWeights, perceptual_distance
from ..models.discriminator import DualDiscriminator
from ..models.eg3d import EG3DGenerator
from ..models.encoder import ImageEncoder, LatentEncoder
from ..models.identity import IdentityNetwork
from ..models.perceptual import LPIPS
from ..models.psp import PSPEncoder
from .averaged import AveragedTrainer, SampleSource, per_process, train_averaged
from .cuda_graphs import CapturedFunction
from .trainer import TrainingRun


@dataclass
class EncoderConfig:
    """Hyperparameters of the encoder's training; batches and image counts are those of all processes together.

    Attributes:
        data: dataset zip or folder of the photos.
        generator: folder of the trained generator, which stays as it is.
        validation: dataset of held-out photos for figures and sheets; without it they show training photos.
        discriminator: folder of the generator's discriminator, whose features are the perceptual distance unless
            there is `perceptual_features`.
        perceptual_features: safetensors file of SqueezeNet 1.1 features with folded normalisation, or folder of an
            `LPIPS`.
        identity: folder of an identity network.
        initial_encoder: folder of an encoder to go on from, such as that of the generator's earlier state.
        architecture: "styletransformer" (`LatentEncoder`) or "psp" (`PSPEncoder`).
        encoder: without an initial one, options of that class beside image_size, w_dim and num_ws, the generator's.
        total_images: length of the training, photos and samples both counted.
        latent_only_images: of them, those at the start that are all samples, learnt by regression alone.
        coarse_images: of them, those at the start that are rendered with `coarse_resolution` rays a side, not with the
            generator's own number.
        batch_photos, batch_samples: photos and generator samples a step.
        rendered_samples: of the samples, how many are also compared as pictures.
        min_truncation: each sample's truncation is uniform from here to 1.
        learning_rate: AdamW's peak, after a linear warm-up over `warmup_images`; then it falls to 0 by half a cosine.
        max_gradient_norm: gradients longer than this are shortened to it.
        average_images: half-life of the moving average of the weights, at most a tenth of the images so far.
        weight_latent: of the squared latent error of samples, in units of each coordinate's standard deviation.
        weight_mse, weight_perceptual, weight_identity: of the terms of Eq. 8.
        weight_prior: of the penalty on codes of photos farther out than the mapping network's.
        bf16: bfloat16 convolutions on CUDA.
        graphs: replay steps as CUDA graphs.
        interval_images: images between checkpoints, figures and sheets.
        max_seconds: stop after so many seconds, with a checkpoint to resume from; the schedules follow total_images.
    """

    data: str
    generator: str
    validation: str | None = None
    discriminator: str | None = None
    perceptual_features: str | None = None
    identity: str | None = None
    initial_encoder: str | None = None
    architecture: str = "styletransformer"
    encoder: dict = field(default_factory=dict)
    total_images: int = 600_000
    latent_only_images: int = 150_000
    coarse_images: int = 400_000
    coarse_resolution: int = 32
    batch_photos: int = 256
    batch_samples: int = 256
    rendered_samples: int = 64
    min_truncation: float = 0.6
    learning_rate: float = 1e-3
    warmup_images: int = 10_000
    weight_decay: float = 0.01
    average_images: int = 10_000
    max_gradient_norm: float = 1.0
    weight_latent: float = 0.1
    weight_mse: float = 1.0
    weight_perceptual: float = 0.05
    weight_identity: float = 0.1
    weight_prior: float = 0.02
    bf16: bool = True
    graphs: bool = True
    interval_images: int = 100_000
    max_seconds: float | None = None
    seed: int = 0


ARCHITECTURES = {"styletransformer": LatentEncoder, "psp": PSPEncoder}


class LatentDistribution:
    """Gaussian fit of the mapping network's codes: the average that truncation uses, spread, principal axes.

    Attributes:
        w_avg, w_std: mean and standard deviation of each coordinate, [w_dim].
    """

    # Axes with less than this share of the largest variance count as having that share: they hold rounding errors.
    VARIANCE_FLOOR = 1e-3

    def __init__(self, generator: EG3DGenerator, cameras: torch.Tensor, samples: int = 16384, seed: int = 0):
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
        ValueError: `weight_perceptual` is positive and there is no network for it.
    """
    distance = identity = None
    if config.perceptual_features:
        distance = perceptual_distance(LPIPS.from_path(config.perceptual_features).to(device), None)
    elif config.discriminator:
        discriminator = DualDiscriminator.from_pretrained(config.discriminator, torch_dtype=torch.float32)
        distance = perceptual_distance(None, discriminator.to(device).eval().requires_grad_(False), dtype)
    elif config.weight_perceptual:
        raise ValueError("weight_perceptual needs a discriminator or perceptual_features; give one, or weight 0")
    if config.identity:
        identity = IdentityNetwork.from_pretrained(config.identity, torch_dtype=torch.float32)
        identity = identity.to(device).eval().requires_grad_(False)
    weights = LossWeights(
        mse=config.weight_mse,
        perceptual=config.weight_perceptual,
        identity=0.0 if identity is None else config.weight_identity,
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

    PHOTOS = 64

    def __init__(
        self, dataset: FaceDataset, samples: SampleSource, distribution: LatentDistribution, loss: InversionLoss
    ):
        device = samples.generator.device
        self.generator, self.dtype = samples.generator, samples.dtype
        self.distribution, self.loss = distribution, loss
        shown = range(min(self.PHOTOS, len(dataset)))
        self.photos = to_signed(torch.stack([dataset[i][0] for i in shown])).to(device)
        self.cameras = dataset.cameras[: len(self.photos)].to(device)
        conditions, cameras = (samples.sampler.sample_cameras(self.PHOTOS) for _ in range(2))
        self.w, self.samples = samples.pictures(conditions, cameras, None)

    @torch.no_grad()
    def figures(self, encoder: ImageEncoder) -> dict[str, float]:
        """Losses on the photos, their codes' `mahalanobis`, and the `latent` error on samples."""
        predicted = encoder(self.photos)
        image = self.generator.synthesize(predicted, self.cameras, dtype=self.dtype).image
        terms = self.loss(image, None, self.photos, self.cameras)
        figures = {name: terms[name].mean().item() for name in (*self.loss.terms, "total")}
        figures["mahalanobis"] = self.distribution.mahalanobis(predicted).mean().item()
        figures["latent"] = latent_error(encoder(self.samples), self.w, self.distribution.w_std).item()
        return figures

    @torch.no_grad()
    def sheet(self, encoder: ImageEncoder, columns: int = 16) -> Image.Image:
        """`columns` photos, their reconstructions, and those with the head turned by 25 degrees."""
        photos, cameras = self.photos[:columns], self.cameras[:columns]
        w = encoder(photos)
        turned = camera_from_pose(25.0, 0.0).to(cameras).expand_as(cameras)
        return grid([photos] + [self.generator.synthesize(w, c, dtype=self.dtype).image for c in (cameras, turned)])


class EncoderTrainer(AveragedTrainer):
    """The state of a run and one method a phase."""

    name = "encoder"

    def __init__(self, config: EncoderConfig, accelerator: Accelerator):
        super().__init__(config, accelerator)
        self.rendered_samples = per_process(config.rendered_samples, accelerator)
        if self.rendered_samples > self.batch_samples:
            raise ValueError(f"rendered_samples={config.rendered_samples} exceed batch_samples={config.batch_samples}")
        self.loss = reconstruction_loss(config, self.device, self.dtype)
        cameras = torch.cat([self.dataset.cameras, mirror_camera(self.dataset.cameras)]).to(self.device)
        self.distribution = LatentDistribution(self.generator, cameras, seed=config.seed)
        if config.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {config.architecture!r}")
        architecture = ARCHITECTURES[config.architecture]
        if config.initial_encoder is None:
            generator = self.generator
            encoder = architecture(
                image_size=generator.config.image_size,
                w_dim=generator.config.w_dim,
                num_ws=generator.num_ws,
                **config.encoder,
            )
        else:
            encoder = architecture.from_pretrained(config.initial_encoder, torch_dtype=torch.float32)
        encoder.set_latent_statistics(self.distribution.w_avg.cpu(), self.distribution.w_std.cpu())
        self.adopt(encoder)
        self.phase: tuple | None = None

    @property
    def images_per_step(self) -> int:
        """Photos and samples."""
        return self.config.batch_photos + self.config.batch_samples

    def load_data(self, images: int) -> None:
        """Likewise, and what it is evaluated on."""
        super().load_data(images)
        held_out = self.held_out(EncoderEvaluation.PHOTOS)
        self.evaluation = EncoderEvaluation(held_out, self.samples, self.distribution, self.loss)

    def latent_pass(self, resolution, conditions, cameras):
        """Flat gradient and figures of samples alone, seen at `cameras`; `conditions` are the mapping's."""
        w, images = self.samples.pictures(conditions, cameras, resolution)
        latent = latent_error(self.run_network(images), w, self.distribution.w_std)
        return self._gradient(self.config.weight_latent * latent, {"latent": latent})

    def mixed_pass(self, resolution, conditions, cameras, photos, photo_cameras):
        """Flat gradient and figures of photos and samples; the figures of pictures are the photos'."""
        config = self.config
        w, samples = self.samples.pictures(conditions, cameras, resolution)
        images = torch.cat([photos, samples])
        predicted = self.run_network(images)
        latent = latent_error(predicted[len(photos) :], w, self.distribution.w_std)
        # Nearer to the average than the mapping network's codes is no fault: only what lies beyond them is penalised.
        distance = self.distribution.mahalanobis(predicted[: len(photos)])
        prior = (distance - 1).relu().mean()

        rendered = len(photos) + self.rendered_samples
        views = torch.cat([photo_cameras, cameras[: self.rendered_samples]])
        image = self.generator.synthesize(predicted[:rendered], views, resolution=resolution, dtype=self.dtype).image
        terms = self.loss(image, None, images[:rendered], views)
        loss = terms["total"].mean() + config.weight_latent * latent + config.weight_prior * prior
        figures = {name: terms[name][: len(photos)] for name in self.loss.terms}
        return self._gradient(loss, figures | {"latent": latent, "mahalanobis": distance, "prior": prior})

    def _gradient(self, loss, figures):
        figures = {"loss": loss, **figures}
        return self.gradients.flatten(loss), {name: value.detach() for name, value in figures.items()}

    def _prepare(self, images: int) -> bool:
        """Choose the phase's pass, captured anew at each change; whether it takes photos."""
        config = self.config
        resolution = config.coarse_resolution if images < config.coarse_images else None
        with_photos = images >= config.latent_only_images
        if self.phase != (with_photos, resolution):
            self.phase = (with_photos, resolution)
            function = self.mixed_pass if with_photos else self.latent_pass
            self.captured = CapturedFunction(functools.partial(function, resolution), config.graphs)
        return with_photos

    def compute(self, images: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Flat gradient and figures of the pass that is due."""
        with_photos = self._prepare(images)
        count = self.batch_samples if with_photos else self.batch_photos + self.batch_samples
        conditions, cameras = (self.sampler.sample_cameras(count) for _ in range(2))
        photos = self.sampler.next() if with_photos else ()
        return self.captured(conditions, cameras, *photos)

    def evaluate(self, run: TrainingRun) -> dict[str, float]:
        """`EncoderEvaluation`'s figures and sheet."""
        run.sheet("encoder", self.evaluation.sheet(self.average))
        return self.evaluation.figures(self.average)


def train(config: EncoderConfig, run_folder: str | os.PathLike, resume: bool = False) -> Path:
    """Runs (or goes on with) an encoder's training in `run_folder`; returns the newest checkpoint.

    The checkpoint's `encoder` is the averaged one, which is published. figures.jsonl: see `train_averaged`; held-out
    figures are those of `EncoderEvaluation.figures`.

    Raises:
        FileNotFoundError, ValueError: data, checkpoints or settings do not fit.
    """
    return train_averaged(EncoderTrainer, config, run_folder, resume)
