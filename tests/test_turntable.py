"""Turntables: many views of one head in one picture."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from metaaux.export.turntable import PITCHES, YAWS, Turntable

GRID = {"yaws": (-20, 0, 15), "pitches": (-10, 5)}


@pytest.fixture(scope="module")
def table(tiny_inverter, tiny_inversion):
    return tiny_inverter.turntable(tiny_inversion, **GRID)


def pixels(image):
    return np.asarray(image.convert("RGB"), dtype=float)


class TestGrid:
    def test_each_view_is_what_render_gives(self, table, tiny_inverter, tiny_inversion):
        assert table.picture.size == (3 * 32, 2 * 32) and table.size == 32
        for yaw in GRID["yaws"]:
            for pitch in GRID["pitches"]:
                expected = tiny_inverter.render(tiny_inversion, yaw=yaw, pitch=pitch)
                assert np.array_equal(pixels(table.view(yaw, pitch)), pixels(expected))

    def test_the_nearest_view_is_taken(self, table):
        assert table.view(14, 90).tobytes() == table.view(15, 5).tobytes() != table.view(0, 5).tobytes()

    def test_a_prepared_head_gives_the_same(self, table, tiny_inverter, tiny_inversion):
        again = tiny_inverter.turntable(tiny_inverter.prepare(tiny_inversion), **GRID)
        assert again.picture.tobytes() == table.picture.tobytes()

    def test_size(self, tiny_inverter, tiny_inversion):
        small = tiny_inverter.turntable(tiny_inversion, yaws=[0], pitches=[0], size=16)
        expected = tiny_inverter.render(tiny_inversion, yaw=0, pitch=0).resize((16, 16), Image.Resampling.LANCZOS)
        assert small.picture.tobytes() == expected.tobytes()

    def test_progress_can_end_it(self, tiny_inverter, tiny_inversion):
        shares = []

        def stop(share):
            shares.append(share)
            if len(shares) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tiny_inverter.turntable(tiny_inversion, **GRID, progress=stop)
        assert shares == [1 / 6, 2 / 6]

    def test_the_usual_grid_turns_smoothly(self):
        assert max(np.diff(YAWS)) <= 3 and max(np.diff(PITCHES)) <= 10
        assert (YAWS[0], YAWS[-1], PITCHES[0], PITCHES[-1]) == (-45, 45, -30, 30)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"yaws": []}, "at least one yaw"),
            ({"size": 33}, "size must lie between 1 and 32"),
            ({"size": 0}, "size must lie between"),
            ({"yaws": [95]}, "between -90 and 90"),
            ({"edits": {"smile": 1}}, "smile"),
        ],
    )
    def test_wrong_arguments(self, tiny_inverter, tiny_inversion, options, message):
        with pytest.raises(ValueError, match=message):
            tiny_inverter.turntable(tiny_inversion, **options)

    def test_a_2d_generator_has_none(self, tiny_2d_inverter, crops, cameras):
        inversion = tiny_2d_inverter.invert(crops[0], steps=0, camera=cameras[0])
        with pytest.raises(ValueError, match="3D generator"):
            tiny_2d_inverter.turntable(inversion)


class TestFiles:
    def test_png_is_without_loss(self, table, tmp_path):
        table.save(tmp_path / "head.png")
        assert json.loads((tmp_path / "head.json").read_text()) == {
            "yaws": [-20.0, 0.0, 15.0],
            "pitches": [-10.0, 5.0],
            "size": 32,
        }
        loaded = Turntable.load(tmp_path / "head.png")
        assert loaded.picture.tobytes() == table.picture.tobytes() and loaded.angles == table.angles

    def test_webp(self, tmp_path):
        ramp = np.linspace(0, 255, 96)[None, :, None] * np.ones((64, 1, 3))
        table = Turntable(Image.fromarray(ramp.astype(np.uint8)), (-20.0, 0.0, 15.0), (-10.0, 5.0))
        table.save(tmp_path / "head.webp")
        loaded = Turntable.load(tmp_path / "head.webp")
        assert np.abs(pixels(loaded.picture) - pixels(table.picture)).mean() < 2

    def test_refusals(self, table, tmp_path):
        with pytest.raises(ValueError, match=".webp or .png"):
            table.save(tmp_path / "head.jpg")
        with pytest.raises(FileNotFoundError, match="does not exist"):
            table.save(tmp_path / "nowhere" / "head.png")
        long = Turntable(Image.new("RGB", (17000, 1)), tuple(range(17000)), (0.0,))
        with pytest.raises(ValueError, match="16383 pixels"):
            long.save(tmp_path / "long.webp")
        assert list(tmp_path.iterdir()) == []

    def test_files_that_do_not_belong_together(self, table, tmp_path):
        table.save(tmp_path / "head.png")
        Image.new("RGB", (32, 32)).save(tmp_path / "head.png")
        with pytest.raises(ValueError, match="its angles are those of"):
            Turntable.load(tmp_path / "head.png")
