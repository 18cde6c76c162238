"""Writes the measured figures into the pages: `python docs/figures.py`, after a file of docs/results has changed.

What `evaluate` wrote lies in docs/results as it was written, that of a former checkpoint in a folder there. Each table
between `<!-- figures: NAME -->` (or FOLDER/NAME) and `<!-- end of figures -->` in README, docs and cards is made from
these files, and so is the `model-index` in the front matter of metaaux-mini's card. A test holds that the pages are as
this command leaves them.
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

from metaaux.evaluation.scaling import scaling_table  # noqa: E402
from metaaux.hub.figures import evaluation_results, figures_of  # noqa: E402

RESULTS = ROOT / "docs" / "results"
CARD = ROOT / "hub_configs" / "metaaux-mini" / "README.md"
#: Pages with tables of figures.
_DOCS = ("results", "results-128", "scaling", "speed")
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{page}.md" for page in _DOCS), CARD)
_BLOCK = re.compile(r"(<!-- figures: ([a-z0-9]+/)?([a-z0-9_]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)

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
#: Which prediction they start from, where it is not their own ("NAME-0").
_STARTS = {"without_auxiliary": "encoder"}
#: Networks of the table of presets, by their file, and what is taken of each; "full" is another name of "metaaux".
_NETWORKS = {
    "table3": "`extended`, 1,600 tasks",
    "table3_paper": "`paper`, 1,600 tasks",
    "table3_published": "metaaux-mini (`extended`), 89,280 tasks",
}
_PARTS = {
    "{}-0": "before a step",
    "{}": "five steps",
    "predicted_only": "on the predicted part alone",
    "free_only": "on image-independent tensors alone",
}
#: Rows of Table 2.
_EDITED = {
    "encoder": "encoder",
    "psp": "pSp-style",
    "styletransformer": "StyleTransformer-style",
    "hyperinverter": "HyperInverter-style",
    "pti": "PTI",
    "metaaux": "ours",
}
_PRECISIONS = {"float32": "float32", "tf32": "TF32", "bfloat16": "bfloat16"}
#: What the pages call measures of `benchmark` that have another name there.
_MEASURES = {"adaptation": "inversion of 5 steps", "adaptation_step": "gradient step"}
_ALPHAS = ("-3", "-2", "-1", "1", "2", "3")


class Column:
    """A column of a table: its title, its value by method, and its form.

    Args:
        title: what stands above it.
        value: of a method; `None` where there is none.
        form: as `str.format` takes it.
        best: `min` or `max`, by which the best value is set in bold; `None` for none.
    """

    def __init__(
        self,
        title: str,
        value: Callable[[str], float | None],
        form: str,
        best: Callable[[Iterable[float]], float] | None = None,
    ):
        self.title, self.value, self.form, self.best = title, value, form, best

    def cells(self, methods: Sequence[str]) -> list[str]:
        """The column's cells, top to bottom."""
        values = [self.value(method) for method in methods]
        known = [value for value in values if value is not None]
        # Equal to the digits shown is equally good.
        texts = ["–" if value is None else self.form.format(value) for value in values]
        best = self.form.format(self.best(known)) if self.best is not None and known else None
        return [f"**{text}**" if text == best else text for text in texts]


def read(name: str) -> dict[str, Any]:
    """The results in `docs/results/NAME.json`; NAME may begin with a folder."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def times_of(name: str) -> dict[str, Any]:
    """The results that have the seconds of `docs/results/NAME.json`: those measured apart (NAME_times.json), where its
    own were not of an idle machine."""
    return read(f"{name}_times" if (RESULTS / f"{name}_times.json").is_file() else name)


def figure(results: dict[str, Any], key: str) -> Callable[[str], float]:
    """Looks a method's figure up: one of `evaluate`'s "methods", or of its "details"."""
    return lambda method: figures_of(results, method)[key]


def seconds(times: dict[str, Any]) -> Callable[[str], float | None]:
    """Looks up how long an inversion takes; `None` of a method that was not timed."""
    return lambda method: figures_of(times, method).get("seconds")


def likeness(results: dict[str, Any], best: bool = False) -> list[Column]:
    """The recogniser's distances, where the checkpoint has it; else the cosines by its own identity network."""
    if "distance" in results["metrics"]:
        keys = {"distance": "distance", "turned by 20°": "distance_turned", "by 40°": "distance_turned_40"}
        better = min
    else:
        keys, better = {"identity": "identity", "identity, turned by 20°": "identity_turned"}, max
    return [Column(title, figure(results, key), "{:.3f}", better if best else None) for title, key in keys.items()]


