"""Metadata never decides over pixels: damaged EXIF, XMP, profiles and text leave a picture readable."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from metaaux.faces import UnreadableImageError, load_photo
from metaaux.faces.metadata import without_metadata

#: What each orientation does to the stored rows and columns.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}}
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'


@pytest.fixture
def picture():
    rows, columns = np.mgrid[:24, :36]
    return np.stack([rows * 10, columns * 7, rows * 4 + columns * 4], axis=-1).astype(np.uint8)


def encoded(picture, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, **{**LOSSLESS.get(kind, {"quality": 97}), **options})
    return buffer.getvalue()


def exif_block(orientation, *entries, order="<"):
    """EXIF with an orientation and further entries (tag, kind, count, four bytes), in ascending order."""
    entries = sorted([(0x0112, 3, 1, struct.pack(order + "HH", orientation, 0)), *entries])
    block = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    for tag, kind, count, value in entries:
        block += struct.pack(order + "HHI", tag, kind, count) + value
    return b"Exif\0\0" + block + bytes(4)


def rational(orientation, kind=10, order="<"):
    """EXIF with an exposure bias of -1/0 beside the orientation."""
    block = exif_block(orientation, (0x9204, kind, 1, struct.pack(order + "I", 38)), order=order)
    return block + struct.pack(order + "ii", -1, 0)


def chunk(kind, contents, check=None):
    check = zlib.crc32(kind + contents) if check is None else check
    return len(contents).to_bytes(4, "big") + kind + contents + check.to_bytes(4, "big")


def with_chunk(png, kind, contents, check=None):
    """A PNG with one more chunk behind its header."""
    return png[:33] + chunk(kind, contents, check) + png[33:]


def with_segment(jpeg, marker, contents):
    """A JPEG with one more segment at its start."""
    return jpeg[:2] + bytes((0xFF, marker)) + (len(contents) + 2).to_bytes(2, "big") + contents + jpeg[2:]


def assert_upright(loaded, picture, orientation, tolerance=0):
    expected = UPRIGHT[orientation](picture)
    assert loaded.size == (expected.shape[1], expected.shape[0])
    assert np.abs(np.asarray(loaded, int) - expected).mean() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
def test_every_orientation_in_every_format(picture, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"save_all": True, "append_images": [Image.new("RGB", (36, 24))]} if kind == "MPO" else {}
    data = encoded(picture, kind, exif=exif, **options)
    assert_upright(load_photo(data), picture, orientation, tolerance=0 if kind in LOSSLESS else 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_in_xmp_alone(picture, orientation):
    png = with_chunk(encoded(picture, "PNG"), b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP % orientation)
    webp = encoded(picture, "WEBP", xmp=XMP % orientation)
    jpeg = encoded(picture, "JPEG", xmp=XMP % orientation)
    for data in (png, webp):
        assert_upright(load_photo(data), picture, orientation)
    assert_upright(load_photo(jpeg), picture, orientation, tolerance=4)


def test_orientation_that_a_caller_set_on_an_image(picture):
    image = Image.fromarray(picture)
    image.getexif()[0x0112] = 6
    assert_upright(load_photo(image), picture, 6)
    assert image.size == (36, 24) and image.getexif()[0x0112] == 6


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "MPO"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_broken_rational_leaves_the_orientation(picture, kind, orientation, order):
    options = {"save_all": True, "append_images": [Image.new("RGB", (36, 24))]} if kind == "MPO" else {}
    if kind == "AVIF":
        # Pillow refuses to write it.
        good = rational(orientation, order=order)
        bias = struct.pack(order + "ii", -1, 0)
        data = encoded(picture, kind, exif=good.replace(bias, struct.pack(order + "ii", -1, 7)))
        assert data.count(struct.pack(order + "ii", -1, 7)) == 1
        data = data.replace(struct.pack(order + "ii", -1, 7), bias)
    else:
        data = encoded(picture, kind, exif=rational(orientation, order=order), **options)
    assert_upright(load_photo(data), picture, orientation, tolerance=0 if kind in LOSSLESS else 4)


@pytest.mark.parametrize(
    "exif",
    [
        pytest.param(b"Exif\0\0\0\x08\0\x02", id="no header"),
        pytest.param(b"Exif\0\0", id="empty"),
        pytest.param(b"no EXIF at all", id="text"),
        pytest.param(b"Exif\0\0II*\0\xff\xff\xff\xff", id="far directory"),
        pytest.param(b"Exif\0\0II*\0\x08\0\0\0\xff\xff", id="missing entries"),
        pytest.param(exif_block(6)[:20], id="cut within the entry"),
        pytest.param(exif_block(0), id="orientation 0"),
        pytest.param(exif_block(9), id="orientation 9"),
        pytest.param(b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x02A\0\0\0", id="orientation of letters"),
        pytest.param(b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x0a\0\0\0\x01\xff\xff\xff\xff", id="lost rational"),
        pytest.param(exif_block(1, (0x011A, 2, 1, bytes(4)), (0x0128, 3, 1, b"\2\0\0\0")), id="resolution of letters"),
    ],
)
def test_broken_exif_counts_as_none(picture, exif):
    png = with_chunk(encoded(picture, "PNG"), b"eXIf", exif.removeprefix(b"Exif\0\0"))
    for data in (png, encoded(picture, "PNG", exif=exif), encoded(picture, "WEBP", exif=exif)):
        assert_upright(load_photo(data), picture, 1)
    image = Image.fromarray(picture)
    image.info["exif"] = exif
    assert_upright(load_photo(image), picture, 1)
    jpeg = encoded(picture, "JPEG")
    assert_upright(load_photo(with_segment(jpeg, 0xE1, exif)), picture, 1, tolerance=4)
    without_jfif = jpeg[:2] + jpeg[20:]
    assert_upright(load_photo(with_segment(without_jfif, 0xE1, exif)), picture, 1, tolerance=4)


@pytest.mark.parametrize("value", [None, "text", 7, (b"a", b"b")])
def test_metadata_of_odd_types_in_an_image(picture, value):
    image = Image.fromarray(picture)
    image.info |= {"exif": value, "xmp": value, "icc_profile": value, "Raw profile type exif": value}
    assert_upright(load_photo(image), picture, 1)


@pytest.mark.parametrize(
    "xmp", [b"<x tiff:Orientation=", b'tiff:Orientation="9"', b"\xff\xfe\0<", b'tiff:Orientation="six"']
)
def test_broken_xmp_counts_as_none(picture, xmp):
    png = with_chunk(encoded(picture, "PNG"), b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    for data in (png, encoded(picture, "WEBP", xmp=xmp)):
        assert_upright(load_photo(data), picture, 1)


HUGE = zlib.compress(bytes(80_000_000))


@pytest.mark.parametrize(
    ("kind", "contents"),
    [
        pytest.param(b"iCCP", b"name\0\0broken", id="iCCP damaged"),
        pytest.param(b"iCCP", b"name\0\7" + zlib.compress(b"x"), id="iCCP method"),
        pytest.param(b"iCCP", b"", id="iCCP empty"),
        pytest.param(b"iCCP", b"name\0\0" + HUGE, id="iCCP huge"),
        pytest.param(b"zTXt", b"comment\0\0" + HUGE, id="zTXt huge"),
        pytest.param(b"zTXt", b"comment\0\7x", id="zTXt method"),
        pytest.param(b"tEXt", b"comment\0" + bytes(70_000_000), id="tEXt huge"),
        pytest.param(b"iTXt", b"comment\0\1\0\0\0" + HUGE, id="iTXt huge"),
        pytest.param(b"tEXt", b"Raw profile type exif\0\nexif\n 9\nzz", id="raw profile"),
        pytest.param(b"pHYs", b"\0", id="pHYs short"),
        pytest.param(b"gAMA", b"\0", id="gAMA short"),
        pytest.param(b"cHRM", b"\0\0\0", id="cHRM short"),
        pytest.param(b"sRGB", b"", id="sRGB empty"),
        pytest.param(b"tRNS", b"\0", id="tRNS short"),
        pytest.param(b"acTL", b"\0\0", id="acTL short"),
        pytest.param(b"fcTL", b"\0\0", id="fcTL short"),
        pytest.param(b"eXIf", b"", id="eXIf empty"),
    ],
)
def test_broken_chunks_of_a_png(picture, kind, contents):
    data = encoded(picture, "PNG", exif=exif_block(6))
    assert_upright(load_photo(with_chunk(data, kind, contents)), picture, 6)


def test_broken_chunks_behind_the_pixels_or_with_a_wrong_check(picture):
    data = encoded(picture, "PNG", exif=exif_block(6))
    assert_upright(load_photo(with_chunk(data, b"tEXt", b"a\0b", check=1)), picture, 6)
    end = len(data) - 12
    assert_upright(load_photo(data[:end] + chunk(b"zTXt", b"a\0\0" + HUGE) + data[end:]), picture, 6)


@pytest.mark.parametrize(
    ("marker", "contents"),
    [
        pytest.param(0xE0, b"JFIF\0", id="JFIF short"),
        pytest.param(0xEE, b"Adobe", id="Adobe short"),
        pytest.param(0xE2, b"ICC_PROFILE\0", id="profile without number"),
        pytest.param(0xE2, b"ICC_PROFILE\0\1\3" + b"x" * 40, id="profile with missing parts"),
        pytest.param(0xE2, b"ICC_PROFILE\0\1\1" + b"x" * 40, id="profile damaged"),
        pytest.param(0xE2, b"MPF\0", id="MPF empty"),
        pytest.param(0xE2, b"MPF\0MM\0*\0\0\0\x08\0\1\xb0\1\0\4\0\0\0\1\0\0\0\2", id="MPF without entries"),
        pytest.param(0xED, b"Photoshop 3.0\x008BIM\4\4", id="Photoshop cut"),
        pytest.param(0xED, b"Photoshop 3.0\x008BIM\3\xed\0\0\0\0\0\1x", id="Photoshop resolution"),
        pytest.param(0xE1, b"http://ns.adobe.com/xap/1.0/\0", id="XMP empty"),
        pytest.param(0xFE, b"", id="comment empty"),
    ],
)
def test_broken_segments_of_a_jpeg(picture, marker, contents):
    data = with_segment(encoded(picture, "JPEG", exif=exif_block(6)), marker, contents)
    assert_upright(load_photo(data), picture, 6, tolerance=4)


def test_a_webp_cut_within_its_metadata(picture):
    data = encoded(picture, "WEBP", exif=exif_block(6) + bytes(400))
    assert_upright(load_photo(data[:-300]), picture, 6)
    data = encoded(picture, "WEBP", exif=exif_block(6), xmp=b"x" * 400)
    assert_upright(load_photo(data[:-300]), picture, 6)


def test_broken_tags_of_a_tiff(picture):
    data = bytearray(encoded(picture, "TIFF", tiffinfo={0x0112: 6, 0x010E: "a long description", 0x011A: 72.0}))
    order = "<" if data[:2] == b"II" else ">"
    start = struct.unpack_from(order + "I", data, 4)[0]
    broken = 0
    for entry in range(start + 2, start + 2 + 12 * struct.unpack_from(order + "H", data, start)[0], 12):
        if struct.unpack_from(order + "H", data, entry)[0] in (0x010E, 0x011A):
            data[entry + 8 : entry + 12] = b"\xff" * 4
            broken += 1
        if struct.unpack_from(order + "H", data, entry)[0] == 0x011A:
            struct.pack_into(order + "H", data, entry + 2, 2)
    assert broken == 2
    assert_upright(load_photo(bytes(data)), picture, 6)


def test_a_tiff_whose_sub_directories_lead_nowhere(picture):
    for tag in (0x8769, 0x8825, 0x014A):
        data = encoded(picture, "TIFF", tiffinfo={0x0112: 6, tag: 0x7FFFFFFF})
        assert_upright(load_photo(data), picture, 6)


def test_files_without_their_metadata_hold_the_same_pixels(picture):
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        data = encoded(picture, kind, exif=exif_block(1), icc_profile=b"profile")
        smaller, info = without_metadata(data)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(smaller))), np.asarray(load_photo(data)))
        assert b"profile" not in smaller or kind == "TIFF"
        assert kind == "TIFF" or info["icc_profile"] == b"profile"
    assert without_metadata(b"GIF89a") is None
    assert without_metadata(b"\xff\xd8\xff\xe1") is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "GIF"])
def test_any_damage_is_read_or_named(picture, kind):
    """Bytes changed and files cut anywhere: a picture, or an error that says so, and nothing else."""
    rng = np.random.default_rng(0)
    options = {"exif": rational(6) if kind in ("JPEG", "PNG", "WEBP") else exif_block(6)}
    options = {} if kind == "GIF" else options | {"icc_profile": bytes(rng.bytes(200))}
    data = encoded(picture, kind, **options)
    outcomes = []
    for _ in range(150):
        damaged = bytearray(data[: rng.integers(1, len(data))] if rng.random() < 0.3 else data)
        for position in rng.integers(0, min(len(damaged), 600), rng.integers(0, 6)):
            damaged[position] = rng.integers(0, 256)
        try:
            outcomes.append(load_photo(bytes(damaged), max_pixels=10**6).mode)
        except UnreadableImageError as error:
            assert " at 0x" not in str(error)
            outcomes.append("error")
    assert {"RGB", "error"} == set(outcomes)
