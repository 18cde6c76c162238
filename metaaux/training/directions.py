"""Latent directions of a generator: InterFaceGAN's boundaries (Shen et al. 2020) and principal components of w.

Random heads are rendered from the front and measured: age and gender by a network, expressions and shape from
landmarks. For each attribute a linear support vector machine separates the heads that have most of it from those that
have least; the normal of its boundary, freed of the attributes named as its conditions, of the pose and of what moves
the mean colours of skin and background (`conditions`), is the direction. With conditions, it is what they do not
explain of the attribute that the boundary separates: most open mouths smile, and the heads with the most open mouths
of all would only tell what a smile is. What each direction really does is then measured by moving heads along it,
which sets its scale and range.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator
from tqdm.auto import tqdm

from ..export.sheets import grid
from ..faces.measures import MEASURES, REGIONS
from ..files import atomic_path, write_text
from ..inversion import generator_fingerprint
from ..models.directions import Direction, LatentDirections
from ..models.identity import IdentityNetwork
from ..models.recogniser import FaceRecogniser
from ..tasks import Generator
from .attributes import NETWORK_ATTRIBUTES, Attributes, Measured
from .conditions import colour_sensitivity, held_direction, project_out, unexplained
from .distributed import check_shared_folder, on_main_process, start_processes
from .head_samples import Samples, SamplingSettings, frontal_cameras, frontal_views
from .loading import check_packages, load_generator, load_identity
from .settings import Settings, Share

MEANINGS = {
    "age": "older",
    "gender": "more masculine",
    "smile": "smiles more",
    "mouth_open": "opens the mouth",
    "eyes_open": "opens the eyes",
    "face_width": "wider face",
}
# Deviations of the samples along a direction from whose effect its scale is estimated.
_PROBES = (-2.0, -1.0, 1.0, 2.0)
# Amounts, in steps of the scale, at which the effect is measured then.
_AMOUNTS = (-3.0, -2.0, -1.0, 1.0, 2.0, 3.0)
# A step goes no further than so many deviations, so that three stay among the heads that the generator was trained
# for. Along directions in which heads hardly vary, this share of the mean distance between two heads is safe too.
_LARGEST_SCALE, _LARGEST_SHARE = 1.25, 1 / 12
# Regularisation of the support vector machine, for w divided by its overall deviation; chosen by cross-validation.
_SVM_C = (1e-5, 1e-4, 1e-3, 1e-2)


class BoundarySettings(Settings):
    """How attributes are separated."""

    extremes: Annotated[float, Field(gt=0, le=0.5)] = 0.2
    """Share of the samples, at either end of an attribute, that the boundary separates."""
    held_out: Annotated[float, Field(gt=0, le=0.5)] = 0.2
    """Share of the samples that accuracies are measured on."""
    conditions: dict[str, list[str]] = {}
    """For an attribute, those whose effect is taken out of its values (`unexplained`) and whose normals are projected
    out of its own; the pose always is."""
    max_colour_change: PositiveFloat | None = 0.01
    """Root mean square by which the mean colours of skin and background may move, of [0, 1], in a step of one
    deviation of the samples along a direction (`conditions.held_direction`); they are conditions of every
    attribute's values then, too. Null: whatever comes."""
    min_accuracy: Share = 0.7
    """Directions that separate worse are left out, and the report says so."""

    @field_validator("conditions")
    @classmethod
    def _known_attributes(cls, conditions: dict[str, list[str]]) -> dict[str, list[str]]:
        known = (*NETWORK_ATTRIBUTES, *MEASURES)
        named = {*conditions, *(name for names in conditions.values() for name in names)}
        if unknown := sorted(named - set(known)):
            raise ValueError(f"conditions names {', '.join(unknown)}; the attributes are {', '.join(known)}")
        return conditions


class CalibrationSettings(Settings):
    """How scales and ranges are measured."""

    heads: PositiveInt = 128
    """Heads that are moved along each direction."""
    min_identity: Share = 0.75
    """Mean similarity between a head and itself a step of 1 further that scales must keep."""


