"""Settings of a training run: read from YAML, nested, and checked for names, types and ranges before anything starts.

Each trained part has a class of its own in its module, made of the sections here. A value's type decides what YAML is
taken for it, so that `1e-3`, which YAML's own rules make a string, arrives as a number.
"""

from __future__ import annotations

import functools
import inspect
import os
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

#: A share of a whole.
Share = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """A section of a configuration. A value that does not fit raises pydantic's `ValidationError`, a ValueError, also
    when it is assigned later."""

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, values: Any) -> Any:
        if isinstance(values, dict) and (unknown := [str(name) for name in values if name not in cls.model_fields]):
            known = ", ".join(sorted(cls.model_fields))
            raise ValueError(f"unknown setting {', '.join(sorted(unknown))}; there are {known}")
        return values

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: Any) -> Any:
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and {int, float} & {annotation, *typing.get_args(annotation)}:
            raise ValueError("expected a number")
        return value


class DataSettings(Settings):
    """Photos with cameras; all trainers read them alike."""

    path: str | Annotated[list[str], Field(min_length=1)]
    """EG3D data set to train on, zip or folder, or several that are read as one."""
    validation: str | None = None
    """One of held-out photos for figures and sheets; none: training photos are shown, where any are."""
    mirror: bool = True
    """Mirror half of the photos, picture and camera together; EG3D's mirrored copies are then left out."""
    balance_turned: bool = True
    """Show faces turned beyond 12° twice and beyond 20° four times as often."""
    repeats: dict[str, PositiveInt] = {}
    """How many times as often photos of a source are shown, by that source's name in the data set's attributes."""
    least_sharp: dict[str, float] = {}
    """The smallest `sharp` of the photos of a source that are used, by that source's name, likewise."""
    in_memory: Literal["auto", True, False] = "auto"
    """Keep all decoded photos on the device (true), or let worker processes decode them as they are asked for (false);
    auto: the former where they take no more than a third of what is free there, or else of the host's free memory."""
    workers: NonNegativeInt | None = None
    """Worker processes, of each process of the run; null: 8, or as many as there are cores for it; 0 decodes in the
    process itself."""


class ScheduleSettings(Settings):
    """How learning rates change in the course of a run (`schedules.learning_rate_factor`)."""

    warmup_images: NonNegativeInt = 0
    """Images over which the rate rises linearly to its peak at first."""
    final_learning_rate: Share = 0.0
    """Share of the peak at the end of the run, to which the rate falls along half a cosine; with 1 it stays."""


class OptimiserSettings(ScheduleSettings):
    """How fast weights are moved."""

    learning_rate: NonNegativeFloat
    """Its peak."""
    weight_decay: NonNegativeFloat = 0.0
    """Of AdamW."""
    max_gradient_norm: PositiveFloat = 1.0
    """Gradients longer than this are shortened to it."""


class AverageSettings(Settings):
    """The moving average of the weights, which is what is published."""

    half_life_images: PositiveFloat
    """Images after which a weight counts half."""
    rampup: PositiveFloat = 0.1
    """The half-life is at most this share of the images so far, so that the start is forgotten soon."""


class ComputeSettings(Settings):
    """How it is computed; a CPU computes in fp32, without graphs and compilation."""

    precision: Literal["bf16", "fp32"] = "bf16"
    """Of convolutions and renderings; weights and losses are fp32."""
    graphs: bool = True
    """Replay steps as CUDA graphs."""
    compile: bool = False
    """Fuse passes with `torch.compile`, where the part has passes that gain by it."""


class FrozenGeneratorCompute(ComputeSettings):
    """Of parts that learn through the frozen generator's pictures, which may need more memory than a GPU has."""

    micro_batch: PositiveInt | None = None
    """Pictures of a process that are rendered and compared at once; null: all of its batch. The gradient is the same
    but for rounding."""
    rays_at_once: PositiveInt | None = None
    """Rays of each picture whose samples are held at a time, to be computed again in the backward pass; null: all are,
    and nothing is computed twice. Needs graphs off."""

    @model_validator(mode="after")
    def _no_graphs_of_recomputation(self) -> FrozenGeneratorCompute:
        if self.graphs and self.rays_at_once is not None:
            raise ValueError("rays_at_once computes in the backward pass, which graphs do not capture: graphs: false")
        return self


