"""The command line: files and keys of the contract, exit codes, one-line errors."""

from __future__ import annotations

import json
import os
import sys
import zipfile

import imageio_ffmpeg
import numpy as np
import pytest
import skimage.data
from conftest import IMAGE_SIZE
from PIL import Image

from metaaux import Inversion, MetaAuxInverter
from metaaux.cli import main
from metaaux.export.images import label_strip
from metaaux.export.video import write_video
from metaaux.faces import camera_from_pose

RESULTS = {"aligned.png", "reconstruction.png", "steps.png", "inversion.safetensors", "report.json"}


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line in this process: run("render", …) -> (exit code, stdout, stderr)."""

    def invoke(*arguments):
        monkeypatch.setattr(sys, "argv", ["metaaux", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
            sys.exit(0)
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return invoke


@pytest.fixture(scope="session")
def photo(tmp_path_factory):
    """A photo of a face that scikit-image ships: NASA's portrait of Eileen Collins, public domain."""
    path = tmp_path_factory.mktemp("photos") / "astronaut.jpg"
    Image.fromarray(skimage.data.astronaut()).save(path)
    return path


@pytest.fixture
def inversion_file(tiny_inversion, tmp_path):
    path = tmp_path / "face.safetensors"
    tiny_inversion.save(path)
    return path


def assert_fails_in_one_line(result, match, code=1):
    exit_code, out, err = result
    assert exit_code == code and out == ""
    # Libraries may have written to stderr before; the last line is ours.
    lines = [line for line in err.splitlines() if "Error" in line]
    assert len(lines) == 1 and match in lines[0], err
    assert "Traceback" not in err


class TestInvert:
    def test_files_and_report(self, run, tiny_folder, photo, tmp_path):
        out = tmp_path / "new" / "result"
        code, stdout, err = run("invert", photo, "--out", out, "--model", tiny_folder, "--steps", 2, "--json")
        assert code == 0, err
        assert {path.name for path in out.iterdir()} == RESULTS
        report = json.loads((out / "report.json").read_text())
        assert json.loads(stdout) == report
        assert list(report) == ["model", "seconds", "camera", "steps"]
        assert report["model"] == str(tiny_folder)
        assert list(report["camera"]) == ["yaw", "pitch"]
        keys = ["step", "mse", "perceptual", "identity", "adversarial", "total", "seconds"]
        assert [list(step) for step in report["steps"]] == [keys] * 4
        assert [step["step"] for step in report["steps"]] == [-1, 0, 1, 2]
        assert report["seconds"] >= sum(step["seconds"] for step in report["steps"])
        # She faces the camera, her head turned a little.
        assert abs(report["camera"]["yaw"]) < 30 and abs(report["camera"]["pitch"]) < 20

        inversion = Inversion.load(out / "inversion.safetensors")
        assert inversion.steps == report["steps"]
        aligned = np.array(Image.open(out / "aligned.png"))
        assert np.array_equal(aligned, inversion.aligned.permute(1, 2, 0).numpy())
        assert Image.open(out / "reconstruction.png").size == (IMAGE_SIZE, IMAGE_SIZE)
        strip = np.array(Image.open(out / "steps.png"))
        assert strip.shape[1] == 5 * IMAGE_SIZE and strip.shape[0] > IMAGE_SIZE
        assert np.array_equal(strip[:IMAGE_SIZE, :IMAGE_SIZE], aligned)
        reconstruction = np.array(Image.open(out / "reconstruction.png"))
        assert np.array_equal(strip[:IMAGE_SIZE, -IMAGE_SIZE:], reconstruction)

    def test_several_photos_are_of_one_person(self, run, tiny_folder, photo, tmp_path):
        code, stdout, err = run("invert", photo, photo, "--out", tmp_path, "--model", tiny_folder, "--steps", 0)
        assert code == 0, err
        assert str(tmp_path) in stdout and "after 0 steps" in stdout
        assert {path.name for path in tmp_path.iterdir()} == RESULTS

    def test_photos_that_cannot_be_used(self, run, tiny_folder, tmp_path):
        out = tmp_path / "result"
        options = ("--out", out, "--model", tiny_folder)
        assert_fails_in_one_line(run("invert", tmp_path / "none.jpg", *options), "does not exist")
        broken = tmp_path / "broken.jpg"
        broken.write_bytes(b"no picture")
        assert_fails_in_one_line(run("invert", broken, *options), "broken.jpg")
        Image.new("RGB", (300, 200), "gray").save(broken)
        assert_fails_in_one_line(run("invert", broken, *options), "no face was found")
        assert not out.exists()

    def test_models_that_cannot_be_used(self, run, photo, tmp_path):
        result = run("invert", photo, "--out", tmp_path / "result", "--model", tmp_path)
        assert_fails_in_one_line(result, "no model_index.json")
        result = run("invert", photo, "--out", tmp_path / "result", "--model", tmp_path / "a" / "b")
        assert_fails_in_one_line(result, "neither a valid local path nor a valid repo id")

    def test_usage(self, run, photo, tmp_path):
        for arguments in (["invert"], ["invert", photo], ["invert", photo, "--out", tmp_path, "--steps", -1]):
            code, out, err = run(*arguments)
            assert code == 2 and out == "" and "Error:" in err

    def test_unknown_device(self, run, tiny_folder, photo, tmp_path):
        result = run("invert", photo, "--out", tmp_path, "--model", tiny_folder, "--device", "abacus")
        assert_fails_in_one_line(result, "the device 'abacus' cannot be used")


