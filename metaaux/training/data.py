"""Face pictures with cameras, in EG3D's data set layout."""

from __future__ import annotations

import io
import json
import os
import random
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ..faces.cameras import mirror_camera, pose_of_camera


class FaceDataset(torch.utils.data.Dataset):
    """A zip or folder of square RGB pictures beside `dataset.json` = {"labels": [[name, 25 floats], …]}.

    Args:
        path: the zip or folder.
        image_size: side in pixels to which pictures of another size are resampled (Lanczos).
        limit: read only the first so many.

    `cameras` is float32 [N, 25], `names` the file names. Item i is (uint8 [3, S, S], camera [25]).

    Raises:
        FileNotFoundError: no such path, or no dataset.json in it.
        ValueError: labels that are not 25 numbers, or (when read) a file that is no picture.
    """

    def __init__(self, path: str | os.PathLike, image_size: int, limit: int | None = None):
        self.path, self.image_size = Path(path), image_size
        if not self.path.exists():
            raise FileNotFoundError(f"no data set at {self.path}; `metaaux prepare` makes one from a folder of photos")
        self._zip = None
        try:
            labels = json.loads(self.read("dataset.json"))["labels"][:limit]
        except (KeyError, FileNotFoundError) as error:
            raise FileNotFoundError(f"{self.path} has no dataset.json with labels: no EG3D data set") from error
        if not labels or any(len(camera) != 25 for _, camera in labels):
            raise ValueError(f"{self.path}/dataset.json must hold one label at least, each of 25 numbers")
        self.names = [name for name, _ in labels]
        self.cameras = torch.tensor([camera for _, camera in labels], dtype=torch.float32)

    def read(self, name: str) -> bytes:
        """The bytes of one file of the data set."""
        if self.path.is_dir():
            return (self.path / name).read_bytes()
        # A ZipFile shares one file position between its readers; each process opens its own and reads in one thread.
        if self._zip is None or self._zip[0] != os.getpid():
            self._zip = (os.getpid(), zipfile.ZipFile(self.path))
        return self._zip[1].read(name)

    def _decode(self, name: str, data: bytes) -> np.ndarray:
        try:
            image = Image.open(io.BytesIO(data)).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{name} in {self.path} is not a readable picture: {error}") from error
        if image.size != (self.image_size, self.image_size):
            image = image.resize((self.image_size, self.image_size), Image.Resampling.LANCZOS)
        return np.asarray(image)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        array = self._decode(self.names[index], self.read(self.names[index]))
        return torch.from_numpy(array.copy()).permute(2, 0, 1), self.cameras[index]

    def load(self) -> torch.Tensor:
        """Every picture, decoded on all cores: uint8 [N, 3, S, S]."""
        data = [self.read(name) for name in self.names]
        images = torch.empty(len(self), self.image_size, self.image_size, 3, dtype=torch.uint8)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for i, array in enumerate(pool.map(self._decode, self.names, data)):
                images[i] = torch.from_numpy(array.copy())
        return images.permute(0, 3, 1, 2).contiguous()


def to_signed(images: torch.Tensor) -> torch.Tensor:
    """uint8 0 … 255 → float32 -1 … 1."""
    return images.float() / 127.5 - 1


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
