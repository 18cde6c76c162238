"""Reconstruction: every method inverts every photo; figures, table and comparison picture (Tables 1 and 3, Fig. 4)."""

from __future__ import annotations

import hashlib
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from .. import __version__
from ..baselines import InversionMethod, Reconstruction
from ..cameras import pose_of_camera
from ..devices import device_name
from ..export.images import image_to_tensor, save_image, tensor_to_image
from ..files import source_name, write_json, write_text
from ..models.recogniser import SAME_PERSON
from ..precision import products
from .frechet import FeatureExtractor, FeatureStatistics, frechet_between
from .metrics import ReconstructionMetrics, timed
from .photos import Photo, PhotoSet
from .records import Records
from .report import comparison_picture, table

if TYPE_CHECKING:
    from ..pipeline import MetaAuxInverter

#: Degrees by which heads are turned to either side, to see whether they are still the person, and what their figures'
#: names end in.
TURNS = {20.0: "", 40.0: "_40"}
_TURNED = tuple(f"{name}_turned{suffix}" for suffix in TURNS.values() for name in ("identity", "distance"))
PICTURE_ROWS = 6


def noted_precision(inverter: MetaAuxInverter) -> dict[str, str]:
    """For the settings of an evaluation, which without a named precision are those of before there were any."""
    return {} if inverter.precision is None else {"precision": inverter.precision}