class TestRender:
    def test_picture(self, run, tiny_inverter, tiny_inversion, tiny_folder, inversion_file, tmp_path):
        out = tmp_path / "side.png"
        options = ("--yaw", 20, "--pitch", -5, "--model", tiny_folder, "--device", "cpu")
        code, _, err = run("render", inversion_file, "--out", out, *options)
        assert code == 0, err
        assert np.array_equal(Image.open(out), tiny_inverter.render(tiny_inversion, yaw=20, pitch=-5))

    def test_errors(self, run, tiny_folder, inversion_file, tmp_path):
        out, model = tmp_path / "side.png", ("--model", tiny_folder)
        result = run("render", inversion_file, "--out", out, "--yaw", 95, *model)
        assert_fails_in_one_line(result, "yaw must lie strictly between -90 and 90")
        result = run("render", inversion_file, "--out", out, "--edit", "age=1.5", "--edit", "smile=-1", *model)
        assert_fails_in_one_line(result, "unknown edit 'age'; this model's directions: none")
        result = run("render", tmp_path / "none.safetensors", "--out", out, *model)
        assert_fails_in_one_line(result, "none.safetensors")
        inversion_file.write_bytes(inversion_file.read_bytes()[:-1])
        result = run("render", inversion_file, "--out", out, *model)
        assert_fails_in_one_line(result, "face.safetensors cannot be used as an inversion")
        assert not out.exists()

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            (["--out", "side.jpg"], "must end in .png"),
            (["--out", "nowhere/side.png"], "does not exist"),
            (["--out", "side.png", "--edit", "age"], "NAME=VALUE"),
            (["--out", "side.png", "--edit", "age=old"], "NAME=VALUE"),
            (["--out", "side.png", "--edit", "=1"], "NAME=VALUE"),
        ],
    )
    def test_usage(self, run, inversion_file, monkeypatch, tmp_path, arguments, match):
        monkeypatch.chdir(tmp_path)
        code, _, err = run("render", inversion_file, *arguments)
        assert code == 2 and match in err


class TestOrbit:
    def test_video(self, run, tiny_folder, inversion_file, tmp_path):
        out = tmp_path / "orbit.mp4"
        code, _, err = run("orbit", inversion_file, "--out", out, "--frames", 5, "--fps", 10, "--model", tiny_folder)
        assert code == 0, err
        reader = imageio_ffmpeg.read_frames(str(out))
        properties = next(reader)
        assert properties["codec"] == "h264" and properties["pix_fmt"].startswith("yuv420p")
        assert properties["size"] == (IMAGE_SIZE, IMAGE_SIZE) and properties["fps"] == 10
        assert len(list(reader)) == 5

    def test_errors(self, run, tiny_folder, inversion_file, tmp_path):
        code, _, err = run("orbit", inversion_file, "--out", tmp_path / "orbit.gif")
        assert code == 2 and "must end in .mp4" in err
        code, _, err = run("orbit", inversion_file, "--out", tmp_path / "orbit.mp4", "--frames", 0)
        assert code == 2 and "--frames" in err
        assert not list(tmp_path.glob("*.mp4"))