def table(rows: dict[str, str], columns: Sequence[Column]) -> str:
    """A Markdown table with one row for each of `rows`, which holds labels by method, and the columns that hold
    anything."""
    cells = {column.title: column.cells(list(rows)) for column in columns}
    cells = {title: column for title, column in cells.items() if set(column) != {"–"}}
    return markdown(["", *cells], zip(rows.values(), *cells.values()))


def markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cells).lstrip() + " |" for cells in (header, *body)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]]) + "\n"


def labelled(results: dict[str, Any], labels: dict[str, str]) -> dict[str, str]:
    """Labels of the methods that the results have, with the number of gradient steps that these took."""
    settings = {method: details["settings"] for method, details in results["details"].items()}
    return {
        method: label.format(steps=settings[method].get("steps"))
        for method, label in labels.items()
        if method in settings
    }


def summary(folder: str = "") -> str:
    """How far the encoder, the prediction and the steps come: of README and card."""
    results = read(folder + "table1")
    columns = [
        Column("MSE", figure(results, "mse"), "{:.3f}"),
        Column("perceptual", figure(results, "perceptual"), "{:.2f}"),
        Column("Fréchet", figure(results, "frechet"), "{:.0f}"),
        *likeness(results),
    ]
    return table(labelled(results, _SUMMARY), columns)


def table1(folder: str = "") -> str:
    """Reconstruction by all methods."""
    results = read(folder + "table1")
    columns = [
        Column("MSE", figure(results, "mse"), "{:.4f}", min),
        Column("perceptual", figure(results, "perceptual"), "{:.3f}", min),
        Column("Fréchet", figure(results, "frechet"), "{:.0f}", min),
        *likeness(results, best=True),
        Column("yaw error at 20°", figure(results, "pose_error"), "{:.1f}°"),
        Column("seconds", seconds(times_of(folder + "table1")), "{:.3f}"),
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
        *likeness(results, best=True),
        Column("seconds", seconds(times), "{:.2f}", min),
    ]
    return table(rows, columns)


def table1_pti_own_stop(folder: str = "") -> str:
    """PTI ended by its own rule."""
    return beside_pti(read(folder + "table1_pti_own_stop"), times_of(folder + "table1_pti_own_stop"))


def table1_pti(folder: str = "") -> str:
    """PTI ended by a stricter rule."""
    return beside_pti(read(folder + "table1_pti"), times_of(folder + "table1"))


def _is_plain(results: dict[str, Any], method: str) -> bool:
    """Whether a method's heads have no weight offsets, and so no gain."""
    return "auxiliary" not in results["details"][method]["settings"]


