"""Colours of a head's surface from rendered views: one a vertex, or a texture on an atlas of charts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import trimesh
from scipy import ndimage
from scipy.sparse import csr_array, diags_array, eye_array
from scipy.sparse.linalg import splu

from ..cameras import project_points
from ..head import Head
from ..models.eg3d import EG3DGenerator
from .raster import rasterize, render_mesh

# Yaw and pitch in degrees of the views that colours are taken from: for vertices, and for a texture, which has the
# photo's own view before them.
_VERTEX_VIEWS = [(0, 0), (-15, 0), (15, 0), (-30, 0), (30, 0), (0, -18), (0, 18)]
_TEXTURE_VIEWS = [(0, 0), (-45, 0), (45, 0), (0, -30), (-25, 35), (25, 35)]
# How far the photo's view goes before another that sees a point as squarely.
_PHOTO = 300.0
# A view counts by this power of the cosine at which it sees a point: it keeps one view ahead of the others, a mean of
# views that differ being blurred.
_POWER = 6
# Views that weigh less than this together do not tell a colour: those around it, spread along the surface, do.
_UNSEEN = 0.02
# What a point may lie behind the surface that a view shows, world units, and a step of depth that is an edge.
_TOLERANCE, _EDGE = 0.01, 0.03
# Triangles of a textured surface: a texel shows more than a corner can, and unwrapping takes seconds for so many.
_TRIANGLES = 12_000
# Texels between charts, so that neither bilinear look-ups nor small mipmaps mix them.
_PADDING = 4


@dataclass(frozen=True, eq=False)
class _View:
    """A rendered view: `image` [1, 3, S, S] in [-1, 1], `depth` [1, 1, D, D] of the surface that it shows, `inner`
    [1, 1, D, D] falling from 1 to 0 within three pixels of the image toward an outline, and how far it goes before
    others."""

    camera: torch.Tensor
    image: torch.Tensor
    depth: torch.Tensor
    inner: torch.Tensor
    preference: float


def colour_vertices(
    generator: EG3DGenerator, head: Head, surface: trimesh.Trimesh, progress: Callable[[float], None]
) -> np.ndarray:
    """uint8 [V, 3], RGB: of the views within ±30 degrees, each weighted by how squarely it sees the vertex.

    Hidden parts take the colours of their surroundings.

    Raises:
        ValueError: no view shows any of the surface.
    """
    cameras = [(_camera(generator, head, yaw, pitch), 1.0) for yaw, pitch in _VERTEX_VIEWS]
    views = _render_views(generator, head, surface, cameras, progress)
    return _to_bytes(_vertex_colours(views, surface))


@dataclass(frozen=True, eq=False)
class Atlas:
    """A surface cut into flat charts.

    Attributes:
        vertices: int64 [U], the surface's vertex that each of the atlas's is; those on a cut occur several times.
        faces: int64 [F, 3] into them.
        uv: float64 [U, 2] in [0, 1], (0, 0) the texture's top left corner.
    """

    vertices: np.ndarray
    faces: np.ndarray
    uv: np.ndarray


def simplify(surface: trimesh.Trimesh, triangles: int = _TRIANGLES) -> trimesh.Trimesh:
    """The surface with at most so many triangles (quadric error metrics), closed as before."""
    import fast_simplification

    if len(surface.faces) <= triangles:
        return surface
    # The more it may err at once the sooner it ends, but the likelier it pinches the surface.
    for aggressiveness in (3, 1):
        vertices, faces = fast_simplification.simplify(
            surface.vertices, surface.faces, target_count=triangles, agg=aggressiveness
        )
        simplified = trimesh.Trimesh(vertices, faces, process=False)
        if simplified.is_watertight and simplified.body_count == 1:
            return simplified
    return surface


def unwrap(surface: trimesh.Trimesh, size: int) -> Atlas:
    """Cuts a surface into charts and packs them into a texture of `size`² texels (xatlas)."""
    import xatlas

    # Not by trimesh's unwrap(): it takes no padding, without which charts bleed into each other.
    packing = xatlas.PackOptions()
    packing.resolution, packing.padding, packing.bilinear = size, _PADDING, True
    atlas = xatlas.Atlas()
    atlas.add_mesh(surface.vertices.astype(np.float32), surface.faces.astype(np.uint32))
    atlas.generate(pack_options=packing)
    vertices, faces, uv = atlas[0]
    return Atlas(vertices.astype(np.int64), faces.astype(np.int64), uv.astype(np.float64))


def bake(
    generator: EG3DGenerator,
    head: Head,
    surface: trimesh.Trimesh,
    atlas: Atlas,
    size: int,
    progress: Callable[[float], None],
) -> tuple[np.ndarray, np.ndarray]:
    """Paints an atlas from the photo's view and six others.

    Each texel takes the mean of the views that show it, weighted by how squarely they do, the photo's far before the
    others; what none shows takes the colours around it, spread along the surface. Texels beside the charts repeat
    the nearest one inside, so that seams do not show.

    Returns:
        Texture uint8 [size, size, 3], RGB, and colours of the surface's vertices uint8 [V, 3].

    Raises:
        ValueError: no view shows any of the surface.
    """
    cameras = [
        (head.camera.cpu(), _PHOTO),
        *((_camera(generator, head, yaw, pitch), 1.0) for yaw, pitch in _TEXTURE_VIEWS),
    ]
    views = _render_views(generator, head, surface, cameras, lambda share: progress(0.8 * share))
    spread = _vertex_colours(views, surface)
    fragments = rasterize(atlas.uv, atlas.faces, size)
    corners = np.concatenate([surface.vertices, surface.vertex_normals, spread], axis=1)[atlas.vertices]
    points, normals, around = np.split(fragments.interpolate(corners, atlas.faces), 3, axis=1)
    colours, weight = _seen(views, points, normals)
    known = np.clip(weight / _UNSEEN, 0, 1)
    texture = np.zeros((size, size, 3), dtype=np.uint8)
    texture[fragments.covered] = _to_bytes(known * colours + (1 - known) * around)
    nearest = ndimage.distance_transform_edt(~fragments.covered, return_distances=False, return_indices=True)
    progress(1.0)
    return texture[tuple(nearest)], _to_bytes(spread)


def _camera(generator: EG3DGenerator, head: Head, yaw: float, pitch: float) -> torch.Tensor:
    """At the distance and focal length of the photo's."""
    camera = head.camera
    return generator.camera_at(float(yaw), float(pitch), float(camera[[3, 7, 11]].norm()), float(camera[16]))


