"""Measured figures in a model card: tables for readers, and the Hub's `model-index` for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult

#: The pipeline's own method among those that `evaluate` compares.
OWN_METHOD = "metaaux"
# Columns of a reconstruction's table: key, title, form.
_COLUMNS = (
    ("mse", "MSE ↓", "{:.4f}"),
    ("perceptual", "Perceptual ↓", "{:.4f}"),
    ("frechet", "Fréchet ↓", "{:.2f}"),
    ("identity", "Identity ↑", "{:.3f}"),
    ("distance", "Distance ↓", "{:.3f}"),
    ("seconds", "Seconds ↓", "{:.3f}"),
)
# Key of a metric that not every checkpoint has: it needs a `FaceRecogniser` as identity network.
_DISTANCE = "distance"
# Of a generator's results, what is measured and not set.
_GENERATOR_MEASURES = (
    "frechet",
    "nose_in_front",
    "canonical_depth_error",
    "canonical_depth_error_front",
    "pose_error",
    "pose_detected",
    "identity_across_views",
    "jitter_difference",
)
_TASK = "image-to-3d"


def kind_of(results: Mapping[str, Any]) -> str:
    """Which command wrote these results: "reconstruction", "editing", "generator" or "benchmark".

    Raises:
        ValueError: none that is known.
    """
    signs = {
        "reconstruction": ("methods", "metrics"),
        "editing": ("methods", "directions"),
        "generator": ("samples", "canonical_depth_error"),
        "benchmark": ("measures",),
    }
    for kind, keys in signs.items():
        if all(key in results for key in keys):
            return kind
    raise ValueError(
        "it holds no results of `metaaux evaluate`, `evaluate generator`, `evaluate editing` or `benchmark`"
    )


def columns_of(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Columns of a reconstruction's table as (key, title, form); the recogniser's distance where it was measured."""
    return [column for column in _COLUMNS if column[0] != _DISTANCE or _DISTANCE in results["metrics"]]


def figures_of(results: Mapping[str, Any], method: str) -> dict[str, Any]:
    """All figures of one method of a reconstruction's results, of its "methods" and its "details"."""
    return {**results.get("details", {}).get(method, {}), **results["methods"].get(method, {})}


def meanings_of(results: Mapping[str, Any]) -> str:
    """What a reconstruction's figures were measured by, in words."""
    titles = {key: title.rstrip(" ↓↑") for key, title, _ in columns_of(results)}
    meanings = {key: meaning or "not measured" for key, meaning in results["metrics"].items()}
    return " ".join(f"{titles[key]}: {meanings[key]}." for key in titles if key in meanings)


def check_results(results: Mapping[str, Any], fingerprint: str) -> None:
    """Checks that results are of a generator, and all there.

    Raises:
        ValueError: they are of an unknown kind, of another generator, or of an evaluation that was not finished.
    """
    kind_of(results)
    measured = str(results.get("fingerprint"))
    if measured != fingerprint:
        raise ValueError(
            f"it was measured with another generator (fingerprint {measured[:12]}…, not {fingerprint[:12]}…)"
        )
    if not results.get("complete", True):
        raise ValueError("the evaluation was not finished: the same command goes on with it")


def figures_section(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of all results, a heading and a table each."""
    tables = {"reconstruction": _reconstruction, "editing": _editing, "generator": _generator, "benchmark": _benchmark}
    return "\n".join(tables[kind_of(part)](part) for part in results)


def evaluation_results(results: Sequence[Mapping[str, Any]]) -> list[EvalResult]:
    """The pipeline's own figures, as the front matter's `model-index` holds them."""
    found = []
    for part in results:
        kind = kind_of(part)
        if kind == "reconstruction":
            figures = figures_of(part, OWN_METHOD)
            names = {key: title.rstrip(" ↓↑") for key, title, _ in columns_of(part)}
            names |= {key: f"{names[key]}: {meaning}" for key, meaning in part["metrics"].items() if meaning}
            data = ("held-out-portraits", f"{part['photos']} portraits")
            measured = {key: figures[key] for key in names if figures.get(key) is not None}
            found += [_entry("3D GAN inversion", data, key, names[key], value) for key, value in measured.items()]
        elif kind == "generator":
            data = ("random-heads", "random heads")
            found += [
                _entry("Face generation", data, key, key.replace("_", " "), value)
                for key, value in _numbers(part).items()
            ]
    return found


def _entry(task: str, data: tuple[str, str], metric: str, name: str, value: float) -> EvalResult:
    return EvalResult(
        task_type=_TASK,
        task_name=task,
        dataset_type=data[0],
        dataset_name=data[1],
        metric_type=metric,
        metric_name=name,
        metric_value=round(float(value), 6),
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(value: Any, form: str) -> str:
    return "–" if value is None else form.format(value)


def _reconstruction(results: Mapping[str, Any]) -> str:
    columns = columns_of(results)
    rows = [
        [name, *(_cell(figures_of(results, name).get(key), form) for key, _, form in columns)]
        for name in results["methods"]
    ]
    note = f"Means over {results['photos']} photos, {results['device']}. {meanings_of(results)}"
    return f"### Reconstruction\n\n{_table(['Method', *(title for _, title, _ in columns)], rows)}\n{note}\n"


def _editing(results: Mapping[str, Any]) -> str:
    methods = results["methods"]
    attributes = {name for figures in methods.values() for name in figures}
    alphas = [alpha for figures in methods.values() for change in figures.values() for alpha in change]
    rows = [
        [f"{name} {alpha}", *(_cell(figures[name][alpha], "{:+.3f}") for figures in methods.values())]
        for name in sorted(attributes)
        for alpha in dict.fromkeys(alphas)
    ]
    note = f"Change of the predicted age in years and of P(male) by an edit, means over {results['photos']} photos."
    return f"### Editing\n\n{_table(['Edit', *methods], rows)}\n{note}\n"


def _numbers(results: Mapping[str, Any]) -> dict[str, float]:
    return {name: results[name] for name in _GENERATOR_MEASURES if results.get(name) is not None}


def _generator(results: Mapping[str, Any]) -> str:
    rows = [[name.replace("_", " "), f"{value:.4f}"] for name, value in _numbers(results).items()]
    return f"### Generator\n\n{_table(['Measure', 'Value'], rows)}"


def _benchmark(results: Mapping[str, Any]) -> str:
    rows = [[name.replace("_", " "), f"{figures['median_ms']:.1f}"] for name, figures in results["measures"].items()]
    note = f"Medians, {results['device']}, {results['dtype']}, {results['steps']} steps."
    return f"### Times\n\n{_table(['Measure', 'Milliseconds'], rows)}\n{note}\n"
