"""What training takes at full size: each phase's speed and memory on random weights and synthetic photos, and from
these the GPU hours of a whole training.

A phase is measured as a run would train it: its own trainer, the shipped configuration, photos that worker processes
decode as they are asked for. What is left out is what comes between steps: checkpoints and held-out figures.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import math
import os
import platform
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm

from .. import __version__
from ..cameras import camera_from_pose
from ..data.dataset import FaceDataset, to_signed
from ..devices import best_device, device_name, synchronize
from ..files import source_name, write_json
from ..hub.layout import read_json
from ..models.auxiliary import AuxiliaryNetwork
from ..pipeline import MetaAuxInverter
from ..training.distributed import check_replicas
from ..training.encoder import EncoderConfig, EncoderTrainer
from ..training.generator import GeneratorConfig, GeneratorTrainer
from ..training.loop import Trainer, start
from ..training.meta import MetaTrainer
from ..training.phases import AuxiliaryConfig
from ..training.plain import PlainTrainer
from ..training.settings import Settings, load_settings
from .allocations import recorded
from .benchmark import load_for_benchmark


@dataclass(frozen=True)
class Phase:
    """A part of the training.

    Attributes:
        trainer: takes its steps.
        config: class of its settings.
        unit: what its counts are of.
        loss: name of what it minimises among a step's figures.
    """

    trainer: type[Trainer]
    config: type[Settings]
    unit: str
    loss: str


#: By the first word of their configurations' names: encoder-256.yaml is the encoder's.
PHASES = {
    "generator": Phase(GeneratorTrainer, GeneratorConfig, "images", "loss_generator"),
    "encoder": Phase(EncoderTrainer, EncoderConfig, "images", "loss"),
    "plain": Phase(PlainTrainer, AuxiliaryConfig, "images", "total"),
    "meta": Phase(MetaTrainer, AuxiliaryConfig, "tasks", "objective"),
}
#: The paper's, by the names of their configurations; its generator is EG3D's released one.
PAPER_PHASES = ("encoder", "plain", "meta-paper", "meta-extended")
#: Phases of a whole training by the name of its preset.
PRESETS = {preset: ("encoder", "plain", f"meta-{preset}") for preset in ("paper", "extended")}


@dataclass(frozen=True)
class TrainingBenchmark:
    """What is measured.

    Attributes:
        model: folder of a pipeline, whose networks' shapes count; without weights they get random ones.
        configs: folder of the phases' configurations, NAME.yaml each.
        phases: names of configurations, whose first word is one of `PHASES`.
        steps: optimiser steps that are timed.
        warmup: steps before them, in which kernels are chosen and graphs captured.
        batch: photos a step (of the encoder, as many samples too); `None`: the configuration's.
        photos: synthetic photos that are shown again and again.
        overrides: "NAME.section.key=value" each, in place of the value that configuration NAME has.

    Raises:
        ValueError: unknown phases, overrides of none of them, or numbers out of range.
    """

    model: Path
    configs: Path
    phases: Sequence[str] = PAPER_PHASES
    steps: int = 30
    warmup: int = 5
    batch: int | None = None
    photos: int = 64
    overrides: Sequence[str] = ()

    def __post_init__(self):
        if unknown := sorted(name for name in self.phases if name.split("-")[0] not in PHASES):
            raise ValueError(
                f"unknown phases {', '.join(unknown)}; a phase's configuration has a name that begins with "
                f"{', '.join(PHASES)}"
            )
        if strays := [text for text in self.overrides if text.split(".")[0] not in self.phases]:
            raise ValueError(f"{strays[0]!r} is not of the form PHASE.KEY=VALUE with one of {', '.join(self.phases)}")
        if self.steps < 1 or self.warmup < 0 or self.photos < 1 or (self.batch is not None and self.batch < 1):
            raise ValueError("steps, batch and photos must be at least 1, warmup at least 0")


def run_training_benchmark(
    settings: TrainingBenchmark,
    out: str | os.PathLike,
    on_phase: Callable[[str, dict[str, Any]], None] | None = None,
    allocations: bool = False,
) -> dict[str, Any]:
    """Measures phase after phase; what fails is told in its place, and the others go on.

    `out` is written after each phase. Phases that it holds already, of the same model on the same device, stay in it
    unless they are measured again: so each may have a process of its own.

    Args:
        settings: what is measured.
        out: JSON file.
        on_phase: called with the name and the figures of each phase once it is written.
        allocations: see `measure_phase`.

    Returns:
        What `out` holds: "phases" by name (see `measure_phase`, or {"error"}), and by preset under "gpu_hours" what
        all phases of the shipped length take together, `None` until each has been measured.

    Raises:
        FileNotFoundError, OSError, ValueError: model or configurations are missing or damaged, or `out` holds the
            figures of another model or device.
    """
    out = Path(out)
    with tempfile.TemporaryDirectory(prefix="metaaux-") as temporary:
        configs, machine = prepare(settings, *load_for_benchmark(str(settings.model), "cpu"), Path(temporary))
        results = begin(out, machine)
        results["gpu_hours"] = gpu_hours(results["phases"])
        for name, config in configs.items():
            try:
                figures = measure_phase(name, config, settings.steps, settings.warmup, temporary, allocations)
            # Whatever it is: the others may take hours of a GPU that is there now.
            except Exception as error:
                traceback.print_exc()
                figures = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
            free()
            results["phases"][name] = figures
            results["gpu_hours"] = gpu_hours(results["phases"])
            write_json(results, out)
            if on_phase is not None:
                on_phase(name, figures)
    return results


def prepare(
    settings: TrainingBenchmark, inverter: MetaAuxInverter, random_weights: bool, folder: Path
) -> tuple[dict[str, Settings], dict[str, Any]]:
    """Photos and networks in `folder`; each phase's settings; and what figures in one file must have in common."""
    size, data = inverter.generator.config.image_size, folder / "photos.zip"
    write_synthetic_photos(data, size, settings.photos)
    networks = _networks(inverter, settings.model, random_weights, data, folder / "networks")
    configs = {name: _configuration(name, settings, networks, data) for name in settings.phases}
    if random_weights:
        for config in configs.values():
            _shorten_inner_steps(config)
    return configs, _description(settings.model, size, random_weights)