class DirectionsConfig(Settings):
    """Settings of the search for latent directions."""

    generator: str
    """Folder of the generator."""
    attributes: str | None = None
    """Safetensors of face-api.js' age and gender network; without it these directions are left out."""
    identity: str | None = None
    """Folder of an identity network, by which scales are limited; without it they are not."""
    sampling: SamplingSettings = SamplingSettings()
    """Random heads."""
    boundaries: BoundarySettings = BoundarySettings()
    """Attributes."""
    components: NonNegativeInt = 8
    """Number of principal components."""
    calibration: CalibrationSettings = CalibrationSettings()
    """Scales."""
    timeout_minutes: PositiveFloat = 240
    """How long processes that have rendered their heads wait for others."""


def train(config: DirectionsConfig, run_folder: str | os.PathLike, resume: bool = False) -> None:
    """Samples, separates and calibrates; writes `latent_directions/` (the component), `directions.json` (all figures,
    those of directions left out too) and `sheets/directions.png` into `run_folder`.

    Samples are kept in `samples/`, `shard` heads a file; an interrupted run goes on after the last whole file. All
    processes render heads and must see the folder; what comes then is done by the main process, while the others are
    free to end.

    Raises:
        FileExistsError: the folder holds samples and `resume` is not set.
        ValueError: they were made with other settings; no attribute can be measured and no components are asked for;
            a package is missing; or the processes do not see the same folder.
    """
    check_packages(["sklearn"])
    accelerator = start_processes(config.timeout_minutes)
    folder = Path(run_folder)
    check_shared_folder(accelerator, folder)
    generator = load_generator(config.generator).to(accelerator.device)
    attributes = Attributes(config.attributes, config.sampling.workers, accelerator.device)
    samples = Samples(folder / "samples", generator, attributes, config.sampling)
    sources = {"generator": config.generator, "attributes": config.attributes}
    try:
        on_main_process(accelerator, functools.partial(samples.open, sources, resume))
        samples.render(accelerator)
        accelerator.wait_for_everyone()
        # No process waits for this in a collective, however long it takes.
        if accelerator.is_main_process:
            _finish(samples, config, folder)
    finally:
        attributes.close()


@dataclass(frozen=True)
class Boundary:
    """A boundary between samples with most and with least of an attribute.

    Attributes:
        normal: unit vector [w_dim], pointing to more of the attribute.
        fitted: codes of the samples that it was fitted to, [F, w_dim]; fitted_most: which have most of it.
        held_out: codes of others, [H, w_dim]; held_out_most: likewise.
    """

    normal: np.ndarray
    fitted: np.ndarray
    fitted_most: np.ndarray
    held_out: np.ndarray
    held_out_most: np.ndarray

    def accuracy(self, normal: np.ndarray) -> float:
        """Share of the held-out samples that a boundary with this normal [w_dim], halfway between the fitted classes,
        puts on the right side; both classes count alike, whatever their sizes."""
        along = self.fitted @ normal
        threshold = (along[self.fitted_most].mean() + along[~self.fitted_most].mean()) / 2
        right = (self.held_out @ normal > threshold) == self.held_out_most
        return float((right[self.held_out_most].mean() + right[~self.held_out_most].mean()) / 2)


def separate(w: np.ndarray, values: np.ndarray, extremes: float, held_out: float, seed: int = 0) -> Boundary:
    """The boundary between samples with most and with least of an attribute.

    Args:
        w: [N, w_dim].
        values: the attribute of each, [N]; samples that are not finite are left out.
        extremes: share of the samples at either end that is separated.
        held_out: share of the samples that the boundary is not fitted to.
        seed: of the split.

    Raises:
        ValueError: too few samples have a value, or all have the same.
    """
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import LinearSVC

    finite = np.isfinite(values)
    w, values = w[finite], values[finite]
    order = np.random.default_rng(seed).permutation(len(w))
    test, fit = np.split(order, [int(held_out * len(w))])
    if len(fit) * extremes < 10 or len(test) * extremes < 5:
        raise ValueError(f"{len(w)} samples with a value are too few for a boundary between their extremes")
    low, high = np.quantile(values[fit], [extremes, 1 - extremes])
    if not low < high:
        raise ValueError(f"the attribute hardly varies: a quantile of {extremes:g} and its opposite are both {low:g}")
    fit, test = (part[(values[part] <= low) | (values[part] >= high)] for part in (fit, test))
    most = values >= high
    # One number for all axes: the shape of W stays as it is.
    unit = w[fit].std(0).mean()
    search = GridSearchCV(LinearSVC(dual="auto", max_iter=20_000), {"C": _SVM_C}, cv=3)
    search.fit((w[fit] - w[fit].mean(0)) / unit, most[fit])
    normal = search.best_estimator_.coef_[0]
    return Boundary(normal / np.linalg.norm(normal), w[fit], most[fit], w[test], most[test])


