"""What several commands share: options, their parsing, the pipeline they load, and how they print."""

from __future__ import annotations

import enum
import functools
import inspect
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from ..files import check_output_file, check_output_folder

if TYPE_CHECKING:
    from ..baselines import InversionMethod
    from ..evaluation.photos import PhotoSet
    from ..pipeline import MetaAuxInverter

# Heavy modules are imported inside the functions: `--help` and usage errors should not wait for PyTorch.


class Precision(str, enum.Enum):
    """`metaaux.precision.PRECISIONS`."""

    float32 = "float32"
    tf32 = "tf32"
    bfloat16 = "bfloat16"


ModelOption = Annotated[
    str | None, typer.Option("--model", help="Hub id or folder of the model. Default: the embedded metaaux-mini.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="For example cuda, cuda:1, mps or cpu. Default: a GPU where there is one."),
]
PrecisionOption = Annotated[
    Precision | None,
    typer.Option(
        "--precision",
        help="Of the networks' products: float32 (IEEE), tf32 (NVIDIA's GPUs) or bfloat16; weights stay as they are. "
        "Default: float32 as PyTorch is set, on NVIDIA's GPUs with convolutions in TF32.",
    ),
]
InversionArgument = Annotated[Path, typer.Argument(metavar="INVERSION", help="File written by invert.")]
EditOption = Annotated[
    list[str] | None,
    typer.Option("--edit", metavar="NAME=VALUE", help="Amount of a latent direction; may be repeated."),
]
FolderOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the results; made if missing.")]
StepsOption = Annotated[int | None, typer.Option(min=0, help="Gradient steps. Default: the model's, usually 5.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON (ASCII) on stdout.")]


@dataclass
class ComparisonOptions:
    """Options of the commands that compare inversion methods on photos: `evaluate` and `evaluate editing`."""

    data: Annotated[
        Path | None,
        typer.Option(
            metavar="ZIP_OR_FOLDER",
            help="EG3D data set, whose crops are taken as they are, or photos to align. Required.",
        ),
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the results; an interrupted run goes on there. Required."),
    ] = None
    methods: Annotated[
        str,
        typer.Option(
            help="Separated by commas: metaaux (or full), metaaux-N (with N steps; 0: before any), encoder, w, w+, "
            "pti, without_auxiliary, predicted_only, free_only; and, each with its folder's option, psp, "
            "styletransformer, hyperinverter, without_meta, without_2d, without_3d."
        ),
    ] = "metaaux,metaaux-0,encoder,pti"
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many photos.")] = None
    model: ModelOption = None
    device: DeviceOption = None
    precision: PrecisionOption = None
    steps: StepsOption = None
    shard: Annotated[
        str,
        typer.Option(
            metavar="I/N",
            help="Do part I of N, so that N processes share the photos; same --out. `accelerate launch` needs none.",
        ),
    ] = "1/1"
    psp: Annotated[Path | None, typer.Option("--psp", metavar="FOLDER", help="W+ encoder.")] = None
    styletransformer: Annotated[
        Path | None, typer.Option("--styletransformer", metavar="FOLDER", help="W+ encoder.")
    ] = None
    hyperinverter: Annotated[
        Path | None,
        typer.Option("--hyperinverter", metavar="FOLDER", help="Auxiliary network to use without adaptation."),
    ] = None
    without_meta: Annotated[
        Path | None, typer.Option("--without-meta", metavar="FOLDER", help="Auxiliary network of the plain phase.")
    ] = None
    without_2d: Annotated[
        Path | None, typer.Option("--without-2d", metavar="FOLDER", help="Auxiliary network without the 2D module.")
    ] = None
    without_3d: Annotated[
        Path | None, typer.Option("--without-3d", metavar="FOLDER", help="Auxiliary network without the 3D module.")
    ] = None
    latent_steps: Annotated[int, typer.Option(min=1, help="Steps of w, w+ and PTI's pivot.")] = 450
    tuning_steps: Annotated[int, typer.Option(min=0, help="The most steps of PTI's tuning.")] = 350
    pti_stop: Annotated[
        float,
        typer.Option(
            min=0, help="PTI ends tuning at this share of the perceptual distance to the average face; 0: never."
        ),
    ] = 0.05
    generator_rate: Annotated[float, typer.Option(min=0, help="Adam's rate in without_auxiliary.")] = 1e-3

    def check(self) -> None:
        """Ends the command where `--data` or `--out` is missing, `--out` cannot be written or `--shard` is none."""
        required(self.data, "--data")
        check_folder(required(self.out, "--out"))
        self.part()

    def part(self) -> tuple[int, int]:
        """`--shard` as (number from 1, count)."""
        number, _, count = self.shard.partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise typer.BadParameter(f"{self.shard!r} is not of the form I/N with 1 <= I <= N", param_hint="--shard")
        return int(number), int(count)

    def load(self, device: str | None = None) -> tuple[MetaAuxInverter, list[InversionMethod], PhotoSet]:
        """Pipeline, methods and photos; on `device` unless `--device` names one."""
        from ..baselines import MethodOptions, make_methods
        from ..baselines.optimization import LatentSettings
        from ..evaluation.photos import open_photos

        inverter = load_inverter(self.model, self.device or device, self.precision, progress=False)
        options = MethodOptions(
            steps=self.steps,
            psp=self.psp,
            styletransformer=self.styletransformer,
            hyperinverter=self.hyperinverter,
            without_meta=self.without_meta,
            without_2d=self.without_2d,
            without_3d=self.without_3d,
            latent=LatentSettings(steps=self.latent_steps),
            tuning_steps=self.tuning_steps,
            pti_stop_share=self.pti_stop or None,
            generator_rate=self.generator_rate,
        )
        methods = make_methods(split_names(self.methods), inverter, options)
        photos = open_photos(self.data, inverter.generator.config.image_size, lambda: inverter.aligner, self.limit)
        return inverter, methods, photos


def with_options(options: type, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator of a command that takes an object of the dataclass `options`, as its parameter `options`: each field
    becomes an option of the command line. (Typer knows no options that commands share.)

    Args:
        options: the dataclass; its fields are annotated as a command's parameters are.
        **defaults: those of this command, where they are not the dataclass's.
    """
    hints = get_type_hints(options, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(field.name, field.default),
            annotation=hints[field.name],
        )
        for field in fields(options)
    ]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(function, eval_str=True).parameters.values()
            if parameter.name != "options"
        ]

        @functools.wraps(function)
        def command(**values: Any) -> None:
            function(options=options(**{p.name: values.pop(p.name) for p in shared}), **values)

        parameters = [*shared, *own]
        command.__signature__ = inspect.Signature(parameters)
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def load_inverter(
    model: str | None, device: str | None, precision: Precision | None = None, progress: bool = True
) -> MetaAuxInverter:
    """The pipeline of `--model` on `--device`, that computes in `--precision`.

    Raises:
        ValueError: the device cannot be used, or not in this precision, or the model is of another kind.
        OSError: the model is missing, damaged or cannot be reached.
    """
    from ..devices import usable_device
    from ..pipeline import MetaAuxInverter
    from ..precision import check_precision

    device = usable_device(device)
    name = check_precision(None if precision is None else precision.value, device)
    inverter = MetaAuxInverter.from_pretrained(model).to(device)
    inverter.precision = name
    inverter.set_progress_bar_config(disable=not progress)
    return inverter


def parse_edits(edits: list[str] | None) -> dict[str, float] | None:
    """Amounts by direction of `--edit NAME=VALUE`; `None` where there is none."""
    parsed = {}
    for edit in edits or []:
        name, separator, value = edit.partition("=")
        try:
            parsed[name.strip()] = float(value)
        except ValueError:
            separator = ""
        if not separator or not name.strip():
            raise typer.BadParameter(f"{edit!r} is not of the form NAME=VALUE with a number", param_hint="--edit")
    return parsed or None


def split_names(text: str) -> list[str]:
    """Names that commas separate."""
    return [name.strip() for name in text.split(",") if name.strip()]


def required(value: Path | None, option: str) -> Path:
    """The value of an option that a command needs, but that its group may leave out for another command."""
    if value is None:
        raise typer.BadParameter("it is required", param_hint=option)
    return value


def check_folder(folder: Path, option: str = "--out") -> None:
    """Ends the command, before any work, where the option's value cannot be a folder for results."""
    with _usage_error(option):
        check_output_folder(folder)


def check_file(path: Path, *suffixes: str, option: str = "--out") -> None:
    """Ends the command, before any work, where no file can be written at `path`, or it has none of these suffixes."""
    if suffixes and path.suffix.lower() not in suffixes:
        raise typer.BadParameter(f"{path} must end in {' or '.join(suffixes)}", param_hint=option)
    with _usage_error(option):
        check_output_file(path)


@contextmanager
def _usage_error(option: str) -> Iterator[None]:
    """Says of which option an OSError in the block is the fault."""
    try:
        yield
    except OSError as error:
        raise typer.BadParameter(one_line(error.strerror or error), param_hint=option) from None


def one_line(text: object) -> str:
    """A message, or a name within one, without line breaks."""
    return " ".join(str(text).split())


def echo(text: str | bytes, error: bool = False) -> None:
    """Prints a line on stdout or stderr.

    Where nobody reads on (`| head`), what a command prints is dropped in silence: its files are what counts.
    """
    try:
        typer.echo(text, err=error)
    except BrokenPipeError:
        stream = sys.stderr if error else sys.stdout
        # What is still in the stream's buffer would raise once more at exit: it goes where nothing complains.
        with suppress(OSError, io.UnsupportedOperation, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def echo_json(value: Any) -> None:
    """Prints JSON in ASCII, whatever the terminal's encoding: other programs read it.

    Raises:
        ValueError: a number is infinite or not a number, for which JSON has no word.
    """
    echo(json.dumps(value, indent=2, allow_nan=False).encode("ascii"))


def prepare_streams() -> None:
    """Makes printing possible wherever the command runs: a character that the terminal's encoding lacks is written as
    an escape, and closed streams (`>&-`) take what comes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
