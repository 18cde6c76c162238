"""`Inversion`: what inverting one face yields, and its file.

The file is one safetensors file. Tensors: `w`, `camera`, `weight_offsets.<layer>` for each adapted layer, and, where
there are any, `offset_planes` and `aligned`. Metadata, each value a JSON string: `format`, `version`, `model`,
`fingerprint` and `steps`.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as serialize_tensors

from .files import atomic_path
from .models.stylegan2 import offset_shapes
from .models.weights import generator_fingerprint as generator_fingerprint
from .models.weights import unwrapped

FORMAT = "metaaux-inversion"
VERSION = 1
#: Largest file that is written, and read where the model is not known; of a known one [`max_file_bytes`] is the limit.
#: The paper's model with all layers in full kernels and 1024² offset planes has 135 MB.
MAX_FILE_BYTES = 256 * 2**20
#: Keys of every entry of `Inversion.steps`; all but `step`, an integer, are floats.
STEP_KEYS = ("step", "mse", "perceptual", "identity", "adversarial", "total", "seconds")

_OFFSET_PREFIX = "weight_offsets."
_LAYER_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_METADATA_KEYS = {"format", "version", "model", "fingerprint", "steps"}
_MAX_TENSORS = 512
_MAX_STEPS = 10_000
_MAX_MODEL_CHARS = 1_000
#: Names and shapes of tensors, and `_MAX_STEPS` steps of less than 300 bytes.
_MAX_HEADER_BYTES = 4 * 2**20


def max_file_bytes(generator: torch.nn.Module, auxiliary: torch.nn.Module | None = None) -> int:
    """Bytes of the largest inversion file that a model can have; any larger file is none of its own.

    Args:
        generator: an `EG3DGenerator` or `StyleGAN2Generator`. All of its layers count with full kernels, whatever the
            auxiliary network has now: heads outlive a further training of it.
        auxiliary: the `AuxiliaryNetwork`, whose offset planes may be finer than the generator's own planes.
    """
    generator = unwrapped(generator)
    numbers = 25 + generator.num_ws * generator.config.w_dim
    numbers += sum(
        math.prod(max(offset_shapes(layer), key=math.prod)) for layer in generator.modulated_layers.values()
    )
    sides = [generator.config.get("plane_resolution", 0)]
    if auxiliary is not None and auxiliary.config.use_offset_planes:
        sides += [auxiliary.config.offset_resolution, auxiliary.config.offset_bias_resolution or 0]
    numbers += 9 * max(sides) ** 2
    return 4 * numbers + 3 * generator.config.image_size**2 + _MAX_HEADER_BYTES


class InversionFileError(ValueError):
    """A file is no inversion file, is damaged, or belongs to another model. The message says which."""


@dataclass(eq=False)
class Inversion:
    """One inverted face: everything a render needs beside the shared generator (Eq. 3 and 4).

    All tensors are on the CPU. An inversion is data only: it keeps no reference to the pipeline that made it.

    Attributes:
        w: latent code, float32 [w_dim] (space W) or [num_ws, w_dim] (space W+).
        camera: camera of the aligned photo, float32 [25].
        weight_offsets: δ of each adapted layer, float32 [C_out, C_in, 1, 1] or [C_out, C_in, 3, 3]; the layer's
            weight is θ·(1 + δ).
        offset_planes: offset tri-plane, float32 [3, 3, r, r], world units; `None` if the auxiliary network has no
            3D module.
        steps: one dictionary with the keys of `STEP_KEYS` per step: -1 is the encoder alone, 0 the auxiliary
            network's prediction, then one per gradient step. Losses are unweighted but for `total`; `seconds` is the
            time that this step alone took.
        model: Hub id or folder of the pipeline that made it.
        fingerprint: that pipeline's [`~metaaux.MetaAuxInverter.fingerprint`], 64 hexadecimal digits.
        aligned: the aligned photo, uint8 [3, S, S], or `None`.
    """

    w: torch.Tensor
    camera: torch.Tensor
    weight_offsets: dict[str, torch.Tensor]
    offset_planes: torch.Tensor | None = None
    steps: list[dict[str, float]] = field(default_factory=list)
    model: str = ""
    fingerprint: str = ""
    aligned: torch.Tensor | None = None

    def save(self, path: str | os.PathLike) -> None:
        """Writes the inversion to `path`, whole or not at all.

        Raises:
            InversionFileError: the inversion would not load again (a value that is not finite, a wrong shape, a file
                larger than `MAX_FILE_BYTES`, …).
            FileNotFoundError: the folder of `path` does not exist.
        """
        tensors = {"w": self.w, "camera": self.camera, "offset_planes": self.offset_planes, "aligned": self.aligned}
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        tensors |= {_OFFSET_PREFIX + layer: offset for layer, offset in self.weight_offsets.items()}
        _check_tensors(tensors)
        try:
            steps = [{k: float(step[k]) if k != "step" else step[k] for k in STEP_KEYS} for step in self.steps]
        except (KeyError, TypeError, ValueError) as error:
            raise InversionFileError(
                f"its steps must have numbers under the keys {list(STEP_KEYS)} ({error!r})"
            ) from None
        _check_origin(self.model, self.fingerprint)
        _check_steps(steps)
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "steps": steps,
        }
        data = serialize_tensors(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            {key: json.dumps(value) for key, value in metadata.items()},
        )
        _check_size(len(data), MAX_FILE_BYTES)
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)

    @classmethod
    def load(
        cls, path: str | os.PathLike, fingerprint: str | None = None, max_bytes: int = MAX_FILE_BYTES
    ) -> Inversion:
        """Reads an inversion that [`Inversion.save`] wrote; made for files from strangers.

        Size, layout, names, shapes, dtypes, finiteness and metadata are checked before anything is returned.
        Whether layers and sizes fit a generator is for `check_fits` to say.

        Args:
            path: the file.
            fingerprint: if given, the [`~metaaux.MetaAuxInverter.fingerprint`] that the file must carry.
            max_bytes: larger files are not read; for a known model its [`max_file_bytes`].

        Raises:
            FileNotFoundError: there is no such file.
            InversionFileError: the file is not a valid inversion file, or it belongs to another model.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                _check_size(os.fstat(file.fileno()).st_size, max_bytes)
                # Read once and bounded: what is checked is what is used, whatever the size on disk claims to be.
                data = file.read(max_bytes + 1)
            _check_size(len(data), max_bytes)
            return cls._parse(data, fingerprint)
        except InversionFileError as error:
            raise InversionFileError(f"{path.name} cannot be used as an inversion: {error}") from None

    def check_fits(self, generator: torch.nn.Module, fingerprint: str) -> None:
        """Checks that a generator can render it: its own one, with a code and layers of these shapes.

        Args:
            generator: an `EG3DGenerator` or `StyleGAN2Generator`.
            fingerprint: its `generator_fingerprint`, which is not computed here since that reads all weights.

        Raises:
            ValueError: it was made with another generator, or a shape is not what this one takes.
        """
        if self.fingerprint != fingerprint:
            raise ValueError(
                f"this inversion was made with the model {self.model!r} (fingerprint {self.fingerprint[:12]}…), not "
                f"with this one (fingerprint {fingerprint[:12]}…); load the model that it was made with"
            )
        generator = unwrapped(generator)
        w_dim, num_ws = generator.config.w_dim, generator.num_ws
        if tuple(self.w.shape) not in ((w_dim,), (num_ws, w_dim)):
            raise ValueError(
                f"the inversion's w has shape {list(self.w.shape)}, this generator takes [{w_dim}] or "
                f"[{num_ws}, {w_dim}]"
            )
        layers = generator.modulated_layers
        for layer, offset in self.weight_offsets.items():
            if layer not in layers:
                raise ValueError(f"the inversion adapts a layer {layer!r}, which this generator does not have")
            shapes = offset_shapes(layers[layer])
            if list(offset.shape) not in shapes:
                raise ValueError(
                    f"the inversion's offset of {layer} has shape {list(offset.shape)}, this generator's layer takes "
                    f"{shapes[0]} or {shapes[1]}"
                )

    @classmethod
    def _parse(cls, data: bytes, fingerprint: str | None) -> Inversion:
        try:
            entries = dict(safetensors.deserialize(data))
        except (safetensors.SafetensorError, OverflowError, MemoryError) as error:
            raise InversionFileError(f"it is not a safetensors file ({error})") from None
        origin = _parse_metadata(data)
        if fingerprint is not None and origin["fingerprint"] != fingerprint:
            raise InversionFileError(
                f"it was made with the model {origin['model']!r} (fingerprint {origin['fingerprint'][:12]}…), not "
                f"with this one (fingerprint {fingerprint[:12]}…); load it with the model it was made with"
            )
        _check_layout({name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()})
        tensors = load_tensors(data)
        _check_tensors(tensors)
        return cls(
            w=tensors["w"],
            camera=tensors["camera"],
            weight_offsets={
                name.removeprefix(_OFFSET_PREFIX): tensor
                for name, tensor in tensors.items()
                if name.startswith(_OFFSET_PREFIX)
            },
            offset_planes=tensors.get("offset_planes"),
            aligned=tensors.get("aligned"),
            **origin,
        )


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise InversionFileError(
            f"it is larger than {limit / 2**20:.0f} MiB, which no inversion of this model is"
            if limit < MAX_FILE_BYTES
            else f"it is larger than {limit // 2**20} MiB"
        )


