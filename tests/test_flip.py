"""The flip loss in `invert` (Eq. 12), and the comparison of inversions without and with it."""

from __future__ import annotations

import json
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import IMAGE_SIZE
from PIL import Image, ImageOps

from metaaux import MetaAuxInverter
from metaaux.cli import main
from metaaux.evaluation.flip import TurnedFace, compare_flip, flip_picture, flip_results, most_turned
from metaaux.faces import camera_from_pose


def total(inversion, step=0):
    """Loss of the prediction before any gradient step."""
    return inversion.steps[step + 1]["total"]


class TestInvert:
    def test_adds_a_positive_term(self, tiny_inverter, crops, cameras):
        plain, flipped = (
            tiny_inverter.invert(crops[1], steps=1, camera=cameras[1], flip=flip) for flip in (False, True)
        )
        assert total(flipped) > total(plain)
        # The first prediction is the same; then the flip loss leads elsewhere.
        assert flipped.steps[1]["mse"] == plain.steps[1]["mse"]
        assert flipped.steps[2]["mse"] != plain.steps[2]["mse"]

    def test_is_the_distance_of_the_mirrored_view(self, tiny_components, crops, cameras):
        inverter = MetaAuxInverter(**tiny_components, weight_flip_perceptual=2.0, weight_flip_adversarial=0.0)
        inverter.set_progress_bar_config(disable=True)
        plain, flipped = (inverter.invert(crops[1], steps=0, camera=cameras[1], flip=flip) for flip in (False, True))
        (comparison,) = compare_flip(inverter, [TurnedFace("face", crops[1], cameras[1])], steps=0)
        expected = 2.0 * comparison.plain.figures["mirrored_perceptual"]
        # The picture is rounded to 8 bits, the loss is not.
        assert total(flipped) - total(plain) == pytest.approx(expected, rel=0.02)

    def test_by_itself_beyond_the_configured_yaw(self, tiny_components, crops):
        inverter = MetaAuxInverter(**tiny_components, flip_yaw=10.0)
        inverter.set_progress_bar_config(disable=True)
        for yaw, expected in ((9, False), (11, True), (-11, True)):
            camera = camera_from_pose(yaw, 3)
            default, on, off = (
                inverter.invert(crops[0], steps=0, camera=camera, flip=flip) for flip in (None, True, False)
            )
            assert total(on) != total(off)
            assert total(default) == total(on if expected else off)

    def test_several_photos_that_show_both_sides_need_none(self, tiny_components, crops):
        inverter = MetaAuxInverter(**tiny_components, flip_yaw=10.0)
        inverter.set_progress_bar_config(disable=True)
        for yaws, expected in (((20, -20), False), ((20, 2), False), ((20, 15), True), ((-20, -30), True)):
            camera = torch.stack([camera_from_pose(yaw, 0) for yaw in yaws])
            default, on, off = (
                inverter.invert(crops[:2], steps=0, camera=camera, flip=flip) for flip in (None, True, False)
            )
            assert total(default) == total(on if expected else off)

    def test_never_by_itself_without_a_threshold(self, tiny_components, crops):
        inverter = MetaAuxInverter(**tiny_components, flip_yaw=None)
        inverter.set_progress_bar_config(disable=True)
        camera = camera_from_pose(60, 0)
        default, off = (inverter.invert(crops[0], steps=0, camera=camera, flip=flip) for flip in (None, False))
        assert total(default) == total(off)

    def test_weights_default_to_those_of_the_same_view(self, tiny_components, crops):
        named = {"weight_flip_perceptual": 0.5, "weight_flip_adversarial": 0.02}
        losses = []
        for settings in (named, {"weight_perceptual": 0.5, "weight_adversarial": 0.02}):
            inverter = MetaAuxInverter(**tiny_components, **settings)
            inverter.set_progress_bar_config(disable=True)
            on, off = (
                inverter.invert(crops[0], steps=0, camera=camera_from_pose(20, 0), flip=f) for f in (True, False)
            )
            losses.append(total(on) - total(off))
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    def test_share_of_the_steps(self, tiny_components, crops, cameras):
        errors = []
        for share in (0.5, 1.0):
            inverter = MetaAuxInverter(**tiny_components, flip_share=share)
            inverter.set_progress_bar_config(disable=True)
            inversion = inverter.invert(crops[1], steps=2, camera=cameras[1], flip=True)
            errors.append([step["mse"] for step in inversion.steps])
        assert errors[0][:3] == errors[1][:3]
        assert errors[0][3] != errors[1][3]

    def test_a_checkpoint_without_flip_weights(self, tiny_components, crops, cameras):
        inverter = MetaAuxInverter(**tiny_components, weight_flip_perceptual=0.0, weight_flip_adversarial=0.0)
        with pytest.raises(ValueError, match="weight_flip_perceptual"):
            inverter.invert(crops[0], steps=0, camera=cameras[0], flip=True)


