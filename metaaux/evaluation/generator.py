"""A generator's figures: realism, geometry, pose, consistency between views; and a sheet of samples."""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from .. import __version__
from ..cameras import camera_from_pose, project_points
from ..data.dataset import FaceDataset
from ..devices import device_name
from ..export.images import save_image, tensor_to_image
from ..export.sheets import head_sheet
from ..faces.canonical import canonical_face
from ..files import source_name, write_json
from ..models.eg3d import EG3DGenerator, GeneratorOutput
from .frechet import FeatureExtractor, FeatureStatistics, frechet_between
from .reconstruction import yaw_error
from .threads import face_threads, settled

if TYPE_CHECKING:
    from ..pipeline import MetaAuxInverter

#: FaceMesh's vertices of the nose tip and of the face oval beside the ears (right and left ear).
NOSE_TIP, EAR_SIDES = 4, (234, 454)
#: Canonical vertices in front of this z (world units) belong to the face's front, which all heads have there.
FRONT_Z = 0.06
#: Yaws in degrees at which poses are asked for and detected again.
POSE_YAWS = (-30.0, -15.0, 0.0, 15.0, 30.0)
#: Yaws farther out, whose poses count apart.
WIDE_YAWS = (-40.0, 40.0)
_SHEET_HEADS = 16


@dataclass(frozen=True)
class GeneratorSettings:
    """What `evaluate_generator` draws.

    Attributes:
        samples: random heads for geometry, identity and jitter.
        pose_samples: how many of them are looked at for their pose.
        truncation: truncation ψ of these heads. The Fréchet distance is always that of untruncated samples.
        frechet_samples: images for the Fréchet distance; `None`: as many as the data set has.
        batch: heads a pass.
        seed: of the latent codes.
    """

    samples: int = 500
    pose_samples: int = 200
    truncation: float = 0.7
    frechet_samples: int | None = None
    batch: int = 8
    seed: int = 0

    def __post_init__(self):
        if self.samples < 2 or self.pose_samples < 1 or self.batch < 1:
            raise ValueError(
                f"samples must be at least 2, pose samples and batch at least 1, got {self.samples}, "
                f"{self.pose_samples} and {self.batch}"
            )
        if self.frechet_samples is not None and self.frechet_samples < 2:
            raise ValueError(f"a Fréchet distance needs at least 2 samples, got {self.frechet_samples}")


def frontal_depths(depth: torch.Tensor, points: torch.Tensor, camera: torch.Tensor) -> torch.Tensor:
    """Rendered distances along the rays through points.

    Args:
        depth: rendered distance [B, 1, h, h] at `camera`, world units.
        points: [M, 3], world units.
        camera: [25].

    Returns:
        [B, M], bilinear between pixels.
    """
    positions, _ = project_points(points, camera)
    where = (positions * 2 - 1).expand(len(depth), 1, -1, -1)
    return F.grid_sample(depth, where.to(depth), mode="bilinear", padding_mode="border", align_corners=False)[:, 0, 0]


