"""The z-buffer: coverage, what is nearest, and perspective, against rays and triangles met one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from metaaux.cameras import camera_from_pose, project_points
from metaaux.export.raster import rasterize, render_mesh
from metaaux.models.renderer import camera_rays

SQUARE = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], dtype=float)
HALVES = np.array([[0, 1, 2], [0, 2, 3]])


@pytest.fixture(scope="module")
def soup():
    """Twenty triangles in any position about the origin."""
    random = np.random.default_rng(0)
    vertices = random.uniform(-0.25, 0.25, (60, 3)) + np.repeat(random.uniform(-0.1, 0.1, (20, 3)), 3, axis=0)
    return vertices, np.arange(60).reshape(20, 3)


def test_every_pixel_of_a_square_belongs_to_one_half():
    fragments = rasterize(SQUARE, HALVES, 7)
    row, column = np.indices((7, 7))
    # The diagonal belongs to both: to the first.
    assert np.array_equal(fragments.face, np.where(column >= row, 0, 1))
    np.testing.assert_allclose(fragments.weights.sum(-1), 1)


def test_values_are_interpolated_linearly():
    fragments = rasterize(SQUARE, HALVES, 8)
    row, column = np.indices((8, 8))
    expected = np.stack([column + 0.5, row + 0.5], axis=-1) / 8
    np.testing.assert_allclose(fragments.interpolate(SQUARE, HALVES), expected[fragments.covered], atol=1e-12)


def test_nearest_triangle_is_shown():
    positions = np.concatenate([SQUARE, SQUARE * 0.5])
    faces = np.concatenate([HALVES, HALVES + 4])
    near = rasterize(positions, faces, 8, np.repeat([2.0, 1.0], 4))
    assert (near.face[:4, :4] >= 2).all() and (near.face[4:] < 2).all()
    far = rasterize(positions, faces, 8, np.repeat([1.0, 2.0], 4))
    assert (far.face < 2).all() and (far.depth == 1).all()


def test_agrees_with_rays(soup):
    vertices, faces = soup
    camera = camera_from_pose(25.0, -10.0)
    fragments = render_mesh(vertices, faces, camera, 48)
    origin, directions = (tensor[0].double().numpy() for tensor in camera_rays(camera[None], 48))
    # Möller and Trumbore: origin + t·direction = a + u·(b - a) + v·(c - a).
    a, b, c = vertices[faces].transpose(1, 0, 2)
    matrices = np.stack(np.broadcast_arrays(-directions[:, None], (b - a)[None], (c - a)[None]), axis=-1)
    t, u, v = np.moveaxis(np.linalg.solve(matrices, (origin - a)[None, ..., None])[..., 0], -1, 0)
    met = (u >= 0) & (v >= 0) & (u + v <= 1) & (t > 0)
    distance = np.where(met, t, np.inf)
    nearest = np.where(met.any(1), distance.argmin(1), -1).reshape(48, 48)
    # Rays are of single precision: a border may fall to either side.
    assert (nearest == fragments.face).mean() > 0.998
    same = (nearest == fragments.face) & fragments.covered
    assert same.sum() > 300
    hits = fragments.interpolate(vertices, faces)[same[fragments.covered]]
    expected = origin + distance.min(1).reshape(48, 48)[same][:, None] * directions.reshape(48, 48, 3)[same]
    np.testing.assert_allclose(hits, expected, atol=1e-5)
    depth = project_points(torch.from_numpy(expected), camera.double())[1]
    np.testing.assert_allclose(fragments.depth[same], depth, atol=1e-5)


def test_what_is_outside_behind_or_edge_on_is_left_out():
    outside = rasterize(SQUARE + 2, HALVES, 4)
    assert not outside.covered.any() and np.isinf(outside.depth).all()
    behind = rasterize(SQUARE, HALVES, 4, np.array([1.0, 1.0, -1.0, 1.0]))
    assert not behind.covered.any()
    line = rasterize(np.array([[0, 0], [0.5, 0.5], [1, 1]]), np.array([[0, 1, 2]]), 4)
    assert not line.covered.any()


def test_no_triangles():
    assert not rasterize(SQUARE, np.zeros((0, 3), dtype=int), 4).covered.any()


def test_groups_of_triangles_do_not_matter(soup, monkeypatch):
    vertices, faces = soup
    camera = camera_from_pose(0.0, 0.0)
    whole = render_mesh(vertices, faces, camera, 64)
    monkeypatch.setattr("metaaux.export.raster._CHUNK", 100)
    parts = render_mesh(vertices, faces, camera, 64)
    assert np.array_equal(whole.face, parts.face)
    np.testing.assert_array_equal(whole.weights, parts.weights)
