"""Views as a video that every browser plays."""

from __future__ import annotations

import os
from collections.abc import Sequence

from PIL import Image

from ..files import atomic_path


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
