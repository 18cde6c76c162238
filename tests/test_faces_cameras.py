from __future__ import annotations

import pytest
import torch

from metaaux.faces import (
    camera_from_pose,
    canonical_face,
    mirror_camera,
    orbit_poses,
    pose_of_camera,
    project_points,
    view_path,
)

# Camera-to-world rows of cameras as labels of data sets state them (rounded to five digits), with yaw and pitch.
LABELS = [
    (
        [0.94774, -0.05458, 0.31435, -0.84875, 0, -0.98526, -0.17107, 0.4619, 0.31906, 0.16213, -0.93376, 2.52116],
        18.86,
        9.33,
    ),
    (
        [0.80264, -0.09245, -0.58925, 1.59099, 0, -0.98791, 0.155, -0.4185, -0.59646, -0.12441, -0.79294, 2.14094],
        -36.95,
        -7.15,
    ),
    (
        [0.99398, 0.04609, -0.09944, 0.26849, 0, -0.90727, -0.42055, 1.13548, -0.1096, 0.41802, -0.9018, 2.43487],
        -6.93,
        24.71,
    ),
]
INTRINSICS = [4.2647, 0, 0.5, 0, 4.2647, 0.5, 0, 0, 1]


@pytest.mark.parametrize(("rows", "yaw", "pitch"), LABELS)
def test_agrees_with_data_set_labels(rows, yaw, pitch):
    label = torch.tensor([*rows, 0, 0, 0, 1, *INTRINSICS])
    found_yaw, found_pitch = pose_of_camera(label)
    assert abs(found_yaw.item() - yaw) < 0.02
    assert abs(found_pitch.item() - pitch) < 0.02
    torch.testing.assert_close(camera_from_pose(found_yaw, found_pitch), label, atol=3e-5, rtol=0)


def test_pose_round_trip_and_shapes():
    yaw = torch.linspace(-80, 80, 9, dtype=torch.float64)[:, None]
    pitch = torch.linspace(-60, 60, 7, dtype=torch.float64)
    camera = camera_from_pose(yaw, pitch)
    assert camera.shape == (9, 7, 25)
    assert camera.dtype == torch.float64
    found_yaw, found_pitch = pose_of_camera(camera)
    torch.testing.assert_close(found_yaw, yaw.expand(9, 7))
    torch.testing.assert_close(found_pitch, pitch.expand(9, 7))
    assert camera_from_pose(10, -5).shape == (25,)
    assert camera_from_pose(10, -5).dtype == torch.float32
    assert camera_from_pose(torch.tensor([10, 20]), 0.0).dtype == torch.float32


def test_cameras_look_at_origin_without_roll():
    matrix = camera_from_pose(torch.tensor([-70.0, 0, 25]), torch.tensor([20.0, -30, 5]), radius=3.1)[:, :16]
    matrix = matrix.view(-1, 4, 4).double()
    rotation, position = matrix[:, :3, :3], matrix[:, :3, 3]
    torch.testing.assert_close(rotation.mT @ rotation, torch.eye(3).double().expand(3, 3, 3), atol=1e-6, rtol=0)
    assert (torch.linalg.det(rotation) > 0).all()
    torch.testing.assert_close(position, -3.1 * rotation[:, :, 2], atol=1e-6, rtol=0)
    assert (rotation[:, 1, 0] == 0).all()
    assert (rotation[:, 1, 1] < 0).all()


def test_signs_of_yaw_and_pitch_in_the_picture():
    face = torch.from_numpy(canonical_face())
    nose, chin, forehead = 4, 152, 10
    frontal, _ = project_points(face, camera_from_pose(0.0, 0.0))
    right, _ = project_points(face, camera_from_pose(25.0, 0.0))
    down, _ = project_points(face, camera_from_pose(0.0, 20.0))
    assert right[nose, 0] > frontal[nose, 0] + 0.1
    assert down[nose, 1] > frontal[nose, 1] + 0.05
    assert frontal[forehead, 1] < frontal[nose, 1] < frontal[chin, 1]


def test_projection_of_origin_and_depth():
    position, depth = project_points(torch.zeros(1, 3), camera_from_pose(torch.tensor([0.0, 30.0]), 10.0))
    torch.testing.assert_close(position, torch.full((2, 1, 2), 0.5))
    torch.testing.assert_close(depth, torch.full((2, 1), 2.7))


def test_mirrored_camera_shows_mirrored_face():
    face = torch.from_numpy(canonical_face())
    camera = camera_from_pose(25.0, -10.0)
    camera[18] = 0.45
    mirrored = mirror_camera(camera)
    yaw, pitch = pose_of_camera(mirrored)
    assert yaw.item() == pytest.approx(-25, abs=1e-4)
    assert pitch.item() == pytest.approx(-10, abs=1e-4)
    before, depth = project_points(face, camera)
    after, depth_mirrored = project_points(face * torch.tensor([-1, 1, 1]), mirrored)
    torch.testing.assert_close(after[:, 0], 1 - before[:, 0])
    torch.testing.assert_close(after[:, 1], before[:, 1])
    torch.testing.assert_close(depth, depth_mirrored)
    torch.testing.assert_close(mirror_camera(mirrored), camera)


def test_gradients_reach_the_angles():
    angles = torch.tensor([12.0, -7.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: camera_from_pose(a[0], a[1]), (angles,))


@pytest.mark.parametrize(("yaw", "pitch"), [(90.0, 0.0), (0.0, -95.0), (float("nan"), 0.0)])
def test_refuses_angles_out_of_range(yaw, pitch):
    with pytest.raises(ValueError, match="between -90 and 90"):
        camera_from_pose(yaw, pitch)


def test_refuses_other_shapes():
    with pytest.raises(ValueError, match="25 numbers"):
        pose_of_camera(torch.zeros(4, 16))
    with pytest.raises(ValueError, match="25 numbers"):
        mirror_camera(torch.zeros(24))


def test_orbit_is_a_closed_even_loop():
    poses = orbit_poses(8, yaw_range=20, pitch_range=6, yaw=5, pitch=-2)
    yaws, pitches = zip(*poses, strict=True)
    assert len(set(poses)) == 8
    assert max(yaws) == pytest.approx(25)
    assert min(yaws) == pytest.approx(-15)
    assert max(pitches) == pytest.approx(4)
    assert sum(yaws) / 8 == pytest.approx(5)
    with pytest.raises(ValueError, match="at least 1"):
        orbit_poses(0)


def test_named_paths_of_a_video():
    assert view_path("ellipse", 8, 20, 5) == orbit_poses(8, 20, 5)
    swing, nod = torch.tensor(view_path("swing", 8, 20, 5)), torch.tensor(view_path("nod", 8, 20, 5))
    torch.testing.assert_close(swing.abs().amax(0), torch.tensor([20.0, 0.0]))
    torch.testing.assert_close(nod.abs().amax(0), torch.tensor([0.0, 5.0]))
    assert view_path([(10, 0), (-5, 3)], frames=7) == [(10.0, 0.0), (-5.0, 3.0)]


@pytest.mark.parametrize(("path", "match"), [("spiral", "one of"), ([], "at least one"), ([(1, 2, 3)], "pairs")])
def test_refuses_other_paths(path, match):
    with pytest.raises(ValueError, match=match):
        view_path(path)


def test_canonical_face_is_symmetric_and_fresh():
    face = canonical_face()
    assert face.shape == (468, 3)
    assert abs(face[10, 1] - face[152, 1] - 0.42) < 1e-3
    assert abs(face[33, 0] + face[263, 0]) < 1e-6
    face[:] = 0
    assert canonical_face().any()
