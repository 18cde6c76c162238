"""Editing: how much age and gender change by the same edit after different inversions (Table 2)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm

from .. import __version__
from ..baselines import InversionMethod, Reconstruction
from ..devices import device_name
from ..editing import apply_edits
from ..export.images import tensor_to_image
from ..faces.detection import FaceDetector
from ..faces.measures import MEASURES, background_mask, face_measures, mean_colours
from ..files import source_name, write_json, write_text
from ..models.age_gender import AgeGenderNetwork
from ..precision import products
from .photos import PhotoSet
from .reconstruction import mean_of, noted_precision, weights_digest
from .records import Records
from .report import markdown_table

if TYPE_CHECKING:
    from ..pipeline import MetaAuxInverter

#: Magnitudes α of the paper's Table 2.
ALPHAS = (-3, -2, -1, 1, 2, 3)
ATTRIBUTES = ("age", "gender")


class EditingEvaluation:
    """Runs and resumes Table 2 in a folder: `settings.json`, `records/`, then `results.json` and `table.md`.

    Each photo is inverted by each method; its code is moved by α along the checkpoint's directions "age" and "gender"
    and rendered at the photo's camera with the weights that the inversion found; where those are offsets, with the
    directions' `gain`, as the pipeline has it. The change is that of the attribute network's judgement against the
    unedited reconstruction: years of age, and P(male). What an edit should leave alone is recorded beside it: the
    identity, and the mean colour of the background.

    Args:
        inverter: the pipeline; its `directions` must hold "age" and "gender".
        methods: what is compared.
        photos: the photos.
        attributes: the attribute network.
        folder: of the evaluation; made if missing.
        measures: further directions, of those that [`~metaaux.faces.measures.face_measures`] can measure by
            landmarks, such as "smile"; their changes go into the details. Needs MediaPipe.
        shard: (number from 1, count): photos whose index modulo the count is number - 1.
        progress: whether a bar on stderr shows how far it is.

    Raises:
        ValueError: a direction is missing, an unknown measure, or the folder holds another evaluation.
    """

    def __init__(
        self,
        inverter: MetaAuxInverter,
        methods: Sequence[InversionMethod],
        photos: PhotoSet,
        attributes: AgeGenderNetwork,
        folder: Path,
        measures: Sequence[str] = (),
        shard: tuple[int, int] = (1, 1),
        progress: bool = True,
    ):
        unknown = sorted(set(measures) - set(MEASURES))
        if unknown:
            raise ValueError(f"landmarks do not measure {unknown}; they measure {', '.join(MEASURES)}")
        self.inverter, self.methods, self.photos, self.folder = inverter, methods, photos, Path(folder)
        self.attributes = attributes.to(inverter.device)
        self.shard, self.progress = shard, progress
        self.directions = inverter.directions
        self.measures = tuple(measures)
        self.names = (*ATTRIBUTES, *self.measures)
        self.detector = FaceDetector() if self.measures else None
        missing = [name for name in self.names if name not in self.directions]
        if missing:
            raise ValueError(
                f"this checkpoint has no direction for {missing} (it has: {', '.join(self.directions) or 'none'}); "
                "train directions first"
            )
        settings = {
            "evaluation": "editing",
            "model": source_name(inverter.name_or_path),
            "weights": weights_digest(inverter),
            "photos": photos.digest,
            "measures": sorted(self.measures),
            "kept": ["identity", "background"],
            "gains": {name: self.directions[name].gain for name in self.names},
            "methods": {method.name: method.settings() for method in methods},
        } | noted_precision(inverter)
        self.records = Records(folder, settings, shard)

    def run(self) -> None:
        """Edits what has not been edited yet. An interruption loses the photo in work, no others."""
        done = {method.name: self.records.read(method.name) for method in self.methods}
        own = range(self.shard[0] - 1, len(self.photos), self.shard[1])
        total = len(own) * len(self.methods)
        finished = sum(index in done[method.name] for method in self.methods for index in own)
        with (
            self.records.measuring(self.inverter.device) as self._threads,
            tqdm(total=total, initial=finished, unit="photo", disable=not self.progress) as bar,
        ):
            for index in own:
                for method in self.methods:
                    if index not in done[method.name]:
                        bar.set_postfix_str(method.name)
                        self._record(method, index)
                        bar.update()

    def _record(self, method: InversionMethod, index: int) -> None:
        record: dict[str, Any] = {"index": index, "photo": self.photos.names[index], "failed": None}
        try:
            photo = self.photos[index]
            device = self.inverter.device
            with products(self.inverter.precision, device):
                reconstruction = method.invert(photo.image[None].to(device), photo.camera[None].to(device))[0]
            record |= self._edit(reconstruction)
        except (ValueError, FloatingPointError) as error:
            # A photo that cannot be used, or an inversion that diverged.
            print(f"{method.name} failed on {record['photo']}: {error}", file=sys.stderr)
            record["failed"] = str(error) or "failed"
        self.records.append_later(method.name, record)

    @torch.no_grad()
    def _edit(self, reconstruction: Reconstruction) -> dict[str, Any]:
        """For each attribute its value at each α, 0 included, the identity that is left, and how far the channel of
        the background's mean colour that moves most has moved, in [0, 1]."""
        base = reconstruction.image[None]
        cameras, identify = reconstruction.camera.expand(len(ALPHAS), -1), self.inverter.identity
        embedding = identify(base, reconstruction.camera)
        adapted = bool(reconstruction.weight_offsets)
        values: dict[str, dict[str, float | Future[float | None]]] = {}
        identity: dict[str, dict[str, float]] = {}
        background: dict[str, dict[str, float]] = {}
        colour = _background(base)
        for name in self.names:
            codes = [apply_edits(reconstruction.w, self.directions, {name: alpha}, adapted) for alpha in ALPHAS]
            images = reconstruction.views(cameras, torch.cat(codes))
            alike = F.cosine_similarity(embedding, identify(images, cameras), dim=1).tolist()
            moved = [float(np.abs(_background(image[None]) - colour).max()) for image in images]
            amounts = [str(alpha) for alpha in ALPHAS]
            values[name] = dict(zip(["0", *amounts], self._values(name, base) + self._values(name, images)))
            identity[name], background[name] = dict(zip(amounts, alike)), dict(zip(amounts, moved))
        return {"values": values, "identity": identity, "background": background}

    def _values(self, name: str, images: torch.Tensor) -> list[float | Future[float | None]]:
        """Of an attribute in images [B, 3, S, S]; where landmarks are needed those of threads, `None` where they find
        no face."""
        if name in ATTRIBUTES:
            return self.attributes(images)[ATTRIBUTES.index(name)].tolist()
        return [self._threads.submit(self._measure, name, tensor_to_image(image)) for image in images]

    def _measure(self, name: str, picture: Image.Image) -> float | None:
        faces = self.detector.detect(picture)
        return float(face_measures(faces[0].landmarks)[name]) if faces else None

    def summarize(self) -> dict[str, Any]:
        """Writes `results.json` and `table.md` from all records so far; returns the results.

        "methods" holds the mean change for each α; "details" the means of identity with the unedited reconstruction
        and of how far the background's mean colour moved (the channel that moves most, [0, 1]), the share of photos on
        which the attribute rises with every step of α, the changes of what landmarks measure (over the `n` photos on
        which they were found at every α), and `n` and `failed`. "equal_gains", where both "metaaux" and "encoder" were
        run, holds for each direction the `gain` under which its edits would change adapted heads from α = -3 to 3 as
        much as unadapted ones, if strength were proportional to it.
        """
        return self.records.summarize(self._write_summary, [m.name for m in self.methods], len(self.photos))

    def _write_summary(self) -> dict[str, Any]:
        results: dict[str, Any] = {"methods": {}, "details": {}}
        changes: dict[str, dict[str, dict[str, float | None]]] = {}
        for method in self.methods:
            records = {i: r for i, r in self.records.read(method.name).items() if i < len(self.photos)}
            good = [record for record in records.values() if record["failed"] is None]
            curves = {name: _curves(good, name) for name in self.names}
            change = changes[method.name] = {name: _changes(curve) for name, curve in curves.items()}
            results["methods"][method.name] = {name: change[name] for name in ATTRIBUTES}
            results["details"][method.name] = {
                **{
                    kept: {
                        name: {str(a): mean_of([r[kept][name] for r in good], str(a)) for a in ALPHAS}
                        for name in curves
                    }
                    for kept in ("identity", "background")
                },
                "monotone": {
                    name: (curve.diff(dim=1) > 0).all(dim=1).double().mean().item() if len(curve) else None
                    for name, curve in curves.items()
                },
                "measures": {name: {"change": change[name], "n": len(curves[name])} for name in self.measures},
                "n": len(records),
                "failed": len(records) - len(good),
                "settings": method.settings(),
            }
        results |= {
            "complete": all(details["n"] == len(self.photos) for details in results["details"].values()),
            "photos": len(self.photos),
            "device": device_name(self.inverter.device),
            "model": source_name(self.inverter.name_or_path),
            "fingerprint": self.inverter.fingerprint,
            "preset": self.inverter.preset,
            "directions": {
                name: {"scale": self.directions[name].scale, "gain": self.directions[name].gain} for name in self.names
            },
            "versions": {"metaaux": __version__, "torch": torch.__version__},
        }
        if {"metaaux", "encoder"} <= changes.keys():
            results["equal_gains"] = {
                name: _equal_gain(self.directions[name].gain, changes["metaaux"][name], changes["encoder"][name])
                for name in self.names
            }
        write_json(results, self.folder / "results.json")
        write_text(
            editing_table(results, {method.name: method.label for method in self.methods}), self.folder / "table.md"
        )
        return results


