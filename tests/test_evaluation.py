"""Reconstruction evaluation: methods, resumption, failures, shards, results."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zipfile

import pytest
import skimage.data
import torch
from conftest import IMAGE_SIZE
from PIL import Image
from test_stylegan2_2d import inverter as flat_inverter  # noqa: F401 (a fixture)

from metaaux import MetaAuxInverter
from metaaux.baselines import MethodOptions, make_methods
from metaaux.baselines.encoder import EncoderMethod
from metaaux.baselines.optimization import LatentSettings
from metaaux.cameras import pose_of_camera
from metaaux.cli import main
from metaaux.evaluation import reconstruction
from metaaux.evaluation.flip import TurnedFace, compare_flip
from metaaux.evaluation.generator import GeneratorSettings, evaluate_generator
from metaaux.evaluation.metrics import ReconstructionMetrics
from metaaux.evaluation.photos import open_photos
from metaaux.evaluation.reconstruction import ReconstructionEvaluation
from metaaux.evaluation.records import Records
from metaaux.evaluation.report import comparison_picture
from metaaux.export.images import image_to_tensor, tensor_to_image
from metaaux.files import source_name
from metaaux.models.identity import IdentityNetwork
from metaaux.models.recogniser import FaceRecogniser
from tests import warm

FAST = MethodOptions(latent=LatentSettings(steps=2), tuning_steps=2)
METHOD_KEYS = {"mse", "perceptual", "identity", "frechet", "seconds", "failed", "n"}


def make_evaluation(inverter, data, folder, methods=("encoder",), **options):
    methods = make_methods(list(methods), inverter, FAST) if isinstance(methods[0], str) else list(methods)
    photos = open_photos(data, IMAGE_SIZE)
    return ReconstructionEvaluation(
        inverter, methods, photos, ReconstructionMetrics(inverter), folder, progress=False, **options
    )


class TestPhotos:
    def test_crops_and_cameras_of_a_data_set_are_taken_as_they_are(self, face_zip, crops, cameras):
        photos = open_photos(face_zip, IMAGE_SIZE)
        assert len(photos) == 3 and not photos.aligned
        for index, crop in enumerate(crops):
            torch.testing.assert_close(photos[index].image, image_to_tensor(crop))
            torch.testing.assert_close(photos[index].camera, cameras[index])
        assert len(open_photos(face_zip, IMAGE_SIZE, limit=2)) == 2

    def test_folder_is_aligned(self, tiny_inverter, tmp_path):
        Image.fromarray(skimage.data.astronaut()).save(tmp_path / "b.png")
        Image.new("RGB", (300, 300)).save(tmp_path / "a.png")
        (tmp_path / "notes.txt").write_text("no photo")
        photos = open_photos(tmp_path, IMAGE_SIZE, lambda: tiny_inverter.aligner)
        assert photos.names == ["a.png", "b.png"]
        with pytest.raises(ValueError, match="no face"):
            photos[0]
        expected = tiny_inverter.aligner.align(skimage.data.astronaut())
        torch.testing.assert_close(photos[1].image, image_to_tensor(expected.image))
        torch.testing.assert_close(photos[1].camera, expected.camera)

    def test_pictures_of_a_folder_are_those_that_are_read(self, tiny_inverter, tmp_path):
        for name in ("a.heic", "b.JPG", "c.eps", "d.pdf", "e.avif", "f.txt", ".g.png"):
            Image.new("RGB", (8, 8)).save(tmp_path / name, format="PNG")
        assert open_photos(tmp_path, IMAGE_SIZE, lambda: tiny_inverter.aligner).names == ["a.heic", "b.JPG", "e.avif"]

    def test_paths_that_hold_none(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no photos at"):
            open_photos(tmp_path / "absent", IMAGE_SIZE)
        with pytest.raises(FileNotFoundError, match="nor any picture"):
            open_photos(tmp_path, IMAGE_SIZE)
        Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
        with pytest.raises(ValueError, match="neither a folder nor a zip"):
            open_photos(tmp_path / "one.png", IMAGE_SIZE)


class TestRecords:
    def test_unfinished_line_is_dropped(self, tmp_path):
        records = Records(tmp_path, {"methods": {}})
        records.append("w", {"index": 0, "mse": 1.0})
        path = next((tmp_path / "records").iterdir())
        with path.open("ab") as file:
            file.write(b'{"index": 1, "ms')
        records = Records(tmp_path, {"methods": {}})
        assert records.read("w") == {0: {"index": 0, "mse": 1.0}}
        records.append("w", {"index": 1, "mse": 2.0})
        assert [record["mse"] for record in records.read("w").values()] == [1.0, 2.0]
        assert path.read_bytes().count(b"\n") == 2

    def test_methods_whose_names_begin_alike(self, tmp_path):
        records = Records(tmp_path, {"methods": {}})
        for name in ("w", "w+", "metaaux", "metaaux-0"):
            records.append(name, {"index": 0, "name": name})
        assert all(records.read(name)[0]["name"] == name for name in ("w", "w+", "metaaux", "metaaux-0"))

    def test_other_settings_are_refused_and_further_methods_are_not(self, tmp_path):
        Records(tmp_path, {"weights": "a", "methods": {"w": {"steps": 1}}})
        Records(tmp_path, {"weights": "a", "methods": {"pti": {"steps": 2}}})
        assert json.loads((tmp_path / "settings.json").read_text())["methods"].keys() == {"w", "pti"}
        with pytest.raises(ValueError, match="another weights"):
            Records(tmp_path, {"weights": "b", "methods": {}})
        with pytest.raises(ValueError, match="figures of w with other settings"):
            Records(tmp_path, {"weights": "a", "methods": {"w": {"steps": 5}}})
        with pytest.raises(ValueError, match="shard"):
            Records(tmp_path, {"methods": {}}, shard=(3, 2))


class BreakingEncoder(EncoderMethod):
    """Encodes, but raises `error` on the calls numbered in `breaks`."""

    def __init__(self, inverter, breaks, error):
        super().__init__("encoder", "encoder (W)", inverter.generator, inverter.encoder, "pipeline")
        self.calls, self.breaks, self.error = 0, breaks, error

    def warm_up(self, image, camera):
        pass

    def invert(self, image, camera):
        self.calls += 1
        if self.calls in self.breaks:
            raise self.error
        return super().invert(image, camera)


class TestSourceName:
    """What results call a checkpoint does not show where it lies on the machine."""

    def test_names(self, tmp_path, monkeypatch):
        (tmp_path / "work" / "runs" / "a").mkdir(parents=True)
        (tmp_path / "elsewhere" / "b").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "work")
        assert source_name(tmp_path / "work" / "runs" / "a") == source_name("runs/a") == "runs/a"
        assert source_name(tmp_path / "elsewhere" / "b") == source_name("../elsewhere/b") == "b"
        assert (source_name("."), source_name("org/model"), source_name(None)) == ("work", "org/model", "pipeline")

    def test_results_hold_no_path(self, tiny_folder, face_zip, tmp_path):
        inverter = MetaAuxInverter.from_pretrained(tiny_folder)
        make_evaluation(inverter, face_zip, tmp_path, ("encoder",)).summarize()
        text = (tmp_path / "results.json").read_text()
        assert f'"{tiny_folder.name}"' in text and str(tiny_folder.parent) not in text


class TestEvaluation:
    def test_results(self, tiny_inverter, face_zip, batch, tmp_path):
        evaluation = make_evaluation(tiny_inverter, face_zip, tmp_path, ("encoder", "metaaux-0"))
        evaluation.run()
        results = evaluation.summarize()
        assert results == json.loads((tmp_path / "results.json").read_text())
        assert results["methods"].keys() == {"encoder", "metaaux-0"} and results["complete"]
        assert results["device"] == "cpu" and results["photos"] == 3 and results["preset"] == "custom"
        figures = results["methods"]["encoder"]
        assert figures.keys() == METHOD_KEYS
        images = tiny_inverter.generator.synthesize(tiny_inverter.encoder(batch[0]), batch[1]).image.clamp(-1, 1)
        assert figures["mse"] == pytest.approx((images - batch[0]).square().mean().item(), rel=1e-4)
        assert (figures["failed"], figures["n"], figures["frechet"]) == (0, 3, None) and figures["seconds"] > 0
        assert -1 <= results["details"]["encoder"]["identity_turned"] <= 1
        assert "| encoder (W) | " in (tmp_path / "table.md").read_text(encoding="utf-8")
        with Image.open(tmp_path / "comparison.png") as picture:
            assert picture.width > 3 * 128 and picture.height > 3 * 128

    def test_frechet_of_the_reconstructions(self, tiny_inverter, face_zip, tmp_path):
        class Means:
            name = "mean colours"

            def __call__(self, images):
                return images.float().mean((2, 3))

        evaluation = make_evaluation(tiny_inverter, face_zip, tmp_path, features=Means())
        evaluation.run()
        frechet = evaluation.summarize()["methods"]["encoder"]["frechet"]
        means = []
        for kind in ("input", "encoder"):
            files = sorted((tmp_path / "reconstructions" / kind).iterdir())
            means.append(torch.stack([image_to_tensor(Image.open(file)) for file in files]).mean((2, 3)) * 127.5)
        # At least the squared distance of the means; the rest is that of the covariances.
        assert frechet >= (means[0].mean(0) - means[1].mean(0)).square().sum().item() - 1e-3

    def test_goes_on_after_an_interruption(self, tiny_inverter, face_zip, tmp_path):
        breaking = BreakingEncoder(tiny_inverter, {3}, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            make_evaluation(tiny_inverter, face_zip, tmp_path / "a", [breaking]).run()
        interrupted = make_evaluation(tiny_inverter, face_zip, tmp_path / "a", [breaking])
        assert not interrupted.summarize()["complete"]
        # Killed in the middle of a write, besides.
        with next((tmp_path / "a" / "records").iterdir()).open("ab") as file:
            file.write(b'{"index": 2, "mse": 0.')
        again = BreakingEncoder(tiny_inverter, set(), None)
        evaluation = make_evaluation(tiny_inverter, face_zip, tmp_path / "a", [again])
        evaluation.run()
        assert again.calls == 1
        resumed = evaluation.summarize()["methods"]["encoder"]
        whole = make_evaluation(tiny_inverter, face_zip, tmp_path / "b")
        whole.run()
        expected = whole.summarize()["methods"]["encoder"]
        assert {**resumed, "seconds": 0} == {**expected, "seconds": 0}

    def test_a_shard_that_ends_during_anothers_summary(self, tiny_inverter, face_zip, tmp_path, monkeypatch):
        first, second = (make_evaluation(tiny_inverter, face_zip, tmp_path, shard=(number, 2)) for number in (1, 2))
        first.run()
        write_table = reconstruction.write_text

        def write_late(text, path):
            monkeypatch.undo()
            second.run()
            second.summarize()
            write_table(text, path)

        monkeypatch.setattr(reconstruction, "write_text", write_late)
        assert first.summarize()["complete"]
        assert json.loads((tmp_path / "results.json").read_text())["complete"]
        assert "Not all photos" not in (tmp_path / "table.md").read_text(encoding="utf-8")

    def test_failures_are_counted(self, tiny_inverter, face_zip, tmp_path, capsys):
        broken = tmp_path / "broken.zip"
        with zipfile.ZipFile(face_zip) as source, zipfile.ZipFile(broken, "w") as archive:
            for name in source.namelist():
                archive.writestr(name, b"no picture" if name == "00/00001.png" else source.read(name))
        diverging = BreakingEncoder(tiny_inverter, {1}, FloatingPointError("it diverged"))
        ours = make_methods(["metaaux-0"], tiny_inverter)[0]
        evaluation = make_evaluation(tiny_inverter, broken, tmp_path / "out", [diverging, ours])
        evaluation.run()
        figures = evaluation.summarize()["methods"]
        assert (figures["encoder"]["n"], figures["encoder"]["failed"]) == (3, 2)
        assert (figures["metaaux-0"]["n"], figures["metaaux-0"]["failed"]) == (3, 1)
        errors = capsys.readouterr().err
        assert "it diverged" in errors and "00/00001.png" in errors
        # They are not tried again.
        calls = diverging.calls
        make_evaluation(tiny_inverter, broken, tmp_path / "out", [diverging, ours]).run()
        assert diverging.calls == calls

    def test_no_photo_succeeded(self, tiny_inverter, face_zip, tmp_path):
        method = BreakingEncoder(tiny_inverter, {1, 2, 3}, FloatingPointError("it diverged"))
        evaluation = make_evaluation(tiny_inverter, face_zip, tmp_path, [method])
        evaluation.run()
        figures = evaluation.summarize()["methods"]["encoder"]
        assert figures["mse"] is None and figures["seconds"] is None and figures["failed"] == figures["n"] == 3

    def test_a_batch_with_a_failure_is_done_one_by_one(self, tiny_inverter, face_zip, tmp_path):
        # Photo 1 alone, then photos 2 and 3 as a batch that fails, then 2 (which fails) and 3.
        method = BreakingEncoder(tiny_inverter, {2, 3}, FloatingPointError("it diverged"))
        evaluation = make_evaluation(tiny_inverter, face_zip, tmp_path, [method], batch=2, timed_photos=1)
        evaluation.run()
        figures = evaluation.summarize()["methods"]["encoder"]
        assert (figures["n"], figures["failed"], method.calls) == (3, 1, 4)

    def test_batches_give_the_same_figures_and_time_only_single_photos(self, tiny_inverter, face_zip, tmp_path):
        results = []
        for size in (1, 2):
            evaluation = make_evaluation(
                tiny_inverter, face_zip, tmp_path / str(size), ("metaaux-0",), batch=size, timed_photos=1
            )
            evaluation.run()
            results.append(evaluation.summarize())
        single, batched = (result["methods"]["metaaux-0"] for result in results)
        for key in ("mse", "perceptual", "identity"):
            assert batched[key] == pytest.approx(single[key], rel=1e-3, abs=1e-5)
        assert [result["details"]["metaaux-0"]["timed"] for result in results] == [1, 1]

    def test_shards_beside_each_other_are_not_timed(self, tiny_inverter, face_zip, tmp_path):
        # As recommended: the first photo alone for its time, then all of them in shards.
        for options in (
            {"timed_photos": 1, "batch": 1},
            {"timed_photos": 0, "shard": (1, 2)},
            {"timed_photos": 0, "shard": (2, 2), "batch": 2},
        ):
            evaluation = make_evaluation(tiny_inverter, face_zip, tmp_path, **options)
            evaluation.run()
        results = evaluation.summarize()
        assert results["complete"] and results["details"]["encoder"]["timed"] == 1

    def test_shards_make_up_the_whole(self, tiny_inverter, face_zip, tmp_path):
        whole = make_evaluation(tiny_inverter, face_zip, tmp_path / "whole")
        whole.run()
        for shard in ((1, 2), (2, 2)):
            part = make_evaluation(tiny_inverter, face_zip, tmp_path / "parts", shard=shard)
            part.run()
            results = part.summarize()
            assert results["complete"] == (shard == (2, 2))
        expected = whole.summarize()["methods"]["encoder"]
        assert {**results["methods"]["encoder"], "seconds": 0} == {**expected, "seconds": 0}

    def test_another_checkpoint_needs_another_folder(self, tiny_inverter, tiny_components, face_zip, tmp_path):
        from metaaux import MetaAuxInverter

        make_evaluation(tiny_inverter, face_zip, tmp_path)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            network = type(tiny_components["identity"])(**tiny_components["identity"].config)
        other = MetaAuxInverter(**tiny_components | {"identity": network.eval()})
        with pytest.raises(ValueError, match="holds an evaluation with another"):
            make_evaluation(other, face_zip, tmp_path)

    def test_poses_of_turned_heads(self, tiny_inverter, face_zip, tmp_path):
        evaluation = make_evaluation(tiny_inverter, face_zip, tmp_path, pose=True)
        evaluation.run()
        details = evaluation.summarize()["details"]["encoder"]
        # A tiny generator with random weights shows no face.
        for turn in ("", "_40"):
            assert details["pose_detected" + turn] == 0 and details["pose_error" + turn] is None

    def test_2d_generator(self, flat_inverter, face_zip, tmp_path):  # noqa: F811
        names = ("metaaux", "w+", "pti", "without_auxiliary")
        evaluation = make_evaluation(flat_inverter, face_zip, tmp_path, names, batch=2, timed_photos=1, pose=True)
        evaluation.run()
        results = evaluation.summarize()
        assert all(figures["failed"] == 0 and figures["mse"] > 0 for figures in results["methods"].values())
        # There are no other sides.
        assert all(details["identity_turned"] is None for details in results["details"].values())

    def test_distances_of_a_recogniser(self, tiny_components, face_zip, batch, tmp_path, monkeypatch):
        recogniser = FaceRecogniser(widths=(4, 6, 8), depths=(1, 1, 1), embedding_dim=5).eval()
        inverter = MetaAuxInverter(**tiny_components | {"identity": recogniser})
        w, camera = inverter.encoder(batch[0]), batch[1]
        own = recogniser(batch[0], camera)
        view = inverter.generator.camera_at
        expected = {"distance": recogniser(inverter.generator.synthesize(w, camera).image.clamp(-1, 1), camera) - own}
        _, pitches = pose_of_camera(camera)
        for turn, name in ((20, "distance_turned"), (40, "distance_turned_40")):
            sides = [torch.stack([view(yaw, float(pitch)) for pitch in pitches]) for yaw in (-turn, turn)]
            views = [recogniser(inverter.generator.synthesize(w, side).image.clamp(-1, 1), side) for side in sides]
            expected[name] = torch.cat(views) - torch.cat([own, own])
        nearest, second, _ = expected["distance"].norm(dim=1).sort().values.tolist()
        monkeypatch.setattr(reconstruction, "SAME_PERSON", (nearest + second) / 2)
        evaluation = make_evaluation(inverter, face_zip, tmp_path)
        evaluation.run()
        results = evaluation.summarize()
        details = results["details"]["encoder"]
        for name, difference in expected.items():
            assert details[name] == pytest.approx(difference.norm(dim=1).mean().item(), rel=1e-3), name
        assert details["same_person"] == pytest.approx(1 / 3)
        assert "recognition" in results["metrics"]["distance"]


class ByCamera(IdentityNetwork):
    """An identity network that needs the camera of each image, as one does that cuts the face out by it."""

    def forward(self, image, cameras):
        assert cameras.shape == (len(image), 25)
        return super().forward(image) + cameras[:, :1] * 0


class TestIdentity:
    def test_is_told_the_camera_of_every_image(self, tiny_components, face_zip, crops, cameras, tmp_path):
        identity = ByCamera(**tiny_components["identity"].config).eval()
        inverter = MetaAuxInverter(**tiny_components | {"identity": identity})
        inverter.set_progress_bar_config(disable=True)
        evaluation = make_evaluation(inverter, face_zip, tmp_path / "a", ("encoder", "metaaux-1"), batch=2)
        evaluation.run()
        assert all(figures["failed"] == 0 for figures in evaluation.summarize()["methods"].values())
        compare_flip(inverter, [TurnedFace("face", crops[1], cameras[1])], steps=0)
        evaluate_generator(inverter, tmp_path / "b", GeneratorSettings(2, 1, batch=2), progress=False)


class TestReport:
    def test_comparison_picture_holds_every_picture(self):
        rows = [[Image.new("RGB", (32, 32), colour) for colour in row] for row in (("red", "lime"), ("blue", "black"))]
        picture = comparison_picture(rows, ["a", "b"])
        colours = {colour for _, colour in picture.getcolors(2**20)}
        assert {(255, 0, 0), (0, 255, 0), (0, 0, 255)} <= colours
        assert picture.width >= 2 * 128 and picture.height > 2 * 128
        with pytest.raises(ValueError, match="rows of 1 pictures"):
            comparison_picture(rows, ["a"])

    def test_a_long_label_takes_lines_instead_of_room(self):
        rows = [[Image.new("RGB", (128, 128))] * 2]
        short, long = (comparison_picture(rows, ["a", label]) for label in ("b", "a label of quite a few words"))
        assert long.width == short.width and long.height > short.height


class TestCommand:
    def test_photos_of_a_folder(self, tiny_folder, tmp_path, monkeypatch, capsys):
        photos = tmp_path / "photos"
        photos.mkdir()
        Image.fromarray(skimage.data.astronaut()).save(photos / "astronaut.jpg")
        tensor_to_image(torch.zeros(3, 64, 64)).save(photos / "grey.png")
        out = tmp_path / "out"
        arguments = [
            "--data",
            photos,
            "--methods",
            "metaaux,encoder,pti",
            "--steps",
            1,
            "--latent-steps",
            1,
            "--tuning-steps",
            1,
            "--model",
            tiny_folder,
            "--device",
            "cpu",
            "--out",
            out,
        ]
        monkeypatch.setattr(sys, "argv", ["metaaux", "evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
        results = json.loads((out / "results.json").read_text())
        assert list(results["methods"]) == ["metaaux", "encoder", "pti"]
        for figures in results["methods"].values():
            assert figures.keys() == METHOD_KEYS and (figures["n"], figures["failed"]) == (2, 1)
        assert "| PTI |" in capsys.readouterr().out
        assert {"results.json", "table.md", "comparison.png"} <= {path.name for path in out.iterdir()}

    def test_goes_on_after_being_killed(self, tiny_folder, face_zip, tmp_path, monkeypatch):
        command = [
            "metaaux",
            "evaluate",
            "--data",
            face_zip,
            "--methods",
            "pti",
            "--latent-steps",
            "10",
            "--tuning-steps",
            "5",
            "--model",
            tiny_folder,
            "--device",
            "cpu",
            "--out",
            tmp_path,
        ]
        file = tmp_path / "records" / "pti.1-of-1.jsonl"
        command = list(map(str, command))
        first = warm.Popen(["-m", *command], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (file.exists() and file.read_bytes().count(b"\n")):
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        first.kill()
        first.wait()
        kept = file.read_bytes()
        kept = kept[: kept.rfind(b"\n") + 1]
        assert not (tmp_path / "results.json").exists()
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit):
            main()
        assert file.read_bytes().startswith(kept) and file.read_bytes().count(b"\n") == 3
        assert json.loads((tmp_path / "results.json").read_text())["methods"]["pti"]["n"] == 3

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--out", "x"], "--data"),
            (["--data", "x"], "--out"),
            (["--data", "x", "--out", "y", "--shard", "3/2"], "--shard"),
            (["editing", "--data", "x", "--out", "y"], "--attributes"),
        ],
    )
    def test_usage_errors(self, arguments, message, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["metaaux", "evaluate", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_figures_on_a_gpu_are_those_of_the_cpu(tiny_folder, face_zip, tmp_path):
    from metaaux import MetaAuxInverter

    names = ("metaaux", "metaaux-0", "encoder", "w", "w+", "pti", "without_auxiliary")
    figures = []
    for device in ("cpu", "cuda"):
        inverter = MetaAuxInverter.from_pretrained(tiny_folder).to(device)
        evaluation = make_evaluation(inverter, face_zip, tmp_path / device, names, batch=2, timed_photos=1)
        evaluation.run()
        figures.append(evaluation.summarize()["methods"])
    for name in names:
        assert figures[1][name]["failed"] == 0
        for key in ("mse", "perceptual", "identity"):
            assert figures[1][name][key] == pytest.approx(figures[0][name][key], rel=0.02, abs=0.01)
