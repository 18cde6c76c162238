"""EG3D cameras: 25 numbers a view, and the head pose in degrees that each of them shows.

A camera is a flattened 4x4 camera-to-world matrix in OpenCV axes (x right, y down, z forward) followed by flattened
3x3 intrinsics in units of the image side. The head stands upright at the origin and looks along +z; cameras lie on a
sphere around it, have no roll, and look at the origin or at the pivot of a generator that was trained so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

CAMERA_RADIUS = 2.7
CAMERA_FOCAL = 4.2647
#: Names of `view_path`.
PATHS = ("ellipse", "swing", "nod")


def camera_from_pose(
    yaw: float | torch.Tensor,
    pitch: float | torch.Tensor,
    radius: float = CAMERA_RADIUS,
    focal: float = CAMERA_FOCAL,
    pivot: Sequence[float] = (0.0, 0.0, 0.0),
) -> torch.Tensor:
    """Camera that shows the head turned by `yaw` and `pitch`; the inverse of [`pose_of_camera`].

    Seen from the camera (x right, y up, z toward the viewer) the nose points along
    n = (sin yaw cos pitch, -sin pitch, cos yaw cos pitch). Of all cameras this is the one without roll. Toward a
    yaw of 90 degrees with a pitch other than 0 that camera climbs over the head, since without roll a profile shows
    no pitch.

    Args:
        yaw: degrees, -90 < yaw < 90; positive turns the nose to the picture's right. A number or a tensor [...].
        pitch: degrees, -90 < pitch < 90; positive nods down. A number or a tensor [...], broadcast against `yaw`.
        radius: distance of the camera from the origin, world units.
        focal: focal length in units of the image side.
        pivot: point [3] that the camera looks at, world units; EG3D's faces have (0, 0, 0.2).

    Returns:
        Cameras [..., 25], on the device and of the floating dtype of the tensors given (float32 for numbers).

    Raises:
        ValueError: an angle is not finite or lies outside ±90 degrees, or the pivot is outside of the sphere.
    """
    if not math.hypot(*pivot) < radius:
        raise ValueError(f"the pivot {tuple(pivot)} must lie within the cameras' sphere of radius {radius}")
    like = next((angle for angle in (yaw, pitch) if isinstance(angle, torch.Tensor)), None)
    device = "cpu" if like is None else like.device
    dtype = like.dtype if like is not None and like.is_floating_point() else torch.float32
    yaw, pitch = torch.broadcast_tensors(
        torch.as_tensor(yaw, dtype=dtype, device=device), torch.as_tensor(pitch, dtype=dtype, device=device)
    )
    for name, angle in (("yaw", yaw), ("pitch", pitch)):
        if not bool((angle.abs() < 90).all()):
            raise ValueError(f"{name} must lie strictly between -90 and 90 degrees, got {angle.tolist()}")

    yaw, pitch = torch.deg2rad(yaw), torch.deg2rad(pitch)
    # n is the world's z axis in camera axes, hence the third row of the camera-to-world rotation up to the signs of
    # y and z. A camera without roll at azimuth a and elevation e has (-sin a, cos a sin e, -cos a cos e) there.
    n_x, n_y, n_z = yaw.sin() * pitch.cos(), -pitch.sin(), yaw.cos() * pitch.cos()
    sin_a, cos_a = -n_x, torch.hypot(n_y, n_z)
    sin_e, cos_e = -n_y / cos_a, n_z / cos_a
    zero, one = torch.zeros_like(n_x), torch.ones_like(n_x)

    right = torch.stack([cos_a, zero, -sin_a], dim=-1)
    down = torch.stack([sin_a * sin_e, -cos_e, cos_a * sin_e], dim=-1)
    forward = torch.stack([-sin_a * cos_e, -sin_e, -cos_a * cos_e], dim=-1)
    position = -radius * forward
    if any(pivot):
        # Back along the optical axis to the sphere: |pivot - distance·forward| = radius.
        centre = torch.tensor(pivot, dtype=dtype, device=device)
        along = (forward * centre).sum(-1, keepdim=True)
        position = centre - (along + (along.square() - centre.square().sum() + radius**2).sqrt()) * forward
    extrinsics = torch.stack([right, down, forward, position], dim=-1)
    last_row = torch.stack([zero, zero, zero, one], dim=-1)
    intrinsics = torch.tensor([focal, 0, 0.5, 0, focal, 0.5, 0, 0, 1], dtype=dtype, device=device)
    return torch.cat([extrinsics.flatten(-2), last_row, intrinsics.expand(*n_x.shape, 9)], dim=-1)


def pose_of_camera(camera: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Yaw and pitch in degrees of the head as `camera` shows it.

    Args:
        camera: [..., 25].

    Returns:
        yaw [...] (positive: the nose points to the picture's right) and pitch [...] (positive: it nods down).

    Raises:
        ValueError: the last dimension is not 25.
    """
    _check_cameras(camera)
    # The third row of the camera-to-world rotation is the nose's direction in (right, down, forward).
    right, down, forward = camera[..., 8:11].unbind(-1)
    yaw = torch.atan2(right, -forward)
    pitch = torch.atan2(down, torch.hypot(right, forward))
    return torch.rad2deg(yaw), torch.rad2deg(pitch)


