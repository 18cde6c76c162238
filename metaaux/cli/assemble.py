"""`python -m metaaux assemble OUT --generator DIR …`."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import DeviceOption, check_folder, echo, with_options

if TYPE_CHECKING:
    from ..pipeline import MetaAuxInverter

#: Name of each part in a pipeline, by its option's.
PARTS = {"directions": "latent_directions"}


def _part(what: str) -> Any:
    return typer.Option(metavar="DIR", help=f"{what} Default, with --overwrite: the one that OUT has.")


GainsOption = Annotated[
    Path | None,
    typer.Option(metavar="ZIP_OR_FOLDER", help="Photos on which the directions' gains are measured."),
]
AttributesOption = Annotated[
    Path | None,
    typer.Option(metavar="SAFETENSORS", help="Age and gender network (convert age-gender), which --gains needs."),
]


@dataclass
class PartOptions:
    """Folders of the networks that become a pipeline's."""

    generator: Annotated[Path | None, _part("The generator, converted or trained.")] = None
    encoder: Annotated[Path | None, _part("The encoder.")] = None
    auxiliary: Annotated[Path | None, _part("The auxiliary network, of a run its auxiliary_average.")] = None
    discriminator: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The discriminator. Default: `discriminator` beside the generator's folder."),
    ] = None
    identity: Annotated[Path | None, _part("The identity network.")] = None
    perceptual: Annotated[
        Path | None, _part("The perceptual network, if the inner loop was trained with one: its folder or file.")
    ] = None
    directions: Annotated[Path | None, _part("The latent directions, if there are any.")] = None

    def find(self, earlier: Path | None) -> dict[str, Path]:
        """Folder of each part by its name in the pipeline.

        Args:
            earlier: a pipeline's folder whose parts stand in for those that are not given.

        Raises:
            typer.BadParameter: a part that a pipeline must have is neither given nor there.
        """
        from ..training.loading import find_folder

        given = {PARTS.get(f.name, f.name): getattr(self, f.name) for f in fields(self)}
        if self.discriminator is None and self.generator is not None:
            beside = find_folder(self.generator).parent / "discriminator"
            given["discriminator"] = beside if beside.is_dir() else None
        found = {}
        for name, folder in given.items():
            if folder is not None:
                found[name] = find_folder(folder)
            elif earlier is not None and (earlier / name).is_dir():
                found[name] = earlier / name
            elif name not in ("perceptual", "latent_directions"):
                raise typer.BadParameter("it is required", param_hint=f"--{name}")
        return found


@with_options(PartOptions)
def assemble(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the pipeline.")],
    options: PartOptions,
    results: Annotated[
        list[Path] | None,
        typer.Option(metavar="JSON", help="results.json of evaluate, or benchmark's file, for the model card."),
    ] = None,
    gains: GainsOption = None,
    attributes: AttributesOption = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many photos of --gains.")] = 100,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Setting of MetaAuxInverter, for example crop_scale=0.93 (EG3D's FFHQ) or flip_yaw=null; may be "
            "repeated. The loss's weights are those that the auxiliary network was trained with.",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Precision of the weights: fp32, fp16 or bf16.")] = "fp32",
    variant: Annotated[
        list[str] | None, typer.Option(help="Write the weights as this variant too: fp16 or bf16; may be repeated.")
    ] = None,
    repo: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="What the card calls the model, if it has a name already.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Licence of the weights, as the Hub names it.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    device: DeviceOption = None,
) -> None:
    """Put trained and converted networks together to a pipeline that from_pretrained loads.

    Checks that they fit each other before anything is written; OUT is whole or as it was.
    """
    check_folder(out, "OUT")
    earlier = _earlier(out, overwrite)
    if gains is not None and attributes is None:
        raise typer.BadParameter("--gains needs it", param_hint="--attributes")
    from ..files import atomic_folder
    from ..hub.layout import read_json
    from ..models.weights import weight_dtype

    precision = None if dtype == "fp32" else weight_dtype(dtype)
    precisions = {None: precision, **dict.fromkeys(_known_variants(variant))}
    measured = {path: read_json(path) for path in results or ()}
    inverter = _pipeline(options.find(earlier), earlier, settings or ())
    _check_results(measured, inverter.fingerprint)
    if gains is not None:
        _measure_gains(inverter, gains, attributes, limit, device)
    _write_card(inverter, repo or out.name, repo, license, list(measured.values()))
    try:
        with atomic_folder(out, overwrite) as folder:
            for name, precision in precisions.items():
                inverter.save_pretrained(folder, variant=name, dtype=precision)
            _keep_documents(earlier, folder)
    except OverflowError as error:
        raise ValueError(str(error)) from None
    echo(f"{out}: fingerprint {inverter.fingerprint}")


def _known_variants(names: list[str] | None) -> list[str]:
    if unknown := [name for name in names or () if name not in ("fp16", "bf16")]:
        raise typer.BadParameter(f"it is fp16 or bf16, not {unknown[0]!r}", param_hint="--variant")
    return names or []


def _earlier(out: Path, overwrite: bool) -> Path | None:
    """The pipeline's folder that OUT is, to be replaced; `None` where there is none.

    Raises:
        FileExistsError: it is there and `overwrite` is off, or it holds something else.
    """
    from ..hub.layout import INDEX, check_model_index

    if not out.exists():
        return None
    if not overwrite:
        raise FileExistsError(f"{out} exists already; choose another folder, or replace it (--overwrite)")
    if (out / INDEX).is_file():
        check_model_index(out)
        return out
    if any(out.iterdir()):
        raise FileExistsError(
            f"{out} holds something else than a pipeline, which is not replaced; choose another folder"
        )
    return None


