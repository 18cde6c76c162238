"""Photos to a data set: every photo of a folder aligned and written as EG3D's data set zip."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from ..faces.alignment import FaceAligner
from ..faces.photos import MAX_PIXELS
from ..files import atomic_path

_FORMATS = ("webp", "png")
_worker_aligner: FaceAligner | None = None


@dataclass(frozen=True)
class SkippedPhoto:
    """A photo that is not in the data set: its name in the folder, the error's class name and message."""

    name: str
    error: str
    message: str


@dataclass(frozen=True)
class PrepareReport:
    """What [`prepare`] did: numbers of photos, how many were done by earlier runs, and what was skipped and why."""

    photos: int
    written: int
    resumed: int
    several_faces: int
    skipped: list[SkippedPhoto]

    def to_dict(self) -> dict:
        """The report as JSON-compatible values."""
        return asdict(self)


def prepare(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    size: int = 128,
    crop_scale: float = 1.0,
    image_format: str = "webp",
    min_face_size: float = 48,
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
    on_photo: Callable[[int, int], None] | None = None,
    pivot: Sequence[float] = (0.0, 0.0, 0.0),
) -> PrepareReport:
    """Aligns all photos of a folder and its subfolders into an EG3D data set zip.

    The zip holds NN/NNNNN.webp (or png) and `dataset.json` = {"labels": [[name, 25 camera numbers], ...]}, numbered
    in the order of the photos' paths, and `report.json`: the photo, yaw, pitch, face size and number of faces of each
    image, and the photos that were skipped with the reason. Each photo gives its largest face.

    Finished photos are kept in `OUT.zip.partial` until the zip is complete, so a run that was stopped goes on where
    it was when called again with the same settings. A photo that changed meanwhile is done again. The zip itself
    appears only when it is complete, and replaces an older one.

    Args:
        folder: folder with photos. Hidden files and folders are left out; any other file is tried.
        out: the zip to write.
        size: side of the crops, pixels.
        crop_scale: framing, see [`FaceAligner`].
        image_format: "webp" (quality 95) or "png" (lossless).
        min_face_size: photos whose largest face is smaller are skipped, pixels.
        max_pixels: photos with more pixels are skipped.
        workers: processes; all cores by default.
        on_photo: called in this process with (photos finished, photos in all) after each photo.
        pivot: point that the cameras look at, see [`FaceAligner`].

    Raises:
        NotADirectoryError: `folder` is not a folder.
        ValueError: a setting is out of range, the folder holds no file, or no photo of it could be aligned.
    """
    folder, out = Path(folder), Path(out)
    settings = dict(image_size=size, crop_scale=crop_scale, min_face_size=min_face_size, max_pixels=max_pixels)
    settings |= {"pivot": tuple(pivot)} if any(pivot) else {}
    _check(folder, image_format, workers, settings)

    # 1. What there is to do: finished photos lie in a folder beside the zip.
    partial = _partial_folder(out)
    names = _photo_names(folder, exclude={out.resolve(), partial.resolve()})
    if not names:
        raise ValueError(f"'{folder}' holds no photos")
    partial.mkdir(parents=True, exist_ok=True)
    # Entries are named after all that decides their content.
    entries = {name: partial / _entry_key(folder, name, settings, image_format) for name in names}
    missing = {str(folder / name): entry for name, entry in entries.items() if not _result_path(entry).exists()}
    # 2. Align.
    _prepare_photos(missing, settings, image_format, workers, len(names), on_photo)
    # 3. Report and zip.
    results = {name: json.loads(_result_path(entry).read_text(encoding="utf-8")) for name, entry in entries.items()}
    report = _report(folder, results, resumed=len(names) - len(missing))
    _write_zip(out, entries, results, image_format, report)
    shutil.rmtree(partial)
    return report


def _partial_folder(out: Path) -> Path:
    """`OUT.zip.partial`; where the zip's name leaves no room for the ending, its digest stands for the name."""
    name = out.name
    if len(os.fsencode(name)) > 240:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return out.with_name(f"{name}.partial")


