"""Tensors to pictures and back, pictures to files, strips of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..files import atomic_path


def image_to_tensor(image: Image.Image) -> torch.Tensor:
    """PIL image to float32 [3, H, W] in [-1, 1], RGB."""
    pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def tensor_to_image(tensor: torch.Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] to a PIL image; values outside are clipped.

    Raises:
        FloatingPointError: a value is infinite or not a number, of which no picture can be made.
    """
    if not torch.isfinite(tensor).all():
        raise FloatingPointError(
            "the picture has values that are not finite: weights or inputs are damaged, or their precision is too low"
        )
    pixels = (tensor.detach().float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def save_image(image: Image.Image, path: Path) -> None:
    """Writes a PNG, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def label_strip(images: Sequence[Image.Image], labels: Sequence[str]) -> Image.Image:
    """Images side by side in the first one's size, each with its label below.

    Raises:
        ValueError: no image, or not one label per image.
    """
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(f"a strip needs one label per image, got {len(images)} images and {len(labels)} labels")
    width, height = images[0].size
    font = ImageFont.load_default(size=max(10, height // 12))
    label_height = sum(font.getmetrics()) + 4
    strip = Image.new("RGB", (width * len(images), height + label_height), "white")
    draw = ImageDraw.Draw(strip)
    for column, (image, label) in enumerate(zip(images, labels)):
        strip.paste(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), (column * width, 0))
        draw.text((column * width + width / 2, height + 2), label, fill="black", font=font, anchor="ma")
    return strip
