"""Endless random batches of faces with cameras."""

from __future__ import annotations

import random

import torch

from ..cameras import mirror_camera, pose_of_camera
from .dataset import FaceDataset, to_signed


class _EndlessSampler(torch.utils.data.Sampler):
    """Indices drawn from `order` with replacement, for ever."""

    def __init__(self, order: list[int], seed: int):
        self.order, self.seed = order, seed

    def __iter__(self):
        choice = random.Random(self.seed).choice
        while True:
            yield choice(self.order)


class FaceSampler:
    """Endless random batches (image [B, 3, S, S] in [-1, 1], camera [B, 25]) on `device`.

    Args:
        dataset: the pictures.
        batch: pictures a batch (of this process).
        device: where the batches go.
        seed: of the order; give each process another.
        mirror: mirror half of them, picture and camera together.
        balance_turned: show those turned beyond 12° twice and beyond 20° four times as often.
        in_memory: keep all decoded pictures on `device` (11,847 of 128² take 0.6 GB); otherwise worker processes
            decode them as they are asked for.
    """

    def __init__(
        self,
        dataset: FaceDataset,
        batch: int,
        device: torch.device | str,
        seed: int = 0,
        mirror: bool = True,
        balance_turned: bool = True,
        in_memory: bool = True,
        workers: int = 8,
    ):
        self.batch, self.device, self.mirror = batch, torch.device(device), mirror
        self.generator = torch.Generator(self.device).manual_seed(seed)
        repeats = torch.ones(len(dataset), dtype=torch.long)
        if balance_turned:
            yaw = pose_of_camera(dataset.cameras)[0].abs()
            repeats[yaw > 12] = 2
            repeats[yaw > 20] = 4
        self.order = torch.repeat_interleave(torch.arange(len(dataset)), repeats).to(self.device)
        self.cameras = dataset.cameras.to(self.device)
        if in_memory:
            self.images, self.loader = dataset.load().to(self.device), None
        else:
            loader = torch.utils.data.DataLoader(
                dataset,
                batch,
                sampler=_EndlessSampler(self.order.tolist(), seed),
                num_workers=workers,
                pin_memory=self.device.type == "cuda",
                persistent_workers=workers > 0,
            )
            self.images, self.loader = None, iter(loader)

    def sample_cameras(self, count: int) -> torch.Tensor:
        """Cameras of random pictures [count, 25], half of them mirrored where pictures are."""
        return self._mirrored(None, self.cameras[self._draw(count)])[1]

    def _draw(self, count: int) -> torch.Tensor:
        return self.order[torch.randint(len(self.order), (count,), generator=self.generator, device=self.device)]

    def _mirrored(self, images, cameras):
        if not self.mirror:
            return images, cameras
        flip = torch.rand(len(cameras), generator=self.generator, device=self.device) < 0.5
        if images is not None:
            images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        return images, torch.where(flip[:, None], mirror_camera(cameras), cameras)

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next batch."""
        if self.loader is None:
            index = self._draw(self.batch)
            images, cameras = self.images[index], self.cameras[index]
        else:
            images, cameras = (t.to(self.device, non_blocking=True) for t in next(self.loader))
        images, cameras = self._mirrored(images, cameras)
        return to_signed(images), cameras
