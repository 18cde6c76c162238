"""Which files are opened as photos, and what is said of the others."""

from __future__ import annotations

import io
import json
import os
import stat
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from metaaux.faces import UnreadableImageError, load_photo
from metaaux.faces.photos import FORMATS


@pytest.fixture
def picture():
    rows, columns = np.mgrid[:24, :36]
    return np.stack([rows * 10, columns * 7, rows * 4 + columns * 4], axis=-1).astype(np.uint8)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def heic(image, **options):
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, quality=95, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind not in ("HEIF", "MPO")])
def test_formats_that_are_read(picture, kind, tmp_path):
    data = encoded(Image.fromarray(picture), kind)
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    for source in (data, path, io.BytesIO(data)):
        difference = np.abs(np.asarray(load_photo(source), int) - picture)
        assert difference.mean() < {"GIF": 12, "JPEG": 8, "AVIF": 8, "WEBP": 8}.get(kind, 1)


@pytest.mark.parametrize("name", ["photo.heic", "photo.jpg"])
def test_heic_is_read_whatever_its_name(picture, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(heic(Image.fromarray(picture)))
    assert np.abs(np.asarray(load_photo(path), int) - picture).mean() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_heic_is_turned_once(picture, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = heic(Image.fromarray(picture), exif=exif.tobytes())
    method = [None, None, 0, 3, 1, 5, 4, 6, 2][orientation]
    expected = Image.fromarray(picture)
    expected = expected if method is None else expected.transpose(Image.Transpose(method))
    loaded = load_photo(data)
    assert loaded.size == expected.size
    assert np.abs(np.asarray(loaded, int) - np.asarray(expected, int)).mean() < 6


@pytest.mark.parametrize("exif", [b"Exif\0\0\0\x08\0\x02", b"Exif\0\0II*\0\xff\xff\xff\xff", b"x"])
def test_broken_exif_in_heic_and_avif(picture, exif):
    image = Image.fromarray(picture)
    good = Image.Exif()
    good[0x010E] = "marks the place of what is broken"
    block = good.tobytes()
    for data in (heic(image, exif=block), encoded(image, "AVIF", exif=block)):
        body = block.removeprefix(b"Exif\0\0")
        assert data.count(body) == 1
        broken = exif.removeprefix(b"Exif\0\0").ljust(len(body), b"\0")
        assert np.abs(np.asarray(load_photo(data.replace(body, broken)), int) - picture).mean() < 6


def test_transparent_heic_is_laid_on_white(picture):
    image = Image.fromarray(picture).convert("RGBA")
    image.putalpha(0)
    assert np.asarray(load_photo(heic(image))).min() > 250


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"\xff\x0a" + bytes(60), "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl \0\0\0\0jxl ", "JPEG XL"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"\xc5\xd0\xd3\xc6" + bytes(60), "PostScript"),
        (b"%PDF-1.7\n", "PDF"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"<!doctype html><html>", "web page"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "raw"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0isommp42", "video"),
        (b"\x1a\x45\xdf\xa3" + bytes(30), "video"),
        (b"8BPS\0\1" + bytes(30), "Photoshop"),
        (b"PK\x03\x04" + bytes(30), "zip"),
    ],
)
def test_other_files_are_named(start, words, tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(start)
    with pytest.raises(UnreadableImageError, match=f"'{path}' is an? .*{words}.*save it as JPEG or PNG"):
        load_photo(path)
    with pytest.raises(UnreadableImageError, match=words):
        load_photo(start)


@pytest.mark.parametrize("brand", [b"heic", b"avif", b"mif1"])
def test_damaged_heif_and_avif_are_named_so(brand):
    with pytest.raises(UnreadableImageError, match="damaged"):
        load_photo(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0" + brand + b"miaf" + bytes(40))


def broken_sources(tmp_path):
    class Object:
        def __repr__(self):
            return "<Object at 0x7f0000000000>"

    closed = io.BytesIO(b"x")
    closed.close()
    lazy = Image.open(io.BytesIO(encoded(Image.new("RGB", (90, 90)), "PNG")[:60]))
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    return [
        b"",
        b"no picture",
        bytearray(b"\x89PNG\r\n\x1a\n"),
        memoryview(b"\xff\xd8\xff\xe0"),
        b"RIFF\0\0\0\0WEBPVP8 ",
        b"II*\0\x08\0\0\0",
        b"BM" + bytes(10),
        b"P6 9 9 255\n",
        io.BytesIO(b"GIF89a"),
        io.StringIO("text"),
        closed,
        tmp_path / "text.jpg",
        tmp_path / "empty.jpg",
        tmp_path,
        tmp_path / "missing",
        "missing\0name",
        "a" * 5000,
        "",
        Object(),
        [Object()],
        {"photo": 1},
        3.5,
        None,
        np.array([Object()] * 3, dtype=object),
        lazy,
        Image.new("RGB", (0, 5)),
    ]


def test_no_message_holds_an_objects_address(tmp_path):
    for source in broken_sources(tmp_path):
        with pytest.raises(UnreadableImageError) as caught:
            load_photo(source)
        assert " at 0x" not in str(caught.value) and len(str(caught.value)) > 15, str(caught.value)


def test_file_objects_are_read_from_their_start(picture, tmp_path):
    data = encoded(Image.fromarray(picture), "PNG")

    class Pipe:
        """Reads once, and cannot seek."""

        def __init__(self):
            self.rest = data

        def seekable(self):
            return False

        def read(self):
            rest, self.rest = self.rest, b""
            return rest

    file = io.BytesIO(data)
    file.seek(40)
    np.testing.assert_array_equal(np.asarray(load_photo(file)), picture)
    np.testing.assert_array_equal(np.asarray(load_photo(Pipe())), picture)
    assert not file.closed


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for Ghostscript")
def test_postscript_never_starts_ghostscript(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    started = tmp_path / "started"
    script = tmp_path / "gs"
    script.write_text(f"#!/bin/sh\ntouch {started}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    # Found once a process: as if it had been there from the start.
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    data = encoded(Image.new("RGB", (9, 9)), "EPS")
    for name in ("drawing.eps", "photo.jpg"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UnreadableImageError, match="PostScript"):
            load_photo(tmp_path / name)
    with pytest.raises(UnreadableImageError, match="undecoded EPS file"):
        load_photo(Image.open(io.BytesIO(data)))
    assert not started.exists()
    with pytest.raises(OSError):
        Image.open(io.BytesIO(data)).load()
    assert started.exists()


def test_formats_off_the_list_are_refused_by_their_contents(picture):
    for kind in ("ICO", "TGA", "PCX", "SGI", "ICNS", "DDS"):
        with pytest.raises(UnreadableImageError, match="none of the formats JPEG"):
            load_photo(encoded(Image.fromarray(picture), kind))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_first_of_several_pictures_is_read(kind):
    first, second = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")
    data = encoded(first, kind, save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert np.abs(np.subtract(load_photo(data).getpixel((9, 9)), (255, 0, 0))).max() < 12


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "GIF", "BMP", "JPEG2000"])
def test_files_cut_off_are_refused(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    for share in (0.02, 0.5, 0.9):
        with pytest.raises(UnreadableImageError, match="damaged|none of the formats"):
            load_photo(data[: int(len(data) * share)])


def test_bombs_are_refused_by_their_header(monkeypatch):
    def png(side):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        chunks = b"IHDR" + header
        return b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + chunks + struct.pack(">I", zlib.crc32(chunks))

    # An empty IDAT, so that the header is whole.
    empty = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(UnreadableImageError, match="far more pixels than the limit of 80,000,000"):
        load_photo(png(60000) + empty)
    with pytest.raises(UnreadableImageError, match="far more pixels than the limit of 178,956,970"):
        load_photo(png(60000) + empty, max_pixels=10**10)
    with pytest.raises(UnreadableImageError, match="9000 x 9000 pixels, more than the limit of 80,000,000"):
        load_photo(png(9000) + empty)


def test_the_demo_reads_the_same_formats_and_names_files_as_their_owners_do(picture, tmp_path):
    from metaaux.demo.settings import Settings
    from metaaux.demo.validation import read_photos

    files = {
        "holiday.heic": heic(Image.fromarray(picture)),
        "drawing.jpg": encoded(Image.fromarray(picture), "EPS"),
        "new.jpg": b"\xff\x0a" + bytes(60),
        "cut.png": encoded(Image.fromarray(picture), "PNG")[:60],
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert read_photos([str(tmp_path / "holiday.heic")], Settings())[0].size == (36, 24)
    for name, words in (("drawing.jpg", "PostScript"), ("new.jpg", "JPEG XL"), ("cut.png", "damaged")):
        with pytest.raises(UnreadableImageError, match=f"^'{name}' is .*{words}") as caught:
            read_photos([str(tmp_path / name)], Settings())
        assert str(tmp_path) not in str(caught.value)


def test_pictures_of_data_sets_are_opened_by_an_allow_list_too(picture, tmp_path):
    from metaaux.data.dataset import FaceDataset

    files = {
        "eps.png": (encoded(Image.fromarray(picture), "EPS"), "no PNG, WebP or JPEG"),
        "text.png": (b"no picture", "no PNG, WebP or JPEG"),
        "cut.png": (encoded(Image.fromarray(picture), "PNG")[:60], "not a readable picture"),
    }
    for name, (data, _) in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [[name, [0.0] * 25] for name in files]}))
    dataset = FaceDataset(tmp_path, 24)
    for index, (name, (_, words)) in enumerate(files.items()):
        with pytest.raises(ValueError, match=f"{name} in .*{words}") as caught:
            dataset[index]
        assert " at 0x" not in str(caught.value)
