"""Meshes: position, closure and colours on a head whose shape is known, and on the embedded checkpoint."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
import trimesh

from metaaux import Head, Inversion, MetaAuxInverter
from metaaux.export.mesh import DEFAULT_RESOLUTION, HeadMesh, extract_mesh, write_glb
from metaaux.faces import camera_from_pose
from metaaux.models.eg3d import EG3DGenerator

RADIUS = 0.2


@pytest.fixture(scope="module")
def ball():
    """A generator and a head that is a ball of `RADIUS` about the origin: its planes hold -x²-y² and -z², and its
    decoder passes their sum on as density."""
    torch.manual_seed(0)
    generator = EG3DGenerator(
        z_dim=8, w_dim=8, image_size=64, plane_resolution=64, plane_features=4, channel_base=256, channel_max=8,
        plane_axes=("xy", "xz", "zy"), decoder_hidden=4, neural_resolution=32, depth_samples=16,
        importance_samples=16, super_resolution_kind="2X",
    )  # fmt: skip
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


def solid(mesh):
    return trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)


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
        written = inverter.export_mesh(inversion, tmp_path / "head.glb")
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

    def test_errors_come_before_the_work(self, mean_head, tmp_path):
        inverter, inversion = mean_head
        with pytest.raises(ValueError, match="must end in .glb"):
            inverter.export_mesh(inversion, tmp_path / "head.stl")
        with pytest.raises(ValueError, match="unknown edit"):
            inverter.export_mesh(inversion, tmp_path / "head.glb", edits={"nothing": 1})
        assert not list(tmp_path.iterdir())
