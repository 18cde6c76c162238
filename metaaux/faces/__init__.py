"""Faces in photos: finding them, their cameras, and crops as the generator was trained on."""

from __future__ import annotations

from ..cameras import camera_from_pose, mirror_camera, orbit_poses, pose_of_camera, project_points, view_path
from .alignment import AlignedFace, FaceAligner
from .canonical import canonical_face
from .detection import FaceTooSmallError, NoFaceError
from .photos import UnreadableImageError, load_photo

__all__ = [
    "AlignedFace",
    "FaceAligner",
    "FaceTooSmallError",
    "NoFaceError",
    "UnreadableImageError",
    "camera_from_pose",
    "canonical_face",
    "load_photo",
    "mirror_camera",
    "orbit_poses",
    "pose_of_camera",
    "project_points",
    "view_path",
]
