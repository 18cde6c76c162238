"""Aligning photos: the crop and the camera that a face generator was trained on, for the largest face of a photo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ..cameras import CAMERA_FOCAL, CAMERA_RADIUS, camera_from_pose, project_points
from .canonical import canonical_face
from .detection import DetectedFace, FaceDetector, FaceTooSmallError, NoFaceError, sample_square
from .photos import MAX_PIXELS, Photo, load_photo

# FaceMesh's vertex at the nose base. Mouth and jaw lie below it: they move with the expression, so they count little.
_NOSE_BASE = 2
_LOWER_WEIGHT = 0.15


@dataclass(frozen=True)
class AlignedFace:
    """The largest face of a photo, cropped as the generator expects it.

    Attributes:
        image: RGB crop, size x size.
        camera: [25] float32, the crop's camera, without roll.
        yaw: degrees of the head, positive where the nose points to the picture's right.
        pitch: degrees of the head, positive where it nods down.
        roll: degrees that were taken out of the photo, positive where the head leaned to the picture's right.
        landmarks: [468, 2] float64, FaceMesh's landmarks in pixels of the upright photo, from its top left corner.
        box: left, top, right and bottom of the landmarks, photo pixels.
        faces_found: number of faces in the photo; the largest was taken.
        face_size: longer side of `box`, pixels.
        crop_to_photo: [2, 3] float64, takes a position in the crop (0 to size, pixel centres at halves) to the
            upright photo's pixels: what is needed to paste a reconstruction back.
    """

    image: Image.Image
    camera: torch.Tensor
    yaw: float
    pitch: float
    roll: float
    landmarks: np.ndarray
    box: tuple[float, float, float, float]
    faces_found: int
    face_size: float
    crop_to_photo: np.ndarray


@dataclass(frozen=True)
class _HeadPose:
    """Fit of the canonical face: yaw, pitch and roll in degrees, pixels per world unit, the origin [2] in pixels."""

    yaw: float
    pitch: float
    roll: float
    scale: float
    origin: np.ndarray


class FaceAligner:
    """Turns photos into the crops and cameras of the training data. May be shared between threads.

    Of several faces the largest is taken, by the longer side of its landmarks' box. All aligners of a process share
    MediaPipe's graphs, which are built at the first use; as a context manager, or with `close`, an aligner gives up
    its part in them before it is garbage. Copied and unpickled aligners work as new ones do.

    Args:
        image_size: side of the crops, pixels.
        crop_scale: framing, the size of faces relative to the crops that this project's data holds (1.0). EG3D's
            FFHQ crops show more around the face: about 0.93.
        min_face_size: faces whose box has a longer side below this many pixels are refused.
        max_pixels: photos with more pixels are refused.
        pivot: point [3] that the generator's cameras look at (`cameras.camera_from_pose`), which falls on the middle
            of the crops.

    Raises:
        ValueError: `image_size` or `crop_scale` is not positive.
    """

    def __init__(
        self,
        image_size: int = 128,
        crop_scale: float = 1.0,
        min_face_size: float = 48,
        max_pixels: int = MAX_PIXELS,
        pivot: Sequence[float] = (0.0, 0.0, 0.0),
    ) -> None:
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {image_size}")
        if not crop_scale > 0:
            raise ValueError(f"crop_scale must be positive, got {crop_scale}")
        self.image_size = image_size
        self.crop_scale = crop_scale
        self.min_face_size = min_face_size
        self.max_pixels = max_pixels
        self.pivot = tuple(pivot)
        self._detector = FaceDetector()

    def __enter__(self) -> FaceAligner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives up this aligner's part in MediaPipe's graphs, which are closed once no aligner needs them. It stays
        usable: the next photo opens them again."""
        self._detector.close()

    def align(self, photo: Photo) -> AlignedFace:
        """Crop and camera of the largest face.

        Args:
            photo: a path, image file bytes, a file object, a PIL image or an array, see [`load_photo`].

        Raises:
            UnreadableImageError: the photo cannot be read or has more than `max_pixels` pixels.
            NoFaceError: no face was found.
            FaceTooSmallError: the largest face is smaller than `min_face_size`.
            RuntimeError: this process was forked from one that had used MediaPipe.
        """
        image = load_photo(photo, self.max_pixels)
        faces = self._detector.detect(image)
        if not faces:
            raise NoFaceError(
                f"no face was found in the photo ({image.width} x {image.height} pixels); "
                "use one that shows a face from the front or half from the side, upright and unobstructed"
            )
        face = faces[0]
        if face.size < self.min_face_size:
            raise FaceTooSmallError(
                f"the largest face in the photo is {face.size:.0f} pixels high or wide, at least "
                f"{self.min_face_size:g} are needed; use a photo taken closer or with more pixels"
            )
        pose = _fit_head(face)
        camera = camera_from_pose(pose.yaw, pose.pitch, pivot=self.pivot)
        crop_to_photo = self._crop_to_photo(pose, camera)
        return AlignedFace(
            image=sample_square(image, crop_to_photo, self.image_size),
            camera=camera,
            yaw=pose.yaw,
            pitch=pose.pitch,
            roll=pose.roll,
            landmarks=face.landmarks[:, :2],
            box=face.box,
            faces_found=len(faces),
            face_size=face.size,
            crop_to_photo=crop_to_photo,
        )

    def estimate_pose(self, image: Photo) -> tuple[float, float] | None:
        """Yaw and pitch in degrees of the largest face, of any size; None where no face is found.

        Made for rendered crops, whose cameras it lets verify.

        Raises:
            UnreadableImageError: the image cannot be read or has more than `max_pixels` pixels.
            RuntimeError: this process was forked from one that had used MediaPipe.
        """
        faces = self._detector.detect(load_photo(image, self.max_pixels))
        return head_pose(faces[0]) if faces else None

    def _crop_to_photo(self, pose: _HeadPose, camera: torch.Tensor) -> np.ndarray:
        depth, centre = CAMERA_RADIUS, np.full(2, 0.5)
        if any(self.pivot):
            positions, depths = project_points(torch.zeros(1, 3), camera)
            depth, centre = float(depths), centre + self.crop_scale * (positions[0].double().numpy() - centre)
        side = pose.scale * depth / CAMERA_FOCAL / self.crop_scale
        step = side / self.image_size
        roll = np.radians(pose.roll)
        linear = step * np.array([[np.cos(roll), -np.sin(roll)], [np.sin(roll), np.cos(roll)]])
        # As in the training crops, the origin falls on the centre of pixel (size / 2, size / 2), or as far beside it
        # as the camera sees it beside the pivot.
        centre = self.image_size * centre + 0.5
        return np.column_stack([linear, pose.origin - linear @ centre])


