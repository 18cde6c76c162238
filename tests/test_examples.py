"""Examples in docstrings run as they stand; the pipeline is called as those of diffusers are."""

from __future__ import annotations

import doctest
import shutil
from pathlib import Path

import pytest
import torch

import metaaux.pipeline
from metaaux import MetaAuxInverter, MetaAuxInverterOutput

ROOT = Path(__file__).resolve().parent.parent


def test_docstring_examples(tmp_path, monkeypatch):
    """With the embedded checkpoint; the class's example makes the `inverter` of its methods'."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    globs: dict = {}
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    examples = sorted(finder.find(metaaux.pipeline, globs=globs), key=lambda test: test.name)
    found = [test.name.removeprefix("metaaux.pipeline.") for test in examples if test.examples]
    assert found == ["MetaAuxInverter", "MetaAuxInverter.__call__", "MetaAuxInverter.invert"]
    names: dict = {}
    for test in examples:
        test.globs.update(names)
        runner.run(test, clear_globs=False)
        names.update(test.globs)
    assert runner.summarize(verbose=False).failed == 0
    assert {"older.png", "turned.png", "me.safetensors"} <= {path.name for path in tmp_path.iterdir()}


class TestCall:
    def test_inverts_and_renders(self, tiny_inverter, tiny_inversion, crops, cameras):
        output = tiny_inverter(crops[1], steps=2, yaw=9, camera=cameras[1])
        assert isinstance(output, MetaAuxInverterOutput)
        assert torch.equal(output.inversion.w, tiny_inversion.w)
        assert output.images == [tiny_inverter.render(tiny_inversion, yaw=9)]
        images, inversion = tiny_inverter(crops[1], steps=2, yaw=9, camera=cameras[1], return_dict=False)
        assert images == output.images and inversion.steps[-1]["mse"] == output.inversion.steps[-1]["mse"]

    @pytest.mark.parametrize(
        ("options", "match"), [({"edits": {"hat": 1}}, "unknown edit 'hat'"), ({"yaw": 95}, "yaw must lie")]
    )
    def test_wrong_views_are_found_before_the_inversion(self, tiny_inverter, crops, cameras, options, match):
        seen = []
        with pytest.raises(ValueError, match=match):
            tiny_inverter(crops[0], camera=cameras[0], on_step=lambda *step: seen.append(step), **options)
        assert not seen

    def test_views_of_a_2d_model(self, tiny_2d_inverter, crops, cameras):
        assert len(tiny_2d_inverter(crops[0], steps=1, camera=cameras[0]).images) == 1
        with pytest.raises(ValueError, match="need a 3D generator"):
            tiny_2d_inverter(crops[0], steps=1, pitch=3, camera=cameras[0])


@pytest.mark.parametrize("kind", ["model_cpu", "sequential_cpu", "group"])
def test_offloading_is_refused_in_words(tiny_folder, crops, cameras, kind):
    inverter = MetaAuxInverter.from_pretrained(tiny_folder)
    inverter.set_progress_bar_config(disable=True)
    with pytest.raises(NotImplementedError, match=r"through all of them.*\.to\(device\)"):
        getattr(inverter, f"enable_{kind}_offload")()
    assert not any(
        hasattr(module, "_hf_hook") for part in inverter.components.values() if part for module in part.modules()
    )
    assert inverter.invert(crops[0], steps=0, camera=cameras[0]).steps  # nothing has been hooked
