"""Which event of the page is served by which handler, and in which queue it waits."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from .engine import VIEWS
from .handlers import EDIT_SLIDERS, Handlers
from .panels import FitPanel, KeepPanel, PhotoPanel, TurnPanel
from .settings import Settings

#: None of the page's events is an endpoint for programs.
_PRIVATE = {"api_visibility": "private"}
#: Changes of the page alone, which wait for nobody.
_AT_ONCE = {"queue": False, "show_progress": "hidden", **_PRIVATE}
#: Finding faces.
_ALIGN = {"concurrency_id": "align", "concurrency_limit": 4, **_PRIVATE}


@dataclass(frozen=True)
class Page:
    """All that takes part in events; `aligned` and `visitor` are what is kept for each visitor."""

    demo: gr.Blocks
    aligned: gr.State
    visitor: gr.State
    model_line: gr.HTML
    photo: PhotoPanel
    fit: FitPanel
    turn: TurnPanel
    keep: KeepPanel

    @property
    def run_outputs(self) -> list:
        """What an inversion, or opening a head's file, sets; in the order of `RunView.values`."""
        photo, fit, turn, keep = self.photo, self.fit, self.turn, self.keep
        shown = [fit.status, fit.empty, fit.compare, fit.strip, fit.losses]
        head = [self.visitor, turn.empty, turn.column, keep.column, turn.view, turn.yaw, turn.pitch]
        return [photo.invert, photo.cancel, *shown, *head, keep.head_file, keep.picture_file]


def connect(page: Page, handlers: Handlers, settings: Settings) -> None:
    """Adds the page's events to the `gr.Blocks` that is being built."""
    heavy = {"concurrency_id": "heavy", "concurrency_limit": settings.workers, **_PRIVATE}
    _connect_model(page, handlers)
    _connect_photo(page, handlers)
    _connect_run(page, handlers, heavy)
    _connect_view(page, handlers)
    _connect_exports(page, handlers, heavy)


def _connect_model(page: Page, handlers: Handlers) -> None:
    """Opening the page or choosing another model shows what the model can do."""
    photo, turn, keep = page.photo, page.turn, page.keep
    viewpoint_parts = [turn.viewpoint, keep.make_video, keep.make_mesh]
    gr.on(
        [page.demo.load, photo.model.change],
        handlers.opened,
        [photo.model, photo.steps],
        [page.model_line, photo.steps, turn.no_directions, turn.further, *viewpoint_parts, *turn.edits],
        show_progress="hidden",
        concurrency_limit=None,
        **_PRIVATE,
    )


def _connect_photo(page: Page, handlers: Handlers) -> None:
    """A photo is aligned as soon as it is there."""
    photo = page.photo
    gr.on(
        [photo.photo.change, photo.more.change, photo.model.change],
        handlers.align,
        [photo.photo, photo.more, photo.model],
        [page.aligned, photo.card, photo.invert],
        show_progress_on=photo.photo,
        trigger_mode="always_last",
        **_ALIGN,
    )


def _connect_run(page: Page, handlers: Handlers, heavy: dict) -> None:
    """*Invert*, an example, *Cancel*, and a head's file that is dropped in."""
    photo, fit, keep = page.photo, page.fit, page.keep
    buttons = [photo.invert, photo.cancel]
    running = {"outputs": page.run_outputs, "show_progress": "hidden", **heavy}
    inputs = [page.visitor, page.aligned, photo.steps, photo.flip, photo.model]
    runs = [photo.invert.click(handlers.invert, inputs, **running)]
    starts = [photo.invert.click, photo.head_upload.upload]
    if photo.examples is not None:
        inputs = [page.visitor, photo.examples, photo.model]
        shown = {"outputs": page.run_outputs, "show_progress": "hidden", **VIEWS, **_PRIVATE}
        # It takes the place of what is still running.
        kept = photo.examples.click(handlers.kept_example, inputs, cancels=runs, **shown)
        # One that is still running ends by itself, and must not keep the next one from being asked for.
        runs.append(kept.then(handlers.example, inputs, trigger_mode="multiple", **running))
        _then_sheets(kept, page, handlers)
        starts.append(photo.examples.click)
    for run in runs:
        _then_sheets(run, page, handlers)
        run.then(handlers.ended, None, buttons, **_AT_ONCE)
        run.failure(handlers.failed, fit.status, fit.status, **_AT_ONCE)
    photo.cancel.click(handlers.cancelling, None, [photo.cancel, fit.status], cancels=runs, **_AT_ONCE)
    opened = photo.head_upload.upload(
        handlers.open_head,
        [page.visitor, photo.head_upload, photo.model],
        page.run_outputs,
        show_progress_on=photo.head_upload,
        **VIEWS,
        **_PRIVATE,
    )
    _then_sheets(opened, page, handlers)
    # What belongs to the head before is put away once another one is made or opened.
    for event in starts:
        event(
            lambda: [gr.update(value=None, visible=False)] * 4 + [0] * EDIT_SLIDERS,
            outputs=[keep.video, keep.video_file, keep.mesh, keep.mesh_file, *page.turn.edits],
            **_AT_ONCE,
        )


def _connect_view(page: Page, handlers: Handlers) -> None:
    """Turning and editing."""
    turn = page.turn
    sliders = [turn.yaw, turn.pitch, *turn.edits]
    turned = {
        "fn": handlers.turn,
        "inputs": [page.visitor, *sliders],
        "outputs": [turn.view, page.keep.picture_file, page.visitor],
        "show_progress": "hidden",
        **VIEWS,
        **_PRIVATE,
    }
    # The view's script says when the head has come to rest, or the edits; see turn.js.
    _then_sheets(turn.view.release(**turned, trigger_mode="always_last"), page, handlers)
    reset = turn.reset.click(handlers.reset, page.visitor, sliders, **_AT_ONCE)
    _then_sheets(reset.then(**turned), page, handlers)


def _then_sheets(event: gr.events.Dependency, page: Page, handlers: Handlers) -> None:
    """Lets what the page turns by itself follow a new view, without holding up anything that is asked for."""
    event.then(
        handlers.sheets,
        page.visitor,
        page.turn.view,
        show_progress="hidden",
        concurrency_id="sheets",
        concurrency_limit=8,
        **_PRIVATE,
    )


def _connect_exports(page: Page, handlers: Handlers, heavy: dict) -> None:
    """Videos and meshes."""
    keep = page.keep
    for button, handler, player, file in (
        (keep.make_video, handlers.orbit, keep.video, keep.video_file),
        (keep.make_mesh, handlers.mesh, keep.mesh, keep.mesh_file),
    ):
        # The player has to be on the page before it gets something to show.
        shown = button.click(lambda: gr.update(value=None, visible=True), outputs=player, **_AT_ONCE)
        made = shown.then(handler, [page.visitor, *page.turn.edits], [player, file], show_progress_on=player, **heavy)
        made.failure(lambda: gr.update(visible=False), outputs=player, **_AT_ONCE)
