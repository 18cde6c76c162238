"""How long inversion and rendering take: warmed up, synchronised, medians."""

from __future__ import annotations

import copy
import importlib
import json
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .. import __version__
from ..adaptation import InnerProblem
from ..cameras import camera_from_pose
from ..devices import device_name, usable_device
from ..hub.loading import check_model_index
from ..pipeline import MetaAuxInverter
from ..precision import check_precision, reduced_dtype
from .counting import count, profiled
from .metrics import timed


def load_for_benchmark(
    model: str | None = None,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    precision: str | None = None,
) -> tuple[MetaAuxInverter, bool]:
    """A pipeline in eval mode on `device`, and whether its weights are random.

    Args:
        model: Hub id or folder. A folder with configurations and no safetensors file at all gives a pipeline with
            random weights, drawn from a fixed seed. Default: the embedded checkpoint.
        device: default: a GPU where there is one.
        dtype: of the weights of generator and discriminator; the small networks' stay in float32.
        precision: the pipeline's.

    Raises:
        ValueError: the device cannot be used, or not in this precision, or the folder holds another kind of pipeline.
        OSError: files are missing.
    """
    device = usable_device(device)
    check_precision(precision, device)
    random_weights = model is not None and os.path.isdir(model) and not any(Path(model).rglob("*.safetensors"))
    if not random_weights:
        inverter = MetaAuxInverter.from_pretrained(model, dtype=dtype)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            inverter = _with_random_weights(Path(model), dtype)
    inverter.set_progress_bar_config(disable=True)
    inverter.precision = precision
    return inverter.to(device), random_weights


def _with_random_weights(folder: Path, dtype: torch.dtype) -> MetaAuxInverter:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8")) if check_model_index(folder) else {}
    networks, settings = {}, {}
    for name, value in index.items():
        if isinstance(value, list):
            if value[0] is None:
                continue
            cls = getattr(importlib.import_module(value[0]), value[1])
            network = cls.from_config(cls.load_config(folder / name)).eval().requires_grad_(False)
            networks[name] = network.to(dtype) if name in ("generator", "discriminator") else network
        elif not name.startswith("_"):
            settings[name] = value
    inverter = MetaAuxInverter(**networks, **settings)
    inverter.register_to_config(_name_or_path=str(folder))
    return inverter


