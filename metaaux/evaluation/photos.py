"""The photos of an evaluation: crops and cameras of an EG3D data set as they are, or any folder, aligned."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from ..data.dataset import FaceDataset
from ..faces.photos import FORMATS

if TYPE_CHECKING:
    from ..faces.alignment import FaceAligner


@dataclass(frozen=True)
class Photo:
    """One aligned photo: its number and name in the set, uint8 pixels [3, S, S] and camera [25]."""

    index: int
    name: str
    pixels: torch.Tensor
    camera: torch.Tensor

    @property
    def image(self) -> torch.Tensor:
        """[3, S, S] in [-1, 1]."""
        return self.pixels.float() / 127.5 - 1


class PhotoSet:
    """Photos by number, read when they are asked for.

    Attributes:
        names: of the photos, in the order of the data set or of the paths.
        digest: hexadecimal digits that tell one set of photos from another.
        aligned: whether the photos are aligned here, so that some may fail.
    """

    def __init__(self, names: list[str], digest: str, aligned: bool, read: Callable[[int], Photo]):
        self.names, self.digest, self.aligned, self._read = names, digest, aligned, read

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Photo:
        """Photo number `index`.

        Raises:
            ValueError: it cannot be read, or shows no usable face.
        """
        return self._read(index)


def open_photos(
    path: str | os.PathLike,
    image_size: int,
    make_aligner: Callable[[], FaceAligner] | None = None,
    limit: int | None = None,
) -> PhotoSet:
    """The photos of an EG3D data set (zip or folder with `dataset.json`), or of any folder.

    Args:
        path: the zip or folder. Of a data set, EG3D's mirrored copies are left out. Of a folder without
            `dataset.json`, all pictures in it and below are taken that [`~metaaux.faces.photos.load_photo`] reads.
        image_size: side of the crops.
        make_aligner: called at the first photo that needs alignment; the data sets' crops need none.
        limit: take only the first so many.

    Raises:
        FileNotFoundError: no such path, or no picture in the folder.
        ValueError: a data set with damaged labels, or photos that need alignment without an aligner.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there are no photos at {path}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if path.is_dir() and not (path / "dataset.json").is_file():
        return _open_folder(path, image_size, make_aligner, limit)
    if path.is_file() and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is neither a folder nor a zip; put a single photo into a folder")
    dataset = FaceDataset(path, image_size, mirrored_copies=False)
    digest = hashlib.sha256(dataset.read("dataset.json"))
    if dataset.left_out:
        digest.update("\n".join(dataset.names).encode())

    def read(index: int) -> Photo:
        pixels, camera = dataset[index]
        return Photo(index, dataset.names[index], pixels, camera)

    return PhotoSet(dataset.names[:limit], digest.hexdigest(), False, read)


def _open_folder(folder, image_size, make_aligner, limit) -> PhotoSet:
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in suffixes
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not paths:
        raise FileNotFoundError(f"{folder} holds neither dataset.json nor any picture")
    if make_aligner is None:
        raise ValueError(f"the photos of {folder} have to be aligned: an aligner is needed")
    names = [path.relative_to(folder).as_posix() for path in paths]
    digest = hashlib.sha256("".join(f"{name} {path.stat().st_size}\n" for name, path in zip(names, paths)).encode())
    aligner: list[FaceAligner] = []

    def read(index: int) -> Photo:
        if not aligner:
            aligner.append(make_aligner())
        face = aligner[0].align(paths[index])
        if face.image.size != (image_size, image_size):
            raise ValueError(f"the aligner makes crops of {face.image.size}, the generator needs {image_size} pixels")
        pixels = torch.from_numpy(np.array(face.image)).permute(2, 0, 1).contiguous()
        return Photo(index, names[index], pixels, face.camera)

    return PhotoSet(names[:limit], digest.hexdigest(), True, read)
