"""What measures training at full size, at tiny size."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

from metaaux.cli import app
from metaaux.data.dataset import FaceDataset
from metaaux.evaluation.full_size import (
    PAPER_PHASES,
    TrainingBenchmark,
    _bring_to_life,
    gpu_hours,
    run_training_benchmark,
    write_synthetic_photos,
)
from metaaux.hub.loading import embedded_model_folder
from metaaux.models.auxiliary import AuxiliaryNetwork
from metaaux.training.auxiliary import AuxiliaryConfig
from metaaux.training.settings import load_settings
from tests.conftest import TINY_AUXILIARY
from tests.test_training_settings import CONFIGS


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The shipped configurations, for a generator that has fewer layers, of few inner steps, without workers."""
    folder = tmp_path_factory.mktemp("configs")
    for name in PAPER_PHASES:
        values = yaml.safe_load((CONFIGS / "ffhq" / f"{name}.yaml").read_text(encoding="utf-8"))
        values["data"]["workers"] = 0
        if "inner" in values:
            values["inner"]["steps"] = 1
        if name == "meta-extended":
            values["auxiliary"] |= {"full_kernel_layers": ["backbone.b8"], "offset_bias_resolution": 16}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture(scope="module")
def shape(tiny_folder, tmp_path_factory):
    """Folder of the tiny pipeline's configurations, without weights."""
    folder = tmp_path_factory.mktemp("shape") / "tiny"
    return shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))


def settings(model, configs, **changes) -> TrainingBenchmark:
    return TrainingBenchmark(**{"model": model, "configs": configs, "steps": 1, "warmup": 1, "batch": 2} | changes)


@pytest.fixture(scope="module")
def measured(shape, configs, tmp_path_factory):
    """File and result of all phases."""
    out = tmp_path_factory.mktemp("benchmark") / "full-size.json"
    return out, run_training_benchmark(settings(shape, configs), out, allocations=True)


def test_every_phase_is_measured(measured):
    out, results = measured
    assert results == json.loads(out.read_text()) and list(results["phases"]) == list(PAPER_PHASES)
    assert results["weights"] == "random" and results["image_size"] == 32
    for name, figures in results["phases"].items():
        assert figures["finite"] and figures["nonfinite_gradients"] == 0, name
        assert figures["steps"] == 1 and figures["warmup"] == 1 and figures["batch"] == (4 if name == "encoder" else 2)
        assert figures["per_second"] == pytest.approx(figures["batch"] / figures["seconds"])
        assert figures["gpu_hours"] == pytest.approx(figures["total"] / figures["per_second"] / 3600)
        assert figures["unit"] == ("tasks" if name.startswith("meta") else "images")
        assert len(figures["loss"]) == 2 and figures["loss"][0] != figures["loss"][1]
        assert figures["allocations"] is None  # without a GPU
        assert figures["config"]["data"]["in_memory"] is False and "metaaux-" not in json.dumps(figures)
    assert results["phases"]["meta-paper"]["config"]["inner"]["order"] == "second"
    assert results["phases"]["meta-paper"]["total"] == 80_000
    # Random networks bear no steps of trained networks' size.
    assert results["phases"]["meta-paper"]["config"]["inner"]["calibrate_rates"] == 1e-7


