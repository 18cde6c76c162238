"""How long inversion and rendering take: warmed up, synchronised, medians."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .. import __version__
from ..adaptation import adapt
from ..cameras import camera_from_pose
from ..hub.loading import check_model_index
from ..pipeline import MetaAuxInverter


def load_for_benchmark(
    model: str | None = None, device: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[MetaAuxInverter, bool]:
    """A pipeline in eval mode on `device`, and whether its weights are random.

    Args:
        model: Hub id or folder. A folder with configurations and no safetensors file at all gives a pipeline with
            random weights, drawn from a fixed seed. Default: the embedded checkpoint.
        device: default: a GPU where there is one.
        dtype: of generator and discriminator; the small networks stay in float32.

    Raises:
        ValueError: the device cannot be used, or the folder holds another kind of pipeline.
        OSError: files are missing.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    random_weights = model is not None and os.path.isdir(model) and not any(Path(model).rglob("*.safetensors"))
    if not random_weights:
        inverter = MetaAuxInverter.from_pretrained(model, dtype=dtype)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            inverter = _with_random_weights(Path(model), dtype)
    inverter.set_progress_bar_config(disable=True)
    return inverter.to(device), random_weights


def _with_random_weights(folder: Path, dtype: torch.dtype) -> MetaAuxInverter:
    import importlib

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
    inverter: MetaAuxInverter, random_weights: bool = False, steps: int = 5, repeats: int = 10, warmup: int = 3
) -> dict[str, Any]:
    """Times a pipeline on its device, on a random picture; nothing of the pipeline changes.

    Measures:
        synthesis: latent code to image.
        cached_view: another camera with the planes of an earlier call; not of 2D generators.
        adaptation: `steps` gradient steps of the auxiliary network with all losses, encoder included.
        adaptation_step: one of those steps.
        tuning_step: one gradient step of the squared error on all of the generator's weights, as PTI takes them.

    Args:
        inverter: in eval mode.
        random_weights: goes into the result.
        steps: of an inversion.
        repeats: timed runs; of `adaptation` a quarter of them.
        warmup: runs before.

    Returns:
        {"model", "weights", "device", "dtype", "measures": {name: {"median_ms", "min_ms", "max_ms", "repeats"}}, …}
    """
    generator = inverter.generator
    device, size = inverter.device, generator.config.image_size
    state = torch.Generator().manual_seed(0)
    target = torch.nn.functional.interpolate(
        torch.rand(1, 3, 8, 8, generator=state), size=(size, size), mode="bicubic"
    ).clamp(0, 1).mul(2).sub(1).to(device)  # fmt: skip
    camera = camera_from_pose(5.0, 0.0)[None].to(device)
    side = camera_from_pose(20.0, -5.0)[None].to(device)
    with torch.no_grad():
        w = inverter.encoder(target.to(inverter.encoder.dtype))
        planes = generator.planes(w)

    def synthesis():
        with torch.no_grad():
            generator.synthesize(w, camera)

    def cached_view():
        with torch.no_grad():
            generator.synthesize(w, side, planes=planes)

    step_seconds: list[float] = []

    def adaptation():
        with torch.no_grad():
            code = inverter.encoder(target.to(inverter.encoder.dtype))
        rate = inverter.config.inner_learning_rate
        # Random weights answer to no rate in particular; this one keeps them finite.
        rate = 1e-6 if random_weights else rate
        loss = inverter.inversion_loss()
        result = adapt(generator, inverter.auxiliary, loss, target, code, camera, steps=steps, learning_rate=rate)
        step_seconds.extend(step["seconds"] for step in result.steps[1:-1])

    def tuning_step():
        with torch.enable_grad():
            weights = {name: p.detach().requires_grad_() for name, p in generator.named_parameters()}
            output = torch.func.functional_call(_Synthesis(generator), _prefixed(weights), (w, camera))
            error = (output - target).square().mean()
            gradients = torch.autograd.grad(error, list(weights.values()), allow_unused=True)
            for weight, gradient in zip(weights.values(), gradients):
                if gradient is not None:
                    torch.add(weight.detach(), gradient, alpha=-1e-3)

    timed = {"synthesis": (synthesis, repeats), "adaptation": (adaptation, max(1, repeats // 4)),
             "tuning_step": (tuning_step, repeats)}  # fmt: skip
    if inverter.has_viewpoints:
        timed["cached_view"] = (cached_view, repeats)
    measures = {}
    with tqdm(total=len(timed), unit="measure", disable=None) as bar:
        for name, (function, count) in timed.items():
            bar.set_description(name)
            for _ in range(warmup):
                function()
            step_seconds.clear()
            measures[name] = _summary([_seconds(function, device) for _ in range(count)])
            if name == "adaptation":
                measures["adaptation_step"] = _summary(list(step_seconds))
            bar.update()
    return {
        "model": inverter.name_or_path,
        "weights": "random" if random_weights else "trained",
        "fingerprint": inverter.fingerprint,
        "generator": type(generator).__name__,
        "image_size": size,
        "neural_resolution": getattr(generator.config, "neural_resolution", None),
        "batch": 1,
        "steps": steps,
        "warmup": warmup,
        "device": _device_name(device),
        "dtype": str(generator.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "versions": {"metaaux": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "measures": measures,
    }


class _Synthesis(torch.nn.Module):
    """`generator.synthesize` as a forward method, which `functional_call` needs; shares the generator's weights."""

    def __init__(self, generator: torch.nn.Module):
        super().__init__()
        from ..losses import private_view

        self.generator = private_view(generator)

    def forward(self, w: torch.Tensor, camera: torch.Tensor) -> torch.Tensor:
        return self.generator.synthesize(w, camera).image


def _prefixed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"generator.{name}": weight for name, weight in weights.items()}


def _seconds(function: Callable[[], None], device: torch.device) -> float:
    _synchronize(device)
    started = time.perf_counter()
    function()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _summary(seconds: list[float]) -> dict[str, float | int]:
    milliseconds = [1000 * s for s in seconds]
    return {
        "median_ms": statistics.median(milliseconds),
        "min_ms": min(milliseconds),
        "max_ms": max(milliseconds),
        "repeats": len(milliseconds),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