def run_benchmark(
    inverter: MetaAuxInverter,
    random_weights: bool = False,
    steps: int = 5,
    repeats: int = 10,
    warmup: int = 3,
    counts: bool = False,
    work: Work | None = None,
) -> dict[str, Any]:
    """Times a pipeline on its device, on a random picture; nothing of the pipeline changes.

    On CUDA a measure has two figures more: "peak_mb", the most memory that was allocated in its runs, recordings of
    CUDA graphs and networks included, and "profile", what `counting.profiled` saw in one more run, whose "busy_share"
    is the GPU's busy time over the median.

    Measures:
        synthesis: latent code to image.
        cached_view: another camera with the planes of an earlier call; not of 2D generators.
        adaptation: `steps` gradient steps of the auxiliary network with all losses, encoder included.
        adaptation_step: one of those steps.
        tuning_step: one gradient step of the squared error on all of a generator's weights, as PTI takes them.

    Args:
        inverter: in eval mode.
        random_weights: goes into the result.
        steps: of an inversion.
        repeats: timed runs; of `adaptation` a quarter of them.
        warmup: runs before.
        counts: whether one run of each measure is counted too (`counting.count`).
        work: what is timed, where it was made before.

    Returns:
        {"model", "weights", "device", "dtype", "measures": {name: {"median_ms", "min_ms", "max_ms", "repeats"}}, …};
        with `counts` a measure has "count" too.
    """
    work = work or Work(inverter, steps, random_weights)
    numbers = {"synthesis": repeats, "adaptation": max(1, repeats // 4), "tuning_step": repeats}
    if inverter.has_viewpoints:
        numbers["cached_view"] = repeats
    measures = {}
    with tqdm(total=len(numbers), unit="measure", disable=None) as bar:
        for name, number in numbers.items():
            bar.set_description(name)
            function = getattr(work, name)
            for _ in range(warmup):
                function()
            work.step_seconds.clear()
            measures[name] = _measured(function, number, inverter.device)
            if name == "adaptation":
                measures["adaptation_step"] = _summary(work.step_seconds[: number * work.steps])
            if counts:
                measures[name]["count"] = count(function, inverter.device)
                if name == "adaptation":
                    measures["adaptation_step"]["count"] = _count_of_a_step(work, measures[name]["count"])
            bar.update()
    return _circumstances(inverter, random_weights) | {"steps": steps, "warmup": warmup, "measures": measures}


def _circumstances(inverter: MetaAuxInverter, random_weights: bool) -> dict[str, Any]:
    """What is timed, and where."""
    generator, device = inverter.generator, inverter.device
    return {
        "model": inverter.name_or_path,
        "weights": "random" if random_weights else "trained",
        "fingerprint": inverter.fingerprint,
        "generator": type(generator).__name__,
        "image_size": generator.config.image_size,
        "neural_resolution": getattr(generator.config, "neural_resolution", None),
        "batch": 1,
        "device": device_name(device),
        "dtype": str(generator.dtype).removeprefix("torch."),
        "precision": inverter.precision,
        "cuda_graphs": inverter.make_problem is not InnerProblem,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "versions": {"metaaux": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


class Work:
    """What is timed, each as a call without arguments; all that a call needs is made here, outside of its time.

    Args:
        inverter: the pipeline.
        steps: of an inversion.
        random_weights: whether the networks are untrained.

    Attributes:
        step_seconds: of each gradient step of the calls of `adaptation` so far.
        image: what the last call of `adaptation` ended with, [1, 3, S, S] on the CPU.
        loss: and its total loss.
    """

    def __init__(self, inverter: MetaAuxInverter, steps: int, random_weights: bool):
        self.inverter, self.steps = inverter, steps
        device, size = inverter.device, inverter.generator.config.image_size
        self.target = random_picture(size).to(device)
        self.camera = camera_from_pose(5.0, 0.0)[None].to(device)
        self.side = camera_from_pose(20.0, -5.0)[None].to(device)
        self.w = inverter.codes(self.target, self.camera)
        with torch.no_grad():
            self.planes = inverter.generator.planes(self.w)
        # Random weights answer to no rate in particular; this one keeps them finite.
        self.learning_rate = 1e-6 if random_weights else inverter.config.inner_learning_rate
        self.tuned = copy.deepcopy(inverter.generator).requires_grad_()
        self.step_seconds: list[float] = []

    @torch.no_grad()
    def synthesis(self) -> None:
        self.inverter.synthesize(self.w, self.camera)

    @torch.no_grad()
    def cached_view(self) -> None:
        self.inverter.synthesize(self.w, self.side, planes=self.planes)

    def adaptation(self) -> None:
        self.image, self.loss, seconds = self.invert(self.target)
        self.step_seconds.extend(seconds)

    def invert(self, target: torch.Tensor) -> tuple[torch.Tensor, float, list[float]]:
        """What `MetaAuxInverter.invert` does with an aligned photo [1, 3, S, S]: the reconstruction on the CPU, its
        total loss, and the seconds of each gradient step."""
        inverter = self.inverter
        with inverter._own_stream(), inverter._products():
            photo = inverter.inversion_loss(), target, inverter.codes(target, self.camera), self.camera
            result = inverter._adapt(*photo, self.steps, learning_rate=self.learning_rate)
            return result.image.cpu(), result.steps[-1]["total"], [s["seconds"] for s in result.steps[1:-1]]

    def tuning_step(self) -> None:
        weights = list(self.tuned.parameters())
        dtype = reduced_dtype(self.inverter.precision)
        with torch.enable_grad(), self.inverter._products():
            error = (self.tuned.synthesize(self.w, self.camera, dtype=dtype).image - self.target).square().mean()
            gradients = torch.autograd.grad(error, weights, allow_unused=True)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients):
                if gradient is not None:  # the mapping network's is none
                    weight.add_(gradient, alpha=-1e-6)  # so small that the copy stays finite over all repeats


def random_picture(size: int, seed: int = 0) -> torch.Tensor:
    """A smooth one [1, 3, size, size] in [-1, 1], always the same of a seed."""
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1) * 2 - 1


def _count_of_a_step(work: Work, adaptation: dict[str, Any]) -> dict[str, Any]:
    """What one more step adds to the count of an adaptation."""
    work.steps += 1
    longer = count(work.adaptation, work.inverter.device)
    work.steps -= 1
    floors = {name: value - adaptation["h100_floor_ms"][name] for name, value in longer.pop("h100_floor_ms").items()}
    return {name: value - adaptation[name] for name, value in longer.items()} | {"h100_floor_ms": floors}


def seconds_of(function: Callable[[], None], device: torch.device) -> float:
    """How long a call takes, with the device's queue empty before and after."""
    return timed(function, device)[1]


def _measured(function: Callable[[], None], repeats: int, device: torch.device) -> dict[str, Any]:
    """A measure of `run_benchmark`, of a function that is warm."""
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    measure: dict[str, Any] = _summary([seconds_of(function, device) for _ in range(repeats)])
    if on_cuda:
        measure["peak_mb"] = torch.cuda.max_memory_allocated(device) / 1e6
        profile = profiled(function, device)
        measure["profile"] = profile | {"busy_share": profile["busy_ms"] / measure["median_ms"]}
    return measure


def _summary(seconds: list[float]) -> dict[str, float | int]:
    milliseconds = [1000 * s for s in seconds]
    return {
        "median_ms": statistics.median(milliseconds),
        "min_ms": min(milliseconds),
        "max_ms": max(milliseconds),
        "repeats": len(milliseconds),
    }


#: Former names, by which `evaluation.paired` asks a revision's benchmark.
_Work, _seconds = Work, seconds_of
