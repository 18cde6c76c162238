"""Training of an identity network without identity labels, for the identity loss (Eq. 11).

The 3D generator shows one head from two cameras, which are two pictures of one person; a photo and its (mirrored) self
under different augmentations are another such pair. A contrastive loss brings pairs together and everybody else in the
batch apart.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from pydantic import AfterValidator, NonNegativeFloat, PositiveFloat, PositiveInt

from ..data.dataset import to_signed
from ..export.sheets import grid
from ..models.identity import IdentityNetwork
from . import loop
from .averaged import AveragedTrainer
from .settings import (
    AverageSettings,
    ComputeSettings,
    DataSettings,
    OptimiserSettings,
    RunSettings,
    Settings,
    Share,
    arguments_of,
)
from .trainer import TrainingRun


class IdentityNetworks(Settings):
    """Trained networks that are used as they are."""

    generator: str
    """Folder of the generator."""


class IdentityBatch(Settings):
    """Persons a step, a pair of pictures each; over all processes."""

    samples: PositiveInt = 512
    """Generated persons."""
    photos: PositiveInt = 512
    """Photos."""


class IdentityConfig(Settings):
    """Settings of the identity network's training; batches and counts are those of all processes together, and a pair
    is two images."""

    networks: IdentityNetworks
    """What it is trained with."""
    data: DataSettings
    """Photos."""
    identity: Annotated[dict[str, Any], AfterValidator(arguments_of(IdentityNetwork))] = {}
    """Arguments of `IdentityNetwork`."""
    batch: IdentityBatch = IdentityBatch()
    """Batches."""
    resolution: PositiveInt | None = 32
    """Rays a side of the generated pictures; null: the generator's."""
    max_yaw: NonNegativeFloat = 30.0
    """Degrees to either side from which each generated picture's yaw is drawn."""
    max_pitch: NonNegativeFloat = 15.0
    """Likewise, its pitch."""
    min_truncation: Share = 0.6
    """Each generated person's truncation is uniform from here to 1; near the average people look alike."""
    temperature: PositiveFloat = 0.1
    """Of the contrastive loss."""
    optimiser: OptimiserSettings = OptimiserSettings(learning_rate=2e-3, warmup_images=20_000, weight_decay=0.05)
    """AdamW."""
    average: AverageSettings = AverageSettings(half_life_images=20_000)
    """The averaged network."""
    compute: ComputeSettings = ComputeSettings()
    """Precision."""
    run: RunSettings
    """Length and folder."""


def _uniform(batch: int, low: float, high: float, device: torch.device) -> torch.Tensor:
    return torch.empty(batch, 1, 1, 1, device=device).uniform_(low, high)


def _normal_exponent(batch: int, deviation: float, device: torch.device, channels: int = 1) -> torch.Tensor:
    return torch.exp2(torch.randn(batch, channels, 1, 1, device=device) * deviation)


