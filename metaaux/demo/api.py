"""The endpoints that programs call: /invert, /render, /turntable, /orbit, /mesh and /directions.

They keep nothing between calls. What one call hands to the next is the inversion's file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import gradio as gr

from ..export.turntable import PITCHES, YAWS
from .engine import VIEWS, Engine
from .settings import Settings
from .uploads import FileInput, PhotoInput, new_file, save_picture
from .validation import (
    FLIP_CHOICES,
    MAX_PITCH,
    MAX_YAW,
    check_angle,
    check_angles,
    check_edits,
    check_flip,
    check_integer,
    check_inversion_file,
    explained,
    read_photos,
)

#: Views of a grid.
MAX_VIEWS = 512


class Api:
    """The endpoints' functions; their docstrings are what `view_api` and MCP clients show.

    Args:
        engine: computes.
        settings: limits.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings

    def invert(
        self,
        photo: str,
        steps: int | None = None,
        flip: str = "automatic",
        more_photos: list[str] | None = None,
        model: str | None = None,
    ) -> Iterator[tuple]:
        """Turns the face of a photo into a 3D head. Yields one result a step: the encoder alone, step 0 (the auxiliary
        network's prediction), then each gradient step; the last result holds the inversion's file.

        Args:
            photo: picture file with a face; of several faces the largest is taken.
            steps: gradient steps, from 0; 5 is the paper's number. Default: the model's.
            flip: "on", "off" or "automatic": whether the far side of a turned head shall resemble the mirrored photo.
            more_photos: further photos of the same person.
            model: one of the models that this demo offers. Default: its first.

        Returns:
            reconstruction: PNG of the head as the photo shows it.
            report: step, its losses, seconds, the photo's camera (yaw and pitch in degrees) and faces found.
            inversion: safetensors file for /render, /turntable, /orbit and /mesh, with the last result only.
            aligned: PNG of the photo as it was cropped.
        """
        with explained():
            inverter = self.engine.inverter(model)
            model = model or self.settings.models[0]
            if steps is None:
                steps = min(inverter.config.inner_steps, self.settings.max_steps)
            steps = check_integer("steps", steps, 0, self.settings.max_steps)
            flip = check_flip(flip)
            faces = self.engine.align(model, read_photos([photo, *(more_photos or [])], self.settings))
            cameras = [face.camera for face in faces]
            crops = [face.image for face in faces]
            found = {
                "camera": {"yaw": faces[0].yaw, "pitch": faces[0].pitch},
                "faces_found": [face.faces_found for face in faces],
            }
            aligned = save_picture(crops[0], "aligned.png")
            path = new_file("inversion.safetensors")
            with closing(self.engine.invert(model, crops, cameras, steps, flip, path)) as results:
                for result in results:
                    picture = save_picture(result.image, "reconstruction.png")
                    yield picture, {**result.losses, **found}, result.path, aligned

    def render(
        self,
        inversion: str,
        yaw: float | None = None,
        pitch: float | None = None,
        edits: dict | None = None,
        model: str | None = None,
    ) -> Any:
        """Renders an inverted head from any side, edited or not.

        Args:
            inversion: file that /invert returned.
            yaw: degrees of the head; above 0 the nose points to the picture's right. Default: the photo's.
            pitch: degrees of the head; above 0 it nods down. Default: the photo's.
            edits: amounts by name of a direction, for example {"smile": 1.0}; /directions lists them.
            model: the model that made the inversion. Default: the demo's first.

        Returns:
            PNG of the view.
        """
        with explained():
            source = check_inversion_file(inversion, self.settings)
            yaw, pitch = check_angle("yaw", yaw, MAX_YAW), check_angle("pitch", pitch, MAX_PITCH)
            edits = check_edits(edits, self.engine.inverter(model).directions)
            return save_picture(self.engine.render(model or self.settings.models[0], source, yaw, pitch, edits))

    def orbit(
        self,
        inversion: str,
        frames: int = 60,
        yaw_range: float = 25.0,
        pitch_range: float = 10.0,
        edits: dict | None = None,
        model: str | None = None,
    ) -> str:
        """Makes a video of the camera circling an inverted head.

        Args:
            inversion: file that /invert returned.
            frames: views of the loop, at 30 a second.
            yaw_range: degrees to either side.
            pitch_range: degrees up and down.
            edits: as for /render.
            model: as for /render.

        Returns:
            MP4 file (H.264).
        """
        with explained():
            source = check_inversion_file(inversion, self.settings)
            frames = check_integer("frames", frames, 1, self.settings.max_frames)
            ranges = (
                check_angle("yaw_range", yaw_range, MAX_YAW) or 0.0,
                check_angle("pitch_range", pitch_range, MAX_PITCH) or 0.0,
            )
            edits = check_edits(edits, self.engine.inverter(model).directions)
            path = new_file("orbit.mp4")
            for _ in self.engine.orbit(model or self.settings.models[0], source, frames, ranges, edits, path):
                pass
        return path

    def turntable(
        self,
        inversion: str,
        yaws: list | None = None,
        pitches: list | None = None,
        size: int | None = None,
        edits: dict | None = None,
        model: str | None = None,
    ) -> tuple[str, dict]:
        """Renders an inverted head from many sides into one picture, a grid that a page can turn without a request.

        Args:
            inversion: file that /invert returned.
            yaws: degrees of the grid's columns, at most 64. Default: -45 to 45 in steps of 3.
            pitches: degrees of the grid's rows, at most 64. Default: -30 to 30 in steps of 10.
            size: side of one view in pixels, up to the model's. Default: the model's, but not above 256.
            edits: as for /render.
            model: as for /render.

        Returns:
            grid: PNG; row r, column c, each `size` pixels wide, shows the head at pitches[r] and yaws[c].
            angles: yaws, pitches and size.
        """
        with explained():
            source = check_inversion_file(inversion, self.settings)
            columns, rows = (
                check_angles("yaws", yaws, YAWS, MAX_YAW),
                check_angles("pitches", pitches, PITCHES, MAX_PITCH),
            )
            if len(columns) * len(rows) > MAX_VIEWS:
                raise ValueError(f"a grid has up to {MAX_VIEWS} views, got {len(columns)} x {len(rows)}")
            inverter = self.engine.inverter(model)
            if size is not None:
                size = check_integer("size", size, 16, inverter.generator.config.image_size)
            edits = check_edits(edits, inverter.directions)
            table = self.engine.turntable(model or self.settings.models[0], source, columns, rows, size, edits)
            path = new_file("turntable.png")
            table.save(path)
        return path, table.angles

    def mesh(self, inversion: str, resolution: int = 160, edits: dict | None = None, model: str | None = None) -> str:
        """Extracts the head's surface as a mesh with a texture.

        Args:
            inversion: file that /invert returned.
            resolution: cells along each side of the sampled cube.
            edits: as for /render.
            model: as for /render.

        Returns:
            GLB file (binary glTF).
        """
        with explained():
            source = check_inversion_file(inversion, self.settings)
            resolution = check_integer("resolution", resolution, 32, self.settings.max_mesh_resolution)
            edits = check_edits(edits, self.engine.inverter(model).directions)
            path = new_file("head.glb")
            for _ in self.engine.mesh(model or self.settings.models[0], source, resolution, edits, path):
                pass
        return path

    def directions(self, model: str | None = None) -> list[dict]:
        """Lists the editing directions of a model, which `edits` of the other endpoints may name.

        Args:
            model: one of the models that this demo offers. Default: its first.

        Returns:
            for each direction its name, kind, low and high (the range of sensible amounts; 1 is a clearly visible
            change), accuracy and meaning.
        """
        with explained():
            directions = self.engine.inverter(model).directions
        keys = ("name", "kind", "low", "high", "accuracy", "meaning")
        return [{key: getattr(direction, key) for key in keys} for direction in directions.values()]


