"""Colour profiles: pictures in any colour space that a profile describes, as sRGB."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageCms

# The colour space that a profile must describe to count for a picture of a mode.
_SPACES = {"RGB": "RGB", "L": "GRAY", "I;16": "GRAY", "CMYK": "CMYK"}


def to_srgb(image: Image.Image, profile: object) -> Image.Image:
    """Converts a picture without transparency to sRGB: relative colorimetric, with black point compensation.

    A profile that cannot be read, or that describes another colour space than the picture has, counts as none, and
    one that differs from sRGB by rounding alone leaves the pixels as they are.

    Args:
        image: of any mode but those with transparency, with 32 bits or with floating values; grey may have 16 bits.
        profile: an ICC profile's bytes, or None. Without one RGB and grey are taken as sRGB, and CMYK by Pillow's
            plain rule. L*a*b* needs none: it is that of D50, as profiles have it.

    Returns:
        A new picture of mode RGB.
    """
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode != "LAB" and image.mode not in _SPACES:
        image = image.convert("RGB")
    transform = _transform(profile, image.mode)
    if image.mode == "I;16" or (image.mode == "L" and transform is not None):
        return _grey_to_srgb(image, transform)
    if transform is not None and not (image.mode == "RGB" and _is_identity(transform)):
        return ImageCms.applyTransform(image, transform)
    # A copy even of an RGB image: the caller's picture is not shared.
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _grey_to_srgb(image: Image.Image, transform: ImageCms.ImageCmsTransform | None) -> Image.Image:
    values = np.asarray(image)
    levels = np.arange(256 if image.mode == "L" else 65536, dtype=values.dtype)
    # Exact rounding of v / 257, which maps 65535 to 255.
    plain = levels if image.mode == "L" else (levels.astype(np.uint32) + 128) // 257
    table = np.repeat(plain.astype(np.uint8)[:, None], 3, axis=1)
    if transform is not None:
        # By way of a table, since LittleCMS's own shortcuts are coarse in the shadows.
        converted = np.asarray(ImageCms.applyTransform(Image.fromarray(levels[None]), transform))[0]
        if np.abs(converted.astype(int) - table).max() > 1:
            table = converted
    return Image.fromarray(table[values])


def _transform(profile: object, mode: str) -> ImageCms.ImageCmsTransform | None:
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
    if mode in ("L", "I;16"):
        flags |= ImageCms.Flags.NOOPTIMIZE
    try:
        if mode == "LAB":
            source = ImageCms.createProfile("LAB")
        else:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if source.profile.xcolor_space.strip() != _SPACES[mode]:
                return None
        return ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags,
        )
    # Pillow raises what it meets in a damaged profile, or in one without the tables that a conversion needs.
    except Exception:
        return None


def _is_identity(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether a transform of RGB moves no colour of a coarse grid by more than one level of 255."""
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    before = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(len(levels), -1, 3)
    after = np.asarray(ImageCms.applyTransform(Image.fromarray(before), transform))
    return int(np.abs(after.astype(int) - before).max()) <= 1
