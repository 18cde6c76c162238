"""What the processes of a run share: starting weights, gradients, random streams."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed


class FlatGradients:
    """One buffer that holds the gradients of all `parameters`, which see it through views as their `.grad`.

    `torch.autograd.grad`'s tensors are flattened with `flatten` (inside a captured function) and handed to `set`,
    which averages them over the processes in a single reduction. Used instead of DistributedDataParallel because a
    GAN's phases each touch other parameters, and because its hooks cannot be captured.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]):
        self.parameters = list(parameters)
        sizes = [p.numel() for p in self.parameters]
        self.buffer = torch.zeros(sum(sizes), device=self.parameters[0].device, dtype=torch.float32)
        for parameter, part in zip(self.parameters, self.buffer.split(sizes), strict=True):
            # In the parameter's own memory layout, which fused optimisers take for granted.
            parameter.grad = part.as_strided(parameter.shape, parameter.stride())

    def flatten(self, loss: torch.Tensor) -> torch.Tensor:
        """Gradient of `loss` with respect to the parameters, as one vector; zero where one plays no part."""
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return torch.cat([_in_layout_of(p, g) for p, g in zip(self.parameters, gradients, strict=True)])

    @torch.no_grad()
    def set(self, flat: torch.Tensor, processes: int = 1) -> None:
        """Make `flat`, averaged over `processes`, the parameters' gradient; not-a-number becomes 0, infinity ±10⁵."""
        self.buffer.copy_(flat)
        if processes > 1:
            torch.distributed.all_reduce(self.buffer)
            self.buffer.div_(processes)
        torch.nan_to_num(self.buffer, nan=0.0, posinf=1e5, neginf=-1e5, out=self.buffer)


def _in_layout_of(parameter: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    """`gradient` as a vector, in the order in which `parameter` lies in memory."""
    flat = torch.zeros_like(parameter) if gradient is None else gradient
    if flat.stride() != parameter.stride():
        flat = torch.empty_like(parameter).copy_(flat)
    return flat.as_strided((flat.numel(),), (1,))


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
