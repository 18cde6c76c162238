"""The command `evaluate` and its sub-commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Measure: inversion methods on photos; `generator`: the generator; `editing`: edits after inversion.",
    invoke_without_command=True,
    rich_markup_mode=None,
)

DEFAULT_METHODS = "metaaux,metaaux-0,encoder,pti"

ModelOption = Annotated[
    str | None, typer.Option("--model", help="Hub id or folder of the model. Default: the embedded metaaux-mini.")
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="For example cuda, cuda:1 or cpu. Default: a GPU.")]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="ZIP_OR_FOLDER", help="EG3D data set, whose crops are taken as they are, or photos to align."
    ),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Folder for the results; an interrupted run goes on there.")
]
MethodsOption = Annotated[
    str,
    typer.Option(
        help="Separated by commas: metaaux (or full), metaaux-N (with N steps; 0: before any), encoder, w, w+, pti, "
        "without_auxiliary; and, each with its folder's option, psp, styletransformer, hyperinverter, without_meta, "
        "without_2d, without_3d."
    ),
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Only the first so many photos.")]
StepsOption = Annotated[
    int | None, typer.Option(min=0, help="Gradient steps of adapted methods. Default: the model's, usually 5.")
]
ShardOption = Annotated[
    str, typer.Option(metavar="I/N", help="Do part I of N, so that N processes share the photos; same --out.")
]
PspOption = Annotated[Path | None, typer.Option("--psp", metavar="FOLDER", help="W+ encoder.")]
StyleTransformerOption = Annotated[
    Path | None, typer.Option("--styletransformer", metavar="FOLDER", help="W+ encoder.")
]
HyperInverterOption = Annotated[
    Path | None, typer.Option("--hyperinverter", metavar="FOLDER", help="Auxiliary network to use without adaptation.")
]
WithoutMetaOption = Annotated[
    Path | None, typer.Option("--without-meta", metavar="FOLDER", help="Auxiliary network of the plain phase.")
]
Without2dOption = Annotated[
    Path | None, typer.Option("--without-2d", metavar="FOLDER", help="Auxiliary network without the 2D module.")
]
Without3dOption = Annotated[
    Path | None, typer.Option("--without-3d", metavar="FOLDER", help="Auxiliary network without the 3D module.")
]
LatentStepsOption = Annotated[int, typer.Option(min=1, help="Steps of w, w+ and PTI's pivot.")]
TuningStepsOption = Annotated[int, typer.Option(min=0, help="The most steps of PTI's tuning.")]
PtiStopOption = Annotated[
    float,
    typer.Option(
        min=0, help="PTI ends tuning at this share of the perceptual distance to the average face; 0: never."
    ),
]
GeneratorRateOption = Annotated[float, typer.Option(min=0, help="Adam's rate in without_auxiliary.")]


@app.callback()
def evaluate(
    context: typer.Context,
    data: DataOption = None,
    out: OutOption = None,
    methods: MethodsOption = DEFAULT_METHODS,
    limit: LimitOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    steps: StepsOption = None,
    batch: Annotated[int, typer.Option(min=1, help="Photos side by side, for methods that gain by it.")] = 1,
    timed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="The first so many photos are inverted alone and timed. Default: all, with a batch above 1: 8. Give "
            "0 while other processes, such as other shards, use the device.",
        ),
    ] = None,
    shard: ShardOption = "1/1",
    perceptual: Annotated[
        str | None,
        typer.Option(
            metavar="FILE_OR_ID",
            help="Perceptual metric: safetensors file of SqueezeNet 1.1 features, or folder or Hub id of an LPIPS "
            "network. Default: the model's.",
        ),
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Network of the Fréchet distance: SqueezeNet 1.1 features (.safetensors) or a TorchScript network "
            "(.pt), such as NVIDIA's Inception for FID. Default: not measured.",
        ),
    ] = None,
    pose: Annotated[bool, typer.Option("--pose", help="Detect the poses of turned heads too (MediaPipe).")] = False,
    psp: PspOption = None,
    styletransformer: StyleTransformerOption = None,
    hyperinverter: HyperInverterOption = None,
    without_meta: WithoutMetaOption = None,
    without_2d: Without2dOption = None,
    without_3d: Without3dOption = None,
    latent_steps: LatentStepsOption = 450,
    tuning_steps: TuningStepsOption = 350,
    pti_stop: PtiStopOption = 0.05,
    generator_rate: GeneratorRateOption = 1e-3,
) -> None:
    """Invert photos with several methods and compare.

    Writes results.json, table.md, comparison.png, every reconstruction and every photo's figures into DIR.
    """
    if context.invoked_subcommand is not None:
        return
    data, out = _required(data, "--data"), _required(out, "--out")
    from ..evaluation.frechet import load_feature_extractor
    from ..evaluation.metrics import ReconstructionMetrics
    from ..evaluation.reconstruction import ReconstructionEvaluation

    part = _shard(shard)
    inverter, chosen, photos = _setup(
        data, methods, limit, model, device,
        dict(steps=steps, psp=psp, styletransformer=styletransformer, hyperinverter=hyperinverter,
             without_meta=without_meta, without_2d=without_2d, without_3d=without_3d, tuning_steps=tuning_steps,
             pti_stop_share=pti_stop or None, generator_rate=generator_rate),
        latent_steps,
    )  # fmt: skip
    evaluation = ReconstructionEvaluation(
        inverter, chosen, photos, ReconstructionMetrics(inverter, perceptual), out,
        features=None if features is None else load_feature_extractor(features, inverter.device),
        batch=batch, timed_photos=timed, shard=part, pose=pose,
    )  # fmt: skip
    _run(evaluation, out)


@app.command()
def generator(
    out: OutOption = None,
    samples: Annotated[int, typer.Option(min=2, help="Random heads.")] = 500,
    pose_samples: Annotated[int, typer.Option(min=1, help="Heads whose poses are detected again.")] = 200,
    truncation: Annotated[float, typer.Option(help="Truncation of these heads.")] = 0.7,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="ZIP", help="EG3D data set for the Fréchet distance.")
    ] = None,
    features: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Network for it, as `evaluate --features`.")
    ] = None,
    frechet_samples: Annotated[
        int | None, typer.Option(min=2, help="Images for it. Default: as many as the data set has.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Heads a pass.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the random heads.")] = 0,
    model: ModelOption = None,
    device: DeviceOption = None,
) -> None:
    """Measure the generator: realism, geometry, pose, consistency between views.

    Writes results.json and samples.png, a sheet of random heads, into DIR.
    """
    from ..evaluation.frechet import load_feature_extractor
    from ..evaluation.generator import GeneratorSettings, evaluate_generator

    out = _required(out, "--out")
    settings = GeneratorSettings(samples, pose_samples, truncation, frechet_samples, batch, seed)
    inverter = _load(model, device)
    network = None if features is None else load_feature_extractor(features, inverter.device)
    results = evaluate_generator(inverter, out, settings, data, network)
    for name, value in results.items():
        if isinstance(value, float) or value is None:
            print(f"{name:<28} {'–' if value is None else format(value, '.4f')}")


@app.command()
def editing(
    data: DataOption = None,
    attributes: Annotated[
        Path | None,
        typer.Option(metavar="SAFETENSORS", help="Weights of face-api.js' age and gender network."),
    ] = None,
    out: OutOption = None,
    methods: MethodsOption = "metaaux,encoder",
    measures: Annotated[
        str, typer.Option(help="Further directions, measured by landmarks (MediaPipe), such as smile; by commas.")
    ] = "",
    limit: LimitOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    steps: StepsOption = None,
    shard: ShardOption = "1/1",
    psp: PspOption = None,
    styletransformer: StyleTransformerOption = None,
    hyperinverter: HyperInverterOption = None,
    without_meta: WithoutMetaOption = None,
    without_2d: Without2dOption = None,
    without_3d: Without3dOption = None,
    latent_steps: LatentStepsOption = 450,
    tuning_steps: TuningStepsOption = 350,
    pti_stop: PtiStopOption = 0.05,
    generator_rate: GeneratorRateOption = 1e-3,
) -> None:
    """Measure how much the same edits of age and gender change photos after different inversions.

    Writes results.json, table.md and every photo's figures into DIR.
    """
    data, out = _required(data, "--data"), _required(out, "--out")
    attributes = _required(attributes, "--attributes")
    from ..evaluation.editing import EditingEvaluation
    from ..models.age_gender import AgeGenderNetwork

    part = _shard(shard)
    network = AgeGenderNetwork.from_file(attributes)
    inverter, chosen, photos = _setup(
        data, methods, limit, model, device,
        dict(steps=steps, psp=psp, styletransformer=styletransformer, hyperinverter=hyperinverter,
             without_meta=without_meta, without_2d=without_2d, without_3d=without_3d, tuning_steps=tuning_steps,
             pti_stop_share=pti_stop or None, generator_rate=generator_rate),
        latent_steps,
    )  # fmt: skip
    measured = [name.strip() for name in measures.split(",") if name.strip()]
    _run(EditingEvaluation(inverter, chosen, photos, network, out, measures=measured, shard=part), out)


def _setup(
    data: Path, methods: str, limit: int | None, model: str | None, device: str | None, options: dict[str, Any],
    latent_steps: int,
) -> tuple[Any, list[Any], Any]:  # fmt: skip
    """Pipeline, methods and photos."""
    from ..baselines.optimization import LatentSettings
    from ..baselines.registry import MethodOptions, make_methods
    from ..evaluation.photos import open_photos

    inverter = _load(model, device)
    names = [name.strip() for name in methods.split(",") if name.strip()]
    chosen = make_methods(names, inverter, MethodOptions(latent=LatentSettings(steps=latent_steps), **options))
    photos = open_photos(data, inverter.generator.config.image_size, lambda: inverter.aligner, limit)
    return inverter, chosen, photos


def _run(evaluation: Any, out: Path) -> None:
    try:
        evaluation.run()
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on where it was, {out} has the figures so far", file=sys.stderr)
        evaluation.summarize()
        raise typer.Exit(130) from None
    evaluation.summarize()
    print((out / "table.md").read_text(encoding="utf-8"), end="")


def _load(model: str | None, device: str | None) -> Any:
    from . import _load as load

    inverter = load(model, device)
    inverter.set_progress_bar_config(disable=True)
    return inverter


def _required(value: Path | None, option: str) -> Path:
    if value is None:
        raise typer.BadParameter("it is required", param_hint=option)
    return value


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise typer.BadParameter(f"{text!r} is not of the form I/N with 1 <= I <= N", param_hint="--shard")
    return int(number), int(count)
