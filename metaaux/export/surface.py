"""A head's closed surface: marching cubes on its density (as EG3D extracts shapes), without the wall behind it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import trimesh
from scipy import ndimage

from ..cameras import camera_from_pose
from ..faces.canonical import canonical_face
from ..head import Head
from ..models.eg3d import EG3DGenerator

# Density before activation on the surface. EG3D extracts its shapes at 10 too: half a step of a ray inside of it is
# opaque, and densities rise so steeply there that the surface hardly depends on it.
_LEVEL = 10.0
# Behind the ears the level rises by this much: the wall on which a generator paints the background reaches densities
# of 10 to 25 there and touches the hair, whose own are above 30.
_WALL = 15.0
# Of the canonical face's vertices: bridge of the nose, top of the forehead, chin.
_BRIDGE, _FOREHEAD, _CHIN = 168, 10, 152
# Length of a head, from the bridge of the nose to its back, over the height of its face. Anthropometry has about 195
# and 185 mm; hair adds some.
_HEAD_LENGTH = 1.08
# Width of the filter over the density (world units), about a texel of the planes: they leave terraces.
_SMOOTHING = 0.0055
# Holes up to this wide (world units) are closed.
_HOLE = 0.03
# Yaw and pitch in degrees of the views that space is carved from. Views from further aside would carve the back of
# the head into a wedge: generators leave it out, since few photos show it.
_CARVING_VIEWS = [(yaw, pitch) for yaw in (-25, 0, 25) for pitch in (-15, 0, 15)]
# Points that are evaluated together: some 100 MB of features at the sizes of EG3D.
_CHUNK = 2**17


@torch.no_grad()
def extract_surface(
    generator: EG3DGenerator, head: Head, resolution: int, progress: Callable[[float], None]
) -> trimesh.Trimesh:
    """The closed surface of a head, world units, in one piece, faces counter-clockwise seen from outside.

    What lies behind the head no photo shows, and the density there is arbitrary, as it is past the picture's border.
    So the cube is cut to what the pictures show and, behind the ears, to an ellipsoid of the length that heads have;
    all that the views within ±25 degrees leave hidden in it counts as inside; and the largest piece is kept.

    Args:
        generator: whose planes `head` holds.
        head: of `MetaAuxInverter.prepare`.
        resolution: cells along each side of the generator's cube.
        progress: called with the share that is done, 0 to 1.

    Raises:
        ValueError: the density is low everywhere.
    """
    from skimage.measure import marching_cubes

    field, corner = _field(generator, head, resolution, progress)
    vertices, faces, _, _ = marching_cubes(field, 0.0, gradient_direction="ascent")
    vertices = vertices * (generator.config.box_size / resolution) + corner
    surface = trimesh.Trimesh(vertices, faces, process=False)
    piece = trimesh.graph.connected_component_labels(surface.face_adjacency, node_count=len(faces))
    surface.update_faces(piece == np.bincount(piece).argmax())
    surface.remove_unreferenced_vertices()
    return surface


def _field(generator, head, resolution, report) -> tuple[np.ndarray, np.ndarray]:
    """Samples [X, Y, Z] of a field that is above 0 inside of the closed head, and the position [3] of the first one.

    They lie on the grid of the generator's cube, of which they are the part about the head.
    """
    half = generator.config.box_size / 2
    cell = 2 * half / resolution
    low, high = _extent(head.camera, half)
    ears = _ears()
    # Two cells beyond the cut on every side, so that the surface is closed.
    first, last = np.floor((low + half) / cell) - 2, np.ceil((high + half) / cell) + 2
    axes = [(np.arange(a, b + 1) * cell - half).astype(np.float32) for a, b in zip(first, last)]
    cut = _cut(axes, low, high, ears)
    inside = np.argwhere(cut > 0)
    points = torch.from_numpy(np.stack([axis[index] for axis, index in zip(axes, inside.T)], axis=1))
    density = np.full(cut.shape, -_LEVEL, dtype=np.float32)
    for start in range(0, len(points), _CHUNK):
        rows = slice(start, start + _CHUNK)
        values = generator.density(head.planes, points[None, rows].to(head.planes.device), head.offset_planes)
        density[tuple(inside[rows].T)] = values[0, :, 0].float().cpu().numpy()
        report(min(1.0, rows.stop / len(points)))
    level = _LEVEL + _WALL * np.clip((ears - axes[2]) / 0.1, 0, 1)
    # Clipped, so that the filters and marching cubes see the surface and not how dense the core is.
    field = ndimage.gaussian_filter(np.clip(density / level - 1, -1.5, 1.5), _SMOOTHING / cell)
    pieces, count = ndimage.label(field > 0)
    if count == 0:
        raise ValueError("this head has no surface: its density is low everywhere")
    # Of the head alone: what hides behind pieces of the background is not the head's.
    dense = pieces == np.bincount(pieces.ravel())[1:].argmax() + 1
    hidden = ndimage.gaussian_filter(_hidden(dense[::2, ::2, ::2]).astype(np.float32), 1.5)
    hidden = ndimage.zoom(hidden, [full / half for full, half in zip(dense.shape, hidden.shape)], order=1)
    closed = _close(dense | ((cut > 0) & (hidden > 0.5)), _HOLE / 2 / cell)
    filled = ndimage.gaussian_filter(np.where(closed, 1.0, -1.0).astype(np.float32), 2 * _SMOOTHING / cell)
    # The border of the cut is as steep as the filtered mask is.
    rounded = np.clip(cut * (half / 4 / cell), -1, 1)
    field = np.minimum(np.maximum(field, np.minimum(filled, rounded)), rounded).astype(np.float32)
    return field, np.array([axis[0] for axis in axes])


def _ears() -> float:
    """z of the canonical face's outermost vertices, which lie before the ears."""
    face = canonical_face()
    return float(face[face[:, 0].argmax(), 2])


