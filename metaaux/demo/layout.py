"""The page: its panels from top to bottom, its events, and the endpoints for programs."""

from __future__ import annotations

import gradio as gr

from . import texts
from .api import add_endpoints
from .engine import Engine
from .events import Page, connect
from .handlers import Handlers
from .panels import build_fit_panel, build_keep_panel, build_photo_panel, build_turn_panel
from .settings import Settings


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
        visitor = gr.State(time_to_live=lifetime, delete_callback=handlers.forget)
        with gr.Row(elem_id="masthead"):
            gr.HTML(texts.HEADER)
            model_line = gr.HTML(texts.LOADING, elem_id="model-line")
        with gr.Row(elem_id="columns"):
            photo = build_photo_panel(settings)
            fit = build_fit_panel()
            turn = build_turn_panel()
        keep = build_keep_panel()
        with gr.Accordion("How it works", open=False):
            gr.Markdown(texts.HOW_IT_WORKS)
        gr.Markdown(texts.notice(settings.models, settings.session_minutes), elem_id="notice")
        add_endpoints(engine, settings)
        page = Page(demo, aligned, visitor, model_line, photo, fit, turn, keep)
        connect(page, handlers, settings)
    demo.queue(max_size=settings.max_queue)
    return demo, engine