class TestMesh:
    def test_file(self, run, tmp_path):
        inverter = MetaAuxInverter.from_pretrained()
        w = inverter.generator.w_avg.clone()
        Inversion(w, camera_from_pose(0, 0), {}, fingerprint=inverter.fingerprint).save(tmp_path / "a.safetensors")
        code, stdout, err = run("mesh", tmp_path / "a.safetensors", "--out", tmp_path / "a.glb", "--resolution", 48)
        assert code == 0, err
        assert (tmp_path / "a.glb").read_bytes()[:4] == b"glTF"
        assert "vertices" in stdout and "100%" in err

    def test_errors(self, run, tiny_folder, inversion_file, tmp_path):
        code, _, err = run("mesh", inversion_file, "--out", tmp_path / "a.obj")
        assert code == 2 and "must end in .glb" in err
        code, _, err = run("mesh", inversion_file, "--out", tmp_path / "a.glb", "--resolution", 2000)
        assert code == 2 and "--resolution" in err
        result = run("mesh", inversion_file, "--out", tmp_path / "a.glb", "--edit", "age=1", "--model", tiny_folder)
        assert result[0] == 1 and "unknown edit 'age'" in result[2]
        assert not list(tmp_path.glob("*.glb"))


class TestModelInfo:
    def test_json(self, run, tiny_folder, tiny_inverter):
        code, out, err = run("model-info", tiny_folder, "--json")
        assert code == 0, err
        info = json.loads(out)
        assert info["fingerprint"] == tiny_inverter.fingerprint and info["image_size"] == IMAGE_SIZE
        state = tiny_inverter.generator.state_dict()
        assert info["components"]["generator"] == {
            "class": "EG3DGenerator",
            "parameters": sum(p.numel() for p in tiny_inverter.generator.parameters()),
            "bytes": sum(4 * tensor.numel() for tensor in state.values()),
        }
        assert info["parameters"] == sum(part["parameters"] for part in info["components"].values())
        assert info["licence"] == "unknown"
        assert info["settings"]["inner_steps"] == 5

    def test_text(self, run, tiny_folder):
        code, out, _ = run("model-info", tiny_folder)
        assert code == 0 and "AuxiliaryNetwork" in out and "M parameters" in out and "weight_perceptual" in out


class TestTrain:
    @pytest.mark.parametrize("part", ["generator", "encoder", "identity", "auxiliary", "directions"])
    def test_configurations_that_cannot_be_used(self, run, part, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        config = tmp_path / "config.yaml"
        assert_fails_in_one_line(run("train", part, "--config", config), "config.yaml")
        config.write_text("surprise: 1\n")
        assert_fails_in_one_line(run("train", part, "--config", config), "unknown setting surprise")
        config.write_text("a: [")
        assert_fails_in_one_line(run("train", part, "--config", config), "not a valid configuration")
        assert os.listdir(tmp_path) == ["config.yaml"]

    def test_a_part_that_there_is_not(self, run):
        code, _, err = run("train", "everything", "--config", "config.yaml")
        assert code == 2 and "'generator'" in err and "'auxiliary'" in err


class TestPrepare:
    def test_data_set(self, run, photo, tmp_path):
        folder, out = tmp_path / "photos", tmp_path / "faces.zip"
        folder.mkdir()
        (folder / "astronaut.jpg").write_bytes(photo.read_bytes())
        Image.new("RGB", (200, 200), "gray").save(folder / "empty.png")
        code, stdout, err = run("prepare", folder, out, "--size", 64, "--workers", 1)
        assert code == 0, err
        assert "1 of 2 photos" in stdout and "left out empty.png: no face" in err
        with zipfile.ZipFile(out) as archive:
            labels = json.loads(archive.read("dataset.json"))["labels"]
        assert len(labels) == 1 and len(labels[0][1]) == 25

    def test_errors(self, run, tmp_path):
        assert_fails_in_one_line(run("prepare", tmp_path / "none", tmp_path / "faces.zip"), "is not a folder")
        code, _, err = run("prepare", tmp_path, tmp_path / "faces.tar")
        assert code == 2 and "must end in .zip" in err


class TestRendering:
    def test_strip_needs_a_label_per_image(self):
        with pytest.raises(ValueError, match="2 images and 1 labels"):
            label_strip([Image.new("RGB", (8, 8))] * 2, ["one"])

    @pytest.mark.parametrize(
        ("sizes", "name", "match"),
        [
            ([], "a.mp4", "0 frames"),
            ([(8, 8), (8, 6)], "a.mp4", "one size"),
            ([(7, 8)], "a.mp4", "even sides, got 7x8"),
            ([(8, 8)], "a.gif", "must end in .mp4"),
        ],
    )
    def test_video_errors(self, tmp_path, sizes, name, match):
        with pytest.raises(ValueError, match=match):
            write_video([Image.new("RGB", size) for size in sizes], tmp_path / name)
        assert not list(tmp_path.iterdir())


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    for command in ("invert", "render", "orbit", "mesh", "compare-flip", "model-info", "train", "prepare"):
        assert f"\n  {command} " in out
