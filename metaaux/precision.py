"""Precisions of computations: IEEE float32, TF32 or bfloat16, where weights, cameras, rays and sums stay in float32.

- float32: products of float32 numbers are IEEE's, whatever PyTorch's defaults are (its convolutions are TF32 on CUDA).
- tf32: on CUDA, inputs of matrix products and convolutions are rounded to 10 bits of mantissa.
- bfloat16: convolutions and matrix products of the networks compute in bfloat16. In a generator they do so by its
  `dtype`, in which styles, demodulation, rays and the image's sum stay in float32; other networks run under autocast.
- `None`: float32 as PyTorch is set. On CUDA its defaults are TF32 for convolutions (cuDNN's) and IEEE for matrix
  products, thus for the tri-planes' decoder too.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator

import torch

PRECISIONS = ("float32", "tf32", "bfloat16")


def check_precision(precision: str | None, device: str | torch.device | None = None) -> str | None:
    """`precision`, if there is one of that name and, where a device is given, it differs from the others there.

    Raises:
        ValueError: another name, or tf32 for a device other than CUDA.
    """
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision must be {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}, got {precision!r}")
    if precision == "tf32" and device is not None and torch.device(device).type != "cuda":
        raise ValueError(f"tf32 is a precision of NVIDIA's GPUs, the device is {device}: take float32 or bfloat16")
    return precision


def reduced_dtype(precision: str | None) -> torch.dtype | None:
    """In which networks compute; `None`: that of their weights."""
    return torch.bfloat16 if precision == "bfloat16" else None


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """PyTorch's autocast; none for `None`. Nothing is cached: a pass may be recorded within (`cuda_graphs`)."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype, cache_enabled=False)


def matmul_in_tf32() -> bool:
    """Whether float32 matrix products on CUDA are TF32 now; asking by the older name may raise since PyTorch 2.9."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(torch.backends, "fp32_precision") else matmul.allow_tf32


class _Flags:
    """PyTorch's settings of float32 products on CUDA, by its older and, since 2.9, its newer names."""

    def __init__(self) -> None:
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        self.matmul = self.cudnn = None
        # Where somebody mixed both kinds of names, the older ones cannot be read; the newer ones are what counts.
        with contextlib.suppress(RuntimeError):
            self.matmul = torch.get_float32_matmul_precision()
        with contextlib.suppress(RuntimeError):
            self.cudnn = cudnn.allow_tf32
        newer = (matmul, cudnn.conv, cudnn.rnn) if hasattr(torch.backends, "fp32_precision") else ()
        self.newer = [(backend, backend.fp32_precision) for backend in newer]

    @staticmethod
    def set(tf32: bool) -> None:
        # The older names set the newer too. The other way round whoever reads the older, as torch.compile, would fail.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32

    def restore(self) -> None:
        if self.matmul is not None:
            torch.backends.cuda.matmul.allow_tf32 = self.matmul != "highest"
            if self.matmul == "medium":
                torch.set_float32_matmul_precision("medium")
        if self.cudnn is not None:
            torch.backends.cudnn.allow_tf32 = self.cudnn
        for backend, precision in self.newer:
            backend.fp32_precision = precision


class _SharedFlags:
    """Lets threads that want the same flags run side by side, and others wait for their turn, first come, first
    served: the flags are the process's."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._users = 0
        self._tf32: bool | None = None
        self._before: _Flags | None = None
        self._thread = threading.local()

    @contextlib.contextmanager
    def using(self, tf32: bool | None) -> Iterator[None]:
        """The flags are set in the block, and left as the program set them for `None`. A block within it that wants
        others gives this one's turn up meanwhile: flags are read when work is launched, and nobody holds a turn while
        waiting for another one."""
        outer = getattr(self._thread, "turn", None)
        if outer == (tf32,):
            yield
            return
        if outer is not None:
            self._leave()
        try:
            self._enter(tf32)
            try:
                yield
            finally:
                self._leave()
        finally:
            if outer is not None:
                self._enter(*outer)

    def _enter(self, tf32: bool | None) -> None:
        turn = object()
        with self._changed:
            self._waiting.append(turn)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is turn and (not self._users or self._tf32 == tf32))
                if not self._users:
                    self._tf32 = tf32
                    if tf32 is not None:
                        self._before = _Flags()
                        _Flags.set(tf32)
                self._users += 1
            finally:
                self._waiting.remove(turn)
                self._changed.notify_all()
        self._thread.turn = (tf32,)

    def _leave(self) -> None:
        self._thread.turn = None
        with self._changed:
            self._users -= 1
            if not self._users:
                if self._before is not None:
                    self._before.restore()
                    self._before = None
                self._changed.notify_all()


_SHARED = _SharedFlags()


def products(precision: str | None, device: torch.device) -> contextlib.AbstractContextManager:
    """Work launched on a CUDA device in the block has this precision's float32 products; elsewhere there is one kind.

    This is the only place where the package sets these settings of PyTorch's, which are a process', not a thread's.
    They are as before once no thread is in such a block. Threads in blocks of the same precision run side by side;
    those of another, `None` included, wait until these have left, so that nobody's results depend on what others do.
    What other code launches meanwhile, in a thread of its own and outside of any such block, has this precision too.

    Raises:
        ValueError: see `check_precision`.
    """
    check_precision(precision, device)
    if device.type != "cuda":
        return contextlib.nullcontext()
    return _SHARED.using(None if precision is None else precision == "tf32")