class TestComparison:
    @pytest.fixture(scope="class")
    @classmethod
    def data(cls, crops, tmp_path_factory):
        """An EG3D data set of the three crops at yaws of 5, -30 and 20 degrees."""
        path = tmp_path_factory.mktemp("data") / "faces.zip"
        labels = []
        with zipfile.ZipFile(path, "w") as archive:
            for number, (crop, yaw) in enumerate(zip(crops, (5, -30, 20), strict=True)):
                with archive.open(f"{number}.png", "w") as file:
                    crop.save(file, format="PNG")
                labels.append([f"{number}.png", camera_from_pose(yaw, 0).tolist()])
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
        return path

    def test_most_turned_come_first(self, data, crops):
        faces = most_turned(data, IMAGE_SIZE, 2)
        assert [face.name for face in faces] == ["1.png", "2.png"]
        assert faces[0].photo == crops[1]

    def test_views_and_figures(self, tiny_inverter, data):
        (face,) = most_turned(data, IMAGE_SIZE, 1)
        seen = []
        (comparison,) = compare_flip(tiny_inverter, [face], steps=1, progress=seen.append)
        assert seen == [comparison] and comparison.yaw == pytest.approx(-30, abs=0.01)
        inversion = tiny_inverter.invert(face.photo, steps=1, camera=face.camera, flip=True)
        assert comparison.flip.same == tiny_inverter.render(inversion)
        assert comparison.flip.mirrored == tiny_inverter.render(inversion, yaw=30)
        photo, same = (np.array(image) / 127.5 - 1 for image in (face.photo, comparison.flip.same))
        assert comparison.flip.figures["mse"] == pytest.approx(((photo - same) ** 2).mean(), rel=1e-4)
        assert -1 <= comparison.plain.figures["mirrored_identity"] <= 1

    def test_results_and_picture(self, tiny_inverter, data):
        comparisons = compare_flip(tiny_inverter, most_turned(data, IMAGE_SIZE, 2), steps=0)
        results = flip_results(comparisons)
        assert results["n"] == 2 and [face["name"] for face in results["faces"]] == ["1.png", "2.png"]
        plain = [face["plain"]["mse"] for face in results["faces"]]
        assert results["mean"]["plain"]["mse"] == pytest.approx(sum(plain) / 2)
        # Without a gradient step both are the same prediction.
        assert all(change == 0 for change in results["change"].values())
        picture = np.array(flip_picture(comparisons))
        left = picture.shape[1] - 4 * IMAGE_SIZE
        mirrored = np.array(ImageOps.mirror(comparisons[0].aligned))
        top = picture.shape[0] - 3 * IMAGE_SIZE
        assert np.array_equal(picture[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE], mirrored)

    def test_no_face(self):
        with pytest.raises(ValueError, match="at least one face"):
            flip_picture([])

    def test_command(self, tiny_folder, data, tmp_path, monkeypatch, capsys):
        out = tmp_path / "new" / "flip"
        arguments = ["compare-flip", data, "--out", out, "--most-turned", 1, "--steps", 1, "--model", tiny_folder]
        monkeypatch.setattr(sys, "argv", ["metaaux", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
            sys.exit(0)
        assert not stopped.value.code, capsys.readouterr().err
        assert {path.name for path in out.iterdir()} == {"comparison.png", "results.json"}
        results = json.loads((out / "results.json").read_text())
        assert results["n"] == 1 and results["model"] == str(tiny_folder) and results["perceptual"] == "own"
        assert Image.open(out / "comparison.png").height > 2 * IMAGE_SIZE