def _parse_metadata(data: bytes) -> dict[str, Any]:
    """Checked `model`, `fingerprint` and `steps` of a file whose header safetensors has already accepted."""
    header_size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + header_size]).get("__metadata__") or {}
    if metadata.keys() != _METADATA_KEYS:
        raise InversionFileError(
            f"its metadata has the keys {sorted(metadata)[:10]}, those of an inversion are {sorted(_METADATA_KEYS)}"
        )
    try:
        values = {key: json.loads(value, parse_constant=_reject_constant) for key, value in metadata.items()}
    except (ValueError, RecursionError) as error:
        raise InversionFileError(f"its metadata is not valid JSON ({error})") from None
    if values["format"] != FORMAT:
        raise InversionFileError(f"its format is {values['format']!r:.60}, expected {FORMAT!r}")
    if values["version"] != VERSION:
        raise InversionFileError(
            f"it has version {values['version']!r:.20} of the file format, this release reads version {VERSION}"
        )
    _check_origin(values["model"], values["fingerprint"])
    _check_steps(values["steps"])
    return {"model": values["model"], "fingerprint": values["fingerprint"], "steps": values["steps"]}


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _check_origin(model: Any, fingerprint: Any) -> None:
    if not isinstance(model, str) or len(model) > _MAX_MODEL_CHARS:
        raise InversionFileError(f"its model must be a text of at most {_MAX_MODEL_CHARS} characters")
    if not isinstance(fingerprint, str) or re.fullmatch("[0-9a-f]{64}", fingerprint) is None:
        raise InversionFileError("its fingerprint must be 64 hexadecimal digits")


