"""A head's surface as a closed mesh, coloured by vertex or by a texture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..head import Head
from ..models.eg3d import EG3DGenerator

#: Cells along each side of the generator's cube.
DEFAULT_RESOLUTION = 192
#: Side of a texture, texels.
DEFAULT_TEXTURE = 1024


@dataclass(frozen=True, eq=False)
class HeadMesh:
    """A closed triangle mesh in the generator's world units: x to the viewer's right, y up, the face toward +z.

    With a texture, vertices on a seam of its charts occur once a chart, with equal positions and normals: the mesh is
    closed once vertices of one position are taken as one.

    Attributes:
        vertices: float32 [V, 3].
        faces: int32 [F, 3], counter-clockwise seen from outside.
        colours: uint8 [V, 3], RGB.
        normals: float32 [V, 3], unit length, outward.
        uv: float32 [V, 2], positions on the texture, (0, 0) its top left corner, or `None`.
        texture: uint8 [T, T, 3], RGB, or `None`.
    """

    vertices: np.ndarray
    faces: np.ndarray
    colours: np.ndarray
    normals: np.ndarray
    uv: np.ndarray | None = None
    texture: np.ndarray | None = None


def extract_mesh(
    generator: EG3DGenerator,
    head: Head,
    resolution: int = DEFAULT_RESOLUTION,
    progress: Callable[[float], None] | None = None,
    texture: int | None = None,
) -> HeadMesh:
    """The closed surface of an adapted head, offset tri-plane included, with colours from rendered views.

    See [`~metaaux.export.surface.extract_surface`] for the shape; it can be printed. Hidden parts take the colours of
    their surroundings.

    Args:
        generator: whose planes `head` holds.
        head: of `MetaAuxInverter.prepare`.
        resolution: cells along each side of the generator's cube, 16 to 512. Time and memory grow with its cube.
        progress: called with the share that is done, 0 to 1.
        texture: side in texels, 64 to 2048, of a texture baked from views, the photo's first; the surface then has
            about 12,000 triangles. `None` or 0: each vertex has a colour instead.

    Raises:
        ValueError: `resolution` or `texture` is out of range, or the head has no surface.
    """
    # trimesh takes a quarter of a second, which a pipeline that makes no mesh need not wait for.
    from .surface import extract_surface
    from .texture import bake, colour_vertices, simplify, unwrap

    check_sizes(resolution, texture)
    report = progress or (lambda share: None)
    surface = extract_surface(generator, head, resolution, lambda share: report(0.4 * share))
    if not texture:
        colours = colour_vertices(generator, head, surface, lambda share: report(0.4 + 0.6 * share))
        return HeadMesh(
            vertices=np.asarray(surface.vertices, dtype=np.float32),
            faces=np.asarray(surface.faces, dtype=np.int32),
            colours=colours,
            normals=np.asarray(surface.vertex_normals, dtype=np.float32),
        )
    surface = simplify(surface)
    atlas = unwrap(surface, texture)
    report(0.6)
    picture, colours = bake(generator, head, surface, atlas, texture, lambda share: report(0.6 + 0.4 * share))
    return HeadMesh(
        vertices=np.asarray(surface.vertices[atlas.vertices], dtype=np.float32),
        faces=atlas.faces.astype(np.int32),
        colours=colours[atlas.vertices],
        normals=np.asarray(surface.vertex_normals[atlas.vertices], dtype=np.float32),
        uv=atlas.uv.astype(np.float32),
        texture=picture,
    )


def check_sizes(resolution: int, texture: int | None) -> None:
    """Raises ValueError unless `extract_mesh` takes these sizes."""
    if not 16 <= resolution <= 512:
        raise ValueError(f"the resolution of a mesh must be 16 to 512, got {resolution}")
    if texture and not 64 <= texture <= 2048:
        raise ValueError(f"the texture of a mesh must have 64 to 2048 texels a side, or be 0 for none, got {texture}")
