"""`python -m metaaux convert KIND SOURCE FOLDER`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from .options import check_file, check_folder, echo

app = typer.Typer(
    name="convert",
    help="Convert foreign checkpoints to configurations and safetensors. No code of a file is ever run.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def _checked(folder: Path) -> Path:
    check_folder(folder, "FOLDER")
    return folder


FolderArgument = Annotated[
    Path, typer.Argument(metavar="FOLDER", callback=_checked, help="Folder of the pipeline; made if missing.")
]


def _checked_file(file: Path) -> Path:
    check_file(file, ".safetensors", option="FILE")
    return file


FileArgument = Annotated[
    Path, typer.Argument(metavar="FILE", callback=_checked_file, help="What is written, a .safetensors file.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace networks that are there already.")]


@app.command()
def eg3d(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Official EG3D pickle (.pkl).")],
    folder: FolderArgument,
    overwrite: OverwriteOption = False,
) -> None:
    """EG3D's G_ema and D to FOLDER/generator and FOLDER/discriminator."""
    from ..conversion.eg3d import convert_eg3d

    echo(str(_with_progress(lambda report: convert_eg3d(source, folder, overwrite, report))))


@app.command()
def stylegan2(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="NVIDIA's pickle (.pkl) or rosinality's checkpoint (.pt).")
    ],
    folder: FolderArgument,
    overwrite: OverwriteOption = False,
) -> None:
    """StyleGAN2's generator to FOLDER/generator, and its discriminator, where the file has one."""
    from ..conversion.stylegan2 import convert_stylegan2

    echo(str(_with_progress(lambda report: convert_stylegan2(source, folder, overwrite, report))))


@app.command()
def lpips(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="torchvision's weights of VGG-16, AlexNet or SqueezeNet 1.1.")
    ],
    folder: FolderArgument,
    linear: Annotated[
        Path | None, typer.Option("--linear", metavar="FILE", help="LPIPS' linear layers for these weights.")
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """LPIPS to FOLDER/perceptual; without --linear, its uncalibrated baseline."""
    from ..conversion.lpips import convert_lpips

    echo(str(convert_lpips(source, folder, linear, overwrite)))


@app.command()
def arcface(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="State dictionary model_ir_se50.pth.")],
    folder: FolderArgument,
    overwrite: OverwriteOption = False,
) -> None:
    """ArcFace's IR-SE50 to FOLDER/identity."""
    from ..conversion.arcface import convert_arcface

    echo(str(convert_arcface(source, folder, overwrite)))


@app.command()
def recogniser(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="dlib_face_recognition_resnet_model_v1.dat, or safetensors.")
    ],
    folder: FolderArgument,
    overwrite: OverwriteOption = False,
) -> None:
    """dlib's face recogniser to FOLDER/identity."""
    from ..conversion.recogniser import convert_recogniser

    echo(str(convert_recogniser(source, folder, overwrite)))


@app.command()
def squeezenet(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="torchvision's squeezenet1_1, or the original Caffe model's weights."),
    ],
    file: FileArgument,
    overwrite: OverwriteOption = False,
) -> None:
    """SqueezeNet 1.1's features, which take images as they are: for --perceptual, --features and generators."""
    from ..conversion.squeezenet import convert_squeezenet

    echo(str(convert_squeezenet(source, file, overwrite)))


@app.command()
def age_gender(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="face-api.js' age_gender_model-weights_manifest.json.")
    ],
    file: FileArgument,
    overwrite: OverwriteOption = False,
) -> None:
    """face-api.js' age and gender network: for directions and `evaluate editing`."""
    from ..conversion.age_gender import convert_age_gender

    echo(str(convert_age_gender(source, file, overwrite)))


def _with_progress(convert: Callable[[Callable[[int, int], None]], object]) -> object:
    from tqdm.auto import tqdm

    with tqdm(unit="B", unit_scale=True, desc="reading") as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return convert(report)