def _check_steps(steps: Any) -> None:
    if not isinstance(steps, list) or len(steps) > _MAX_STEPS:
        raise InversionFileError(f"its steps must be a list of at most {_MAX_STEPS} entries")
    for number, step in enumerate(steps, start=-1):
        if not isinstance(step, dict) or step.keys() != set(STEP_KEYS):
            raise InversionFileError(f"entry {number + 1} of its steps must have exactly the keys {list(STEP_KEYS)}")
        if type(step["step"]) is not int or step["step"] != number:
            raise InversionFileError(f"its steps must be numbered -1, 0, 1, …, entry {number + 1} is not")
        for key in STEP_KEYS[1:]:
            if type(step[key]) not in (int, float) or not -1e30 < step[key] < 1e30:
                raise InversionFileError(f"{key} of its step {number} is not a finite number")


def _check_layout(layout: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """Names, dtypes and shapes of a file's tensors, before any of them is read."""
    missing = {"w", "camera"} - layout.keys()
    if missing:
        raise InversionFileError(f"it lacks the tensors {sorted(missing)}")
    if len(layout) > _MAX_TENSORS:
        raise InversionFileError(f"it has {len(layout)} tensors, more than {_MAX_TENSORS}")
    for name, (dtype, shape) in layout.items():
        expected = "U8" if name == "aligned" else "F32"
        if dtype != expected:
            raise InversionFileError(f"its tensor {name!r:.80} is {dtype}, expected {expected}")
        if name == "w":
            fits = len(shape) in (1, 2)
        elif name == "camera":
            fits = shape == (25,)
        elif name == "offset_planes":
            fits = len(shape) == 4 and shape[:2] == (3, 3) and shape[2] == shape[3]
        elif name == "aligned":
            fits = len(shape) == 3 and shape[0] == 3 and shape[1] == shape[2]
        elif name.startswith(_OFFSET_PREFIX) and _LAYER_NAME.fullmatch(name.removeprefix(_OFFSET_PREFIX)):
            fits = list(shape) in offset_shapes(shape[:2])
        else:
            raise InversionFileError(f"it has an unknown tensor {name!r:.80}")
        if not fits or math.prod(shape) == 0:
            raise InversionFileError(f"its tensor {name!r:.80} has the wrong shape {list(shape)[:8]}")


_DTYPE_NAMES = {torch.float32: "F32", torch.uint8: "U8"}


def _check_tensors(tensors: dict[str, torch.Tensor]) -> None:
    """Layout and values: finite numbers, and a camera that is one."""
    _check_layout({name: (_DTYPE_NAMES.get(t.dtype, str(t.dtype)), tuple(t.shape)) for name, t in tensors.items()})
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise InversionFileError(f"its tensor {name!r:.80} has values that are not finite")
    extrinsics = tensors["camera"][:16].cpu().double().view(4, 4)
    rotation = extrinsics[:3, :3]
    is_rotation = torch.allclose(rotation @ rotation.T, torch.eye(3, dtype=torch.float64, device="cpu"), atol=1e-3)
    last_row_fits = torch.allclose(extrinsics[3], extrinsics.new_tensor([0.0, 0.0, 0.0, 1.0]))
    if not is_rotation or rotation.det() < 0 or not last_row_fits:
        raise InversionFileError("its camera is not a rigid camera-to-world matrix")
    if not (tensors["camera"][16] > 0 and tensors["camera"][20] > 0):
        raise InversionFileError("its camera has a focal length that is not positive")
