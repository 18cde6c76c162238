"""Files that are whole or absent, under whatever name, and what the package writes on every system."""

from __future__ import annotations

import ast
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metaaux import Inversion
from metaaux.export.images import save_image
from metaaux.export.mesh import HeadMesh
from metaaux.export.mesh_files import write_glb
from metaaux.export.video import write_video
from metaaux.files import atomic_path, check_output_file, check_output_folder, write_json, write_text

FRAMES = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
TETRAHEDRON = HeadMesh(
    vertices=np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=np.float32),
    faces=np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]], dtype=np.int32),
    colours=np.zeros((4, 3), dtype=np.uint8),
    normals=np.eye(3, dtype=np.float32)[[0, 0, 1, 2]],
)
#: Names that a file system allows, and that programs take for something else: protocols, options, patterns, long ones.
NAMES = [
    "10:30",
    "http:face",
    "concat:a|b",
    "-y",
    "%d",
    "frame-%03d",
    "100%",
    "a'b\"c",
    "two\nlines",
    " ",
    "фото",
    "a" * 250,
    "é" * 125,
    ".hidden",
]


@pytest.fixture
def locked_folder():
    """A folder that this process cannot write into; as root it gives its rights up meanwhile."""
    is_root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755 if is_root else 0o500)
        if is_root:
            os.seteuid(65534)
        yield Path(folder)
        if is_root:
            os.seteuid(0)
        os.chmod(folder, 0o700)


class TestAtomicPath:
    @pytest.mark.parametrize("name", ["a.png", "a" * 251 + ".png", "é" * 125 + ".png", "x." + "a" * 253])
    def test_long_names(self, tmp_path, name):
        with atomic_path(tmp_path / name) as temporary:
            assert len(os.fsencode(temporary.name)) < 40
            temporary.write_bytes(b"whole")
        assert [path.name for path in tmp_path.iterdir()] == [name]

    def test_suffix_is_kept(self, tmp_path):
        with atomic_path(tmp_path / "a.tar.PNG") as temporary:
            assert temporary.suffix == ".PNG"
            temporary.touch()

    def test_an_error_leaves_the_older_file_and_nothing_else(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_bytes(b"older")
        with pytest.raises(RuntimeError), atomic_path(path) as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError
        assert path.read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]

    def test_places_that_cannot_be_written(self, tmp_path):
        for name, match in (("none/a.png", "none does not exist"), ("a" * 256, "too long"), (".", "it is a folder")):
            with pytest.raises(OSError, match=match), atomic_path(tmp_path / name):
                raise AssertionError("the block must not run")

    def test_lines_end_alike_on_every_system(self, tmp_path):
        write_text("a\nЯ\n", tmp_path / "a.txt")
        assert (tmp_path / "a.txt").read_bytes() == "a\nЯ\n".encode()


class TestChecks:
    def test_folders_that_are_there_or_can_be(self, tmp_path):
        check_output_folder(tmp_path)
        check_output_folder(tmp_path / "a" / "b")
        check_output_file(tmp_path / "a.png")
        assert not list(tmp_path.iterdir())

    def test_a_file_in_the_way(self, tmp_path):
        (tmp_path / "file").touch()
        for name in ("file", "file/a", "file/a/b"):
            with pytest.raises(NotADirectoryError, match="file is a file"):
                check_output_folder(tmp_path / name)
        with pytest.raises(OSError, match="too long"):
            check_output_folder(tmp_path / ("a" * 256))

    @pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
    def test_read_only(self, locked_folder):
        for check, path in (
            (check_output_folder, locked_folder),
            (check_output_folder, locked_folder / "new"),
            (check_output_file, locked_folder / "a.png"),
        ):
            with pytest.raises(OSError, match=f"cannot write into the folder {locked_folder}: Permission denied"):
                check(path)


class TestWriters:
    @pytest.mark.parametrize("name", NAMES)
    def test_names(self, tmp_path, monkeypatch, tiny_inversion, name):
        monkeypatch.chdir(tmp_path)
        write_video(FRAMES, f"{name}.mp4")
        save_image(FRAMES[0], Path(f"{name}.png"))
        write_glb(TETRAHEDRON, f"{name}.glb")
        write_json({}, Path(f"{name}.json"))
        assert sorted(os.listdir()) == sorted(f"{name}.{suffix}" for suffix in ("glb", "json", "mp4", "png"))
        assert b"ftyp" in Path(f"{name}.mp4").read_bytes()[:16] and Image.open(f"{name}.png").size == (16, 16)
        assert Path(f"{name}.glb").read_bytes()[:4] == b"glTF"
        tiny_inversion.save(f"{name}.s")
        assert torch.equal(Inversion.load(f"{name}.s").w, tiny_inversion.w)

    @pytest.mark.parametrize("folder", ["10:30", "-y", "%d", "two\nlines"])
    def test_names_of_folders(self, tmp_path, monkeypatch, folder):
        monkeypatch.chdir(tmp_path)
        os.mkdir(folder)
        write_video(FRAMES, f"{folder}/a.mp4")
        save_image(FRAMES[0], Path(folder, "a.png"))
        assert sorted(os.listdir(folder)) == ["a.mp4", "a.png"]

    def test_ffmpeg_that_fails_leaves_nothing(self, tmp_path):
        # 0 frames a second are no rate.
        with pytest.raises(OSError, match=r"ffmpeg could not write .*a\.mp4: "):
            write_video(FRAMES, tmp_path / "a.mp4", fps=0)
        assert not list(tmp_path.iterdir())


def test_text_files_are_opened_with_an_encoding():
    """Else Windows reads and writes them in the encoding of its language."""
    root = Path(__file__).resolve().parent.parent
    unnamed = []
    for path in [*(root / "metaaux").rglob("*.py"), root / "app.py"]:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or any(keyword.arg == "encoding" for keyword in call.keywords):
                continue
            text = ast.unparse(call)
            opens = re.search(r"^open\(|\.open\(", text) and not re.search(r"^(Image|os)\.open|'[rwax]\+?b\+?'", text)
            reads = isinstance(call.func, ast.Attribute) and call.func.attr in ("read_text", "write_text")
            if opens and ast.unparse(call.func).endswith("open") or reads:
                unnamed.append(f"{path.relative_to(root)}:{call.lineno}: {text}")
    assert unnamed == []
