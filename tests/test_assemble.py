"""`metaaux assemble` and `metaaux push`: parts to a pipeline's folder, and from there to a Hub."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import yaml
from hub_server import LoopbackHub, use_hub
from typer.testing import CliRunner

from metaaux import MetaAuxInverter
from metaaux.cli import app
from metaaux.hub.loading import load_component
from metaaux.losses import InversionLoss, LossWeights
from metaaux.models.auxiliary import AuxiliaryNetwork
from metaaux.models.directions import Direction, LatentDirections
from metaaux.models.discriminator import DualDiscriminator
from metaaux.models.eg3d import EG3DGenerator
from metaaux.models.encoder import LatentEncoder
from metaaux.models.weights import constructor_arguments, generator_fingerprint

REPO = "someone/some-model"
WEIGHTS = LossWeights(perceptual=0.1, identity=0.2, adversarial=0.005)


def run(*words, fails=False):
    """Runs a command in this process; its output, or that of an expected failure."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if fails:
        assert result.exit_code != 0
        return str(result.exception) if not isinstance(result.exception, SystemExit) else result.output
    if result.exception is not None:
        raise result.exception
    return result.output


@pytest.fixture(scope="module")
def parts(tiny_components, tmp_path_factory):
    """Folders of networks that fit each other, by option; discriminator and generator lie side by side."""
    folder = tmp_path_factory.mktemp("parts")
    networks = dict(tiny_components)
    loss = InversionLoss.from_components(WEIGHTS, networks["discriminator"], networks["identity"])
    networks["auxiliary"] = AuxiliaryNetwork(
        **constructor_arguments(networks["auxiliary"], inner_loss=loss.describe())
    ).eval()
    networks["auxiliary"].load_state_dict(tiny_components["auxiliary"].state_dict())
    normals = torch.eye(16)
    networks["directions"] = LatentDirections.from_directions(
        [
            Direction("age", "interfacegan", normals[0], 2.0, -3.0, 3.0, 0.9, "older"),
            Direction("gender", "interfacegan", normals[1], 2.0, -3.0, 3.0, 0.9, "more masculine"),
        ],
        generator_fingerprint(networks["generator"]),
    )
    for name, network in networks.items():
        network.save_pretrained(folder / name)
    return {name: folder / name for name in networks}


def options(parts, *without, **changed):
    chosen = {name: path for name, path in parts.items() if name not in without} | changed
    return [word for name, path in chosen.items() for word in (f"--{name}", path)]


@pytest.fixture(scope="module")
def assembled(parts, tmp_path_factory):
    out = tmp_path_factory.mktemp("assembled") / "my-model"
    output = run("assemble", out, *options(parts, "discriminator"), "--variant", "fp16", "--license", "mit")
    assert generator_fingerprint(load_component(EG3DGenerator, parts["generator"])) in output
    return out


def results_of(fingerprint, **changed):
    figures = {"mse": 0.0151, "perceptual": 1.3, "identity": 0.9, "frechet": None, "seconds": 0.5, "failed": 0, "n": 4}
    return {
        "methods": {"metaaux": figures, "encoder": figures | {"mse": 0.1}},
        "metrics": {"mse": "in [-1, 1]", "perceptual": "discriminator", "identity": "own", "frechet": None},
        "complete": True,
        "photos": 4,
        "device": "a CPU",
        "fingerprint": fingerprint,
        **changed,
    }


