"""What every training run shares: a folder, checkpoints, figures, resumption, a clean stop."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from huggingface_hub import save_torch_state_dict
from PIL import Image
from safetensors.torch import load_file
from tqdm.auto import tqdm

from ..files import forget_origin

SHARD_SIZE = "15MB"


def load_config(cls: type, path: str | os.PathLike):
    """Read a YAML file into the dataclass `cls`; an unknown key is a ValueError that lists the known ones."""
    values = yaml.safe_load(Path(path).read_text()) or {}
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{path}: unknown setting {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return cls(**values)


@torch.no_grad()
def update_average(average: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """Exponential moving average: `average` ← decay·average + (1 - decay)·model; buffers are copied."""
    targets = list(average.parameters())
    torch._foreach_lerp_(targets, [p.to(t.dtype) for p, t in zip(model.parameters(), targets, strict=True)], 1 - decay)
    for target, buffer in zip(average.buffers(), model.buffers(), strict=True):
        target.copy_(buffer)


def broadcast_module(accelerator: Accelerator, module: torch.nn.Module) -> None:
    """Make every process start from the main process's parameters and buffers."""
    if accelerator.num_processes > 1:
        for tensor in [*module.parameters(), *module.buffers()]:
            torch.distributed.broadcast(tensor.data, 0)


def seed_process(accelerator: Accelerator, seed: int, images: int) -> int:
    """Start this process's random streams for a run that has seen `images`; returns their seed.

    Every process gets another one, and a resumed run does not repeat its beginning.
    """
    own = (seed * 1_000_003 + images * 64 + accelerator.process_index) % 2**31
    set_seed(own)
    return own


