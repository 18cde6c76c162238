"""Attributes of rendered heads, for the search for directions: by the age and gender network and by landmarks."""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from math import nan
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ..faces.measures import MEASURES, REGIONS, background_mask, face_measures, mean_colours, region_masks
from ..models.age_gender import AgeGenderNetwork

if TYPE_CHECKING:
    from ..faces.detection import DetectedFace

#: Attributes that the age and gender network judges; the others are `faces.measures.MEASURES`.
NETWORK_ATTRIBUTES = ("age", "gender")


@functools.cache
def _detector():
    from ..faces.detection import FaceDetector

    return FaceDetector()


class Measured(NamedTuple):
    """What is measured of B pictures, float32 on the CPU; not-a-numbers where no face is found, but of the background.

    Attributes:
        values: attributes [B, attributes].
        colours: mean colours of skin and background, [B, 6] in [0, 1] (`faces.measures.mean_colours`).
        pose: yaws and pitches [B, 2] in degrees.
    """

    values: torch.Tensor
    colours: torch.Tensor
    pose: torch.Tensor


_COUNTS = (len(MEASURES), 3 * len(REGIONS), 2)


def _measure_picture(pixels: np.ndarray) -> list[float]:
    """Measures, colours, yaw and pitch of the largest face of an RGB picture [S, S, 3]; without one not-a-numbers, but
    for the background."""
    from ..faces.alignment import head_pose

    faces = _detector().detect(Image.fromarray(pixels))
    colours = mean_colours(pixels, _masks(len(pixels), faces)).ravel()
    if not faces:
        return [*[nan] * len(MEASURES), *colours, nan, nan]
    return [*face_measures(faces[0].landmarks).values(), *colours, *head_pose(faces[0])]


def _mask_picture(pixels: np.ndarray) -> np.ndarray:
    """`region_masks` of the largest face of an RGB picture [S, S, 3]; without one, the background alone."""
    return _masks(len(pixels), _detector().detect(Image.fromarray(pixels)))


def _masks(side: int, faces: Sequence[DetectedFace]) -> np.ndarray:
    if faces:
        return region_masks(side, faces[0].landmarks)
    return np.stack([np.zeros((side, side), dtype=bool), background_mask(side)])


class Attributes:
    """Measures attributes of rendered heads; closes its worker processes with `close`.

    Args:
        network: path of the age and gender network, or `None` to leave these two out.
        workers: as in `DirectionsConfig`.
        device: of the network.

    Landmarks need MediaPipe; without it, attributes measured by them are left out with a warning.
    """

    def __init__(self, network: str | None, workers: int | None, device: torch.device):
        self.network = None if network is None else AgeGenderNetwork.from_file(network).to(device)
        self.landmarks = importlib.util.find_spec("mediapipe") is not None
        if not self.landmarks:
            warnings.warn(f"mediapipe is not installed: no directions for {', '.join(MEASURES)}", stacklevel=2)
        workers = workers or os.cpu_count() or 1
        self._pool = None
        if self.landmarks and workers > 1:
            # Spawned: a fork of a process that runs threads may lock up.
            self._pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))

    @property
    def names(self) -> tuple[str, ...]:
        """Attributes in the order of the columns that `start` yields."""
        return (*(NETWORK_ATTRIBUTES if self.network else ()), *(MEASURES if self.landmarks else ()))

    @torch.no_grad()
    def start(self, images: torch.Tensor) -> Callable[[], Measured]:
        """Begins to measure images [B, 3, S, S] in [-1, 1]; what it returns waits for the result. Rendering may go on
        in the meantime."""
        columns = []
        if self.network is not None:
            columns = [column.float().cpu()[:, None] for column in self.network(images)]
        if not self.landmarks:
            unknown = torch.full((len(images), sum(_COUNTS)), nan).split(_COUNTS, dim=1)
            return lambda: Measured(torch.cat([*columns, torch.empty(len(images), 0)], dim=1), *unknown[1:])
        measured = self._map(_measure_picture, images)

        def wait() -> Measured:
            measures, colours, pose = torch.tensor(list(measured)).float().split(_COUNTS, dim=1)
            return Measured(torch.cat([*columns, measures], dim=1), colours, pose)

        return wait

    def masks(self, images: torch.Tensor) -> torch.Tensor:
        """Where images [B, 3, S, S] in [-1, 1] show skin and background: bool [B, 2, S, S] on the CPU. Skin is that of
        the faces found, which needs MediaPipe."""
        if not self.landmarks:
            background = torch.from_numpy(background_mask(images.shape[-1]))
            return torch.stack([torch.zeros_like(background), background]).expand(len(images), -1, -1, -1)
        return torch.from_numpy(np.stack(list(self._map(_mask_picture, images))))

    def _map(self, function: Callable[[np.ndarray], Any], images: torch.Tensor) -> Iterator[Any]:
        """Of each image as an RGB picture, in the worker processes where there are any."""
        pixels = (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        pictures = list(pixels.permute(0, 2, 3, 1).cpu().numpy())
        return self._pool.map(function, pictures) if self._pool else map(function, pictures)

    def close(self) -> None:
        """Ends the worker processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
