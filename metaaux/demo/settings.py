"""What the one who runs the demo may set, each by an environment variable."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from spaces.config import Config as spaces_config

from ..hub.loading import EMBEDDED_MODEL
from ..precision import check_precision


@dataclass(frozen=True)
class Settings:
    """Settings and limits of one running demo.

    Attributes:
        models: Hub ids or folders that visitors may choose from, the first one being the default
            (`METAAUX_MODELS`, separated by commas).
        device: where the models run (`METAAUX_DEVICE`). `None`: a GPU if there is one.
        workers: inversions, videos and meshes that are computed at once (`METAAUX_WORKERS`). Default: one, but several
            on ZeroGPU, where each has a GPU of its own.
        max_queue: requests that may wait; more are turned away with a message (`METAAUX_MAX_QUEUE`).
        session_minutes: how long a visitor's head is kept after its last use; files are deleted after twice that
            time (`METAAUX_SESSION_MINUTES`).
        max_heads_mb: memory for what views of visitors' heads share, on the models' device, in megabytes; the longest
            unused goes first and is computed anew when it is needed (`METAAUX_MAX_HEADS_MB`).
        max_sessions: visitors whose heads are kept at once; the longest unused goes first (`METAAUX_MAX_SESSIONS`).
        mcp: whether the API is offered as MCP tools too. Default: where `gradio[mcp]` is installed (`METAAUX_MCP=0`
            turns it off).
        cuda_graphs: whether what a GPU computes is recorded once and replayed for all visitors, which keeps memory and
            is several times as fast (`METAAUX_CUDA_GRAPHS=0` turns it off). On ZeroGPU, where a process lives for one
            call, nothing is recorded.
        precision: in which the models compute (`METAAUX_PRECISION`), one of `metaaux.precision.PRECISIONS`. `None`: as
            a pipeline does by itself.
        max_file_mb: largest photo in megabytes (`METAAUX_MAX_FILE_MB`); a head's file may have what its model needs.
        max_megapixels: largest photo (`METAAUX_MAX_MEGAPIXELS`).
        max_photos: photos of one person.
        max_steps: gradient steps.
        max_frames: frames of a video.
        max_mesh_resolution: cells along a side of a mesh's cube.
    """

    models: tuple[str, ...] = (EMBEDDED_MODEL,)
    device: str | None = None
    workers: int = field(default_factory=lambda: 8 if spaces_config.zero_gpu else 1)
    max_queue: int = 32
    session_minutes: int = 30
    max_heads_mb: int = 2000
    max_sessions: int = 100
    mcp: bool = field(default_factory=lambda: find_spec("mcp") is not None)
    cuda_graphs: bool = True
    precision: str | None = None
    max_file_mb: int = 20
    max_megapixels: int = 64
    max_photos: int = 5
    max_steps: int = 20
    max_frames: int = 240
    max_mesh_resolution: int = 256

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Settings with what `METAAUX_…` variables say instead of the defaults.

        Raises:
            ValueError: a variable holds no positive whole number, no model is named, or there is no such precision.
        """
        values: dict[str, Any] = {}
        if "METAAUX_MODELS" in environment:
            values["models"] = tuple(name.strip() for name in environment["METAAUX_MODELS"].split(",") if name.strip())
            if not values["models"]:
                raise ValueError("METAAUX_MODELS names no model")
        if environment.get("METAAUX_DEVICE"):
            values["device"] = environment["METAAUX_DEVICE"]
        if environment.get("METAAUX_PRECISION"):
            try:
                values["precision"] = check_precision(environment["METAAUX_PRECISION"])
            except ValueError as error:
                raise ValueError(f"METAAUX_PRECISION: {error}") from None
        for name in ("mcp", "cuda_graphs"):
            if (variable := f"METAAUX_{name.upper()}") in environment:
                values[name] = environment[variable].lower() in ("1", "true", "yes", "on")
        for name in (
            "workers",
            "max_queue",
            "session_minutes",
            "max_heads_mb",
            "max_sessions",
            "max_file_mb",
            "max_megapixels",
        ):
            variable = f"METAAUX_{name.upper()}"
            if variable in environment:
                if not environment[variable].isdecimal() or int(environment[variable]) < 1:
                    raise ValueError(f"{variable} must be a positive whole number, got {environment[variable]!r}")
                values[name] = int(environment[variable])
        return cls(**values)
