"""`python -m metaaux invert PHOTO… --out DIR`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    DeviceOption,
    FolderOption,
    JsonOption,
    ModelOption,
    PrecisionOption,
    StepsOption,
    check_folder,
    echo,
    echo_json,
    load_inverter,
)

if TYPE_CHECKING:
    from ..inversion import Inversion


def invert(
    photos: Annotated[list[Path], typer.Argument(metavar="PHOTO...", help="One or more photos of one person.")],
    out: FolderOption,
    model: ModelOption = None,
    steps: StepsOption = None,
    as_json: JsonOption = False,
    flip: Annotated[
        bool | None,
        typer.Option("--flip/--no-flip", help="Flip loss for turned faces. Default: where the face is turned far."),
    ] = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
) -> None:
    """Invert the face of a photo.

    Writes aligned.png, reconstruction.png, steps.png (input, encoder, step 0 ... N), inversion.safetensors and
    report.json into DIR. Several photos are taken as photos of one person; pictures and camera are the first one's.
    """
    from PIL import Image

    from ..export.images import label_strip, save_image
    from ..files import write_json

    check_folder(out)
    inverter = load_inverter(model, device, precision)
    images: list[Image.Image] = []
    started = time.perf_counter()
    inversion = inverter.invert(
        photos, steps=steps, on_step=lambda step, image, losses: images.append(image), flip=flip
    )
    seconds = time.perf_counter() - started

    aligned = Image.fromarray(inversion.aligned.permute(1, 2, 0).numpy())
    labels = ["input", "encoder", *(f"step {step}" for step in range(len(images) - 1))]
    report = _report(inversion, seconds)
    out.mkdir(parents=True, exist_ok=True)
    save_image(aligned, out / "aligned.png")
    save_image(inverter.render(inversion), out / "reconstruction.png")
    save_image(label_strip([aligned, *images], labels), out / "steps.png")
    inversion.save(out / "inversion.safetensors")
    write_json(report, out / "report.json")
    if as_json:
        echo_json(report)
    else:
        echo(f"{out}: mse {inversion.steps[-1]['mse']:.4f} after {len(images) - 2} steps, {seconds:.1f} s")


def _report(inversion: Inversion, seconds: float) -> dict[str, Any]:
    """`report.json`."""
    from ..cameras import pose_of_camera

    yaw, pitch = (float(angle) for angle in pose_of_camera(inversion.camera))
    return {
        "model": inversion.model,
        "seconds": seconds,
        "camera": {"yaw": yaw, "pitch": pitch},
        "steps": inversion.steps,
    }