def measure_phase(
    name: str, config: Settings, steps: int, warmup: int, folder: str | os.PathLike, allocations: bool = False
) -> dict[str, Any]:
    """Trains one phase for `warmup` and then `steps` steps; nothing is saved. Where several processes were launched
    together, all of them call this, and get the same figures.

    With `allocations`, "allocations" says what the GPU's memory held when it was fullest (`allocations.at_peak`, of
    the main process; `None` without a GPU); steps take longer then.

    Returns:
        {"unit", "batch" (images or tasks a step, of all processes), "steps", "warmup", "seconds" (of the timed steps),
        "per_second", "peak_memory" and "peak_reserved" (bytes that PyTorch held of a GPU at most; `None` elsewhere),
        "finite", "nonfinite_gradients", "loss" ([at the first step, at the last], of the main process), "total"
        (images or tasks that the configuration asks for), "gpu_hours" (for as many), "config" (its settings but for
        files)}

    Raises:
        ValueError, RuntimeError, OSError: as training raises them; memory that does not suffice is a RuntimeError, and
            so are processes whose networks are not the same in the end.
    """
    phase = phase_of(name)
    accelerator = start(config.run, folder)
    device = accelerator.device
    warmup = max(warmup, _least_warmup(config, device))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with recorded(device) if allocations and device.type == "cuda" else contextlib.nullcontext() as held:
        trainer = phase.trainer(config, accelerator)
        trainer.load_data(0)
        hidden = None if accelerator.is_main_process else True
        losses, seconds = [], 0.0
        with tqdm(total=warmup + steps, desc=name, unit="step", disable=hidden) as bar:
            for number in (warmup, steps):  # the last one's seconds count
                seconds = _timed_steps(trainer, phase, number, _start_of(config), losses, bar)
    per_process = gather_object([_figures_of_process(trainer, losses)])
    finite = all(own["finite"] for own in per_process)
    if finite:
        check_replicas(accelerator, trainer.models)
    main, per_second = per_process[0], steps * trainer.images_per_step / seconds
    return {
        "unit": phase.unit,
        "batch": trainer.images_per_step,
        "steps": steps,
        "warmup": warmup,
        "seconds": seconds,
        "per_second": per_second,
        "peak_memory": _most(own["peak_memory"] for own in per_process),
        "peak_reserved": _most(own["peak_reserved"] for own in per_process),
        "finite": finite,
        "nonfinite_gradients": main["nonfinite_gradients"],  # of the mean, which all have
        "loss": main["loss"],
        "total": config.run.total_images,
        "gpu_hours": accelerator.num_processes * config.run.total_images / per_second / 3600,
        "config": without_paths(config),
    } | ({"allocations": held} if allocations else {})


