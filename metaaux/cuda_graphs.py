"""CUDA graphs: a pass of hundreds of small kernels is recorded once, and launched as one from there on.

A full-size inversion has tens of thousands of kernels, most of them so short that the GPU waits for the host to launch
the next one. `CudaGraphs` keeps the recordings of one pipeline's passes for all of its threads; `CudaGraphs.bind` says
what a pass may do. Training has its own `training.cuda_graphs`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import warnings
import weakref
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from .network_state import KnownState, state_of
from .structures import flatten, with_tensors

aten = torch.ops.aten
Result = TypeVar("Result")

#: Runs a pass: (name, function, inputs) → outputs; see `CudaGraphs.bind`.
RunPass = Callable[[str, Callable[[Any], Any], Any], Any]

# PyTorch allows one capture at a time in a process, and no emptying of its cache meanwhile. A pass that is launched so
# that it can be captured next takes its turn too: beside other threads' captures cuDNN has failed in one.
_CAPTURING = threading.RLock()
# Captures of a pass that may fail.
_TRIES = 3


def run_eagerly(name: str, function: Callable[[Any], Result], inputs: Any) -> Result:
    """A `RunPass` that launches kernel by kernel."""
    return function(inputs)


def capture(
    function: Callable[[], Result], pool: Any = None, stream: torch.cuda.Stream | None = None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Records `function`, whose kernels must be compiled and chosen already.

    Args:
        function: is run once, and nothing of it is computed.
        pool: memory of the graph, as `torch.cuda.graph_pool_handle` gives it. Default: its own.
        stream: where it is recorded. Default: PyTorch's stream for all captures.

    Returns:
        The graph, and what `function` returned: tensors that a replay fills.
    """
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    generator = torch.cuda.default_generators[before.device_index]
    seed, offset = generator.initial_seed(), generator.get_offset()
    try:
        # "thread_local": other threads go on meanwhile, and NCCL's watchdog queries events.
        with _CAPTURING, torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            outputs = function()
    except BaseException:
        # Where a capture cannot be ended, PyTorch leaves its stream set, its random numbers as if they were recorded,
        torch.cuda.set_stream(before)
        fresh = torch.Generator(before.device).manual_seed(seed)
        fresh.set_offset(offset)
        generator.graphsafe_set_state(fresh)
        if pool is not None:
            # and its allocator as if the capture went on, which fails much later and elsewhere.
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(before.device_index, pool)
                torch._C._cuda_releasePool(before.device_index, pool)
        raise
    return graph, outputs


class HostWaits(TorchDispatchMode):
    """Notes the operators that make the host wait for a GPU, which no graph can hold; backward passes are seen too.

    Attributes:
        found: their names.
    """

    _WAITING = frozenset(
        (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2, aten.bincount)
    )

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        if (
            packet in self._WAITING
            or (packet is aten._to_copy and result.device != args[0].device)
            or (packet is aten.copy_ and args[0].device != args[1].device)
            or (packet is aten.index and any(i is not None and i.dtype == torch.bool for i in args[1]))
        ):
            self.found.append(str(packet))
        return result


def _arithmetic() -> tuple:
    """PyTorch's settings by which it chooses kernels."""
    cudnn = torch.backends.cudnn
    settings = (
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
    )
    if hasattr(torch.backends, "fp32_precision"):  # since 2.9, where asking by the former names may raise
        return (*settings, torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision)
    return (*settings, torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32)


class _Streams:
    """Streams that nobody else here uses: those of lanes, and those of threads that are at work.

    PyTorch has 32 a device and gives them out in turn, so one may come twice; and cuBLAS has one workspace a stream.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[torch.cuda.Stream] = []
        self._taken: set[int] = set()

    def take(self, device: torch.device) -> torch.cuda.Stream:
        with self._lock:
            known = [stream for stream in self._free if stream.device_index == device.index]
            made = (torch.cuda.Stream(device) for _ in range(32))
            stream = known[0] if known else next((s for s in made if s.cuda_stream not in self._taken), None)
            stream = stream or torch.cuda.Stream(device)
            if known:
                self._free.remove(stream)
            self._taken.add(stream.cuda_stream)
            return stream

    def give_back(self, stream: torch.cuda.Stream) -> None:
        with self._lock:
            self._free.append(stream)


#: Streams of the package's own.
STREAMS = _Streams()


@dataclass(frozen=True, eq=False)
class Recording:
    """A captured pass: `replay` reads the buffers `inputs` and fills the tensors of `outputs`."""

    replay: Callable[[], None]
    inputs: list[torch.Tensor]
    outputs: Any


class Lane(ABC):
    """Recordings that run one at a time and share the buffers of their inputs.

    Args:
        device: where they run.

    Attributes:
        lock: held by the thread that launches something.
        recordings: by key, the longest unused first.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.lock = threading.Lock()
        self.recordings: OrderedDict[Hashable, Recording] = OrderedDict()
        self._buffers: weakref.WeakValueDictionary[Hashable, torch.Tensor] = weakref.WeakValueDictionary()

    @property
    def idle(self) -> bool:
        """Whether a pass of the calling thread could start at once, or follow what this thread launched itself."""
        return not self.lock.locked()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Work launched within waits for what other threads launched here; the lock is held meanwhile."""
        with self.lock:
            yield

    def record(self, function: Callable[[Any], Any], inputs: Any, tensors: list[torch.Tensor]) -> Recording:
        """Captures a pass with buffers in place of its inputs."""
        buffers, seen = [], Counter()
        for tensor in tensors:
            layout = (tensor.dtype, tensor.shape, tensor.stride())
            seen[layout] += 1
            key = (layout, seen[layout])
            if (buffer := self._buffers.get(key)) is None:
                self._buffers[key] = buffer = torch.empty_like(tensor, requires_grad=False)
            buffers.append(buffer)
        replay, outputs = self.capture(lambda: function(with_tensors(inputs, iter(buffers))))
        return Recording(replay, buffers, outputs)

    @abstractmethod
    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """What does `function` again, and the outputs that it fills."""

    def wait(self) -> None:
        """Returns when all that was launched here is done."""
        return

    def close(self) -> None:
        """Gives back what is the lane's alone. Nothing is recorded here any more."""
        return


