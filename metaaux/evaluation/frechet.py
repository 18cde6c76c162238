"""Fréchet distance between two sets of images (Heusel et al. 2017), over features of an interchangeable network."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Protocol

import numpy as np
import scipy.linalg
import torch

from ..models.perceptual import LPIPS


class FeatureExtractor(Protocol):
    """A network whose features are compared; `name` goes into the results."""

    name: str

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images [B, 3, H, W] → features [B, D], float32."""
        ...


class SqueezeNetFeatures:
    """Spatial mean of SqueezeNet 1.1's last tap, 512 values.

    Args:
        path: safetensors file under torchvision's `features.*` keys, whose first layer takes RGB in [-1, 1].
        device: where it computes.

    Raises:
        FileNotFoundError, ValueError: as `LPIPS.from_features_file`.
    """

    def __init__(self, path: str | os.PathLike, device: torch.device | str = "cpu"):
        self.name = f"SqueezeNet 1.1, mean of its last features ({Path(path).name})"
        self.network = LPIPS.from_features_file(path).to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images [B, 3, H, W] → [B, 512]."""
        return self.network.pooled_features(images.to(self.device).float() / 127.5 - 1)


class TorchScriptFeatures:
    """A scripted network of features, such as NVIDIA's `inception-2015-12-05.pt`, with which FIDs are computed.

    The module is called with uint8 images [B, 3, H, W] and `return_features=True`, as that file wants it.

    Args:
        path: the TorchScript file.
        device: where it computes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no TorchScript file.
    """

    def __init__(self, path: str | os.PathLike, device: torch.device | str = "cpu"):
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no feature network at {path}")
        self.name = f"TorchScript network {Path(path).name}"
        self.device = device
        try:
            self.network = torch.jit.load(path, map_location=device).eval()
        except RuntimeError as error:
            raise ValueError(f"{path} is not a TorchScript file: {str(error).splitlines()[0]}") from None

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images [B, 3, H, W] → [B, D]."""
        return self.network(images.to(self.device), return_features=True).float()


def load_feature_extractor(path: str | os.PathLike, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The network of a file: `.safetensors` holds SqueezeNet 1.1, `.pt` any TorchScript network.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file.
    """
    suffix = Path(path).suffix
    if suffix == ".safetensors":
        return SqueezeNetFeatures(path, device)
    if suffix in (".pt", ".jit"):
        return TorchScriptFeatures(path, device)
    raise ValueError(f"{path} must be SqueezeNet's features (.safetensors) or a TorchScript network (.pt)")


class FeatureStatistics:
    """Mean and covariance of features that come in batches, in float64.

    Sums are kept relative to the first batch's mean, so that large means cost no precision.
    """

    def __init__(self) -> None:
        self.count = 0
        self._shift: np.ndarray | None = None
        self._sum: np.ndarray | float = 0.0
        self._squares: np.ndarray | float = 0.0

    def add(self, features: torch.Tensor | np.ndarray) -> None:
        """Takes in features [B, D].

        Raises:
            ValueError: no finite features of the shape of earlier ones.
        """
        values = np.asarray(features.cpu() if isinstance(features, torch.Tensor) else features, dtype=np.float64)
        if values.ndim != 2 or (self._shift is not None and values.shape[1] != len(self._shift)):
            raise ValueError(f"features must be [B, D] with one D throughout, got {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError("features must be finite")
        if self._shift is None:
            self._shift = values.mean(0)
        values = values - self._shift
        self.count += len(values)
        self._sum = self._sum + values.sum(0)
        self._squares = self._squares + values.T @ values

    @property
    def mean(self) -> np.ndarray:
        """[D]."""
        return self._shift + self._sum / self.count

    @property
    def covariance(self) -> np.ndarray:
        """[D, D], unbiased; needs two images at least."""
        mean = self._sum / self.count
        return (self._squares - self.count * np.outer(mean, mean)) / (self.count - 1)


def frechet_distance(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
    """|μ_a - μ_b|² + tr(Σ_a + Σ_b - 2·(Σ_a Σ_b)^½) of two Gaussians, computed in float64.

    The trace of the root is the sum of the singular values of Σ_a^½ Σ_b^½, which, unlike a general matrix root, needs
    no offset where there are fewer images than features and the covariances are singular.

    Raises:
        ValueError: shapes differ or values are not finite.
    """
    if not (mean_a.shape == mean_b.shape and covariance_a.shape == covariance_b.shape == 2 * mean_a.shape):
        raise ValueError(f"two Gaussians of different dimensions: {mean_a.shape} and {mean_b.shape}")
    roots = []
    for covariance in (covariance_a, covariance_b):
        values, vectors = scipy.linalg.eigh(np.asarray(covariance, dtype=np.float64))
        roots.append((vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T)
    root_trace = scipy.linalg.svdvals(roots[0] @ roots[1]).sum()
    difference = np.asarray(mean_a, dtype=np.float64) - np.asarray(mean_b, dtype=np.float64)
    distance = difference @ difference + np.trace(covariance_a) + np.trace(covariance_b) - 2 * root_trace
    return max(float(distance), 0.0)


def frechet_between(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """[`frechet_distance`] of two sets of images; `nan` where one has less than two."""
    if min(a.count, b.count) < 2:
        return math.nan
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
