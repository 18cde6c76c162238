"""Latent directions of a generator: InterFaceGAN's boundaries (Shen et al. 2020) and principal components of w.

Random heads are rendered from the front and measured: age and gender by a network, expressions and shape from
landmarks. For each attribute a linear support vector machine separates the heads that have most of it from those that
have least; the normal of its boundary, freed of the attributes named as its conditions and of the pose, is the
direction. With conditions, it is what they do not explain of the attribute that the boundary separates: most open
mouths smile, and the heads with the most open mouths of all would only tell what a smile is. What each direction
really does is then measured by moving heads along it, which sets its scale and range.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ..cameras import camera_from_pose
from ..export.sheets import grid
from ..faces.measures import MEASURES
from ..files import atomic_path
from ..inversion import generator_fingerprint
from ..models.directions import Direction, LatentDirections
from ..models.eg3d import EG3DGenerator
from ..models.identity import IdentityNetwork
from .attributes import NETWORK_ATTRIBUTES, Attributes

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


@dataclass
class DirectionsConfig:
    """Settings of the search for latent directions.

    Attributes:
        generator: folder of the generator.
        attributes: safetensors of face-api.js' age and gender network; without it these directions are left out.
        identity: folder of an identity network, by which scales are limited; without it they are not.
        samples: random heads.
        truncation: of the samples, 0 to 1.
        max_yaw, max_pitch: degrees to either side from which the pose that the mapping is conditioned on is drawn, so
            that the pose's own direction is known. All heads are rendered from the front.
        resolution: rays a side. Default: the generator's.
        batch, shard: heads rendered, and heads saved, together.
        workers: processes that look for landmarks. Default: one a core; 1 looks in this process.
        extremes: share of the samples, at either end of an attribute, that the boundary separates.
        held_out: share of the samples that accuracies are measured on.
        conditions: for an attribute, those whose effect is taken out of its values (`unexplained`) and whose normals
            are projected out of its own; the pose always is.
        components: number of principal components.
        calibration: heads that are moved along each direction to set its scale.
        min_identity: mean similarity between a head and itself a step of 1 further that scales must keep.
        min_accuracy: directions that separate worse are left out, and the report says so.
        seed: of the samples.
    """

    generator: str
    attributes: str | None = None
    identity: str | None = None
    samples: int = 20_000
    truncation: float = 0.9
    max_yaw: float = 20.0
    max_pitch: float = 12.0
    resolution: int | None = None
    batch: int = 64
    shard: int = 512
    workers: int | None = None
    extremes: float = 0.2
    held_out: float = 0.2
    conditions: dict[str, list[str]] = field(default_factory=dict)
    components: int = 8
    calibration: int = 128
    min_identity: float = 0.75
    min_accuracy: float = 0.7
    seed: int = 0

    #: What decides the samples: a run may only be resumed with the same.
    SAMPLING = ("generator", "attributes", "truncation", "max_yaw", "max_pitch", "resolution", "shard", "seed")

    def __post_init__(self):
        known = (*NETWORK_ATTRIBUTES, *MEASURES)
        named = {*self.conditions, *(name for names in self.conditions.values() for name in names)}
        if unknown := sorted(named - set(known)):
            raise ValueError(f"conditions names {', '.join(unknown)}; the attributes are {', '.join(known)}")
        for name in ("extremes", "held_out"):
            if not 0 < getattr(self, name) <= 0.5:
                raise ValueError(f"{name} must be a share above 0 and at most 0.5, got {getattr(self, name)}")


def train(config: DirectionsConfig, run_folder: str | os.PathLike, resume: bool = False) -> None:
    """Samples, separates and calibrates; writes `latent_directions/` (the component), `directions.json` (all figures,
    those of directions left out too) and `sheets/directions.png` into `run_folder`.

    Samples are kept in `samples/`, `shard` heads a file; an interrupted run goes on after the last whole file.

    Raises:
        ValueError: the folder holds samples and `resume` is not set, or they were made with other settings; or no
            attribute can be measured and no components are asked for.
    """
    accelerator = Accelerator()
    folder = Path(run_folder)
    shards = folder / "samples"
    generator = EG3DGenerator.from_pretrained(config.generator).to(accelerator.device).eval().requires_grad_(False)
    attributes = Attributes(config.attributes, config.workers, accelerator.device)
    try:
        if accelerator.is_main_process:
            _open(shards, config, attributes, resume)
        accelerator.wait_for_everyone()
        _sample(generator, attributes, config, shards, accelerator)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _finish(generator, attributes, config, folder)
        accelerator.wait_for_everyone()
    finally:
        attributes.close()


def _open(shards: Path, config: DirectionsConfig, attributes: Attributes, resume: bool) -> None:
    settings = {name: getattr(config, name) for name in config.SAMPLING} | {"measured": list(attributes.names)}
    path = shards / "settings.json"
    if path.exists():
        if not resume:
            raise ValueError(f"{shards} holds samples of an earlier run; resume it, or name another run folder")
        earlier = json.loads(path.read_text())
        changed = sorted(name for name in settings if earlier.get(name) != settings[name])
        if changed:
            raise ValueError(f"{shards} was made with another {', '.join(changed)}; name another run folder")
        return
    shards.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=2))


@torch.no_grad()
def _sample(generator, attributes, config, shards, accelerator) -> None:
    """Renders and measures what is missing of the samples, each shard from its own seed."""
    count = -(-config.samples // config.shard)
    missing = [
        index
        for index in range(accelerator.process_index, count, accelerator.num_processes)
        if not (shards / f"{index:05d}.safetensors").exists()
    ]
    bar = tqdm(total=len(missing) * config.shard, unit="head", disable=not accelerator.is_main_process)
    for index in missing:
        random = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
        z = torch.randn(config.shard, generator.config.z_dim, generator=random)
        pose = (torch.rand(config.shard, 2, generator=random) * 2 - 1) * torch.tensor(
            [config.max_yaw, config.max_pitch]
        )
        conditions = camera_from_pose(*pose.T).to(accelerator.device)
        ws = generator.mapping(z.to(accelerator.device), conditions, config.truncation)[:, 0]
        pending = []
        for part in ws.split(config.batch):
            pending.append(attributes.start(_frontal(generator, part, config)))
            bar.update(len(part))
        values = torch.cat([wait() for wait in pending])
        tensors = {"w": ws.float().cpu().contiguous(), "pose": pose, "values": values}
        with atomic_path(shards / f"{index:05d}.safetensors") as temporary:
            save_file(tensors, temporary)
    bar.close()


def _frontal(generator, ws, config) -> torch.Tensor:
    camera = camera_from_pose(0.0, 0.0).to(ws.device).expand(len(ws), -1)
    return generator.synthesize(ws, camera, resolution=config.resolution).image


def separate(
    w: np.ndarray, values: np.ndarray, extremes: float, held_out: float, seed: int = 0
) -> tuple[np.ndarray, Callable[[np.ndarray], float]]:
    """The boundary between samples with most and with least of an attribute.

    Args:
        w: [N, w_dim].
        values: the attribute of each, [N]; samples that are not finite are left out.
        extremes: share of the samples at either end that is separated.
        held_out: share of the samples that the boundary is not fitted to.
        seed: of the split.

    Returns:
        The unit normal [w_dim], pointing to more of the attribute, and a function of a normal: the share of held-out
        extreme samples that a boundary with this normal, halfway between the fitted classes, puts on the right side.

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
    labels = values >= high
    # One number for all axes: the shape of W stays as it is.
    unit = w[fit].std(0).mean()
    search = GridSearchCV(LinearSVC(dual="auto", max_iter=20_000), {"C": _SVM_C}, cv=3)
    search.fit((w[fit] - w[fit].mean(0)) / unit, labels[fit])
    normal = search.best_estimator_.coef_[0]

    def accuracy(normal: np.ndarray) -> float:
        along = w @ normal
        threshold = (along[fit][labels[fit]].mean() + along[fit][~labels[fit]].mean()) / 2
        right = (along[test] > threshold) == labels[test]
        # Both classes count alike, whatever their sizes.
        return float((right[labels[test]].mean() + right[~labels[test]].mean()) / 2)

    return normal / np.linalg.norm(normal), accuracy


