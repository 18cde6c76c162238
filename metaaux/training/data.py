"""Face pictures with cameras, in EG3D's data set layout."""

from __future__ import annotations

import io
import json
import math
import os
import random
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ..faces.cameras import mirror_camera, pose_of_camera


class FaceDataset(torch.utils.data.Dataset):
    """A zip or folder of square RGB pictures beside `dataset.json` = {"labels": [[name, 25 floats], …]}.

    Args:
        path: the zip or folder, or several that are read as one.
        image_size: side in pixels to which pictures of another size are resampled (Lanczos).
        limit: read only the first so many.
        least_sharp: {source: smallest `sharp`}, by the attributes of each picture; softer ones are left out.

    `cameras` is float32 [N, 25], `names` the file names (of several paths they may repeat), `attributes` what
    `attributes.json` says of each picture, {} where there is none. Item i is (uint8 [3, S, S], camera [25]).

    Raises:
        FileNotFoundError: no such path, or no dataset.json in it.
        ValueError: labels that are not 25 numbers, or (when read) a file that is no picture.
    """

    def __init__(
        self,
        path: str | os.PathLike | Sequence[str | os.PathLike],
        image_size: int,
        limit: int | None = None,
        least_sharp: Mapping[str, float] | None = None,
    ):
        parts = [path] if isinstance(path, str | os.PathLike) else list(path)
        self.parts, self.image_size = [Path(part) for part in parts], image_size
        self._zips: dict[Path, tuple[int, zipfile.ZipFile]] = {}
        entries = []
        for part in self.parts:
            labels, attributes = self._labels(part)
            entries += [(part, name, camera, attributes.get(name, {})) for name, camera in labels]
        if least_sharp:
            entries = [e for e in entries if e[3].get("sharp", 0.0) >= least_sharp.get(e[3].get("source"), -math.inf)]
        self.files = [(name, part) for part, name, _, _ in entries[:limit]]
        self.names = [name for name, _ in self.files]
        self.attributes = [attributes for *_, attributes in entries[:limit]]
        self.cameras = torch.tensor([camera for _, _, camera, _ in entries[:limit]], dtype=torch.float32)

    def _labels(self, part: Path) -> tuple[list, dict]:
        """The labels and attributes of one zip or folder."""
        if not part.exists():
            raise FileNotFoundError(f"no data set at {part}; `metaaux prepare` makes one from a folder of photos")
        try:
            labels = json.loads(self.read("dataset.json", part))["labels"]
        except (KeyError, FileNotFoundError) as error:
            raise FileNotFoundError(f"{part} has no dataset.json with labels: no EG3D data set") from error
        if not labels or any(len(camera) != 25 for _, camera in labels):
            raise ValueError(f"{part}/dataset.json must hold one label at least, each of 25 numbers")
        try:
            return labels, json.loads(self.read("attributes.json", part))
        except (KeyError, FileNotFoundError):
            return labels, {}

    def read(self, name: str, part: Path | None = None) -> bytes:
        """The bytes of one file of a zip or folder, the first one unless given."""
        part = part or self.parts[0]
        if part.is_dir():
            return (part / name).read_bytes()
        # A ZipFile shares one file position between its readers; each process opens its own and reads in one thread.
        if part not in self._zips or self._zips[part][0] != os.getpid():
            self._zips[part] = (os.getpid(), zipfile.ZipFile(part))
        return self._zips[part][1].read(name)

    def _decode(self, file: tuple[str, Path], data: bytes) -> np.ndarray:
        try:
            image = Image.open(io.BytesIO(data)).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{file[0]} in {file[1]} is not a readable picture: {error}") from error
        if image.size != (self.image_size, self.image_size):
            image = image.resize((self.image_size, self.image_size), Image.Resampling.LANCZOS)
        return np.asarray(image)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        array = self._decode(self.files[index], self.read(*self.files[index]))
        return torch.from_numpy(array.copy()).permute(2, 0, 1), self.cameras[index]

    def load(self) -> torch.Tensor:
        """Every picture, decoded on all cores: uint8 [N, 3, S, S]."""
        data = [self.read(*file) for file in self.files]
        images = torch.empty(len(self), self.image_size, self.image_size, 3, dtype=torch.uint8)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for i, array in enumerate(pool.map(self._decode, self.files, data)):
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
        repeats: {source: times} by which pictures of a source, as their attributes name it, are shown more often.
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
        repeats: Mapping[str, int] | None = None,
    ):
        self.batch, self.device, self.mirror = batch, torch.device(device), mirror
        self.generator = torch.Generator(self.device).manual_seed(seed)
        times = torch.ones(len(dataset), dtype=torch.long)
        if balance_turned:
            yaw = pose_of_camera(dataset.cameras)[0].abs()
            times[yaw > 12] = 2
            times[yaw > 20] = 4
        if repeats:
            times *= torch.tensor([repeats.get(a.get("source"), 1) for a in dataset.attributes])
        self.order = torch.repeat_interleave(torch.arange(len(dataset)), times).to(self.device)
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
