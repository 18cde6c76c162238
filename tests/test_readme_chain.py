"""README's chain of trainings, as written there, at a size of seconds: photos to a model that inverts."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from tests.conftest import TINY_AUXILIARY, TINY_ENCODER

pytest.importorskip("mediapipe")

ROOT = Path(__file__).resolve().parent.parent
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Study it\n")[1].split("\n## ")[0]
PUT_TOGETHER = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").split("\n## Put together\n")[1]
SHORT = {"run.total_images": 4, "run.interval_images": 4, "run.trackers": []}
#: In place of the configurations' sizes and lengths; nothing that says where a part reads from.
TINY = {
    "generator": SHORT
    | {
        "generator": {
            "z_dim": 16,
            "w_dim": 16,
            "image_size": 32,
            "plane_resolution": 16,
            "channel_base": 256,
            "channel_max": 8,
            "neural_resolution": 16,
            "depth_samples": 4,
            "importance_samples": 4,
            "super_resolution_kind": "2X",
            "super_resolution_channels": [16, 8],
        },
        "discriminator": {"image_size": 32, "channel_base": 256, "channel_max": 8, "raw_size": 16},
        "rays": [[0, 8]],
        "batch": 2,
    },
    "identity": SHORT
    | {
        "identity": {
            "input_size": 16,
            "stem_width": 16,
            "widths": [16, 16, 16, 16],
            "depths": [1, 1, 1, 1],
            "embedding_dim": 16,
        },
        "batch": {"samples": 1, "photos": 1},
        "resolution": 8,
    },
    "encoder": SHORT
    | {
        "encoder": {key: list(v) if isinstance(v, tuple) else v for key, v in TINY_ENCODER.items()}
        | {"input_size": 32},
        "batch": {"photos": 2, "samples": 2, "rendered_samples": 1},
        "curriculum": {"latent_only_images": 0, "coarse_resolution": 8},
    },
    "plain": SHORT
    | {
        "auxiliary.arguments": {key: list(v) if isinstance(v, tuple) else v for key, v in TINY_AUXILIARY.items()}
        | {"offset_resolution": 8, "offset_channels": 8, "offset_image_features": 4, "camera_channels": 8},
        "batch": 2,
        "inner.steps": 1,
        "inner.tasks_per_pass": 1,
        "validation_photos": 1,
    },
    "meta": SHORT
    | {
        "auxiliary.offset_bias_resolution": 16,
        "auxiliary.full_kernel_layers": ["backbone.b8."],
        "batch": 2,
        "inner.steps": 1,
        "inner.tasks_per_pass": 1,
        "validation_photos": 1,
    },
    "directions": {
        "sampling.heads": 8,
        "sampling.shard": 8,
        "sampling.batch": 8,
        "sampling.workers": 1,
        "components": 2,
        "calibration.heads": 2,
    },
}


def commands_of(text):
    """Words of the commands of a text's first block, without `python -m metaaux`."""
    block = re.search(r"```bash\n(.*?)```", text, re.DOTALL)[1].replace("\\\n", " ")
    return [shlex.split(line, comments=True)[3:] for line in block.splitlines()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no direction:UserWarning")
@pytest.mark.filterwarnings("error:the auxiliary network's inner learning rates")
def test_the_chain_runs_as_written(tmp_path, monkeypatch):
    from metaaux import MetaAuxInverter
    from metaaux.cli import app

    shutil.copytree(ROOT / "metaaux" / "configs", tmp_path / "metaaux" / "configs")
    for folder in ("photos", "held-out", "data"):
        (tmp_path / folder).mkdir()
    for photo in ("eileen_collins.jpg", "grace_hopper.jpg"):
        shutil.copy(ROOT / "examples" / photo, tmp_path / "photos")
    shutil.copy(ROOT / "examples" / "grace_hopper.jpg", tmp_path / "held-out")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("metaaux.training.generator.GeneratorTrainer.HEADS", 2)
    monkeypatch.setattr("metaaux.training.identity.IdentityTrainer.EVALUATED", 50)
    monkeypatch.setattr("metaaux.training.encoder.EncoderEvaluation.SAMPLES", 2)

    commands = commands_of(SECTION)
    trained = [Path(command[-1]).stem for command in commands if command[0] == "train"]
    assert trained == list(TINY) and len(commands) == 8
    for command in commands:
        overrides = []
        if command[0] == "train":
            for key, value in TINY[Path(command[-1]).stem].items():
                overrides += ["--set", f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()}"]
        result = CliRunner().invoke(app, [*command, *overrides], catch_exceptions=False)
        assert result.exit_code == 0, result.output

    (assemble,) = [command for command in commands_of(PUT_TOGETHER) if command[0] == "assemble"]
    result = CliRunner().invoke(app, assemble, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    inverter = MetaAuxInverter.from_pretrained(tmp_path / assemble[1])
    assert inverter.auxiliary.config.offset_bias_resolution == 16
    weights = yaml.safe_load((ROOT / "metaaux" / "configs" / "mini" / "meta.yaml").read_text())["inner"]["loss"]
    assert inverter.config.weight_perceptual == weights["perceptual"]
    inverter.set_progress_bar_config(disable=True)
    inversion = inverter.invert(tmp_path / "photos" / "eileen_collins.jpg", steps=1)
    assert [step["step"] for step in inversion.steps] == [-1, 0, 1]
    assert all(torch.isfinite(torch.tensor(list(step.values()))).all() for step in inversion.steps)
    assert inverter.render(inversion, yaw=10, edits={"pc1": 1}).size == (32, 32)

    # A second start does not touch what is there.
    config = ["--config", "metaaux/configs/mini/generator.yaml"]
    with pytest.raises(FileExistsError, match="mini-generator holds a run already"):
        CliRunner().invoke(app, ["train", "generator", *config], catch_exceptions=False)
