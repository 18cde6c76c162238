"""What every training run shares: a folder, checkpoints, figures, resumption, a clean stop."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from huggingface_hub import save_torch_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ..files import atomic_path, forget_origin
from .distributed import (
    FlatGradients,
    any_process,
    check_replicas,
    check_shared_folder,
    on_main_process,
    random_state,
    set_random_state,
)
from .loading import LATEST, load_network

SHARD_SIZE = "15MB"


class Stream(Protocol):
    """Something that draws at random, and can go on where it was."""

    def state(self) -> dict[str, torch.Tensor]: ...

    def set_state(self, state: Mapping[str, torch.Tensor]) -> None: ...


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


# accelerate's save_state would leave models without the configuration that `from_pretrained` needs, and optimisers and
# random states as pickles; its trackers are used.
class TrainingRun:
    """One run in its folder, counted in images shown over all processes.

    The folder holds `figures.jsonl`, `sheets/`, the trackers' files, `checkpoint-<images>/` and `latest`, which leads
    to the newest of these. In a checkpoint: a folder for each model (`save_pretrained`), the optimisers' state and
    each process's random state in safetensors files, `state.json` and `config.json`. All processes must see the
    folder.

    Args:
        folder: see above.
        accelerator: 🤗 accelerate's, for any number of processes.
        total_images: where the run ends.
        interval_images: this often a checkpoint is saved, then figures are written and callbacks called.
        models: saved and restored by name. optimizers: likewise.
        config: JSON-serialisable, written beside the checkpoints.
        state: JSON-serialisable values to be saved and restored along (augmentation strength, say).
        max_seconds: stop cleanly after so long by the main process's clock, to be resumed; None for no limit.
        keep: checkpoints of this run kept.
        gradients: whose steps with gradients that are not finite are counted.
        max_nonfinite_steps: with more of these in an interval the run ends.
        check_every: steps after which it is looked whether to stop.

    Raises:
        ValueError: the processes do not see the same folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        accelerator: Accelerator,
        total_images: int,
        interval_images: int,
        models: Mapping[str, torch.nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        config: Any = None,
        state: dict | None = None,
        max_seconds: float | None = None,
        keep: int = 2,
        gradients: Sequence[FlatGradients] = (),
        max_nonfinite_steps: int = 20,
        check_every: int = 16,
    ):
        self.folder, self.accelerator = Path(folder), accelerator
        self.total_images, self.interval_images = total_images, interval_images
        self.models, self.optimizers = dict(models), dict(optimizers)
        self.config = config
        self.state = {} if state is None else state
        self.max_seconds, self.keep = max_seconds, keep
        self.gradients, self.max_nonfinite_steps = gradients, max_nonfinite_steps
        self.check_every = check_every
        #: What else draws at random: saved for each process, and restored by `restore_random`.
        self.streams: dict[str, Stream] = {}
        self.images = 0
        self._steps = 0
        self._last_saved = 0
        self._own_checkpoints: list[Path] = []
        self._resumed_from: Path | None = None
        self._next_interval = interval_images
        self._nonfinite_before = 0
        self._sums: dict[str, torch.Tensor | float] = {}
        self._counts: dict[str, int] = {}
        self._before_saving: list[Callable[[TrainingRun], None]] = []
        self._callbacks: list[Callable[[TrainingRun], None]] = []
        self._started = self._interval_started = time.monotonic()
        self._interval_images_start = 0
        self._stop = False
        self._bar = None
        check_shared_folder(accelerator, self.folder)
        if accelerator.is_main_process:
            (self.folder / "sheets").mkdir(parents=True, exist_ok=True)
        self._signals = _Signals()

    # ------------------------------------------------------------------------------------------- beginning

    @property
    def checkpoints(self) -> list[Path]:
        """Complete checkpoints of the folder, oldest first."""
        found = [p for p in self.folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
        return sorted(found, key=lambda p: int(p.name.split("-")[1]))

    def refuse_used_folder(self) -> None:
        """That an earlier run's checkpoints and figures are neither replaced nor mixed with new ones.

        Raises:
            FileExistsError: in every process, where the folder holds a run.
        """
        if on_main_process(self.accelerator, self._is_used):
            raise FileExistsError(f"{self.folder} holds a run already: resume it, or choose another folder")

    def _is_used(self) -> bool:
        return bool(self.checkpoints) or (self.folder / "figures.jsonl").exists()

    def resume(self) -> bool:
        """Continue from the newest checkpoint of the folder; False where there is none."""
        found = on_main_process(self.accelerator, lambda: self.checkpoints)
        if not found:
            return False
        newest = found[-1]
        for name, model in self.models.items():
            model.load_state_dict(load_network(type(model), newest / name).state_dict())
        for name, optimizer in self.optimizers.items():
            _restore_optimizer(optimizer, newest / "optimizers" / name)
        saved = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        self.images = self._interval_images_start = self._last_saved = saved["images"]
        self._next_interval = (self.images // self.interval_images + 1) * self.interval_images
        self.state.update(saved["state"])
        self._own_checkpoints, self._resumed_from = found, newest
        return True

    def restore_random(self) -> bool:
        """Let PyTorch's random numbers and `streams` go on where the checkpoint left them, so that a run that was
        stopped comes out as one that was not, as far as its kernels repeat themselves.

        False, with a warning, where the checkpoint is of another number of processes: then every stream is a new one.
        """
        if self._resumed_from is None:
            return False
        path = self._random_file(self._resumed_from)
        if not path.exists():
            warnings.warn(
                f"{self._resumed_from} has no random state for process {self.accelerator.process_index} of "
                f"{self.accelerator.num_processes}: photos and codes are drawn anew",
                stacklevel=2,
            )
            return False
        saved: dict[str, dict[str, torch.Tensor]] = {"": {}, **{name: {} for name in self.streams}}
        for key, value in load_file(path).items():
            stream, _, name = key.rpartition(".")
            saved.setdefault(stream, {})[name] = value
        set_random_state(self.accelerator.device, saved[""])
        for name, stream in self.streams.items():
            stream.set_state(saved[name])
        return True

    def _random_file(self, checkpoint: Path) -> Path:
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        return checkpoint / "random" / f"{process:05d}-of-{processes:05d}.safetensors"

    def before_saving(self, callback: Callable[[TrainingRun], None]) -> None:
        """Call `callback(run)` in every process before each checkpoint: what belongs into it."""
        self._before_saving.append(callback)

    def on_interval(self, callback: Callable[[TrainingRun], None]) -> None:
        """Call `callback(run)` in the main process at each interval, once the checkpoint is saved. Random numbers that
        it draws by PyTorch's default generators are not missing in the training."""
        self._callbacks.append(callback)

    # --------------------------------------------------------------------------------------------- on the way

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
        """Count `images` (of all processes) and collect `figures`, whose means are written at each interval.

        Raises:
            FloatingPointError: too many steps of the interval had gradients that are not finite, or weights are not.
            RuntimeError: the processes' networks differ.
        """
        self.images += images
        self._steps += 1
        self._bar.update(images)
        for name, value in (figures or {}).items():
            value = value.detach().float().mean() if isinstance(value, torch.Tensor) else value
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        if self._steps % self.check_every == 0:
            # Every process sees the same sum, though one clock alone decides.
            late = self.max_seconds is not None and time.monotonic() - self._started > self.max_seconds
            self._stop = any_process(
                self.accelerator, self._signals.stop or (late and self.accelerator.is_main_process)
            )
            self._count_nonfinite_steps()
        if self.images >= self._next_interval:
            self._next_interval = (self.images // self.interval_images + 1) * self.interval_images
            self._end_interval()

    def _count_nonfinite_steps(self) -> int:
        count = int(sum(gradients.nonfinite_steps for gradients in self.gradients)) - self._nonfinite_before
        if count > self.max_nonfinite_steps:
            raise FloatingPointError(
                f"{count} gradients since the last interval were not finite, at {self.images} images; the last "
                f"checkpoint is {self.checkpoints[-1] if self.checkpoints else 'none'}. Lower the learning rate, or "
                "compute with precision fp32"
            )
        return count

    def _end_interval(self) -> None:
        """Save first: whatever goes wrong in reporting, the training is not lost."""
        line = self._mean_figures()
        for callback in self._before_saving:
            callback(self)
        self.save()
        self.record(line)
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        for callback in self._callbacks:
            with torch.random.fork_rng(devices):
                on_main_process(self.accelerator, functools.partial(callback, self))

    def _mean_figures(self) -> dict[str, float]:
        now = time.monotonic()
        seconds = now - self._interval_started
        line = {"images": self.images, "seconds": round(now - self._started, 1)}
        line["images_per_second"] = round((self.images - self._interval_images_start) / max(seconds, 1e-9), 1)
        for name, total in self._sums.items():
            line[name] = round(float(total) / self._counts[name], 6)
        if nonfinite := self._count_nonfinite_steps():
            line["nonfinite_gradients"] = nonfinite
            warnings.warn(f"{nonfinite} gradients were not finite, before {self.images} images", stacklevel=2)
        self._nonfinite_before += nonfinite
        self._sums, self._counts = {}, {}
        self._interval_started, self._interval_images_start = now, self.images
        return line

    def record(self, line: Mapping[str, float]) -> None:
        """Write one line of figures ("images" among them) to figures.jsonl and the trackers."""
        if not self.accelerator.is_main_process:
            return
        with open(self.folder / "figures.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        numbers = {name: value for name, value in line.items() if name != "images" and isinstance(value, int | float)}
        self.accelerator.log(numbers, step=line.get("images", self.images))
        if self._bar is not None:
            self._bar.write(json.dumps(line))

    def sheet(self, name: str, image: Image.Image) -> None:
        """Save a picture as sheets/<name>-<images>.png (main process)."""
        if self.accelerator.is_main_process:
            with atomic_path(self.folder / "sheets" / f"{name}-{self.images:09d}.png") as temporary:
                image.save(temporary)

    # ------------------------------------------------------------------------------------------------- saving

    def save(self) -> None:
        """Write a checkpoint under a temporary name, then rename it, lead `latest` to it and prune this run's oldest.

        Raises:
            FileExistsError: there is a checkpoint of this name that is not this run's.
            FloatingPointError, RuntimeError: weights are not finite, or differ between processes.
        """
        if self.images == self._last_saved:
            return
        check_replicas(self.accelerator, self.models)
        final = self.folder / f"checkpoint-{self.images}"
        temporary = self.folder / f".checkpoint-{self.images}.tmp"
        on_main_process(self.accelerator, functools.partial(self._write_checkpoint, temporary, final))
        self._write_random_state(temporary)
        on_main_process(self.accelerator, functools.partial(self._publish_checkpoint, temporary, final))
        self._last_saved = self.images

    def _write_checkpoint(self, temporary: Path, final: Path) -> None:
        if final.exists():
            raise FileExistsError(f"{final} exists and is not of this run; choose another folder")
        shutil.rmtree(temporary, ignore_errors=True)
        for name, model in self.models.items():
            model.save_pretrained(temporary / name, max_shard_size=SHARD_SIZE)
        forget_origin(temporary)
        for name, optimizer in self.optimizers.items():
            folder = temporary / "optimizers" / name
            folder.mkdir(parents=True)
            save_torch_state_dict(_optimizer_tensors(optimizer), folder, max_shard_size=SHARD_SIZE)
        (temporary / "random").mkdir(parents=True)
        state = {"images": self.images, "state": self.state}
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
        (temporary / "config.json").write_text(json.dumps(self.config, indent=2, default=str), encoding="utf-8")

    def _write_random_state(self, checkpoint: Path) -> None:
        states = random_state(self.accelerator.device)
        for name, stream in self.streams.items():
            states |= {f"{name}.{key}": value for key, value in stream.state().items()}
        failure = None
        try:
            save_file(states, self._random_file(checkpoint))
        except OSError as error:
            failure = error
        if any_process(self.accelerator, failure is not None):
            raise failure or OSError(f"another process could not write into {checkpoint}")

    def _publish_checkpoint(self, temporary: Path, final: Path) -> None:
        os.replace(temporary, final)
        self._own_checkpoints.append(final)
        link = self.folder / f".{LATEST}.tmp"
        link.unlink(missing_ok=True)
        try:
            if os.name == "nt":
                raise OSError("Windows gives few users the right to make links, and none to replace them")
            link.symlink_to(final.name, target_is_directory=True)
        except OSError:
            link.write_text(final.name, encoding="utf-8")  # which `loading.find_folder` follows
        os.replace(link, self.folder / LATEST)
        for old in self._own_checkpoints[: -self.keep]:
            shutil.rmtree(old)
        self._own_checkpoints = self._own_checkpoints[-self.keep :]

    def finish(self) -> bool:
        """Save and report what is left; True where the run reached its end, False where it was stopped."""
        if self.images != self._last_saved:
            self._end_interval()
        return self.images >= self.total_images

    def close(self) -> None:
        """Give signals and the trackers' files back, after errors too."""
        self._signals.restore()
        if self._bar is not None:
            self._bar.close()
        # Not by accelerate's end_training, which ends the process group along with them.
        for tracker in self.accelerator.trackers:
            tracker.finish()


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
            if key == "step":
                value = value.reshape(())
            else:
                # In the parameter's memory layout, which fused optimisers take for granted and files do not have.
                like = parameters[int(index)]
                value = torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value.reshape(like.shape))
            state.setdefault(int(index), {})[key] = value
    full = optimizer.state_dict()
    full["state"] = state
    optimizer.load_state_dict(full)
