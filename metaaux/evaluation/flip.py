"""What the flip loss (Eq. 12) does for turned faces: each inverted without and with it, as in the paper's Fig. 6."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..cameras import mirror_camera, pose_of_camera
from ..data.dataset import FaceDataset
from ..export.images import image_to_tensor
from ..faces.photos import Photo
from ..losses import perceptual_distance
from ..pipeline import MetaAuxInverter


@dataclass(frozen=True, eq=False)
class TurnedFace:
    """A photo, its name, and its camera [25] if it is an aligned crop (`None`: it will be aligned)."""

    name: str
    photo: Photo
    camera: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class FlipViews:
    """One inversion of a turned face.

    Attributes:
        same, front, mirrored: the head in the photo's pose, from the front, and turned as far to the other side.
        edited: the mirrored view with the edits, or `None`.
        figures: `mse` of the same view, `perceptual` distance of the same view, `mirrored_perceptual` distance between
            the mirrored view and the mirrored photo, `mirrored_identity`, the cosine of these two's identity vectors.
    """

    same: Image.Image
    front: Image.Image
    mirrored: Image.Image
    edited: Image.Image | None
    figures: dict[str, float]


@dataclass(frozen=True, eq=False)
class FlipComparison:
    """A turned face inverted by Eq. 8 alone (`plain`) and with Eq. 12 (`flip`); yaw in degrees."""

    name: str
    yaw: float
    aligned: Image.Image
    plain: FlipViews
    flip: FlipViews


def most_turned(path: str | os.PathLike, image_size: int, count: int) -> list[TurnedFace]:
    """The `count` faces of an EG3D data set with the largest yaw to either side, the most turned first.

    Raises:
        FileNotFoundError: there is no such data set.
        ValueError: its labels or pictures are damaged.
    """
    data = FaceDataset(path, image_size, mirrored_copies=False)
    yaws = pose_of_camera(data.cameras)[0].abs()
    faces = []
    for index in yaws.argsort(descending=True, stable=True)[:count].tolist():
        pixels, camera = data[index]
        image = Image.fromarray(torch.as_tensor(pixels).permute(1, 2, 0).numpy())
        faces.append(TurnedFace(data.names[index], image, camera))
    return faces


def compare_flip(
    inverter: MetaAuxInverter,
    faces: Sequence[TurnedFace],
    steps: int | None = None,
    edits: Mapping[str, float] | None = None,
    perceptual: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    progress: Callable[[FlipComparison], None] | None = None,
) -> list[FlipComparison]:
    """Inverts each face without and with the flip loss.

    Args:
        inverter: the pipeline.
        faces: turned faces; nothing stops a frontal one, for which the loss does little.
        steps: gradient steps. Default: the checkpoint's.
        edits: shown in the mirrored view; see `MetaAuxInverter.prepare`.
        perceptual: distance [B] of images in [-1, 1] for the figures. Default: the pipeline's own.
        progress: called after each face.

    Raises:
        ValueError: a photo without a usable face, an unknown edit, or a checkpoint whose flip weights are both 0.
    """
    if perceptual is None:
        perceptual = perceptual_distance(inverter.perceptual, inverter.discriminator)
    comparisons = []
    for face in faces:
        inversions = [
            inverter.invert(face.photo, steps=steps, camera=face.camera, flip=flip) for flip in (False, True)
        ]
        yaw, pitch = (float(angle) for angle in pose_of_camera(inversions[0].camera))
        aligned = Image.fromarray(inversions[0].aligned.permute(1, 2, 0).numpy())
        views = []
        for inversion in inversions:
            head = inverter.prepare(inversion)
            same, front, mirrored = inverter.render(head), inverter.render(head, 0, pitch), inverter.render(head, -yaw)
            edited = inverter.render(inversion, -yaw, edits=edits) if edits else None
            figures = _figures(inverter, perceptual, aligned, same, mirrored, inversions[0].camera)
            views.append(FlipViews(same, front, mirrored, edited, figures))
        comparisons.append(FlipComparison(face.name, yaw, aligned, *views))
        if progress is not None:
            progress(comparisons[-1])
    return comparisons


@torch.no_grad()
def _figures(
    inverter: MetaAuxInverter,
    perceptual: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    aligned: Image.Image,
    same: Image.Image,
    mirrored: Image.Image,
    camera: torch.Tensor,
) -> dict[str, float]:
    """`FlipViews.figures` of the views `same` and `mirrored` of a photo `aligned`, seen by `camera` [25]."""
    pictures = (aligned, ImageOps.mirror(aligned), same, mirrored)
    photo, mirrored_photo, same, mirrored = (image_to_tensor(p)[None].to(inverter.device) for p in pictures)
    side = mirror_camera(camera[None]).to(inverter.device)
    identities = [inverter.identity(image, side) for image in (mirrored, mirrored_photo)]
    return {
        "mse": float((same - photo).square().mean()),
        "perceptual": float(perceptual(same, photo)),
        "mirrored_perceptual": float(perceptual(mirrored, mirrored_photo)),
        "mirrored_identity": float(F.cosine_similarity(*identities)),
    }


def flip_results(comparisons: Sequence[FlipComparison]) -> dict:
    """Figures for a JSON file: those of each face, their means, and the change of each mean as a share of it."""
    means = {}
    for kind in ("plain", "flip"):
        figures = [getattr(comparison, kind).figures for comparison in comparisons]
        means[kind] = {name: sum(f[name] for f in figures) / len(figures) for name in figures[0]}
    return {
        "n": len(comparisons),
        "mean": means,
        "change": {name: means["flip"][name] / value - 1 for name, value in means["plain"].items()},
        "faces": [
            {"name": c.name, "yaw": c.yaw, "plain": c.plain.figures, "flip": c.flip.figures} for c in comparisons
        ],
    }


def flip_picture(comparisons: Sequence[FlipComparison]) -> Image.Image:
    """Two lines a face, without and with the flip loss: photo or its mirror image, then the views.

    Raises:
        ValueError: no comparison.
    """
    if not comparisons:
        raise ValueError("a comparison picture needs at least one face")
    width, height = comparisons[0].aligned.size
    titles = ["photo / mirrored", "same view", "front", "mirrored view"]
    if comparisons[0].plain.edited is not None:
        titles.append("edited")
    font = ImageFont.load_default(size=max(10, height // 12))
    line = sum(font.getmetrics()) + 4
    margin = round(max(font.getlength(label) for label in ("Eq. 8", "+ Eq. 12"))) + 8
    picture = Image.new("RGB", (margin + width * len(titles), line + 2 * height * len(comparisons)), "white")
    draw = ImageDraw.Draw(picture)
    for column, title in enumerate(titles):
        draw.text((margin + (column + 0.5) * width, 2), title, fill="black", font=font, anchor="ma")
    top = line
    for comparison in comparisons:
        rows = (("Eq. 8", comparison.aligned, comparison.plain), ("+ Eq. 12", None, comparison.flip))
        for label, photo, views in rows:
            images = [photo or ImageOps.mirror(comparison.aligned), views.same, views.front, views.mirrored]
            draw.text((4, top + height / 2), label, fill="black", font=font, anchor="lm")
            for column, image in enumerate([*images, views.edited][: len(titles)]):
                picture.paste(image, (margin + column * width, top))
            top += height
    return picture


def faces_of(paths: Sequence[Path], image_size: int, most: int) -> list[TurnedFace]:
    """Photos as they are; of data sets (zips, folders with a dataset.json) the `most` most turned faces."""
    faces = []
    for path in paths:
        if path.suffix.lower() == ".zip" or path.is_dir():
            faces += most_turned(path, image_size, most)
        else:
            faces.append(TurnedFace(path.name, path))
    return faces
