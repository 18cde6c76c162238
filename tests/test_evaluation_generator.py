"""Figures of a generator: geometry on depth maps that are known, then all of them on a tiny generator."""

from __future__ import annotations

import json
import sys

import pytest
import safetensors.torch
import torch
from PIL import Image

from metaaux.cli import main
from metaaux.evaluation.frechet import load_feature_extractor
from metaaux.evaluation.generator import (
    EAR_SIDES,
    NOSE_TIP,
    GeneratorSettings,
    _blurred,
    _Figures,
    _frechet,
    evaluate_generator,
    frontal_depths,
)
from metaaux.faces import camera_from_pose, canonical_face, project_points
from metaaux.models.perceptual import LPIPS


@pytest.fixture(scope="module")
def squeezenet_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / "squeeze.safetensors"
    safetensors.torch.save_file(LPIPS("squeeze", normalization="folded").state_dict(), path)
    return path


def bump(height, side=64):
    """Depth map of a wall at 2.7 with a bump of that height in its middle."""
    centres = (torch.arange(side) + 0.5) / side - 0.5
    v, u = torch.meshgrid(centres, centres, indexing="ij")
    return (2.7 - height * torch.exp(-(u**2 + v**2) * 40))[None, None]


class TestGeometry:
    def test_vertices(self):
        points = canonical_face()
        left, right = points[list(EAR_SIDES)]
        assert points[:, 2].argmax() == NOSE_TIP or points[NOSE_TIP, 2] > 0.23
        assert left[0] == pytest.approx(-right[0]) and left[2] < 0.05

    def test_depth_is_read_where_the_points_project(self):
        side = 32
        ramp = torch.arange(side, dtype=torch.float32).expand(1, 1, side, side)  # depth = column
        camera = camera_from_pose(0.0, 0.0)
        points = torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.2, 0.1]])
        columns = project_points(points, camera)[0][:, 0] * side - 0.5
        torch.testing.assert_close(frontal_depths(ramp, points, camera)[0], columns)

    @pytest.mark.parametrize(("height", "share"), [(0.3, 1.0), (-0.3, 0.0), (0.0, 0.0)])
    def test_nose_in_front(self, height, share):
        figures = _Figures()
        figures._add_geometry(bump(height))
        assert figures.values["nose_in_front"] == [share]

    def test_depth_error_of_a_wall(self):
        points = torch.from_numpy(canonical_face())
        expected = (2.5 - (points - torch.tensor([0, 0, 2.7])).norm(dim=1)).abs()
        figures = _Figures()
        figures._add_geometry(torch.full((2, 1, 16, 16), 2.5))
        assert figures.values["canonical_depth_error"] == pytest.approx([expected.mean().item()] * 2, rel=1e-5)
        front = expected[points[:, 2] > 0.06].mean().item()
        assert figures.values["canonical_depth_error_front"] == pytest.approx([front] * 2, rel=1e-5)


def test_poses_at_wide_yaws_count_apart():
    figures = _Figures()
    figures.values = {}
    for yaw, errors in figures.pose_errors.items():
        errors += [5.0, None] if abs(yaw) > 30 else [1.0, 3.0]
    poses = {"pose_error": 2.0, "pose_detected": 1.0, "pose_error_wide": 5.0, "pose_detected_wide": 0.5}
    assert figures.means() == poses


def test_box_filter():
    image = torch.zeros(1, 3, 5, 5, dtype=torch.uint8)
    image[:, :, 2, 2] = 90
    expected = torch.zeros_like(image)
    expected[:, :, 1:4, 1:4] = 10
    torch.testing.assert_close(_blurred(image), expected)


