"""Reading photos: picture files of the usual formats, PIL images and arrays, as upright 8-bit sRGB images."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import pi_heif
from PIL import Image, UnidentifiedImageError

from .colour import to_srgb
from .metadata import upright_turn, without_metadata

MAX_PIXELS = 80_000_000
#: The formats of files that are opened, as Pillow names them. The others that Pillow knows are no photos, and some are
#: programs: EPS would start Ghostscript. MPO, which several cameras write, is a JPEG with more pictures behind it.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "HEIF", "AVIF", "TIFF", "GIF", "BMP", "JPEG2000", "PPM")
# Half a step of 8 bits: what is that near to 0 or 1 rounds to the same picture.
_FLOAT_TOLERANCE = 0.5 / 255
# How files begin that are no photos, or photos in formats that are not read.
_OTHER_FILES = (
    (rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript file"),
    (rb"%PDF", "a PDF document"),
    (rb"\s*<(\?xml[^>]*>\s*<)?(!DOCTYPE svg|svg)", "an SVG drawing"),
    (rb"\s*<", "a web page or an XML file"),
    (rb"8BPS", "a Photoshop file"),
    (rb"....ftypcr[xX3]|II\x1a\0\0\0HEAPCCDR|FUJIFILMCCD-RAW|IIU\0|IIR[OS]", "a camera's raw file"),
    (rb"....ftyp(avif|avis)", "an AVIF picture"),
    (rb"....ftyp(heic|heix|heim|heis|hevc|hevx|hevm|hevs|mif1|mif2|msf1)", "a HEIF picture"),
    (rb"....ftyp|....moov|\x1a\x45\xdf\xa3|RIFF....AVI ", "a video"),
    (rb"PK\x03\x04", "a zip archive"),
)

Photo = str | os.PathLike | Image.Image | np.ndarray | bytes | BinaryIO

# Without the pictures beside the photo, which could be damaged too.
pi_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)


class UnreadableImageError(ValueError):
    """What was given is not a picture that can be read; the message says why."""


def load_photo(photo: Photo, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads a photo into a new upright sRGB image.

    EXIF's or XMP's rotation is applied, colour profiles are converted to sRGB, and transparency is laid on white.
    Metadata never decides whether a picture can be read: what is damaged of it counts as absent.

    Args:
        photo: a path, the bytes of an image file, a binary file object, a PIL image of any mode, or an array
            [H, W] or [H, W, 1 to 4] (grey, grey + alpha, RGB, RGBA): uint8, uint16, bool, or floating in [0, 1],
            where values up to half an 8-bit step (0.00196) outside are clipped. Files may be of the formats in
            `FORMATS`; of animations and files with several pages the first picture is read. The argument is never
            changed.
        max_pixels: most pixels that are accepted. It is checked before the file is decoded.

    Returns:
        A new PIL image of mode RGB.

    Raises:
        UnreadableImageError: no such file, not an image, damaged, too many pixels, or an array of another kind.
    """
    if isinstance(photo, np.ndarray):
        return _upright_rgb(_image_from_array(photo, max_pixels))
    if isinstance(photo, Image.Image):
        if getattr(photo, "tile", None) and photo.format not in FORMATS:
            raise UnreadableImageError(
                f"the image is an undecoded {photo.format} file, which is not opened here; if you trust it, call its "
                "load() first"
            )
        _check_size("the image", photo.size, max_pixels)
        try:
            return _upright_rgb(photo)
        except (UnreadableImageError, MemoryError):
            raise
        except Exception as error:
            raise UnreadableImageError(f"the image cannot be decoded: {_words(error)}") from error
    with _opened(photo) as (file, name):
        return _read(file, name, max_pixels)


@contextlib.contextmanager
def _opened(photo: str | os.PathLike | bytes | BinaryIO) -> Iterator[tuple[BinaryIO, str]]:
    """The file that was given, at its start and able to seek, and what to call it."""
    if isinstance(photo, (bytes, bytearray, memoryview)):
        yield io.BytesIO(photo), "the file in the given bytes"
    elif isinstance(photo, (str, os.PathLike)):
        name = f"'{os.fsdecode(photo)}'"
        try:
            file = open(photo, "rb")
        except FileNotFoundError:
            raise UnreadableImageError(f"{name} does not exist") from None
        except IsADirectoryError:
            raise UnreadableImageError(f"{name} is a folder, not a photo") from None
        # A ValueError: a zero byte in the path.
        except (OSError, ValueError) as error:
            raise UnreadableImageError(f"{name} cannot be opened: {getattr(error, 'strerror', error)}") from None
        with file:
            yield file, name
    elif hasattr(photo, "read"):
        name = "the given file object"
        try:
            if photo.seekable():
                photo.seek(0)
            data = photo.read()
        except Exception as error:
            raise UnreadableImageError(f"{name} cannot be read: {_words(error)}") from None
        if not isinstance(data, bytes):
            raise UnreadableImageError(f"{name} gives {type(data).__name__}, not bytes; open it in binary mode")
        yield io.BytesIO(data), name
    else:
        raise UnreadableImageError(
            "a photo is a path, the bytes of an image file, a file object, a PIL image or a NumPy array "
            f"[H, W, channels], got {type(photo).__module__}.{type(photo).__name__}"
        )


