"""CUDA graphs for training steps: a step of hundreds of small kernels is launched as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


class CapturedFunction:
    """A function of tensors that is replayed as a CUDA graph once it is warm.

    The first calls run normally, so that kernels are compiled and chosen; then the function is captured, and from
    there on a call copies its inputs in place and replays what was recorded. The outputs are the same tensors at
    every call, overwritten by the next one. Python code inside runs at capture only: what changes from call to call
    must come as a tensor. Random numbers of the default generator are drawn anew at each replay.

    Args:
        function: takes tensors of constant shape, returns a (nested) tuple, list or dict of tensors.
        enabled: False always calls `function`; so do inputs that are not on CUDA.
        warmup: normal calls before the capture.
    """

    def __init__(self, function: Callable, enabled: bool = True, warmup: int = 3):
        self.function, self.enabled, self.warmup = function, enabled, warmup
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: torch.Tensor):
        if not self.enabled or not inputs[0].is_cuda:
            return self.function(*inputs)
        if self.graph is None:
            if self.warmup:
                self.warmup -= 1
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    outputs = self.function(*inputs)
                torch.cuda.current_stream().wait_stream(stream)
                return outputs
            self.inputs = [tensor.clone() for tensor in inputs]
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            # "thread_local" because NCCL's watchdog thread queries events meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.outputs = self.function(*self.inputs)
            self.graph = graph
        for static, tensor in zip(self.inputs, inputs, strict=True):
            if static is not tensor:
                static.copy_(tensor)
        self.graph.replay()
        return self.outputs


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
