"""Meshes as files: binary glTF, Wavefront OBJ with its material and texture, PLY."""

from __future__ import annotations

import io
import os
import re
import zlib
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from PIL import Image

from ..files import atomic_path, check_output_file
from .mesh import HeadMesh

#: Endings of the files that [`write_mesh`] makes.
MESH_SUFFIXES = (".glb", ".obj", ".ply")
# Skin, hair and cloth reflect next to nothing like a mirror, and the views hold what light there was.
_ROUGHNESS = 0.9


def check_mesh_path(path: str | os.PathLike, suffixes: tuple[str, ...] = MESH_SUFFIXES) -> None:
    """Checks that a mesh can be written to `path`, before the work that it takes.

    Raises:
        ValueError: `path` ends in none of `suffixes`.
        OSError: as [`~metaaux.files.check_output_file`].
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        endings = " or ".join(filter(None, [", ".join(suffixes[:-1]), suffixes[-1]]))
        raise ValueError(f"the ending of a mesh's file says what it holds: {str(path)!r} must end in {endings}")
    check_output_file(path)


def write_mesh(mesh: HeadMesh, path: str | os.PathLike) -> None:
    """Writes a mesh in the format that the ending of `path` names, whole or not at all.

    `.glb`: with its texture, else vertex colours. `.obj`: with its texture as a PNG beside it and a material (MTL),
    named after `path`, else with vertex colours. `.ply`: with vertex colours, since few programs read a PLY's texture.

    Raises:
        ValueError: another ending.
        FileNotFoundError: the folder of `path` does not exist.
        IsADirectoryError: there is a folder of that name.
    """
    check_mesh_path(path)
    {".glb": write_glb, ".obj": write_obj, ".ply": write_ply}[Path(path).suffix.lower()](mesh, path)


def write_glb(mesh: HeadMesh, path: str | os.PathLike) -> None:
    """Writes binary glTF, whole or not at all: a rough material with the texture, or vertex colours.

    Vertex colours are linear in the file, as glTF demands, in floats, since eight bits of them would show steps in
    dark hair. There is no material then: several programs, trimesh among them, do not read vertex colours beside one.

    Raises:
        ValueError: `path` does not end in `.glb`.
        FileNotFoundError: its folder does not exist.
    """
    import trimesh  # see `mesh.extract_mesh`

    check_mesh_path(path, (".glb",))
    surface = trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_normals=mesh.normals, process=False)
    finish = None
    if mesh.texture is not None:
        material = trimesh.visual.material.PBRMaterial(
            name="head", baseColorTexture=_picture(mesh), metallicFactor=0.0, roughnessFactor=_ROUGHNESS
        )
        surface.visual = trimesh.visual.TextureVisuals(_uv(mesh), material=material)
    else:
        srgb = mesh.colours / 255
        linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4).astype(np.float32)
        # trimesh's own vertex colours have eight bits; other attributes it writes as they are, names underscored.
        surface.vertex_attributes["colour"] = np.hstack([linear, np.ones((len(linear), 1), dtype=np.float32)])

        def finish(tree: dict) -> None:
            primitive = tree["meshes"][0]["primitives"][0]
            primitive["attributes"]["COLOR_0"] = primitive["attributes"].pop("_colour")

    scene = trimesh.Scene({"head": surface})
    data = trimesh.exchange.gltf.export_glb(scene, include_normals=True, tree_postprocessor=finish)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_obj(mesh: HeadMesh, path: str | os.PathLike) -> None:
    """Writes Wavefront OBJ; with a texture also its material, `.mtl`, and picture, `.png`: all of them or none.

    An OBJ names its material in a line without quotes, so of the name of `path` only letters, digits, `-`, `_` and
    `.` go into the two others' names; where that is not all of it, a checksum keeps them apart.

    Raises:
        ValueError: `path` does not end in `.obj`.
        FileNotFoundError: its folder does not exist.
    """
    check_mesh_path(path, (".obj",))
    path = Path(path)
    files = {}
    if mesh.texture is not None:
        name = re.sub(r"[^A-Za-z0-9._-]", "_", path.stem)
        if name != path.stem:
            name = f"{name[:200]}-{zlib.crc32(os.fsencode(path.stem)):08x}"
        picture = io.BytesIO()
        _picture(mesh).save(picture, format="PNG")
        files[path.with_name(f"{name}.png")] = picture.getvalue()
        material = f"newmtl head\nKa 0 0 0\nKd 1 1 1\nKs 0 0 0\nillum 1\nmap_Kd {name}.png\n"
        files[path.with_name(f"{name}.mtl")] = material.encode()
        lines = [f"mtllib {name}.mtl\n", "usemtl head\n", *_rows("v", mesh.vertices), *_rows("vt", _uv(mesh))]
        corner = "{0}/{0}/{0}"
    else:
        lines = _rows("v", np.hstack([mesh.vertices, mesh.colours / 255]))
        corner = "{0}//{0}"
    lines += _rows("vn", mesh.normals)
    row = f"f {corner} {corner.replace('0', '1')} {corner.replace('0', '2')}\n"
    lines += [row.format(*face) for face in (mesh.faces + 1).tolist()]
    files[path] = "".join(lines).encode()
    with ExitStack() as stack:
        # Renamed from the last to the first once all are written: the mesh after what it refers to.
        for target in reversed(files):
            stack.enter_context(atomic_path(target)).write_bytes(files[target])


def write_ply(mesh: HeadMesh, path: str | os.PathLike) -> None:
    """Writes binary PLY with normals and vertex colours, whole or not at all.

    Raises:
        ValueError: `path` does not end in `.ply`.
        FileNotFoundError: its folder does not exist.
    """
    import trimesh  # see `mesh.extract_mesh`

    check_mesh_path(path, (".ply",))
    surface = trimesh.Trimesh(
        mesh.vertices, mesh.faces, vertex_normals=mesh.normals, vertex_colors=mesh.colours, process=False
    )
    with atomic_path(path) as temporary:
        temporary.write_bytes(trimesh.exchange.ply.export_ply(surface, vertex_normal=True))


def _picture(mesh: HeadMesh) -> Image.Image:
    return Image.fromarray(mesh.texture)


def _uv(mesh: HeadMesh) -> np.ndarray:
    """With (0, 0) at the texture's bottom left corner, as OBJ has it; trimesh turns it over for glTF."""
    return mesh.uv * [1, -1] + [0, 1]


def _rows(key: str, values: np.ndarray) -> list[str]:
    row = key + " {:.6f}" * values.shape[1] + "\n"
    return [row.format(*value) for value in values.tolist()]
