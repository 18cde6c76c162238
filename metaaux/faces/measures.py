"""Expressions and shapes of faces as numbers, from FaceMesh's landmarks alone."""

from __future__ import annotations

import numpy as np

#: Names of `face_measures`, in its order.
MEASURES = ("smile", "mouth_open", "eyes_open", "face_width")

# FaceMesh's vertices. Left and right are the picture's.
_MOUTH_CORNERS = (61, 291)
_INNER_LIPS = (13, 14)
_EYES = (((33, 133), (159, 145)), ((362, 263), (386, 374)))  # corners, lids
_EYE_CORNERS = (33, 263)
_CHEEKS = (234, 454)
_FOREHEAD_CHIN = (10, 152)


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
    landmarks = np.asarray(landmarks, dtype=np.float64)
    if landmarks.shape != (468, 3):
        raise ValueError(f"landmarks are FaceMesh's 468 vertices [468, 3], got {list(landmarks.shape)}")

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
