"""Small pictures of the page that are not renders: the crop with its landmarks, and the losses' curves."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from ..faces import AlignedFace

_CROP_SIDE = 256
_LOSSES = {"mse": "Pixels (MSE)", "perceptual": "Perceptual", "identity": "Identity"}
_CHART = (120, 34)


def crop_card(faces: Sequence[AlignedFace], photos: Sequence[Image.Image]) -> str:
    """HTML of what was found in the photos: the first one's crop with landmarks, and the head's pose in words."""
    face = faces[0]
    lines = [f"<b>{'Face found' if len(faces) == 1 else f'{len(faces)} photos, one head'}</b>"]
    lines.append(f"Head turned {_turned(face.yaw, 'right', 'left')},<br>tilted {_turned(face.pitch, 'down', 'up')}")
    crowded = [str(number) for number, found in enumerate(faces, start=1) if found.faces_found > 1]
    if crowded:
        where = "" if len(faces) == 1 else f" in photo {', '.join(crowded)}"
        lines.append(f"<em>Several faces{where}: the largest is used</em>")
    picture = _data_uri(_crop_with_landmarks(face, photos[0]))
    text = "".join(f"<span>{line}</span>" for line in lines)
    return f'<div class="crop-card"><img src="{picture}" alt="aligned face with landmarks"><div>{text}</div></div>'


def note_card(text: str, kind: str = "error") -> str:
    """HTML of a message in the crop's place; `text` is taken literally."""
    return f'<div class="crop-card note {kind}"><div><span>{html.escape(text)}</span></div></div>'


def loss_charts(steps: Sequence[Mapping[str, float]], total: int) -> str:
    """HTML of three curves over the steps so far, each with its last value and its change since the encoder.

    Args:
        steps: entries of `Inversion.steps`.
        total: number of entries once all steps are done, which fixes the axis.
    """
    cards = []
    for key, label in _LOSSES.items():
        values = [step[key] for step in steps]
        change = "" if len(values) < 2 or values[0] == 0 else f"{100 * (values[-1] / values[0] - 1):+.0f} %"
        cards.append(
            f'<div class="loss"><span class="label">{label}</span><span class="value">{values[-1]:.4f}</span>'
            f'<span class="change">{change.replace("-", "−")}</span>{_curve(values, total)}</div>'
        )
    return f'<div class="losses" role="img" aria-label="losses by step">{"".join(cards)}</div>'


def progress_bar(text: str, share: float, busy: bool = True) -> str:
    """HTML of a line of text over a bar that is filled to `share`, 0 to 1; `text` is taken literally."""
    width = f"{100 * min(max(share, 0.0), 1.0):.0f}%"
    return (
        f'<div class="status {"busy" if busy else "done"}" role="status"><span>{html.escape(text)}</span>'
        f'<div class="bar"><div style="width:{width}"></div></div></div>'
    )


def _turned(degrees: float, positive: str, negative: str) -> str:
    rounded = round(abs(degrees))
    return f"{rounded}° {positive if degrees > 0 else negative}" if rounded else f"0° {positive}"


def _crop_with_landmarks(face: AlignedFace, photo: Image.Image) -> Image.Image:
    from ..faces.detection import sample_square

    side = 2 * _CROP_SIDE
    zoom = face.image.width / side
    to_photo = np.column_stack([face.crop_to_photo[:, :2] * zoom, face.crop_to_photo[:, 2]])
    picture = sample_square(photo, to_photo, side).convert("RGB")
    points = (face.landmarks - to_photo[:, 2]) @ np.linalg.inv(to_photo[:, :2]).T
    overlay = Image.new("RGBA", picture.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(overlay)
    for x, y in points:
        draw.ellipse((x - 2.2, y - 2.2, x + 2.2, y + 2.2), fill=(255, 255, 255, 190))
    picture = Image.alpha_composite(picture.convert("RGBA"), overlay).convert("RGB")
    return picture.resize((_CROP_SIDE, _CROP_SIDE), Image.Resampling.LANCZOS)


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _curve(values: Sequence[float], total: int) -> str:
    width, height = _CHART
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    points = [
        (4 + (width - 8) * number / max(total - 1, 1), 4 + (height - 8) * (high - value) / span)
        for number, value in enumerate(values)
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    x, y = points[-1]
    return (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">'
        f'<polyline points="{path}"/><line class="dot" x1="{x:.1f}" y1="{y:.1f}" x2="{x:.1f}" y2="{y:.1f}"/></svg>'
    )
