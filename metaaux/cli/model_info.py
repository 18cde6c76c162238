"""`python -m metaaux model-info ID`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import JsonOption, echo, echo_json, load_inverter

if TYPE_CHECKING:
    from ..pipeline import MetaAuxInverter


def model_info(
    model: Annotated[str | None, typer.Argument(metavar="ID", help="Hub id or folder. Default: metaaux-mini.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a model's networks, their sizes and its settings."""
    info = _info(load_inverter(model, "cpu"))
    if as_json:
        echo_json(info)
        return
    rays = "" if info["neural_resolution"] is None else f", rays {info['neural_resolution']}"
    lines = [
        f"model        {info['model']}",
        f"fingerprint  {info['fingerprint']}",
        f"licence      {info['licence']}",
        f"preset       {info['preset']}",
        f"images       {info['image_size']} pixels{rays}, w {info['w_dim']}",
    ]
    for name, part in info["components"].items():
        size = f"{part['parameters'] / 1e6:9.3f} M parameters {part['bytes'] / 1e6:9.2f} MB"
        lines.append(f"{name:<18} {part['class']:<19} {size}")
    lines.append(f"{'in all':<38} {info['parameters'] / 1e6:9.3f} M parameters {info['bytes'] / 1e6:9.2f} MB")
    if info["directions"]:
        lines.append(f"directions   {', '.join(info['directions'])}")
    lines += [f"{name:<24} {value}" for name, value in (info["inner_loop"] | info["settings"]).items()]
    echo("\n".join(lines))


def _info(inverter: MetaAuxInverter) -> dict[str, Any]:
    from ..hub.card import licence_of
    from ..models.presets import inner_loop_of
    from ..models.weights import unwrapped

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
        "preset": inverter.preset,
        "inner_loop": inner_loop_of(unwrapped(inverter.auxiliary)),
        "image_size": config.image_size,
        "neural_resolution": getattr(config, "neural_resolution", None),
        "w_dim": config.w_dim,
        "components": components,
        "parameters": sum(part["parameters"] for part in components.values()),
        "bytes": sum(part["bytes"] for part in components.values()),
        "directions": list(inverter.directions),
        "settings": inverter.parameters,
    }
