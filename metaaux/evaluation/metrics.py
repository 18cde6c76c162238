"""How far a reconstruction is from its photo."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..devices import synchronize
from ..files import source_name
from ..hub.loading import load_component
from ..losses import perceptual_distance
from ..models.perceptual import LPIPS
from ..models.recogniser import FaceRecogniser

if TYPE_CHECKING:
    from ..pipeline import MetaAuxInverter


class ReconstructionMetrics:
    """MSE of images in [-1, 1], perceptual distance, and likeness by the identity network.

    Args:
        inverter: its identity network is used and, unless `perceptual` names another one, its perceptual distance.
        perceptual: file of SqueezeNet 1.1 features (uncalibrated LPIPS), or folder or Hub id of an
            [`~metaaux.models.perceptual.LPIPS`].

    Attributes:
        names: which network each metric uses, for the results.

    Raises:
        FileNotFoundError, ValueError, OSError: `perceptual` cannot be loaded.
    """

    def __init__(self, inverter: MetaAuxInverter, perceptual: str | os.PathLike | None = None):
        self.identity = inverter.identity
        model = source_name(inverter.name_or_path)
        if perceptual is None and inverter.perceptual is None:
            self.perceptual = perceptual_distance(None, inverter.discriminator)
            perceptual_name = f"features of the discriminator of {model}"
        elif perceptual is None:
            self.perceptual = inverter.perceptual
            perceptual_name = f"{_describe(inverter.perceptual)} of {model}"
        elif Path(perceptual).is_file():
            network = LPIPS.from_features_file(perceptual)
            perceptual_name = f"{_describe(network)} ({Path(perceptual).name})"
            self.perceptual = network.to(inverter.device)
        else:
            network = load_component(LPIPS, perceptual, allow_hub=True)
            perceptual_name = f"{_describe(network)} ({source_name(perceptual)})"
            self.perceptual = network.to(inverter.device)
        self.names = {
            "mse": "images in [-1, 1]",
            "perceptual": perceptual_name,
            "identity": f"cosine of embeddings by the identity network of {model}",
        }
        if isinstance(self.identity, FaceRecogniser):
            self.names["distance"] = "of embeddings by dlib's face recognition network"

    @torch.no_grad()
    def embed(self, images: torch.Tensor, cameras: torch.Tensor | None = None) -> torch.Tensor:
        """The identity network's embeddings [B, D] of images [B, 3, S, S] in [-1, 1]. A network that cuts the face out
        by its camera needs `cameras` [B, 25]."""
        return self.identity(images, cameras)

    @torch.no_grad()
    def measure(
        self,
        images: torch.Tensor,
        photos: torch.Tensor,
        cameras: torch.Tensor | None = None,
        of_photos: torch.Tensor | None = None,
    ) -> list[dict[str, float | None]]:
        """Figures of each reconstruction.

        Args:
            images, photos: reconstructions and their photos [B, 3, S, S] in [-1, 1].
            cameras: [B, 25], of both.
            of_photos: the photos' embeddings, where they are known.
        """
        of_photos = self.embed(photos, cameras) if of_photos is None else of_photos
        figures = {
            "mse": (images - photos).square().mean(dim=(1, 2, 3)).tolist(),
            "perceptual": self.perceptual(images, photos).tolist(),
        } | self.likeness(self.embed(images, cameras), of_photos)
        return [{name: values and values[i] for name, values in figures.items()} for i in range(len(images))]

    def likeness(self, embeddings: torch.Tensor, of_photos: torch.Tensor) -> dict[str, list[float] | None]:
        """Of embeddings [B, D] with those of photos [B or 1, D]: "identity", their cosines, and "distance", their
        distances, by which only a `FaceRecogniser` tells persons apart; `None` of another network."""
        distances = None
        if isinstance(self.identity, FaceRecogniser):
            distances = self.identity.distance(embeddings, of_photos).tolist()
        return {"identity": F.cosine_similarity(embeddings, of_photos, dim=1).tolist(), "distance": distances}


def _describe(network: LPIPS) -> str:
    kind = "LPIPS" if network.config.calibrated else "uncalibrated LPIPS"
    return f"{kind} on {network.config.backbone}"


def timed(function: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What `function` returns, and the seconds it took with the device's queue empty before and after."""
    synchronize(device)
    started = time.perf_counter()
    result = function()
    synchronize(device)
    return result, time.perf_counter() - started
