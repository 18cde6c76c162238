"""A head's surface as a closed, coloured mesh: marching cubes on the density, colours from the renderer."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import ndimage
from scipy.sparse import coo_array, csr_array, diags_array, eye_array
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import splu

from ..cameras import camera_from_pose, project_points
from ..files import atomic_path
from ..models.eg3d import EG3DGenerator

if TYPE_CHECKING:
    from ..head import Head

#: Cells along each side of the generator's cube.
DEFAULT_RESOLUTION = 192
# Density before activation on the surface. EG3D extracts its shapes at 10 too: half a step of a ray inside of it is
# opaque, and densities rise so steeply there that the surface hardly depends on it.
_LEVEL = 10.0
# What is kept of the cube, in shares of its half side: no camera of the training looks behind the head or past the
# picture's border, so what lies there is arbitrary. A superellipsoid of these half axes about this centre rounds it.
_CENTRE = (0.0, 0.0, 0.1)
_HALF_AXES = (0.56, 0.64, 0.54)
_EXPONENT = 4
# Width of the filter over the density (shares of the half side), about a texel of the planes: they leave terraces.
_SMOOTHING = 0.011
# Holes up to this wide (shares of the half side) are closed.
_HOLE = 0.06
# Yaw and pitch in degrees of the views that space is carved from, and of those that colours are taken from.
_CARVING_VIEWS = [(yaw, pitch) for yaw in (-40, -20, 0, 20, 40) for pitch in (-20, 0, 20)]
_COLOUR_VIEWS = [(0, 0), (-15, 0), (15, 0), (-30, 0), (30, 0), (0, -18), (0, 18)]
# Points that are evaluated together: some 100 MB of features at the sizes of EG3D.
_CHUNK = 2**17


@dataclass(frozen=True, eq=False)
class HeadMesh:
    """A closed triangle mesh in the generator's world units: x to the viewer's right, y up, the face toward +z.

    Attributes:
        vertices: float32 [V, 3].
        faces: int32 [F, 3], counter-clockwise seen from outside.
        colours: uint8 [V, 3], RGB.
        normals: float32 [V, 3], unit length, outward.
    """

    vertices: np.ndarray
    faces: np.ndarray
    colours: np.ndarray
    normals: np.ndarray


def check_glb_path(path: str | os.PathLike) -> None:
    """Raises ValueError unless `path` ends in `.glb`, FileNotFoundError unless its folder exists."""
    if not os.fspath(path).lower().endswith(".glb"):
        raise ValueError(f"a mesh is written as binary glTF: {os.fspath(path)!r} must end in .glb")
    folder = os.path.dirname(os.path.abspath(os.fspath(path)))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"cannot write {os.fspath(path)}: the folder {folder} does not exist")


def write_glb(mesh: HeadMesh, path: str | os.PathLike) -> None:
    """Writes binary glTF with vertex colours, whole or not at all.

    Colours are linear in the file, as glTF demands, in floats, since eight bits of them would show steps in dark hair.
    There is no material: several programs, trimesh among them, do not read vertex colours beside one.

    Raises:
        ValueError: `path` does not end in `.glb`.
        FileNotFoundError: its folder does not exist.
    """
    import trimesh

    check_glb_path(path)
    srgb = mesh.colours / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4).astype(np.float32)
    surface = trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_normals=mesh.normals, process=False)
    # trimesh's own vertex colours have eight bits; other attributes it writes as they are, their names underscored.
    surface.vertex_attributes["colour"] = np.hstack([linear, np.ones((len(linear), 1), dtype=np.float32)])

    def finish(tree: dict) -> None:
        primitive = tree["meshes"][0]["primitives"][0]
        primitive["attributes"]["COLOR_0"] = primitive["attributes"].pop("_colour")

    scene = trimesh.Scene({"head": surface})
    data = trimesh.exchange.gltf.export_glb(scene, include_normals=True, tree_postprocessor=finish)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


@torch.no_grad()
def extract_mesh(
    generator: EG3DGenerator,
    head: Head,
    resolution: int = DEFAULT_RESOLUTION,
    progress: Callable[[float], None] | None = None,
) -> HeadMesh:
    """Marching cubes on the density of an adapted head, offset tri-plane included.

    No view of the training shows what lies behind the head or past the picture, so the density there is arbitrary.
    What all views within ±40 degrees leave hidden counts as inside, the cube is cut to a rounded shape, and the
    largest piece is kept: a closed surface that can be printed. Hidden parts take the colours of their surroundings.

    Args:
        generator: whose planes `head` holds.
        head: of `MetaAuxInverter.prepare`.
        resolution: cells along each side of the generator's cube, 16 to 512. Time and memory grow with its cube.
        progress: called with the share that is done, 0 to 1.

    Raises:
        ValueError: `resolution` is out of range, or the head has no surface.
    """
    from skimage.measure import marching_cubes

    if not 16 <= resolution <= 512:
        raise ValueError(f"the resolution of a mesh must be 16 to 512, got {resolution}")
    report = progress or (lambda share: None)
    half = generator.config.box_size / 2
    steps = np.linspace(-1, 1, resolution + 1, dtype=np.float32)  # of the cube's half side
    field = _field(generator, head, steps, half, lambda share: report(0.8 * share))
    if field.max() <= 0:
        raise ValueError("this head has no surface: its density is low everywhere")
    vertices, faces, _, _ = marching_cubes(field, 0.0, gradient_direction="ascent")
    vertices = (vertices * (2 / resolution) - 1).astype(np.float32) * half
    vertices, faces = _largest_piece(vertices, faces)
    normals = _normals(vertices, faces)
    report(0.9)
    colours = _colours(generator, head, vertices, faces, normals)
    report(1.0)
    return HeadMesh(vertices, faces.astype(np.int32), colours, normals)


def _field(generator, head, steps, half, report) -> np.ndarray:
    """[N, N, N] over x, y, z: above 0 inside of the closed head."""
    relative = [np.abs((steps - c) / a) ** _EXPONENT for c, a in zip(_CENTRE, _HALF_AXES)]
    # Falls from 1 in the middle to 0 on the cut.
    cut = 1 - (relative[0][:, None, None] + relative[1][:, None] + relative[2]) ** (1 / _EXPONENT)
    density = np.full(cut.shape, -_LEVEL, dtype=np.float32)
    inside = np.argwhere(cut > 0)
    points = torch.from_numpy(steps * np.float32(half))[torch.from_numpy(inside)]
    for start in range(0, len(points), _CHUNK):
        rows = slice(start, start + _CHUNK)
        values = generator.density(head.planes, points[None, rows].to(head.planes.device), head.offset_planes)
        density[tuple(inside[rows].T)] = values[0, :, 0].float().cpu().numpy()
        report(min(1.0, rows.stop / len(points)))
    cells = (len(steps) - 1) / 2  # of the half side
    # Clipped, so that the filters and marching cubes see the surface and not how dense the core is.
    field = ndimage.gaussian_filter(np.clip(density / _LEVEL - 1, -1.5, 1.5), _SMOOTHING * cells)
    pieces, count = ndimage.label(field > 0)
    if count == 0:
        return field
    # Of the head alone: what hides behind pieces of the background is not the head's.
    dense = pieces == np.bincount(pieces.ravel())[1:].argmax() + 1
    hidden = ndimage.gaussian_filter(_hidden(dense[::2, ::2, ::2]).astype(np.float32), 1.5)
    hidden = ndimage.zoom(hidden, [full / half for full, half in zip(dense.shape, hidden.shape)], order=1)
    solid = dense | ((cut > 0) & (hidden > 0.5))
    closed = _close(solid, _HOLE / 2 * cells)
    filled = ndimage.gaussian_filter(np.where(closed, 1.0, -1.0).astype(np.float32), 2 * _SMOOTHING * cells)
    # The border of the cut is as steep as the filtered mask is.
    rounded = np.clip(cut * cells / 4, -1, 1)
    return np.minimum(np.maximum(field, np.minimum(filled, rounded)), rounded).astype(np.float32)


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


def _largest_piece(vertices, faces):
    """The connected piece of the surface with the most faces, its vertices renumbered."""
    _, piece = connected_components(_neighbours(len(vertices), faces), directed=False)
    largest = np.bincount(piece[faces[:, 0]]).argmax()
    kept = piece == largest
    number = np.cumsum(kept) - 1
    return vertices[kept], number[faces[kept[faces[:, 0]]]]


def _neighbours(count: int, faces: np.ndarray) -> csr_array:
    """Adjacency [count, count] of the vertices of a closed, consistently wound mesh."""
    start, end = faces[:, [0, 1, 2]].ravel(), faces[:, [1, 2, 0]].ravel()
    return coo_array((np.ones(len(start), dtype=bool), (start, end)), shape=(count, count)).tocsr()


def _normals(vertices, faces) -> np.ndarray:
    """Unit normals of the vertices [V, 3]: means of their faces' normals, weighted by area."""
    corners = vertices[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    total = np.zeros_like(vertices)
    for corner in range(3):
        np.add.at(total, faces[:, corner], normals)
    return (total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def _colours(generator, head, vertices, faces, normals) -> np.ndarray:
    """uint8 [V, 3]: of the rendered views, each weighted by how squarely it sees the vertex."""
    points, directions = (torch.from_numpy(array) for array in (vertices, normals))
    total, weight = points.new_zeros(len(points), 3), points.new_zeros(len(points), 1)
    for yaw, pitch in _COLOUR_VIEWS:
        camera = camera_from_pose(float(yaw), float(pitch))
        image = generator.synthesize(
            head.ws, camera[None].to(head.ws.device), head.weight_offsets, head.offset_planes, head.planes
        ).image.float().cpu()  # fmt: skip
        positions, depth = project_points(points, camera)
        seen = _visible(positions, depth) & (positions > 0).all(1) & (positions < 1).all(1)
        toward = torch.nn.functional.normalize(camera[[3, 7, 11]] - points, dim=1)
        # The power keeps one view ahead of the others: a mean of views that differ would be blurred.
        share = ((toward * directions).sum(1).clamp(min=0) ** 6 * seen)[:, None]
        grid = positions[None, None] * 2 - 1
        colours = torch.nn.functional.grid_sample(image, grid, padding_mode="border", align_corners=False)[0, :, 0].T
        total, weight = total + share * colours, weight + share
    known = weight[:, 0] > 0.02
    if not known.any():
        raise ValueError("this head has no surface that any view shows")
    colours = _spread((total / weight.clamp(min=1e-6)).numpy(), known.numpy(), faces)
    return (colours * 127.5 + 127.5).round().clip(0, 255).astype(np.uint8)


def _spread(colours, known, faces) -> np.ndarray:
    """Colours [V, 3] with the unknown ones at rest: each the mean of its neighbours along the surface."""
    neighbours = _neighbours(len(colours), faces).astype(np.float64)
    laplacian = (diags_array(neighbours.sum(1)) - neighbours).tocsr()
    system = laplacian[~known]
    # The small term decides for vertices that are not connected to any known one.
    inner = system[:, ~known] + 1e-6 * eye_array(int((~known).sum()))
    right = 1e-6 * colours[known].mean(0) - system[:, known] @ colours[known]
    spread = colours.copy()
    spread[~known] = splu(inner.tocsc()).solve(right)
    return spread


def _visible(positions: torch.Tensor, depth: torch.Tensor, side: int = 96, tolerance: float = 0.02) -> torch.Tensor:
    """Which points at `positions` [V, 2] (units of the picture) and `depth` [V] no other one is in front of."""
    pixel = (positions.clamp(0, 1 - 1e-6) * side).long()
    index = pixel[:, 1] * side + pixel[:, 0]
    nearest = depth.new_full((side * side,), torch.inf).scatter_reduce(0, index, depth, "amin")
    return depth < nearest[index] + tolerance