def _pipeline(folders: Mapping[str, Path], earlier: Path | None, overrides: list[str]) -> MetaAuxInverter:
    """The pipeline of these parts, which fit each other, in memory; with the card that `earlier` has.

    Raises:
        ValueError: see `hub.assemble.check_parts`; an unknown setting.
        OSError: a folder without a network.
    """
    from ..hub.assemble import check_parts, recorded_weights
    from ..hub.card import CARD, without_figures
    from ..hub.layout import INDEX, read_json
    from ..models.auxiliary import AuxiliaryNetwork
    from ..models.directions import LatentDirections
    from ..models.discriminator import DualDiscriminator
    from ..models.encoder import LatentEncoder
    from ..pipeline import MetaAuxInverter
    from ..training.loading import load_generator, load_identity, load_network, load_perceptual

    classes = {
        "encoder": LatentEncoder,
        "auxiliary": AuxiliaryNetwork,
        "discriminator": DualDiscriminator,
        "latent_directions": LatentDirections,
    }
    loaders = {"generator": load_generator, "identity": load_identity, "perceptual": load_perceptual}
    parts = {
        name: load_network(classes[name], folder) if name in classes else loaders[name](folder)
        for name, folder in folders.items()
    }
    settings = {}
    if earlier is not None:
        index = read_json(earlier / INDEX)
        settings = {key: value for key, value in index.items() if key[0] != "_" and not isinstance(value, list)}
    settings |= recorded_weights(parts["auxiliary"]) | _parse_settings(overrides)
    check_parts(parts, settings)
    inverter = MetaAuxInverter(**parts, **settings)
    inverter.set_progress_bar_config(disable=True)
    if earlier is not None and (earlier / CARD).is_file():
        card = (earlier / CARD).read_text(encoding="utf-8")
        # Figures are those of the networks that they were measured with.
        same = all(folder == earlier / name for name, folder in folders.items())
        inverter.card = card if same else without_figures(card)
    return inverter


def _parse_settings(overrides: list[str]) -> dict[str, Any]:
    """Settings of the pipeline from KEY=VALUE each, with the value in YAML."""
    import yaml
    from pydantic import ValidationError

    from ..pipeline import MetaAuxInverter
    from ..training.settings import arguments_of

    values = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise typer.BadParameter(f"{override!r} is not of the form KEY=VALUE", param_hint="--set")
        values[key.strip()] = yaml.safe_load(text)
    networks = [PARTS.get(field.name, field.name) for field in fields(PartOptions)]
    try:
        return arguments_of(MetaAuxInverter, *networks)(values)
    except ValidationError as error:
        faults = [": ".join([*map(str, fault["loc"]), fault["msg"]]) for fault in error.errors()]
        raise typer.BadParameter("; ".join(faults), param_hint="--set") from None


def _check_results(results: Mapping[Path, dict[str, Any]], fingerprint: str) -> None:
    from ..hub.figures import check_results

    for path, part in results.items():
        try:
            check_results(part, fingerprint)
        except ValueError as error:
            raise ValueError(f"{path} cannot go into the model card: {error}") from None


def _measure_gains(inverter: MetaAuxInverter, photos: Path, attributes: Path, limit: int, device: str | None) -> None:
    """Gives the pipeline's directions the gains under which edits change adapted heads as much as unadapted ones.

    Raises:
        ValueError: there are no directions of age and gender, or as `evaluate editing`.
    """
    from ..baselines import MethodOptions, make_methods
    from ..devices import usable_device
    from ..evaluation.editing import EditingEvaluation
    from ..evaluation.photos import open_photos
    from ..faces.measures import MEASURES
    from ..models.age_gender import AgeGenderNetwork
    from ..models.directions import LatentDirections

    network = AgeGenderNetwork.from_file(attributes)
    inverter.to(usable_device(device))
    opened = open_photos(photos, inverter.generator.config.image_size, lambda: inverter.aligner, limit)
    methods = make_methods(["metaaux", "encoder"], inverter, MethodOptions())
    measures = [name for name in MEASURES if name in inverter.directions]
    with tempfile.TemporaryDirectory() as folder:
        evaluation = EditingEvaluation(inverter, methods, opened, network, Path(folder), measures)
        evaluation.run()
        found = evaluation.summarize()["equal_gains"]
    inverter.to("cpu")
    directions = dict(inverter.directions)
    for name, gain in found.items():
        if gain is None or not (math.isfinite(gain) and gain > 0):
            echo(
                f"note: the direction {name} keeps its gain of {directions[name].gain:g}: edits do not follow it on "
                "these photos",
                error=True,
            )
            continue
        directions[name] = replace(directions[name], gain=round(gain, 2) or gain)
        echo(f"{name}: gain {directions[name].gain:g}")
    inverter.latent_directions = LatentDirections.from_directions(list(directions.values()), inverter.fingerprint)


def _write_card(
    inverter: MetaAuxInverter, name: str, repo: str | None, license: str | None, results: list[dict[str, Any]]
) -> None:
    """Puts what is known into the pipeline's card."""
    from huggingface_hub import ModelCard

    from ..hub.card import card_of, updated_card

    card = ModelCard(card_of(inverter, repo, name.rpartition("/")[2]))
    inverter.card = updated_card(card, name, license, None, None, results=results)


def _keep_documents(earlier: Path | None, folder: Path) -> None:
    """The licence and the pictures that an earlier card names go on into the new folder."""
    import shutil

    from ..hub.publishing import files_to_push

    for name in () if earlier is None else files_to_push(earlier):
        if not (folder / name).exists() and not name.endswith((".json", ".safetensors")):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(earlier / name, folder / name)
