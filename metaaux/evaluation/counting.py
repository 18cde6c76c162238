"""What a computation asks of a device, counted and not timed: operations, bytes, operators; the floor they give."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

#: Rates of an H100 SXM by its data sheet, without sparsity: TFLOP/s of matrix products, and TB/s of its memory.
H100_TFLOPS = {"bfloat16": 989.0, "tf32": 494.0, "float32": 67.0}
H100_TERABYTES = 3.35

# Views and metadata launch nothing on a device; the rest of them have `is_view` schemas.
_WITHOUT_KERNEL = ("aten.detach", "aten.empty", "aten._unsafe_view", "aten.lift_fresh", "aten._local_scalar_dense")

# The driver's and the runtime's calls that make a GPU compute something.
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")


class OperatorCounter(TorchDispatchMode):
    """Counts the operators below autograd that compute something, and the bytes that they read and write.

    An operator is about one kernel on a GPU. Each operator's tensors count in full, so the bytes are what its memory
    moves if nothing is fused and no cache helps.

    Attributes:
        operators: their number.
        bytes: read and written.
    """

    def __init__(self):
        super().__init__()
        self.operators = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not str(func).startswith(_WITHOUT_KERNEL):
            self.operators += 1
            self.bytes += sum(
                tensor.numel() * tensor.element_size()
                for tensor in tree_leaves((args, kwargs, result))
                if isinstance(tensor, torch.Tensor)
            )
        return result


def count(function: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Counts one call of `function`, which computes on `device`.

    Returns:
        "flops": of matrix products and convolutions, a multiplication and an addition being two.
        "bytes", "operators": see `OperatorCounter`.
        "kernels": launched on the GPU as the profiler sees them; on CUDA alone.
        "h100_floor_ms": by precision, the least time that the operations take an H100.
        "h100_unfused_ms": the time that its memory takes to move the bytes.
    """
    operators, flops = OperatorCounter(), FlopCounterMode(display=False)
    with ExitStack() as stack:
        stack.enter_context(operators)
        stack.enter_context(flops)
        function()
    total = flops.get_total_flops()
    counts = {
        "flops": total,
        "bytes": operators.bytes,
        "operators": operators.operators,
        "h100_floor_ms": {name: total / rate / 1e9 for name, rate in H100_TFLOPS.items()},
        "h100_unfused_ms": operators.bytes / H100_TERABYTES / 1e9,
    }
    if device.type == "cuda":
        counts["kernels"] = profiled(function, device)["kernels"]
    return counts


def profiled(function: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """How one call of `function` keeps a CUDA device busy, as PyTorch's profiler sees it.

    Returns:
        "kernels": computed on the GPU, those of CUDA graphs too.
        "launches": of kernels and graphs by the host.
        "busy_ms": in which the GPU computed or copied something.
    """
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize(device)
    # Not `profile.events()`, which for tens of thousands of kernels takes many times as long as they did.
    events = profile.profiler.kineto_results.events()
    on_gpu = [event for event in events if event.device_type() == torch.autograd.DeviceType.CUDA]
    return {
        "kernels": sum(not event.name().startswith(("Memcpy", "Memset")) for event in on_gpu),
        "launches": sum(event.name().startswith(_LAUNCHES) for event in events),
        "busy_ms": covered((event.start_ns(), event.start_ns() + event.duration_ns()) for event in on_gpu) / 1e6,
    }


def covered(spans: Iterable[tuple[int, int]]) -> int:
    """How much of a line the spans (start, end) cover, where they overlap once."""
    total, reached = 0, None
    for start, end in sorted(spans):
        start = start if reached is None else max(start, reached)
        total += max(0, end - start)
        reached = end if reached is None else max(end, reached)
    return total
