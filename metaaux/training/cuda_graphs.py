"""CUDA graphs for training steps: a step of hundreds of small kernels is launched as one."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..cuda_graphs import capture


# torch.cuda.make_graphed_callables captures forward and backward passes apart, and so neither gradients taken inside a
# function nor their derivatives (R1, second order); nor does it take dictionaries.
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
            torch.cuda.synchronize()
            self.graph, self.outputs = capture(lambda: self.function(*self.inputs))
        for static, tensor in zip(self.inputs, inputs, strict=True):
            if static is not tensor:
                static.copy_(tensor)
        self.graph.replay()
        return self.outputs
