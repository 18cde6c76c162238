"""Views as a video that every browser plays."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

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
        OSError: nothing can be written there, or ffmpeg failed.
    """
    if not str(path).lower().endswith(".mp4"):
        raise ValueError(f"a video is written as MP4: {os.fspath(path)!r} must end in .mp4")
    sizes = {frame.size for frame in frames}
    if len(sizes) != 1:
        raise ValueError(f"a video needs frames of one size, got {len(frames)} frames of sizes {sorted(sizes)}")
    size = sizes.pop()
    if size[0] % 2 or size[1] % 2:
        raise ValueError(f"a video's frames need even sides, got {size[0]}x{size[1]}")
    with atomic_path(path) as temporary:
        _encode(frames, size, fps, temporary, path)


def _encode(
    frames: Sequence[Image.Image],
    size: tuple[int, int],
    fps: int,
    temporary: Path,
    path: str | os.PathLike,
) -> None:
    # imageio-ffmpeg brings the program; its own `write_frames` hides with which code and message ffmpeg ended, so that
    # a video cut short by a full disk would count as whole.
    import imageio_ffmpeg

    # "file:", or ffmpeg would take what stands before a colon in a folder's name for a protocol, and a leading dash
    # for an option.
    command = [
        *(imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error"),
        *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[0]}x{size[1]}", "-r", str(fps), "-i", "pipe:"),
        *("-an", "-vcodec", "libx264", "-pix_fmt", "yuv420p", "-crf", "18", "-movflags", "+faststart"),
        f"file:{temporary}",
    ]
    # Messages into a file: a pipe that nobody reads meanwhile could fill and stop ffmpeg.
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=messages)
        try:
            for frame in frames:
                process.stdin.write(frame.convert("RGB").tobytes())
        except BrokenPipeError:
            pass  # ffmpeg ended early, and tells why
        except BaseException:
            process.kill()
            raise
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            code = process.wait()
        if code:
            messages.seek(0)
            lines = messages.read().decode(errors="replace").replace(f"file:{temporary}", os.fspath(path)).split("\n")
            cause = " ".join(" ".join(line for line in lines if line.strip()).split()) or f"it ended with code {code}"
            raise OSError(f"ffmpeg could not write {os.fspath(path)}: {cause[:500]}")
