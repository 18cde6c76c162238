"""The models behind the demo: loading them beside the server, and computing with them, on ZeroGPU as elsewhere.

On a ZeroGPU Space the methods that compute run in a forked process which has the GPU: they take and give plain
values, pictures and paths, never tensors of the GPU, and what they change stays there. MediaPipe aborts in such a
process once the parent has used it, so faces are aligned outside of them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image
from spaces.config import Config as spaces_config

from ..export.turntable import PITCHES, YAWS
from .heads import HeadCache
from .quota import (
    on_gpu,
    seconds_of_edit,
    seconds_of_inversion,
    seconds_of_mesh,
    seconds_of_orbit,
    seconds_of_turntable,
    seconds_of_view,
)
from .settings import Settings
from .workers import Cancelled, Count, Workers

if TYPE_CHECKING:
    import torch

    from ..export.turntable import Turntable
    from ..faces import AlignedFace
    from ..head import Head
    from ..pipeline import MetaAuxInverter

logger = logging.getLogger(__name__)

#: How long a request waits for the models that are still being loaded, seconds.
LOADING_TIMEOUT = 300.0

#: Views have places for many visitors, each of whom takes one at a time: nobody's slow view holds up the others'.
VIEWS = {"concurrency_id": "view", "concurrency_limit": 16}

#: Grids that programs ask for wait for each other only.
TURNTABLES = {"concurrency_id": "turntable", "concurrency_limit": 2}

#: Where views take their time: first a few yaws, then row after row, those at the height of the eyes first.
_PARTS = [(YAWS[1:-1:3], (0.0,)), *[(YAWS, (pitch,)) for pitch in sorted(PITCHES, key=abs)]]


@dataclass(frozen=True)
class Step:
    """One step of an inversion, as its visitor sees it.

    Attributes:
        step: -1 for the encoder alone, 0 for the auxiliary network's prediction, then the gradient steps.
        image: reconstruction of the first photo.
        losses: the entry of `Inversion.steps`.
        path: the inversion's file, with the last step only.
        turntable: views of the finished head, where they were asked for.
    """

    step: int
    image: Image.Image
    losses: dict[str, float]
    path: str | None = None
    turntable: Turntable | None = None


class Engine:
    """The demo's models and all computation on them. Shared by the server's threads.

    Args:
        settings: which models, and where.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.zero_gpu = bool(spaces_config.zero_gpu)
        self._inverters: dict[str, MetaAuxInverter] = {}
        self._loaded = threading.Event()
        self._failure: Exception | None = None
        self._heavy = Count()
        self._workers = Workers(settings.workers, self._heavy)
        self._background = threading.Lock()
        self._heads = HeadCache(settings.max_heads_mb * 1_000_000)
        self._invert_on_gpu = on_gpu(self._invert, seconds_of_inversion)
        self._render_on_gpu = on_gpu(self._render, seconds_of_view)
        self._orbit_on_gpu = on_gpu(self._orbit, seconds_of_orbit)
        self._mesh_on_gpu = on_gpu(self._mesh, seconds_of_mesh)
        self._edit_on_gpu = on_gpu(self._edit, seconds_of_edit)
        self._turntable_on_gpu = on_gpu(self._turntable, seconds_of_turntable)

    def start(self, loaded: Callable[[], None] | None = None) -> None:
        """Loads the models: on ZeroGPU before it returns, as models are to be placed at start there; elsewhere in a
        thread, so that the page need not wait.

        Args:
            loaded: called once they are there.
        """
        if self.zero_gpu:
            self._load(loaded)
        else:
            threading.Thread(target=self._load, args=(loaded,), name="load-models", daemon=True).start()

    @property
    def works(self) -> bool:
        """Whether the models are loaded."""
        return self._loaded.is_set() and self._failure is None

    def inverter(self, model: str | None = None) -> MetaAuxInverter:
        """The pipeline of a model, once it is loaded.

        Args:
            model: one of the settings' models. Default: the first.

        Raises:
            ValueError: a model that this demo does not offer, or one that could not be loaded.
        """
        model = model or self.settings.models[0]
        if model not in self.settings.models:
            raise ValueError(f"there is no model {model!r:.80} here, only {', '.join(self.settings.models)}")
        if not self._loaded.wait(LOADING_TIMEOUT):
            raise ValueError("the model is still being loaded; try again in a minute")
        if self._failure is not None:
            raise ValueError("the model could not be loaded; whoever runs this demo finds the reason in its log")
        return self._inverters[model]

    def max_head_bytes(self, model: str | None = None) -> int:
        """Size of the largest file that a model's heads can have."""
        from ..inversion import max_file_bytes

        inverter = self.inverter(model)
        return max_file_bytes(inverter.generator, inverter.auxiliary)

    @property
    def makes_turntables_at_once(self) -> bool:
        """Whether many views take a second or two, so that an inversion may bring them along: on GPUs."""
        return self.zero_gpu or self.inverter().device.type == "cuda"

    def describe_device(self) -> str:
        """Where the models run, in a word or two for the page."""
        if self.zero_gpu:
            return "ZeroGPU"
        return "CPU" if self.inverter().device.type == "cpu" else "GPU"

    def align(self, model: str, photos: list[Image.Image]) -> list[AlignedFace]:
        """Crops and cameras of photos, always in this process.

        Raises:
            ValueError: a photo without a usable face; of several photos the message says which.
        """
        aligner = self.inverter(model).aligner
        faces = []
        for number, photo in enumerate(photos, start=1):
            try:
                faces.append(aligner.align(photo))
            except ValueError as error:
                if len(photos) == 1:
                    raise
                raise type(error)(f"photo {number}: {error}") from None
        return faces

    def invert(
        self,
        model: str,
        crops: list[Image.Image],
        cameras: list[torch.Tensor],
        steps: int,
        flip: bool | None,
        path: str,
        turntable: bool = False,
    ) -> Iterator[Step]:
        """Yields every step; with the last one the inversion's file is complete.

        Args:
            model: as `inverter`.
            crops: aligned photos of one person.
            cameras: theirs, each [25] on the CPU.
            steps: gradient steps.
            flip: as `MetaAuxInverter.invert`.
            path: where the inversion's file goes.
            turntable: whether the last step shall bring views of the finished head.

        Raises:
            ValueError: the model has no flip loss, and it was asked for.
        """
        if flip:
            self._check_viewpoints(model, "the flip loss")
            self.inverter(model).inversion_loss(flip=True)
        yield from self._invert_on_gpu(model, crops, cameras, steps, flip, path, turntable)

    def render(
        self, model: str, path: str, yaw: float | None, pitch: float | None, edits: dict[str, float]
    ) -> Image.Image:
        """One view of an inversion file, for one who keeps nothing here.

        Raises:
            ValueError: the file is no inversion of this model.
        """
        if yaw is not None or pitch is not None:
            self._check_viewpoints(model, "yaw and pitch")
        self._check_file(model, path)
        return self._render_on_gpu(model, path, yaw, pitch, edits)

    def view(
        self, model: str, path: str, yaw: float | None, pitch: float | None, edits: dict[str, float]
    ) -> Image.Image:
        """As `render`, for a visitor who turns a head: what its views share is kept for the next one. Not on ZeroGPU,
        where the process that would keep it does not outlive the call.

        Raises:
            FileNotFoundError: neither the file nor what was made of it is there any more.
        """
        with self._heavy:
            return self.inverter(model).render(self._head(model, path, edits), yaw=yaw, pitch=pitch)

    def edit(
        self, model: str, path: str, yaw: float | None, pitch: float | None, edits: dict[str, float]
    ) -> tuple[Image.Image, Turntable | None]:
        """As `render`, and views from all sides, if this model's heads have any: one request for both."""
        self._check_file(model, path)
        return self._edit_on_gpu(model, path, yaw, pitch, edits)

    def sheets(
        self, model: str, path: str, edits: dict[str, float], wanted: Callable[[], bool]
    ) -> Iterator[tuple[Turntable, bool]]:
        """Views from all sides, part by part, while nothing else is computed here.

        Args:
            wanted: asked before each view; once it says no, there are no more parts.

        Yields:
            a part, the coarsest first, and whether it is the last one.
        """

        def wait(share: float) -> None:
            if not wanted():
                raise Cancelled
            self._heavy.wait_for_none()

        inverter = self.inverter(model)
        parts = [(YAWS, PITCHES)] if self.makes_turntables_at_once else _PARTS
        for number, (yaws, pitches) in enumerate(parts, start=1):
            try:
                with self._background:
                    wait(0.0)
                    table = inverter.turntable(self._head(model, path, edits), yaws, pitches, progress=wait)
            except Cancelled:
                return
            yield table, number == len(parts)

    def _head(self, model: str, path: str, edits: dict[str, float]) -> Head:
        inverter = self.inverter(model)
        return self._heads.get(model, path, edits, lambda: inverter.prepare(inverter.load_inversion(path), edits))

    def forget(self, path: str) -> None:
        """Drops what is kept of an inversion file for `view`."""
        self._heads.forget(path)

    def orbit(
        self, model: str, path: str, frames: int, ranges: tuple[float, float], edits: dict[str, float], video: str
    ) -> Iterator[float]:
        """Writes a video of the turning head of an inversion file; yields the share that is done.

        Raises:
            ValueError: as `render`, or heads of this model cannot be turned.
        """
        self._check_viewpoints(model, "videos")
        self._check_file(model, path)
        yield from self._orbit_on_gpu(model, path, frames, ranges, edits, video)

    def mesh(self, model: str, path: str, resolution: int, edits: dict[str, float], mesh: str) -> Iterator[float]:
        """Writes a mesh of the head of an inversion file; yields the share that is done.

        Raises:
            ValueError: as `orbit`, or the head has no surface.
        """
        self._check_viewpoints(model, "meshes")
        self._check_file(model, path)
        yield from self._mesh_on_gpu(model, path, resolution, edits, mesh)

    def turntable(
        self,
        model: str,
        path: str,
        yaws: Sequence[float],
        pitches: Sequence[float],
        size: int | None,
        edits: dict[str, float],
    ) -> Turntable:
        """A grid of views of an inversion file, as `MetaAuxInverter.turntable`.

        Raises:
            ValueError: as `orbit`, or a size beyond the model's.
        """
        self._check_viewpoints(model, "turntables")
        self._check_file(model, path)
        return self._turntable_on_gpu(model, path, yaws, pitches, size, edits)

    def _check_file(self, model: str, path: str) -> None:
        # A visitor's quota is spent on what cannot work if this is found out on ZeroGPU's side. Elsewhere the file is
        # read in this process anyway.
        if self.zero_gpu:
            self.inverter(model).load_inversion(path)

    def _check_viewpoints(self, model: str, what: str) -> None:
        if not self.inverter(model).has_viewpoints:
            raise ValueError(f"{what} need a model whose heads can be turned; this one's have one view, the photo's")

    def _invert(
        self,
        model: str,
        crops: list[Image.Image],
        cameras: list[torch.Tensor],
        steps: int,
        flip: bool | None,
        path: str,
        turntable: bool = False,
    ) -> Iterator[Step]:
        import torch

        inverter = self.inverter(model)

        def run(report: Callable[[Any], None]) -> None:
            def on_step(step: int, image: Image.Image, losses: dict[str, float]) -> None:
                report((step, image, losses))

            inversion = inverter.invert(crops, steps=steps, on_step=on_step, camera=torch.stack(cameras), flip=flip)
            inversion.save(path)
            if turntable:
                report(inverter.turntable(inversion, progress=lambda share: report(None)))

        last, table = None, None
        for event in self._workers.stream(run):
            if isinstance(event, tuple):
                last = Step(*event)
                # The last step waits for the file, so that every step is exactly one result.
                if last.step < steps:
                    yield last
            else:
                table = event
        if last is not None:
            yield Step(last.step, last.image, last.losses, path, table)

    def _render(
        self, model: str, path: str, yaw: float | None, pitch: float | None, edits: dict[str, float]
    ) -> Image.Image:
        inverter = self.inverter(model)
        return inverter.render(inverter.load_inversion(path), yaw=yaw, pitch=pitch, edits=edits)

    def _edit(
        self, model: str, path: str, yaw: float | None, pitch: float | None, edits: dict[str, float]
    ) -> tuple[Image.Image, Turntable | None]:
        inverter = self.inverter(model)
        head = inverter.prepare(inverter.load_inversion(path), edits)
        table = inverter.turntable(head) if inverter.has_viewpoints else None
        return inverter.render(head, yaw=yaw, pitch=pitch), table

    def _orbit(
        self, model: str, source: str, frames: int, ranges: tuple[float, float], edits: dict[str, float], path: str
    ) -> Iterator[float]:
        from ..export.video import write_video

        inverter = self.inverter(model)

        def run(report: Callable[[Any], None]) -> None:
            head = inverter.prepare(inverter.load_inversion(source), edits)
            views = inverter.orbit(head, frames=frames, yaw_range=ranges[0], pitch_range=ranges[1], progress=report)
            write_video(views, path)

        yield from self._workers.stream(run)

    def _mesh(self, model: str, source: str, resolution: int, edits: dict[str, float], path: str) -> Iterator[float]:
        inverter = self.inverter(model)

        def run(report: Callable[[Any], None]) -> None:
            head = inverter.prepare(inverter.load_inversion(source), edits)
            inverter.export_mesh(head, path, resolution=resolution, progress=report)

        yield from self._workers.stream(run)

    def _turntable(
        self,
        model: str,
        path: str,
        yaws: Sequence[float],
        pitches: Sequence[float],
        size: int | None,
        edits: dict[str, float],
    ) -> Turntable:
        # No worker's: turning waits for nobody's inversion.
        with self._heavy:
            inverter = self.inverter(model)
            return inverter.turntable(inverter.load_inversion(path), yaws, pitches, size, edits)

    def _load(self, loaded: Callable[[], None] | None) -> None:
        try:
            from ..devices import best_device
            from ..pipeline import MetaAuxInverter
            from ..precision import check_precision

            device = self.settings.device or best_device()
            check_precision(self.settings.precision, device)
            for model in self.settings.models:
                inverter = MetaAuxInverter.from_pretrained(model)
                inverter.set_progress_bar_config(disable=True)
                inverter.precision = self.settings.precision
                # Known before the move: on ZeroGPU weights cannot be read back outside of GPU functions.
                _ = inverter.fingerprint, inverter.aligner
                if self.settings.cuda_graphs and not self.zero_gpu:
                    inverter.enable_cuda_graphs()
                self._inverters[model] = inverter.to(device)
        except Exception as error:
            logger.exception("loading the models failed")
            self._failure = error
        finally:
            self._loaded.set()
        if self._failure is None:
            if loaded is not None:
                loaded()
            self._warm_up()

    def _warm_up(self) -> None:
        """What the first visitor would wait for otherwise: lazy imports, MediaPipe's graphs, a GPU's kernels and their
        recordings."""
        import numpy as np

        from ..faces import camera_from_pose

        try:
            for inverter in self._inverters.values():
                size = inverter.generator.config.image_size
                grey = Image.fromarray(np.full((size, size, 3), 128, dtype=np.uint8))
                inverter.aligner.estimate_pose(grey)
                if not self.zero_gpu:
                    inverter.render(inverter.invert(grey, steps=1, camera=camera_from_pose(0.0, 0.0)))
        except Exception:
            logger.exception("the warm-up failed; the demo goes on without")
