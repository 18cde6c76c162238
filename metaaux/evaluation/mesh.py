"""How much a mesh looks like the views it was made from: drawn as the photo's camera sees it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import trimesh
from PIL import Image

from ..cameras import camera_from_pose
from ..export.mesh import HeadMesh, extract_mesh
from ..export.raster import render_mesh
from ..files import atomic_path, write_json
from ..inversion import Inversion
from ..pipeline import MetaAuxInverter

#: Yaw and pitch in degrees of the views in the picture that `evaluate_mesh` draws.
PICTURE_VIEWS = ((-45, 0), (0, 0), (45, 0))
# Side of each in pixels, and how much further off than the photo's camera they are taken, so that the crown is seen.
_PICTURE_SIDE, _PICTURE_ZOOM = 288, 0.8


def draw_mesh(mesh: HeadMesh, camera: torch.Tensor, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A mesh's own colours, without any light, in perspective.

    Args:
        mesh: with a texture, which is looked up bilinearly, or with vertex colours.
        camera: [25].
        size: side of the picture in pixels.

    Returns:
        Picture float64 [size, size, 3] in [0, 255], white where nothing is, and bool [size, size], where something is.
    """
    fragments = render_mesh(mesh.vertices, mesh.faces, camera, size)
    picture = np.full((size, size, 3), 255.0)
    if mesh.texture is None:
        picture[fragments.covered] = fragments.interpolate(mesh.colours, mesh.faces)
    else:
        grid = torch.from_numpy(fragments.interpolate(mesh.uv, mesh.faces))[None, None] * 2 - 1
        texture = torch.from_numpy(mesh.texture).double().permute(2, 0, 1)[None]
        texels = F.grid_sample(texture, grid, padding_mode="border", align_corners=False)
        picture[fragments.covered] = texels[0, :, 0].T.numpy()
    return picture, fragments.covered


def evaluate_mesh(
    inverter: MetaAuxInverter,
    inversion: Inversion,
    out: Path,
    resolution: int,
    texture: int,
    progress: Callable[[float], None],
) -> dict[str, float | int | bool]:
    """Compares a mesh with vertex colours and one with a texture to the view of the photo's own camera.

    Writes results.json and mesh.jpg, both meshes from three sides, vertex colours left, into `out`.

    Args:
        inverter: whose generator made `inversion`.
        inversion: the head.
        out: an existing folder.
        resolution: cells along each side of the generator's cube.
        texture: side of the texture in texels.
        progress: called with the share that is done, 0 to 1.

    Returns:
        `vertex_colours` and `texture`, mean absolute differences of 8-bit colours where both meshes are seen,
        `reduction`, by what share the second is smaller, `pixels` that were compared; and of the textured mesh, its
        vertices of one position merged, `watertight`, `pieces`, `vertices` and `faces`.

    Raises:
        ValueError: as [`~metaaux.export.mesh.extract_mesh`].
    """
    head = inverter.prepare(inversion)
    meshes = (
        extract_mesh(inverter.generator, head, resolution, lambda share: progress(share / 2)),
        extract_mesh(inverter.generator, head, resolution, lambda share: progress(0.5 + share / 2), texture),
    )
    view = np.asarray(inverter.render(head)).astype(np.float64)
    drawn = [draw_mesh(mesh, head.camera, len(view)) for mesh in meshes]
    both = drawn[0][1] & drawn[1][1]
    difference = [float(np.abs(picture - view)[both].mean()) for picture, _ in drawn]
    welded = trimesh.Trimesh(meshes[1].vertices, meshes[1].faces)
    results = {
        "vertex_colours": difference[0],
        "texture": difference[1],
        "reduction": 1 - difference[1] / difference[0],
        "pixels": int(both.sum()),
        "watertight": bool(welded.is_watertight),
        "pieces": int(welded.body_count),
        "vertices": len(welded.vertices),
        "faces": len(welded.faces),
    }
    write_json(results, out / "results.json")
    with atomic_path(out / "mesh.jpg") as temporary:
        _picture(meshes, head.camera).save(temporary, quality=92)
    return results


def _picture(meshes: tuple[HeadMesh, ...], camera: torch.Tensor) -> Image.Image:
    radius, focal = float(camera[[3, 7, 11]].norm()), _PICTURE_ZOOM * float(camera[16])
    cameras = [camera_from_pose(float(yaw), float(pitch), radius, focal) for yaw, pitch in PICTURE_VIEWS]
    views = [draw_mesh(mesh, each, _PICTURE_SIDE)[0] for mesh in meshes for each in cameras]
    return Image.fromarray(np.hstack(views).round().astype(np.uint8))
