"""The page's panels, in the order in which they are used. Each builder lays its panel out and hands back those of its
components that take part in events; `events.py` says in which."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from . import texts
from .handlers import EXAMPLES, FURTHER_SLIDERS, NAMED_SLIDERS
from .settings import Settings
from .uploads import FileInput, PhotoInput
from .validation import FLIP_CHOICES, MAX_PITCH, MAX_YAW

TURN_SCRIPT = (Path(__file__).parent / "turn.js").read_text(encoding="utf-8")


@dataclass(frozen=True)
class PhotoPanel:
    """Photo in, settings, *Invert*."""

    photo: PhotoInput
    examples: gr.Dataset | None
    more: FileInput
    card: gr.HTML
    invert: gr.Button
    cancel: gr.Button
    head_upload: FileInput
    steps: gr.Slider
    flip: gr.Radio
    model: gr.Dropdown


@dataclass(frozen=True)
class FitPanel:
    """What a running inversion shows."""

    status: gr.HTML
    empty: gr.HTML
    compare: gr.ImageSlider
    strip: gr.Gallery
    losses: gr.HTML


@dataclass(frozen=True)
class TurnPanel:
    """The head, its angles and its edits; `viewpoint` and `edits` are hidden where a model has no use for them."""

    empty: gr.HTML
    column: gr.Column
    view: gr.HTML
    viewpoint: gr.Column
    yaw: gr.Slider
    pitch: gr.Slider
    no_directions: gr.HTML
    further: gr.Accordion
    edits: list[gr.Slider]
    reset: gr.Button


@dataclass(frozen=True)
class KeepPanel:
    """What a visitor can take home."""

    column: gr.Column
    picture_file: gr.DownloadButton
    head_file: gr.DownloadButton
    make_video: gr.Button
    make_mesh: gr.Button
    video: gr.Video
    video_file: gr.DownloadButton
    mesh: gr.Model3D
    mesh_file: gr.DownloadButton


def build_photo_panel(settings: Settings) -> PhotoPanel:
    """The first panel."""
    with gr.Column(scale=4, min_width=300, elem_classes="sheet", elem_id="photo-panel"):
        gr.HTML(texts.heading(1, "Photo"))
        photo = PhotoInput(
            type="filepath",
            image_mode=None,
            sources=["upload", "webcam", "clipboard"],
            show_label=False,
            height=260,
            elem_id="photo",
            placeholder="# Drop a photo of a face\nor tap to choose one",
            buttons=["fullscreen"],
        )
        examples = None
        if EXAMPLES:
            examples = gr.Examples([[str(path)] for path in EXAMPLES], photo, label="or try one of these").dataset
        card = gr.HTML(visible=False, elem_id="crop")
        invert = gr.Button("Invert", variant="primary", size="lg", interactive=False, elem_id="invert")
        cancel = gr.Button("Cancel", variant="stop", size="lg", visible=False, elem_id="cancel")
        with gr.Accordion("More photos of the same person", open=False):
            more = FileInput(
                file_count="multiple",
                type="filepath",
                file_types=["image"],
                label="Up to four more, from other sides if you can",
                height=120,
                elem_id="more-photos",
            )
        with gr.Accordion("Open a saved head", open=False):
            head_upload = FileInput(
                type="filepath",
                file_types=[".safetensors"],
                label="head.safetensors",
                height=120,
                elem_id="head-upload",
            )
        steps, flip, model = _build_settings(settings)
    return PhotoPanel(photo, examples, more, card, invert, cancel, head_upload, steps, flip, model)


def _build_settings(settings: Settings) -> tuple[gr.Slider, gr.Radio, gr.Dropdown]:
    with gr.Accordion("Settings", open=False):
        steps = gr.Slider(0, settings.max_steps, 5, step=1, label="Gradient steps", elem_id="steps")
        flip = gr.Radio(
            list(FLIP_CHOICES),
            value="automatic",
            label="Flip loss",
            info="For turned faces: the hidden side shall resemble the mirrored photo.",
        )
        model = gr.Dropdown(
            list(settings.models),
            value=settings.models[0],
            label="Model",
            interactive=len(settings.models) > 1,
        )
    return steps, flip, model


def build_fit_panel() -> FitPanel:
    """The second panel."""
    with gr.Column(scale=5, min_width=320, elem_classes="sheet", elem_id="fit-panel"):
        gr.HTML(texts.heading(2, "Fit"))
        status = gr.HTML(elem_id="status")
        empty = gr.HTML(texts.EMPTY_FIT)
        compare = gr.ImageSlider(
            visible=False,
            show_label=False,
            format="png",
            type="pil",
            elem_id="compare",
            buttons=["fullscreen"],
        )
        strip = gr.Gallery(
            visible=False,
            show_label=False,
            format="png",
            columns=7,
            height="auto",
            object_fit="cover",
            elem_id="strip",
            buttons=[],
        )
        losses = gr.HTML(visible=False, elem_id="losses")
    return FitPanel(status, empty, compare, strip, losses)


def build_turn_panel() -> TurnPanel:
    """The third panel."""
    with gr.Column(scale=5, min_width=320, elem_classes="sheet", elem_id="turn-panel"):
        gr.HTML(texts.heading(3, "Turn and edit"))
        empty = gr.HTML(texts.EMPTY_VIEW)
        with gr.Column(visible=False, elem_id="turn") as column:
            view = gr.HTML(
                html_template=texts.STAGE.format(yaw=MAX_YAW),
                js_on_load=TURN_SCRIPT,
                apply_default_css=False,
                elem_id="view",
            )
            with gr.Column(elem_classes="viewpoint") as viewpoint:
                gr.HTML(texts.DRAG_HINT)
                with gr.Row(elem_classes="sliders"):
                    yaw, pitch = _angle_slider("Yaw", MAX_YAW), _angle_slider("Pitch", MAX_PITCH)
            no_directions = gr.HTML(texts.NO_DIRECTIONS, visible=False)
            with gr.Row(elem_classes="sliders edits", elem_id="edits"):
                edits = _edit_sliders(NAMED_SLIDERS)
            with gr.Accordion("Directions without a name", open=False, visible=False) as further:
                gr.HTML(texts.FURTHER_DIRECTIONS)
                with gr.Row(elem_classes="sliders edits"):
                    edits += _edit_sliders(FURTHER_SLIDERS)
            reset = gr.Button("Reset view and edits", size="sm", elem_id="reset")
    return TurnPanel(empty, column, view, viewpoint, yaw, pitch, no_directions, further, edits, reset)


def build_keep_panel() -> KeepPanel:
    """The panel below the three others."""
    with gr.Column(visible=False, elem_classes="sheet", elem_id="keep") as column:
        gr.HTML(texts.heading(4, "Keep"))
        with gr.Row(elem_id="keep-row"):
            with gr.Column(scale=4, min_width=280, elem_classes="keep"):
                picture_file = gr.DownloadButton("Save picture", size="md", elem_id="save-picture")
                head_file = gr.DownloadButton("Save head", size="md", elem_id="save-head")
                make_video = gr.Button("Make video", size="md", elem_id="make-video")
                make_mesh = gr.Button("Make mesh", size="md", elem_id="make-mesh")
                gr.HTML(texts.HEAD_FILE_HINT)
            with gr.Column(scale=5, min_width=300):
                video = gr.Video(
                    visible=False,
                    show_label=False,
                    autoplay=True,
                    loop=True,
                    height=380,
                    elem_id="video",
                    buttons=[],
                )
                video_file = gr.DownloadButton("Save video (MP4)", visible=False, size="sm", elem_id="save-video")
            with gr.Column(scale=5, min_width=300):
                mesh = gr.Model3D(
                    visible=False, show_label=False, height=380, clear_color=(0, 0, 0, 0), elem_id="mesh"
                )
                mesh_file = gr.DownloadButton("Save mesh (GLB)", visible=False, size="sm", elem_id="save-mesh")
    return KeepPanel(column, picture_file, head_file, make_video, make_mesh, video, video_file, mesh, mesh_file)


def _angle_slider(label: str, limit: float) -> gr.Slider:
    return gr.Slider(-limit, limit, 0, step=0.5, label=label, elem_id=label.lower(), min_width=140, buttons=[])


def _edit_sliders(count: int) -> list[gr.Slider]:
    return [gr.Slider(-3, 3, 0, step=0.1, visible=False, min_width=150, buttons=[]) for _ in range(count)]