def _read(file: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    try:
        with _open_image(file, name, max_pixels) as image:
            return _upright_rgb(image)
    except (UnreadableImageError, MemoryError):
        raise
    # Image plugins raise exceptions of many kinds on damaged files, and some on damaged metadata alone.
    except Exception as error:
        failure = error
    file.seek(0)
    start = file.read(64)
    if not start:
        raise UnreadableImageError(f"{name} is empty") from None
    kind = next((words for pattern, words in _OTHER_FILES if re.match(pattern, start, re.DOTALL)), None)
    if isinstance(failure, UnidentifiedImageError) and kind is not None and "HEIF" not in kind and "AVIF" not in kind:
        raise UnreadableImageError(
            f"{name} is {kind}, not an image that can be read here; save it as JPEG or PNG first"
        ) from None
    pixels = without_metadata(start + file.read())
    if pixels is not None:
        try:
            with _open_image(io.BytesIO(pixels[0]), name, max_pixels) as image:
                image.info.update(pixels[1])
                return _upright_rgb(image)
        except (UnreadableImageError, MemoryError):
            raise
        # The first failure says more.
        except Exception:
            pass
    if pixels is None and isinstance(failure, UnidentifiedImageError):
        raise UnreadableImageError(
            f"{name} is not an image that can be read: its contents are of none of the formats {', '.join(FORMATS)}"
        ) from None
    raise UnreadableImageError(f"{name} is damaged and cannot be decoded: {_words(failure)}") from None


def _open_image(file: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    """The undecoded image of a file, no larger than is accepted."""
    # Formats that Pillow was built without are not registered.
    Image.init()
    try:
        image = Image.open(file, formats=[kind for kind in FORMATS if kind in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
        raise UnreadableImageError(_too_many_pixels(name, "far more pixels", limit)) from None
    _check_size(name, image.size, max_pixels)
    return image


def _words(error: Exception) -> str:
    """An error's message without objects' addresses; its kind where that says more."""
    if isinstance(error, UnidentifiedImageError) or not str(error):
        return "its header or its contents are incomplete"
    text = re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>", "the file", str(error))
    return text if isinstance(error, (OSError, SyntaxError, ValueError)) else f"{type(error).__name__}: {text}"


def _too_many_pixels(name: str, size: str, max_pixels: int) -> str:
    return f"{name} has {size} than the limit of {max_pixels:,} pixels; scale it down first"


def _check_size(name: str, size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise UnreadableImageError(_too_many_pixels(name, f"{size[0]} x {size[1]} pixels, more", max_pixels))
    if min(size) < 1:
        raise UnreadableImageError(f"{name} is empty ({size[0]} x {size[1]} pixels)")


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    turn = upright_turn(image)
    profile = image.info.get("icc_profile")
    deep = image.mode.startswith("I") or image.mode == "F"
    colours, alpha = _deep_grey(image) if deep else _without_alpha(image)
    rgb = to_srgb(colours, profile)
    if alpha is not None:
        rgb.putalpha(alpha)
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, (255, 255, 255, 255)), rgb).convert("RGB")
    return rgb if turn is None else rgb.transpose(turn)


def _without_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """A picture's colours, and its transparency as a picture of mode L where it has some."""
    if not image.has_transparency_data:
        return image, None
    try:
        mode = "LA" if image.mode in ("L", "LA", "La", "1") else "RGBA"
        image = image if image.mode == mode else image.convert(mode)
        return image.convert(mode[:-1]), image.getchannel("A")
    # A transparent colour that the picture's mode does not have.
    except (ValueError, TypeError, OverflowError):
        image = image.copy()
        image.info.pop("transparency", None)
        return image, None


def _deep_grey(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Grey of modes I and F, as mode I;16 or L, and its transparency. Pillow's own conversion clips at 255."""
    values = np.asarray(image)
    if image.mode == "F":
        return _image_from_array(values, values.size), None
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise UnreadableImageError(f"32-bit integer images must hold 16-bit values, found {low} to {high}")
    transparent, alpha = image.info.get("transparency"), None
    if isinstance(transparent, int):
        alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    return Image.fromarray(values.astype(np.uint16)), alpha


def _image_from_array(array: np.ndarray, max_pixels: int) -> Image.Image:
    what = f"shape {tuple(array.shape)}, {array.dtype}"
    channels = 1 if array.ndim == 2 else array.shape[-1] if array.ndim == 3 else 0
    if not 1 <= channels <= 4:
        hint = "an array must be [H, W] or [H, W, 1 to 4]"
        if array.ndim == 3 and 1 <= array.shape[0] <= 4:
            hint += "; channels come last: array.transpose(1, 2, 0)"
        elif array.ndim == 4:
            hint += ", one picture at a time: array[0]"
        raise UnreadableImageError(f"{hint}; got {what}")
    _check_size("the array", (array.shape[1], array.shape[0]), max_pixels)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        # Exact rounding of v / 257, which maps 65535 to 255.
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    elif array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not np.isfinite([low, high]).all():
            raise UnreadableImageError(f"floating arrays must lie in [0, 1], got values that are not finite; {what}")
        if low < -_FLOAT_TOLERANCE or high > 1 + _FLOAT_TOLERANCE:
            raise UnreadableImageError(
                f"floating arrays must lie in [0, 1], got values from {low:.9g} to {high:.9g}; {what}. Divide values "
                "of 0 to 255 by 255, and take those of -1 to 1 to (array + 1) / 2"
            )
        array = np.rint(array.clip(0, 1) * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        span = f", values from {array.min()} to {array.max()}" if array.dtype.kind in "iu" else ""
        raise UnreadableImageError(
            f"an array must be uint8, uint16, bool or floating in [0, 1], got {what}{span}; an array of 0 to 255 "
            "becomes one with array.astype('uint8')"
        )
    if array.ndim == 3 and channels == 1:
        array = array[..., 0]
    return Image.fromarray(np.ascontiguousarray(array))
