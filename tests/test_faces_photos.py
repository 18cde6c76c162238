from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
import torch
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


def test_floats_a_hair_outside_are_clipped():
    array = np.array([[-1e-7, 1.0000001], [-0.0019, 1.0019]])
    for kind in (np.float32, np.float64, np.longdouble):
        np.testing.assert_array_equal(np.asarray(load_photo(array.astype(kind)))[..., 0], [[0, 255], [0, 255]])
    with pytest.raises(UnreadableImageError, match=r"from 0 to 1\.00200009.*\(1, 2\), float32"):
        load_photo(np.array([[0, 1.0020001]], np.float32))
    with pytest.raises(UnreadableImageError, match=r"from -0\.0022 to 1; "):
        load_photo(np.array([[-0.0022, 1]]))


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", ">f4", ">f8", "g"])
def test_floating_arrays_of_every_kind(picture, kind):
    loaded = load_photo((picture / 255).astype(kind))
    np.testing.assert_array_equal(np.asarray(loaded), picture)


def test_arrays_of_every_layout(picture):
    deep = picture.astype(np.uint16) * 257
    np.testing.assert_array_equal(np.asarray(load_photo(deep.astype(">u2"))), picture)
    np.testing.assert_array_equal(np.asarray(load_photo(np.asfortranarray(picture))), picture)
    np.testing.assert_array_equal(np.asarray(load_photo(picture[::-1, ::-2])), picture[::-1, ::-2])
    np.testing.assert_array_equal(np.asarray(load_photo(picture[..., ::-1])), picture[..., ::-1])
    mask = picture[..., 0] > 100
    np.testing.assert_array_equal(np.asarray(load_photo(mask))[..., 1], mask * 255)
    frozen = picture.copy()
    frozen.setflags(write=False)
    np.testing.assert_array_equal(np.asarray(load_photo(frozen)), picture)
    alpha = np.full_like(picture[..., :1], 255)
    for scale in (1, np.float32(1 / 255)):
        np.testing.assert_array_equal(np.asarray(load_photo(np.dstack([picture, alpha]) * scale)), picture)
        grey = load_photo(np.dstack([picture[..., :1], alpha * 0]) * scale)
        np.testing.assert_array_equal(np.asarray(grey), 255)


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((4, 4, 5), np.uint8), r"\[H, W\].*shape \(4, 4, 5\), uint8"),
        (np.zeros((4, 4, 0), np.uint8), r"shape \(4, 4, 0\)"),
        (np.zeros(4, np.uint8), r"shape \(4,\)"),
        (np.array(7), r"shape \(\)"),
        (np.zeros((3, 40, 50), np.float32), r"channels come last: array.transpose\(1, 2, 0\).*\(3, 40, 50\), float32"),
        (np.zeros((1, 40, 50, 3), np.float16), r"one picture at a time.*\(1, 40, 50, 3\), float16"),
        (np.zeros((4, 4), np.int64), r"int64, values from 0 to 0.*astype\('uint8'\)"),
        (np.array([[-5, 300]], np.int16), r"int16, values from -5 to 300"),
        (np.zeros((4, 4), np.uint32), "uint32"),
        (np.zeros((4, 4), complex), "complex128"),
        (np.full((4, 4), "x"), "<U1"),
        (np.full((4, 4), None), "object"),
        (np.full((4, 4), 2.0), r"values from 2 to 2; shape \(4, 4\), float64.*Divide"),
        (np.linspace(-1, 1, 16, dtype=np.float16).reshape(4, 4), r"values from -1 to 1.*\(array \+ 1\) / 2"),
        (np.full((4, 4), np.nan), "not finite"),
        (np.array([[0.5, np.inf]], np.float16), "not finite"),
        (np.zeros((0, 4), np.uint8), "empty"),
        (np.zeros((4, 0, 3)), "empty"),
    ],
)
def test_refuses_other_arrays(array, match):
    with pytest.raises(UnreadableImageError, match=match):
        load_photo(array)


def test_refuses_tensors_and_lists_in_words(picture):
    with pytest.raises(UnreadableImageError, match=r"NumPy array \[H, W, channels\], got torch.Tensor"):
        load_photo(torch.zeros(3, 8, 8))
    with pytest.raises(UnreadableImageError, match="got builtins.list"):
        load_photo(picture.tolist())


def test_every_mode_of_pillow_is_read_or_refused_in_words(picture):
    image = Image.fromarray(picture)
    for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "I", "I;16"):
        converted = (
            image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode if mode != "PA" else "P")
        )
        converted = converted.convert("PA") if mode == "PA" else converted
        loaded = load_photo(converted)
        assert (loaded.mode, loaded.size) == ("RGB", image.size)
    premultiplied = image.convert("LA").convert("La")
    np.testing.assert_array_equal(np.asarray(load_photo(premultiplied))[..., 0], np.asarray(image.convert("L")))
    floating = Image.fromarray(np.asarray(image.convert("L"), np.float32))
    with pytest.raises(UnreadableImageError, match=r"values from 0 to 2\d\d"):
        load_photo(floating)
    with pytest.raises(UnreadableImageError, match="found 0 to 70000"):
        load_photo(Image.fromarray(np.array([[0, 70000]], np.int32)))


def test_a_transparent_grey_of_sixteen_bits():
    values = np.array([[0, 1000], [1001, 65535]], np.uint16)
    data = encoded(Image.fromarray(values), "PNG", transparency=1000)
    np.testing.assert_array_equal(np.asarray(load_photo(data))[..., 0], [[0, 255], [4, 255]])


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