class TestAssemble:
    def test_it_loads_and_inverts(self, assembled, crops, cameras, recwarn):
        inverter = MetaAuxInverter.from_pretrained(assembled)
        assert not [warning for warning in recwarn if "another loss" in str(warning.message)]
        assert (inverter.config.weight_perceptual, inverter.config.weight_identity) == (0.1, 0.2)
        assert set(inverter.directions) == {"age", "gender"}
        inverter.set_progress_bar_config(disable=True)
        inversion = inverter.invert(crops[0], steps=1, camera=cameras[0])
        assert inverter.render(inversion, yaw=10, edits={"age": 1}).size == (32, 32)
        assert {path.name for path in assembled.parent.iterdir()} == {"my-model"}

    def test_variant(self, assembled):
        half = MetaAuxInverter.from_pretrained(assembled, variant="fp16")
        assert half.fingerprint == MetaAuxInverter.from_pretrained(assembled).fingerprint
        assert (assembled / "encoder" / "diffusion_pytorch_model.fp16.safetensors").is_file()

    def test_card(self, assembled):
        _, front, text = (assembled / "README.md").read_text().split("---\n", 2)
        assert yaml.safe_load(front)["license"] == "mit"
        assert "# my-model" in text and "`AuxiliaryNetwork`" in text and "preset is `custom`" in text

    def test_nothing_private_is_written(self, assembled, parts):
        for path in assembled.rglob("*.json"):
            assert str(parts["generator"].parent) not in path.read_text()

    def test_precision_of_the_files(self, parts, tmp_path):
        run("assemble", tmp_path / "half", *options(parts), "--dtype", "bf16")
        sizes = [
            sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
            for folder in (tmp_path / "half", parts["generator"].parent)
        ]
        assert sizes[0] < 0.6 * sizes[1]
        loaded = MetaAuxInverter.from_pretrained(tmp_path / "half")
        fingerprint = generator_fingerprint(load_component(EG3DGenerator, parts["generator"]))
        assert loaded.fingerprint == fingerprint and loaded.directions

    def test_settings(self, parts, tmp_path):
        sets = ("--set", "crop_scale=0.93", "--set", "flip_yaw=null", "--set", "inner_steps=3")
        run("assemble", tmp_path / "model", *options(parts, "directions"), *sets)
        config = json.loads((tmp_path / "model" / "model_index.json").read_text())
        assert (config["crop_scale"], config["flip_yaw"], config["inner_steps"]) == (0.93, None, 3)
        assert config["latent_directions"] == [None, None]

    @pytest.mark.parametrize(
        ("words", "match"),
        [
            (["--set", "crop=1"], "unknown setting crop"),
            (["--set", "inner_steps=many"], "inner_steps: "),
            (["--set", "weight_perceptual=0.8"], "trained for the inner loss's weights .*0.1.*0.8"),
            (["--gains", "x.zip"], "--gains needs it"),
            (["--variant", "fp8"], "fp16 or bf16"),
            (["--dtype", "fp8"], "float32, bfloat16 or float16"),
        ],
    )
    def test_wrong_options(self, parts, tmp_path, words, match):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", "500")
            output = run("assemble", tmp_path / "model", *options(parts), *words, fails=True)
        assert re.search(match, output), output
        assert not list(tmp_path.iterdir())

    def test_a_part_is_missing(self, parts, tmp_path):
        output = run("assemble", tmp_path / "model", *options(parts, "encoder"), fails=True)
        assert "--encoder" in output and "required" in output