class RunSettings(Settings):
    """How long a run lasts and what it leaves behind. Images are counted over all processes."""

    total_images: PositiveInt
    """Where the run ends; all schedules follow it."""
    interval_images: PositiveInt
    """A checkpoint is saved, then figures written and sheets drawn, each time so many images have been shown."""
    max_seconds: NonNegativeFloat | None = None
    """Stop after so long with a checkpoint to resume from. It changes nothing in the schedules."""
    keep: PositiveInt = 2
    """Checkpoints of this run that are kept, the newest."""
    max_nonfinite_steps: NonNegativeInt = 20
    """Steps of an interval whose gradient may hold an infinite number or none; with more the run ends in an error."""
    trackers: list[str] = ["tensorboard"]
    """What accelerate writes the figures to besides figures.jsonl: "tensorboard", "wandb", …"""
    timeout_minutes: PositiveFloat = 240
    """How long processes wait for one that works alone (saving, held-out figures) before they give up."""
    seed: NonNegativeInt = 0
    """Of first weights, order of the photos and random codes."""

    @field_validator("trackers")
    @classmethod
    def _known_trackers(cls, names: list[str]) -> list[str]:
        if unknown := sorted(set(names) - set(LOGGER_TYPE_TO_CLASS)):
            raise ValueError(f"unknown {', '.join(unknown)}; there are {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        return names


def arguments_of(function: Callable, *given: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A validator for a setting that holds arguments of `function` (a class: its constructor's), but for those that
    are `given` otherwise: it checks names and, where they are annotated, types."""
    initialiser = function.__init__ if inspect.isclass(function) else function
    types = typing.get_type_hints(initialiser)
    fields = {
        name: (types.get(name, Any), ... if parameter.default is parameter.empty else parameter.default)
        for name, parameter in inspect.signature(initialiser).parameters.items()
        if name not in ("self", *given)
    }
    model = create_model(f"{function.__name__}Arguments", __base__=Settings, **fields)
    return functools.partial(_checked_arguments, model)


def _checked_arguments(model: type[Settings], values: dict[str, Any]) -> dict[str, Any]:
    # Lists, as a configuration that was saved and loaded has them.
    return model.model_validate(values).model_dump(mode="json", exclude_unset=True)


def load_settings(cls: type[Settings], path: str | os.PathLike, overrides: Sequence[str] = ()) -> Any:
    """Reads a YAML file into the settings class `cls`.

    Args:
        cls: such as `training.encoder.EncoderConfig`.
        path: the file.
        overrides: "section.key=value" each, with the value in YAML, in place of the file's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML, or a setting is unknown, missing, of another type or out of range. One line names
            the file, each such key and what was expected.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected settings by name, got {_shortened(values)}")
    for override in overrides:
        _override(values, override)
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{path}: {'; '.join(_explained(entry) for entry in error.errors())}") from None


def default_run_folder(path: str | os.PathLike) -> Path:
    """runs/<name of a configuration>: of a file in a folder `configs` the whole path from there, joined by hyphens
    (configs/mini/encoder.yaml: runs/mini-encoder), of any other the stem."""
    parts = Path(path).with_suffix("").parts
    below = parts[len(parts) - parts[::-1].index("configs") :] if "configs" in parts[:-1] else parts[-1:]
    return Path("runs", "-".join(below))


def _override(values: dict[str, Any], override: str) -> None:
    """Put "section.key=value" into `values`."""
    name, separator, text = override.partition("=")
    keys = name.strip().split(".")
    if not separator or not all(keys):
        raise ValueError(f"{override!r} is not of the form KEY=VALUE or SECTION.KEY=VALUE")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"the value of {override!r} is not valid YAML") from None
    section = values
    for key in keys[:-1]:
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            raise ValueError(f"{override!r}: {key} is no section of the configuration")
    section[keys[-1]] = value


def _explained(error: dict[str, Any]) -> str:
    """One of pydantic's errors in words: "optimiser.learning_rate: expected …, got …"."""
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{name} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] in ("model_type", "dict_type"):
        message = "Input should be a section with settings of its own"
    message = message.replace("Input should be greater", "Input should be a number greater")
    message = message.replace("Input should be less", "Input should be a number less")
    message = message.replace("Input should be", "expected").replace("an instance of Sequence", "a list")
    if message.startswith("unknown setting") or not error["loc"]:
        return f"{name}: {message}" if name else message
    return f"{name}: {message}, got {_shortened(error['input'])}"


def _shortened(value: Any, length: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= length else text[: length - 1] + "…"