class ReconstructionEvaluation:
    """Runs and resumes an evaluation in a folder.

    In the folder: `settings.json`, `records/` (figures by photo), `reconstructions/METHOD/INDEX.png`, and after
    `summarize` the files `results.json`, `table.md` and `comparison.png`.

    Args:
        inverter: the pipeline whose generator all methods use.
        methods: what is compared.
        photos: the photos.
        metrics: the figures of each photo.
        folder: of the evaluation; made if missing.
        features: network of the Fréchet distance; without it the distance is `None`.
        batch: photos inverted side by side by methods that gain by it.
        timed_photos: how many photos at the start are inverted one by one and timed; `None`: all with a batch of 1,
            otherwise 8. 0 while other processes use the device.
        shard: (number from 1, count): photos whose index modulo the count is number - 1.
        pose: whether the turned views' poses are detected again, which needs MediaPipe.
        progress: whether a bar on stderr shows how far it is.

    Raises:
        ValueError: the folder holds another evaluation, or numbers out of range.
    """

    def __init__(
        self,
        inverter: MetaAuxInverter,
        methods: Sequence[InversionMethod],
        photos: PhotoSet,
        metrics: ReconstructionMetrics,
        folder: Path,
        features: FeatureExtractor | None = None,
        batch: int = 1,
        timed_photos: int | None = None,
        shard: tuple[int, int] = (1, 1),
        pose: bool = False,
        progress: bool = True,
    ):
        if timed_photos is None:
            timed_photos = len(photos) if batch == 1 else 8
        if batch < 1 or timed_photos < 0:
            raise ValueError(f"batch must be at least 1, timed photos at least 0, got {batch} and {timed_photos}")
        self.inverter, self.methods, self.photos, self.metrics = inverter, methods, photos, metrics
        self.folder, self.features, self.batch, self.timed_photos = Path(folder), features, batch, timed_photos
        self.shard, self.pose, self.progress = shard, pose, progress
        self.device = inverter.device
        self.settings = {
            "model": source_name(inverter.name_or_path),
            "weights": weights_digest(inverter),
            "photos": photos.digest,
            "metrics": metrics.names,
            "pose": pose,
            "turns": list(TURNS),
            "methods": {method.name: method.settings() for method in methods},
        } | noted_precision(inverter)
        self.records = Records(folder, self.settings, shard)
        self._warm: set[str] = set()

    def run(self) -> None:
        """Inverts what has not been inverted yet. An interruption loses the photos in work, no others."""
        done = {method.name: self.records.read(method.name) for method in self.methods}
        own = range(self.shard[0] - 1, len(self.photos), self.shard[1])
        total = len(own) * len(self.methods)
        finished = sum(index in done[method.name] for method in self.methods for index in own)
        with (
            self.records.measuring(self.device) as self._threads,
            tqdm(total=total, initial=finished, unit="inversion", disable=not self.progress) as bar,
        ):
            for indices in self._chunks(list(own)):
                missing = [index for index in indices if any(index not in done[m.name] for m in self.methods)]
                photos = self._read(missing, done, bar)
                for method in self.methods:
                    todo = [photo for photo in photos if photo.index not in done[method.name]]
                    bar.set_postfix_str(method.name)
                    for part in self._parts(method, todo):
                        self._invert(method, part)
                        bar.update(len(part))

    def _chunks(self, indices: list[int]) -> list[list[int]]:
        """Photos one by one while they are timed, then as many as a batch."""
        single, rest = indices[: self.timed_photos], indices[self.timed_photos :]
        return [[i] for i in single] + [rest[i : i + self.batch] for i in range(0, len(rest), self.batch)]

    @staticmethod
    def _parts(method: InversionMethod, photos: list[Photo]) -> list[list[Photo]]:
        if not photos:
            return []
        return [photos] if method.batched else [[photo] for photo in photos]

    def _read(self, indices: list[int], done: dict[str, dict], bar: tqdm) -> list[Photo]:
        photos = []
        for index in indices:
            try:
                photo = self.photos[index]
                save_image(tensor_to_image(photo.image), self._picture("input", index))
                photos.append(photo)
            except ValueError as error:
                # A photo that cannot be used counts as a failure of every method.
                for method in self.methods:
                    if index not in done[method.name]:
                        self._record_failure(method, index, str(error))
                        bar.update()
        return photos

    def _invert(self, method: InversionMethod, photos: list[Photo]) -> None:
        image = torch.stack([photo.image for photo in photos]).to(self.device)
        camera = torch.stack([photo.camera for photo in photos]).to(self.device)
        if method.name not in self._warm:
            self._warm.add(method.name)
            try:
                with products(self.inverter.precision, self.device):
                    method.warm_up(image, camera)
            except FloatingPointError:
                pass  # the inversion itself will tell
        try:
            with products(self.inverter.precision, self.device):
                reconstructions, seconds = timed(lambda: method.invert(image, camera), self.device)
        except FloatingPointError as error:
            if len(photos) > 1:  # which of them failed shows one by one
                for photo in photos:
                    self._invert(method, [photo])
                return
            self._record_failure(method, photos[0].index, str(error))
            return
        of_photos = self.metrics.embed(image, camera)
        images = torch.stack([reconstruction.image for reconstruction in reconstructions])
        measured = self.metrics.measure(images, image, camera, of_photos)
        for photo, of_photo, reconstruction, figures in zip(photos, of_photos, reconstructions, measured, strict=True):
            figures |= self._turned(reconstruction, of_photo)
            save_image(tensor_to_image(reconstruction.image), self._picture(method.name, photo.index))
            is_timed = photo.index // self.shard[1] < self.timed_photos
            figures |= {"seconds": seconds if is_timed else None, "tuning_steps": reconstruction.tuning_steps}
            record = {"index": photo.index, "photo": photo.name, "failed": None, **figures}
            self.records.append_later(method.name, record)

    def _record_failure(self, method: InversionMethod, index: int, message: str) -> None:
        print(f"{method.name} failed on {self.photos.names[index]}: {message}", file=sys.stderr)
        self.records.append_later(
            method.name, {"index": index, "photo": self.photos.names[index], "failed": message or "failed"}
        )

    def _turned(self, reconstruction: Reconstruction, of_photo: torch.Tensor) -> dict[str, Any]:
        """Likeness of the turned head with the photo, whose embedding [D] is given, and how far the detected yaws are
        from those asked: the means of both sides."""
        if not self.inverter.has_viewpoints:
            return dict.fromkeys(_TURNED)
        figures: dict[str, Any] = {}
        _, pitch = pose_of_camera(reconstruction.camera[0].cpu())
        yaws = [side * turn for turn in TURNS for side in (-1, 1)]
        cameras = torch.stack([self.inverter.generator.camera_at(yaw, float(pitch)) for yaw in yaws]).to(self.device)
        views = reconstruction.views(cameras)
        likeness = self.metrics.likeness(self.metrics.embed(views, cameras), of_photo[None])
        for index, suffix in enumerate(TURNS.values()):
            sides = slice(2 * index, 2 * index + 2)
            for name, values in likeness.items():
                figures[f"{name}_turned{suffix}"] = values and statistics.fmean(values[sides])
            if self.pose:
                figures["yaw_errors" + suffix] = [
                    self._threads.submit(yaw_error, self.inverter, tensor_to_image(view), yaw)
                    for view, yaw in zip(views[sides], yaws[sides], strict=True)
                ]
        return figures

    def _picture(self, method: str, index: int) -> Path:
        return self.folder / "reconstructions" / method / f"{index:05d}.png"

    def summarize(self) -> dict[str, Any]:
        """Writes `results.json`, `table.md` and `comparison.png` from all records so far; returns the results.

        A method's means are over the photos that it did not fail on; `n` counts all, `failed` those without result.
        """
        return self.records.summarize(self._write_summary, [m.name for m in self.methods], len(self.photos))

    def _write_summary(self) -> dict[str, Any]:
        results: dict[str, Any] = {"methods": {}, "details": {}}
        real: dict[int, torch.Tensor] = {}
        for method in self.methods:
            records = {i: r for i, r in self.records.read(method.name).items() if i < len(self.photos)}
            good = [record for _, record in sorted(records.items()) if record["failed"] is None]
            seconds = [record["seconds"] for record in good if record["seconds"] is not None]
            results["methods"][method.name] = {
                **{key: mean_of(good, key) for key in ("mse", "perceptual", "identity")},
                "frechet": self._frechet(method.name, [record["index"] for record in good], real),
                "seconds": statistics.median(seconds) if seconds else None,
                "failed": len(records) - len(good),
                "n": len(records),
            }
            results["details"][method.name] = {
                **_likeness_figures(good),
                **self._pose_figures(good),
                "timed": len(seconds),
                "tuning_steps": mean_of(good, "tuning_steps"),
                "settings": method.settings(),
            }
        results |= {
            "complete": all(figures["n"] == len(self.photos) for figures in results["methods"].values()),
            "photos": len(self.photos),
            "metrics": self.metrics.names | {"frechet": None if self.features is None else self.features.name},
            "device": device_name(self.device),
            "model": self.settings["model"],
            "fingerprint": self.inverter.fingerprint,
            "preset": self.inverter.preset,
            "versions": {"metaaux": __version__, "torch": torch.__version__},
        }
        write_json(results, self.folder / "results.json")
        write_text(table(results, {method.name: method.label for method in self.methods}), self.folder / "table.md")
        self._write_picture()
        return results

    def _frechet(self, method: str, indices: list[int], real: dict[int, torch.Tensor]) -> float | None:
        """Between the photos and their reconstructions, both as 8-bit images."""
        if self.features is None or len(indices) < 2:
            return None
        fresh = [index for index in indices if index not in real]
        real.update(zip(fresh, self._features_of("input", fresh)))
        a, b = FeatureStatistics(), FeatureStatistics()
        a.add(torch.stack([real[index] for index in indices]))
        b.add(self._features_of(method, indices))
        return frechet_between(a, b)

    def _features_of(self, method: str, indices: list[int], batch: int = 32) -> torch.Tensor:
        parts = []
        for start in range(0, len(indices), batch):
            images = []
            for index in indices[start : start + batch]:
                with Image.open(self._picture(method, index)) as picture:
                    images.append(((image_to_tensor(picture) + 1) * 127.5).round().to(torch.uint8))
            parts.append(self.features(torch.stack(images)).cpu())
        return torch.cat(parts) if parts else torch.empty(0)

    def _pose_figures(self, records: list[dict[str, Any]]) -> dict[str, float | None]:
        if not (self.pose and self.inverter.has_viewpoints):
            return {}
        figures = {}
        for suffix in TURNS.values():
            errors = [error for record in records for error in record["yaw_errors" + suffix]]
            found = [error for error in errors if error is not None]
            figures["pose_error" + suffix] = statistics.fmean(found) if found else None
            figures["pose_detected" + suffix] = len(found) / len(errors) if errors else None
        return figures

    def _write_picture(self) -> None:
        """The first photos that every method has finished: input and reconstructions side by side."""
        finished = [self.records.read(method.name) for method in self.methods]
        names = ["input", *(method.name for method in self.methods)]
        rows = []
        for index in range(len(self.photos)):
            if len(rows) < PICTURE_ROWS and all(
                records.get(index, {"failed": ""})["failed"] is None for records in finished
            ):
                rows.append([self._picture(name, index) for name in names])
        if rows:
            labels = ["Input", *(method.label for method in self.methods)]
            save_image(comparison_picture(rows, labels), self.folder / "comparison.png")