def principal_components(w: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` axes [count, w_dim] along which w [N, w_dim] varies most (GANSpace), and the deviations [count]."""
    if not 0 <= count <= min(w.shape):
        raise ValueError(f"{len(w)} samples of {w.shape[1]} numbers have no {count} principal components")
    _, singular, axes = np.linalg.svd(w - w.mean(0), full_matrices=False)
    # An axis has no sign of its own; this one does not depend on the linear algebra library.
    axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None]
    return axes[:count], singular[:count] / np.sqrt(len(w))


def regression_normals(w: np.ndarray, values: np.ndarray) -> list[np.ndarray]:
    """Unit vectors [w_dim] along which w [N, w_dim] explains each column of `values` [N, C] best, by linear
    regression; without those of columns that w hardly explains. Samples that are not finite are left out."""
    known = np.isfinite(values).all(1)
    if not known.any():
        return []
    w, values = w[known], values[known]
    centred, target = w - w.mean(0), values - values.mean(0)
    gram = centred.T @ centred
    solution = np.linalg.solve(gram + 1e-3 * np.trace(gram) / len(gram) * np.eye(len(gram)), centred.T @ target)
    # What chance alone explains grows with the number of axes.
    least = max(0.05, 3 * w.shape[1] / len(w))
    explained = ((target - centred @ solution) ** 2).mean(0) < (1 - least) * (target**2).mean(0)
    return [column / np.linalg.norm(column) for column in solution.T[explained]]


@dataclass(eq=False)
class _Movable:
    """Heads that are moved along directions: their codes w [M, w_dim], and at rest what is measured of them and
    identity vectors [M, D] (or `None`); `distance` is the mean one between two samples' codes."""

    generator: Generator
    attributes: Attributes
    identity: IdentityNetwork | FaceRecogniser | None
    config: DirectionsConfig
    w: torch.Tensor
    distance: float

    def __post_init__(self):
        self.measured, self.vectors = self._look(self.w)

    @torch.no_grad()
    def _look(self, w: torch.Tensor) -> tuple[Measured, torch.Tensor | None]:
        batch, resolution = self.config.sampling.batch, self.config.sampling.resolution
        images = torch.cat([frontal_views(self.generator, part, resolution) for part in w.split(batch)])
        vectors = None
        if self.identity is not None:
            parts = images.clamp(-1, 1).split(batch)
            vectors = torch.cat([self.identity(part, frontal_cameras(self.generator, len(part))) for part in parts])
        return self.attributes.start(images)(), vectors

    def effect(self, column: int, shift: torch.Tensor) -> dict[str, float]:
        """Of adding `shift` [w_dim] to w: mean `change` of the attribute in that column, share of the faces still
        `found`, how far the mean colours of `skin` and `background` move where they are seen (the channel that moves
        most, mean of the heads), mean `identity` cosine with the head at rest."""
        measured, vectors = self._look(self.w + shift)
        values, before = measured.values[:, column], self.measured.values[:, column]
        moved = (measured.colours - self.measured.colours).abs().unflatten(1, (len(REGIONS), 3)).amax(2)
        entry = {
            "change": float((values - before).nanmean()),
            "found": float((~(values.isnan() & ~before.isnan())).float().mean()),
        } | {
            name: float(region.nanmean())
            for name, region in zip(REGIONS, moved.T, strict=True)
            if region.isfinite().any()
        }
        if vectors is not None:
            entry["identity"] = float(F.cosine_similarity(vectors, self.vectors, dim=1).mean())
        return entry


def _calibrate(heads: _Movable, name: str, normal: np.ndarray, deviation: float, spread: float) -> dict:
    """Scale and range of a direction, from what steps along its normal do to heads.

    A step of 1 shall change the attribute by `spread`, its deviation among the samples, unless that goes too far (see
    `_LARGEST_SCALE`) or changes the identity too much. The range ends where the attribute turns back or faces are
    lost.

    Raises:
        ValueError: the heads do not change as the attribute says.
    """
    column = heads.attributes.names.index(name)
    normal = torch.from_numpy(normal).to(heads.w)
    probes = {step: heads.effect(column, step * deviation * normal)["change"] for step in _PROBES}
    slope = sum(step * change for step, change in probes.items()) / sum(step**2 for step in probes)
    if not slope > 0:
        raise ValueError(f"heads moved along it do not get more of it ({slope:.3g} a deviation)")
    for step, sign in ((1.0, "more"), (-1.0, "less")):
        if not probes[step] * step > 0:
            raise ValueError(f"heads moved by a deviation toward {sign} of it change by {probes[step]:.3g} instead")
    scale = min(spread / slope * deviation, max(_LARGEST_SCALE * deviation, _LARGEST_SHARE * heads.distance))
    if heads.identity is not None:
        for sign in (-1, 1):
            kept = heads.effect(column, sign * scale * normal)["identity"]
            if kept < heads.config.calibration.min_identity:
                # What is lost grows about linearly at first.
                scale *= (1 - heads.config.calibration.min_identity) / (1 - kept)
    effects = {amount: heads.effect(column, amount * scale * normal) for amount in _AMOUNTS}
    limits = {}
    for sign in (-1, 1):
        reached, last = 0.0, 0.0
        for amount in sorted(a * sign for a in effects if a * sign > 0):
            entry = effects[sign * amount]
            if entry["change"] * sign <= last or entry["found"] < 0.95:
                break
            reached, last = amount, entry["change"] * sign
        limits[sign] = sign * max(1.0, reached)
    effects = [{"amount": amount, **entry} for amount, entry in effects.items()]
    return {"scale": scale, "low": limits[-1], "high": limits[1], "slope": slope, "effects": effects}


class _Search:
    """From the samples to directions: one method a step, with what the steps share.

    Attributes:
        w, values: of the samples, [N, w_dim] and [N, attributes].
        poses: unit normals of the pose.
        colours: mean colours of skin and background, [N, 6], or of the background alone, [N, 3], or [N, 0].
        sensitivity: how they answer to w, `None` where they may.
        found: the boundary of each attribute that has one.
        report: figures of each direction, and why others are left out.
    """

    def __init__(self, samples: Samples, config: DirectionsConfig):
        self.samples, self.config = samples, config
        self.names = samples.attributes.names
        self.w, pose, self.values, colours = samples.load()
        # Of heads without a face nobody knows the skin.
        self.colours = colours[:, np.isfinite(colours).any(0)]
        # The code of a 3D generator knows the pose that it was conditioned on, that of a 2D one the picture's.
        knows_pose = not samples.generator.has_viewpoints or samples.generator.config.pose_conditioning
        self.poses = regression_normals(self.w, pose) if knows_pose else []
        self.report = {
            "config": config.model_dump(mode="json"),
            "samples": len(self.w),
            "pose_normals": len(self.poses),
            "directions": {},
            "left_out": {},
        }
        self.found: dict[str, Boundary] = {}
        for column, name in enumerate(self.names):
            try:
                self.found[name] = self._separate(self.values[:, column])
            except ValueError as error:
                self.report["left_out"][name] = str(error)
        # Heads to be moved: the last, which have all attributes that are left.
        columns = [self.names.index(name) for name in self.found]
        complete = np.flatnonzero(np.isfinite(self.values[:, columns]).all(1))[-config.calibration.heads :]
        self.heads = torch.from_numpy(self.w[complete]).float().to(samples.generator.device)
        self.sensitivity = None

    def _separate(self, values: np.ndarray) -> Boundary:
        settings = self.config.boundaries
        return separate(self.w, values, settings.extremes, settings.held_out, self.config.sampling.seed)

    def attributes(self) -> list[Direction]:
        """A direction for each attribute that can be separated, and that heads follow."""
        if not self.found:
            return []
        identity = None
        if self.config.identity is not None:
            identity = load_identity(self.config.identity).to(self.heads.device)
        # Of independent samples, the mean squared distance is twice the sum of the variances.
        distance = float(np.sqrt(2 * self.w.var(0).sum()))
        samples, resolution = self.samples, self.config.sampling.resolution
        if self.config.boundaries.max_colour_change is not None:
            self.sensitivity = colour_sensitivity(samples.generator, samples.attributes, self.heads, resolution)
        movable = _Movable(samples.generator, samples.attributes, identity, self.config, self.heads, distance)
        directions = []
        for name in tqdm(self.found, unit="direction"):
            try:
                directions.append(self._attribute(name, movable))
            except ValueError as error:
                self.report["left_out"][name] = str(error)
        return directions

    def _attribute(self, name: str, movable: _Movable) -> Direction:
        """Raises ValueError if it separates too badly, or heads do not follow it."""
        boundary, settings = self.found[name], self.config.boundaries
        others = [other for other in settings.conditions.get(name, []) if other in self.found]
        values = self.values[:, self.names.index(name)]
        figures = {"accuracy_unconditioned": boundary.accuracy(boundary.normal)}
        conditions = self.values[:, [self.names.index(other) for other in others]]
        if self.sensitivity is not None:
            conditions = np.column_stack([conditions, self.colours])
        if conditions.shape[1]:
            boundary = self._separate(unexplained(values, conditions))
        normals = [*(self.found[other].normal for other in others), *self.poses]
        freed = project_out(boundary.normal, normals)
        if self.sensitivity is not None:
            figures["accuracy_unheld"] = boundary.accuracy(freed)
            freed = held_direction(freed, normals, self.sensitivity, self.w, settings.max_colour_change)
        figures["accuracy"] = share = boundary.accuracy(freed)
        self.report["directions"][name] = figures
        if share < settings.min_accuracy:
            raise ValueError(f"it separates only {share:.3f} of held-out samples")
        figures["spread"] = spread = float(np.nanstd(values))
        figures["deviation"] = deviation = float((self.w @ freed).std())
        figures |= _calibrate(movable, name, freed, deviation, spread)
        return Direction(
            name,
            "interfacegan",
            torch.from_numpy(freed).float(),
            figures["scale"],
            figures["low"],
            figures["high"],
            share,
            MEANINGS[name],
        )

    def components(self) -> list[Direction]:
        """Principal components of w."""
        axes, deviations = principal_components(self.w, self.config.components)
        return [
            Direction(
                f"pc{number}", "principal", torch.from_numpy(axis).float(), float(deviation), -3.0, 3.0, None, ""
            )
            for number, (axis, deviation) in enumerate(zip(axes, deviations), start=1)
        ]


def _finish(samples: Samples, config: DirectionsConfig, folder: Path) -> None:
    """From the samples to the component, the report and the sheet."""
    search = _Search(samples, config)
    directions = search.attributes() + search.components()
    if not directions:
        raise ValueError("no directions: no attribute could be measured and separated, and components is 0")
    component = LatentDirections.from_directions(directions, generator_fingerprint(samples.generator))
    component.save_pretrained(folder / "latent_directions")
    report = search.report
    report["cosines"] = {d.name: [round(float(d.normal @ e.normal), 3) for e in directions] for d in directions}
    write_text(json.dumps(report, indent=2) + "\n", folder / "directions.json")
    (folder / "sheets").mkdir(exist_ok=True)
    with atomic_path(folder / "sheets" / "directions.png") as temporary:
        _sheet(samples.generator, component, search.heads[:2], config.sampling.resolution).save(temporary)
    for name, reason in report["left_out"].items():
        warnings.warn(f"no direction {name}: {reason}", stacklevel=2)


@torch.no_grad()
def _sheet(
    generator: Generator, component: LatentDirections, heads: torch.Tensor, resolution: int | None
) -> Image.Image:
    """One line a direction: each of `heads` [N, w_dim] at -2, -1, 0, 1 and 2."""
    rows = []
    for direction in component.as_dict().values():
        moved = [
            head + value * direction.scale * direction.normal.to(head) for head in heads for value in (-2, -1, 0, 1, 2)
        ]
        rows.append(frontal_views(generator, torch.stack(moved), resolution).clamp(-1, 1).cpu())
    return grid(rows)
