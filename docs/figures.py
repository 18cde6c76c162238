"""Writes the measured figures into the pages: `python docs/figures.py`, after a file of docs/results has changed.

What `evaluate` wrote lies in docs/results as it was written. Each table between `<!-- figures: NAME -->` and
`<!-- end of figures -->` in README, docs and cards is made from these files, and so is the `model-index` in the front
matter of metaaux-mini's card. A test holds that the pages are as this command leaves them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from metaaux.hub.figures import evaluation_results  # noqa: E402

RESULTS = ROOT / "docs" / "results"
CARD = ROOT / "hub_configs" / "metaaux-mini" / "README.md"
#: Pages with tables of figures.
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md", CARD)
_BLOCK = re.compile(r"(<!-- figures: ([a-z0-9_]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)

#: Rows of Table 1: methods of `evaluate` and what the page calls them.
_METHODS = {
    "encoder": "encoder alone (W)",
    "styletransformer": "StyleTransformer-style (W+, our encoder)",
    "psp": "pSp-style (W+, our trunk)",
    "hyperinverter": "HyperInverter-style (our network, no steps)",
    "metaaux-0": "ours, before any step",
    "metaaux": "ours, {steps} steps",
}
_SUMMARY = {
    "encoder": "encoder alone",
    "metaaux-0": "auxiliary network's prediction",
    "metaaux": "after {steps} steps",
}
_ABLATIONS = {
    "full": "full",
    "without_auxiliary": "without auxiliary network",
    "without_meta": "without meta-learning",
    "without_2d": "without 2D module",
    "without_3d": "without 3D module",
}
_ALPHAS = ("-3", "-2", "-1", "1", "2", "3")


class Column:
    """A column of a table: its title, its value by method, and its form.

    Args:
        title: what stands above it.
        value: of a method.
        form: as `str.format` takes it.
        best: `min` or `max`, by which the best value is set in bold; `None` for none.
    """

    def __init__(
        self,
        title: str,
        value: Callable[[str], float],
        form: str,
        best: Callable[[Iterable[float]], float] | None = None,
    ):
        self.title, self.value, self.form, self.best = title, value, form, best

    def cells(self, methods: Sequence[str]) -> list[str]:
        """The column's cells, top to bottom."""
        values = [self.value(method) for method in methods]
        # Equal to the digits shown is equally good.
        texts = [self.form.format(value) for value in values]
        best = None if self.best is None else self.form.format(self.best(values))
        return [f"**{text}**" if text == best else text for text in texts]


