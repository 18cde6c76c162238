"""Views of an inverted head: pictures from any side, edits, orbits, turntables and meshes (Sec. 3.2, 4.3)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence

import torch
from PIL import Image

from .cameras import pose_of_camera, view_path
from .cuda_graphs import CudaGraphs, RunPass, run_eagerly
from .editing import apply_edits
from .export.images import tensor_to_image
from .export.mesh import DEFAULT_RESOLUTION, DEFAULT_TEXTURE, HeadMesh, check_sizes, extract_mesh
from .export.mesh_files import check_mesh_path, write_mesh
from .export.turntable import PITCHES, YAWS, Turntable, render_turntable
from .head import Head
from .inversion import Inversion
from .models.directions import Direction, LatentDirections
from .models.eg3d import EG3DGenerator
from .models.stylegan2 import StyleGAN2Generator
from .models.weights import check_computable, unwrapped
from .precision import check_precision, products, reduced_dtype

ProgressCallback = Callable[[float], None]


class RenderingMixin:
    """The half of `MetaAuxInverter` that shows a head, and needs no more than the generator and its directions."""

    generator: EG3DGenerator | StyleGAN2Generator
    latent_directions: LatentDirections | None
    _graphs: CudaGraphs | None = None
    _precision: str | None = None

    @property
    def has_viewpoints(self) -> bool:
        """Whether heads can be seen from other sides: not with a 2D generator."""
        return unwrapped(self.generator).has_viewpoints

    @property
    def directions(self) -> dict[str, Direction]:
        """What `edits` may name, with the scale and the usable range of each; empty if the checkpoint has none.

        Raises:
            ValueError: the checkpoint's directions were found in another generator.
        """
        if self.latent_directions is None:
            return {}
        origin = self.latent_directions.config.generator
        if origin and origin != self.fingerprint:
            raise ValueError(
                f"this model's latent directions were found in another generator (fingerprint {origin[:12]}…, not "
                f"{self.fingerprint[:12]}…); find its own with `metaaux train directions`"
            )
        return self.latent_directions.as_dict()

    def enable_cuda_graphs(self, concurrency: int = 2) -> None:
        """Records inversions and views as CUDA graphs, and replays them: many times as fast on a GPU, same results.

        For programs that invert many photos or render many views: the first of each kind and shape takes twice as
        long, and the recordings keep memory until [`disable_cuda_graphs`] or a move to another device. So it is off
        unless it is asked for. Threads share the recordings. It changes nothing on other devices than CUDA; what
        cannot be recorded is reported by a warning and goes on without.

        Args:
            concurrency: how many passes of different threads may be on the GPU at once; each takes as much memory as
                an inversion alone.

        Raises:
            ValueError: `concurrency` below 1.
        """
        self.disable_cuda_graphs()
        self._graphs = CudaGraphs(concurrency)

    def disable_cuda_graphs(self) -> None:
        """Undoes [`enable_cuda_graphs`] and frees the recordings' memory."""
        graphs, self._graphs = self._graphs, None
        if graphs is not None:
            graphs.release()

    @property
    def precision(self) -> str | None:
        """In which the networks compute: "float32" (IEEE's), "tf32" (on CUDA alone) or "bfloat16".

        `None`, the default, is float32 as PyTorch is set: on CUDA TF32 for convolutions, IEEE's for matrix products.

        Weights stay as they are. Cameras, rays, demodulation, the losses' sums and gradient steps are in float32 in
        any case, and so are meshes but for products in TF32. The settings are PyTorch's for a process: they are set
        for the passes of this pipeline and unset after them, so that passes of pipelines of other precisions wait
        meanwhile; see `metaaux.precision.products`. To be set while no call is at work; a call raises ValueError for
        "tf32" on another device than CUDA.

        Raises:
            ValueError: set to another name.
        """
        return self._precision

    @precision.setter
    def precision(self, name: str | None) -> None:
        self._precision = check_precision(name)

    def _products(self) -> contextlib.AbstractContextManager:
        """Where what is launched has the products of this pipeline's precision."""
        return products(self.precision, self._weights_device)

    @property
    def _recordings(self) -> CudaGraphs | None:
        """Where passes on this pipeline's device are recorded; `None`: they are not."""
        graphs = self._graphs
        return graphs if graphs is not None and graphs.runs_on(self._weights_device) else None

    @property
    def _weights_device(self) -> torch.device:
        # diffusers' `_execution_device` looks through all modules, which takes longer than a replay.
        return next(self.generator.parameters()).device

    def _own_stream(self) -> contextlib.AbstractContextManager:
        """Where recordings of several threads run side by side; see `CudaGraphs.stream`."""
        graphs = self._recordings
        return contextlib.nullcontext() if graphs is None else graphs.stream(self._weights_device)

    def _run_pass(self, kind: str, *networks: torch.nn.Module) -> RunPass:
        """What runs passes of these networks, by recordings where there are any."""
        graphs = self._recordings
        return run_eagerly if graphs is None else graphs.bind(kind, *networks)

    @torch.no_grad()
    def synthesize(
        self,
        ws: torch.Tensor,
        cameras: torch.Tensor,
        weight_offsets: Mapping[str, torch.Tensor] | None = None,
        offset_planes: torch.Tensor | None = None,
        planes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Images [B, 3, S, S] around [-1, 1] of latent codes on the pipeline's device, by a recording where there may
        be one (`enable_cuda_graphs`). Arguments are those of [`~metaaux.models.eg3d.EG3DGenerator.synthesize`]."""
        generator = self.generator
        given = {
            "ws": ws,
            "cameras": cameras,
            "weight_offsets": weight_offsets,
            "offset_planes": offset_planes,
            "planes": planes,
            "dtype": reduced_dtype(self.precision),
        }
        run = self._run_pass("rendering", generator)
        with self._products():
            return run("view", lambda given: generator.synthesize(**given).image, given)

    @torch.no_grad()
    def prepare(self, inversion: Inversion, edits: Mapping[str, float] | None = None) -> Head:
        """Computes once what all views of an inversion share; pass the result to `render` and `orbit`.

        Args:
            inversion: made with this pipeline's generator.
            edits: amounts by name of a direction of `directions`, several at once; 1 is visible, 3 is strong.

        Raises:
            ValueError: the inversion belongs to another generator, or an edit that this checkpoint lacks or that is no
                number within ±20.
        """
        inversion.check_fits(self.generator, self.fingerprint)
        check_computable({"generator": self.generator})
        device = self._weights_device
        ws = apply_edits(inversion.w[None], self.directions, edits, bool(inversion.weight_offsets)).to(device)
        weight_offsets = {layer: offset.to(device) for layer, offset in inversion.weight_offsets.items()}
        generator = self.generator
        run = self._run_pass("rendering", generator)
        given = {"ws": ws, "weight_offsets": weight_offsets, "dtype": reduced_dtype(self.precision)}
        with self._products():
            planes = run("planes", lambda given: generator.planes(**given), given)
        return Head(
            ws=ws,
            planes=planes,
            weight_offsets=weight_offsets,
            offset_planes=None if inversion.offset_planes is None else inversion.offset_planes[None].to(device),
            camera=inversion.camera,
        )

    @torch.no_grad()
    def render(
        self,
        inversion: Inversion | Head,
        yaw: float | None = None,
        pitch: float | None = None,
        edits: Mapping[str, float] | None = None,
    ) -> Image.Image:
        """One view of an inverted head.

        Args:
            inversion: or what `prepare` made of it, which spares the backbone when many views are wanted.
            yaw: degrees of the head as the aligner reports them; positive turns the nose to the picture's right.
                Default: the photo's.
            pitch: degrees, positive nods down. Default: the photo's.
            edits: see `prepare`; not with a `Head`, which has its edits already.

        Raises:
            ValueError: an angle beyond ±90 degrees, or as `prepare`.
        """
        if yaw is not None or pitch is not None:
            self._check_viewpoints("yaw and pitch")
        head = self._head(inversion, edits)
        camera = head.camera
        if yaw is not None or pitch is not None:
            photo_yaw, photo_pitch = (float(angle) for angle in pose_of_camera(camera))
            camera = self.generator.camera_at(
                photo_yaw if yaw is None else float(yaw),
                photo_pitch if pitch is None else float(pitch),
                radius=float(camera[[3, 7, 11]].norm()),
                focal=float(camera[16]),
            )
        with self._own_stream():
            cameras = camera[None].to(head.ws.device)
            images = self.synthesize(head.ws, cameras, head.weight_offsets, head.offset_planes, head.planes)
            return tensor_to_image(images[0])

    def orbit(
        self,
        inversion: Inversion | Head,
        frames: int = 60,
        yaw_range: float = 25.0,
        pitch_range: float = 10.0,
        edits: Mapping[str, float] | None = None,
        path: str | Sequence[tuple[float, float]] = "ellipse",
        progress: ProgressCallback | None = None,
    ) -> list[Image.Image]:
        """Views of a closed loop around the head's front, for a video that repeats without a jump.

        Tri-planes are computed once for all views.

        Args:
            inversion: or what `prepare` made of it.
            frames: number of views, at least 1.
            yaw_range: degrees to either side.
            pitch_range: degrees up and down.
            edits: see `render`.
            path: "ellipse", around the front; "swing", from side to side and back at a pitch of 0; "nod", up and down
                at a yaw of 0; or pairs of yaw and pitch, one a view, which leave `frames` and the ranges unused.
            progress: called with the share that is done, 0 to 1.

        Raises:
            ValueError: `frames` below 1, an unknown or empty path, or as `render`.
        """
        self._check_viewpoints("orbits")
        poses = view_path(path, frames, yaw_range, pitch_range)
        head = self._head(inversion, edits)
        images = []
        for yaw, pitch in self.progress_bar(poses):
            images.append(self.render(head, yaw=yaw, pitch=pitch))
            if progress is not None:
                progress(len(images) / len(poses))
        return images

    def turntable(
        self,
        inversion: Inversion | Head,
        yaws: Sequence[float] = YAWS,
        pitches: Sequence[float] = PITCHES,
        size: int | None = None,
        edits: Mapping[str, float] | None = None,
        progress: ProgressCallback | None = None,
    ) -> Turntable:
        """Views from many sides in one picture, with their angles: what a page turns by itself.

        Tri-planes are computed once for all views.

        Args:
            inversion: or what `prepare` made of it.
            yaws: degrees of the grid's columns.
            pitches: degrees of its rows.
            size: side of one view in pixels, up to the generator's. Default: the generator's, but not above 256.
            edits: see `render`.
            progress: called with the share that is done, 0 to 1.

        Raises:
            ValueError: no yaw or no pitch, a size out of range, or as `render`.
        """
        self._check_viewpoints("turntables")
        head = self._head(inversion, edits)

        def render(yaw: float, pitch: float) -> Image.Image:
            return self.render(head, yaw=yaw, pitch=pitch)

        return render_turntable(render, self.generator.config.image_size, yaws, pitches, size, progress)

    @torch.no_grad()
    def export_mesh(
        self,
        inversion: Inversion | Head,
        path: str | os.PathLike,
        resolution: int = DEFAULT_RESOLUTION,
        edits: Mapping[str, float] | None = None,
        progress: ProgressCallback | None = None,
        texture: int | None = DEFAULT_TEXTURE,
    ) -> HeadMesh:
        """Writes the head's surface, closed and coloured, in the format that the ending of `path` names.

        The head stands upright (+y up) and looks along +z, as viewers expect. Files are whole or absent.

        Args:
            inversion: or what `prepare` made of it.
            path: the file. `.glb`: binary glTF. `.obj`: Wavefront, with a `.mtl` and a `.png` of the same name beside
                it. `.ply`: with vertex colours, whatever `texture` is.
            resolution: cells along each side of the generator's cube; see [`~metaaux.export.mesh.extract_mesh`].
            edits: see `render`.
            progress: called with the share that is done, 0 to 1.
            texture: side in texels of a texture baked from rendered views, the photo's first. Vertices on the seams
                of its charts occur several times; the mesh is closed once equal positions are merged. `None` or 0:
                each vertex has a colour instead.

        Returns:
            What was written.

        Raises:
            ValueError: a path with another ending, a resolution or texture out of range, a head without any surface,
                or as `render`.
            FileNotFoundError: the folder of `path` does not exist.
            IsADirectoryError: `path` is a folder.
        """
        self._check_viewpoints("meshes")
        check_mesh_path(path)
        check_sizes(resolution, texture)
        if os.fspath(path).lower().endswith(".ply"):
            texture = None
        head = self._head(inversion, edits)
        with self._products():
            mesh = extract_mesh(self.generator, head, resolution, progress, texture)
        write_mesh(mesh, path)
        return mesh

    def _head(self, inversion: Inversion | Head, edits: Mapping[str, float] | None) -> Head:
        if isinstance(inversion, Head):
            if edits:
                raise ValueError("edits belong into prepare(inversion, edits): this head was made without them")
            return inversion
        return self.prepare(inversion, edits)

    def _check_viewpoints(self, what: str) -> None:
        if not self.has_viewpoints:
            raise ValueError(f"{what} need a 3D generator; a 2D generator, as this model's, has one view: the photo's")