class CudaLane(Lane):
    """A lane with a memory pool that its graphs share (`torch.cuda.graph_pool_handle`)."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.pool, self.stream = torch.cuda.graph_pool_handle(), STREAMS.take(device)
        self.done = torch.cuda.Event()  # what was launched last
        self.user: int | None = None  # by which thread

    @property
    def idle(self) -> bool:
        return super().idle and (self.user == threading.get_ident() or self.done.query())

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        with super().turn():
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self.done)
            self.user = threading.get_ident()
            try:
                yield
            finally:
                self.done.record(stream)

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        with torch.cuda.device(self.device):
            try:
                graph, outputs = capture(function, self.pool, self.stream)
            except BaseException:
                # PyTorch takes the pool for one that is captured into from there on. Its graphs keep their memory.
                self.pool = torch.cuda.graph_pool_handle()
                raise
        return graph.replay, outputs

    def wait(self) -> None:
        self.done.synchronize()

    def close(self) -> None:
        STREAMS.give_back(self.stream)


class CudaGraphs:
    """Recordings of passes, one for each pass, networks, shapes, precision and device; shared by threads.

    Each of `concurrency` lanes has memory of its own. Within a lane the recordings share one memory pool
    (`torch.cuda.graph_pool_handle`) and the buffers of inputs of one shape: a lane needs as much as its largest pass
    and the outputs of all, not the sum of all passes. Therefore one of them runs at a time.

    A call takes an idle lane and holds its lock while it launches three things on the thread's current stream, which
    is a fraction of a millisecond: inputs are copied in, the graph is replayed, outputs are copied out. So the passes
    of several photos take turns, and what threads do on the CPU in between goes on side by side. Another lane is only
    made once the others were found busy.

    Args:
        concurrency: passes that a GPU may run at once: batches of one leave much of it idle. Memory grows with it.
        capacity: recordings that a lane keeps; the longest unused goes first.

    Attributes:
        captures: recordings made so far.

    Raises:
        ValueError: a number below 1.
    """

    lane_type: type[Lane] = CudaLane

    def __init__(self, concurrency: int = 2, capacity: int = 16):
        if min(concurrency, capacity) < 1:
            raise ValueError(f"concurrency and capacity must be 1 or more, got {concurrency} and {capacity}")
        self.concurrency, self.capacity, self.captures = concurrency, capacity, 0
        self._lock = threading.Lock()
        self._lanes: dict[torch.device, list[Lane]] = {}
        self._states: dict[Hashable, KnownState] = {}
        self._serial = itertools.count()
        self._failures: Counter[Hashable] = Counter()
        self._refused: set[Hashable] = set()

    def bind(self, kind: Hashable, *parts: Any) -> RunPass:
        """What runs passes that use these networks.

        The returned function takes the pass' name, the pass itself, and its inputs: nested mappings and sequences of
        tensors and constants. The pass takes these alone and returns nested mappings and sequences of tensors. It may
        overwrite its inputs, which are copies. Its Python code runs at the first call only, so name and constants say
        all that it depends on beside tensors and networks. The networks are in eval mode; a pass draws no random
        numbers and never makes the host wait.

        What it returns is the caller's. The first call runs kernel by kernel and is recorded afterwards. Calls on
        other devices than CUDA, inside of autocast or under a dispatch mode are never recorded, nor are passes that
        cannot be: a warning reports these once, and from there on they run kernel by kernel.

        Args:
            kind: says what the networks are for. Once a tensor of theirs was replaced or an attribute changed, the
                recordings of this kind are given up; new values in the same tensors need no new recording.
            parts: networks that the passes use, and objects that hold some.
        """
        known = self._states.get(kind)
        if known is None or not known.holds(parts):
            state = state_of(parts)
            with self._lock:
                before = self._states.get(kind)
                stale = before is None or before.state != state
                known = KnownState(next(self._serial) if stale else before.serial, state, parts)
                self._states[kind] = known
            if stale:
                self._drop(lambda key: key[0] == kind and key[1] < known.serial)
        return functools.partial(self._run, kind, known.serial)

    @contextlib.contextmanager
    def stream(self, device: torch.device) -> Iterator[None]:
        """A stream of the calling thread's own, since what threads launch on one stream runs one after the other.

        Tensors made inside have to be done with, or copied to the CPU, before it ends.
        """
        if device.type != "cuda":
            yield
            return
        before = torch.cuda.current_stream(device)
        own = STREAMS.take(before.device)
        own.wait_stream(before)
        try:
            with torch.cuda.stream(own):
                yield
        finally:
            before.wait_stream(own)
            STREAMS.give_back(own)

    def release(self) -> None:
        """Gives up all recordings and their memory, once the GPU has done what was launched."""
        self._drop(lambda key: True)
        with self._lock:
            lanes = [lane for lanes in self._lanes.values() for lane in lanes]
            self._lanes.clear()
            self._states.clear()
            self._failures.clear()
            self._refused.clear()
        for lane in lanes:
            lane.close()
        if lanes:
            with _CAPTURING:
                torch.cuda.empty_cache()

    def runs_on(self, device: torch.device) -> bool:
        """Whether passes are recorded there."""
        return device.type == "cuda"

    def _records(self, tensors: list[torch.Tensor]) -> bool:
        return (
            all(self.runs_on(tensor.device) for tensor in tensors)
            # This thread's modes; `is_in_torch_dispatch_mode` would tell of another's, such as one that records.
            and not _get_current_dispatch_mode_stack()
            and not torch.is_autocast_enabled("cuda")
        )

    def _drop(self, unwanted: Callable[[tuple], bool]) -> None:
        with self._lock:
            lanes = [lane for lanes in self._lanes.values() for lane in lanes]
        for lane in lanes:
            with lane.lock:
                for key in [key for key in lane.recordings if unwanted(key)]:
                    lane.wait()
                    del lane.recordings[key]

    def _lane(self, device: torch.device, key: Hashable) -> Lane:
        """An idle lane, best one with this recording; a new one while there may be more; else the longest unused."""
        with self._lock:
            lanes = self._lanes.setdefault(device, [])
            # In the order of their last use.
            lane = min(lanes, key=lambda lane: (not lane.idle, key not in lane.recordings), default=None)
            if lane is not None and (lane.idle or len(lanes) == self.concurrency):
                lanes.remove(lane)
            else:
                lane = self.lane_type(device)
            lanes.append(lane)
            return lane

    def _run(self, kind: Hashable, serial: int, name: str, function: Callable[[Any], Any], inputs: Any) -> Any:
        tensors: list[torch.Tensor] = []
        key = (kind, serial, name, flatten(inputs, tensors), _arithmetic())
        if key in self._refused or not self._records(tensors):
            return function(inputs)
        lane = self._lane(tensors[0].device, key)
        # Leaving inference mode switches gradients on, with which a pass may take other kernels.
        gradients = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(gradients), lane.turn():
            recording = lane.recordings.get(key)
            if recording is None:
                with _CAPTURING:
                    return self._first(lane, key, function, inputs, tensors)
            lane.recordings.move_to_end(key)
            with torch.no_grad():
                torch._foreach_copy_(recording.inputs, tensors)
                recording.replay()
                outputs: list[torch.Tensor] = []
                flatten(recording.outputs, outputs)
                return with_tensors(recording.outputs, iter([output.clone() for output in outputs]))

    def _first(self, lane: Lane, key: tuple, function: Callable[[Any], Any], inputs: Any, tensors: list) -> Any:
        """A pass that is not recorded here: launched kernel by kernel, which makes its kernels ready, and recorded."""
        with HostWaits() as waits:
            outputs = function(with_tensors(inputs, iter([tensor.detach().clone() for tensor in tensors])))
        if waits.found:
            self._refuse(key, f"it makes the host wait for the GPU, by {waits.found[0]}")
            return outputs
        try:
            recording = lane.record(function, inputs, tensors)
        except RuntimeError as error:
            self._failed(lane, key, error)
            return outputs
        with self._lock:
            self.captures += 1
        lane.recordings[key] = recording
        while len(lane.recordings) > self.capacity:
            lane.wait()
            lane.recordings.popitem(last=False)
        return outputs

    def _failed(self, lane: Lane, key: tuple, error: RuntimeError) -> None:
        """After a capture that failed: without memory the other lanes have to do; else another thread may have
        disturbed it, so that it is tried again, but not for ever."""
        with self._lock:
            lanes = self._lanes.get(lane.device, [])
            if isinstance(error, torch.OutOfMemoryError) and lane in lanes and len(lanes) > 1:
                lanes.remove(lane)
                self.concurrency = len(lanes)
                return
            self._failures[key] += 1
        if self._failures[key] == _TRIES:
            self._refuse(key, str(error).splitlines()[0])

    def _refuse(self, key: tuple, reason: str) -> None:
        self._refused.add(key)
        warnings.warn(
            f"the pass {key[2]!r} cannot be recorded as a CUDA graph ({reason}); from here on it is launched "
            "kernel by kernel",
            RuntimeWarning,
            stacklevel=2,
        )
