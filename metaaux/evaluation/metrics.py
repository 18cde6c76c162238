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
    def measure(
        self, image: torch.Tensor, target: torch.Tensor, camera: torch.Tensor | None = None
    ) -> dict[str, float | None]:
        """Figures of a reconstruction [3, S, S] and its photo [3, S, S], both in [-1, 1] and seen by `camera` [25]."""
        cameras = None if camera is None else camera[None]
        return {
            "mse": (image - target).square().mean().item(),
            "perceptual": self.perceptual(image[None], target[None]).item(),
        } | self.likeness(image[None], target, cameras, camera)

    @torch.no_grad()
    def likeness(
        self,
        images: torch.Tensor,
        target: torch.Tensor,
        cameras: torch.Tensor | None = None,
        camera: torch.Tensor | None = None,
    ) -> dict[str, float | None]:
        """Of images [V, 3, S, S] with one photo [3, S, S]: "identity", the mean cosine of their embeddings with the
        photo's, and "distance", the mean distance, by which only a `FaceRecogniser` tells persons apart.

        Identity networks that cut the face out by its camera need `cameras` [V, 25] of the images and the photo's
        `camera` [25].
        """
        of_photo = self.identity(target[None], None if camera is None else camera[None])
        of_images = self.identity(images, cameras)
        distance = None
        if isinstance(self.identity, FaceRecogniser):
            distance = self.identity.distance(of_images, of_photo).mean().item()
        return {"identity": F.cosine_similarity(of_images, of_photo, dim=1).mean().item(), "distance": distance}


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
