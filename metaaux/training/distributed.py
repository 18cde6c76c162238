"""What the processes of a run share: starting weights, gradients, random streams, decisions."""

from __future__ import annotations

import functools
import pickle
import secrets
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, set_seed
from torch import nn

Result = TypeVar("Result")


class FlatGradients:
    """One buffer that holds the gradients of all `parameters`, which see it through views as their `.grad`.

    `torch.autograd.grad`'s tensors are flattened with `flatten` (inside a captured function) and handed to `set`,
    which averages them over the processes in a single reduction. Used instead of DistributedDataParallel because a
    GAN's phases each touch other parameters, and because its hooks cannot be captured.

    Attributes:
        nonfinite_steps: how often `set` was given a gradient that was not finite; a tensor, read without haste.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]):
        self.parameters = list(parameters)
        sizes = [p.numel() for p in self.parameters]
        self.buffer = torch.zeros(sum(sizes), device=self.parameters[0].device, dtype=torch.float32)
        self.nonfinite_steps = torch.zeros((), device=self.buffer.device)
        for parameter, part in zip(self.parameters, self.buffer.split(sizes), strict=True):
            # In the parameter's own memory layout, which fused optimisers take for granted.
            parameter.grad = part.as_strided(parameter.shape, parameter.stride())

    def flatten(self, loss: torch.Tensor) -> torch.Tensor:
        """Gradient of `loss` with respect to the parameters, as one vector; zero where one plays no part."""
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return torch.cat([_in_layout_of(p, g) for p, g in zip(self.parameters, gradients, strict=True)])

    @torch.no_grad()
    def set(self, flat: torch.Tensor, processes: int = 1) -> None:
        """Make `flat`, averaged over `processes`, the parameters' gradient. What is not a number becomes 0 and
        infinity ±10⁵, as in StyleGAN, and the step is counted in `nonfinite_steps`, by which a run ends."""
        self.buffer.copy_(flat)
        if processes > 1:
            torch.distributed.all_reduce(self.buffer)
            self.buffer.div_(processes)
        self.nonfinite_steps += ~self.buffer.isfinite().all()
        torch.nan_to_num(self.buffer, nan=0.0, posinf=1e5, neginf=-1e5, out=self.buffer)


def _in_layout_of(parameter: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    """`gradient` as a vector, in the order in which `parameter` lies in memory."""
    flat = torch.zeros_like(parameter) if gradient is None else gradient
    if flat.stride() != parameter.stride():
        flat = torch.empty_like(parameter).copy_(flat)
    return flat.as_strided((flat.numel(),), (1,))


def start_processes(timeout_minutes: float, **settings) -> Accelerator:
    """🤗 accelerate's, for any number of processes. Theirs is the group's time-out: NCCL's own ten minutes are less
    than one process may take for held-out figures of large networks while the others wait.

    Args:
        timeout_minutes: how long a process waits for another.
        settings: further ones of `Accelerator`.
    """
    group = InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_minutes))
    return Accelerator(kwargs_handlers=[group], **settings)


def on_main_process(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """What `function` returns in the main process, in every process; so is an error that it raises there, for which
    the others would otherwise wait until the time-out. The result must be picklable."""
    if accelerator.num_processes == 1:
        return function()
    outcome: list = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = _portable(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _portable(error: Exception) -> Exception:
    """`error`, or what it says where it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is set in any process; the same answer in all, asked at the same step."""
    if accelerator.num_processes == 1:
        return flag
    count = torch.tensor(float(flag), device=accelerator.device)
    torch.distributed.all_reduce(count)
    return count.item() > 0


def check_shared_folder(accelerator: Accelerator, folder: Path) -> None:
    """Every process must see the run's folder: each reads its checkpoints and writes its random state there.

    Raises:
        ValueError: in every process, where one of them does not see what the main process writes into `folder`.
    """
    if accelerator.num_processes == 1:
        return
    path = on_main_process(accelerator, functools.partial(_new_file, folder))
    unseen = any_process(accelerator, not path.exists())
    on_main_process(accelerator, path.unlink)
    if unseen:
        raise ValueError(
            f"not all processes see the same folder {folder}: several nodes need the run's folder on a file system "
            "that they share (the data set may be a copy on each)"
        )


def _new_file(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".shared-{secrets.token_hex(8)}"
    path.touch()
    return path


def broadcast_module(accelerator: Accelerator, module: nn.Module) -> None:
    """Make every process start from the main process's parameters and buffers."""
    if accelerator.num_processes > 1:
        for tensor in [*module.parameters(), *module.buffers()]:
            torch.distributed.broadcast(tensor.data, 0)


@torch.no_grad()
def average_buffers(accelerator: Accelerator, buffers: Iterable[torch.Tensor]) -> None:
    """Mean over the processes of what each learns from its own images without a gradient, in place."""
    buffers = list(buffers)
    if accelerator.num_processes > 1 and buffers:
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        torch.distributed.all_reduce(flat)
        flat /= accelerator.num_processes
        for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))


def batch_statistics(module: nn.Module) -> list[torch.Tensor]:
    """Running means and variances of the batch normalisations in `module`."""
    normalisations = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [
        statistic
        for normalisation in normalisations
        for statistic in (normalisation.running_mean, normalisation.running_var)
        if statistic is not None
    ]


@torch.no_grad()
def check_replicas(accelerator: Accelerator, models: Mapping[str, nn.Module]) -> None:
    """That every process has the same weights and buffers, bit by bit, and that all weights are finite.

    Raises:
        RuntimeError: in every process, naming tensors that differ from the main process's.
        FloatingPointError: some weights are infinite or not a number.
    """
    tensors = {f"{name}.{key}": value for name, model in models.items() for key, value in model.state_dict().items()}
    infinite = sorted(n for n, t in tensors.items() if t.is_floating_point() and not t.isfinite().all())
    if accelerator.num_processes > 1:
        own = torch.stack([_checksum(tensor) for tensor in tensors.values()])
        mains = own.clone()
        torch.distributed.broadcast(mains, 0)
        differs = (own != mains).long()
        torch.distributed.all_reduce(differs)
        if differs.any():
            names = [name for name, count in zip(tensors, differs.tolist(), strict=True) if count]
            raise RuntimeError(
                f"the processes' networks have gone apart: {len(names)} of {len(tensors)} tensors differ, among them "
                f"{', '.join(names[:3])}; resume from the last checkpoint"
            )
    if infinite:
        raise FloatingPointError(
            f"{len(infinite)} of the networks' tensors are no longer finite, among them {', '.join(infinite[:3])}; "
            "resume from the last checkpoint with a lower learning rate, or with precision fp32"
        )


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor's elements, read as integers: another one wherever a single element is; int64."""
    number = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(number).sum(dtype=torch.int64)


def seed_process(accelerator: Accelerator, seed: int, images: int) -> int:
    """Start this process's random streams for a run that has seen `images`; returns their seed.

    Every process gets another one, and a run that goes on with another number of processes does not repeat its
    beginning.
    """
    own = (seed * 1_000_003 + images * 64 + accelerator.process_index) % 2**31
    set_seed(own)
    return own


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """States of PyTorch's default generators on the CPU and, where it is another, on `device`; uint8."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(device: torch.device, states: Mapping[str, torch.Tensor]) -> None:
    """Go on from what `random_state` returned."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
