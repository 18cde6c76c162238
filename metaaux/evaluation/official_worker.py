"""Run by `official.run_official` as a program of its own, with the official code's folder on the path: prints JSON.

It imports nothing of this package, whose modules and settings would mix with those of the code that is timed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch.utils import cpp_extension


@contextlib.contextmanager
def built_modules_by_name() -> Iterator[None]:
    """The official code imports what `torch.utils.cpp_extension.load` has built by its name, by which PyTorch does not
    register it any more."""
    load = cpp_extension.load

    @functools.wraps(load)
    def registering(name: str, *arguments, **options) -> ModuleType:
        sys.modules[name] = load(name, *arguments, **options)
        return sys.modules[name]

    cpp_extension.load = registering
    try:
        yield
    finally:
        cpp_extension.load = load


def build_plugins(device: torch.device) -> dict[str, Any]:
    """Builds the CUDA plugins of the official code, or turns them off where that fails."""
    # By name, as they are no requirement of this package.
    operations = [importlib.import_module(f"torch_utils.ops.{name}") for name in ("bias_act", "upfirdn2d")]
    if device.type != "cuda":
        return {"operations": "reference", "reason": f"plugins need CUDA, the device is {device.type}"}
    try:
        with built_modules_by_name():
            for operation in operations:
                operation._init()
    except Exception as error:  # whatever a compiler may fail with
        for operation in operations:
            operation._init = lambda: False
        return {"operations": "reference", "reason": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    return {"operations": "plugins"}


class Work:
    """What is timed: a generator with random weights, and one call a measure."""

    def __init__(self, settings: dict[str, Any], device: torch.device):
        torch.manual_seed(0)
        triplane = importlib.import_module("training.triplane")
        self.generator = triplane.TriPlaneGenerator(**settings["arguments"]).eval().requires_grad_(False).to(device)
        self.generator.neural_rendering_resolution = settings["neural_resolution"]
        self.camera, self.side = (torch.tensor([settings[name]], device=device) for name in ("camera", "side_camera"))
        z = torch.randn(1, self.generator.z_dim, device=device)
        size = self.generator.img_resolution
        self.target = torch.rand(1, 3, size, size, device=device) * 2 - 1
        self.options: dict[str, Any] = {"noise_mode": "const"}
        with torch.no_grad():
            self.ws = self.generator.mapping(z, self.camera)
            self.generator.synthesis(self.ws, self.camera, cache_backbone=True, **self.options)

    @torch.no_grad()
    def synthesis(self) -> None:
        self.generator.synthesis(self.ws, self.camera, **self.options)

    @torch.no_grad()
    def view(self) -> None:
        self.generator.synthesis(self.ws, self.side, use_cached_backbone=True, **self.options)

    def tune(self) -> None:
        weights = list(self.generator.parameters())
        self.generator.requires_grad_(True)
        image = self.generator.synthesis(self.ws, self.camera, **self.options)["image"]
        gradients = torch.autograd.grad((image - self.target).square().mean(), weights, allow_unused=True)
        self.generator.requires_grad_(False)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients):
                if gradient is not None:  # the mapping network's is none
                    weight.add_(gradient, alpha=-1e-6)


def measure(function: Callable[[], None], settings: dict[str, Any], device: torch.device) -> dict[str, float]:
    """Milliseconds of warmed-up runs, each with an empty queue before and after."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    milliseconds = []
    for index in range(settings["warmup"] + settings["repeats"]):
        synchronize()
        started = time.perf_counter()
        function()
        synchronize()
        if index >= settings["warmup"]:
            milliseconds.append(1000 * (time.perf_counter() - started))
    return {
        "median_ms": statistics.median(milliseconds),
        "min_ms": min(milliseconds),
        "max_ms": max(milliseconds),
        "repeats": len(milliseconds),
    }


def main() -> None:
    """Times what the first argument, JSON, says."""
    settings, answers = json.loads(sys.argv[1]), sys.stdout
    device = torch.device(settings["device"])
    torch.set_num_threads(settings["threads"])
    with contextlib.redirect_stdout(sys.stderr):  # the JSON alone goes out
        results = build_plugins(device)
        work = Work(settings, device)
        functions = {"synthesis": work.synthesis, "cached_view": work.view, "tuning_step": work.tune}
        measures = {}
        for configuration in ("released", "float32"):
            if configuration == "float32":
                torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
                work.options["force_fp32"] = True
            measures[configuration] = {
                name: measure(function, settings, device) for name, function in functions.items()
            }
    print(json.dumps({**results, "measures": measures}), file=answers)


if __name__ == "__main__":
    main()