def edits(rows: Sequence[tuple[dict[str, Any], str]]) -> str:
    """What edits change, of pairs of results and method; a gain counts for heads of weight offsets alone."""
    body: dict[str, list[str]] = {}
    for attribute, form in (("age", "{:.1f}"), ("gender", "{:.3f}")):
        for results, method in rows:
            details = results["details"][method]
            gain = 1 if _is_plain(results, method) else results["directions"][attribute]["gain"]
            label = f"{attribute}, {_EDITED[method]}" + (f", α × {gain:g}" if gain != 1 else "")
            change, identity = results["methods"][method][attribute], details["identity"][attribute]
            kept = [", ".join(f"{identity[alpha]:.2f}" for alpha in pair) for pair in (("-1", "1"), ("-3", "3"))]
            if "background" in details:
                kept.append(", ".join(f"{details['background'][attribute][alpha]:.3f}" for alpha in ("-2", "2")))
            # The first one stays where two have measured the same.
            body.setdefault(label, [label, *(form.format(change[alpha]) for alpha in _ALPHAS), *kept])
    header = ["", *_ALPHAS, "identity at ±1", "at ±3", "background at ±2"]
    lines = list(body.values())
    return markdown(header[: len(lines[0])], lines)


def edited(results: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """All rows of one file."""
    return [(results, method) for method in _EDITED if method in results["methods"]]


def table2(folder: str = "") -> str:
    """What edits change."""
    return edits(edited(read(folder + "table2")))


def table2_plain(folder: str = "") -> str:
    """The same step of w for all: without gains, which the first file's methods of no weight offsets never have."""
    others = [(results, method) for results, method in edited(read(folder + "table2")) if _is_plain(results, method)]
    return edits([*others, (read(folder + "table2_plain"), "metaaux")])


def table2_gains(folder: str = "") -> str:
    """Heads of weight offsets with the checkpoint's gains, and with the first file's where those are others."""
    first = read(folder + "table2")
    adapted = [(results, method) for results, method in edited(first) if not _is_plain(results, method)]
    return edits([(read(folder + "table2_gains"), "metaaux"), *adapted])


def table2_pti(folder: str = "") -> str:
    """PTI beside ours, on fewer photos."""
    return edits(edited(read(folder + "table2_pti")))


def table3(folder: str = "") -> str:
    """The ablations, and what they start from: without the auxiliary network that is the encoder's guess."""
    results, whole = read(folder + "table3"), read(folder + "table1")
    starts = (whole["methods"] if whole["photos"] == results["photos"] else {}) | results["methods"]

    def before(key: str) -> Callable[[str], float | None]:
        return lambda method: starts.get(_STARTS.get(method, f"{method}-0"), {}).get(key)

    columns = [
        Column("MSE", figure(results, "mse"), "{:.4f}", min),
        Column("perceptual", figure(results, "perceptual"), "{:.3f}", min),
        Column("Fréchet", figure(results, "frechet"), "{:.0f}", min),
        *likeness(results, best=True)[:1],
        Column("seconds", seconds(results), "{:.3f}"),
        Column("MSE before a step", before("mse"), "{:.4f}"),
        Column("perceptual before a step", before("perceptual"), "{:.3f}"),
    ]
    return table(labelled(results, _ABLATIONS), columns)


def presets(folder: str = "") -> str:
    """What five steps bring with each network, and what of it the predicted part and the other tensors do alone."""
    body = []
    for name, label in _NETWORKS.items():
        results = read(folder + name)
        whole = "full" if "full" in results["methods"] else "metaaux"
        columns = [
            Column("MSE", figure(results, "mse"), "{:.4f}"),
            Column("perceptual", figure(results, "perceptual"), "{:.3f}"),
            *likeness(results)[:2],
        ]
        methods = {part.format(whole): text for part, text in _PARTS.items()}
        cells = zip(*(column.cells(list(methods)) for column in columns))
        body += [[f"{label}: {text}", *row] for text, row in zip(methods.values(), cells)]
    return markdown(["", *(column.title for column in columns)], body)


def speed(folder: str = "", name: str = "speed") -> str:
    """What `benchmark` timed in several precisions, milliseconds, and NVIDIA's code in the same run."""
    results = read(folder + name)
    body = []
    for entry in results["configurations"]:
        timed = [entry["measures"][key] for key in ("synthesis", "cached_view", "tuning_step", "adaptation")]
        profile = timed[-1]["profile"]
        launches = "graphs" if entry["cuda_graphs"] else "plain launches"
        body.append(
            [
                f"{_PRECISIONS[entry['precision']]}, {launches}",
                *(f"{_digits(m['median_ms'])} ({_digits(m['profile']['busy_ms'])})" for m in timed),
                f"{profile['kernels']:,} in {profile['launches']:,}",
            ]
        )
    official = results.get("official", {"measures": {}})
    for configuration, measures in official["measures"].items():
        times = (_digits(measures[key]["median_ms"]) for key in ("synthesis", "cached_view", "tuning_step"))
        body.append([f"official code, {official['operations']}, {configuration}", *times, "", ""])
    header = ["synthesis", "cached view", "tuning step", "inversion of 5 steps", "its kernels, launches"]
    return markdown(["", *header], body)


def speed_mini(folder: str = "") -> str:
    """Likewise, of the embedded checkpoint."""
    return speed(folder, "speed_mini")


def threads(folder: str = "") -> str:
    """Throughput of eight threads, by lanes and by how many of their inversions were computed as one batch."""
    body = []
    for entry in read(folder + "threads")["entries"]:
        name = f"{entry['model']}, {_PRECISIONS[entry['precision']]}"
        batch = "each by itself" if entry["batch"] == 1 else f"{entry['batch']} at most"
        if "error" in entry:
            body.append([name, str(entry["lanes"]), batch, entry["error"], "", "", "", ""])
            continue
        busy = [_digits(entry[which]["busy_ms"]) if which in entry else "" for which in ("alone", "at_once")]
        rates = (entry["one_per_second"], entry["all_per_second"])
        cells = [name, str(entry["lanes"]), batch, *map(_digits, rates), f"×{entry['ratio']:.2f}"]
        body.append([*cells, " → ".join(filter(None, busy)), f"{entry['difference']['loss']:.4f}"])
    header = ["lanes", "as one batch", "one thread, inversions/s", "eight threads", "times one"]
    return markdown(["", *header, "GPU busy with the eight: alone → at once", "loss: largest difference"], body)


def speed_against(folder: str = "") -> str:
    """What `benchmark --against` timed in turn with a former revision, milliseconds."""
    compared = read(folder + "speed_against")["against"]
    body = [
        [
            _MEASURES.get(key, key.replace("_", " ")),
            *(_digits(figures[which]) for which in ("other_median_ms", "median_ms")),
            f"×{figures['speedup']:.2f} ({figures['speedup_min']:.2f} to {figures['speedup_max']:.2f})",
        ]
        for key, figures in compared["measures"].items()
    ]
    return markdown(["", compared["folder"], "now", "times as fast"], body)


def precisions(folder: str = "") -> str:
    """What the named precisions change of a reconstruction's figures."""
    body = []
    for name, label in _PRECISIONS.items():
        results = read(f"{folder}precision_{name}")
        columns = [
            Column("MSE", figure(results, "mse"), "{:.5f}"),
            Column("perceptual", figure(results, "perceptual"), "{:.3f}"),
            Column("Fréchet", figure(results, "frechet"), "{:.0f}"),
            *likeness(results),
        ]
        body.append([label, *(column.cells(["metaaux"])[0] for column in columns)])
    return markdown(["", *(column.title for column in columns)], body)


def scaling(folder: str = "") -> str:
    """What `benchmark-scaling` measured, as it prints it."""
    return scaling_table(read(folder + "scaling")) + "\n"


def _digits(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


TABLES = {
    make.__name__: make
    for make in (
        *(summary, table1, table1_pti_own_stop, table1_pti, table2, table2_plain, table2_gains, table2_pti),
        *(table3, presets, scaling, speed, speed_mini, threads, speed_against, precisions),
    )
}


def with_tables(text: str) -> str:
    """A page with its tables of figures as the results are now.

    Raises:
        KeyError: it asks for a table that there is not.
    """
    return _BLOCK.sub(lambda found: found[1] + TABLES[found[3]](found[2] or "") + found[4], text)


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
