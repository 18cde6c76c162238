"""A z-buffer: which triangle of a mesh each pixel of a picture, or texel of a texture, shows, and where on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..cameras import project_points

# Candidates, pairs of a triangle and a pixel of its bounding box, that are tested together: some 300 MB.
_CHUNK = 2**21


@dataclass(frozen=True, eq=False)
class Fragments:
    """What each pixel's centre shows.

    Attributes:
        face: int64 [H, W], index of the nearest triangle, -1 where there is none.
        weights: float64 [H, W, 3], shares of that triangle's corners in the point shown: barycentric coordinates on
            the triangle in space, perspective included. 0 where there is none.
        depth: float64 [H, W], along the optical axis; infinite where there is none.
    """

    face: np.ndarray
    weights: np.ndarray
    depth: np.ndarray

    @property
    def covered(self) -> np.ndarray:
        """bool [H, W]."""
        return self.face >= 0

    def interpolate(self, values: np.ndarray, faces: np.ndarray) -> np.ndarray:
        """Values [V, C] of the vertices of `faces` [F, 3] → float64 [covered pixels, C], in the order of `covered`."""
        corners = values[faces[self.face[self.covered]]].astype(np.float64)
        return np.einsum("pk,pkc->pc", self.weights[self.covered], corners)


def rasterize(positions: np.ndarray, faces: np.ndarray, size: int, depth: np.ndarray | None = None) -> Fragments:
    """Draws triangles into a picture of `size`² pixels.

    A pixel shows the nearest triangle that its centre lies in, borders included, from whichever side; among equally
    near ones the first.

    Args:
        positions: vertices [V, 2] in units of the picture's side, (0, 0) its top left corner.
        faces: [F, 3].
        size: side of the picture in pixels.
        depth: of the vertices [V], along the optical axis; triangles with a vertex at 0 or behind it are left out.
            Default: all are equally far.
    """
    pixels = np.asarray(positions, dtype=np.float64) * size - 0.5  # whole numbers are pixels' centres
    depth = np.ones(len(pixels)) if depth is None else np.asarray(depth, dtype=np.float64)
    corners, depths = pixels[faces], depth[faces]
    low = np.ceil(corners.min(axis=1).clip(0, size)).astype(np.int64)
    high = np.floor(corners.max(axis=1).clip(-1, size - 1)).astype(np.int64)
    extent = (high - low + 1).clip(min=0) * (depths > 0).all(axis=1)[:, None]
    counts = extent.prod(axis=1)
    buffers = np.full(size * size, -1), np.zeros((size * size, 3)), np.full(size * size, np.inf)
    ends = counts.cumsum()
    # Triangles in groups of about _CHUNK candidates.
    for part in np.split(np.arange(len(faces)), np.flatnonzero(np.diff(ends // _CHUNK)) + 1):
        _draw(buffers, part, corners, depths, low, extent, counts, size)
    face, weights, nearest = buffers
    return Fragments(face.reshape(size, size), weights.reshape(size, size, 3), nearest.reshape(size, size))


def _draw(buffers, part, corners, depths, low, extent, counts, size) -> None:
    triangle = np.repeat(part, counts[part])
    first = np.repeat(counts[part].cumsum() - counts[part], counts[part])
    row, column = np.divmod(np.arange(len(triangle)) - first, extent[triangle, 0])
    column, row = column + low[triangle, 0], row + low[triangle, 1]
    a, b, c = corners[triangle].transpose(1, 2, 0)
    area = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
    with np.errstate(divide="ignore", invalid="ignore"):  # of triangles seen edge-on, which are dropped
        weight_b = ((column - a[0]) * (c[1] - a[1]) - (row - a[1]) * (c[0] - a[0])) / area
        weight_c = ((b[0] - a[0]) * (row - a[1]) - (b[1] - a[1]) * (column - a[0])) / area
        weights = np.stack([1 - weight_b - weight_c, weight_b, weight_c], axis=1)
    # Rounding must not leave a gap between two triangles.
    inside = (weights >= -1e-9).all(axis=1)
    triangle, weights, pixel = triangle[inside], weights[inside], row[inside] * size + column[inside]
    # Linear on the screen is what is divided by the depth.
    weights = weights / depths[triangle]
    depth = 1 / weights.sum(axis=1)
    order = np.lexsort((triangle, depth, pixel))
    order = order[np.diff(pixel[order], prepend=-1) > 0]
    order = order[depth[order] < buffers[2][pixel[order]]]
    for buffer, values in zip(buffers, (triangle, weights * depth[:, None], depth)):
        buffer[pixel[order]] = values[order]


def render_mesh(vertices: np.ndarray, faces: np.ndarray, camera: torch.Tensor, size: int) -> Fragments:
    """Rasterises a mesh as a camera sees it.

    Args:
        vertices: [V, 3], world units.
        faces: [F, 3].
        camera: [25].
        size: side of the picture in pixels.
    """
    points = torch.as_tensor(np.ascontiguousarray(vertices), dtype=torch.float64)
    positions, depth = project_points(points, camera.detach().cpu().double())
    return rasterize(positions.numpy(), faces, size, depth.numpy())