def _likeness_figures(records: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The distance to the photo, the share of photos that are the same person by it, and both likenesses turned."""
    distances = [record["distance"] for record in records if record["distance"] is not None]
    figures = {
        "distance": statistics.fmean(distances) if distances else None,
        "same_person": statistics.fmean(d < SAME_PERSON for d in distances) if distances else None,
    }
    return figures | {name: mean_of(records, name) for name in _TURNED}


def yaw_error(inverter: MetaAuxInverter, view: Image.Image, yaw: float) -> float | None:
    """How many degrees a view's detected yaw is from the one asked; `None` where no face is found."""
    pose = inverter.aligner.estimate_pose(view)
    return None if pose is None else abs(pose[0] - yaw)


def mean_of(records: Sequence[dict[str, Any]], key: str) -> float | None:
    """Mean of a figure over the records that have it; `None` where none has."""
    values = [record[key] for record in records if record[key] is not None]
    return statistics.fmean(values) if values else None


def weights_digest(inverter: MetaAuxInverter) -> str:
    """SHA-256 over the parameters and buffers of all components, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, component in sorted(inverter.components.items()):
        if isinstance(component, torch.nn.Module):
            for key, tensor in sorted(component.state_dict().items()):
                digest.update(f"{name}.{key}".encode())
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
