"""Which device computes, what it is called, and when it has finished."""

from __future__ import annotations

import torch

#: Operators of an inversion that Apple's GPUs lack in some supported version of PyTorch: the derivatives of bilinear
#: look-ups (2.13 has them) and of antialiased reductions. The package switches PyTorch's fallback to the CPU on for
#: them. Double precision, which these GPUs lack altogether, is nowhere needed.
MPS_FALLBACK_OPERATORS = ("grid_sampler_2d_backward", "_upsample_bilinear2d_aa_backward")


def best_device() -> str:
    """The fastest device here: "cuda" where PyTorch finds an NVIDIA (or AMD) GPU, "mps" on a Mac's, else "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def usable_device(device: str | None) -> str:
    """`device` once a tensor could be made on it; `None` takes [`best_device`].

    Raises:
        ValueError: there is no such device, or PyTorch cannot use it here.
    """
    device = device or best_device()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def is_cpu(x: torch.Tensor) -> bool:
    """Whether a tensor lies where other layouts and groupings than a GPU's are fast. Networks ask here alone, so that
    a test can send a CPU a GPU's way."""
    return x.device.type == "cpu"


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all that it was given, on CUDA by this thread's stream: others' work need not be
    waited for. A time taken without it says nothing about a GPU."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def device_name(device: torch.device) -> str:
    """For example "NVIDIA H200"; "cpu" and "mps" for others."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