def mirror_camera(camera: torch.Tensor) -> torch.Tensor:
    """Camera of the horizontally mirrored image: E' = F·E·F with F = diag(-1, 1, 1, 1); the yaw changes its sign.

    Args:
        camera: [..., 25]. The principal point and the skew are mirrored too.

    Raises:
        ValueError: the last dimension is not 25.
    """
    _check_cameras(camera)
    # Made on the device: a copy from the CPU is what no CUDA graph can hold.
    flip = camera.new_ones(4)
    flip[:1].neg_()
    extrinsics = camera[..., :16].unflatten(-1, (4, 4)) * flip[:, None] * flip
    focal_x, skew, centre_x = camera[..., 16:19].unbind(-1)
    return torch.cat(
        [extrinsics.flatten(-2), torch.stack([focal_x, -skew, 1 - centre_x], dim=-1), camera[..., 19:]], dim=-1
    )


def project_points(points: torch.Tensor, camera: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pinhole projection of world points into `camera`.

    Args:
        points: [M, 3] or [..., M, 3], world units.
        camera: [..., 25].

    Returns:
        positions [..., M, 2] in units of the image side, (0, 0) being the image's top left corner and (1, 1) its
        bottom right one, and depths [..., M] along the optical axis, world units.

    Raises:
        ValueError: the last dimension of `camera` is not 25.
    """
    _check_cameras(camera)
    extrinsics = camera[..., :16].unflatten(-1, (4, 4))
    intrinsics = camera[..., 16:].unflatten(-1, (3, 3))
    local = (points - extrinsics[..., None, :3, 3]) @ extrinsics[..., :3, :3]
    depth = local[..., 2]
    positions = (local / depth[..., None]) @ intrinsics.transpose(-1, -2)
    return positions[..., :2], depth


def orbit_poses(
    frames: int, yaw_range: float = 25.0, pitch_range: float = 10.0, yaw: float = 0.0, pitch: float = 0.0
) -> list[tuple[float, float]]:
    """Poses of a closed loop around the head: an ellipse about (`yaw`, `pitch`) that starts at the middle yaw, the
    head nodding down. The last frame is one step before the first, so that a video of them repeats smoothly.

    Args:
        frames: number of poses, at least 1.
        yaw_range: degrees of yaw to either side of `yaw`.
        pitch_range: degrees of pitch to either side of `pitch`.
        yaw: the loop's middle, degrees.
        pitch: the loop's middle, degrees.

    Returns:
        `frames` pairs of yaw and pitch, degrees, for [`camera_from_pose`].

    Raises:
        ValueError: `frames` is below 1.
    """
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}")
    angles = [2 * math.pi * frame / frames for frame in range(frames)]
    return [(yaw + yaw_range * math.sin(a), pitch + pitch_range * math.cos(a)) for a in angles]


def view_path(
    path: str | Sequence[tuple[float, float]], frames: int = 60, yaw_range: float = 25.0, pitch_range: float = 10.0
) -> list[tuple[float, float]]:
    """Poses of a video around the front of a head.

    Args:
        path: "ellipse" (see [`orbit_poses`]), "swing" (from side to side and back at a pitch of 0), "nod" (up and down
            at a yaw of 0), or the poses themselves, pairs of yaw and pitch.
        frames, yaw_range, pitch_range: as [`orbit_poses`] takes them; unused where `path` holds the poses.

    Returns:
        Pairs of yaw and pitch, degrees.

    Raises:
        ValueError: an unknown or empty path, a pose that is no pair of numbers, or `frames` below 1.
    """
    if isinstance(path, str):
        if path not in PATHS:
            raise ValueError(f"path must be one of {', '.join(PATHS)} or a list of poses, got {path!r:.60}")
        return orbit_poses(frames, 0.0 if path == "nod" else yaw_range, 0.0 if path == "swing" else pitch_range)
    poses = [tuple(float(angle) for angle in pose) for pose in path]
    if not poses or any(len(pose) != 2 for pose in poses):
        raise ValueError("a path of poses needs at least one pair of yaw and pitch, and nothing but pairs")
    return poses


def frontal_shares(cameras: torch.Tensor) -> torch.Tensor:
    """Shares [P] of several photos in the person's latent code; they sum to 1.

    Turned photos count less: a factor of e for each 10 degrees. The encoder is best at frontal faces, so with one of
    them its code is better than the mean; but the mean is better than the code of either of two turned ones.
    """
    yaw, pitch = pose_of_camera(cameras)
    return torch.softmax(-torch.hypot(yaw, pitch) / 10, dim=0)


def _check_cameras(camera: torch.Tensor) -> None:
    if camera.shape[-1] != 25:
        raise ValueError(
            "a camera has 25 numbers in its last dimension (flattened 4x4 camera-to-world, then flattened 3x3 "
            f"intrinsics), got a tensor of shape {tuple(camera.shape)}"
        )
