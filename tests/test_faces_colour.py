"""The same picture in other colour spaces is the same photo. The profiles are built here, after ICC.1:2010."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from metaaux.faces import load_photo

D50 = np.array([0.9642, 1.0, 0.8249])
WHITES = {"D65": (0.3127, 0.3290), "D50": (0.3457, 0.3585)}
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
#: Primaries x, y, the white and the exponent; None is sRGB's curve.
SPACES = {
    "sRGB": (((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)), "D65", None),
    "Adobe RGB": (((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)), "D65", 563 / 256),
    "Display P3": (((0.68, 0.32), (0.265, 0.69), (0.15, 0.06)), "D65", None),
    "ProPhoto RGB": (((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001)), "D50", 1.8),
    "linear Rec. 2020": (((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)), "D65", 1.0),
}


def colorants(name):
    """Columns: the XYZ of red, green and blue, adapted to D50."""
    primaries, white, _ = SPACES[name]
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    x, y = WHITES[white]
    white = np.array([x / y, 1, (1 - x - y) / y])
    columns = columns * np.linalg.solve(columns, white)
    scale = np.diag((BRADFORD @ D50) / (BRADFORD @ white))
    return np.linalg.inv(BRADFORD) @ scale @ BRADFORD @ columns


def linear(values):
    """sRGB's curve, from 0..1 to light."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def srgb_values(light):
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def fixed(value):
    return struct.pack(">i", round(value * 65536))


def curve(exponent):
    if exponent is None:
        return b"para\0\0\0\0\0\3\0\0" + b"".join(map(fixed, (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)))
    return b"curv\0\0\0\0\0\0\0\1" + struct.pack(">H", round(exponent * 256)) + b"\0\0"


def icc(space, tags, connection=b"XYZ ", kind=b"mntr"):
    """A profile of tags [(name, contents)]."""
    tags = [(b"desc", b"desc\0\0\0\0\0\0\0\5test\0" + bytes(79)), (b"cprt", b"text\0\0\0\0none\0\0\0\0"), *tags]
    table, body = struct.pack(">I", len(tags)), b""
    for name, contents in tags:
        contents += bytes(-len(contents) % 4)
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(contents))
        body += contents
    header = struct.pack(">I", 128 + len(table + body)) + b"\0\0\0\0\2\x40\0\0" + kind + space + connection
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + b"".join(map(fixed, D50))
    return header.ljust(128, b"\0") + table + body


def rgb_profile(name):
    def xyz(column):
        return b"XYZ \0\0\0\0" + b"".join(map(fixed, column))

    red, green, blue = colorants(name).T
    trc = curve(SPACES[name][2])
    return icc(
        b"RGB ",
        [(b"wtpt", xyz(D50)), (b"rXYZ", xyz(red)), (b"gXYZ", xyz(green)), (b"bXYZ", xyz(blue))]
        + [(b"rTRC", trc), (b"gTRC", trc), (b"bTRC", trc)],
    )


def grey_profile(exponent):
    return icc(b"GRAY", [(b"wtpt", b"XYZ \0\0\0\0" + b"".join(map(fixed, D50))), (b"kTRC", curve(exponent))])


def inks_profile(gain=1.6, grid=9):
    """CMYK whose inks spread: a share c of ink leaves (1 - c) ** gain of its light."""
    inks = np.stack(np.meshgrid(*[np.linspace(0, 1, grid)] * 4, indexing="ij"), -1).reshape(-1, 4)
    values = (1 - inks[:, :3]) ** gain * (1 - inks[:, 3:]) ** gain
    xyz = linear(values) @ colorants("sRGB").T / D50
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], -1)
    table = np.rint(lab * [65280 / 100, 256, 256] + [0, 32768, 32768]).astype(">u2").tobytes()
    identity = b"".join(map(fixed, np.eye(3).ravel()))
    ends = struct.pack(">HH", 0, 65535)
    lut = b"mft2\0\0\0\0\4\3" + bytes((grid, 0)) + identity + struct.pack(">HH", 2, 2) + ends * 4 + table + ends * 3
    return icc(b"CMYK", [(b"A2B0", lut)], connection=b"Lab ", kind=b"prtr")


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def picture():
    """Smooth colours [64, 96, 3] over all of sRGB's gamut, uint8."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((96, 64), Image.Resampling.BILINEAR))


def into(picture, name, levels=255):
    """The picture's values in another space, of `levels`."""
    light = linear(picture / 255) @ (np.linalg.inv(colorants(name)) @ colorants("sRGB")).T
    exponent = SPACES[name][2]
    light = light.clip(0, 1)
    return np.rint((srgb_values(light) if exponent is None else light ** (1 / exponent)) * levels)