class TestEvaluateGenerator:
    def test_results(self, tiny_inverter, face_zip, squeezenet_file, tmp_path):
        settings = GeneratorSettings(samples=3, pose_samples=1, batch=2, frechet_samples=4)
        features = load_feature_extractor(squeezenet_file)
        results = evaluate_generator(tiny_inverter, tmp_path, settings, face_zip, features, progress=False)
        assert results == json.loads((tmp_path / "results.json").read_text())
        assert results["frechet"] > 0 and results["samples"] == 3
        assert 0 < results["frechet_blurred"] < results["frechet"]
        assert 0 <= results["nose_in_front"] <= 1 and results["canonical_depth_error"] > 0
        assert -1 <= results["identity_across_views"] <= 1 and results["jitter_difference"] > 0
        # A tiny generator with random weights shows no face.
        for name in ("", "_wide"):
            assert results[f"pose_detected{name}"] == 0 and results[f"pose_error{name}"] is None
        with Image.open(tmp_path / "samples.png") as sheet:
            assert sheet.width == 2 * 6 * 32 and sheet.height == 2 * 32

    def test_is_deterministic_but_for_jitter_and_batch_changes_nothing(self, tiny_inverter, tmp_path):
        keys = ("nose_in_front", "canonical_depth_error", "identity_across_views")
        found = [
            evaluate_generator(tiny_inverter, tmp_path, GeneratorSettings(4, 1, batch=batch), progress=False)
            for batch in (4, 3)
        ]
        assert found[0]["frechet"] is None
        # The codes are drawn by head, so that heads do not depend on the batch.
        for key in keys:
            assert found[0][key] == pytest.approx(found[1][key], rel=1e-4, abs=1e-6)

    def test_halves_of_the_data(self, tiny_inverter, tmp_path):
        """Two of one face and two of another: either both halves have one of each, or each half one face."""
        random = torch.Generator().manual_seed(0)
        faces = torch.randint(0, 256, (2, 3, 32, 32), generator=random, dtype=torch.uint8)
        dataset = [(faces[index // 2], torch.zeros(25)) for index in range(4)]
        cameras = camera_from_pose(torch.zeros(4), torch.zeros(4))

        class Data(list):
            """A data set's items and cameras."""

        data = Data(dataset)
        data.cameras = cameras
        figures = _frechet(
            tiny_inverter.generator,
            data,
            lambda images: images.float().mean(dim=(2, 3)),
            GeneratorSettings(frechet_samples=4),
            progress=False,
        )
        between = (faces[0].float() - faces[1].float()).mean(dim=(1, 2)).square().sum().item()
        assert figures["frechet_halves"] == pytest.approx(0, abs=1e-6) or figures["frechet_halves"] == pytest.approx(
            between, rel=1e-4
        )

    def test_data_of_one_image(self, tiny_inverter, face_zip, squeezenet_file, tmp_path, monkeypatch):
        monkeypatch.setattr("metaaux.evaluation.generator.FaceDataset", lambda *args: [None])
        with pytest.raises(ValueError, match="at least 2"):
            evaluate_generator(
                tiny_inverter, tmp_path, data=face_zip, features=load_feature_extractor(squeezenet_file)
            )

    def test_data_and_features_belong_together(self, tiny_inverter, face_zip, squeezenet_file, tmp_path):
        with pytest.raises(ValueError, match="--data, --features"):
            evaluate_generator(tiny_inverter, tmp_path, data=face_zip, progress=False)
        with pytest.raises(ValueError, match="--data, --features"):
            evaluate_generator(
                tiny_inverter, tmp_path, features=load_feature_extractor(squeezenet_file), progress=False
            )

    def test_settings(self):
        with pytest.raises(ValueError, match="samples"):
            GeneratorSettings(samples=1)
        with pytest.raises(ValueError, match="Fréchet"):
            GeneratorSettings(frechet_samples=1)

    def test_command(self, tiny_folder, tmp_path, monkeypatch, capsys):
        arguments = [
            "--samples",
            2,
            "--pose-samples",
            1,
            "--model",
            tiny_folder,
            "--device",
            "cpu",
            "--out",
            tmp_path / "out",
        ]
        monkeypatch.setattr(sys, "argv", ["metaaux", "evaluate", "generator", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
        keys = {
            "frechet",
            "frechet_halves",
            "frechet_blurred",
            "nose_in_front",
            "canonical_depth_error",
            "pose_error",
            "pose_detected",
            "pose_error_wide",
            "pose_detected_wide",
            "identity_across_views",
            "jitter_difference",
        }
        assert keys <= json.loads((tmp_path / "out" / "results.json").read_text()).keys()
        assert "nose_in_front" in capsys.readouterr().out
