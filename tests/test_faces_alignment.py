from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metaaux.faces import (
    FaceAligner,
    FaceTooSmallError,
    NoFaceError,
    camera_from_pose,
    canonical_face,
    load_photo,
    project_points,
)
from metaaux.faces.detection import sample_square

pytest.importorskip("mediapipe")
EXAMPLES = Path(__file__).parent.parent / "examples"
HOPPER, COLLINS = EXAMPLES / "grace_hopper.jpg", EXAMPLES / "eileen_collins.jpg"


@pytest.fixture(scope="module")
def aligner():
    return FaceAligner(image_size=128)


@pytest.fixture(scope="module", params=[HOPPER, COLLINS], ids=["hopper", "collins"])
def portrait(request, aligner):
    return load_photo(request.param), aligner.align(request.param)


def test_crop_and_camera_agree(portrait, aligner):
    photo, face = portrait
    assert face.image.size == (128, 128)
    assert face.faces_found == 1
    torch.testing.assert_close(face.camera, camera_from_pose(face.yaw, face.pitch))
    assert abs(face.yaw) < 8
    assert 0 < face.pitch < 12
    # The canonical face seen by the camera must lie on the landmarks.
    projected, _ = project_points(torch.from_numpy(canonical_face()), face.camera)
    on_photo = (projected.numpy() * 128 + 0.5) @ face.crop_to_photo[:, :2].T + face.crop_to_photo[:, 2]
    upper = canonical_face()[:, 1] > 0
    distance = np.linalg.norm(on_photo - face.landmarks, axis=1)[upper]
    assert np.median(distance) < 0.04 * face.face_size


def test_aligning_a_crop_again_changes_little(portrait, aligner):
    _, face = portrait
    again = aligner.align(face.image)
    assert abs(again.yaw - face.yaw) < 2.5
    assert abs(again.pitch - face.pitch) < 2.5
    assert abs(again.roll) < 1.5
    assert np.hypot(*again.crop_to_photo[:, 0]) == pytest.approx(1, abs=0.03)
    yaw, pitch = aligner.estimate_pose(face.image)
    assert (yaw, pitch) == (again.yaw, again.pitch)


def test_crop_to_photo_finds_the_crop(portrait):
    photo, face = portrait
    centre = face.crop_to_photo @ [64.5, 64.5, 1]
    x, y = centre.astype(int)
    step = int(np.hypot(*face.crop_to_photo[:, 0]) * 4)
    around = np.asarray(photo.crop((x - step, y - step, x + step, y + step)), float).mean((0, 1))
    inside = np.asarray(face.image.crop((60, 60, 69, 69)), float).mean((0, 1))
    assert np.abs(around - inside).max() < 8


@pytest.mark.parametrize("angle", [-40, 90, 180])
def test_roll_is_taken_out(portrait, aligner, angle):
    photo, face = portrait
    turned = aligner.align(photo.rotate(angle, expand=True))
    assert abs(turned.yaw - face.yaw) < 3.5
    assert abs(turned.pitch - face.pitch) < 3.5
    assert abs((turned.roll - face.roll + angle + 180) % 360 - 180) < 3


