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


def region_masks(side: int, landmarks: np.ndarray) -> np.ndarray:
    """Where a face's crop shows skin and background.

    Args:
        side: of the crop, pixels.
        landmarks: [468, 3], x, y in its pixels.

    Returns:
        bool [2, side, side], of the `REGIONS`: the cheeks, of which a crop need not show any; and `background_mask`.

    Raises:
        ValueError: the side is below 16, or the landmarks are not [468, 3].
    """
    background, landmarks = background_mask(side), _checked(landmarks)
    mask = Image.new("1", (side, side))
    for outline in _CHEEK_OUTLINES:
        # Whole numbers are the centres of Pillow's pixels, and halves those of the landmarks'.
        ImageDraw.Draw(mask).polygon([tuple(point) for point in landmarks[list(outline), :2] - 0.5], fill=1)
    return np.stack([np.asarray(mask), background])


def background_mask(side: int) -> np.ndarray:
    """The outermost sixteenths of a crop to the left and right in its upper half, where few heads reach: bool
    [side, side].

    Raises:
        ValueError: the side is below 16.
    """
    if side < 16:
        raise ValueError(f"a crop has at least 16 pixels a side, got {side}")
    edge = np.minimum(np.arange(side), np.arange(side)[::-1]) < side // 16
    return np.broadcast_to(edge, (side, side)) & (np.arange(side) < side // 2)[:, None]


def mean_colours(pixels: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Mean colour of each region of a crop: how it is lit, and before what.

    Args:
        pixels: uint8 [S, S, 3], sRGB.
        masks: bool [R, S, S], such as `region_masks`.

    Returns:
        [R, 3] float64 in [0, 1]; not-a-numbers where a region is empty.

    Raises:
        ValueError: the pixels are not uint8 [S, S, 3], or the masks not of their size.
    """
    pixels, masks = np.asarray(pixels), np.asarray(masks)
    if pixels.dtype != np.uint8 or pixels.shape != (len(pixels), len(pixels), 3):
        raise ValueError(f"a crop's pixels are uint8 [S, S, 3], got {pixels.dtype} {list(pixels.shape)}")
    if masks.dtype != bool or masks.shape[1:] != pixels.shape[:2]:
        raise ValueError(f"regions of {list(pixels.shape[:2])} pixels are bool masks, got {masks.dtype} {masks.shape}")
    return np.stack([pixels[mask].mean(0) / 255 if mask.any() else np.full(3, np.nan) for mask in masks])


def _checked(landmarks: np.ndarray) -> np.ndarray:
    landmarks = np.asarray(landmarks, dtype=np.float64)
    if landmarks.shape != (468, 3):
        raise ValueError(f"landmarks are FaceMesh's 468 vertices [468, 3], got {list(landmarks.shape)}")
    return landmarks
