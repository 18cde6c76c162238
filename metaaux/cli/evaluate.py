"""`python -m metaaux evaluate`, `evaluate generator`, `evaluate editing` and `evaluate mesh`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    ComparisonOptions,
    DeviceOption,
    FolderOption,
    InversionArgument,
    ModelOption,
    check_folder,
    echo,
    load_inverter,
    required,
    split_names,
    with_options,
)

if TYPE_CHECKING:
    from ..evaluation.editing import EditingEvaluation
    from ..evaluation.processes import EvaluationProcesses
    from ..evaluation.reconstruction import ReconstructionEvaluation

app = typer.Typer(
    help="Measure: inversion methods on photos; `generator`: the generator; `editing`: edits after inversion; `mesh`: "
    "a textured mesh.",
    invoke_without_command=True,
    rich_markup_mode=None,
)


@app.callback()
@with_options(ComparisonOptions)
def evaluate(
    context: typer.Context,
    options: ComparisonOptions,
    batch: Annotated[int, typer.Option(min=1, help="Photos side by side, for methods that gain by it.")] = 1,
    timed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="The first so many photos are inverted alone and timed. Default: all, with a batch above 1: 8. Give "
            "0 while other processes, such as other shards, use the device.",
        ),
    ] = None,
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
) -> None:
    """Invert photos with several methods and compare. Under `accelerate launch -m metaaux evaluate ...` several GPUs
    share the photos.

    Writes results.json, table.md, comparison.png, every reconstruction and every photo's figures into DIR.
    """
    if context.invoked_subcommand is not None:
        return
    options.check()
    from ..evaluation.frechet import load_feature_extractor
    from ..evaluation.metrics import ReconstructionMetrics
    from ..evaluation.processes import EvaluationProcesses
    from ..evaluation.reconstruction import ReconstructionEvaluation

    processes = EvaluationProcesses(options.out)
    inverter, methods, photos = options.load(processes.device)
    evaluation = ReconstructionEvaluation(
        inverter,
        methods,
        photos,
        ReconstructionMetrics(inverter, perceptual),
        options.out,
        features=None if features is None else load_feature_extractor(features, inverter.device),
        batch=batch,
        timed_photos=timed,
        shard=processes.shard(options.part()),
        pose=pose,
        progress=processes.is_main,
    )
    _run(evaluation, processes, options.out)


@app.command()
def generator(
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for the results. Required.")] = None,
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
    out = required(out, "--out")
    check_folder(out)
    from ..evaluation.frechet import load_feature_extractor
    from ..evaluation.generator import GeneratorSettings, evaluate_generator

    settings = GeneratorSettings(samples, pose_samples, truncation, frechet_samples, batch, seed)
    inverter = load_inverter(model, device, progress=False)
    network = None if features is None else load_feature_extractor(features, inverter.device)
    results = evaluate_generator(inverter, out, settings, data, network)
    for name, value in results.items():
        if isinstance(value, float) or value is None:
            echo(f"{name:<28} {'–' if value is None else format(value, '.4f')}")


@app.command()
def mesh(
    inversion: InversionArgument,
    out: FolderOption,
    resolution: Annotated[int, typer.Option(min=16, max=512, help="Cells along each side of the cube.")] = 192,
    texture: Annotated[int, typer.Option(min=64, max=2048, help="Side of the texture in texels.")] = 1024,
    model: ModelOption = None,
    device: DeviceOption = None,
) -> None:
    """Measure how much less a textured mesh differs from the photo's own view than one with vertex colours.

    Writes results.json and mesh.jpg, both meshes from three sides, into DIR.
    """
    check_folder(out)
    from tqdm.auto import tqdm

    from ..evaluation.mesh import evaluate_mesh

    inverter = load_inverter(model, device)
    loaded = inverter.load_inversion(inversion)
    out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}") as bar:
        results = evaluate_mesh(
            inverter, loaded, out, resolution, texture, lambda share: bar.update(round(100 * share) - bar.n)
        )
    for name, value in results.items():
        echo(f"{name:<15} {format(value, '.4f') if isinstance(value, float) else value}")


@app.command()
@with_options(ComparisonOptions, methods="metaaux,encoder")
def editing(
    options: ComparisonOptions,
    attributes: Annotated[
        Path | None,
        typer.Option(metavar="SAFETENSORS", help="Weights of face-api.js' age and gender network. Required."),
    ] = None,
    measures: Annotated[
        str, typer.Option(help="Further directions, measured by landmarks (MediaPipe), such as smile; by commas.")
    ] = "",
) -> None:
    """Measure how much the same edits of age and gender change photos after different inversions.

    Writes results.json, table.md and every photo's figures into DIR.
    """
    options.check()
    attributes = required(attributes, "--attributes")
    from ..evaluation.editing import EditingEvaluation
    from ..evaluation.processes import EvaluationProcesses
    from ..models.age_gender import AgeGenderNetwork

    network = AgeGenderNetwork.from_file(attributes)
    processes = EvaluationProcesses(options.out)
    inverter, methods, photos = options.load(processes.device)
    evaluation = EditingEvaluation(
        inverter,
        methods,
        photos,
        network,
        options.out,
        measures=split_names(measures),
        shard=processes.shard(options.part()),
        progress=processes.is_main,
    )
    _run(evaluation, processes, options.out)


def _run(evaluation: ReconstructionEvaluation | EditingEvaluation, processes: EvaluationProcesses, out: Path) -> None:
    try:
        evaluation.run()
        processes.wait()
    except KeyboardInterrupt:
        echo(f"stopped; the same command goes on where it was, {out} has the figures so far", error=True)
        evaluation.summarize()
        raise typer.Exit(130) from None
    if not processes.is_main:
        return
    evaluation.summarize()
    echo((out / "table.md").read_text(encoding="utf-8").rstrip("\n"))
