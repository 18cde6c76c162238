"""What each of the processes of test_training_processes.py does: trainings and commands, one after another, with a few
of their workings changed from outside. Run as `python -m tests.processes JOBS RANK` in a folder of its own.

The jobs of `together` are done by all processes, those of `alone` by one each, once they have left the group.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from safetensors.torch import save_file

from metaaux import cli
from metaaux.training import loop
from metaaux.training.encoder import EncoderEvaluation
from metaaux.training.generator import GeneratorTrainer
from metaaux.training.identity import IdentityTrainer
from metaaux.training.trainer import TrainingRun


def tensors_of(run: TrainingRun) -> dict[str, torch.Tensor]:
    """All models of a run, as they are now."""
    return {
        f"{m}.{k}": v.contiguous().clone() for m, model in run.models.items() for k, v in model.state_dict().items()
    }


def kept_at_the_end(job: dict, rank: int, finish: Callable, run: TrainingRun) -> bool:
    """Leave what a run ended with in `NAME/RANK.safetensors`."""
    save_file(tensors_of(run) | {"images": torch.tensor(run.images)}, Path(job["name"], f"{rank}.safetensors"))
    return finish(run)


def kept_at_the_start(job: dict, active: Callable, run: TrainingRun) -> bool:
    """Leave what a run began with in `NAME/start.safetensors`."""
    path = Path(job["name"], "start.safetensors")
    if run.accelerator.is_main_process and not path.exists():
        save_file(tensors_of(run), path)
    return active(run)


def hurried_or_broken(job: dict, advance: Callable, run: TrainingRun, images: int, figures=None) -> None:
    """Let each process's clock run ahead in its own way, or a network of the second one go astray."""
    rank = run.accelerator.process_index
    run._started -= job.get("hurry", [0, 0])[rank]
    if job.get("broken") and rank == 1:
        with torch.no_grad():
            run.models["generator"].w_avg[0] += 1e-3
    advance(run, images, figures)


@contextmanager
def shared_draws(rank: int, processes: int) -> Iterator[None]:
    """Random numbers as one process draws them for the whole batch: each draws all, and takes every so many-th."""

    def part(whole: torch.Tensor) -> torch.Tensor:
        return whole[rank::processes].contiguous()

    def drawn(draw: Callable, *size, **options) -> torch.Tensor:
        first, *rest = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        return part(draw(first * processes, *rest, **options))

    def drawn_below(draw: Callable, high: int, size: tuple[int, ...], **options) -> torch.Tensor:
        return part(draw(high, (size[0] * processes, *size[1:]), **options))

    def drawn_like(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    def drawn_into(draw: Callable) -> Callable:
        def uniform_(tensor: torch.Tensor, *limits: float) -> torch.Tensor:
            whole = tensor.new_empty(len(tensor) * processes, *tensor.shape[1:])
            return tensor.copy_(part(draw(whole, *limits)))

        return uniform_

    with ExitStack() as stack:
        for name in ("rand", "randn"):
            stack.enter_context(patch.object(torch, name, functools.partial(drawn, getattr(torch, name))))
        stack.enter_context(patch.object(torch, "randn_like", drawn_like))
        stack.enter_context(patch.object(torch, "randint", functools.partial(drawn_below, torch.randint)))
        stack.enter_context(patch.object(torch.Tensor, "uniform_", drawn_into(torch.Tensor.uniform_)))
        yield


def train_on_one_batch(job: dict, train: Callable, part: type[loop.Trainer], config, folder, resume: bool):
    """Steps whose batch is the same, over all processes, however many these are."""

    class Part(part):
        def step(self, images: int):
            if job.get("eval"):
                # Batch normalisation sees a process's own photos alone.
                self.auxiliary.eval()
            with shared_draws(self.accelerator.process_index, self.accelerator.num_processes):
                return super().step(images)

    return train(Part, config, folder, resume)


def seed_alike(accelerator, seed: int, images: int) -> int:
    """In place of `distributed.seed_process`: the same in each process."""
    set_seed(seed)
    return seed


@contextmanager
def one_batch(job: dict) -> Iterator[None]:
    """Make trainings of several processes comparable with one's: see `train_on_one_batch`."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(loop, "seed_process", seed_alike))
        stack.enter_context(patch.object(loop, "train", functools.partial(train_on_one_batch, job, loop.train)))
        # With its own 1e-8 the first steps would go by the sign of gradients that are nothing but rounding errors.
        for name in ("Adam", "AdamW"):
            stack.enter_context(
                patch.object(torch.optim, name, functools.partial(getattr(torch.optim, name), eps=1e-3))
            )
        yield


def do(job: dict, rank: int) -> None:
    """One training, or one command."""
    folder = Path(job["name"])
    folder.mkdir(exist_ok=True)
    with ExitStack() as stack:
        for name, function in {
            "finish": functools.partial(kept_at_the_end, job, rank),
            "active": functools.partial(kept_at_the_start, job),
            "advance": functools.partial(hurried_or_broken, job),
        }.items():
            changed = functools.partialmethod(_swapped, function, getattr(TrainingRun, name))
            stack.enter_context(patch.object(TrainingRun, name, changed))
        stack.enter_context(patch.object(GeneratorTrainer, "HEADS", 2))
        stack.enter_context(patch.object(IdentityTrainer, "EVALUATED", 50))
        stack.enter_context(patch.object(EncoderEvaluation, "SAMPLES", 8))
        if job.get("one_batch"):
            stack.enter_context(one_batch(job))
        try:
            if "command" in job:
                cli.app(job["command"], standalone_mode=False)
                return
            module = importlib.import_module(f"metaaux.training.{job['part']}")
            config = getattr(module, f"{job['part'].capitalize()}Config").model_validate(job["settings"])
            module.train(config, job["run"], resume=job.get("resume", False))
        except (OSError, RuntimeError) as error:
            (folder / f"{rank}.error").write_text(f"{type(error).__name__}: {error}")


def _swapped(run: TrainingRun, function: Callable, original: Callable, *arguments):
    return function(original, run, *arguments)


def main() -> None:
    torch.set_num_threads(1)
    jobs, rank = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    for job in jobs["together"]:
        do(job, rank)
    processes = int(os.environ["WORLD_SIZE"])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"):
        del os.environ[name]
    for job in jobs["alone"][rank::processes]:
        do(job, 0)


if __name__ == "__main__":
    main()
