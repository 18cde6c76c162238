"""Starting the demo's server."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .engine import Engine
from .theme import STYLE, MetaAuxTheme


def launch(demo: gr.Blocks, engine: Engine, block: bool = True, **options: Any) -> tuple[Any, str, str]:
    """Starts the server and loads the models.

    Address and port come from `options` or, as in any Gradio app, from `GRADIO_SERVER_NAME` and `GRADIO_SERVER_PORT`.

    Args:
        demo: of `build_demo`.
        engine: of `build_demo`.
        block: whether to stay here until the server is stopped.
        **options: those of [`gradio.Blocks.launch`].

    Returns:
        as [`gradio.Blocks.launch`]: the server's app, its local address, its public address if there is one.
    """
    settings = engine.settings
    if engine.zero_gpu:
        engine.start()
    started = demo.launch(
        theme=MetaAuxTheme(),
        css=STYLE,
        max_file_size=f"{settings.max_file_mb}mb",
        state_session_capacity=settings.max_sessions,
        mcp_server=settings.mcp,
        # Messages only: what they may say is up to `validation.explained`.
        show_error=True,
        run_history=False,
        footer_links=["api"],
        prevent_thread_lock=True,
        **options,
    )
    if not engine.zero_gpu:
        engine.start()
    if block:
        demo.block_thread()
    return started