def head_pose(face: DetectedFace) -> tuple[float, float]:
    """Yaw and pitch in degrees of a face, as `FaceAligner` reports them."""
    pose = _fit_head(face)
    return pose.yaw, pose.pitch


def _fit_head(face: DetectedFace) -> _HeadPose:
    """Similarity from the canonical face to a face's landmarks (Umeyama 1991, weighted), with its roll split off."""
    canonical = canonical_face().astype(np.float64)
    # Photo axes are right, down and away; the canonical face's are right, up and toward the camera.
    points = face.landmarks * [1, -1, -1]
    weights = np.where(canonical[:, 1] < canonical[_NOSE_BASE, 1], _LOWER_WEIGHT, 1.0)
    weights /= weights.sum()

    canonical_mean, points_mean = weights @ canonical, weights @ points
    canonical, points = canonical - canonical_mean, points - points_mean
    u, singular, vt = np.linalg.svd((points * weights[:, None]).T @ canonical)
    signs = np.array([1, 1, np.sign(np.linalg.det(u @ vt))])
    rotation = (u * signs) @ vt
    scale = (singular * signs).sum() / (weights @ (canonical**2).sum(1))
    origin = points_mean - scale * rotation @ canonical_mean

    # Roll: the turn in the picture's plane that takes the head's axis out of the vertical.
    roll = np.arctan2(rotation[0, 1], rotation[1, 1])
    upright = np.array([[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1]]) @ rotation
    nose = upright[:, 2]
    return _HeadPose(
        yaw=float(np.degrees(np.arctan2(nose[0], nose[2]))),
        pitch=float(np.degrees(np.arcsin(-nose[1]))),
        roll=float(np.degrees(roll)),
        scale=float(scale),
        origin=origin[:2] * [1, -1],
    )