def _timed_steps(
    trainer: Trainer, phase: Phase, steps: int, start: int, losses: list[torch.Tensor], bar: tqdm
) -> float:
    """Takes so many steps more, of a run whose first one began at `start` images, and adds their losses; returns the
    seconds until all processes had taken them."""
    _wait_for_all(trainer.accelerator)
    started = time.perf_counter()
    for _ in range(steps):
        figures = trainer.step(start + len(losses) * trainer.images_per_step)
        # Captured steps return the same tensors each time.
        losses.append(figures[phase.loss].detach().float().mean().clone())
        bar.update()
    _wait_for_all(trainer.accelerator)
    return time.perf_counter() - started


def _figures_of_process(trainer: Trainer, losses: list[torch.Tensor]) -> dict[str, Any]:
    """What each process finds by itself of the steps that it took."""
    device = trainer.device
    nonfinite = int(sum(gradients.nonfinite_steps for gradients in trainer.gradients))
    weights = [tensor for model in trainer.models.values() for tensor in model.state_dict().values()]
    return {
        "peak_memory": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "peak_reserved": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
        "nonfinite_gradients": nonfinite,
        "finite": not nonfinite and all(bool(tensor.isfinite().all()) for tensor in [*losses, *weights]),
        "loss": [_number(losses[0]), _number(losses[-1])],
    }


def _wait_for_all(accelerator: Accelerator) -> None:
    """Until each process's device has done all that it was given."""
    synchronize(accelerator.device)
    accelerator.wait_for_everyone()


