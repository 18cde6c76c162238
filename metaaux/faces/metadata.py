"""Metadata of image files: orientation, and files cut down to their pixels where metadata stands in the way.

Nothing here decides whether a picture can be read: whatever is damaged counts as absent.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import Any

from PIL import ExifTags, Image

# How a stored picture is turned upright, for the values 2 to 8 of EXIF's orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Bytes to which a compressed colour profile of a PNG may grow; those of printers have a few megabytes.
_LARGEST_PROFILE = 1 << 24
# TIFF's tags that pixels are decoded by, and the orientation.
_TIFF_TAGS = frozenset(
    (254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332)
) | frozenset((338, 339, 347, 529, 530, 531, 532, 34675))


def upright_turn(image: Image.Image) -> Image.Transpose | None:
    """The transposition that turns a picture upright by its EXIF or XMP orientation, or None.

    Orientations that cannot be read, or are none of 1 to 8, count as 1. Pillow's `exif_transpose` writes all of EXIF
    anew, which fails for what has nothing to do with the orientation.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return _TURNS.get(orientation)
    # Pillow raises what it meets: struct.error, SyntaxError, TypeError, warnings where these are errors, ...
    except Exception:
        return None


def without_metadata(data: bytes) -> tuple[bytes, dict[str, Any]] | None:
    """An image file cut down to what its pixels need, for those whose metadata Pillow gives up on.

    Args:
        data: the whole file.

    Returns:
        The smaller file, and what Pillow would have put into `Image.info` of it: `exif` and `icc_profile`, as far as
        they were found. None where the file is no JPEG, PNG, WebP, TIFF, AVIF or HEIF, or too damaged to tell.
    """
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return _jpeg(data)
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return _png(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data)
        if data[:4] in (b"II*\0", b"MM\0*"):
            return _tiff(data)
        if data[4:8] == b"ftyp":
            return _heif(data)
    except (IndexError, ValueError, struct.error, zlib.error):
        pass
    return None


def _jpeg(data: bytes) -> tuple[bytes, dict[str, Any]]:
    kept, exif, profile, position = [data[:2]], b"", {}, 2
    while True:
        position = data.index(b"\xff", position)
        marker = data[position + 1]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:
            # Padding and markers without contents.
            position += 1 if marker == 0xFF else 2
            continue
        if marker == 0xDA:
            kept.append(data[position:])
            break
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        contents = data[position + 4 : end]
        if marker == 0xE1 and contents.startswith(b"Exif\0\0"):
            exif += contents[6:]
        elif marker == 0xE2 and contents.startswith(b"ICC_PROFILE\0") and len(contents) > 14:
            profile[contents[12]] = contents[14:]
        # JFIF's and Adobe's segments say which colours the channels are.
        elif (marker == 0xE0 and len(contents) >= 14) or (marker == 0xEE and len(contents) >= 12):
            kept.append(data[position:end])
        elif marker != 0xFE and not 0xE0 <= marker <= 0xEF:
            kept.append(data[position:end])
        # A length below its own two bytes would go back.
        position = max(end, position + 2)
    info = {"exif": exif, "icc_profile": b"".join(profile[number] for number in sorted(profile))}
    return b"".join(kept), {key: value for key, value in info.items() if value}


def _png(data: bytes) -> tuple[bytes, dict[str, Any]]:
    kept, info, position = [data[:8]], {}, 8
    # Bytes that a transparent colour has in grey and RGB; palettes have as many as they like.
    transparent = {0: 2, 2: 6}.get(data[25])
    while position + 8 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        end = position + 12 + length
        contents = data[position + 8 : end - 4]
        # Capital letters: the chunks without which there are no pixels.
        if kind[:1].isupper():
            kept.append(data[position:end])
        elif kind == b"tRNS" and zlib.crc32(kind + contents) == int.from_bytes(data[end - 4 : end], "big"):
            if transparent in (None, length):
                kept.append(data[position:end])
        elif kind == b"eXIf":
            info["exif"] = b"Exif\0\0" + contents
        elif kind == b"iCCP":
            compressed = contents.partition(b"\0")[2][1:]
            try:
                info["icc_profile"] = zlib.decompressobj().decompress(compressed, _LARGEST_PROFILE)
            except zlib.error:
                pass
        position = end
    return b"".join(kept), info


def _webp(data: bytes) -> tuple[bytes, dict[str, Any]]:
    kept, info, position = [], {}, 12
    while position + 8 <= len(data):
        kind, length = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], "little")
        end = position + 8 + length + length % 2
        contents = data[position + 8 : position + 8 + length]
        if kind == b"EXIF":
            info["exif"] = contents if contents.startswith(b"Exif\0\0") else b"Exif\0\0" + contents
        elif kind == b"ICCP":
            info["icc_profile"] = contents
        elif kind == b"VP8X":
            # Without the flags that announce profile, EXIF and XMP.
            kept.append(data[position : position + 8] + bytes((contents[0] & ~0x2C,)) + data[position + 9 : end])
        elif kind in (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"):
            kept.append(data[position:end])
        position = end
    chunks = b"".join(kept)
    return b"RIFF" + (len(chunks) + 4).to_bytes(4, "little") + b"WEBP" + chunks, info


def _tiff(data: bytes) -> tuple[bytes, dict[str, Any]]:
    order = "little" if data[:2] == b"II" else "big"
    start = int.from_bytes(data[4:8], order)
    count = int.from_bytes(data[start : start + 2], order)
    entries = [data[start + 2 + 12 * number : start + 14 + 12 * number] for number in range(count)]
    kept = [entry for entry in entries if len(entry) == 12 and int.from_bytes(entry[:2], order) in _TIFF_TAGS]
    # In place, as all else lies at its offset; the zeros end the list of pages.
    directory = len(kept).to_bytes(2, order) + b"".join(kept) + bytes(4)
    return data[:start] + directory + data[start + len(directory) :], {}


def _heif(data: bytes) -> tuple[bytes, dict[str, Any]]:
    # In place, as all else lies at its offset: items of kinds that nobody knows are passed over. Turns are no
    # metadata in these files.
    return re.sub(rb"(infe\x02.{7})(?:Exif|mime)", rb"\1skip", data, flags=re.DOTALL), {}