class _Signals:
    """Turn SIGINT and SIGTERM into a flag while a run is active; a second SIGINT interrupts at once."""

    def __init__(self):
        self.stop = False
        self.previous = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.previous[number] = signal.signal(number, self._handle)
            except ValueError:  # signals can only be caught in the main thread
                break

    def _handle(self, number, frame):
        if self.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop = True

    def restore(self):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class TrainingRun:
    """One run in its folder, counted in images shown over all processes.

    Args:
        folder: holds `figures.jsonl`, TensorBoard events, `sheets/` and `checkpoint-<images>/` with a folder for each
            model (`save_pretrained`), the optimisers' state in safetensors shards, `state.json` and `config.json`.
        accelerator: 🤗 accelerate's, for any number of processes.
        total_images: where the run ends.
        interval_images: figures are written, callbacks called and a checkpoint saved this often.
        models: saved and restored by name. optimizers: likewise.
        config: written beside the checkpoints.
        state: JSON-serialisable values to be saved and restored along (augmentation strength, say).
        max_seconds: stop cleanly after so long, to be resumed; None for no limit.
        keep: checkpoints kept.
    """

    CHECK_EVERY = 16

    def __init__(
        self,
        folder: str | os.PathLike,
        accelerator: Accelerator,
        total_images: int,
        interval_images: int,
        models: Mapping[str, torch.nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        config=None,
        state: dict | None = None,
        max_seconds: float | None = None,
        keep: int = 2,
    ):
        self.folder, self.accelerator = Path(folder), accelerator
        self.total_images, self.interval_images = total_images, interval_images
        self.models, self.optimizers = dict(models), dict(optimizers)
        self.config = asdict(config) if is_dataclass(config) else config
        self.state = {} if state is None else state
        self.max_seconds, self.keep = max_seconds, keep
        self.images = 0
        self._steps = 0
        self._last_saved = 0
        self._next_interval = interval_images
        self._sums: dict[str, torch.Tensor | float] = {}
        self._counts: dict[str, int] = {}
        self._callbacks: list[Callable[[TrainingRun], None]] = []
        self._started = self._interval_started = time.monotonic()
        self._interval_images_start = 0
        self._stop, self._time_share = False, 0.0
        self._signals = _Signals()
        self._writer = None
        self._bar = None
        if accelerator.is_main_process:
            (self.folder / "sheets").mkdir(parents=True, exist_ok=True)

    @property
    def schedule_images(self) -> int:
        """Where schedules of learning rates and phases stand, in images: `images`, or further on where `max_seconds`
        will end the run before `total_images`."""
        return max(self.images, int(self._time_share * self.total_images))

    @property
    def checkpoints(self) -> list[Path]:
        """Complete checkpoints of the folder, oldest first."""
        found = [p for p in self.folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
        return sorted(found, key=lambda p: int(p.name.split("-")[1]))

    def resume(self) -> bool:
        """Continue from the newest checkpoint of the folder; False where there is none."""
        if not self.checkpoints:
            return False
        newest = self.checkpoints[-1]
        for name, model in self.models.items():
            saved = type(model).from_pretrained(newest / name)
            model.load_state_dict(saved.state_dict())
        for name, optimizer in self.optimizers.items():
            _restore_optimizer(optimizer, newest / "optimizers" / name)
        saved = json.loads((newest / "state.json").read_text())
        self.images = self._interval_images_start = self._last_saved = saved["images"]
        self._next_interval = (self.images // self.interval_images + 1) * self.interval_images
        self.state.update(saved["state"])
        return True

    def on_interval(self, callback: Callable[[TrainingRun], None]) -> None:
        """Call `callback(run)` in every process at each interval, before the checkpoint."""
        self._callbacks.append(callback)

    def active(self) -> bool:
        """Whether to go on; the first call starts the clock of `max_seconds` and the progress bar."""
        if self._bar is None:
            self._started = self._interval_started = time.monotonic()
            self._bar = tqdm(
                total=self.total_images,
                initial=self.images,
                unit="img",
                unit_scale=True,
                disable=not self.accelerator.is_main_process,
                mininterval=2.0,
            )
        return self.images < self.total_images and not self._stop

    def advance(self, images: int, figures: Mapping[str, torch.Tensor | float] | None = None) -> None:
        """Count `images` (of all processes) and collect `figures`, whose means are written at each interval."""
        self.images += images
        self._steps += 1
        self._bar.update(images)
        for name, value in (figures or {}).items():
            value = value.detach().float().mean() if isinstance(value, torch.Tensor) else value
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        if self._steps % self.CHECK_EVERY == 0:
            self._agree()
        if self.images >= self._next_interval:
            self._next_interval += self.interval_images
            self._write_figures()
            for callback in self._callbacks:
                callback(self)
            self.save()

    def _agree(self) -> None:
        """Settle between the processes, whose clocks differ, whether to stop and how much of the time has passed: with
        learning rates of their own their networks would drift apart."""
        elapsed = time.monotonic() - self._started
        share = 0.0 if self.max_seconds is None else elapsed / max(self.max_seconds, 1e-9)
        stop = float(self._signals.stop or share > 1)
        if self.accelerator.num_processes > 1:
            votes = torch.tensor([stop, share], device=self.accelerator.device)
            torch.distributed.all_reduce(votes)
            stop, share = votes[0].item(), votes[1].item() / self.accelerator.num_processes
        self._stop, self._time_share = stop > 0, min(share, 1.0)

    def _write_figures(self) -> None:
        now = time.monotonic()
        seconds = now - self._interval_started
        line = {"images": self.images, "seconds": round(now - self._started, 1)}
        line["images_per_second"] = round((self.images - self._interval_images_start) / max(seconds, 1e-9), 1)
        for name, total in self._sums.items():
            line[name] = round(float(total) / self._counts[name], 6)
        self._sums, self._counts = {}, {}
        self._interval_started, self._interval_images_start = now, self.images
        self.record(line)

    def record(self, line: Mapping[str, float]) -> None:
        """Write one line of figures ("images" among them) to figures.jsonl and TensorBoard."""
        if not self.accelerator.is_main_process:
            return
        with open(self.folder / "figures.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self.folder / "tensorboard")
        for name, value in line.items():
            if name != "images" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, line.get("images", self.images))
        self._bar.write(json.dumps(line)) if self._bar is not None else None

    def sheet(self, name: str, image: Image.Image) -> None:
        """Save a picture as sheets/<name>-<images>.png (main process)."""
        if self.accelerator.is_main_process:
            path = self.folder / "sheets" / f"{name}-{self.images:09d}.png"
            image.save(path.with_suffix(".tmp"), format="PNG")
            os.replace(path.with_suffix(".tmp"), path)

    def save(self) -> None:
        """Write a checkpoint under a temporary name, then rename; prune the oldest."""
        if self.images == self._last_saved:
            return
        self._last_saved = self.images
        if self.accelerator.is_main_process:
            final = self.folder / f"checkpoint-{self.images}"
            temporary = self.folder / f".checkpoint-{self.images}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            for name, model in self.models.items():
                model.save_pretrained(temporary / name, max_shard_size=SHARD_SIZE)
            forget_origin(temporary)
            for name, optimizer in self.optimizers.items():
                (temporary / "optimizers" / name).mkdir(parents=True)
                save_torch_state_dict(
                    _optimizer_tensors(optimizer), temporary / "optimizers" / name, max_shard_size=SHARD_SIZE
                )
            (temporary / "state.json").write_text(json.dumps({"images": self.images, "state": self.state}))
            (temporary / "config.json").write_text(json.dumps(self.config, indent=2, default=str))
            os.replace(temporary, final)
            for old in self.checkpoints[: -self.keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def finish(self) -> bool:
        """Save what is unsaved and close; True where the run reached its end, False where it was stopped."""
        if self._counts:
            self._write_figures()
        self.save()
        self._signals.restore()
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            self._writer.close()
        return self.images >= self.total_images


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimiser's state as flat tensors "<parameter>.<key>"; scalars become one-element vectors."""
    return {
        f"{index}.{key}": value.contiguous() if value.ndim else value.reshape(1)
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, value in load_file(file).items():
            index, key = name.split(".", 1)
            shape = () if key == "step" else parameters[int(index)].shape
            state.setdefault(int(index), {})[key] = value.reshape(shape)
    full = optimizer.state_dict()
    full["state"] = state
    optimizer.load_state_dict(full)
