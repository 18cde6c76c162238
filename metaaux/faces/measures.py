"""Expressions, shapes and colours of faces as numbers, by FaceMesh's landmarks."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

#: Names of `face_measures`, in its order.
MEASURES = ("smile", "mouth_open", "eyes_open", "face_width")
#: Names of `mean_colours`' regions, in its order.
REGIONS = ("skin", "background")

# FaceMesh's vertices. Left and right are the picture's.
_MOUTH_CORNERS = (61, 291)
_INNER_LIPS = (13, 14)
_EYES = (((33, 133), (159, 145)), ((362, 263), (386, 374)))  # corners, lids
_EYE_CORNERS = (33, 263)
_CHEEKS = (234, 454)
_FOREHEAD_CHIN = (10, 152)
# Outlines of what beards, hair, spectacles and lips leave free of the cheeks.
_CHEEK_OUTLINES = (
    (117, 118, 119, 100, 142, 203, 206, 207, 187, 123),
    (346, 347, 348, 329, 371, 423, 426, 427, 411, 352),
)


def face_measures(landmarks: np.ndarray) -> dict[str, float]:
    """Ratios of distances, so that the size of the face plays no part; made for faces seen from the front.

    Args:
        landmarks: [468, 3], x to the right, y down, z away, of one unit.

    Returns:
        smile: width of the mouth plus twice the height of its corners over its middle, over the distance of the outer
            corners of the eyes; mouth_open: gap between the lips over the same; eyes_open: gap between the lids over
            the width of the eye, mean of both; face_width: distance of the cheeks over that of forehead and chin.

    Raises:
        ValueError: the landmarks are not [468, 3].
    """
    landmarks = _checked(landmarks)

    def length(pair: tuple[int, int]) -> float:
        return float(np.linalg.norm(landmarks[pair[0]] - landmarks[pair[1]]))

    unit = length(_EYE_CORNERS)
    lift = landmarks[list(_INNER_LIPS), 1].mean() - landmarks[list(_MOUTH_CORNERS), 1].mean()
    return {
        "smile": (length(_MOUTH_CORNERS) + 2 * float(lift)) / unit,
        "mouth_open": length(_INNER_LIPS) / unit,
        "eyes_open": sum(length(lids) / length(corners) for corners, lids in _EYES) / 2,
        "face_width": length(_CHEEKS) / length(_FOREHEAD_CHIN),
    }


def mean_colours(pixels: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """Mean colours of a crop's skin and background: how it is lit, and before what.

    Args:
        pixels: a face's crop, uint8 [S, S, 3], sRGB.
        landmarks: [468, 3], x, y in its pixels.

    Returns:
        [2, 3] float64 in [0, 1]: of the `REGIONS`, red, green and blue. Skin is that of the cheeks, not-a-numbers
        where none of them lies in the crop; background as `background_colour` has it.

    Raises:
        ValueError: the pixels are not uint8 [S, S, 3], or the landmarks not [468, 3].
    """
    background, landmarks = background_colour(pixels), _checked(landmarks)
    side = len(pixels)
    mask = Image.new("1", (side, side))
    for outline in _CHEEK_OUTLINES:
        # Whole numbers are the centres of Pillow's pixels, and halves those of the landmarks'.
        ImageDraw.Draw(mask).polygon([tuple(point) for point in landmarks[list(outline), :2] - 0.5], fill=1)
    skin = pixels[np.asarray(mask)]
    return np.stack([skin.mean(0) / 255 if len(skin) else np.full(3, np.nan), background])


def background_colour(pixels: np.ndarray) -> np.ndarray:
    """Mean colour of what the outermost sixteenths of a crop to the left and right show in its upper half, where few
    heads reach.

    Args:
        pixels: a face's crop, uint8 [S, S, 3], sRGB.

    Returns:
        [3] float64 in [0, 1].

    Raises:
        ValueError: the pixels are not uint8 [S, S, 3], S at least 16.
    """
    side = len(pixels)
    if pixels.dtype != np.uint8 or pixels.shape != (side, side, 3) or side < 16:
        raise ValueError(f"a crop's pixels are uint8 [S, S, 3], S >= 16, got {pixels.dtype} {list(pixels.shape)}")
    upper, edge = pixels[: side // 2], side // 16
    return np.concatenate([upper[:, :edge], upper[:, -edge:]], axis=1).mean((0, 1)) / 255


def _checked(landmarks: np.ndarray) -> np.ndarray:
    landmarks = np.asarray(landmarks, dtype=np.float64)
    if landmarks.shape != (468, 3):
        raise ValueError(f"landmarks are FaceMesh's 468 vertices [468, 3], got {list(landmarks.shape)}")
    return landmarks
