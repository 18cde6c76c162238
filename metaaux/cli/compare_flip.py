"""`python -m metaaux compare-flip PHOTO… --out DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    DeviceOption,
    EditOption,
    FolderOption,
    ModelOption,
    PrecisionOption,
    StepsOption,
    check_folder,
    echo,
    load_inverter,
    parse_edits,
)


def compare_flip(
    photos: Annotated[
        list[Path], typer.Argument(metavar="PHOTO...", help="Photos, or EG3D data sets (zip or folder).")
    ],
    out: FolderOption,
    most: Annotated[int, typer.Option("--most-turned", min=1, help="Faces of each data set: the most turned.")] = 8,
    pictures: Annotated[int, typer.Option(min=1, help="Faces in the comparison picture, the first so many.")] = 8,
    steps: StepsOption = None,
    features: Annotated[
        Path | None,
        typer.Option(metavar="SAFETENSORS", help="SqueezeNet 1.1 for the distances. Default: the model's own."),
    ] = None,
    edit: EditOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
) -> None:
    """Invert turned faces without and with the flip loss (Eq. 12), each photo on its own.

    Writes comparison.png (as the paper's Fig. 6) and results.json into DIR. `--edit` edits its mirrored views.
    """
    from tqdm.auto import tqdm

    from ..evaluation.flip import compare_flip as compare
    from ..evaluation.flip import faces_of, flip_picture, flip_results
    from ..export.images import save_image
    from ..files import write_json
    from ..models.perceptual import LPIPS

    edits = parse_edits(edit)
    check_folder(out)
    inverter = load_inverter(model, device, precision, progress=False)
    perceptual = None if features is None else LPIPS.from_features_file(features).to(inverter.device)
    faces = faces_of(photos, inverter.generator.config.image_size, most)
    with tqdm(total=len(faces), unit="face") as bar:
        comparisons = compare(inverter, faces, steps, edits, perceptual, progress=lambda comparison: bar.update())
    results = flip_results(comparisons)
    results["model"], results["perceptual"] = inverter.name_or_path, features.name if features else "own"
    save_image(flip_picture(comparisons[:pictures]), out / "comparison.png")
    write_json(results, out / "results.json")
    change = results["change"]
    echo(f"{out}: mirrored perceptual distance {change['mirrored_perceptual']:+.1%}, mse {change['mse']:+.1%}")
