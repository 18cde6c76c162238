"""Command line: `python -m metaaux COMMAND`, one module a command.

Results go to files and stdout, progress and errors to stderr. Exit codes: 0 done, 1 it failed, 2 wrong usage, 130
stopped by Ctrl-C.
"""

from __future__ import annotations

import sys

import typer

# Not their functions: a module of this package would be hidden by a function of its name.
from . import (
    assemble,
    benchmark,
    benchmark_scaling,
    benchmark_training,
    compare_flip,
    convert,
    evaluate,
    grow,
    invert,
    mesh,
    model_info,
    orbit,
    prepare,
    push,
    render,
    train,
)
from .options import echo, one_line, prepare_streams

app = typer.Typer(
    name="metaaux",
    help="Meta-Auxiliary Network for 3D GAN Inversion: faces from photos, rendered from other sides.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    invert.invert,
    render.render,
    orbit.orbit,
    mesh.mesh,
    model_info.model_info,
    train.train,
    grow.grow,
    prepare.prepare,
    assemble.assemble,
    push.push,
    benchmark.benchmark,
    benchmark_training.benchmark_training,
    benchmark_scaling.benchmark_scaling,
    compare_flip.compare_flip,
):
    app.command()(command)
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(convert.app, name="convert")


def main() -> None:
    """Runs the command line; expected failures end in one line on stderr and exit code 1."""
    prepare_streams()
    try:
        app()
    except (ValueError, OSError, FloatingPointError) as error:
        echo(f"Error: {one_line(error)}", error=True)
        sys.exit(1)
    except RuntimeError as error:
        # Told by its name, since PyTorch is not imported for what needs none of it.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        reason = one_line(error).partition("If reserved but unallocated")[0].strip()
        advice = (
            "Do less at once (--batch, or batch and tasks_per_pass in a configuration), or end what else uses the GPU"
        )
        echo(f"Error: {reason} {advice}.", error=True)
        sys.exit(1)
