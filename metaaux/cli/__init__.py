"""Command line: `python -m metaaux COMMAND`.

Results go to files and stdout, progress and errors to stderr. Exit codes: 0 done, 1 it failed, 2 wrong usage.
"""

from __future__ import annotations

import enum
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .benchmark import benchmark
from .compare_flip import compare_flip
from .convert import app as convert_app
from .evaluate import app as evaluate_app

# Heavy modules are imported inside the commands: `--help` and usage errors should not wait for PyTorch.

app = typer.Typer(
    name="metaaux",
    help="Meta-Auxiliary Network for 3D GAN Inversion: faces from photos, rendered from other sides.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(convert_app, name="convert")
app.command()(benchmark)
app.command("compare-flip")(compare_flip)

ModelOption = Annotated[
    str | None, typer.Option("--model", help="Hub id or folder of the model. Default: the embedded metaaux-mini.")
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="For example cuda, cuda:1 or cpu. Default: a GPU.")]
InversionArgument = Annotated[Path, typer.Argument(metavar="INVERSION", help="File written by invert.")]
EditOption = Annotated[
    list[str] | None,
    typer.Option("--edit", metavar="NAME=VALUE", help="Amount of a latent direction; may be repeated."),
]


class ViewPath(str, enum.Enum):
    """Ways of the camera of a video."""

    ellipse = "ellipse"
    swing = "swing"
    nod = "nod"


class Part(str, enum.Enum):
    """Parts that are trained one by one."""

    generator = "generator"
    encoder = "encoder"
    identity = "identity"
    auxiliary = "auxiliary"
    directions = "directions"


