"""The page: its parts in the order in which they are used, and which event is served by what."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from . import texts
from .api import add_endpoints
from .engine import Engine
from .handlers import EDIT_SLIDERS, FURTHER_SLIDERS, NAMED_SLIDERS, Handlers
from .settings import Settings
from .uploads import FileInput, PhotoInput
from .validation import FLIP_CHOICES, MAX_PITCH, MAX_YAW

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"


def build_demo(settings: Settings | None = None) -> tuple[gr.Blocks, Engine]:
    """The demo, not yet launched, and the engine behind it, not yet started.

    Args:
        settings: models and limits. Default: those of the environment.
    """
    settings = settings or Settings.from_environment()
    engine = Engine(settings)
    handlers = Handlers(engine, settings)
    lifetime = 60 * settings.session_minutes
    # Files outlive the session that offers them, and are looked for every ten minutes.
    cleaning = (600, 2 * lifetime)
    with gr.Blocks(title="metaaux: one photo, a whole head", fill_width=True, delete_cache=cleaning) as demo:
        aligned = gr.State(time_to_live=lifetime)
        session = gr.State(time_to_live=lifetime)
        with gr.Row(elem_id="masthead"):
            gr.HTML(texts.HEADER)
            model_line = gr.HTML(texts.LOADING, elem_id="model-line")

        with gr.Row(elem_id="columns"):
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
                pictures = sorted(EXAMPLES.glob("*.jpg"))
                if pictures:
                    gr.Examples([[str(path)] for path in pictures], photo, label="or try one of these")
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

            with gr.Column(scale=5, min_width=320, elem_classes="sheet", elem_id="fit-panel"):
                gr.HTML(texts.heading(2, "Fit"))
                status = gr.HTML(elem_id="status")
                empty_fit = gr.HTML(texts.EMPTY_FIT)
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

            with gr.Column(scale=5, min_width=320, elem_classes="sheet", elem_id="turn-panel"):
                gr.HTML(texts.heading(3, "Turn and edit"))
                empty_view = gr.HTML(texts.EMPTY_VIEW)
                with gr.Column(visible=False, elem_id="turn") as turn_column:
                    view = gr.Image(
                        show_label=False,
                        format="png",
                        type="filepath",
                        interactive=False,
                        elem_id="view",
                        buttons=["fullscreen"],
                    )
                    with gr.Column(elem_classes="viewpoint") as viewpoint:
                        gr.HTML(texts.DRAG_HINT)
                        with gr.Row(elem_classes="sliders"):
                            yaw = gr.Slider(
                                -MAX_YAW, MAX_YAW, 0, step=0.5, label="Yaw", elem_id="yaw", min_width=140, buttons=[]
                            )
                            pitch = gr.Slider(
                                -MAX_PITCH,
                                MAX_PITCH,
                                0,
                                step=0.5,
                                label="Pitch",
                                elem_id="pitch",
                                min_width=140,
                                buttons=[],
                            )
                    no_directions = gr.HTML(texts.NO_DIRECTIONS, visible=False)
                    with gr.Row(elem_classes="sliders edits", elem_id="edits"):
                        edits = _edit_sliders(NAMED_SLIDERS)
                    with gr.Accordion("Directions without a name", open=False, visible=False) as further:
                        gr.HTML(texts.FURTHER_DIRECTIONS)
                        with gr.Row(elem_classes="sliders edits"):
                            edits += _edit_sliders(FURTHER_SLIDERS)
                    reset = gr.Button("Reset view and edits", size="sm", elem_id="reset")

        with gr.Column(visible=False, elem_classes="sheet", elem_id="keep") as keep_column:
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

        with gr.Accordion("How it works", open=False):
            gr.Markdown(texts.HOW_IT_WORKS)
        gr.Markdown(texts.NOTICE, elem_id="notice")
        add_endpoints(engine, settings)

        private = {"api_visibility": "private"}
        heavy = {"concurrency_id": "heavy", "concurrency_limit": settings.workers, **private}
        light = {"concurrency_id": "light", "concurrency_limit": 2, **private}
        opened = [model_line, steps, no_directions, further, viewpoint, make_video, make_mesh, *edits]
        found = [aligned, card, invert]
        run_outputs = [
            invert, cancel, status, empty_fit, compare, strip, losses, session, empty_view, turn_column, keep_column,
            view, yaw, pitch, head_file, picture_file,
        ]  # fmt: skip

        gr.on(
            [demo.load, model.change],
            handlers.opened,
            [model, steps],
            opened,
            show_progress="hidden",
            concurrency_limit=None,
            **private,
        )
        gr.on(
            [photo.change, more.change, model.change],
            handlers.align,
            [photo, more, model],
            found,
            show_progress_on=photo,
            trigger_mode="always_last",
            **light,
        )
        run = invert.click(
            handlers.invert, [aligned, steps, flip, model], run_outputs, show_progress="hidden", **heavy
        )
        run.then(
            lambda: (gr.update(visible=True), gr.update(visible=False)),
            outputs=[invert, cancel],
            queue=False,
            show_progress="hidden",
            **private,
        )
        run.failure(lambda: "", outputs=status, queue=False, show_progress="hidden", **private)
        cancel.click(
            handlers.cancelled,
            None,
            [invert, cancel, status],
            cancels=run,
            queue=False,
            show_progress="hidden",
            **private,
        )
        head_upload.upload(
            handlers.open_head, [head_upload, model], run_outputs, show_progress_on=head_upload, **light
        )
        gr.on(
            [slider.change for slider in (yaw, pitch, *edits)],
            handlers.turn,
            [session, yaw, pitch, *edits],
            [view, session, picture_file],
            show_progress="hidden",
            trigger_mode="always_last",
            # One after the other: moving two sliders at once sends two requests, and the last one must win.
            concurrency_id="view",
            concurrency_limit=1,
            **private,
        )
        reset.click(handlers.reset, session, [yaw, pitch, *edits], queue=False, show_progress="hidden", **private)
        # What belongs to the head before is put away once another one is made or opened.
        for event in (invert.click, head_upload.upload):
            event(
                lambda: [gr.update(value=None, visible=False)] * 4 + [0] * EDIT_SLIDERS,
                outputs=[video, video_file, mesh, mesh_file, *edits],
                queue=False,
                show_progress="hidden",
                **private,
            )
        for button, handler, player, file in (
            (make_video, handlers.orbit, video, video_file),
            (make_mesh, handlers.mesh, mesh, mesh_file),
        ):
            # The player has to be on the page before it gets something to show.
            shown = button.click(
                lambda: gr.update(value=None, visible=True),
                outputs=player,
                queue=False,
                show_progress="hidden",
                **private,
            )
            made = shown.then(handler, [session, *edits], [player, file], show_progress_on=player, **heavy)
            made.failure(
                lambda: gr.update(visible=False), outputs=player, queue=False, show_progress="hidden", **private
            )
    demo.queue(max_size=settings.max_queue)
    return demo, engine


def _edit_sliders(count: int) -> list[gr.Slider]:
    return [gr.Slider(-3, 3, 0, step=0.1, visible=False, min_width=150, buttons=[]) for _ in range(count)]
