"""Model cards: what a repository on the Hub says about its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..models.weights import unwrapped

CARD = "README.md"
TAGS = ("3d-gan-inversion", "eg3d", "faces", "meta-learning", "metaaux")
_FIGURES = "## Figures"
_FINGERPRINT = "Fingerprint of the generator's weights"

_TEXT = """
# {name}

A pipeline `MetaAuxInverter` of [*Meta-Auxiliary Network for 3D GAN Inversion*](https://arxiv.org/abs/2305.10884): it
turns the photo of a face into {result}.

| component | class | parameters |
|---|---|---|
{components}

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


def card_of(pipeline: Any, repo_id: str | None = None) -> str:
    """The card that a pipeline was loaded with, else a generated one; it states the fingerprint that it has now."""
    text = pipeline.card or generated_card(pipeline, repo_id)
    return re.sub(rf"({re.escape(_FINGERPRINT)}: `)[0-9a-f]{{64}}`", rf"\g<1>{pipeline.fingerprint}`", text)


def generated_card(pipeline: Any, repo_id: str | None = None) -> str:
    """Card of a pipeline that has none: what can be read off the pipeline itself. Its licence is "unknown"."""
    networks = {name: network for name, network in sorted(pipeline.components.items()) if network is not None}
    components = "\n".join(
        f"| `{name}` | `{type(unwrapped(network)).__name__}` | {sum(p.numel() for p in network.parameters()):,} |"
        for name, network in networks.items()
    )
    data = ModelCardData(
        library_name="diffusers", license="unknown", pipeline_tag="image-to-3d", tags=list(TAGS), base_model=None
    )
    name = repo_id or "org/name"
    text = _TEXT.format(
        name=name.rpartition("/")[2] if repo_id else type(pipeline).__name__,
        result="a head that can be rendered from other sides" if pipeline.has_viewpoints else "an editable code",
        components=components,
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
    figures: Mapping[str, float | str] | None,
) -> str:
    """The card's text with what is given put in; what is `None` stays as it is."""
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
        table = f"{_FIGURES}\n\n| measure | value |\n|---|---|\n{rows}\n"
        before, found, after = text.partition(_FIGURES)
        rest = after.partition("\n## ")
        text = f"{before}{table}{rest[1]}{rest[2]}" if found else f"{text.rstrip()}\n\n{table}"
    return f"---\n{data.to_yaml()}\n---\n{text}"


def licence_of(card: str | None) -> str:
    """The licence that a card's front matter states, or "unknown"."""
    if card is None:
        return "unknown"
    data = ModelCard(card).data
    return str(data.get("license_name") or data.get("license") or "unknown")
