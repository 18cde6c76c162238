"""Results as files: JSON, Markdown tables, comparison pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..hub.figures import columns_of, figures_of, meanings_of


# Not tabulate's: it pads every cell to the width of its column, so that one longer figure would change every line of a
# table that is kept under version control.
def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column to the left, the others to the right."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(value: Any, form: str) -> str:
    return "–" if value is None else form.format(value)


def table(results: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """The figures of `results` in Markdown, in the columns of the paper's Tables 1 and 3, and what they mean."""
    columns = [*columns_of(results), ("failed", "Failed", "{}"), ("n", "n", "{}")]
    rows = [
        [labels[name], *(_cell(figures_of(results, name)[key], form) for key, _, form in columns)]
        for name in results["methods"]
    ]
    notes = [
        f"Model {results['model']}, photos: {results['photos']}, {results['device']}. "
        "Means over the photos that a method did not fail on; n counts all of them. "
        "Seconds: median of one photo inverted alone, after a warm-up.",
        meanings_of(results),
    ]
    if not results["complete"]:
        notes.append("**Not all photos have been inverted yet.**")
    return markdown_table(["Method", *(title for _, title, _ in columns)], rows) + "\n" + "\n\n".join(notes) + "\n"


def comparison_picture(rows: Sequence[Sequence[Path | Image.Image]], labels: Sequence[str]) -> Image.Image:
    """Pictures in rows under the labels of their columns, as the paper's Fig. 4; long labels take several lines.

    Args:
        rows: pictures or their files; each row as long as `labels`. All are shown in the size of the first, or
            enlarged where that is below 128 pixels.
        labels: of the columns.

    Raises:
        ValueError: no row, or rows of another length than `labels`.
    """
    if not rows or any(len(row) != len(labels) for row in rows):
        raise ValueError(f"a comparison needs rows of {len(labels)} pictures, got {[len(row) for row in rows]}")
    cells = [[cell if isinstance(cell, Image.Image) else Image.open(cell) for cell in row] for row in rows]
    side = max(cells[0][0].width, 128)
    gap = max(2, side // 64)
    font = ImageFont.load_default(size=side // 10)
    titles = [_wrapped(label, font, side) for label in labels]
    lines = max(title.count("\n") + 1 for title in titles)
    height = lines * (sum(font.getmetrics()) + gap) + gap
    widths = [max(font.getlength(line) for line in title.split("\n")) for title in titles]
    columns = [max(side, round(width) + 2 * gap) for width in widths]
    picture = Image.new("RGB", (sum(columns) + gap * (len(columns) - 1), height + len(rows) * (side + gap)), "white")
    draw = ImageDraw.Draw(picture)
    left = 0
    for column, (title, width) in enumerate(zip(titles, columns)):
        place = {"anchor": "md", "align": "center", "spacing": gap}
        draw.multiline_text((left + width / 2, height - gap), title, fill="black", font=font, **place)
        for number, row in enumerate(cells):
            cell = row[column].convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
            picture.paste(cell, (left + (width - side) // 2, height + number * (side + gap)))
        left += width + gap
    return picture


def _wrapped(label: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """A label in lines no wider than `width`, but for words that are."""
    lines = [""]
    for word in label.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
