"""The benchmark: what it writes, that it changes nothing, that random weights are flagged."""

from __future__ import annotations

import copy
import importlib
import json
import shutil
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils import cpp_extension

from metaaux.cli import main
from metaaux.evaluation.benchmark import Work, load_for_benchmark, run_benchmark, seconds_of
from metaaux.evaluation.counting import count, covered
from metaaux.evaluation.official import official_arguments, run_official
from metaaux.evaluation.official_worker import built_modules_by_name
from metaaux.evaluation.paired import PairedSettings, run_paired
from metaaux.evaluation.sweep import run_sweep, run_threads
from metaaux.models.eg3d import EG3DGenerator

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


def test_counts(tiny_inverter):
    """Operations of a product and a convolution by hand; those of a step are what one more of them adds."""
    a, x, kernels = torch.rand(3, 4), torch.rand(1, 2, 6, 6), torch.rand(5, 2, 3, 3)

    def function():
        return (a @ a.t()).view(9), torch.nn.functional.conv2d(x, kernels)

    result = count(function, torch.device("cpu"))
    assert result["flops"] == 2 * 3 * 3 * 4 + 2 * 5 * 4 * 4 * 2 * 9
    assert result["operators"] == 2
    assert result["bytes"] == 4 * (12 + 12 + 9 + 72 + 90 + 80)
    assert result["h100_floor_ms"]["float32"] == pytest.approx(result["flops"] / 67e12 * 1e3)
    measures = run_benchmark(tiny_inverter, steps=1, repeats=1, warmup=1, counts=True)["measures"]
    counts = {name: measure["count"] for name, measure in measures.items()}
    for key in ("flops", "bytes", "operators"):
        assert 0 < counts["cached_view"][key] < counts["synthesis"][key] < counts["adaptation_step"][key], key
        assert counts["adaptation_step"][key] < counts["adaptation"][key], key


def test_against_another_revision(tiny_folder, tmp_path):
    """Here the other one is a copy of this one whose cached views wait for what can be told from noise."""
    root = Path(__file__).resolve().parents[1]
    for name in ("metaaux", "hub_configs"):
        (tmp_path / name).mkdir()
        for part in (root / name).iterdir():
            (tmp_path / name / part.name).symlink_to(part)
    (tmp_path / "metaaux" / "evaluation").unlink()
    (tmp_path / "metaaux" / "evaluation").mkdir()
    for part in (root / "metaaux" / "evaluation").glob("*.py"):
        text = part.read_text(encoding="utf-8")
        slow = text.replace("def cached_view(self) -> None:", "def cached_view(self) -> None:\n        time.sleep(1)")
        assert (slow != text) == (part.name == "benchmark.py")
        text = slow.replace("import statistics\n", "import statistics\nimport time\n")
        (tmp_path / "metaaux" / "evaluation" / part.name).write_text(text, encoding="utf-8")
    pairs = run_paired(tmp_path, PairedSettings(str(tiny_folder), "cpu", steps=1, threads=1), repeats=1, warmup=0)
    assert set(pairs) == MEASURES
    view = pairs["cached_view"]
    assert view["other_median_ms"] > 1000 and view["repeats"] == 1
    assert view["speedup"] == pytest.approx(view["other_median_ms"] / view["median_ms"])
    with pytest.raises(ValueError, match="holds no checkout of metaaux"):
        run_paired(tmp_path / "hub_configs", PairedSettings())


def test_a_tuning_step_is_timed_without_the_copy_that_it_works_on(tiny_inverter, monkeypatch):
    before = [p.clone() for p in tiny_inverter.generator.parameters()]
    work = Work(tiny_inverter, steps=1, random_weights=False)
    monkeypatch.setattr(copy, "deepcopy", None)
    work.tuning_step()
    changed = [not torch.equal(a, b) for a, b in zip(before, work.tuned.parameters(), strict=True)]
    assert sum(changed) > len(changed) / 2
    assert all(torch.equal(a, b) for a, b in zip(before, tiny_inverter.generator.parameters(), strict=True))


def test_seconds_are_measured():
    import time

    assert seconds_of(lambda: time.sleep(0.02), torch.device("cpu")) >= 0.02