def test_mirrored_photo_turns_the_other_way(aligner):
    photo = load_photo(HOPPER)
    face, mirrored = aligner.align(photo), aligner.align(photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert abs(face.yaw + mirrored.yaw) < 3
    assert abs(face.roll + mirrored.roll) < 2


def test_small_face_in_a_big_photo_and_several(aligner):
    photo = Image.new("RGB", (2600, 1500), (120, 130, 110))
    hopper, collins = load_photo(HOPPER), load_photo(COLLINS)
    photo.paste(hopper.resize((180, 211)), (1900, 400))
    alone = aligner.align(photo)
    assert alone.faces_found == 1
    assert 1900 < alone.box[0] < alone.box[2] < 2080
    photo.paste(collins, (300, 300))
    both = aligner.align(photo)
    assert both.faces_found == 2
    assert both.box[2] < 812
    assert both.face_size > alone.face_size


def test_tight_crops_are_padded(portrait, aligner):
    photo, face = portrait
    tight = aligner.align(photo.crop([round(edge) for edge in face.box]))
    assert abs(tight.yaw - face.yaw) < 4
    assert abs(tight.pitch - face.pitch) < 5
    assert tight.face_size == pytest.approx(face.face_size, rel=0.06)


def test_crop_scale_sets_the_framing():
    normal, wide = FaceAligner(128).align(COLLINS), FaceAligner(256, crop_scale=0.5).align(COLLINS)
    assert wide.image.size == (256, 256)
    torch.testing.assert_close(wide.camera, normal.camera)
    np.testing.assert_allclose(wide.crop_to_photo[:, :2], normal.crop_to_photo[:, :2])


def test_errors_say_what_to_do(aligner):
    with pytest.raises(NoFaceError, match="no face was found"):
        aligner.align(np.full((200, 300, 3), 128, np.uint8))
    assert aligner.estimate_pose(np.zeros((128, 128, 3), np.uint8)) is None
    small = load_photo(COLLINS).resize((170, 170), Image.Resampling.LANCZOS)
    with pytest.raises(FaceTooSmallError, match="at least 48"):
        aligner.align(small)
    assert FaceAligner(min_face_size=20).align(small).face_size < 48
    with pytest.raises(ValueError, match="crop_scale"):
        FaceAligner(crop_scale=0)
    with pytest.raises(ValueError, match="image_size"):
        FaceAligner(image_size=0)


def test_threads_and_repeats_give_the_same(aligner):
    photos = [HOPPER, COLLINS] * 3
    with ThreadPoolExecutor(3) as pool:
        faces = list(pool.map(aligner.align, photos))
    for face, photo in zip(faces, photos, strict=True):
        np.testing.assert_array_equal(face.landmarks, aligner.align(photo).landmarks)


def _detect_in_fork(aligner, queue):
    try:
        aligner.estimate_pose(HOPPER)
    except RuntimeError as error:
        queue.put(str(error))


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_forked_process_gets_an_error_instead_of_a_crash(aligner):
    aligner.align(HOPPER)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_detect_in_fork, args=(aligner, queue))
    process.start()
    assert "forked" in queue.get(timeout=20)
    process.join(20)
    assert process.exitcode == 0


def test_sampling_is_antialiased_and_exact():
    rows, columns = np.mgrid[:90, :120]
    ramp = np.stack([columns * 2, rows * 2, np.zeros_like(rows)], -1).astype(np.uint8)
    matrix = np.array([[2.5, 0, 20.0], [0, 2.5, 10.0]])
    sampled = np.asarray(sample_square(Image.fromarray(ramp), matrix, 30), float)
    expected = ((np.arange(30) + 0.5) * 2.5 + 20 - 0.5) * 2
    np.testing.assert_allclose(sampled[15, 2:-2, 0], expected[2:-2], atol=1.1)
    checkers = np.repeat((((rows + columns) % 2) * 255).astype(np.uint8)[..., None], 3, axis=2)
    grey = np.asarray(sample_square(Image.fromarray(checkers), matrix, 30), float)
    assert np.abs(grey - 127.5).max() < 25


def test_borders_are_reflected_or_black():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    matrix = np.array([[1, 0, -3.0], [0, 1, -3.0]])
    sampled = np.asarray(sample_square(Image.fromarray(pixels), matrix, 14))
    np.testing.assert_array_equal(sampled, np.pad(pixels, ((3, 3), (3, 3), (0, 0)), mode="reflect"))
    assert not np.asarray(sample_square(Image.fromarray(pixels), matrix, 14, reflect=False))[:3].any()
    with pytest.raises(ValueError, match="outside"):
        sample_square(Image.fromarray(pixels), np.array([[1, 0, 50.0], [0, 1, 0]]), 14)