def _extent(camera: torch.Tensor, half: float) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest x, y and z [3] of what is kept of a cube of half side `half`.

    A picture reaches as far as its camera's distance and focal length say. Above it is the crown, which views from
    above have shown to the generator, so the cut leaves it room; below it is the breast, which none has.
    """
    reach = float(camera[[3, 7, 11]].norm() / camera[16]) / 2
    face = canonical_face()
    back = face[_BRIDGE, 2] - _HEAD_LENGTH * (face[_FOREHEAD, 1] - face[_CHIN, 1])
    low = np.array([-0.88 * reach, -reach, back])
    high = np.array([0.88 * reach, 1.3 * reach, face[:, 2].max() + 0.1])
    return low.clip(-0.96 * half), high.clip(max=0.96 * half)


def _cut(axes: list[np.ndarray], low: np.ndarray, high: np.ndarray, ears: float) -> np.ndarray:
    """[X, Y, Z] on the grid of `axes`, above 0 in what is kept: falls from 1 in the middle to 0 on the border.

    In front of the ears a rounded block, since the pictures show what there is; behind them an ellipsoid.
    """
    x, y, z = (axis.astype(np.float64) for axis in axes)
    across = np.abs(x / high[0])[:, None, None]
    upright = np.where(y > 0, y / high[1], y / low[1])[None, :, None]
    ahead = np.clip((z - ears) / (high[2] - ears), 0, None)
    behind = np.clip((ears - z) / (ears - low[2]), 0, None)
    power = 4 - 2 * np.clip(2 * behind, 0, 1)
    outline = (across**power + upright**power) ** (1 / power)
    distance = np.where(z < ears, np.hypot(outline, behind), (outline**4 + ahead**4) ** (1 / 4))
    return (1 - distance).astype(np.float32)


def _hidden(dense: np.ndarray) -> np.ndarray:
    """Where [N, N, N] a dense cell lies in front, seen from each of the views from afar."""
    everywhere = np.indices(dense.shape).reshape(3, -1).T - (np.array(dense.shape) - 1) / 2
    blocking = everywhere[dense.ravel()]
    hidden = np.ones(len(everywhere), dtype=bool)
    side = 2 * max(dense.shape)
    for yaw, pitch in _CARVING_VIEWS:
        rotation = camera_from_pose(float(yaw), float(pitch))[:16].view(4, 4)[:3, :3].numpy().astype(np.float64)

        def look(points, rotation=rotation):
            # Two cells a pixel, so that neighbouring cells leave no gap between them.
            local = points @ rotation
            pixel = np.floor(local[:, :2] / 2).astype(np.int64) + side // 2
            return pixel[:, 0] * side + pixel[:, 1], local[:, 2]

        pixel, depth = look(blocking)
        nearest = np.full(side * side, np.inf)
        np.minimum.at(nearest, pixel, depth)
        pixel, depth = look(everywhere[hidden])
        hidden[hidden] = depth > nearest[pixel]
    return hidden.reshape(dense.shape)


def _close(solid: np.ndarray, radius: float) -> np.ndarray:
    """`solid` with everything filled that a ball of `radius` cells cannot reach from the border."""
    margin = int(radius) + 2
    padded = np.pad(solid, margin)
    pieces, _ = ndimage.label(ndimage.distance_transform_edt(~padded) > radius)
    outside = pieces == pieces[0, 0, 0]
    return (ndimage.distance_transform_edt(~outside) > radius)[(slice(margin, -margin),) * 3]
