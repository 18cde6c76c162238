"""Tensors to pictures and back, strips of pictures, and videos."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .files import atomic_path


def image_to_tensor(image: Image.Image) -> torch.Tensor:
    """PIL image to float32 [3, H, W] in [-1, 1], RGB."""
    pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def tensor_to_image(tensor: torch.Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] to a PIL image; values outside are clipped."""
    pixels = (tensor.detach().float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


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


def write_video(frames: Sequence[Image.Image], path: str | os.PathLike, fps: int = 30) -> None:
    """Writes an MP4 (H.264, yuv420p, which every browser plays), whole or not at all.

    Args:
        frames: images of one size; both sides must be even, as yuv420p demands.
        path: the file, ending in `.mp4`.
        fps: frames a second.

    Raises:
        ValueError: no frames, frames of different or odd sizes, or a name that does not end in `.mp4`.
        FileNotFoundError: the folder of `path` does not exist.
    """
    import imageio_ffmpeg

    if not str(path).lower().endswith(".mp4"):
        raise ValueError(f"a video is written as MP4: {os.fspath(path)!r} must end in .mp4")
    sizes = {frame.size for frame in frames}
    if len(sizes) != 1:
        raise ValueError(f"a video needs frames of one size, got {len(frames)} frames of sizes {sorted(sizes)}")
    size = sizes.pop()
    if size[0] % 2 or size[1] % 2:
        raise ValueError(f"a video's frames need even sides, got {size[0]}x{size[1]}")
    with atomic_path(path) as temporary:
        writer = imageio_ffmpeg.write_frames(
            str(temporary),
            size,
            fps=fps,
            codec="libx264",
            pix_fmt_out="yuv420p",
            quality=None,
            macro_block_size=2,
            output_params=["-crf", "18", "-movflags", "+faststart"],
        )
        writer.send(None)
        try:
            for frame in frames:
                writer.send(frame.convert("RGB").tobytes())
        finally:
            writer.close()
