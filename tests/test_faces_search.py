"""The search for faces: small ones in large photos are found, and photos without a face do not take for ever."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from metaaux.faces import FaceAligner, NoFaceError, load_photo
from metaaux.faces.graphs import FaceGraphs

pytest.importorskip("mediapipe")
EXAMPLES = Path(__file__).parent.parent / "examples"
HOPPER, COLLINS = EXAMPLES / "grace_hopper.jpg", EXAMPLES / "eileen_collins.jpg"


@pytest.fixture(scope="module")
def aligner():
    return FaceAligner()


def scenery(width, height, seed=0):
    """Large coloured blots without a face."""
    blots = np.random.default_rng(seed).integers(40, 216, (height // 300, width // 300, 3), dtype=np.uint8)
    return Image.fromarray(blots).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("path", [HOPPER, COLLINS], ids=["hopper", "collins"])
@pytest.mark.parametrize(
    ("face_size", "corner"), [(52, (3300, 2450)), (52, (120, 90)), (75, (1900, 1400)), (130, (40, 2000))]
)
def test_small_faces_of_large_photos_are_found(aligner, path, face_size, corner):
    portrait = load_photo(path)
    scale = face_size / aligner.align(portrait).face_size
    photo = scenery(4000, 3000)
    small = portrait.resize([round(side * scale) for side in portrait.size], Image.Resampling.LANCZOS)
    photo.paste(small, corner)
    face = aligner.align(photo)
    left, top, right, bottom = face.box
    assert corner[0] < left < right < corner[0] + small.width and corner[1] < top < bottom < corner[1] + small.height
    assert face.face_size == pytest.approx(face_size, rel=0.12)


def test_the_search_of_24_megapixels_is_bounded(aligner, monkeypatch):
    looked = []
    process = FaceGraphs.process
    monkeypatch.setattr(FaceGraphs, "process", lambda self, *a: looked.append(1) or process(self, *a))
    with pytest.raises(NoFaceError):
        aligner.align(scenery(6000, 4000))
    # 1,390 with squares halved down to 375 pixels and both detectors on each.
    assert len(looked) < 350
    looked.clear()
    with pytest.raises(NoFaceError):
        aligner.align(Image.new("RGB", (6000, 4000), (120, 130, 110)))
    # Of an even picture only its borders with the black around it are looked at.
    assert len(looked) < 60


def test_faces_at_the_border_and_beyond_are_read_or_named(aligner):
    portrait = load_photo(COLLINS)
    left, top, right, bottom = (round(edge) for edge in aligner.align(portrait).box)
    outcomes = []
    for share in (0.2, 0.5, 0.8):
        width, height = int((right - left) * share), int((bottom - top) * share)
        for box in ((left + width, 0, 512, 512), (0, 0, right - width, 512), (0, top + height, 512, 512)):
            try:
                outcomes.append(np.isfinite(aligner.align(portrait.crop(box)).landmarks).all())
            except NoFaceError:
                outcomes.append(None)
    assert True in outcomes and False not in outcomes


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 2), (256, 256)])
def test_photos_of_any_shape_end_in_words(aligner, size):
    with pytest.raises(NoFaceError, match=f"{size[0]} x {size[1]} pixels"):
        aligner.align(Image.effect_noise(size, 60).convert("RGB"))


def test_landmarks_and_boxes_that_are_no_numbers_count_as_none(aligner, monkeypatch):
    process = FaceGraphs.process
    nan = SimpleNamespace(x=float("nan"), y=0.5, z=0.0)

    def broken_landmarks(self, graph, pixels):
        return [SimpleNamespace(landmark=[nan] * 478)] if graph is self.mesh else process(self, graph, pixels)

    monkeypatch.setattr(FaceGraphs, "process", broken_landmarks)
    with pytest.raises(NoFaceError):
        aligner.align(HOPPER)

    def broken_boxes(self, graph, pixels):
        found = process(self, graph, pixels)
        for detection in found if graph is not self.mesh else []:
            detection.location_data.relative_bounding_box.xmin = float("nan")
        return found

    monkeypatch.setattr(FaceGraphs, "process", broken_boxes)
    with pytest.raises(NoFaceError):
        aligner.align(HOPPER)