@app.command()
def invert(
    photos: Annotated[list[Path], typer.Argument(metavar="PHOTO...", help="One or more photos of one person.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the results; made if missing.")],
    model: ModelOption = None,
    steps: Annotated[int | None, typer.Option(min=0, help="Gradient steps. Default: the model's, usually 5.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json on stdout too.")] = False,
    flip: Annotated[
        bool | None,
        typer.Option("--flip/--no-flip", help="Flip loss for turned faces. Default: where the face is turned far."),
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Invert the face of a photo.

    Writes aligned.png, reconstruction.png, steps.png (input, encoder, step 0 ... N), inversion.safetensors and
    report.json into DIR. Several photos are taken as photos of one person; pictures and camera are the first one's.
    """
    from PIL import Image

    from ..cameras import pose_of_camera
    from ..export.images import label_strip

    inverter = _load(model, device)
    images: list[Image.Image] = []
    started = time.perf_counter()
    inversion = inverter.invert(
        photos, steps=steps, on_step=lambda step, image, losses: images.append(image), flip=flip
    )
    seconds = time.perf_counter() - started

    yaw, pitch = (float(angle) for angle in pose_of_camera(inversion.camera))
    report = {
        "model": inversion.model,
        "seconds": seconds,
        "camera": {"yaw": yaw, "pitch": pitch},
        "steps": inversion.steps,
    }
    aligned = Image.fromarray(inversion.aligned.permute(1, 2, 0).numpy())
    labels = ["input", "encoder", *(f"step {step}" for step in range(len(images) - 1))]
    out.mkdir(parents=True, exist_ok=True)
    _save_image(aligned, out / "aligned.png")
    _save_image(inverter.render(inversion), out / "reconstruction.png")
    _save_image(label_strip([aligned, *images], labels), out / "steps.png")
    inversion.save(out / "inversion.safetensors")
    _save_text(json.dumps(report, indent=2) + "\n", out / "report.json")
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print(f"{out}: mse {inversion.steps[-1]['mse']:.4f} after {len(images) - 2} steps, {seconds:.1f} s")


@app.command()
def render(
    inversion: InversionArgument,
    out: Annotated[Path, typer.Option("--out", metavar="PNG", help="Picture to write.")],
    yaw: Annotated[float | None, typer.Option(help="Degrees; above 0: nose to the right. Default: photo's.")] = None,
    pitch: Annotated[float | None, typer.Option(help="Degrees; above 0: nods down. Default: photo's.")] = None,
    edit: EditOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
) -> None:
    """Render an inverted head from any side."""
    _check_suffix(out, ".png")
    edits = _parse_edits(edit)
    inverter = _load(model, device)
    image = inverter.render(inverter.load_inversion(inversion), yaw=yaw, pitch=pitch, edits=edits)
    _save_image(image, out)


@app.command()
def orbit(
    inversion: InversionArgument,
    out: Annotated[Path, typer.Option("--out", metavar="MP4", help="Video to write (H.264).")],
    frames: Annotated[int, typer.Option(min=1, help="Views of the loop.")] = 60,
    fps: Annotated[int, typer.Option(min=1, max=120, help="Frames a second.")] = 30,
    yaw_range: Annotated[float, typer.Option(min=0, max=89, help="Degrees to either side.")] = 25.0,
    pitch_range: Annotated[float, typer.Option(min=0, max=89, help="Degrees up and down.")] = 10.0,
    path: Annotated[ViewPath, typer.Option(help="Way of the camera.")] = ViewPath.ellipse,
    edit: EditOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
) -> None:
    """Write a video of the camera circling an inverted head."""
    from ..export.video import write_video

    _check_suffix(out, ".mp4")
    edits = _parse_edits(edit)
    inverter = _load(model, device)
    head = inverter.prepare(inverter.load_inversion(inversion), edits)
    views = inverter.orbit(head, frames, yaw_range=yaw_range, pitch_range=pitch_range, path=path.value)
    write_video(views, out, fps=fps)


@app.command()
def mesh(
    inversion: InversionArgument,
    out: Annotated[Path, typer.Option("--out", metavar="GLB", help="Binary glTF file to write.")],
    resolution: Annotated[int, typer.Option(min=16, max=512, help="Cells along each side of the cube.")] = 192,
    edit: EditOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
) -> None:
    """Write an inverted head as a closed, coloured mesh."""
    from tqdm.auto import tqdm

    _check_suffix(out, ".glb")
    edits = _parse_edits(edit)
    inverter = _load(model, device)
    loaded = inverter.load_inversion(inversion)
    with tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}") as bar:
        result = inverter.export_mesh(
            loaded, out, resolution, edits, progress=lambda share: bar.update(round(100 * share) - bar.n)
        )
    print(f"{out}: {len(result.vertices)} vertices, {len(result.faces)} faces")


@app.command()
def model_info(
    model: Annotated[str | None, typer.Argument(metavar="ID", help="Hub id or folder. Default: metaaux-mini.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a model's networks, their sizes and its settings."""
    info = _model_info(_load(model, "cpu"))
    if as_json:
        print(json.dumps(info, indent=2))
        return
    print(f"model        {info['model']}\nfingerprint  {info['fingerprint']}")
    print(f"licence      {info['licence']}")
    rays = "" if info["neural_resolution"] is None else f", rays {info['neural_resolution']}"
    print(f"images       {info['image_size']} pixels{rays}, w {info['w_dim']}")
    for name, part in info["components"].items():
        size = f"{part['parameters'] / 1e6:9.3f} M parameters {part['bytes'] / 1e6:9.2f} MB"
        print(f"{name:<18} {part['class']:<19} {size}")
    print(f"{'in all':<38} {info['parameters'] / 1e6:9.3f} M parameters {info['bytes'] / 1e6:9.2f} MB")
    if info["directions"]:
        print(f"directions   {', '.join(info['directions'])}")
    for name, value in info["settings"].items():
        print(f"{name:<24} {value}")


@app.command()
def train(
    part: Annotated[Part, typer.Argument(help="What to train.")],
    config: Annotated[Path, typer.Option("--config", metavar="FILE", help="YAML, see metaaux/configs.")],
    run: Annotated[
        Path | None,
        typer.Option("--run", metavar="FOLDER", help="Checkpoints and logs. Default: runs/<name of FILE>."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
) -> None:
    """Train one part. Under `accelerate launch -m metaaux train ...` it uses several GPUs."""
    import importlib

    module = importlib.import_module(f"metaaux.training.{part.value}")
    settings = _read_config(getattr(module, f"{part.value.capitalize()}Config"), config)
    module.train(settings, Path("runs") / config.stem if run is None else run, resume)


@app.command()
def prepare(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of photos, searched recursively.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.zip", help="Dataset to write, in EG3D's layout.")],
    size: Annotated[int, typer.Option(min=16, help="Side of the crops, pixels.")] = 128,
    crop_scale: Annotated[float, typer.Option(help="Size of faces in the crops; EG3D's FFHQ has about 0.93.")] = 1.0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one a core.")] = None,
) -> None:
    """Align a folder of photos into a dataset. Photos without a usable face are left out and listed on stderr."""
    from tqdm.auto import tqdm

    from ..data.prepare import prepare as prepare_folder

    _check_suffix(out, ".zip")
    with tqdm(unit="photo") as bar:

        def on_photo(finished: int, photos: int) -> None:
            bar.total = photos
            bar.update(finished - bar.n)

        report = prepare_folder(folder, out, size=size, crop_scale=crop_scale, workers=workers, on_photo=on_photo)
    for photo in report.skipped:
        print(f"left out {photo.name}: {photo.message}", file=sys.stderr)
    print(f"{out}: {report.photos - len(report.skipped)} of {report.photos} photos")


def main() -> None:
    """Runs the command line; expected failures end in one line on stderr and exit code 1."""
    try:
        app()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"Error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


def _load(model: str | None, device: str | None) -> Any:
    import torch

    from ..pipeline import MetaAuxInverter

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return MetaAuxInverter.from_pretrained(model).to(device)


def _read_config(cls: type, path: Path) -> Any:
    import yaml

    from ..training.settings import load_config

    try:
        return load_config(cls, path)
    except (TypeError, yaml.YAMLError) as error:  # a missing setting, or no YAML
        raise ValueError(f"{path} is not a valid configuration: {error}") from None


def _model_info(inverter: Any) -> dict[str, Any]:
    from ..hub.card import licence_of

    config = inverter.generator.config
    components = {
        name: {
            "class": type(part).__name__,
            "parameters": sum(p.numel() for p in part.parameters()),
            "bytes": sum(t.numel() * t.element_size() for t in part.state_dict().values()),
        }
        for name, part in sorted(inverter.components.items())
        if part is not None
    }
    return {
        "model": inverter.name_or_path,
        "licence": licence_of(inverter.card),
        "fingerprint": inverter.fingerprint,
        "image_size": config.image_size,
        "neural_resolution": getattr(config, "neural_resolution", None),
        "w_dim": config.w_dim,
        "components": components,
        "parameters": sum(part["parameters"] for part in components.values()),
        "bytes": sum(part["bytes"] for part in components.values()),
        "directions": list(inverter.directions),
        "settings": inverter.parameters,
    }


def _parse_edits(edits: list[str] | None) -> dict[str, float] | None:
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


def _check_suffix(path: Path, suffix: str) -> None:
    if path.suffix.lower() != suffix:
        raise typer.BadParameter(f"{path} must end in {suffix}")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"the folder {path.parent} does not exist")


def _save_image(image: Any, path: Path) -> None:
    from ..files import atomic_path

    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def _save_text(text: str, path: Path) -> None:
    from ..files import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
