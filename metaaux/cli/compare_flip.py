"""Command line: `python -m metaaux compare-flip`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def compare_flip(
    photos: Annotated[
        list[Path], typer.Argument(metavar="PHOTO...", help="Photos, or EG3D data sets (zip or folder).")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the results; made if missing.")],
    most: Annotated[int, typer.Option("--most-turned", min=1, help="Faces of each data set: the most turned.")] = 8,
    pictures: Annotated[int, typer.Option(min=1, help="Faces in the comparison picture, the first so many.")] = 8,
    steps: Annotated[int | None, typer.Option(min=0, help="Gradient steps. Default: the model's.")] = None,
    features: Annotated[
        Path | None,
        typer.Option(metavar="SAFETENSORS", help="SqueezeNet 1.1 for the distances. Default: the model's own."),
    ] = None,
    edit: Annotated[
        list[str] | None, typer.Option("--edit", metavar="NAME=VALUE", help="Edit to show; may be repeated.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Hub id or folder. Default: metaaux-mini.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="For example cuda or cpu. Default: a GPU.")] = None,
) -> None:
    """Invert turned faces without and with the flip loss (Eq. 12), each photo on its own.

    Writes comparison.png (as the paper's Fig. 6) and results.json into DIR.
    """
    from tqdm.auto import tqdm

    from ..evaluation.flip import compare_flip as compare
    from ..evaluation.flip import faces_of, flip_picture, flip_results
    from ..models.perceptual import LPIPS
    from . import _load, _parse_edits, _save_image, _save_text

    edits = _parse_edits(edit)
    inverter = _load(model, device)
    inverter.set_progress_bar_config(disable=True)
    perceptual = None if features is None else LPIPS.from_features_file(features).to(inverter.device)
    faces = faces_of(photos, inverter.generator.config.image_size, most)
    with tqdm(total=len(faces), unit="face") as bar:
        comparisons = compare(inverter, faces, steps, edits, perceptual, progress=lambda comparison: bar.update())
    results = flip_results(comparisons)
    results["model"], results["perceptual"] = inverter.name_or_path, features.name if features else "own"
    out.mkdir(parents=True, exist_ok=True)
    _save_image(flip_picture(comparisons[:pictures]), out / "comparison.png")
    _save_text(json.dumps(results, indent=2) + "\n", out / "results.json")
    change = results["change"]
    print(f"{out}: mirrored perceptual distance {change['mirrored_perceptual']:+.1%}, mse {change['mse']:+.1%}")
