"""The benchmark: what it writes, that it changes nothing, that random weights are flagged."""

from __future__ import annotations

import copy
import json
import shutil
import sys

import pytest
import torch

from metaaux.cli import main
from metaaux.evaluation.benchmark import _seconds, _Work, load_for_benchmark, run_benchmark

MEASURES = {"synthesis", "cached_view", "adaptation", "adaptation_step", "tuning_step"}


def test_figures(tiny_inverter):
    before = {name: p.clone() for name, p in tiny_inverter.generator.state_dict().items()}
    figures = run_benchmark(tiny_inverter, steps=2, repeats=4, warmup=1)
    assert set(figures["measures"]) == MEASURES
    for name, measure in figures["measures"].items():
        assert 0 < measure["min_ms"] <= measure["median_ms"] <= measure["max_ms"], name
    assert figures["measures"]["synthesis"]["repeats"] == 4
    assert figures["measures"]["adaptation"]["repeats"] == 1
    assert figures["measures"]["adaptation_step"]["repeats"] == 2
    assert figures["measures"]["adaptation"]["median_ms"] > figures["measures"]["adaptation_step"]["median_ms"]
    assert (figures["weights"], figures["dtype"], figures["device"]) == ("trained", "float32", "cpu")
    assert figures["fingerprint"] == tiny_inverter.fingerprint
    after = tiny_inverter.generator.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(p.requires_grad for p in tiny_inverter.generator.parameters())


def test_a_tuning_step_is_timed_without_the_copy_that_it_works_on(tiny_inverter, monkeypatch):
    before = [p.clone() for p in tiny_inverter.generator.parameters()]
    work = _Work(tiny_inverter, steps=1, random_weights=False)
    monkeypatch.setattr(copy, "deepcopy", None)
    work.tuning_step()
    changed = [not torch.equal(a, b) for a, b in zip(before, work.tuned.parameters(), strict=True)]
    assert sum(changed) > len(changed) / 2
    assert all(torch.equal(a, b) for a, b in zip(before, tiny_inverter.generator.parameters(), strict=True))


def test_seconds_are_measured():
    import time

    assert _seconds(lambda: time.sleep(0.02), torch.device("cpu")) >= 0.02


@pytest.fixture
def configurations(tiny_folder, tmp_path):
    """The tiny pipeline's folder without weights."""
    folder = tmp_path / "configurations"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_configuration_folder(configurations, tiny_inverter, tmp_path, monkeypatch, capsys):
    out = tmp_path / "figures.json"
    options = {"out": out, "model": configurations, "device": "cpu", "repeats": 1, "warmup": 1, "steps": 1}
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["metaaux", "benchmark", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
        sys.exit(0)
    assert not stopped.value.code
    figures = json.loads(out.read_text())
    assert figures["weights"] == "random" and figures["steps"] == 1 and set(figures["measures"]) == MEASURES
    assert figures["fingerprint"] != tiny_inverter.fingerprint
    printed = capsys.readouterr().out
    assert "weights are random" in printed and "synthesis" in printed


def test_random_weights_are_the_same_each_time(configurations):
    state = torch.random.get_rng_state()
    first, random_weights = load_for_benchmark(str(configurations), "cpu")
    second, _ = load_for_benchmark(str(configurations), "cpu")
    assert random_weights and first.fingerprint == second.fingerprint
    assert torch.equal(torch.random.get_rng_state(), state)


def test_precision(configurations, tiny_folder):
    for folder in (configurations, tiny_folder):
        inverter, _ = load_for_benchmark(str(folder), "cpu", torch.bfloat16)
        assert inverter.generator.dtype == inverter.discriminator.dtype == torch.bfloat16
        assert inverter.encoder.dtype == inverter.auxiliary.dtype == torch.float32


def test_unknown_device(configurations):
    with pytest.raises(ValueError, match="the device 'abacus' cannot be used"):
        load_for_benchmark(str(configurations), "abacus")