def read(name: str) -> dict[str, Any]:
    """The results in `docs/results/NAME.json`."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def figure(results: dict[str, Any], key: str) -> Callable[[str], float]:
    """Looks a method's figure up: one of `evaluate`'s "methods", or of its "details"."""
    return lambda method: {**results["details"][method], **results["methods"][method]}[key]


def table(rows: dict[str, str], columns: Sequence[Column]) -> str:
    """A Markdown table with one row for each of `rows`, which holds labels by method."""
    body = zip(rows.values(), *(column.cells(list(rows)) for column in columns))
    return markdown(["", *(column.title for column in columns)], body)


def markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cells).lstrip() + " |" for cells in (header, *body)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]]) + "\n"


def labelled(results: dict[str, Any], labels: dict[str, str]) -> dict[str, str]:
    """Labels with the number of gradient steps that the results were made with."""
    steps = results["details"]["metaaux"]["settings"]["steps"]
    return {method: label.format(steps=steps) for method, label in labels.items()}


def summary() -> str:
    """How far the encoder, the prediction and the steps come: of README and card."""
    results = read("table1")
    columns = [
        Column("MSE", figure(results, "mse"), "{:.3f}"),
        Column("perceptual", figure(results, "perceptual"), "{:.2f}"),
        Column("Fréchet", figure(results, "frechet"), "{:.0f}"),
        Column("identity", figure(results, "identity"), "{:.3f}"),
        Column("identity, turned by 20°", figure(results, "identity_turned"), "{:.3f}"),
    ]
    return table(labelled(results, _SUMMARY), columns)


def table1() -> str:
    """Reconstruction by all methods."""
    results, times = read("table1"), read("table1_times")
    columns = [
        Column("MSE", figure(results, "mse"), "{:.4f}", min),
        Column("perceptual", figure(results, "perceptual"), "{:.3f}", min),
        Column("Fréchet", figure(results, "frechet"), "{:.0f}", min),
        Column("identity", figure(results, "identity"), "{:.3f}", max),
        Column("identity, turned by 20°", figure(results, "identity_turned"), "{:.3f}", max),
        Column("yaw error there", figure(results, "pose_error"), "{:.1f}°"),
        Column("seconds", figure(times, "seconds"), "{:.3f}"),
    ]
    return table(labelled(results, _METHODS), columns)


def beside_pti(results: dict[str, Any], times: dict[str, Any]) -> str:
    """Ours, with more steps too, and PTI."""
    rows = {}
    for method in results["methods"]:
        details = results["details"][method]
        if method == "pti":
            latent, tuning = details["settings"]["latent"]["steps"], round(details["tuning_steps"])
            rows[method] = f"PTI ({latent} steps for the code, {tuning} on average for the weights)"
        else:
            rows[method] = f"ours, {details['settings']['steps']} steps"
    columns = [
        Column("MSE", figure(results, "mse"), "{:.4f}", min),
        Column("perceptual", figure(results, "perceptual"), "{:.3f}", min),
        Column("identity", figure(results, "identity"), "{:.3f}", max),
        Column("identity, turned by 20°", figure(results, "identity_turned"), "{:.3f}", max),
        Column("seconds", figure(times, "seconds"), "{:.2f}", min),
    ]
    return table(rows, columns)


def table1_pti_own_stop() -> str:
    """PTI ended by its own rule."""
    return beside_pti(read("table1_pti_own_stop"), read("table1_pti_own_stop_times"))


def table1_pti() -> str:
    """PTI ended by a stricter rule."""
    return beside_pti(read("table1_pti"), read("table1_times"))


def table2() -> str:
    """What edits change; of a direction with a gain, adapted heads are moved by that much more."""
    results = read("table2")
    names = {"encoder": "encoder", "metaaux": "ours"}
    body = []
    for attribute, form in (("age", "{:.1f}"), ("gender", "{:.3f}")):
        for method, name in names.items():
            gain = results["directions"][attribute]["gain"] if method == "metaaux" else 1
            change, identity = results["methods"][method][attribute], results["details"][method]["identity"][attribute]
            label = f"{attribute}, {name}" + (f", α × {gain:g}" if gain != 1 else "")
            kept = [", ".join(f"{identity[alpha]:.2f}" for alpha in pair) for pair in (("-1", "1"), ("-3", "3"))]
            body.append([label, *(form.format(change[alpha]) for alpha in _ALPHAS), *kept])
    return markdown(["", *_ALPHAS, "identity at ±1", "at ±3"], body)


def table3() -> str:
    """The ablations. Without the auxiliary network the encoder's guess is what the steps start from."""
    results, encoder = read("table3"), read("table1")["methods"]["encoder"]
    before = {"without_auxiliary": encoder} | {
        method: results["methods"][f"{method}-0"] for method in _ABLATIONS if method != "without_auxiliary"
    }
    columns = [
        Column("MSE", figure(results, "mse"), "{:.4f}", min),
        Column("perceptual", figure(results, "perceptual"), "{:.3f}", min),
        Column("Fréchet", figure(results, "frechet"), "{:.0f}", min),
        Column("identity", figure(results, "identity"), "{:.3f}", max),
        Column("seconds", figure(results, "seconds"), "{:.3f}"),
        Column("MSE before a step", lambda method: before[method]["mse"], "{:.4f}"),
        Column("perceptual before a step", lambda method: before[method]["perceptual"], "{:.3f}"),
    ]
    return table(_ABLATIONS, columns)


TABLES = {make.__name__: make for make in (summary, table1, table1_pti_own_stop, table1_pti, table2, table3)}


def with_tables(text: str) -> str:
    """A page with its tables of figures as the results are now.

    Raises:
        KeyError: it asks for a table that there is not.
    """
    return _BLOCK.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def with_model_index(text: str) -> str:
    """A card whose front matter says what the checkpoint reaches on held-out photos, as the Hub reads it."""
    card = ModelCard(text)
    card.data.model_name, card.data.eval_results = CARD.parent.name, evaluation_results([read("table1")])
    return f"---\n{card.data.to_yaml()}\n---\n{card.text}"


def updated(page: Path) -> str:
    """The text that a page should have."""
    text = with_tables(page.read_text(encoding="utf-8"))
    return with_model_index(text) if page == CARD else text


def main() -> None:
    for page in PAGES:
        text = updated(page)
        if text != page.read_text(encoding="utf-8"):
            page.write_text(text, encoding="utf-8", newline="\n")
            print(f"{page.relative_to(ROOT)} changed")


if __name__ == "__main__":
    main()