def unexplained(values: np.ndarray, conditions: np.ndarray) -> np.ndarray:
    """What is left of an attribute [N] after its linear regression on the conditions' values [N, C]; not a number
    where any of these values is none."""
    rest = np.full(len(values), np.nan)
    known = np.isfinite(values) & np.isfinite(conditions).all(1)
    if known.any():
        inputs = np.column_stack([conditions[known], np.ones(known.sum())])
        solution = np.linalg.lstsq(inputs, values[known], rcond=None)[0]
        rest[known] = values[known] - inputs @ solution
    return rest


def project_out(normal: np.ndarray, conditions: Sequence[np.ndarray]) -> np.ndarray:
    """InterFaceGAN's conditional manipulation: the unit vector nearest to `normal` [w_dim] along which no boundary of
    `conditions` is approached.

    Raises:
        ValueError: nothing of the normal is left.
    """
    if len(conditions) == 0:
        return normal
    basis, _ = np.linalg.qr(np.stack(conditions, axis=1))
    rest = normal - basis @ (basis.T @ normal)
    length = np.linalg.norm(rest)
    if length < 1e-3 * np.linalg.norm(normal):
        raise ValueError("the direction lies within the span of its conditions")
    return rest / length


def principal_components(w: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` axes [count, w_dim] along which w [N, w_dim] varies most (GANSpace), and the deviations [count]."""
    if not 0 <= count <= min(w.shape):
        raise ValueError(f"{len(w)} samples of {w.shape[1]} numbers have no {count} principal components")
    _, singular, axes = np.linalg.svd(w - w.mean(0), full_matrices=False)
    # An axis has no sign of its own; this one does not depend on the linear algebra library.
    axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None]
    return axes[:count], singular[:count] / np.sqrt(len(w))


def _pose_normals(w: np.ndarray, pose: np.ndarray) -> list[np.ndarray]:
    """Unit normals of yaw and pitch: of their regression on w. Empty where w does not know the pose."""
    centred, target = w - w.mean(0), pose - pose.mean(0)
    gram = centred.T @ centred
    solution = np.linalg.solve(gram + 1e-3 * np.trace(gram) / len(gram) * np.eye(len(gram)), centred.T @ target)
    explained = 1 - ((target - centred @ solution) ** 2).mean(0) / (target**2).mean(0)
    # What chance alone explains grows with the number of axes.
    chance = 3 * w.shape[1] / len(w)
    return [solution[:, i] / np.linalg.norm(solution[:, i]) for i in range(2) if explained[i] > max(0.05, chance)]


@dataclass(eq=False)
class _Movable:
    """Heads that are moved along directions: their codes w [M, w_dim], and measured values [M, attributes] and
    identity vectors [M, D] (or `None`) at rest; `distance` is the mean one between two samples' codes."""

    generator: EG3DGenerator
    attributes: Attributes
    identity: IdentityNetwork | None
    config: DirectionsConfig
    w: torch.Tensor
    distance: float

    def __post_init__(self):
        self.values, self.vectors = self._look(self.w)

    @torch.no_grad()
    def _look(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        images = torch.cat([_frontal(self.generator, part, self.config) for part in w.split(self.config.batch)])
        vectors = None
        if self.identity is not None:
            parts = images.clamp(-1, 1).split(self.config.batch)
            vectors = torch.cat([self.identity(part) for part in parts])
        return self.attributes.start(images)(), vectors

    def effect(self, column: int, shift: torch.Tensor) -> dict[str, float]:
        """Of adding `shift` [w_dim] to w: mean `change` of the attribute in that column, share of the faces still
        `found`, mean `identity` cosine with the head at rest."""
        values, vectors = self._look(self.w + shift)
        values, before = values[:, column], self.values[:, column]
        entry = {
            "change": float((values - before).nanmean()),
            "found": float((~(values.isnan() & ~before.isnan())).float().mean()),
        }
        if vectors is not None:
            entry["identity"] = float((vectors * self.vectors).sum(1).mean())
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
            if kept < heads.config.min_identity:
                # What is lost grows about linearly at first.
                scale *= (1 - heads.config.min_identity) / (1 - kept)
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


def _load_samples(folder: Path, config: DirectionsConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    count = -(-config.samples // config.shard)
    shards = [load_file(folder / "samples" / f"{index:05d}.safetensors") for index in range(count)]
    return tuple(torch.cat([s[key] for s in shards])[: config.samples].numpy() for key in ("w", "pose", "values"))


def _finish(generator, attributes, config, folder) -> None:
    """From the samples to the component, the report and the sheet."""
    w, pose, values = (array.astype(np.float64) for array in _load_samples(folder, config))
    device = next(generator.parameters()).device
    identity = None
    if config.identity is not None:
        identity = IdentityNetwork.from_pretrained(config.identity).to(device).eval().requires_grad_(False)
    poses = _pose_normals(w, pose) if generator.config.pose_conditioning else []
    report = {
        "config": asdict(config),
        "samples": len(w),
        "pose_normals": len(poses),
        "directions": {},
        "left_out": {},
    }
    found = {}
    for column, name in enumerate(attributes.names):
        try:
            found[name] = separate(w, values[:, column], config.extremes, config.held_out, config.seed)
        except ValueError as error:
            report["left_out"][name] = str(error)

    # Heads to be moved: the last, which have all attributes that are left.
    columns = [attributes.names.index(name) for name in found]
    complete = np.flatnonzero(np.isfinite(values[:, columns]).all(1))[-config.calibration :]
    heads = torch.from_numpy(w[complete]).float().to(device)
    movable = None
    if found:
        # Of independent samples, the mean squared distance is twice the sum of the variances.
        distance = float(np.sqrt(2 * w.var(0).sum()))
        movable = _Movable(generator, attributes, identity, config, heads, distance)
    directions = []
    for name, (normal, accuracy) in tqdm(found.items(), unit="direction"):
        try:
            others = [other for other in config.conditions.get(name, []) if other in found]
            column = attributes.names.index(name)
            figures = {"accuracy_unconditioned": accuracy(normal)}
            if others:
                rest = unexplained(values[:, column], values[:, [attributes.names.index(other) for other in others]])
                normal, accuracy = separate(w, rest, config.extremes, config.held_out, config.seed)
            freed = project_out(normal, [*(found[other][0] for other in others), *poses])
            share = accuracy(freed)
            figures["accuracy"] = share
            report["directions"][name] = figures
            if share < config.min_accuracy:
                raise ValueError(f"it separates only {share:.3f} of held-out samples")
            spread = float(np.nanstd(values[:, column]))
            deviation = float((w @ freed).std())
            figures |= {"spread": spread, "deviation": deviation}
            figures |= _calibrate(movable, name, freed, deviation, spread)
        except ValueError as error:
            report["left_out"][name] = str(error)
            continue
        directions.append(
            Direction(
                name, "interfacegan", torch.from_numpy(freed).float(), figures["scale"], figures["low"],
                figures["high"], share, MEANINGS[name],
            )
        )  # fmt: skip
    axes, deviations = principal_components(w, config.components)
    for number, (axis, deviation) in enumerate(zip(axes, deviations), start=1):
        normal = torch.from_numpy(axis).float()
        directions.append(Direction(f"pc{number}", "principal", normal, float(deviation), -3.0, 3.0, None, ""))
    if not directions:
        raise ValueError("no directions: no attribute could be measured and separated, and components is 0")
    component = LatentDirections.from_directions(directions, generator_fingerprint(generator))
    component.save_pretrained(folder / "latent_directions")
    report["cosines"] = {d.name: [round(float(d.normal @ e.normal), 3) for e in directions] for d in directions}
    with atomic_path(folder / "directions.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2))
    _sheet(generator, component, heads[:2], config, folder)
    for name, reason in report["left_out"].items():
        warnings.warn(f"no direction {name}: {reason}", stacklevel=2)


@torch.no_grad()
def _sheet(generator, component, heads, config, folder) -> None:
    """One line a direction: each head at -2, -1, 0, 1 and 2."""
    rows = []
    for direction in component.as_dict().values():
        moved = [
            head + value * direction.scale * direction.normal.to(head) for head in heads for value in (-2, -1, 0, 1, 2)
        ]
        rows.append(_frontal(generator, torch.stack(moved), config).clamp(-1, 1).cpu())
    (folder / "sheets").mkdir(exist_ok=True)
    with atomic_path(folder / "sheets" / "directions.png") as temporary:
        grid(rows).save(temporary)