# kornia's augmentations read on the host which images they hit, a wait for the GPU at each of the seven changes.
def augment(image: torch.Tensor) -> torch.Tensor:
    """What changes between two photos of a person, for images [B, 3, S, S] in [-1, 1], at random for each image.

    A small similarity transform (as of another alignment), blur, white balance, saturation (a fifth become grey),
    contrast, brightness and noise.
    """
    batch, _, size, _ = image.shape
    device = image.device
    angle = _uniform(batch, -1, 1, device)[:, 0, 0, 0] * math.radians(8)
    scale = _normal_exponent(batch, 0.08, device)[:, 0, 0, 0]
    shift = torch.empty(batch, 2, 1, device=device).uniform_(-0.06, 0.06)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rotation = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], 1)
    sampling = F.affine_grid(torch.cat([rotation, shift], dim=2), list(image.shape), align_corners=False)
    image = F.grid_sample(image, sampling, padding_mode="reflection", align_corners=False)

    coarse = F.interpolate(image, size=(size // 3, size // 3), mode="bilinear", antialias=True)
    coarse = F.interpolate(coarse, size=(size, size), mode="bilinear")
    image = image.lerp(coarse, _uniform(batch, -1, 1, device).clamp_min(0))

    image = (image + 1) * _normal_exponent(batch, 0.12, device, channels=3) - 1
    grey = image.mean(dim=1, keepdim=True)
    saturation = _normal_exponent(batch, 0.4, device) * (_uniform(batch, 0, 1, device) > 0.2)
    image = grey + (image - grey) * saturation
    mean = image.mean(dim=(1, 2, 3), keepdim=True)
    image = mean + (image - mean) * _normal_exponent(batch, 0.3, device) + _uniform(batch, -0.25, 0.25, device)
    return (image + torch.randn_like(image) * _uniform(batch, 0, 0.08, device)).clamp(-1, 1)


def contrastive_loss(first: torch.Tensor, second: torch.Tensor, temperature: float, accelerator: Accelerator):
    """Normalised-temperature cross entropy (NT-Xent, Chen et al. 2020) over the batches of all processes: a scalar.

    Args:
        first, second: unit vectors [N, D]; row i of both is one person, all else others. N is the same on every
            process.
        temperature: divides the cosines.
        accelerator: other processes' vectors count like one's own, but for their gradient: the sum of the processes'
            gradients is that of the whole batch.
    """
    own = torch.cat([first, second])
    rank, count = accelerator.process_index, len(own)
    # gather() concatenates in order of rank; this process' part is put back with its gradient.
    everyone = accelerator.gather(own.detach())
    everyone = torch.cat([everyone[: rank * count], own, everyone[(rank + 1) * count :]])
    rows = torch.arange(len(everyone), device=own.device)
    logits = (everyone @ everyone.T / temperature).masked_fill(F.one_hot(rows).bool(), -torch.inf)
    partners = rows // count * count + (rows + len(first)) % count
    return F.cross_entropy(logits, partners)


def verification_figures(first: torch.Tensor, second: torch.Tensor) -> dict[str, float]:
    """How well the cosine tells one person's pairs from pairs of two persons.

    Args:
        first, second: unit vectors [N, D], N at least 2; row i of both is one person, all else others.

    Returns:
        "auc": area under the receiver operating characteristic; "accuracy": mean of the true positive and true
            negative rate at
        the best threshold; "same" and "different": mean cosines.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    cosines = (first @ second.T).double().cpu().numpy()
    same = np.eye(len(cosines), dtype=bool)
    false_positive, true_positive, _ = roc_curve(same.ravel(), cosines.ravel())
    return {
        "auc": float(roc_auc_score(same.ravel(), cosines.ravel())),
        "accuracy": float((true_positive + 1 - false_positive).max() / 2),
        "same": float(cosines[same].mean()),
        "different": float(cosines[~same].mean()),
    }


class IdentityTrainer(AveragedTrainer):
    """The state of a run and its pairs of pictures."""

    name = "identity"
    packages = ("sklearn",)
    EVALUATED = 400

    def __init__(self, config: IdentityConfig, accelerator: Accelerator):
        super().__init__(config, accelerator)
        if not self.generator.has_viewpoints:
            raise ValueError(
                f"{config.networks.generator} is a 2D generator, which cannot show a person twice: train the identity "
                "network on a 3D generator of crops framed alike, or convert one (metaaux convert arcface)"
            )
        self.adopt(IdentityNetwork(**config.identity))

    @property
    def images_per_step(self) -> int:
        """Pairs are two images each."""
        return 2 * (self.config.batch.samples + self.config.batch.photos)

    def load_data(self, images: int) -> None:
        """Likewise, and what it is evaluated on."""
        super().load_data(images)
        held_out = self.held_out(self.EVALUATED)
        shown = range(min(self.EVALUATED, len(held_out)))
        self.held_out_photos = to_signed(torch.stack([held_out[i][0] for i in shown])).to(self.device)
        chunks = [self.generated_pairs(50, None) for _ in range(self.EVALUATED // 50)]
        self.held_out_pairs = tuple(torch.cat(pictures) for pictures in zip(*chunks))

    @torch.no_grad()
    def generated_pairs(self, batch: int, resolution: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Two pictures [batch, 3, S, S] of each of `batch` random heads, each from a camera of its own."""
        w = self.samples.latents(self.samples.cameras(batch))
        planes = self.generator.planes(w, dtype=self.dtype)
        limits = torch.tensor([self.config.max_yaw, self.config.max_pitch])
        pictures = []
        for _ in range(2):
            yaw, pitch = ((torch.rand(batch, 2) * 2 - 1) * limits).unbind(dim=1)
            cameras = self.generator.camera_at(yaw, pitch).to(self.device, non_blocking=True)
            output = self.generator.synthesize(w, cameras, planes=planes, resolution=resolution, dtype=self.dtype)
            pictures.append(output.image.clamp(-1, 1))
        return tuple(pictures)

    def photo_pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch of photos, twice; half of the second ones mirrored."""
        photos, _ = self.sampler.next()
        mirrored = torch.rand(len(photos), 1, 1, 1, device=self.device) < 0.5
        return photos, torch.where(mirrored, photos.flip(-1), photos)

    def compute(self, images: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Flat gradient and figures of a batch of pairs."""
        config = self.config
        generated, photos = self.generated_pairs(self.batch_samples, config.resolution), self.photo_pairs()
        pictures = augment(torch.cat([generated[0], photos[0], generated[1], photos[1]]))
        first, second = self.run_network(pictures).chunk(2)
        loss = contrastive_loss(first, second, config.temperature, self.accelerator)
        cosine = (first * second).sum(dim=1).detach()
        figures = {
            "loss": loss.detach(),
            "cosine_generated": cosine[: self.batch_samples],
            "cosine_photos": cosine[self.batch_samples :],
        }
        # The processes' gradients will be averaged.
        return self.gradients[0].flatten(loss * self.accelerator.num_processes), figures

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """`verification_figures` of the averaged network: "generated/..." on two views of held-out heads, "photos/..."
        on photos against their mirror images."""
        pairs = {"generated": self.held_out_pairs, "photos": (self.held_out_photos, self.held_out_photos.flip(-1))}
        figures = {}
        for kind, (first, second) in pairs.items():
            for name, value in verification_figures(self.average(first), self.average(second)).items():
                figures[f"{kind}/{name}"] = value
        return figures

    def evaluate(self, run: TrainingRun) -> dict[str, float]:
        """`figures`, and a sheet of pairs as the network sees them."""
        run.sheet("pairs", grid([augment(pictures[:16]) for pictures in self.held_out_pairs]))
        return self.figures()


def train(config: IdentityConfig, run_folder: str | os.PathLike, resume: bool = False) -> Path:
    """Runs (or goes on with) an identity network's training in `run_folder`; returns the newest checkpoint.

    The checkpoint's `identity` is the averaged network, which is published. Held-out figures are those of
    `IdentityTrainer.figures`.

    Raises:
        FileExistsError, FileNotFoundError, ValueError, FloatingPointError, RuntimeError: see `loop.train`.
    """
    return loop.train(IdentityTrainer, config, run_folder, resume).checkpoints[-1]
