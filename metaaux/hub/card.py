"""Model cards: what a repository on the Hub says about its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..models.weights import unwrapped
from .figures import evaluation_results, figures_section

CARD = "README.md"
#: Endings of pictures that a card may show.
PICTURES = (".gif", ".jpg", ".jpeg", ".png", ".webp")
TAGS = ("3d-gan-inversion", "eg3d", "faces", "meta-learning", "metaaux")
_FIGURES = "## Figures"
#: What readers must know of each preset (`models.presets`).
_PRESETS = {
    "paper": "the method as the paper's text has it",
    "extended": "biases of their own for kernel taps or positions, which do most of the adaptation, and steps with "
    "momentum",
    "custom": "neither the paper's network and inner loop nor the project's extended ones",
}
#: What a generated card calls a repository that has no name yet.
PLACEHOLDER = "org/name"
_FINGERPRINT = "Fingerprint of the generator's weights"

_TEXT = """
# {name}

A pipeline `MetaAuxInverter` of [*Meta-Auxiliary Network for 3D GAN Inversion*](https://arxiv.org/abs/2305.10884): it
turns the photo of a face into {result}.

| component | class | parameters |
|---|---|---|
{components}

The auxiliary network's preset is `{preset}`: {preset_meaning}.

Images of {image_size} x {image_size} pixels; crops as the checkpoint's aligner makes them (`crop_scale` {crop_scale}).
{fingerprint_name}: `{fingerprint}`.

## Use

```python
from metaaux import MetaAuxInverter

inverter = MetaAuxInverter.from_pretrained("{repo_id}")
inversion = inverter.invert("photo.jpg", steps={steps})
image = inverter.render(inversion{view})
```

`variant="fp16"` downloads half the bytes where the repository has that variant.

## Data, licence and limits

Whoever publishes these weights states here what they were trained on or converted from, under which terms they may be
used, and what the data lacks. A photo of a face is personal data: ask the people whose photos you use.

## Cite

```bibtex
@article{{jiang2023metaauxiliary,
  title   = {{Meta-Auxiliary Network for 3D GAN Inversion}},
  author  = {{Jiang, Bangrui and Guo, Zhenhua and Yang, Yujiu}},
  journal = {{arXiv preprint arXiv:2305.10884}},
  year    = {{2023}}
}}
```
"""


def card_of(pipeline: Any, repo_id: str | None = None, title: str | None = None) -> str:
    """The card that a pipeline was loaded with, else a generated one; it states the fingerprint that it has now."""
    text = pipeline.card or generated_card(pipeline, repo_id, title)
    return re.sub(rf"({re.escape(_FINGERPRINT)}: `)[0-9a-f]{{64}}`", rf"\g<1>{pipeline.fingerprint}`", text)


def card_files(card: str) -> list[str]:
    """What a card shows or links to beside itself, its pictures and its licence: paths inside of its folder."""
    named = re.findall(r"\]\(([^()\s]+)\)|^(?:license_link|thumbnail): *(\S+)$", card, re.MULTILINE)
    paths = [PurePosixPath(link or entry) for link, entry in named]
    return sorted(
        {
            str(path)
            for path in paths
            if not (path.is_absolute() or ".." in path.parts or ":" in str(path))
            and (path.suffix.lower() in PICTURES or path.name.startswith("LICENSE"))
        }
    )


def generated_card(pipeline: Any, repo_id: str | None = None, title: str | None = None) -> str:
    """Card of a pipeline that has none: what can be read off the pipeline itself. Its licence is "unknown".

    Args:
        pipeline: the pipeline.
        repo_id: Hub id, if it has one already.
        title: heading. Default: the id's name, or the pipeline's class.
    """
    networks = {name: network for name, network in sorted(pipeline.components.items()) if network is not None}
    components = "\n".join(
        f"| `{name}` | `{type(unwrapped(network)).__name__}` | {sum(p.numel() for p in network.parameters()):,} |"
        for name, network in networks.items()
    )
    data = ModelCardData(
        language="en", library_name="diffusers", license="unknown", pipeline_tag="image-to-3d", tags=list(TAGS)
    )
    name = repo_id or PLACEHOLDER
    text = _TEXT.format(
        name=title or (name.rpartition("/")[2] if repo_id else type(pipeline).__name__),
        result="a head that can be rendered from other sides" if pipeline.has_viewpoints else "an editable code",
        components=components,
        preset=pipeline.preset,
        preset_meaning=_PRESETS[pipeline.preset],
        image_size=pipeline.generator.config.image_size,
        crop_scale=pipeline.config.crop_scale,
        fingerprint_name=_FINGERPRINT,
        fingerprint=pipeline.fingerprint,
        repo_id=name,
        steps=pipeline.config.inner_steps,
        view=", yaw=20" if pipeline.has_viewpoints else "",
    )
    return f"---\n{data.to_yaml()}\n---\n{text}"


def updated_card(
    card: ModelCard,
    repo_id: str,
    license: str | None,
    base_models: Sequence[str] | None,
    tags: Sequence[str] | None,
    figures: Mapping[str, float | str] | None = None,
    results: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The card's text with what is given put in; what is `None` or empty stays as it is.

    Args:
        card: the card.
        repo_id: id under which it is published, or the name of a folder.
        license, base_models, tags, figures: see `PublishingMixin.push_to_hub`.
        results: contents of `results.json` files: tables in the text and a `model-index` in the front matter.
    """
    data = card.data
    data.library_name = data.library_name or "diffusers"
    if license is not None:
        data.license = license
    if base_models is not None:
        data.base_model = list(base_models)
    data.tags = list(dict.fromkeys([*(data.tags or []), *TAGS, *(tags or ())]))
    text = card.text
    if figures:
        rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
        text = _with_figures(text, f"| measure | value |\n|---|---|\n{rows}\n")
    if results:
        text = _with_figures(text, figures_section(results))
        data.model_name, data.eval_results = repo_id.rpartition("/")[2], evaluation_results(results)
    return f"---\n{data.to_yaml()}\n---\n{text}"


def without_figures(text: str) -> str:
    """A card without its section of figures and without the front matter's `model-index`."""
    card = ModelCard(text)
    card.data.eval_results = None
    before, after = _around_figures(card.text)
    return f"---\n{card.data.to_yaml()}\n---\n{before}{after}"


def _with_figures(text: str, figures: str) -> str:
    """A card's text whose section of figures is this one."""
    before, after = _around_figures(text)
    return f"{before.rstrip()}\n\n{_FIGURES}\n\n{figures.rstrip()}\n" + (f"\n{after}" if after else "")


def _around_figures(text: str) -> tuple[str, str]:
    """A card's text before its section of figures, and from the next section on."""
    before, _, section = text.partition(_FIGURES)
    _, found, after = section.partition("\n## ")
    return before, f"## {after}" if found else ""


def licence_of(card: str | None) -> str:
    """The licence that a card's front matter states, or "unknown"."""
    if card is None:
        return "unknown"
    data = ModelCard(card).data
    return str(data.get("license_name") or data.get("license") or "unknown")
