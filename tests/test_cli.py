"""The command line: files and keys of the contract, exit codes, one-line errors."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import skimage.data
import torch
from conftest import IMAGE_SIZE
from PIL import Image
from typer.main import get_command

import metaaux
from metaaux import Inversion, MetaAuxInverter
from metaaux.cli import app, main
from metaaux.cli.options import ComparisonOptions, echo_json
from metaaux.export.images import label_strip
from metaaux.export.video import write_video
from metaaux.faces import camera_from_pose
from tests import warm

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
        arguments = ("--resolution", 32, "--texture", 0)
        code, stdout, err = run("mesh", tmp_path / "a.safetensors", "--out", tmp_path / "a.ply", *arguments)
        assert code == 0, err
        assert (tmp_path / "a.ply").read_bytes()[:4] == b"ply\n"

    def test_errors(self, run, tiny_folder, inversion_file, tmp_path):
        code, _, err = run("mesh", inversion_file, "--out", tmp_path / "a.glb", "--texture", 3000)
        assert code == 2 and "--texture" in err
        code, _, err = run("mesh", inversion_file, "--out", tmp_path / "a.stl")
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
        assert info["preset"] == "custom" and info["inner_loop"]["position_bias"] == 8

    def test_text(self, run, tiny_folder):
        code, out, _ = run("model-info", tiny_folder)
        assert code == 0 and "AuxiliaryNetwork" in out and "M parameters" in out and "weight_perceptual" in out
        assert "preset       custom" in out


class TestTrain:
    @pytest.mark.parametrize("part", ["generator", "encoder", "identity", "auxiliary", "directions"])
    def test_configurations_that_cannot_be_used(self, run, part, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        config = tmp_path / "config.yaml"
        assert_fails_in_one_line(run("train", part, "--config", config), "config.yaml")
        config.write_text("surprise: 1\n")
        assert_fails_in_one_line(run("train", part, "--config", config), "unknown setting surprise")
        config.write_text("a: [")
        assert_fails_in_one_line(run("train", part, "--config", config), "not valid YAML")
        assert os.listdir(tmp_path) == ["config.yaml"]

    def test_a_full_gpu_is_told(self, run, monkeypatch, tmp_path):
        def out_of_memory(*arguments):
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 64.00 MiB. If reserved but unallocated memory is large try …"
            )

        def broken(*arguments):
            raise RuntimeError("another")

        config = Path(metaaux.__file__).parent / "configs/mini/encoder.yaml"
        monkeypatch.setattr("metaaux.training.encoder.train", out_of_memory)
        result = run("train", "encoder", "--config", config, "--run", tmp_path / "run")
        assert_fails_in_one_line(result, "Tried to allocate 64.00 MiB. Do less at once")
        monkeypatch.setattr("metaaux.training.encoder.train", broken)
        with pytest.raises(RuntimeError, match="another"):
            run("train", "encoder", "--config", config, "--run", tmp_path / "run")

    def test_values_and_folder(self, run, tmp_path, monkeypatch):
        """What the trainer is given: the file's values with those of --set in place, and the run's folder."""
        from metaaux.training import identity

        given = []
        monkeypatch.setattr(identity, "train", lambda *arguments: given.append(arguments))
        monkeypatch.chdir(tmp_path)
        config = Path(metaaux.__file__).parent / "configs" / "mini" / "identity.yaml"
        values = ["--set", "run.seed=7", "--set", "data.path=photos=1.zip"]
        for options in (values, ["--run", "mine", "--resume"]):
            code, _, err = run("train", "identity", "--config", config, *options)
            assert code == 0, err
        (first, folder, resume), (plain, mine, again) = given
        assert (first.run.seed, first.data.path) == (7, "photos=1.zip") and plain.run.seed != 7
        assert first.run.model_dump(exclude={"seed"}) == plain.run.model_dump(exclude={"seed"})
        assert (folder, resume, mine, again) == (Path("runs/mini-identity"), False, Path("mine"), True)

    def test_values_that_cannot_be_set(self, run, tmp_path):
        config = tmp_path / "config.yaml"
        config.write_text("run: {seed: 0}\n")
        for setting, match in (
            ("run.seed=soon", "run.seed: expected a valid integer"),
            ("run.sed=1", "unknown setting sed"),
            ("seed", "not of the form KEY=VALUE"),
        ):
            assert_fails_in_one_line(run("train", "identity", "--config", config, "--set", setting), match)

    def test_a_run_in_the_place_of_a_file(self, run, tmp_path):
        (tmp_path / "run").touch()
        config = Path(metaaux.__file__).parent / "configs" / "mini" / "identity.yaml"
        code, _, err = run("train", "identity", "--config", config, "--run", tmp_path / "run")
        assert code == 2 and "run is a file" in err

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


class TestPrinting:
    """What a command prints fails for no terminal and no pipe; its files are written."""

    @staticmethod
    def start(*arguments, **options):
        environment = os.environ | {"OMP_NUM_THREADS": "1", **options.pop("environment", {})}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment, **options}
        return warm.Popen(["-m", "metaaux", *arguments], **options)

    @pytest.fixture
    def cyrillic_folder(self, tiny_folder, tmp_path):
        return shutil.copytree(tiny_folder, tmp_path / "фото")

    @pytest.mark.parametrize("encoding", ["cp1252", "ascii:strict"])
    def test_encodings_without_the_letters_of_a_name(self, cyrillic_folder, encoding):
        process = self.start("model-info", cyrillic_folder, environment={"PYTHONIOENCODING": encoding})
        out, err = process.communicate()
        assert process.returncode == 0, err
        # ASCII counts as a terminal that does not tell its encoding.
        name = rb"\u0444\u043e\u0442\u043e" if encoding == "cp1252" else "фото".encode()
        assert name in out.splitlines()[0]

    def test_invert_into_such_a_folder(self, tiny_folder, photo, tmp_path):
        out = tmp_path / "фото"
        process = self.start(
            *("invert", photo, "--out", out, "--model", tiny_folder, "--steps", 0),
            environment={"PYTHONIOENCODING": "cp1252"},
        )
        _, err = process.communicate()
        assert process.returncode == 0, err
        assert {path.name for path in out.iterdir()} == RESULTS

    @pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
    def test_json_is_ascii_under_every_encoding(self, cyrillic_folder, encoding):
        process = self.start("model-info", cyrillic_folder, "--json", environment={"PYTHONIOENCODING": encoding})
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert json.loads(out.decode("ascii"))["model"] == str(cyrillic_folder)

    @pytest.mark.parametrize("arguments", [["model-info"], ["model-info", "--json"]])
    def test_nobody_reads(self, tiny_folder, arguments):
        process = self.start(*arguments, tiny_folder)
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait() == 0, err
        assert b"Traceback" not in err and b"BrokenPipe" not in err

    @pytest.mark.skipif(os.name != "posix", reason="a shell's redirections")
    def test_closed_streams(self, tiny_folder):
        command = [sys.executable, "-m", "metaaux", "model-info", str(tiny_folder)]
        subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command], check=True)

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device without room")
    def test_a_full_disk_is_told(self, tiny_folder):
        with open("/dev/full", "wb") as full:
            process = self.start("model-info", tiny_folder, stdout=full)
            err = process.communicate()[1].decode()
        assert process.returncode == 1 and "No space left" in err and "Traceback" not in err

    def test_json_has_no_word_for_infinity(self):
        with pytest.raises(ValueError, match="JSON"):
            echo_json({"mse": float("inf")})


class TestPlaces:
    """Where results cannot lie is said before the work, in one line."""

    def test_folders(self, run, photo, tmp_path, monkeypatch):
        monkeypatch.setattr(MetaAuxInverter, "from_pretrained", None)  # nothing is loaded
        (tmp_path / "file").touch()
        for command in (["invert", photo], ["compare-flip", photo], ["evaluate", "--data", photo]):
            for out in ("file", "file/a", "a" * 256):
                code, stdout, err = run(*command, "--out", tmp_path / out)
                assert code == 2 and stdout == "" and ("is a file" in err or "too long" in err)
        code, _, err = run("convert", "lpips", photo, tmp_path / "file")
        assert code == 2 and "file is a file" in err
        code, _, err = run("evaluate", "generator", "--out", tmp_path / "file")
        assert code == 2 and "file is a file" in err
        assert (tmp_path / "file").read_bytes() == b""

    def test_files(self, run, inversion_file, tmp_path, monkeypatch):
        monkeypatch.setattr(MetaAuxInverter, "from_pretrained", None)
        for command, suffix in (("render", "png"), ("orbit", "mp4"), ("mesh", "glb")):
            (tmp_path / f"folder.{suffix}").mkdir()
            for name, match in (("folder", "it is a folder"), ("none/a", "does not exist"), ("a" * 252, "too long")):
                code, _, err = run(command, inversion_file, "--out", tmp_path / f"{name}.{suffix}")
                assert code == 2 and match in err
        code, _, err = run("benchmark", "--out", tmp_path)
        assert code == 2 and "it is a folder" in err

    def test_names_as_long_as_the_file_system_allows(self, run, tiny_folder, inversion_file, tmp_path):
        for command, suffix, options in (("render", "png", []), ("orbit", "mp4", ["--frames", 2])):
            out = tmp_path / ("é" * 125 + f".{suffix}")
            code, _, err = run(command, inversion_file, "--out", out, "--model", tiny_folder, *options)
            assert code == 0 and out.is_file(), err

    def test_colon_in_a_videos_name(self, run, tiny_folder, inversion_file, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        code, _, err = run("orbit", inversion_file, "--out", "10:30.mp4", "--frames", 2, "--model", tiny_folder)
        assert code == 0, err
        assert len(list(imageio_ffmpeg.read_frames(str(tmp_path / "10:30.mp4")))) == 3  # properties first


class TestSharedOptions:
    def test_evaluate_and_editing_have_the_same(self):
        evaluate = get_command(app).commands["evaluate"]
        editing = evaluate.commands["editing"]
        shared = [field.name for field in dataclasses.fields(ComparisonOptions)]
        found = [{p.name: p for p in command.params} for command in (evaluate, editing)]
        for name in shared:
            first, second = (parameters[name] for parameters in found)
            assert (first.opts, first.help) == (second.opts, second.help)
            assert name == "methods" or first.default == second.default
        assert found[1]["methods"].default == "metaaux,encoder"

    def test_help_of_methods_names_each_of_them(self):
        from metaaux.baselines import METHODS

        words = ComparisonOptions.__annotations__["methods"]
        assert all(re.search(rf"[ (]{re.escape(name)}[,.;) ]", words) for name in METHODS)


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    for command in ("invert", "render", "orbit", "mesh", "compare-flip", "model-info", "train", "prepare"):
        assert f"\n  {command} " in out


def test_help_waits_for_no_heavy_module():
    """Every command is there before PyTorch, NumPy or Pillow is imported."""
    code = (
        "import sys; from metaaux.cli import app; from typer.main import get_command; command = get_command(app); "
        "command.commands['evaluate'].commands['editing'].get_help(__import__('typer').Context(command)); "
        "print(sorted({'torch', 'numpy', 'PIL', 'yaml', 'diffusers', 'tqdm'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
