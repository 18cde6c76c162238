"""Face pictures with cameras, in EG3D's data set layout."""

from __future__ import annotations

import io
import json
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError


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
            image = Image.open(io.BytesIO(data), formats=("PNG", "WEBP", "JPEG")).convert("RGB")
        except UnidentifiedImageError:
            raise ValueError(f"{name} in {self.path} is not a readable picture: no PNG, WebP or JPEG file") from None
        # Pillow raises what it meets in a damaged file.
        except Exception as error:
            raise ValueError(f"{name} in {self.path} is not a readable picture: {error}") from error
        if image.size != (self.image_size, self.image_size):
            image = image.resize((self.image_size, self.image_size), Image.Resampling.LANCZOS)
        return np.asarray(image)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        array = self._decode(self.names[index], self.read(self.names[index]))
        return torch.from_numpy(array.copy()).permute(2, 0, 1), self.cameras[index]

    def __getstate__(self) -> dict:
        """Without the open zip, which cannot be sent to a worker process; that one opens it for itself."""
        return {**self.__dict__, "_zip": None}

    @property
    def decoded_bytes(self) -> int:
        """Size of what `load` returns."""
        return len(self) * 3 * self.image_size**2

    def load(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Every picture on `device`, decoded on all cores: uint8 [N, 3, S, S]. No more than a few hundred are held
        besides."""
        images = torch.empty(len(self), 3, self.image_size, self.image_size, dtype=torch.uint8, device=device)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(self), 256):
                names = self.names[start : start + 256]
                arrays = list(pool.map(self._decode, names, [self.read(name) for name in names]))
                images[start : start + 256] = torch.from_numpy(np.stack(arrays)).to(device).permute(0, 3, 1, 2)
        return images


def to_signed(images: torch.Tensor) -> torch.Tensor:
    """uint8 0 … 255 → float32 -1 … 1."""
    return images.float() / 127.5 - 1