def add_endpoints(engine: Engine, settings: Settings) -> None:
    """Adds the endpoints to the `gr.Blocks` that is being built. Their components are part of no page."""
    api = Api(engine, settings)
    heavy = {"concurrency_id": "heavy", "concurrency_limit": settings.workers}

    def add(function: Callable, inputs: list, outputs: list, options: dict) -> None:
        trigger.click(function, inputs, outputs, api_name=function.__name__, **options)

    def head(*between: gr.components.Component) -> list:
        """Inputs of an endpoint that takes an inversion: its file, `between`, then edits and model."""
        file = FileInput(label="inversion", type="filepath")
        return [file, *between, gr.JSON(label="edits", value={}), _model_input(settings)]

    with gr.Column(visible=False):
        trigger = gr.Button()
        add(api.invert, _invert_inputs(settings), _invert_outputs(), heavy)
        angles = gr.Number(label="yaw"), gr.Number(label="pitch")
        add(api.render, head(*angles), [gr.Image(label="view", format="png")], VIEWS)
        path = gr.Number(60, label="frames"), gr.Number(25, label="yaw_range"), gr.Number(10, label="pitch_range")
        add(api.orbit, head(*path), [gr.File(label="video")], heavy)
        grid = gr.JSON(label="yaws"), gr.JSON(label="pitches"), gr.Number(label="size")
        add(api.turntable, head(*grid), [gr.Image(label="grid", format="png"), gr.JSON(label="angles")], heavy)
        add(api.mesh, head(gr.Number(160, label="resolution")), [gr.File(label="mesh")], heavy)
        add(api.directions, [_model_input(settings)], [gr.JSON(label="directions")], {"concurrency_limit": None})


def _model_input(settings: Settings) -> gr.Dropdown:
    return gr.Dropdown(list(settings.models), value=settings.models[0], label="model")


def _invert_inputs(settings: Settings) -> list:
    return [
        PhotoInput(label="photo", type="filepath"),
        gr.Number(label="steps"),
        gr.Dropdown(list(FLIP_CHOICES), value="automatic", label="flip"),
        FileInput(label="more_photos", type="filepath", file_count="multiple"),
        _model_input(settings),
    ]


def _invert_outputs() -> list:
    return [
        gr.Image(label="reconstruction", format="png"),
        gr.JSON(label="report"),
        gr.File(label="inversion"),
        gr.Image(label="aligned", format="png"),
    ]
