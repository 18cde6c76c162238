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
from .uploads import Amounts, Angles, ApiFiles, FileInput, PhotoInput, new_file, save_picture
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
    """The endpoints' functions; their docstrings are what `view_api` and MCP clients show. Gradio reads of an argument
    or a result the line that begins with its name, and no further one.

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
        """Turns the face of a photo into a 3D head. Start here: render, turntable, orbit and mesh take the inversion
        file that this returns. Yields one result a step: the encoder alone, step 0 (the auxiliary network's
        prediction), then each gradient step; the last result holds the file.

        Args:
            photo: picture file with a face, such as a JPEG or PNG; of several faces the largest is taken.
            steps: gradient steps, a whole number from 0; more fit the photo closer. Default: the model's, usually 5.
            flip: "on", "off" or "automatic": whether the far side of a turned head shall resemble the mirrored photo.
            more_photos: further photos of the same person from other sides, at most four.
            model: one of the models that this demo offers. Default: its first.

        Returns:
            reconstruction: PNG of the head as the photo shows it.
            report: step, its losses, seconds, the photo's camera (yaw and pitch in degrees) and faces found.
            inversion: safetensors file for render, turntable, orbit and mesh, with the last result only.
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
        """Renders a picture of a head that invert has made, from any side, edited or not.

        Args:
            inversion: safetensors file that invert returned.
            yaw: degrees of the head, -45 to 45; above 0 the nose points to the picture's right. Default: the photo's.
            pitch: degrees of the head, -30 to 30; above 0 it nods down. Default: the photo's.
            edits: amounts by name of an editing direction, such as {"smile": 1.0}; directions lists names and ranges.
            model: the model that made the inversion. Default: the demo's first.

        Returns:
            PNG of the view.
        """
        with explained():
            source = check_inversion_file(inversion, self.engine.max_head_bytes(model))
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
        """Makes a video of a head that invert has made, with the camera circling in front of it.

        Args:
            inversion: safetensors file that invert returned.
            frames: views of the loop, a whole number from 1, shown at 30 a second.
            yaw_range: degrees to either side, 0 to 45.
            pitch_range: degrees up and down, 0 to 30.
            edits: amounts by name of an editing direction, such as {"smile": 1.0}; directions lists names and ranges.
            model: the model that made the inversion. Default: the demo's first.

        Returns:
            MP4 file (H.264).
        """
        with explained():
            source = check_inversion_file(inversion, self.engine.max_head_bytes(model))
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
        """Renders a head that invert has made from many sides into one picture: a grid of views, which a page can turn
        without a further request.

        Args:
            inversion: safetensors file that invert returned.
            yaws: degrees of the grid's columns, each -45 to 45, at most 64. Default: -45 to 45 in steps of 3.
            pitches: degrees of the grid's rows, each -30 to 30, at most 64. Default: -30 to 30 in steps of 10.
            size: side of one view in pixels, a whole number from 16. Default: the model's, but not above 256.
            edits: amounts by name of an editing direction, such as {"smile": 1.0}; directions lists names and ranges.
            model: the model that made the inversion. Default: the demo's first.

        Returns:
            grid: PNG; row r, column c, each `size` pixels wide, shows the head at pitches[r] and yaws[c].
            angles: yaws, pitches and size.
        """
        with explained():
            source = check_inversion_file(inversion, self.engine.max_head_bytes(model))
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
        """Extracts the surface of a head that invert has made, as a mesh with a texture.

        Args:
            inversion: safetensors file that invert returned.
            resolution: cells along each side of the sampled cube, a whole number from 32; more is finer and slower.
            edits: amounts by name of an editing direction, such as {"smile": 1.0}; directions lists names and ranges.
            model: the model that made the inversion. Default: the demo's first.

        Returns:
            GLB file (binary glTF).
        """
        with explained():
            source = check_inversion_file(inversion, self.engine.max_head_bytes(model))
            resolution = check_integer("resolution", resolution, 32, self.settings.max_mesh_resolution)
            edits = check_edits(edits, self.engine.inverter(model).directions)
            path = new_file("head.glb")
            for _ in self.engine.mesh(model or self.settings.models[0], source, resolution, edits, path):
                pass
        return path

    def directions(self, model: str | None = None) -> list[dict]:
        """Lists the editing directions of a model, such as age or smile, which `edits` of the other tools may name.
        Takes no file and no GPU.

        Args:
            model: one of the models that this demo offers. Default: its first.

        Returns:
            directions: each with name, kind, accuracy, meaning, low and high (sensible amounts; 1 is clearly seen).
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
        return [file, *between, Amounts(label="edits", value={}), _model_input(settings)]

    with gr.Column(visible=False):
        trigger = gr.Button()
        add(api.invert, _invert_inputs(settings), _invert_outputs(), heavy)
        angles = gr.Number(label="yaw"), gr.Number(label="pitch")
        add(api.render, head(*angles), [gr.Image(label="view", format="png")], VIEWS)
        path = gr.Number(60, label="frames"), gr.Number(25, label="yaw_range"), gr.Number(10, label="pitch_range")
        add(api.orbit, head(*path), [gr.File(label="video")], heavy)
        grid = Angles(label="yaws"), Angles(label="pitches"), gr.Number(label="size")
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
        ApiFiles(label="more_photos", type="filepath"),
        _model_input(settings),
    ]


def _invert_outputs() -> list:
    return [
        gr.Image(label="reconstruction", format="png"),
        gr.JSON(label="report"),
        gr.File(label="inversion"),
        gr.Image(label="aligned", format="png"),
    ]
