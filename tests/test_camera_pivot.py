"""The point that a generator's cameras look at, EG3D's `avg_camera_pivot`: from the pickle to views and meshes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from official_pickles import (
    assert_refused,
    official_names,  # noqa: F401 (a fixture)
    snapshot,
    write,
)

from metaaux import MetaAuxInverter
from metaaux.cameras import camera_from_pose, pose_of_camera, project_points
from metaaux.conversion.eg3d import convert_eg3d
from metaaux.export.texture import _camera
from metaaux.faces import FaceAligner, canonical_face
from metaaux.hub.loading import load_component
from metaaux.models.eg3d import EG3DGenerator
from metaaux.models.weights import constructor_arguments

PIVOT = (0.0, 0.0, 0.2)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def inverter(tiny_components):
    """The tiny pipeline with a generator that was trained around EG3D's pivot."""
    generator = EG3DGenerator(**constructor_arguments(tiny_components["generator"], camera_pivot=PIVOT))
    generator.load_state_dict(tiny_components["generator"].state_dict())
    networks = {**tiny_components, "generator": generator.eval().requires_grad_(False)}
    inverter = MetaAuxInverter(**networks)
    inverter.set_progress_bar_config(disable=True)
    return inverter


class TestCameras:
    yaw, pitch = torch.tensor([-60.0, 0.0, 25.0]), torch.tensor([20.0, 0.0, -5.0])

    def test_they_stand_on_the_sphere_and_look_at_the_pivot(self):
        pivot = (0.02, -0.01, 0.2)
        cameras = camera_from_pose(self.yaw, self.pitch, radius=2.7, pivot=pivot)
        torch.testing.assert_close(cameras[:, [3, 7, 11]].norm(dim=1), torch.full((3,), 2.7))
        positions, depths = project_points(torch.tensor([pivot]), cameras)
        torch.testing.assert_close(positions, torch.full((3, 1, 2), 0.5), atol=1e-5, rtol=0)
        assert depths[1].item() == pytest.approx(2.5, abs=1e-3)
        torch.testing.assert_close(torch.stack(pose_of_camera(cameras)), torch.stack([self.yaw, self.pitch]))

    def test_without_a_pivot_nothing_changes(self):
        plain = camera_from_pose(self.yaw, self.pitch)
        assert torch.equal(MetaAuxInverter.from_pretrained().generator.camera_at(self.yaw, self.pitch), plain)
        assert torch.equal(camera_from_pose(self.yaw, self.pitch, pivot=(0, 0, 0)), plain)

    def test_gradients_reach_the_angles(self):
        angles = torch.tensor([12.0, -7.0], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda a: camera_from_pose(a[0], a[1], pivot=PIVOT), (angles,))

    def test_a_pivot_outside(self):
        with pytest.raises(ValueError, match="within the cameras' sphere"):
            camera_from_pose(0.0, 0.0, radius=1.0, pivot=(0.0, 1.0, 0.1))


class TestConversion:
    def test_it_survives(self, tmp_path):
        contents, _ = snapshot(avg_camera_radius=2.6, avg_camera_pivot=[0, 0, 0.2])
        convert_eg3d(write(tmp_path / "model.pkl", contents), tmp_path)
        generator = load_component(EG3DGenerator, tmp_path / "generator")
        assert generator.config.camera_radius == 2.6 and list(generator.config.camera_pivot) == [0, 0, 0.2]
        position = generator.camera_at(30.0, 0.0)[[3, 7, 11]]
        assert position.norm().item() == pytest.approx(2.6)
        assert not torch.allclose(position, camera_from_pose(30.0, 0.0, 2.6)[[3, 7, 11]], atol=0.05)

    @pytest.mark.parametrize("pivot", [[0, 0], "middle", [0, 0, float("nan")]])
    def test_one_that_is_no_point(self, tmp_path, pivot):
        contents, _ = snapshot(avg_camera_pivot=pivot)
        assert_refused(write(tmp_path / "model.pkl", contents), tmp_path, "its avg_camera_pivot is")

    def test_the_full_size_configuration_has_it(self):
        config = json.loads((ROOT / "hub_configs/metaaux-ffhq/generator/config.json").read_text())
        assert (config["camera_radius"], config["camera_pivot"]) == (2.7, [0.0, 0.0, 0.2])


class TestViews:
    def test_a_stated_view_is_the_photos_own(self, inverter, crops):
        camera = inverter.generator.camera_at(20.0, -4.0, focal=4.0)
        inversion = inverter.invert(crops[0], steps=0, camera=camera)
        own = np.array(inverter.render(inversion)).astype(int)
        stated = np.array(inverter.render(inversion, yaw=20, pitch=-4)).astype(int)
        assert np.abs(own - stated).max() <= 1
        plain = dataclasses.replace(inversion, camera=camera_from_pose(20.0, -4.0, focal=4.0))
        assert inverter.render(plain, yaw=20, pitch=-4) == inverter.render(inversion, yaw=20, pitch=-4)

    def test_orbit_and_turntable(self, inverter, tiny_inversion):
        (frame,) = inverter.orbit(tiny_inversion, path=[(30.0, 5.0)])
        head = inverter.prepare(tiny_inversion)
        turned = dataclasses.replace(head, camera=inverter.generator.camera_at(30.0, 5.0))
        assert np.abs(np.array(frame).astype(int) - np.array(inverter.render(turned)).astype(int)).max() <= 1
        assert inverter.turntable(head, yaws=[30], pitches=[5]).picture.tobytes() == frame.tobytes()

    def test_the_views_of_a_mesh(self, inverter, tiny_inversion):
        camera = _camera(inverter.generator, inverter.prepare(tiny_inversion), 45, 10)
        torch.testing.assert_close(camera, inverter.generator.camera_at(45.0, 10.0))
        positions, _ = project_points(torch.tensor([PIVOT]), camera)
        torch.testing.assert_close(positions, torch.full((1, 2), 0.5), atol=1e-5, rtol=0)


class TestAligner:
    def test_crop_and_camera_agree(self, inverter):
        pytest.importorskip("mediapipe")
        assert inverter.aligner.pivot == PIVOT
        for scale in (1.0, 0.9):
            errors = []
            for pivot in ((0.0, 0.0, 0.0), (0.1, 0.0, 0.2)):
                face = FaceAligner(128, crop_scale=scale, pivot=pivot).align(ROOT / "examples" / "grace_hopper.jpg")
                projected, _ = project_points(torch.from_numpy(canonical_face()), face.camera)
                inside = 0.5 + (projected.numpy() - 0.5) * scale
                on_photo = (inside * 128 + 0.5) @ face.crop_to_photo[:, :2].T + face.crop_to_photo[:, 2]
                upper = canonical_face()[:, 1] > 0
                errors.append(np.median(np.linalg.norm(on_photo - face.landmarks, axis=1)[upper]) / face.face_size)
            # A camera that looks beside the face has its crop beside the face.
            assert errors[0] < 0.04 and errors[1] < 0.045
