"""Reading photos: every picture Pillow can open, or an array, as an upright 8-bit RGB image."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 80_000_000

Photo = str | os.PathLike | Image.Image | np.ndarray | bytes | BinaryIO


class UnreadableImageError(ValueError):
    """What was given is not a picture that can be read; the message says why."""


def load_photo(photo: Photo, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads a photo into a new upright RGB image; EXIF rotation is applied, transparency is laid on white.

    Args:
        photo: a path, the bytes of an image file, a binary file object, a PIL image of any mode, or an array
            [H, W] or [H, W, 1 to 4] (grey, grey + alpha, RGB, RGBA): uint8, uint16, or floating in [0, 1].
            Of an animation the first frame is read. The argument is never changed.
        max_pixels: most pixels that are accepted. It is checked before the file is decoded.

    Returns:
        A new PIL image of mode RGB.

    Raises:
        UnreadableImageError: no such file, not an image, damaged, too many pixels, or an array of another kind.
    """
    if isinstance(photo, np.ndarray):
        image, name = _image_from_array(photo, max_pixels), "array"
    elif isinstance(photo, Image.Image):
        image, name = photo, "image"
    else:
        if isinstance(photo, (bytes, bytearray, memoryview)):
            source, name = io.BytesIO(photo), "the given bytes"
        elif isinstance(photo, (str, os.PathLike)):
            source, name = Path(photo), f"'{os.fspath(photo)}'"
        elif hasattr(photo, "read"):
            source, name = photo, "the given file object"
        else:
            raise UnreadableImageError(
                "a photo is a path, the bytes of an image file, a file object, a PIL image or an array, "
                f"got {type(photo).__name__}"
            )
        try:
            image = Image.open(source)
        except Image.DecompressionBombError as error:
            raise UnreadableImageError(_too_many_pixels(name, None, max_pixels)) from error
        except FileNotFoundError as error:
            raise UnreadableImageError(f"{name} does not exist") from error
        # Image plugins raise exceptions of many kinds on damaged files.
        except Exception as error:
            raise UnreadableImageError(f"{name} is not an image that can be read: {error}") from error

    _check_size(name, image.size, max_pixels)
    try:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except UnreadableImageError:
        raise
    except Exception as error:
        raise UnreadableImageError(f"{name} is damaged and cannot be decoded: {error}") from error
    finally:
        if not isinstance(photo, (np.ndarray, Image.Image)) and not hasattr(photo, "read"):
            image.close()


def _too_many_pixels(name: str, size: tuple[int, int] | None, max_pixels: int) -> str:
    shape = "far more pixels" if size is None else f"{size[0]} x {size[1]} pixels, more"
    return f"{name} has {shape} than the limit of {max_pixels:,} pixels; scale it down first"


def _check_size(name: str, size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise UnreadableImageError(_too_many_pixels(name, size, max_pixels))
    if min(size) < 1:
        raise UnreadableImageError(f"{name} is empty ({size[0]} x {size[1]} pixels)")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's own conversion of these modes clips at 255 where 16-bit files reach 65535.
        values = np.asarray(image)
        if image.mode == "I" and (values.min() < 0 or values.max() > 65535):
            raise UnreadableImageError(
                f"32-bit integer images must hold 16-bit values, found {values.min()} to {values.max()}"
            )
        image = _image_from_array(values.astype(np.float32 if image.mode == "F" else np.uint16), values.size)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    # A copy even of an RGB image: the caller's picture is not shared.
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _image_from_array(array: np.ndarray, max_pixels: int) -> Image.Image:
    channels = 1 if array.ndim == 2 else array.shape[-1]
    if array.ndim not in (2, 3) or not 1 <= channels <= 4:
        raise UnreadableImageError(f"an array must be [H, W] or [H, W, 1 to 4], got shape {tuple(array.shape)}")
    _check_size("array", (array.shape[1], array.shape[0]), max_pixels)
    if array.dtype == np.uint16:
        # Exact rounding of v / 257, which maps 65535 to 255.
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):
            raise UnreadableImageError(f"floating arrays must lie in [0, 1], got values from {low:g} to {high:g}")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise UnreadableImageError(f"an array must be uint8, uint16 or floating in [0, 1], got {array.dtype}")
    if array.ndim == 3 and channels == 1:
        array = array[..., 0]
    return Image.fromarray(np.ascontiguousarray(array))