def _background(image: torch.Tensor) -> np.ndarray:
    """Its mean colour [3] in [0, 1] in an image [1, 3, S, S]."""
    pixels = np.asarray(tensor_to_image(image[0]))
    return mean_colours(pixels, background_mask(len(pixels))[None])[0]


def _curves(records: Sequence[dict[str, Any]], name: str) -> torch.Tensor:
    """An attribute's values at rising α with 0 in the middle, of the photos that have all: float64 [N, 7]."""
    rows = [[record["values"][name][str(alpha)] for alpha in (*ALPHAS[:3], 0, *ALPHAS[3:])] for record in records]
    return torch.tensor([row for row in rows if None not in row], dtype=torch.float64).reshape(-1, len(ALPHAS) + 1)


def _changes(curves: torch.Tensor) -> dict[str, float | None]:
    """Mean change against α = 0 by α; `None` without photos."""
    if not len(curves):
        return dict.fromkeys(map(str, ALPHAS))
    mean = (curves - curves[:, 3:4]).mean(0)
    return {str(alpha): mean[alpha + 3].item() for alpha in ALPHAS}


def _equal_gain(gain: float, adapted: dict[str, float | None], wanted: dict[str, float | None]) -> float | None:
    """The gain that brings the changes `adapted`, made with `gain`, to the span of `wanted`; `None` if unknown."""
    low, high = str(ALPHAS[0]), str(ALPHAS[-1])
    found, target = (None if change[low] is None else change[high] - change[low] for change in (adapted, wanted))
    return gain * target / found if found and target else None


def editing_table(results: dict[str, Any], labels: dict[str, str]) -> str:
    """The changes in Markdown, in the layout of the paper's Table 2: a row for each attribute and α."""
    rows = []
    for attribute, form in (("age", "{:+.3f}"), ("gender", "{:+.3f}")):
        for alpha in map(str, ALPHAS):
            changes = [figures[attribute][alpha] for figures in results["methods"].values()]
            cells = ["–" if change is None else form.format(change) for change in changes]
            rows.append([f"{attribute} {alpha}", *cells])
    note = (
        f"Model {results['model']}, photos: {results['photos']}, {results['device']}. Change of the predicted age in "
        "years and of the predicted probability of being male, against the unedited reconstruction."
    )
    return markdown_table(["Edit", *(labels[name] for name in results["methods"])], rows) + "\n" + note + "\n"
