"""Latent directions: the component, `edits`, and what the checkpoint says of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from metaaux import MetaAuxInverter
from metaaux.editing import MAX_VALUE, apply_edits, check_edits
from metaaux.models.directions import Direction, LatentDirections


def direction(name, normal, scale=2.0, **changes):
    values = {"kind": "interfacegan", "low": -3.0, "high": 3.0, "accuracy": 0.9, "meaning": ""}
    return Direction(name=name, normal=torch.tensor(normal), scale=scale, **{**values, **changes})


@pytest.fixture
def two():
    """Two orthogonal directions in three dimensions."""
    return {"age": direction("age", [0.6, 0.8, 0.0]), "smile": direction("smile", [0.0, 0.0, 1.0], scale=0.5)}


@pytest.fixture(scope="module")
def edited_inverter(tiny_folder):
    """The tiny pipeline with two random directions."""
    normals = torch.nn.functional.normalize(torch.randn(2, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    directions = [
        direction(name, normal.tolist(), scale=3.0) for name, normal in zip(("age", "smile"), normals, strict=True)
    ]
    component = LatentDirections.from_directions(directions)
    inverter = MetaAuxInverter.from_pretrained(tiny_folder, latent_directions=component)
    inverter.set_progress_bar_config(disable=True)
    return inverter


class TestApplyEdits:
    def test_moves_along_the_normal(self, two):
        w = torch.tensor([[1.0, 1.0, 1.0]])
        torch.testing.assert_close(apply_edits(w, two, {"age": 1.5}), torch.tensor([[2.8, 3.4, 1.0]]))
        torch.testing.assert_close(w, torch.ones(1, 3))

    def test_several_at_once(self, two):
        w = torch.randn(2, 4, 3)  # W+: every entry moves alike
        moved = apply_edits(w, two, {"age": -1, "smile": 2})
        torch.testing.assert_close(moved - w, torch.tensor([-1.2, -1.6, 1.0]).expand(2, 4, 3))

    @pytest.mark.parametrize("edits", [None, {}, {"age": 0}])
    def test_nothing_to_do(self, two, edits):
        w = torch.randn(1, 3)
        torch.testing.assert_close(apply_edits(w, two, edits), w, rtol=0, atol=0)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -MAX_VALUE - 1, 1e30, "much", None])
    def test_values_that_are_none(self, two, value):
        with pytest.raises(ValueError, match="the edit age"):
            check_edits(two, {"age": value})

    def test_unknown_names_list_those_there_are(self, two):
        with pytest.raises(ValueError, match="unknown edit 'hair'; this model's directions: age, smile"):
            apply_edits(torch.zeros(1, 3), two, {"age": 1, "hair": 1})

    def test_another_generators_directions(self, two):
        with pytest.raises(ValueError, match="direction age has 3 values, w has 4"):
            apply_edits(torch.zeros(1, 4), two, {"age": 1})


class TestLatentDirections:
    def test_round_trip(self, two, tmp_path):
        LatentDirections.from_directions(list(two.values())).save_pretrained(tmp_path)
        loaded = LatentDirections.from_pretrained(tmp_path).as_dict()
        assert list(loaded) == ["age", "smile"]
        for name, expected in two.items():
            torch.testing.assert_close(loaded[name].normal, expected.normal)
            fields = ("name", "kind", "scale", "low", "high", "accuracy", "meaning", "gain")
            assert [getattr(loaded[name], f) for f in fields] == [getattr(expected, f) for f in fields]

    def test_half_precision_keeps_the_strength(self, tmp_path):
        normal = torch.nn.functional.normalize(torch.randn(512, generator=torch.Generator().manual_seed(1)), dim=0)
        component = LatentDirections.from_directions([direction("age", normal.tolist())])
        component.half().save_pretrained(tmp_path)
        loaded = LatentDirections.from_pretrained(tmp_path).as_dict()["age"].normal
        assert loaded.dtype == torch.float32
        assert loaded.norm().item() == pytest.approx(1, abs=1e-6)
        assert float(loaded @ normal) > 0.99999

    def test_forward_is_the_sum_of_the_edits(self, two):
        component = LatentDirections.from_directions(list(two.values()))
        expected = apply_edits(torch.zeros(1, 3), two, {"age": 0.5, "smile": -2})
        torch.testing.assert_close(component(torch.tensor([[0.5, -2.0]])), expected)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"name": "../age"}, "lower case"),
            ({"kind": "magic"}, "kind must be one of"),
            ({"scale": 0.0}, "scale must be positive"),
            ({"scale": math.nan}, "scale must be positive"),
            ({"gain": 0.0}, "gain must be positive"),
            ({"low": 0.5}, "must hold 0 inside"),
            ({"high": math.inf}, "must hold 0 inside"),
            ({"accuracy": 1.5}, "between 0 and 1"),
            ({"meaning": 3}, "must be a text"),
        ],
    )
    def test_entries_that_cannot_be(self, change, match):
        entry = {"name": "age", "kind": "principal", "scale": 1.0, "low": -1.0, "high": 1.0, "accuracy": None}
        LatentDirections(3, [{**entry, "meaning": ""}])
        with pytest.raises(ValueError, match=match):
            LatentDirections(3, [{**entry, "meaning": "", **change}])
        with pytest.raises(ValueError, match="has the keys"):
            LatentDirections(3, [entry])

    def test_normals_that_cannot_be(self, two):
        with pytest.raises(ValueError, match="names of their own"):
            LatentDirections.from_directions([two["age"], two["age"]])
        with pytest.raises(ValueError, match="unit normals"):
            LatentDirections.from_directions([direction("age", [1.0, 1.0, 0.0])])
        with pytest.raises(ValueError, match="one shape"):
            LatentDirections.from_directions([two["age"], direction("smile", [1.0])])
        with pytest.raises(ValueError, match="one shape"):
            LatentDirections.from_directions([])


class TestPipeline:
    def test_without_directions(self, tiny_inverter):
        assert tiny_inverter.directions == {}

    def test_edits_change_the_head(self, edited_inverter, tiny_inversion):
        assert list(edited_inverter.directions) == ["age", "smile"]
        plain = edited_inverter.render(tiny_inversion)
        older = edited_inverter.render(tiny_inversion, edits={"age": 2})
        both = edited_inverter.render(tiny_inversion, edits={"age": 2, "smile": -1})
        assert len({image.tobytes() for image in (plain, older, both)}) == 3
        # The order of the edits plays no part, and the inversion is as it was.
        assert edited_inverter.render(tiny_inversion, edits={"smile": -1, "age": 2}) == both
        assert edited_inverter.render(tiny_inversion) == plain

    def test_an_edit_is_another_w(self, edited_inverter, tiny_inversion):
        head = edited_inverter.prepare(tiny_inversion, {"age": 2})
        known = edited_inverter.directions["age"]
        torch.testing.assert_close(head.ws[0], tiny_inversion.w + 2 * known.scale * known.normal)
        assert edited_inverter.render(head, yaw=5) == edited_inverter.render(tiny_inversion, yaw=5, edits={"age": 2})
        orbit = edited_inverter.orbit(tiny_inversion, edits={"age": 2}, path=[(5, 0), (-5, 0)])
        assert orbit == [edited_inverter.render(head, yaw=yaw, pitch=0) for yaw in (5, -5)]

    def test_gain_of_adapted_heads(self, tiny_folder, edited_inverter, tiny_inversion):
        gained = [replace(known, gain=2.0) for known in edited_inverter.directions.values()]
        component = LatentDirections.from_directions(gained)
        stronger = MetaAuxInverter.from_pretrained(tiny_folder, latent_directions=component)
        adapted = stronger.prepare(tiny_inversion, {"age": 1})
        torch.testing.assert_close(adapted.ws, edited_inverter.prepare(tiny_inversion, {"age": 2}).ws)
        own_weights = replace(tiny_inversion, weight_offsets={}, offset_planes=None)
        same = [inverter.prepare(own_weights, {"age": 1}).ws for inverter in (stronger, edited_inverter)]
        assert torch.equal(*same)

    def test_unknown_names(self, edited_inverter, tiny_inversion):
        with pytest.raises(ValueError, match="unknown edit 'hair'; this model's directions: age, smile"):
            edited_inverter.render(tiny_inversion, edits={"hair": 1})

    def test_directions_of_another_generator(self, tiny_folder, tiny_inverter, tiny_inversion, two):
        for origin in (tiny_inverter.fingerprint, "0" * 64):
            normal = torch.nn.functional.normalize(torch.ones(16), dim=0)
            component = LatentDirections.from_directions([direction("age", normal.tolist())], origin)
            inverter = MetaAuxInverter.from_pretrained(tiny_folder, latent_directions=component)
            if origin == tiny_inverter.fingerprint:
                assert list(inverter.directions) == ["age"]
            else:
                with pytest.raises(ValueError, match="found in another generator"):
                    inverter.prepare(tiny_inversion, {"age": 1})

    def test_saved_with_the_checkpoint(self, edited_inverter, tiny_inversion, tmp_path):
        edited_inverter.save_pretrained(tmp_path)
        loaded = MetaAuxInverter.from_pretrained(tmp_path)
        assert list(loaded.directions) == ["age", "smile"]
        # Directions are not the generator's: inversions of the same generator still fit.
        edits = {"age": 1.5, "smile": -1}
        assert loaded.render(tiny_inversion, edits=edits) == edited_inverter.render(tiny_inversion, edits=edits)
