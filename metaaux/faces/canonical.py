"""The canonical face: MediaPipe FaceMesh's 468 vertices of a mean frontal face, in the world units of the cameras."""

from __future__ import annotations

import io
from importlib import resources

import numpy as np


def canonical_face() -> np.ndarray:
    """Vertices [468, 3] float32 of the canonical face, a fresh array at each call.

    World units of [`metaaux.cameras`]: x to the viewer's right, y up, z toward a frontal camera, symmetric
    about x = 0. Rows are FaceMesh's landmark indices: forehead 10, chin 152, nose tip 4 (at z = 0.24).
    """
    data = resources.files("metaaux.faces").joinpath("canonical_face.npy").read_bytes()
    return np.load(io.BytesIO(data), allow_pickle=False)