def _check(folder: Path, image_format: str, workers: int | None, settings: dict) -> None:
    if not folder.is_dir():
        raise NotADirectoryError(f"'{folder}' is not a folder")
    if image_format not in _FORMATS:
        raise ValueError(f"image_format must be one of {', '.join(_FORMATS)}, got '{image_format}'")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    FaceAligner(**settings)  # raises for what is out of range


def _result_path(entry: Path) -> Path:
    return entry.with_name(f"{entry.name}.json")


def _prepare_photos(
    missing: Mapping[str, Path],
    settings: dict,
    image_format: str,
    workers: int | None,
    photos: int,
    on_photo: Callable[[int, int], None] | None,
) -> None:
    """Align the `missing` of so many `photos`, each into its entry, in worker processes."""
    if not missing:
        return
    finished = photos - len(missing)
    count = min(workers or os.cpu_count() or 1, len(missing))
    # Spawned: a fork of a process that runs threads may lock up.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker, initargs=(settings,))
    try:
        futures = [pool.submit(_prepare_photo, photo, str(entry), image_format) for photo, entry in missing.items()]
        for future in as_completed(futures):
            future.result()
            finished += 1
            if on_photo is not None:
                on_photo(finished, photos)
    finally:
        pool.shutdown(cancel_futures=True)


def _report(folder: Path, results: Mapping[str, dict], resumed: int) -> PrepareReport:
    """Raises ValueError if no photo could be aligned."""
    report = PrepareReport(
        photos=len(results),
        written=sum("camera" in result for result in results.values()),
        resumed=resumed,
        several_faces=sum(result.get("faces_found", 1) > 1 for result in results.values()),
        skipped=[
            SkippedPhoto(name, result["error"], result["message"])
            for name, result in results.items()
            if "error" in result
        ],
    )
    if report.written == 0:
        reasons = "; ".join(f"{photo.name}: {photo.message}" for photo in report.skipped[:3])
        raise ValueError(f"none of the {report.photos} photos in '{folder}' could be aligned, for instance {reasons}")
    return report


def _photo_names(folder: Path, exclude: set[Path]) -> list[str]:
    names = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or not path.is_file() or exclude & {path.resolve(), *path.resolve().parents}:
            continue
        names.append(name.as_posix())
    return names


def _entry_key(folder: Path, name: str, settings: dict, image_format: str) -> str:
    status = (folder / name).stat()
    identity = [name, status.st_size, status.st_mtime_ns, sorted(settings.items()), image_format]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _start_worker(settings: dict) -> None:
    global _worker_aligner
    _worker_aligner = FaceAligner(**settings)


def _prepare_photo(photo: str, entry: str, image_format: str) -> None:
    """Writes ENTRY.webp and then ENTRY.json, or ENTRY.json alone with the error."""
    try:
        face = _worker_aligner.align(photo)
    # The aligner's errors about a photo; any other one is a defect and ends the run.
    except ValueError as error:
        result = {"error": type(error).__name__, "message": str(error)}
    else:
        result = {
            "camera": face.camera.tolist(),
            "yaw": round(face.yaw, 2),
            "pitch": round(face.pitch, 2),
            "face_size": round(face.face_size, 1),
            "faces_found": face.faces_found,
        }
        _write(Path(f"{entry}.{image_format}"), _encoded(face.image, image_format))
    _write(Path(f"{entry}.json"), json.dumps(result).encode())


def _encoded(image: Image.Image, image_format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **({"quality": 95, "method": 6} if image_format == "webp" else {}))
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _write_zip(
    out: Path, entries: Mapping[str, Path], results: Mapping[str, dict], image_format: str, report: PrepareReport
) -> None:
    labels, images = [], {}
    with atomic_path(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, result in results.items():
            if "error" in result:
                continue
            image = f"{len(labels) // 1000:02d}/{len(labels):05d}.{image_format}"
            archive.write(entries[name].with_name(f"{entries[name].name}.{image_format}"), image)
            labels.append([image, result["camera"]])
            images[image] = {"photo": name, **{key: value for key, value in result.items() if key != "camera"}}
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
        archive.writestr("report.json", json.dumps({"images": images, **report.to_dict()}, indent=1))
