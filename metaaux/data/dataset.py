"""Face pictures with cameras, in EG3D's data set layout."""

from __future__ import annotations

import io
import json
import math
import os
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ..cameras import camera_from_pose

_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")
# What EG3D puts between the name of a mirrored copy and its suffix.
_MIRRORED = re.compile(r"_mirror(?=\.[^./]+$)")


class FaceDataset(torch.utils.data.Dataset):
    """A zip or folder of square RGB pictures beside `dataset.json` = {"labels": [[name, 25 floats], …]}.

    So are EG3D's own FFHQ and CelebA-HQ, with the pictures in one folder (`img00000000.png`) or in many
    (`00000/img00000000.png`), and mostly with a mirrored copy of each (`img00000000_mirror.png`). As with EG3D's
    reader, labels of pictures that are not there are left out: EG3D publishes labels for all that it ever had.

    Args:
        path: the zip or folder, or several that are read as one.
        image_size: side in pixels to which pictures of another size are resampled (Lanczos).
        limit: read only the first so many.
        least_sharp: {source: smallest `sharp`}, by the attributes of each picture; softer ones are left out.
        mirrored_copies: whether mirrored copies of pictures that are in the set too count as pictures of their own.
        labelled: whether the pictures must have labels. Otherwise those of a set without (no `dataset.json`, or null
            in it, as StyleGAN2's own FFHQ) are taken by their names' order, as seen from the front: 2D generators know
            no cameras.

    Nothing but labels is read before a picture is asked for. `cameras` is float32 [N, 25], `names` the file names (of
    several paths they may repeat), `attributes` what `attributes.json` says of each picture, {} where there is none,
    `left_out` the number of labels that are not used, `limit` apart. Item i is (uint8 [3, S, S], camera [25]).

    Raises:
        FileNotFoundError: no such path, no dataset.json in it, or none of the pictures that it names.
        ValueError: labels that are not 25 numbers, or (when read) a file that is no picture.
    """

    def __init__(
        self,
        path: str | os.PathLike | Sequence[str | os.PathLike],
        image_size: int,
        limit: int | None = None,
        least_sharp: Mapping[str, float] | None = None,
        mirrored_copies: bool = True,
        labelled: bool = True,
    ):
        self.parts = [Path(part) for part in ([path] if isinstance(path, str | os.PathLike) else path)]
        self.image_size = image_size
        self._zips: dict[Path, tuple[int, zipfile.ZipFile]] = {}
        entries, count = [], 0
        for part in self.parts:
            labels, attributes = self._labels(part, labelled)
            count += len(labels)
            labels = self._present(part, labels)
            if not mirrored_copies:
                labels = _without_copies(labels)
            entries += [(part, name, camera, attributes.get(name, {})) for name, camera in labels]
        if least_sharp:
            entries = [e for e in entries if e[3].get("sharp", 0.0) >= least_sharp.get(e[3].get("source"), -math.inf)]
        self.left_out = count - len(entries)
        entries = entries[:limit]
        self.files = [(name, part) for part, name, _, _ in entries]
        self.names = [name for name, _ in self.files]
        self.attributes = [attributes for *_, attributes in entries]
        self.cameras = torch.tensor([camera for _, _, camera, _ in entries], dtype=torch.float32)

    def _labels(self, part: Path, labelled: bool) -> tuple[list[tuple[str, list[float]]], dict[str, dict]]:
        """The labels and attributes of one zip or folder."""
        if not part.exists():
            raise FileNotFoundError(f"no data set at {part}; `metaaux prepare` makes one from a folder of photos")
        try:
            labels = json.loads(self.read("dataset.json", part))["labels"]
        except (KeyError, FileNotFoundError) as error:
            if labelled:
                raise FileNotFoundError(f"{part} has no dataset.json with labels: no EG3D data set") from error
            labels = None
        if labels is None and not labelled:
            frontal = camera_from_pose(0.0, 0.0).tolist()
            pictures = sorted(name for name in self._names(part) if Path(name).suffix.lower() in _SUFFIXES)
            labels = [(name, frontal) for name in pictures]
            if not labels:
                raise FileNotFoundError(f"{part} holds no pictures ({', '.join(_SUFFIXES)})")
        if not labels or any(len(camera) != 25 for _, camera in labels):
            raise ValueError(f"{part}/dataset.json must hold one label at least, each of 25 numbers")
        try:
            return labels, json.loads(self.read("attributes.json", part))
        except (KeyError, FileNotFoundError):
            return labels, {}

    def _present(self, part: Path, labels: list[tuple[str, list[float]]]) -> list[tuple[str, list[float]]]:
        """Those labels whose pictures are there."""
        present = self._names(part)
        missing = [name for name, _ in labels if name not in present]
        if len(missing) == len(labels):
            raise FileNotFoundError(
                f"{part} holds none of the {len(labels)} pictures that its dataset.json names, such as {missing[0]}"
            )
        if missing:
            warnings.warn(
                f"{part}: {len(missing)} of {len(labels)} labels are of pictures that are not there, such as "
                f"{missing[0]}; they are left out",
                stacklevel=3,
            )
        return [(name, camera) for name, camera in labels if name in present]

    def _names(self, part: Path) -> set[str]:
        """All files of a zip or folder, as labels name them."""
        if part.is_dir():
            found = set()
            for folder, _, names in os.walk(part, followlinks=True):
                below = Path(folder).relative_to(part)
                found.update((below / name).as_posix() for name in names)
            return found
        return set(self._zip(part).namelist())

    def read(self, name: str, part: Path | None = None) -> bytes:
        """The bytes of one file of a zip or folder of the data set, of the first one unless given."""
        part = part or self.parts[0]
        if part.is_dir():
            return (part / name).read_bytes()
        return self._zip(part).read(name)

    def _zip(self, part: Path) -> zipfile.ZipFile:
        # A ZipFile shares one file position between its readers; each process opens its own and reads in one thread.
        if part not in self._zips or self._zips[part][0] != os.getpid():
            self._zips[part] = (os.getpid(), zipfile.ZipFile(part))
        return self._zips[part][1]

    def _decode(self, file: tuple[str, Path], data: bytes) -> np.ndarray:
        name, part = file
        try:
            image = Image.open(io.BytesIO(data), formats=("PNG", "WEBP", "JPEG")).convert("RGB")
        except UnidentifiedImageError:
            raise ValueError(f"{name} in {part} is not a readable picture: no PNG, WebP or JPEG file") from None
        # Pillow raises what it meets in a damaged file.
        except Exception as error:
            raise ValueError(f"{name} in {part} is not a readable picture: {error}") from error
        if image.size != (self.image_size, self.image_size):
            image = image.resize((self.image_size, self.image_size), Image.Resampling.LANCZOS)
        return np.asarray(image)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        array = self._decode(self.files[index], self.read(*self.files[index]))
        return torch.from_numpy(array.copy()).permute(2, 0, 1), self.cameras[index]

    def __getstate__(self) -> dict:
        """Without the open zips, which cannot be sent to a worker process; that one opens them for itself."""
        return {**self.__dict__, "_zips": {}}

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
                files = self.files[start : start + 256]
                arrays = list(pool.map(self._decode, files, [self.read(*file) for file in files]))
                images[start : start + 256] = torch.from_numpy(np.stack(arrays)).to(device).permute(0, 3, 1, 2)
        return images


def _without_copies(labels: list[tuple[str, list[float]]]) -> list[tuple[str, list[float]]]:
    """`labels` but for `NAME_mirror.png` where `NAME.png` is there."""
    copies = {name for name, _ in labels if _MIRRORED.search(name)}
    originals = {name for name, _ in labels} - copies
    return [(name, camera) for name, camera in labels if _MIRRORED.sub("", name) not in originals or name in originals]


def to_signed(images: torch.Tensor) -> torch.Tensor:
    """uint8 0 … 255 → float32 -1 … 1."""
    return images.float() / 127.5 - 1