class TestFit:
    @pytest.fixture(scope="class")
    @classmethod
    def misfits(cls, parts, tiny_2d_inverter, tiny_components, tmp_path_factory):
        """Folder of parts that do not fit, by name."""
        folder = tmp_path_factory.mktemp("misfits")
        auxiliary = load_component(AuxiliaryNetwork, parts["auxiliary"])
        loss = auxiliary.config.inner_loss
        encoder = load_component(LatentEncoder, parts["encoder"])
        elsewhere = LatentEncoder(**constructor_arguments(encoder))
        elsewhere.set_latent_statistics(torch.ones(16), torch.ones(16))
        networks = {
            "narrow-encoder": LatentEncoder(**constructor_arguments(encoder, w_dim=8)),
            "told-encoder": LatentEncoder(**constructor_arguments(encoder, identity_size=6)),
            "other-encoder": elsewhere,
            "large-discriminator": DualDiscriminator(image_size=64, channel_base=512, channel_max=16),
            "2d-auxiliary": tiny_2d_inverter.auxiliary,
            "lpips-auxiliary": AuxiliaryNetwork(
                **constructor_arguments(auxiliary, inner_loss={**loss, "perceptual": "lpips-vgg"})
            ),
            "heavy-auxiliary": AuxiliaryNetwork(
                **constructor_arguments(auxiliary, inner_loss={**loss, "weights": {**loss["weights"], "mse": 2.0}})
            ),
            "other-directions": LatentDirections.from_directions(
                [Direction("age", "interfacegan", torch.eye(16)[0], 1.0, -1.0, 1.0, 0.9, "")], "0" * 64
            ),
            "2d-generator": tiny_2d_inverter.generator,
        }
        for name, network in networks.items():
            network.save_pretrained(folder / name)
        return folder

    @pytest.mark.parametrize(
        ("part", "name", "match"),
        [
            ("encoder", "narrow-encoder", "the encoder's w_dim is 8, the generator's 16"),
            ("encoder", "told-encoder", "the encoder takes embeddings of length 6, the identity network's have "),
            ("encoder", "other-encoder", "the encoder was trained for another generator"),
            ("discriminator", "large-discriminator", "the discriminator's image_size is 64, the generator's 32"),
            ("auxiliary", "2d-auxiliary", "offsets for . layers that the generator does not have"),
            ("auxiliary", "lpips-auxiliary", "inner loss's perceptual lpips-vgg, here it is discriminator"),
            ("auxiliary", "heavy-auxiliary", "squared error weighed by 2"),
            ("directions", "other-directions", "found in another generator"),
            ("generator", "2d-generator", "2D generator has no use; the discriminator is a dual one"),
        ],
    )
    def test_misfits(self, parts, misfits, tmp_path, part, name, match):
        output = run("assemble", tmp_path / "model", *options(parts, **{part: misfits / name}), fails=True)
        assert re.search(match, output), output
        assert not list(tmp_path.iterdir())

    def test_a_folder_without_a_network(self, parts, tmp_path):
        output = run("assemble", tmp_path / "model", *options(parts, identity=tmp_path), fails=True)
        assert "there is no config.json" in output and not list(tmp_path.iterdir())


class TestAgain:
    @pytest.fixture
    def out(self, assembled, tmp_path):
        return shutil.copytree(assembled, tmp_path / "my-model")

    def test_only_if_asked_for(self, parts, out):
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        assert "--overwrite" in run("assemble", out, *options(parts), fails=True)
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def test_what_is_no_pipeline_stays(self, parts, tmp_path):
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "me.jpg").write_bytes(b"me")
        output = run("assemble", tmp_path / "photos", *options(parts), "--overwrite", fails=True)
        assert "something else than a pipeline" in output and (tmp_path / "photos" / "me.jpg").exists()

    def test_figures(self, parts, out, tmp_path):
        fingerprint = MetaAuxInverter.from_pretrained(out).fingerprint
        card = (out / "README.md").read_text()
        (out / "README.md").write_text(card.replace("## Data,", "Written by hand.\n\n## Data,"))
        (out / "docs").mkdir()
        (out / "docs" / "head.png").write_bytes(b"picture")
        path = tmp_path / "results.json"
        path.write_text(json.dumps(results_of(fingerprint)))
        run("assemble", out, "--overwrite", "--results", path)
        _, front, text = (out / "README.md").read_text().split("---\n", 2)
        assert "| metaaux | 0.0151 | 1.3000 | – | 0.900 | 0.500 |" in text and "Written by hand." in text
        assert text.index("## Figures") < len(text) and text.count("## Figures") == 1
        (index,) = yaml.safe_load(front)["model-index"]
        assert index["name"] == "my-model"
        metrics = {metric["type"]: metric["value"] for metric in index["results"][0]["metrics"]}
        assert metrics == {"mse": 0.0151, "perceptual": 1.3, "identity": 0.9, "seconds": 0.5}
        assert index["results"][0]["dataset"]["name"] == "4 portraits"
        assert (out / "docs" / "head.png").read_bytes() == b"picture"
        assert json.loads((out / "model_index.json").read_text())["weight_perceptual"] == 0.1

        # Another network: what was measured with the one before is not said of it.
        run("assemble", out, "--overwrite", "--encoder", parts["encoder"])
        _, front, text = (out / "README.md").read_text().split("---\n", 2)
        assert "0.0151" not in text and "model-index" not in yaml.safe_load(front) and "Written by hand." in text
        assert "## Cite" in text

    @pytest.mark.parametrize(
        ("results", "match"),
        [
            ({"fingerprint": "0" * 64}, "another generator"),
            ({"complete": False}, "not finished"),
            (None, "holds no results"),
        ],
    )
    def test_other_results(self, out, tmp_path, results, match):
        fingerprint = MetaAuxInverter.from_pretrained(out).fingerprint
        path = tmp_path / "results.json"
        path.write_text(json.dumps({} if results is None else results_of(fingerprint) | results))
        before = (out / "README.md").read_text()
        assert match in run("assemble", out, "--overwrite", "--results", path, fails=True)
        assert (out / "README.md").read_text() == before

    def test_gains_are_those_of_the_evaluation(self, out, face_zip, attribute_file, tmp_path):
        words = ("--attributes", attribute_file, "--limit", 1)
        run("evaluate", "editing", "--data", face_zip, "--model", out, "--out", tmp_path / "editing", *words)
        wanted = json.loads((tmp_path / "editing" / "results.json").read_text())["equal_gains"]
        output = run("assemble", out, "--overwrite", "--gains", face_zip, *words)
        inverter = MetaAuxInverter.from_pretrained(out)
        for name, gain in wanted.items():
            found = inverter.directions[name].gain
            if gain is not None and gain > 0:
                assert found == pytest.approx(gain, abs=0.006) and f"{name}: gain {found:g}" in output
            else:
                assert found == 1 and f"the direction {name} keeps its gain" in output