@torch.no_grad()
def _render_views(generator, head, surface, cameras: Sequence[tuple[torch.Tensor, float]], progress) -> list[_View]:
    views = []
    for camera, preference in cameras:
        image = generator.synthesize(
            head.ws,
            camera[None].to(head.ws.device),
            weight_offsets=head.weight_offsets,
            offset_planes=head.offset_planes,
            planes=head.planes,
        ).image
        size = image.shape[-1]
        side = max(size, 256)
        depth = render_mesh(surface.vertices, surface.faces, camera, side).depth
        depth[np.isinf(depth)] = 2 * generator.config.ray_end
        # At an outline a picture's colours are mixed with those of what lies behind it.
        step = ndimage.maximum_filter(depth, 3) - ndimage.minimum_filter(depth, 3)
        inner = ndimage.distance_transform_edt(step < _EDGE) / (3 * side / size)
        maps = (torch.from_numpy(array).float()[None, None] for array in (depth, inner.clip(0, 1)))
        views.append(_View(camera, image.float().cpu().clamp(-1, 1), *maps, preference))
        progress(len(views) / len(cameras))
    return views


def _seen(views: list[_View], points: np.ndarray, normals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colours [M, 3] in [-1, 1] of surface points [M, 3] with `normals` [M, 3], and how much the views that show each
    weigh [M, 1]."""
    points, normals = (torch.from_numpy(np.array(array, dtype=np.float32)) for array in (points, normals))
    normals = F.normalize(normals, dim=1)
    total, weight = points.new_zeros(len(points), 3), points.new_zeros(len(points), 1)
    for view in views:
        positions, depth = project_points(points, view.camera)
        grid = positions[None, None] * 2 - 1

        def look(picture, mode, grid=grid):
            return F.grid_sample(picture, grid, mode, padding_mode="border", align_corners=False)[0, :, 0].T

        shown = depth[:, None] < look(view.depth, "nearest") + _TOLERANCE
        shown &= ((positions > 0) & (positions < 1)).all(dim=1, keepdim=True)
        toward = F.normalize(view.camera[[3, 7, 11]] - points, dim=1)
        cosine = (toward * normals).sum(dim=1, keepdim=True).clamp(min=0)
        share = view.preference * cosine**_POWER * look(view.inner, "bilinear") * shown
        total += share * look(view.image, "bicubic").clamp(-1, 1)
        weight += share
    return (total / weight.clamp(min=1e-9)).double().numpy(), weight.double().numpy()


def _vertex_colours(views: list[_View], surface: trimesh.Trimesh) -> np.ndarray:
    """float64 [V, 3] in [-1, 1]; unseen vertices at rest, each the mean of its neighbours along the surface."""
    colours, weight = _seen(views, surface.vertices, surface.vertex_normals)
    known = weight[:, 0] > _UNSEEN
    if not known.any():
        raise ValueError("this head has no surface that any view shows")
    neighbours = csr_array(surface.edges_sparse, dtype=np.float64)
    laplacian = (diags_array(neighbours.sum(axis=1)) - neighbours).tocsr()
    system = laplacian[~known]
    # The small term decides for vertices that are not connected to any known one.
    inner = system[:, ~known] + 1e-6 * eye_array(int((~known).sum()))
    right = 1e-6 * colours[known].mean(axis=0) - system[:, known] @ colours[known]
    colours[~known] = splu(inner.tocsc()).solve(right)
    return colours


def _to_bytes(colours: np.ndarray) -> np.ndarray:
    return (colours * 127.5 + 127.5).round().clip(0, 255).astype(np.uint8)