def test_several_precisions_and_threads_at_once(tiny_folder, tmp_path, monkeypatch, capsys):
    """In one file, with their differences from float32; what a tf32 on a CPU would be is not left out in silence."""
    out = tmp_path / "figures.json"
    arguments = ["--out", str(out), "--model", str(tiny_folder), "--device", "cpu", "--repeats", "1", "--warmup", "1"]
    run = ["metaaux", "benchmark", *arguments, "--steps", "1", "--threads-at-once", "1", "--precision"]
    monkeypatch.setattr(sys, "argv", [*run, "bfloat16,float32"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    figures = json.loads(out.read_text())
    bfloat16, float32 = figures["configurations"]
    assert (bfloat16["precision"], float32["precision"]) == ("bfloat16", "float32")
    assert figures["precision"] == "bfloat16" and figures["measures"] == bfloat16["measures"]
    assert float32["difference"] == {"image": 0, "loss": 0}
    assert 0 < bfloat16["difference"]["image"] < 0.2 and 0 < bfloat16["difference"]["loss"] < 0.05
    for entry in (float32, bfloat16):
        assert set(entry["measures"]) == MEASURES and not entry["cuda_graphs"]
        assert entry["threads_at_once"]["threads"] == 1
    assert "bfloat16, kernel by kernel" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*run, "float32,tf32"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code and "tf32 is a precision of NVIDIA's GPUs, the device is cpu" in capsys.readouterr().err


def test_a_sweep_leaves_the_pipeline_as_it_was(tiny_inverter, monkeypatch):
    def failing(*_, **__):
        assert tiny_inverter.precision == "bfloat16"
        raise KeyError

    monkeypatch.setattr("metaaux.evaluation.sweep.run_benchmark", failing)
    with pytest.raises(KeyError):
        run_sweep(tiny_inverter, ["bfloat16"], steps=0)
    assert tiny_inverter.precision is None and tiny_inverter._graphs is None


def test_threads_are_compared_with_one(tiny_inverter, monkeypatch):
    """Results that depend on other threads' would be found."""
    work = Work(tiny_inverter, steps=0, random_weights=False)
    figures = run_threads(work, 2)
    assert figures["difference"] == figures["difference_alone"] == {"image": 0, "loss": 0}
    assert figures["ratio"] == pytest.approx(figures["all_per_second"] / figures["one_per_second"])

    def invert(picture):
        value = float(threading.current_thread() is not threading.main_thread())
        return picture.cpu() + value, 1 + value, []

    monkeypatch.setattr(work, "invert", invert)
    figures = run_threads(work, 2)
    assert figures["difference"] == {"image": pytest.approx(1, abs=1e-6), "loss": 1}
    assert figures["difference_alone"] == {"image": 0, "loss": 0}


def test_covered():
    assert covered([(5, 9), (0, 3), (2, 4), (6, 7)]) == 8
    assert covered([]) == 0


OFFICIAL_LIKE = """
import torch
class TriPlaneGenerator(torch.nn.Module):
    def __init__(self, z_dim, img_resolution, rendering_kwargs, sr_kwargs, **others):
        super().__init__()
        print("noise on stdout")
        assert rendering_kwargs["superresolution_module"].endswith("SuperresolutionHybrid2X")
        assert (others["c_dim"], sr_kwargs["channel_max"], others["channel_max"]) == (25, 16, 16)
        self.z_dim, self.img_resolution, self.planes = z_dim, img_resolution, None
        self.weight = torch.nn.Parameter(torch.ones(1))
    def mapping(self, z, c):
        return z
    def synthesis(self, ws, c, cache_backbone=False, use_cached_backbone=False, noise_mode=None, force_fp32=False):
        assert noise_mode == "const" and self.neural_rendering_resolution == 16 and c.shape == (1, 25)
        assert not use_cached_backbone or self.planes
        self.planes = self.planes or cache_backbone
        return {"image": self.weight * torch.ones(1, 3, self.img_resolution, self.img_resolution)}
"""


def test_official_code(tiny_inverter, tmp_path, monkeypatch):
    """A process of its own, with what the official classes take; here a stand-in with their interface."""
    for folder in ("training", "torch_utils/ops"):
        (tmp_path / "eg3d" / folder).mkdir(parents=True)
    (tmp_path / "eg3d" / "training" / "triplane.py").write_text(OFFICIAL_LIKE)
    for name in ("bias_act", "upfirdn2d"):
        (tmp_path / "eg3d" / "torch_utils" / "ops" / f"{name}.py").write_text("")
    shape = {"image_size": 128, "super_resolution_kind": "2X", "neural_resolution": 16, "channel_base": 512}
    with torch.device("meta"):
        generator = EG3DGenerator(**shape, channel_max=16)
    figures = run_official(tmp_path, generator, torch.device("cpu"), repeats=2, warmup=1)
    assert figures["operations"] == "reference" and "need CUDA" in figures["reason"]
    assert set(figures["measures"]) == {"released", "float32"}
    for measures in figures["measures"].values():
        assert set(measures) == {"synthesis", "cached_view", "tuning_step"}
        assert all(measure["repeats"] == 2 and measure["median_ms"] > 0 for measure in measures.values())
    (tmp_path / "worker.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr("metaaux.evaluation.official._WORKER", tmp_path / "worker.py")
    with pytest.raises(RuntimeError, match="ended with code 3"):
        run_official(tmp_path, generator, torch.device("cpu"))
    with pytest.raises(ValueError, match="holds no checkout of NVlabs/eg3d"):
        run_official(tmp_path / "eg3d", generator, torch.device("cpu"))
    with torch.device("meta"):
        narrow = EG3DGenerator(**shape, channel_max=16, super_resolution_channels=(16, 8))
    for other in (tiny_inverter.generator, narrow):
        with pytest.raises(ValueError, match="no generator of this model's shape"):
            official_arguments(other)


def test_official_plugins_are_found_by_name(monkeypatch):
    name = "metaaux_test_plugin"
    plugin = ModuleType(name)
    monkeypatch.setattr(cpp_extension, "load", load := lambda name, sources: plugin)
    monkeypatch.delitem(sys.modules, name, raising=False)
    with built_modules_by_name():
        assert cpp_extension.load(name=name, sources=[]) is plugin
        assert importlib.import_module(name) is plugin
    assert cpp_extension.load is load
    del sys.modules[name]


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


@pytest.mark.parametrize(("option", "what"), [("--official", "NVlabs/eg3d"), ("--against", "metaaux")])
def test_a_folder_without_code_is_refused_before_any_work(tmp_path, monkeypatch, capsys, option, what):
    monkeypatch.setattr("metaaux.evaluation.benchmark.load_for_benchmark", lambda *a: pytest.fail("work began"))
    words = ["metaaux", "benchmark", option, str(tmp_path), "--out", str(tmp_path / "x.json")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1 and f"holds no checkout of {what}" in capsys.readouterr().err