@torch.no_grad()
def evaluate_generator(
    inverter: MetaAuxInverter,
    out: str | os.PathLike,
    settings: GeneratorSettings = GeneratorSettings(),  # noqa: B008
    data: str | os.PathLike | None = None,
    features: FeatureExtractor | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measures a pipeline's generator; writes `results.json` and `samples.png` into `out` and returns the results.

    Keys:
        frechet: distance between the data's images and samples at the data's cameras; `None` without data, as are:
        frechet_halves: between two random halves of the data's images, below which nothing can be expected; each has
            half as many images, which by itself makes a distance larger. `None` for less than four.
        frechet_blurred: between the data's images and the same under a 3×3 box filter.
        nose_in_front: share of heads whose nose tip is rendered nearer to a frontal camera than both sides of the face
            at the ears (`NOSE_TIP`, `EAR_SIDES`), each where the canonical face has it.
        canonical_depth_error: mean |rendered - canonical| distance from a frontal camera at the 468 canonical
            vertices, world units; canonical_depth_error_front: at those before z = `FRONT_Z`.
        pose_error: mean |asked - detected| yaw in degrees over `POSE_YAWS`; pose_detected: share of these views in
            which the aligner finds a face. pose_error_wide, pose_detected_wide: likewise over `WIDE_YAWS`. `None`
            where MediaPipe is not installed, errors also where no face is found.
        identity_across_views: mean cosine between the identity embeddings of the frontal view and of the others.
        jitter_difference: mean absolute difference of images in [-1, 1] from two renders with other ray jitter.

    Args:
        inverter: its generator is measured, its identity network used.
        out: folder; made if missing.
        settings: what is drawn.
        data, features: EG3D data set and network for the Fréchet distance.
        progress: whether to show a bar on stderr.

    Raises:
        ValueError: data without a feature network or the other way round, data of one image, or a 2D generator.
        FileNotFoundError: no such data.
    """
    if (data is None) != (features is None):
        raise ValueError("the Fréchet distance needs both the data set and a feature network: give --data, --features")
    if not inverter.has_viewpoints:
        raise ValueError("these figures are about heads seen from several sides; this checkpoint's generator is 2D")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    frechet = dict.fromkeys(("frechet", "frechet_halves", "frechet_blurred"))
    if data is not None:
        dataset = FaceDataset(data, inverter.generator.config.image_size)
        frechet = _frechet(inverter.generator, dataset, features, settings, progress)
    figures, ws = _measure_heads(inverter, settings, progress)
    results = {
        **frechet,
        **figures,
        **asdict(settings),
        "frechet_features": None if features is None else features.name,
        "model": source_name(inverter.name_or_path),
        "fingerprint": inverter.fingerprint,
        "device": device_name(inverter.device),
        "versions": {"metaaux": __version__, "torch": torch.__version__},
    }
    write_json(results, out / "results.json")
    save_image(head_sheet(inverter.generator, ws), out / "samples.png")
    return results


def _measure_heads(
    inverter: MetaAuxInverter, settings: GeneratorSettings, progress: bool
) -> tuple[dict[str, float | None], torch.Tensor]:
    """The figures over random heads, and the codes [N, num_ws, w_dim] of the first of them for the sheet."""
    detect = importlib.util.find_spec("mediapipe") is not None
    if not detect:
        print("MediaPipe is not installed: poses are not detected", file=sys.stderr)
    figures, first = _Figures(), []
    with (
        face_threads(inverter.device) as threads,
        tqdm(total=settings.samples, unit="head", disable=not progress) as bar,
    ):
        for start, ws in _random_heads(inverter.generator, settings):
            figures.add_views(inverter, ws, max(settings.pose_samples - start, 0) if detect else 0, threads)
            first.append(ws[: max(_SHEET_HEADS - start, 0)])
            bar.update(len(ws))
        return figures.means(), torch.cat(first)


def _random_heads(generator: EG3DGenerator, settings: GeneratorSettings) -> Iterator[tuple[int, torch.Tensor]]:
    """Codes [B, num_ws, w_dim] of random heads, conditioned on a frontal camera, with the number of the first."""
    random = torch.Generator().manual_seed(settings.seed)
    frontal = generator.camera_at(0.0, 0.0).to(generator.device)
    for start in range(0, settings.samples, settings.batch):
        count = min(settings.batch, settings.samples - start)
        # One head after the other, so that the heads do not depend on the batch.
        z = torch.stack([torch.randn(generator.config.z_dim, generator=random) for _ in range(count)])
        z = z.to(generator.device)
        yield start, generator.mapping(z, frontal.expand(count, -1), truncation_psi=settings.truncation)


class _Figures:
    """Sums over heads."""

    def __init__(self):
        self.values: dict[str, list[float]] = {
            "nose_in_front": [],
            "canonical_depth_error": [],
            "canonical_depth_error_front": [],
            "identity_across_views": [],
            "jitter_difference": [],
        }
        # Numbers, or what a thread will find.
        self.pose_errors: dict[float, list[Any]] = {yaw: [] for yaw in (*POSE_YAWS, *WIDE_YAWS)}

    def add_views(
        self, inverter: MetaAuxInverter, ws: torch.Tensor, most_poses: int, threads: ThreadPoolExecutor
    ) -> None:
        """Takes in heads of codes [B, num_ws, w_dim]; threads detect the poses of the first `most_poses`."""
        generator = inverter.generator
        planes = generator.planes(ws)
        cameras = {yaw: generator.camera_at(yaw, 0.0).to(ws.device).expand(len(ws), -1) for yaw in self.pose_errors}

        def view(yaw: float, jitter: bool = False) -> GeneratorOutput:
            return generator.synthesize(ws, cameras[yaw], planes=planes, jitter=jitter)

        outputs = {yaw: view(yaw) for yaw in POSE_YAWS}
        self._add_geometry(outputs[0.0].depth)
        embeddings = {yaw: inverter.identity(o.image.clamp(-1, 1), cameras[yaw]) for yaw, o in outputs.items()}
        frontal = embeddings.pop(0.0)
        cosines = [F.cosine_similarity(frontal, turned, dim=1) for turned in embeddings.values()]
        self.values["identity_across_views"] += torch.stack(cosines).mean(0).tolist()
        jittered = [view(0.0, jitter=True).image.clamp(-1, 1) for _ in range(2)]
        self.values["jitter_difference"] += (jittered[0] - jittered[1]).abs().flatten(1).mean(1).tolist()
        for yaw, errors in self.pose_errors.items():
            output = outputs[yaw] if yaw in outputs else view(yaw)
            for image in output.image[:most_poses]:
                errors.append(threads.submit(yaw_error, inverter, tensor_to_image(image), yaw))

    def _add_geometry(self, depth: torch.Tensor) -> None:
        points = torch.from_numpy(canonical_face())
        camera = camera_from_pose(0.0, 0.0)
        rendered = frontal_depths(depth.float().cpu(), points, camera)
        canonical = (points - camera[[3, 7, 11]]).norm(dim=1)
        nose, ears = rendered[:, NOSE_TIP], rendered[:, list(EAR_SIDES)]
        self.values["nose_in_front"] += (nose[:, None] < ears).all(dim=1).float().tolist()
        errors = (rendered - canonical).abs()
        self.values["canonical_depth_error"] += errors.mean(1).tolist()
        self.values["canonical_depth_error_front"] += errors[:, points[:, 2] > FRONT_Z].mean(1).tolist()

    def means(self) -> dict[str, float | None]:
        """The results."""
        means = {name: statistics.fmean(values) for name, values in self.values.items()}
        return means | self._poses(POSE_YAWS) | {f"{name}_wide": x for name, x in self._poses(WIDE_YAWS).items()}

    def _poses(self, yaws: Sequence[float]) -> dict[str, float | None]:
        views = settled([error for yaw in yaws for error in self.pose_errors[yaw]])
        found = [error for error in views if error is not None]
        return {
            "pose_error": statistics.fmean(found) if found else None,
            "pose_detected": len(found) / len(views) if views else None,
        }


def _frechet(
    generator: EG3DGenerator,
    dataset: FaceDataset,
    features: FeatureExtractor,
    settings: GeneratorSettings,
    progress: bool,
) -> dict[str, float | None]:
    """Between all images of the data and untruncated samples, conditioned on and seen from cameras of the data; beside
    it the data's own distances."""
    if len(dataset) < 2:
        raise ValueError("the data set holds one image; a Fréchet distance needs at least 2")
    real, blurred, fake = FeatureStatistics(), FeatureStatistics(), FeatureStatistics()
    halves = FeatureStatistics(), FeatureStatistics()
    count = settings.frechet_samples or len(dataset)
    random = torch.Generator().manual_seed(settings.seed + 1)
    with tqdm(total=len(dataset) + count, unit="image", disable=not progress) as bar:
        in_second = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(settings.seed)) % 2 == 1
        for start in range(0, len(dataset), 32):
            images = torch.stack([dataset[index][0] for index in range(start, min(start + 32, len(dataset)))])
            of_images = features(images)
            real.add(of_images)
            blurred.add(features(_blurred(images)))
            second = in_second[start : start + 32].to(of_images.device)
            for half, chosen in zip(halves, (~second, second)):
                if chosen.any():
                    half.add(of_images[chosen])
            bar.update(len(images))
        # Each camera of the data once, then again in another order, for as many samples as asked for.
        order = torch.cat([torch.randperm(len(dataset), generator=random) for _ in range(-(-count // len(dataset)))])
        for start in range(0, count, settings.batch):
            cameras = dataset.cameras[order[start : min(start + settings.batch, count)]].to(generator.device)
            z = torch.randn(len(cameras), generator.config.z_dim, generator=random).to(generator.device)
            images = generator(z, cameras).image.clamp(-1, 1)
            fake.add(features((images * 127.5 + 127.5).round().to(torch.uint8)))
            bar.update(len(images))
    return {
        "frechet": frechet_between(real, fake),
        "frechet_halves": frechet_between(*halves) if min(half.count for half in halves) > 1 else None,
        "frechet_blurred": frechet_between(real, blurred),
    }


def _blurred(images: torch.Tensor) -> torch.Tensor:
    """uint8 images [B, 3, H, W], each pixel the mean of the 3×3 around it."""
    padded = F.pad(images.float(), (1, 1, 1, 1), mode="reflect")
    return F.avg_pool2d(padded, 3, stride=1).round().to(torch.uint8)