def test_features_of_a_deep_random_network_keep_their_size():
    """As those of one that was trained."""
    torch.manual_seed(0)
    arguments = TINY_AUXILIARY | {"backbone_depths": (6, 6, 6, 6)}
    auxiliary = AuxiliaryNetwork({"a": (4, 4)}, image_size=64, use_offset_planes=False, **arguments)
    image = torch.rand(8, 3, 64, 64) * 2 - 1

    @torch.no_grad()
    def size(network):
        return network.backbone(image).feature_maps[-1].std().item()

    before, trained = size(auxiliary.eval()), size(auxiliary.train())
    _bring_to_life(auxiliary, image)
    assert before > 100 and size(auxiliary) == pytest.approx(trained, rel=0.3)
    layers = [module for module in auxiliary.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert all(layer.momentum == 0.1 and not layer.training for layer in layers)
    # And none is without gradient for the reason that what follows it is zero.
    assert all(parameter.any() for parameter in auxiliary.adaptable_parameters().values())


def test_hours_of_a_whole_training_are_those_of_its_phases(measured):
    phases = measured[1]["phases"]
    shared = phases["encoder"]["gpu_hours"] + phases["plain"]["gpu_hours"]
    expected = {preset: shared + phases[f"meta-{preset}"]["gpu_hours"] for preset in ("paper", "extended")}
    assert measured[1]["gpu_hours"] == pytest.approx(expected)
    assert gpu_hours({"encoder": phases["encoder"]}) == {"paper": None, "extended": None}


def test_a_phase_that_fails_is_told_and_the_others_go_on(tiny_folder, configs, tmp_path, monkeypatch):
    def exhausted(self, images):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 60 GiB")

    out, command = tmp_path / "figures.json", ["benchmark-training", "--model", str(tiny_folder)]
    command += ["--configs", str(configs), "--out", str(out), "--steps", "1", "--warmup", "0", "--batch", "2"]
    with monkeypatch.context() as patch:
        patch.setattr("metaaux.training.meta.MetaTrainer.step", exhausted)
        result = CliRunner().invoke(app, [*command, "--phases", "meta-extended,plain"])
    assert (
        result.exit_code == 1 and "meta-extended  failed: OutOfMemoryError: CUDA out of memory. Tri" in result.output
    )
    phases = json.loads(out.read_text())["phases"]
    assert phases["meta-extended"] == {"error": "OutOfMemoryError: CUDA out of memory. Tried to allocate 60 GiB"}
    assert phases["plain"]["finite"]

    # Measured again, it takes the failure's place, and what the file has besides stays.
    result = CliRunner().invoke(app, [*command, "--phases", "meta-extended"])
    assert result.exit_code == 0 and "tasks/s" in result.output
    again = json.loads(out.read_text())["phases"]
    assert again["plain"] == phases["plain"] and again["meta-extended"]["finite"]
    assert again["meta-extended"]["config"]["inner"]["calibrate_rates"] > 1e-7  # this model has weights


def test_weights_that_are_lost_are_told(tiny_folder, configs, tmp_path, monkeypatch):
    def lost(self, images):
        self.auxiliary.log_inner_rates.data.fill_(math.nan)
        return {"total": torch.tensor(math.inf)}

    monkeypatch.setattr("metaaux.training.plain.PlainTrainer.step", lost)
    out = tmp_path / "figures.json"
    figures = run_training_benchmark(settings(tiny_folder, configs, phases=["plain"]), out)["phases"]["plain"]
    assert figures["finite"] is False and figures["loss"] == [None, None]


def test_figures_of_another_model_are_not_mixed(measured, shape, configs, tmp_path):
    out = tmp_path / "figures.json"
    out.write_text(json.dumps(measured[1] | {"model": "another", "device": "NVIDIA H100"}))
    with pytest.raises(ValueError, match="holds figures of another device, model: choose another file"):
        run_training_benchmark(settings(shape, configs, phases=["plain"]), out)


def test_wrong_settings(tiny_folder, configs):
    for wrong, message in (
        ({"phases": ["plane"]}, "unknown phases plane; a phase's configuration has a name that begins with generator"),
        ({"overrides": ["meta.batch=1"]}, "'meta.batch=1' is not of the form PHASE.KEY=VALUE with one of encoder"),
        ({"steps": 0}, "least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(tiny_folder, configs, **wrong)


def test_synthetic_photos_are_an_eg3d_data_set(tmp_path):
    write_synthetic_photos(tmp_path / "a.zip", 32, 3)
    dataset = FaceDataset(tmp_path / "a.zip", 32)
    assert dataset.load().shape == (3, 3, 32, 32) and len(dataset.cameras.unique(dim=0)) == 3


def test_the_papers_shape_comes_with_the_package():
    folder = embedded_model_folder("metaaux-ffhq")
    assert not list(folder.rglob("*.safetensors"))
    generator = json.loads((folder / "generator" / "config.json").read_text())
    assert (generator["image_size"], generator["neural_resolution"]) == (512, 128)


def commands_of(name: str) -> list[list[str]]:
    """The commands of a page of docs/, as words."""
    blocks = re.findall(r"```bash\n(.*?)```", (CONFIGS.parents[1] / "docs" / name).read_text(encoding="utf-8"), re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line]


def test_launch_lines_are_accelerates():
    """And what they launch are commands of this package, with settings that their batch and processes fit."""
    from accelerate.commands.launch import launch_command_parser

    commands = commands_of("scaling.md")
    launched = [launch_command_parser().parse_args(words[2:]) for words in commands if words[0] == "accelerate"]
    assert {(line.num_machines, line.machine_rank) for line in launched} >= {(2, 0), (2, 1)}
    for line in launched:
        assert line.module and line.training_script == "metaaux"
        check_command(line.training_script_args)
        if line.training_script_args[0] == "train":
            words = line.training_script_args
            overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
            config = load_settings(AuxiliaryConfig, CONFIGS.parents[1] / words[words.index("--config") + 1], overrides)
            assert words[1] == "auxiliary" and config.batch % line.num_processes == 0


def test_commands_without_a_launcher():
    plain = [words for words in commands_of("scaling.md") if words[0] != "accelerate"]
    for words in commands_of("full-size.md") + plain:
        assert words[:3] == ["python", "-m", "metaaux"]
        check_command(words[3:])


def check_command(words: list[str]) -> None:
    """That a command and its options exist."""
    command = typer.main.get_command(app).commands[words[0]]
    command = getattr(command, "commands", {}).get(words[1], command)
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known
