"""Meshes: position, closure, colours and texture on a head whose shape is known, and on the embedded checkpoint."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
import trimesh
from conftest import ROOT
from PIL import Image
from typer.testing import CliRunner

from metaaux import Head, Inversion, MetaAuxInverter, cli
from metaaux.export.mesh import DEFAULT_RESOLUTION, DEFAULT_TEXTURE, HeadMesh, extract_mesh
from metaaux.export.mesh_files import write_glb, write_mesh
from metaaux.export.raster import rasterize
from metaaux.faces import camera_from_pose, project_points
from metaaux.models.eg3d import EG3DGenerator

RADIUS = 0.2


@pytest.fixture(scope="module")
def ball():
    """A generator and a head that is a ball of `RADIUS` about the origin: its planes hold -x²-y² and -z², and its
    decoder passes their sum on as density."""
    torch.manual_seed(0)
    generator = EG3DGenerator(
        z_dim=8,
        w_dim=8,
        image_size=64,
        plane_resolution=64,
        plane_features=4,
        channel_base=256,
        channel_max=8,
        plane_axes=("xy", "xz", "zy"),
        decoder_hidden=4,
        neural_resolution=32,
        depth_samples=16,
        importance_samples=16,
        super_resolution_kind="2X",
    )
    generator = generator.eval().requires_grad_(False)
    hidden, out = generator.decoder.hidden, generator.decoder.out
    for layer in (hidden, out):
        layer.weight.zero_()
        layer.bias.zero_()
    hidden.weight[0, 0] = 1000 / hidden.weight_gain
    out.weight[0, 0] = 1 / out.weight_gain
    out.weight[1:] = 1e-3 * torch.randn(out.weight[1:].shape)

    centres = (torch.arange(64) + 0.5) / 64 - 0.5
    height, width = torch.meshgrid(centres, centres, indexing="ij")
    planes = torch.zeros(1, 3, 4, 64, 64)
    # Planes are averaged; density 10 is the surface.
    planes[0, 0, 0] = 3 * (RADIUS**2 + 0.01 - height**2 - width**2)
    planes[0, 1, 0] = -3 * height**2
    head = Head(
        ws=torch.randn(1, 8), planes=planes, weight_offsets={}, offset_planes=None, camera=camera_from_pose(0, 0)
    )
    return generator, head


@pytest.fixture(scope="module")
def textured(ball):
    return extract_mesh(*ball, resolution=48, texture=256)


def solid(mesh):
    return trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)


def welded(mesh):
    """With vertices of one position merged, whatever their texture coordinates."""
    mesh = mesh.copy()
    mesh.merge_vertices(merge_tex=True, merge_norm=True)
    return mesh


def look_up(texture, uv):
    """Bilinear, (0, 0) the top left corner."""
    grid = torch.from_numpy(np.array(uv, dtype=np.float32))[None, None] * 2 - 1
    picture = torch.from_numpy(texture).float().permute(2, 0, 1)[None]
    return torch.nn.functional.grid_sample(picture, grid, padding_mode="border", align_corners=False)[
        0, :, 0
    ].T.numpy()


class TestExtract:
    def test_surface_lies_where_the_density_says(self, ball):
        mesh = extract_mesh(*ball, resolution=64)
        front = mesh.vertices[mesh.vertices[:, 2] > 0.05]
        assert np.abs(np.linalg.norm(front, axis=1) - RADIUS).max() < 0.01
        assert mesh.vertices.dtype == mesh.normals.dtype == np.float32
        assert mesh.faces.dtype == np.int32 and mesh.colours.dtype == np.uint8
        assert len(mesh.vertices) == len(mesh.colours) == len(mesh.normals)

    def test_closed_outward_and_in_one_piece(self, ball):
        surface = solid(extract_mesh(*ball, resolution=48))
        assert surface.is_watertight and surface.is_winding_consistent and surface.body_count == 1
        # Positive: the faces look outward. What hides behind the ball belongs to it, in front it is half a ball.
        half = 2 / 3 * np.pi * RADIUS**3
        assert 1.7 * half < surface.volume < 4 * half

    def test_normals_look_outward(self, ball):
        mesh = extract_mesh(*ball, resolution=48)
        front = mesh.vertices[:, 2] > 0.08
        outward = (mesh.normals * mesh.vertices).sum(1) / np.linalg.norm(mesh.vertices, axis=1)
        assert outward[front].min() > 0.85

    def test_offset_planes_move_it(self, ball):
        generator, head = ball
        planes = torch.zeros(1, 3, 3, 8, 8)
        planes[:, 0, 1] = 0.06  # y; looked up at p + Δp, so the ball moves down
        moved = extract_mesh(generator, dataclasses.replace(head, offset_planes=planes), resolution=48)
        still = extract_mesh(generator, head, resolution=48)
        lowest = [mesh.vertices[mesh.vertices[:, 2] > 0][:, 1].min() for mesh in (moved, still)]
        assert lowest[0] - lowest[1] == pytest.approx(-0.06, abs=0.01)

    def test_cavities_are_filled_and_pieces_dropped(self, ball):
        generator, head = ball
        planes = head.planes.clone()
        centres = (torch.arange(64) + 0.5) / 64 - 0.5
        height, width = torch.meshgrid(centres, centres, indexing="ij")
        # A rod of emptiness along z would open the ball; a ball of it in x and y alone does: cut a slot instead.
        planes[0, 0, 0][(height.abs() < 0.012) & (width.abs() < 0.012)] = -1
        slotted = solid(extract_mesh(generator, dataclasses.replace(head, planes=planes), resolution=64))
        whole = solid(extract_mesh(generator, head, resolution=64))
        assert slotted.body_count == 1 and slotted.euler_number == 2
        assert slotted.volume == pytest.approx(whole.volume, rel=0.05)

    def test_colours_are_those_of_the_views(self, ball):
        generator, head = ball
        mesh = extract_mesh(generator, head, resolution=48)
        image = generator.synthesize(head.ws, head.camera[None], planes=head.planes).image[0]
        centre = (image[:, 28:36, 28:36].clamp(-1, 1) * 127.5 + 127.5).mean((1, 2)).numpy()
        nose = np.linalg.norm(mesh.vertices - [0, 0, RADIUS], axis=1) < 0.03
        assert np.abs(mesh.colours[nose].mean(0) - centre).max() < 6

    def test_progress(self, ball):
        shares = []
        extract_mesh(*ball, resolution=32, progress=shares.append)
        assert shares == sorted(shares) and shares[-1] == 1 and 0 < shares[0] <= 0.8

    @pytest.mark.parametrize("resolution", [15, 513])
    def test_resolution_out_of_range(self, ball, resolution):
        with pytest.raises(ValueError, match="16 to 512"):
            extract_mesh(*ball, resolution=resolution)

    def test_no_surface(self, ball):
        generator, head = ball
        with pytest.raises(ValueError, match="no surface"):
            extract_mesh(generator, dataclasses.replace(head, planes=torch.zeros_like(head.planes)), resolution=16)


class TestCut:
    """A cube that is dense everywhere: what is kept is what is cut out of it."""

    @pytest.fixture(scope="class")
    @classmethod
    def cut(cls, ball):
        generator, head = ball
        planes = torch.zeros(1, 3, 4, 64, 64)
        planes[0, 0, 0] = 0.3
        return extract_mesh(generator, dataclasses.replace(head, planes=planes), resolution=64)

    def test_closed(self, cut):
        surface = solid(cut)
        assert surface.is_watertight and surface.body_count == 1

    def test_room_for_the_crown_and_none_for_the_wall(self, cut):
        low, high = cut.vertices.min(0), cut.vertices.max(0)
        # The picture reaches 0.317 from its middle; hair rises above it.
        assert 0.36 < high[1] < 0.45 and -0.33 < low[1] < -0.29
        assert -low[0] == pytest.approx(high[0], abs=0.01) and 0.25 < high[0] < 0.317
        # A head is about as long as its face, from the bridge of the nose, is high (0.42), and a little.
        assert -0.3 < low[2] < -0.25

    def test_back_is_round(self, cut):
        def width(z):
            return np.abs(cut.vertices[np.abs(cut.vertices[:, 2] - z) < 0.01][:, 0]).max()

        assert width(0) > 0.27 and width(-0.15) < 0.95 * width(0) and width(-0.24) < 0.6 * width(0)

    def test_follows_the_camera(self, ball):
        generator, head = ball
        planes = torch.zeros(1, 3, 4, 64, 64)
        planes[0, 0, 0] = 0.3
        closer = camera_from_pose(20.0, 5.0, focal=2 * 4.2647)
        mesh = extract_mesh(generator, dataclasses.replace(head, planes=planes, camera=closer), resolution=48)
        # Twice the focal length: half the picture.
        assert mesh.vertices[:, 0].max() < 0.16 and mesh.vertices[:, 1].min() > -0.18


class TestTexture:
    def test_shapes(self, textured):
        count = len(textured.vertices)
        assert textured.texture.shape == (256, 256, 3) and textured.texture.dtype == np.uint8
        assert textured.uv.shape == (count, 2) and textured.uv.dtype == np.float32
        assert textured.uv.min() >= 0 and textured.uv.max() <= 1
        assert textured.colours.shape == textured.normals.shape == (count, 3)
        assert textured.faces.max() == count - 1 and textured.faces.dtype == np.int32
        np.testing.assert_allclose(np.linalg.norm(textured.normals, axis=1), 1, atol=1e-5)

    def test_closed_once_seams_are_merged(self, textured):
        surface = trimesh.Trimesh(textured.vertices, textured.faces)
        assert len(surface.vertices) < len(textured.vertices)
        assert surface.is_watertight and surface.is_winding_consistent and surface.body_count == 1
        assert surface.volume > 0

    def test_has_few_triangles(self, ball, textured):
        assert len(textured.faces) <= 12_000
        fine = extract_mesh(*ball, resolution=128, texture=64)
        assert len(fine.faces) <= 12_000 < len(extract_mesh(*ball, resolution=128).faces)
        front = fine.vertices[fine.vertices[:, 2] > 0.05]
        assert np.abs(np.linalg.norm(front, axis=1) - RADIUS).max() < 0.01

    def test_charts_do_not_overlap(self, textured):
        corners = textured.uv[textured.faces].astype(float)
        first, second = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
        area = np.abs(first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]).sum() / 2
        covered = rasterize(textured.uv, textured.faces, 1024).covered.mean()
        assert covered == pytest.approx(area, rel=0.01) and area > 0.3

    def test_texels_are_the_photos_view(self, ball, textured):
        generator, head = ball
        image = generator.synthesize(head.ws, head.camera[None], planes=head.planes).image[0]
        view = (image.clamp(-1, 1) * 127.5 + 127.5).permute(1, 2, 0).numpy()
        nose = np.linalg.norm(textured.vertices - [0, 0, RADIUS], axis=1) < 0.1
        positions, _ = project_points(torch.from_numpy(textured.vertices[nose]), head.camera)
        expected = look_up(view.astype(np.uint8), positions.numpy())
        assert np.abs(look_up(textured.texture, textured.uv[nose]) - expected).mean() < 3

    def test_no_texel_is_left_empty(self, textured):
        """Hidden parts and gaps between charts included: no view is black anywhere here."""
        assert textured.texture.any(axis=-1).all()
        # Beside a chart the texture goes on, so that look-ups across its border find the same colours.
        covered = rasterize(textured.uv, textured.faces, 256).covered
        beside = ~covered & np.roll(covered, 1, axis=1)
        step = np.abs(textured.texture.astype(int) - np.roll(textured.texture, 1, axis=1))[beside]
        assert beside.sum() > 100 and np.median(step) == 0

    def test_deterministic(self, ball, textured):
        again = extract_mesh(*ball, resolution=48, texture=256)
        for field in dataclasses.fields(HeadMesh):
            assert np.array_equal(getattr(again, field.name), getattr(textured, field.name)), field.name

    def test_progress(self, ball):
        shares = []
        extract_mesh(*ball, resolution=32, progress=shares.append, texture=64)
        assert shares == sorted(shares) and shares[-1] == 1 and 0 < shares[0] <= 0.4

    def test_zero_is_vertex_colours(self, ball):
        mesh = extract_mesh(*ball, resolution=32, texture=0)
        assert mesh.texture is None and mesh.uv is None and len(mesh.colours) == len(mesh.vertices)

    @pytest.mark.parametrize("texture", [-1, 32, 2049])
    def test_size_out_of_range(self, ball, texture):
        with pytest.raises(ValueError, match="64 to 2048"):
            extract_mesh(*ball, resolution=32, texture=texture)


class TestFiles:
    def test_glb_with_texture(self, textured, tmp_path):
        write_mesh(textured, tmp_path / "ball.glb")
        loaded = trimesh.load(tmp_path / "ball.glb", force="mesh", process=False)
        np.testing.assert_allclose(loaded.vertices, textured.vertices, atol=1e-6)
        assert np.array_equal(loaded.faces, textured.faces)
        material = loaded.visual.material
        assert material.metallicFactor == 0 and material.roughnessFactor >= 0.8
        picture = np.asarray(material.baseColorTexture.convert("RGB"))
        assert np.array_equal(picture, textured.texture)
        # trimesh's (0, 0) is the bottom left corner.
        np.testing.assert_allclose(loaded.visual.uv * [1, -1] + [0, 1], textured.uv, atol=1e-6)
        assert welded(loaded).is_watertight and welded(loaded).body_count == 1
        data = (tmp_path / "ball.glb").read_bytes()
        tree = json.loads(data[20 : 20 + int.from_bytes(data[12:16], "little")])
        (primitive,) = tree["meshes"][0]["primitives"]
        assert primitive["attributes"].keys() == {"POSITION", "NORMAL", "TEXCOORD_0"}

    @pytest.mark.parametrize("name", ["head", "my head #1", "Kopf ü", "-x"])
    def test_obj_with_texture(self, textured, tmp_path, name):
        write_mesh(textured, tmp_path / f"{name}.obj")
        loaded = trimesh.load(tmp_path / f"{name}.obj", force="mesh", process=False)
        assert len(loaded.faces) == len(textured.faces)
        assert np.array_equal(np.asarray(loaded.visual.material.image.convert("RGB")), textured.texture)
        corners, expected = loaded.triangles, textured.vertices[textured.faces]
        np.testing.assert_allclose(corners, expected, atol=1e-5)
        uv = loaded.visual.uv[loaded.faces] * [1, -1] + [0, 1]
        np.testing.assert_allclose(uv, textured.uv[textured.faces], atol=1e-5)
        assert welded(loaded).is_watertight
        others = {path.name for path in tmp_path.iterdir()} - {f"{name}.obj"}
        assert len(others) == 2 and all(re.fullmatch(r"[A-Za-z0-9._-]+", other) for other in others)
        if name == "head":
            assert others == {"head.mtl", "head.png"}

    def test_names_that_look_alike_keep_their_own_texture(self, textured, tmp_path):
        for name in ("a b", "a_b", "a#b"):
            write_mesh(textured, tmp_path / f"{name}.obj")
        assert len(list(tmp_path.iterdir())) == 9

    def test_obj_with_vertex_colours(self, ball, tmp_path):
        mesh = extract_mesh(*ball, resolution=32)
        write_mesh(mesh, tmp_path / "ball.obj")
        assert [path.name for path in tmp_path.iterdir()] == ["ball.obj"]
        loaded = trimesh.load(tmp_path / "ball.obj", force="mesh", process=False)
        assert loaded.is_watertight
        np.testing.assert_allclose(loaded.triangles, mesh.vertices[mesh.faces], atol=1e-5)
        assert (
            np.abs(loaded.visual.vertex_colors[loaded.faces][..., :3].astype(int) - mesh.colours[mesh.faces]).max()
            <= 1
        )

    def test_ply(self, ball, tmp_path):
        mesh = extract_mesh(*ball, resolution=32)
        write_mesh(mesh, tmp_path / "ball.PLY")
        with (tmp_path / "ball.PLY").open("rb") as file:
            loaded = trimesh.load(file, file_type="ply", process=False)
        assert loaded.is_watertight and np.array_equal(loaded.faces, mesh.faces)
        assert np.array_equal(loaded.visual.vertex_colors[:, :3], mesh.colours)
        assert b"property float nx" in (tmp_path / "ball.PLY").read_bytes()[:600]

    def test_all_of_an_obj_or_nothing(self, textured, tmp_path):
        (tmp_path / "ball.mtl").mkdir()
        with pytest.raises(IsADirectoryError):
            write_mesh(textured, tmp_path / "ball.obj")
        assert [path.name for path in tmp_path.iterdir()] == ["ball.mtl"]

    def test_paths_that_cannot_be(self, textured, tmp_path):
        with pytest.raises(ValueError, match="must end in .glb, .obj or .ply"):
            write_mesh(textured, tmp_path / "head.stl")
        with pytest.raises(FileNotFoundError, match="does not exist"):
            write_mesh(textured, tmp_path / "nowhere" / "head.obj")
        (tmp_path / "head.ply").mkdir()
        with pytest.raises(IsADirectoryError):
            write_mesh(textured, tmp_path / "head.ply")


class TestGlb:
    def test_trimesh_reads_it_back(self, ball, tmp_path):
        mesh = extract_mesh(*ball, resolution=32)
        mesh.colours[::2] = (200, 100, 10)
        write_glb(mesh, tmp_path / "ball.glb")
        loaded = trimesh.load(tmp_path / "ball.glb", force="mesh", process=False)
        np.testing.assert_allclose(loaded.vertices, mesh.vertices, atol=1e-6)
        assert np.array_equal(loaded.faces, mesh.faces)
        colours = loaded.visual.vertex_colors
        # sRGB 200, 100, 10 is 0.578, 0.127, 0.003 of the light.
        assert np.abs(colours[::2].astype(int) - [147, 32, 1, 255]).max() <= 1

    def test_file_follows_gltf(self, ball, tmp_path):
        mesh = extract_mesh(*ball, resolution=32)
        write_glb(mesh, tmp_path / "ball.glb")
        data = (tmp_path / "ball.glb").read_bytes()
        assert data[:4] == b"glTF"
        tree = json.loads(data[20 : 20 + int.from_bytes(data[12:16], "little")])
        (primitive,) = tree["meshes"][0]["primitives"]
        assert primitive["attributes"].keys() == {"POSITION", "NORMAL", "COLOR_0"}
        accessors = {name: tree["accessors"][i] for name, i in primitive["attributes"].items()}
        assert {name: (a["count"], a["componentType"]) for name, a in accessors.items()} == dict.fromkeys(
            accessors, (len(mesh.vertices), 5126)
        )
        assert accessors["COLOR_0"]["type"] == "VEC4"

    def test_paths_that_cannot_be(self, tmp_path):
        mesh = HeadMesh(np.zeros((0, 3)), np.zeros((0, 3), int), np.zeros((0, 3), np.uint8), np.zeros((0, 3)))
        with pytest.raises(ValueError, match="must end in .glb"):
            write_glb(mesh, tmp_path / "head.obj")
        with pytest.raises(FileNotFoundError, match="does not exist"):
            write_glb(mesh, tmp_path / "nowhere" / "head.glb")
        assert not list(tmp_path.iterdir())


class TestEmbeddedCheckpoint:
    @pytest.fixture(scope="class")
    @classmethod
    def mean_head(cls):
        inverter = MetaAuxInverter.from_pretrained()
        inverter.set_progress_bar_config(disable=True)
        w = inverter.generator.w_avg.clone()
        return inverter, Inversion(w, camera_from_pose(0, 0), {}, fingerprint=inverter.fingerprint)

    def test_default_resolution(self, mean_head, tmp_path):
        inverter, inversion = mean_head
        written = inverter.export_mesh(inversion, tmp_path / "head.glb", texture=None)
        mesh = trimesh.load(tmp_path / "head.glb", force="mesh")
        assert len(mesh.vertices) == len(written.vertices) >= 20_000
        assert mesh.is_watertight and mesh.body_count == 1 and mesh.volume > 0
        assert len(np.unique(mesh.visual.vertex_colors, axis=0)) > 1000
        # Upright, the nose in front: the foremost vertex lies near the middle, in the face's lower half.
        x, y, z = mesh.vertices[mesh.vertices[:, 2].argmax()]
        assert abs(x) < 0.06 and -0.15 < y < 0.1 and z > 0.12
        cheeks = mesh.vertices[(np.abs(mesh.vertices[:, 0]) > 0.12) & (np.abs(mesh.vertices[:, 1]) < 0.1)]
        assert z - cheeks[:, 2].max() > 0.03
        assert DEFAULT_RESOLUTION >= 128

    def test_texture_by_default(self, mean_head, tmp_path):
        inverter, inversion = mean_head
        written = inverter.export_mesh(inversion, tmp_path / "head.glb", resolution=96)
        mesh = trimesh.load(tmp_path / "head.glb", force="mesh", process=False)
        assert len(mesh.vertices) == len(written.vertices) and 5_000 < len(mesh.faces) <= 12_000
        assert mesh.visual.material.baseColorTexture.size == (DEFAULT_TEXTURE, DEFAULT_TEXTURE)
        surface = welded(mesh)
        assert surface.is_watertight and surface.body_count == 1 and surface.euler_number == 2
        assert surface.volume > 0 and surface.vertices[:, 1].max() > 0.3

    def test_portraits_texture_is_nearer_to_its_view(self, mean_head, tmp_path):
        """By the command: of the portrait, a mesh's texture differs from the photo's own view at least 40 % less than
        vertex colours do."""
        inverter, _ = mean_head
        inversion = inverter.invert(ROOT / "examples" / "eileen_collins.jpg", steps=0)
        inversion.save(tmp_path / "portrait.safetensors")
        arguments = ["evaluate", "mesh", str(tmp_path / "portrait.safetensors"), "--out", str(tmp_path / "out")]
        run = CliRunner().invoke(cli.app, [*arguments, "--resolution", "96", "--texture", "512", "--device", "cpu"])
        assert run.exit_code == 0, run.output
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert results["watertight"] and results["pieces"] == 1 and results["pixels"] > 5000
        assert results["texture"] < 0.6 * results["vertex_colours"]
        assert results["reduction"] == pytest.approx(1 - results["texture"] / results["vertex_colours"])
        assert "reduction" in run.output
        with Image.open(tmp_path / "out" / "mesh.jpg") as picture:
            assert picture.width == 6 * picture.height

    def test_errors_come_before_the_work(self, mean_head, tmp_path):
        inverter, inversion = mean_head
        with pytest.raises(ValueError, match="must end in .glb"):
            inverter.export_mesh(inversion, tmp_path / "head.stl")
        with pytest.raises(ValueError, match="unknown edit"):
            inverter.export_mesh(inversion, tmp_path / "head.glb", edits={"nothing": 1})
        with pytest.raises(ValueError, match="64 to 2048"):
            inverter.export_mesh(inversion, tmp_path / "head.glb", texture=7)
        assert not list(tmp_path.iterdir())