def _most(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def phase_of(name: str) -> Phase:
    """Of the configuration of this name."""
    return PHASES[name.split("-")[0]]


def gpu_hours(phases: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """Hours of one GPU for all phases of each preset at the length that their configurations ask for: the sum of
    total / (images or tasks a second) / 3600; `None` where one has not been measured."""
    hours = {}
    for preset, names in PRESETS.items():
        parts = [phases.get(name, {}).get("gpu_hours") for name in names]
        hours[preset] = None if None in parts else sum(parts)
    return hours


def write_synthetic_photos(path: Path, size: int, count: int) -> None:
    """An EG3D data set zip of `count` pictures [size, size]: smooth colours under fine noise, which take as long to
    decode as photos do, at yaws up to 25 and pitches up to 10 degrees."""
    random = torch.Generator().manual_seed(0)
    pose = (torch.rand(2, count, generator=random) * 2 - 1) * torch.tensor([[25.0], [10.0]])
    labels = []
    with zipfile.ZipFile(path, "w") as archive:
        for index, camera in enumerate(camera_from_pose(*pose)):
            coarse = torch.rand(1, 3, 8, 8, generator=random)
            image = F.interpolate(coarse, size=(size, size), mode="bicubic")[0]
            image = image + torch.randn(image.shape, generator=random) * 0.02
            pixels = (image.clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0).numpy()
            data = io.BytesIO()
            Image.fromarray(pixels).save(data, "PNG", compress_level=1)
            labels.append([f"00000/img{index:08d}.png", camera.tolist()])
            archive.writestr(labels[-1][0], data.getvalue())
        archive.writestr("dataset.json", json.dumps({"labels": labels}))


def _networks(inverter: MetaAuxInverter, model: Path, random_weights: bool, data: Path, folder: Path) -> Path:
    """Folder of the model's networks, with weights: the model's own, or `folder`, which is made for random ones."""
    if not random_weights:
        return model
    photos = FaceDataset(data, inverter.generator.config.image_size, limit=4)
    _bring_to_life(inverter.auxiliary, to_signed(photos.load()))
    inverter.save_pretrained(folder)
    return folder


#: About the size that values have after the plain phase which were zero before it.
_TRAINED = 0.03


@torch.no_grad()
def _bring_to_life(auxiliary: AuxiliaryNetwork, image: torch.Tensor) -> None:
    """What the plain phase does to a new network, as far as gradient steps are made for it.

    Batch normalisation gets the statistics of photos [B, 3, S, S]: without, the features of a network this deep grow
    from block to block. And what starts at zero gets small values: layers before it have no gradient until then, from
    which their rates could be found.
    """
    layers = [module for module in auxiliary.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the mean of what is shown, here all at once
    auxiliary.train()
    auxiliary.backbone(image)
    auxiliary.eval()
    for layer, momentum in zip(layers, momenta):
        layer.momentum = momentum
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in auxiliary.adaptable_parameters().values():
            if not parameter.any():
                parameter.normal_(std=_TRAINED)


def _configuration(name: str, settings: TrainingBenchmark, networks: Path, data: Path) -> Settings:
    """The phase's shipped configuration, on these networks and photos."""
    phase = phase_of(name)
    is_encoder = phase.config is EncoderConfig
    if phase.config is GeneratorConfig:
        values = {"init": networks}
    else:
        frozen = ["generator", "discriminator", "identity"] + ([] if is_encoder else ["encoder"])
        values = {f"networks.{part}": networks / part for part in frozen}
        values["networks.perceptual"] = networks / "perceptual" if (networks / "perceptual").is_dir() else None
        own = ("initial", networks / "encoder") if is_encoder else ("auxiliary.initial", networks / "auxiliary")
        values |= dict([own])
    # As FFHQ would be, which is larger than what memory has to spare.
    values |= {"data.path": data, "data.validation": None, "data.in_memory": False, "run.trackers": []}
    values |= {"data.repeats": {}, "data.least_sharp": {}}  # synthetic photos come from no source
    if settings.batch is not None and is_encoder:
        values |= {"batch.photos": settings.batch, "batch.samples": settings.batch}
    elif settings.batch is not None:
        values["batch"] = settings.batch
    texts = (json.dumps(str(value) if isinstance(value, Path) else value) for value in values.values())
    overrides = [f"{key}={text}" for key, text in zip(values, texts)]
    overrides += [text.removeprefix(f"{name}.") for text in settings.overrides if text.split(".")[0] == name]
    config = load_settings(phase.config, settings.configs / f"{name}.yaml", overrides)
    if settings.batch is not None and is_encoder:
        config.batch.rendered_samples = min(config.batch.rendered_samples, settings.batch)
    elif settings.batch is not None and isinstance(config, AuxiliaryConfig):
        config.inner.tasks_per_pass = math.gcd(config.inner.tasks_per_pass, settings.batch)
    return config


def _shorten_inner_steps(config: Settings) -> None:
    """Steps that trained networks take well lead five times farther from random ones than a float can hold the second
    derivative of: on an H100 the meta-gradient was 4e6 long with them, and then no number. With steps of 1e-5 it was
    150 long at first, and no number after a dozen updates, which had made the inner gradients longer."""
    if isinstance(config, AuxiliaryConfig) and config.inner.calibrate_rates > 0:
        config.inner.calibrate_rates = min(config.inner.calibrate_rates, 1e-7)


def without_paths(config: Settings) -> dict[str, Any]:
    """Settings that another machine has in common with this one."""
    values = config.model_dump(
        mode="json", exclude={"networks": True, "data": {"path"}, "initial": True, "init": True}
    )
    values.get("auxiliary", {}).pop("initial", None)
    return values


def _start_of(config: Settings) -> int:
    """Images after which a step is as long as in most of the run: all that is spared at the start is over."""
    if isinstance(config, GeneratorConfig):
        return max(config.optimiser.warmup_images, config.rays[-1][0])
    if isinstance(config, EncoderConfig):
        return max(config.curriculum.coarse_images, config.curriculum.latent_only_images)
    return 0  # a first step takes what all take, and at its full rate it would lead far from random weights


def _least_warmup(config: Settings, device: torch.device) -> int:
    """Steps until all of a step's passes have been captured: R1's, which comes every so many, at its fourth call."""
    if device.type != "cuda" or not isinstance(config, GeneratorConfig) or not config.compute.graphs:
        return 0
    return 3 * config.r1.interval + 1 if config.r1.gamma else 0


def _description(model: Path, size: int, random_weights: bool) -> dict[str, Any]:
    """What figures in one file must have in common."""
    device = torch.device(best_device())
    return {
        "model": source_name(model),
        "weights": "random" if random_weights else "trained",
        "image_size": size,
        "device": device_name(device),
        "device_memory": torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        "versions": {"metaaux": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def begin(out: Path, description: dict[str, Any]) -> dict[str, Any]:
    """`description`, with the "phases" that `out` holds already.

    Raises:
        OSError, ValueError: `out` cannot be read, or holds figures of something else.
    """
    phases = {}
    if out.exists():
        earlier = read_json(out)
        if changed := sorted(key for key, value in description.items() if earlier.get(key) != value):
            raise ValueError(f"{out} holds figures of another {', '.join(changed)}: choose another file")
        phases = earlier["phases"]
    return description | {"phases": phases}


def _number(value: torch.Tensor) -> float | None:
    """`None` where it is none, for which JSON has no word."""
    return value.item() if value.isfinite() else None


def free() -> None:
    """What a phase leaves behind, its graphs too, is not the next one's peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
