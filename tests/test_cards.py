"""The cards of hub_configs: metadata as the Hub reads it, and figures that are those of docs/results."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from metaaux.hub.card import updated_card
from metaaux.hub.figures import figures_of
from metaaux.hub.publishing import files_to_push
from metaaux.models.auxiliary import AuxiliaryNetwork
from metaaux.models.presets import preset_of
from tests.conftest import ROOT

FOLDERS = {folder.name: folder for folder in sorted((ROOT / "hub_configs").iterdir())}
CARDS = {name: (folder / "README.md").read_text(encoding="utf-8") for name, folder in FOLDERS.items()}
MINI, FFHQ = CARDS["metaaux-mini"], CARDS["metaaux-ffhq"]


def config_of(model, component):
    return json.loads((FOLDERS[model] / component / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def figures():
    """docs/figures.py."""
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestMetadata:
    @pytest.mark.parametrize("name", CARDS)
    def test_is_what_the_hub_would_write(self, name):
        front = CARDS[name].split("---\n")[1]
        data = ModelCard(CARDS[name]).data
        assert yaml.safe_load(front) == yaml.safe_load(data.to_yaml())
        assert data.library_name == "diffusers" and data.pipeline_tag == "image-to-3d" and data.language == "en"
        assert {"3d-gan-inversion", "eg3d", "faces", "meta-learning", "metaaux"} <= set(data.tags)

    def test_licences(self):
        mini, ffhq = ModelCard(MINI).data, ModelCard(FFHQ).data
        assert (mini.license, mini.license_name) == ("other", "research-and-demonstration")
        licence = (FOLDERS["metaaux-mini"] / mini.license_link).read_text(encoding="utf-8")
        sources = [line for line in licence.splitlines() if line.startswith("| ")]
        assert len(sources) == 12 and all(line in MINI for line in sources)
        assert ffhq.license == "apache-2.0" and ffhq.eval_results is None
        assert "**This repository holds no weights.**" in FFHQ

    def test_thumbnail_is_the_picture_shown(self):
        thumbnail = ModelCard(MINI).data.thumbnail
        assert (FOLDERS["metaaux-mini"] / thumbnail).is_file() and f"]({thumbnail})" in MINI

    def test_what_it_links_to_is_pushed_with_it(self):
        pushed = set(files_to_push(FOLDERS["metaaux-mini"]))
        linked = {link for link in re.findall(r"\]\((?!https?:|#)([^)]+)\)", MINI)}
        assert linked and {"README.md", *linked} <= pushed

    def test_survives_publishing(self):
        published = ModelCard(updated_card(ModelCard(MINI), "org/name", None, None, ["portraits"], None)).data
        before = ModelCard(MINI).data
        assert published.tags == [*before.tags, "portraits"]
        for name in ("license", "license_name", "license_link", "thumbnail", "eval_results", "model_name"):
            assert getattr(published, name) == getattr(before, name) is not None


class TestFigures:
    def test_pages_agree_with_the_results(self, figures):
        for page in figures.PAGES:
            assert figures.updated(page) == page.read_text(encoding="utf-8"), (
                f"the figures in {page.name} are not those of docs/results: run python docs/figures.py"
            )

    def test_model_index(self):
        results = json.loads((ROOT / "docs" / "results" / "table1.json").read_text())
        found = {result.metric_type: result.metric_value for result in ModelCard(MINI).data.eval_results}
        assert {"mse", "perceptual", "frechet", "identity", "distance"} <= found.keys()
        assert found == {name: pytest.approx(figures_of(results, "metaaux")[name], rel=1e-3) for name in found}

    def test_results_are_of_the_embedded_checkpoint(self):
        fingerprint = config_of("metaaux-mini", "latent_directions")["generator"]
        for path in (ROOT / "docs" / "results").glob("table*.json"):
            assert json.loads(path.read_text())["fingerprint"] == fingerprint, f"{path.name} is of another checkpoint"

    def test_a_table_follows_its_results(self, figures, monkeypatch):
        read = {name: figures.read(name) for name in ("128/table1", "128/table3")}
        read["128/table3"]["methods"]["without_3d"]["mse"] = 0.0012
        monkeypatch.setattr(figures, "read", read.get)
        text = "before\n<!-- figures: 128/table3 -->\nold\n<!-- end of figures -->\nafter\n"
        lines = figures.with_tables(text).splitlines()
        assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
        (row,) = [line for line in lines if line.startswith("| without 3D module |")]
        assert row.startswith("| without 3D module | **0.0012** | 1.653 |")
        with pytest.raises(KeyError, match="table9"):
            figures.with_tables(text.replace("table3", "table9"))


class TestStatements:
    """What the cards say of the networks beside them."""

    def test_size_of_pictures(self):
        size = config_of("metaaux-mini", "generator")["image_size"]
        assert re.search(r"its pictures are small \((\d+) x (\d+) pixels\)", MINI).groups() == (str(size), str(size))
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        assert int(re.search(r"pictures are (\d+) pixels wide", readme)[1]) == size

    @pytest.mark.parametrize("name", CARDS)
    def test_preset(self, name):
        with torch.device("meta"):
            network = AuxiliaryNetwork.from_config(config_of(name, "auxiliary"))
        assert re.findall(r"preset `(\w+)`", CARDS[name]) == [preset_of(network)]

    def test_parameters_of_the_full_size(self):
        index = json.loads((FOLDERS["metaaux-ffhq"] / "model_index.json").read_text())
        components = {name: value for name, value in index.items() if isinstance(value, list) and value[0]}
        stated = dict(re.findall(r"^\| `(\w+)` \|.*\| ([\d.]+) M \|$", FFHQ, re.MULTILINE))
        assert stated.keys() == components.keys()
        for name, (module, cls) in components.items():
            with torch.device("meta"):
                network = getattr(importlib.import_module(module), cls).from_config(config_of("metaaux-ffhq", name))
            assert f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f}" == stated[name], name
