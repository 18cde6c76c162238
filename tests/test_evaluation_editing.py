"""Table 2: changes of attributes by edits, and their bookkeeping."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import IMAGE_SIZE

from metaaux import MetaAuxInverter
from metaaux.baselines import MethodOptions, make_methods
from metaaux.cli import main
from metaaux.evaluation.editing import ALPHAS, EditingEvaluation, _changes, _curves
from metaaux.evaluation.photos import open_photos
from metaaux.models.age_gender import AgeGenderNetwork
from metaaux.models.directions import Direction, LatentDirections


@pytest.fixture(scope="module")
def directed_inverter(tiny_components):
    """The tiny pipeline with directions of age (short) and gender (long)."""
    normals = F.normalize(torch.randn(2, 16, generator=torch.Generator().manual_seed(3)), dim=1)
    directions = [
        Direction(name, "interfacegan", normal, scale, -3.0, 3.0, 0.9, "")
        for name, normal, scale in (("age", normals[0], 0.5), ("gender", normals[1], 2.0))
    ]
    return MetaAuxInverter(**tiny_components, latent_directions=LatentDirections.from_directions(directions).eval())


def make_evaluation(inverter, face_zip, attribute_file, folder, names=("encoder", "metaaux"), limit=None, **options):
    methods = make_methods(list(names), inverter, MethodOptions(steps=1))
    photos = open_photos(face_zip, IMAGE_SIZE, limit=limit)
    network = AgeGenderNetwork.from_file(attribute_file)
    return EditingEvaluation(inverter, methods, photos, network, folder, progress=False, **options)


def test_results_are_mean_changes(directed_inverter, face_zip, attribute_file, tmp_path):
    evaluation = make_evaluation(directed_inverter, face_zip, attribute_file, tmp_path)
    evaluation.run()
    results = evaluation.summarize()
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert results["methods"].keys() == {"encoder", "metaaux"} and results["complete"]
    for figures in results["methods"].values():
        assert figures.keys() == {"age", "gender"}
        assert all(list(changes) == [str(alpha) for alpha in ALPHAS] for changes in figures.values())

    network, generator = AgeGenderNetwork.from_file(attribute_file), directed_inverter.generator
    photos = open_photos(face_zip, IMAGE_SIZE)
    age = directed_inverter.directions["age"]
    changes = []
    for index in range(3):
        photo = photos[index]
        w, camera = directed_inverter.encoder(photo.image[None]), photo.camera[None]
        edited = generator.synthesize(w + 2 * 0.5 * age.normal, camera).image
        changes.append(network(edited)[0] - network(generator.synthesize(w, camera).image)[0])
    assert results["methods"]["encoder"]["age"]["2"] == pytest.approx(torch.cat(changes).mean().item(), rel=1e-3)

    details = results["details"]["encoder"]
    assert (details["n"], details["failed"]) == (3, 0)
    assert all(-1 <= details["identity"]["gender"][str(alpha)] < 1 for alpha in ALPHAS)
    assert 0 <= details["monotone"]["age"] <= 1
    # With random weights an edit changes the whole picture, the longer one more.
    moved = [details["background"][name]["3"] for name in ("age", "gender")]
    assert 0 < moved[0] < moved[1] < 1
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "| Edit | encoder (W) | Ours |" and lines[2].startswith("| age -3 | ")


def test_gain_is_for_adapted_heads(tiny_components, directed_inverter, face_zip, attribute_file, tmp_path):
    gained = LatentDirections.from_directions([replace(d, gain=2.0) for d in directed_inverter.directions.values()])
    found = {}
    for name, component in (("plain", directed_inverter.latent_directions), ("gained", gained)):
        inverter = MetaAuxInverter(**tiny_components, latent_directions=component.eval())
        evaluation = make_evaluation(inverter, face_zip, attribute_file, tmp_path / name, limit=1)
        evaluation.run()
        results = evaluation.summarize()
        found[name] = results["methods"]
        gain = inverter.directions["age"].gain
        assert results["directions"]["age"]["gain"] == gain
        encoder, ours = (found[name][m]["age"]["3"] - found[name][m]["age"]["-3"] for m in ("encoder", "metaaux"))
        assert results["equal_gains"]["age"] == pytest.approx(gain * encoder / ours)
    assert found["gained"]["encoder"] == found["plain"]["encoder"]
    assert found["gained"]["metaaux"]["age"]["1"] == pytest.approx(found["plain"]["metaaux"]["age"]["2"], rel=1e-3)


def test_shards_and_resumption(directed_inverter, face_zip, attribute_file, tmp_path):
    whole = make_evaluation(directed_inverter, face_zip, attribute_file, tmp_path / "whole", ["encoder"])
    whole.run()
    for shard in ((1, 2), (2, 2), (2, 2)):
        folder = tmp_path / "parts"
        part = make_evaluation(directed_inverter, face_zip, attribute_file, folder, ["encoder"], shard=shard)
        part.run()
    assert part.summarize()["methods"] == whole.summarize()["methods"]
    lines = [path.read_text().count("\n") for path in (tmp_path / "parts" / "records").iterdir()]
    assert sorted(lines) == [1, 2]


def test_landmarks(directed_inverter, face_zip, attribute_file, tmp_path):
    with pytest.raises(ValueError, match="landmarks do not measure .'age'"):
        make_evaluation(directed_inverter, face_zip, attribute_file, tmp_path, measures=["age"])
    with pytest.raises(ValueError, match="no direction for .'smile'"):
        make_evaluation(directed_inverter, face_zip, attribute_file, tmp_path, measures=["smile"])
    normal = F.normalize(torch.ones(16), dim=0)
    known = [*directed_inverter.directions.values(), Direction("smile", "interfacegan", normal, 1.0, -3, 3, None, "")]
    components = directed_inverter.components | {"latent_directions": LatentDirections.from_directions(known).eval()}
    inverter = MetaAuxInverter(**components)
    evaluation = make_evaluation(inverter, face_zip, attribute_file, tmp_path, ["encoder"], 1, measures=["smile"])
    evaluation.run()
    results = evaluation.summarize()
    assert results["methods"]["encoder"].keys() == {"age", "gender"}
    # A tiny generator with random weights shows no face.
    assert results["details"]["encoder"]["measures"]["smile"] == {"change": dict.fromkeys(map(str, ALPHAS)), "n": 0}
    assert results["details"]["encoder"]["monotone"]["smile"] is None


def test_means_and_monotone_share(tmp_path):
    rising, falling = ({str(a): sign * a for a in (*ALPHAS, 0)} for sign in (1.0, -2.0))
    records = [{"values": {"age": values}} for values in (rising, rising, falling, rising | {"2": None})]
    curves = _curves(records, "age")
    assert curves.shape == (3, 7)
    assert _changes(curves) == {str(alpha): pytest.approx(0.0) for alpha in ALPHAS}
    assert _changes(curves[:2])["-3"] == -3


def test_checkpoint_without_directions(tiny_inverter, face_zip, attribute_file, tmp_path):
    with pytest.raises(ValueError, match="no direction for .'age', 'gender'.*train directions"):
        make_evaluation(tiny_inverter, face_zip, attribute_file, tmp_path)


def test_command(directed_inverter, face_zip, attribute_file, tmp_path, monkeypatch, capsys):
    directed_inverter.save_pretrained(tmp_path / "model")
    arguments = [
        "--data",
        face_zip,
        "--attributes",
        attribute_file,
        "--methods",
        "encoder",
        "--limit",
        1,
        "--model",
        tmp_path / "model",
        "--device",
        "cpu",
        "--out",
        tmp_path / "out",
    ]
    monkeypatch.setattr(sys, "argv", ["metaaux", "evaluate", "editing", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["details"]["encoder"]["n"] == 1
    assert "| gender 3 | " in capsys.readouterr().out
