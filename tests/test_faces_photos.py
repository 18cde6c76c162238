from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from metaaux.faces import UnreadableImageError, load_photo


@pytest.fixture
def picture():
    rows, columns = np.mgrid[:20, :30]
    return np.stack([rows * 12, columns * 8, rows * 4 + columns * 4], axis=-1).astype(np.uint8)


def encoded(image, image_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def test_sources_agree(picture, tmp_path):
    image = Image.fromarray(picture)
    data = encoded(image, "PNG")
    (tmp_path / "photo.png").write_bytes(data)
    for source in (picture, image, data, io.BytesIO(data), tmp_path / "photo.png", str(tmp_path / "photo.png")):
        loaded = load_photo(source)
        assert loaded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(loaded), picture)


def test_the_given_image_is_not_shared(picture):
    image = Image.fromarray(picture)
    load_photo(image).paste((0, 0, 0), (0, 0, 30, 20))
    np.testing.assert_array_equal(np.asarray(image), picture)


def test_exif_rotation_is_applied(picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(picture), "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(load_photo(data)), np.rot90(picture, -1))


def test_arrays_of_other_types(picture):
    np.testing.assert_array_equal(np.asarray(load_photo(picture.astype(np.uint16) * 257)), picture)
    np.testing.assert_array_equal(np.asarray(load_photo(picture / 255)), picture)
    np.testing.assert_array_equal(np.asarray(load_photo(picture[..., :1]))[..., 2], picture[..., 0])
    np.testing.assert_array_equal(np.asarray(load_photo(picture[..., 0]))[..., 1], picture[..., 0])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_is_laid_on_white(mode):
    if mode in ("P", "PA"):
        # Index 0 is a transparent blue, index 1 an opaque black.
        image = Image.new(mode, (4, 4), 0 if mode == "P" else (0, 0))
        image.putpalette([0, 0, 255, 0, 0, 0])
        image.paste(1 if mode == "P" else (1, 255), (0, 0, 2, 4))
        if mode == "P":
            image = Image.open(io.BytesIO(encoded(image, "PNG", transparency=0)))
    else:
        image = Image.new("RGBA", (4, 4), (0, 0, 255, 0))
        image.paste((0, 0, 0, 255), (0, 0, 2, 4))
        image = image.convert(mode)
    assert image.mode == mode
    assert load_photo(image).getpixel((0, 0)) == (0, 0, 0)
    assert load_photo(image).getpixel((3, 3)) == (255, 255, 255)


def test_sixteen_bit_grey_files_keep_their_range():
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    loaded = np.asarray(load_photo(encoded(Image.fromarray(values), "PNG")))
    np.testing.assert_array_equal(loaded[..., 0], np.arange(256).reshape(16, 16))


@pytest.mark.parametrize("mode", ["CMYK", "L", "1", "YCbCr", "HSV"])
def test_other_modes_become_rgb(mode):
    white = Image.new("RGB", (3, 3), "white").convert(mode)
    assert load_photo(white).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("source", [b"", b"no image", io.BytesIO(b"GIF89a"), "missing.jpg", 7, None])
def test_refuses_what_is_no_image(source):
    with pytest.raises(UnreadableImageError):
        load_photo(source)


def test_refuses_damaged_files(picture):
    data = encoded(Image.fromarray(picture).resize((300, 200)), "JPEG")
    with pytest.raises(UnreadableImageError, match="damaged"):
        load_photo(data[: len(data) // 2])


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4, 5), np.uint8), np.zeros(4, np.uint8), np.zeros((4, 4), np.int64), np.full((4, 4), 2.0),
     np.full((4, 4), np.nan), np.zeros((0, 4), np.uint8)],
)  # fmt: skip
def test_refuses_other_arrays(array):
    with pytest.raises(UnreadableImageError):
        load_photo(array)


def test_the_limit_of_pixels_is_named(picture):
    for source in (picture, Image.fromarray(picture), encoded(Image.fromarray(picture), "PNG")):
        with pytest.raises(UnreadableImageError, match="599 pixels"):
            load_photo(source, max_pixels=599)
        assert load_photo(source, max_pixels=600).size == (30, 20)


def test_decompression_bombs_are_refused_before_decoding():
    # A PNG header of 60000 x 60000 pixels without any data.
    data = bytearray(encoded(Image.new("1", (1, 1)), "PNG"))
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    with pytest.raises(UnreadableImageError, match="limit of 80,000,000 pixels"):
        load_photo(bytes(data))