class TestPush:
    @pytest.fixture(scope="class")
    @classmethod
    def server(cls):
        server = LoopbackHub()
        yield server
        server.close()

    @pytest.fixture
    def hub(self, server, monkeypatch, tmp_path):
        server.reset()
        use_hub(monkeypatch, server, tmp_path / "cache")
        return server

    def test_there_and_back(self, hub, assembled):
        (assembled / "generator" / "notes.txt").write_text("mine")
        (assembled / "LICENSE.md").write_text("Terms.")
        output = run("push", assembled, REPO)
        (assembled / "generator" / "notes.txt").unlink()
        assert f"{hub.address}/{REPO}/commit/" in output
        files = hub.repositories[REPO]["main"]
        expected = {path.relative_to(assembled).as_posix() for path in assembled.rglob("*") if path.is_file()}
        assert set(files) == expected
        (assembled / "LICENSE.md").unlink()
        same = expected - {"README.md", "LICENSE.md"}
        assert all(files[name] == (assembled / name).read_bytes() for name in same)
        assert f'from_pretrained("{REPO}")' in files["README.md"].decode()
        loaded = MetaAuxInverter.from_pretrained(REPO)
        assert loaded.fingerprint == MetaAuxInverter.from_pretrained(assembled).fingerprint

    def test_one_variant_and_a_branch(self, hub, assembled):
        hub.repositories[REPO] = {"main": {"README.md": b"old"}}
        run("push", assembled, REPO, "--revision", "half", "--variant", "fp16")
        weights = [name for name in hub.repositories[REPO]["half"] if name.endswith(".safetensors")]
        assert len(weights) == 6 and all(".fp16." in name for name in weights)
        assert hub.repositories[REPO]["main"] == {"README.md": b"old"}

    def test_dry_run(self, hub, assembled):
        output = run("push", assembled, REPO, "--dry-run")
        assert "generator/diffusion_pytorch_model.safetensors" in output and f"{REPO}: 20 files" in output
        assert not hub.requests and not hub.repositories

    def test_damaged_folders_are_not_pushed(self, hub, assembled, tmp_path):
        folder = shutil.copytree(assembled, tmp_path / "damaged")
        path = folder / "encoder" / "diffusion_pytorch_model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        assert run("push", folder, REPO, fails=True)
        path.unlink()
        assert "lacks diffusion_pytorch_model.safetensors" in run("push", folder, REPO, fails=True)
        assert "form organisation/name" in run("push", assembled, "my-model", fails=True)
        (tmp_path / "empty").mkdir()
        assert "no model_index.json" in run("push", tmp_path / "empty", REPO, fails=True)
        assert not hub.repositories