def mse(loaded, picture):
    return float(np.mean(((np.asarray(loaded, float) - picture) / 127.5) ** 2))


@pytest.mark.parametrize("name", ["Adobe RGB", "Display P3", "ProPhoto RGB"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_the_same_picture_in_every_space(picture, name, kind):
    stored = Image.fromarray(into(picture, name).astype(np.uint8))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(stored, kind, icc_profile=rgb_profile(name), **options)
    assert mse(stored, picture) > 2e-3
    assert mse(load_photo(data), picture) < 1e-4
    assert mse(load_photo(Image.open(io.BytesIO(data))), picture) < 1e-4


@pytest.mark.parametrize("kind", ["JPEG", "AVIF"])
def test_profiles_of_lossy_formats(picture, kind):
    options = {"quality": 98, "subsampling": "4:4:4"}
    plain = load_photo(encoded(Image.fromarray(picture), kind, **options))
    stored = Image.fromarray(into(picture, "Display P3").astype(np.uint8))
    loaded = load_photo(encoded(stored, kind, icc_profile=rgb_profile("Display P3"), **options))
    assert mse(loaded, np.asarray(plain)) < 2e-4


def test_profile_of_heic(picture):
    pillow_heif = pytest.importorskip("pillow_heif")
    stored = Image.fromarray(into(picture, "Display P3").astype(np.uint8))
    stored.info["icc_profile"] = rgb_profile("Display P3")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(stored).save(buffer, quality=100, chroma=444)
    assert mse(stored, picture) > 2e-3
    assert mse(load_photo(buffer.getvalue()), picture) < 2e-4


def test_srgb_profiles_leave_the_pixels_as_they_are(picture):
    for profile in (rgb_profile("sRGB"), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()):
        data = encoded(Image.fromarray(picture), "PNG", icc_profile=profile)
        np.testing.assert_array_equal(np.asarray(load_photo(data)), picture)


@pytest.mark.parametrize("exponent", [1.0, 1.8, 2.2, 3.0])
def test_grey_profiles(picture, exponent):
    grey = picture[..., 1]
    light = linear(grey / 255)
    stored = Image.fromarray(np.rint(light ** (1 / exponent) * 255).astype(np.uint8))
    data = encoded(stored, "PNG", icc_profile=grey_profile(exponent))
    # Light itself has few levels of 8 bits in the shadows.
    limit = 4e-4 if exponent == 1 else 1e-4
    assert mse(load_photo(data), grey[..., None]) < limit


@pytest.mark.parametrize("exponent", [1.0, 1.8])
def test_sixteen_bit_grey_with_a_profile(picture, exponent):
    grey = picture[..., 1]
    stored = Image.fromarray(np.rint(linear(grey / 255) ** (1 / exponent) * 65535).astype(np.uint16))
    for kind in ("PNG", "TIFF"):
        data = encoded(stored, kind, icc_profile=grey_profile(exponent))
        assert mse(load_photo(data), grey[..., None]) < 1e-4


def test_sixteen_bit_colours_with_a_profile(picture):
    values = into(picture, "ProPhoto RGB", 65535).astype(">u2")
    # Pillow writes no RGB of 16 bits: a TIFF by hand, of one strip.
    profile = rgb_profile("ProPhoto RGB")
    height, width = values.shape[:2]
    after = 14 + 12 * 11
    short = {256: width, 257: height, 259: 1, 262: 2, 277: 3, 278: height, 284: 1}
    tags = [(tag, 3, 1, value << 16) for tag, value in short.items()]
    tags += [(258, 3, 3, after), (273, 4, 1, after + 6), (279, 4, 1, values.nbytes)]
    tags += [(34675, 7, len(profile), after + 6 + values.nbytes)]
    assert after == 14 + 12 * len(tags)
    directory = b"".join(struct.pack(">HHII", *tag) for tag in sorted(tags))
    data = b"MM\0*\0\0\0\x08" + struct.pack(">H", len(tags)) + directory + bytes(4)
    data += b"\0\x10" * 3 + values.tobytes() + profile
    assert mse(load_photo(data), picture) < 1e-4


def test_inks_with_a_profile(picture):
    gain = 1.6
    values = picture / 255
    black = 1 - values.max(-1, keepdims=True) ** (1 / gain)
    rest = np.divide(values ** (1 / gain), 1 - black, out=np.ones_like(values), where=black < 1)
    stored = Image.fromarray(np.rint(np.concatenate([1 - rest, black], -1) * 255).astype(np.uint8), "CMYK")
    for kind in ("TIFF", "JPEG"):
        options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
        plain = load_photo(encoded(stored, kind, **options))
        with_profile = load_photo(encoded(stored, kind, icc_profile=inks_profile(gain), **options))
        assert mse(plain, picture) > 0.01
        assert mse(with_profile, picture) < 3e-4


def test_lab(picture):
    lab = ImageCms.profileToProfile(
        Image.fromarray(picture),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    assert mse(load_photo(lab), picture) < 2e-4
    assert mse(load_photo(encoded(lab, "TIFF")), picture) < 2e-4


def test_transparency_with_a_profile(picture):
    alpha = np.repeat(np.linspace(0, 255, 96).round().astype(np.uint8)[None], 64, axis=0)
    share = alpha[..., None] / 255
    stored = np.dstack([into(picture, "Adobe RGB").astype(np.uint8), alpha])
    data = encoded(Image.fromarray(stored), "PNG", icc_profile=rgb_profile("Adobe RGB"))
    assert mse(load_photo(data), picture * share + 255 * (1 - share)) < 1e-4
    grey = np.rint(linear(picture[..., 0] / 255) ** (1 / 1.8) * 255).astype(np.uint8)
    data = encoded(Image.fromarray(np.dstack([grey, alpha])), "PNG", icc_profile=grey_profile(1.8))
    assert mse(load_photo(data), picture[..., :1] * share + 255 * (1 - share)) < 1e-4


def test_palettes_with_a_profile(picture):
    palette = Image.fromarray(picture).quantize(200)
    expected = np.asarray(palette.convert("RGB"))
    colours = np.array(palette.getpalette()).reshape(-1, 3)
    palette.putpalette(into(colours, "Display P3").astype(np.uint8).ravel().tolist())
    data = encoded(palette, "PNG", icc_profile=rgb_profile("Display P3"))
    assert Image.open(io.BytesIO(data)).mode == "P"
    assert mse(load_photo(data), expected) < 1e-4


@pytest.mark.parametrize(
    "profile",
    [
        b"",
        b"no profile",
        bytes(200),
        rgb_profile("Adobe RGB")[:-200],
        rgb_profile("Adobe RGB")[:140],
        rgb_profile("Adobe RGB").replace(b"acsp", b"xxxx"),
        rgb_profile("Adobe RGB").replace(b"rTRC", b"xxxx"),
        rgb_profile("Adobe RGB").replace(b"mntr", b"nmcl"),
        grey_profile(1.8),
        inks_profile(),
    ],
)
def test_other_profiles_count_as_none(picture, profile):
    image = Image.fromarray(picture)
    image.info["icc_profile"] = profile
    np.testing.assert_array_equal(np.asarray(load_photo(image)), picture)
    data = encoded(Image.fromarray(picture), "WEBP", lossless=True, icc_profile=profile)
    np.testing.assert_array_equal(np.asarray(load_photo(data)), picture)


def test_profiles_of_other_spaces_than_the_mode_count_as_none(picture):
    grey, inks = Image.fromarray(picture[..., 0]), Image.fromarray(picture).convert("CMYK")
    for image in (grey, inks):
        expected = np.asarray(load_photo(image))
        image.info["icc_profile"] = rgb_profile("Adobe RGB")
        np.testing.assert_array_equal(np.asarray(load_photo(image)), expected)


def test_profile_and_orientation_together(picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(into(picture, "Adobe RGB").astype(np.uint8))
    data = encoded(stored, "PNG", icc_profile=rgb_profile("Adobe RGB"), exif=exif)
    assert mse(load_photo(data), np.rot90(picture, -1)) < 1e-4
    broken = data[:33] + b"\0\0\0\1pHYs\0\0\0\0\0" + data[33:]
    assert mse(load_photo(broken), np.rot90(picture, -1)) < 1e-4
