from __future__ import annotations

import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metaaux.data.prepare import prepare

pytest.importorskip("mediapipe")
EXAMPLES = Path(__file__).parent.parent / "examples"


def test_folder_to_zip_resumes_and_reports(tmp_path):
    folder, out = tmp_path / "photos", tmp_path / "faces.zip"
    (folder / "more").mkdir(parents=True)
    shutil.copy(EXAMPLES / "grace_hopper.jpg", folder / "b.jpg")
    shutil.copy(EXAMPLES / "eileen_collins.jpg", folder / "more" / "c.jpg")
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    (folder / "notes.txt").write_text("no photo")

    calls = []

    def stop(finished, total):
        calls.append((finished, total))
        if finished == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(folder, out, size=64, workers=1, on_photo=stop)
    assert not out.exists()
    assert calls == [(1, 4), (2, 4)]

    report = prepare(folder, out, size=64, workers=1)
    assert (report.photos, report.written) == (4, 2)
    assert report.resumed >= 2
    assert {photo.name: photo.error for photo in report.skipped} == {
        "a.png": "NoFaceError",
        "notes.txt": "UnreadableImageError",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces.zip", "photos"]
    with zipfile.ZipFile(out) as archive:
        labels = json.loads(archive.read("dataset.json"))["labels"]
        images = json.loads(archive.read("report.json"))["images"]
        assert [name for name, _ in labels] == ["00/00000.webp", "00/00001.webp"]
        assert [images[name]["photo"] for name, _ in labels] == ["b.jpg", "more/c.jpg"]
        for name, camera in labels:
            assert np.shape(camera) == (25,)
            assert Image.open(io.BytesIO(archive.read(name))).size == (64, 64)


def test_refuses_unusable_input(tmp_path):
    with pytest.raises(NotADirectoryError):
        prepare(tmp_path / "missing", tmp_path / "out.zip")
    with pytest.raises(ValueError, match="holds no photos"):
        prepare(tmp_path, tmp_path / "out.zip")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ValueError, match="image_format"):
        prepare(tmp_path, tmp_path / "out.zip", image_format="bmp")
    with pytest.raises(ValueError, match="workers"):
        prepare(tmp_path, tmp_path / "out.zip", workers=0)
    with pytest.raises(ValueError, match="none of the 1 photos"):
        prepare(tmp_path, tmp_path / "out.zip", workers=1)
    assert not (tmp_path / "out.zip").exists()


def test_a_name_as_long_as_the_file_system_allows(tmp_path):
    folder, out = tmp_path / "photos", tmp_path / ("é" * 125 + ".zip")
    folder.mkdir()
    shutil.copy(EXAMPLES / "eileen_collins.jpg", folder)
    prepare(folder, out, size=64, workers=1)
    assert sorted(tmp_path.iterdir()) == [folder, out]
