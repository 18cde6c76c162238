"""Finding latent directions: boundaries, conditions, principal components, and a whole tiny run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from metaaux import MetaAuxInverter
from metaaux.faces.canonical import canonical_face
from metaaux.faces.measures import MEASURES, REGIONS, background_mask, face_measures, mean_colours, region_masks
from metaaux.models.age_gender import AgeGenderNetwork
from metaaux.models.directions import LatentDirections
from metaaux.training.attributes import Attributes
from metaaux.training.conditions import colour_sensitivity, held_direction, project_out, unexplained
from metaaux.training.directions import (
    DirectionsConfig,
    principal_components,
    regression_normals,
    separate,
    train,
)
from metaaux.training.head_samples import frontal_views
from metaaux.training.loading import load_generator


@pytest.fixture
def samples():
    """w [2000, 12], and an attribute that follows a known unit vector, with some noise."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((2000, 12)) * np.linspace(0.5, 2, 12)
    truth = rng.standard_normal(12)
    truth /= np.linalg.norm(truth)
    along = w @ truth
    return w, truth, along + 0.3 * along.std() * rng.standard_normal(2000)


class TestSeparate:
    def test_finds_the_planted_direction(self, samples):
        w, truth, values = samples
        boundary = separate(w, values, 0.2, 0.2)
        normal = boundary.normal
        assert np.linalg.norm(normal) == pytest.approx(1)
        assert normal @ truth > 0.95
        assert boundary.accuracy(normal) > 0.97 and boundary.accuracy(-normal) < 0.03

    def test_noise_is_not_separated(self, samples):
        w, _, _ = samples
        boundary = separate(w, np.random.default_rng(1).standard_normal(len(w)), 0.2, 0.25)
        assert 0.35 < boundary.accuracy(boundary.normal) < 0.65

    def test_samples_without_a_value_are_left_out(self, samples):
        w, truth, values = samples
        values = np.where(np.arange(len(w)) % 3 == 0, np.nan, values)
        boundary = separate(w, values, 0.2, 0.2)
        assert boundary.normal @ truth > 0.93 and boundary.accuracy(boundary.normal) > 0.95

    @pytest.mark.parametrize(
        ("values", "match"),
        [(np.full(2000, np.nan), "too few"), (np.ones(2000), "hardly varies"), (np.arange(2000) % 2.0, None)],
    )
    def test_values_that_separate_nothing(self, samples, values, match):
        if match is None:  # two values alone do make two classes
            separate(samples[0], values, 0.2, 0.2)
        else:
            with pytest.raises(ValueError, match=match):
                separate(samples[0], values, 0.2, 0.2)


class TestUnexplained:
    def test_what_conditions_say_is_taken_out(self, samples):
        # An attribute that mostly follows another one: its own part decides the boundary only without that.
        w, other, _ = samples
        own = np.eye(12)[0]
        smile = w @ other
        mouth = 4 * smile + w @ own + 3
        mouth[5], smile[7] = np.nan, np.nan
        rest = unexplained(mouth, smile[:, None])
        assert np.isnan(rest[[5, 7]]).all() and np.isfinite(np.delete(rest, [5, 7])).all()
        known = np.isfinite(rest)
        assert abs(np.corrcoef(rest[known], smile[known])[0, 1]) < 1e-9
        assert separate(w, mouth, 0.2, 0.2).normal @ other > 0.9
        assert abs(separate(w, rest, 0.2, 0.2).normal @ other) < 0.6

    def test_nothing_known(self):
        assert np.isnan(unexplained(np.full(4, np.nan), np.ones((4, 2)))).all()


class TestProjectOut:
    def test_conditions_stay_as_they_are(self):
        rng = np.random.default_rng(2)
        normal, *conditions = rng.standard_normal((4, 10))
        freed = project_out(normal / np.linalg.norm(normal), conditions)
        assert np.linalg.norm(freed) == pytest.approx(1)
        assert all(abs(freed @ condition) < 1e-9 for condition in conditions)
        # With one condition it is InterFaceGAN's n - (n·c)c.
        unit = conditions[0] / np.linalg.norm(conditions[0])
        expected = normal - (normal @ unit) * unit
        np.testing.assert_allclose(project_out(normal, conditions[:1]), expected / np.linalg.norm(expected), atol=1e-9)

    def test_nothing_left(self):
        normal = np.array([1.0, 0, 0])
        assert project_out(normal, []) is normal
        with pytest.raises(ValueError, match="within the span"):
            project_out(normal, [np.array([1.0, 1, 0]), np.array([0, 1.0, 0])])


class TestRegressionNormals:
    def test_finds_what_w_explains(self, samples):
        w, truth, values = samples
        noise = np.random.default_rng(1).standard_normal(len(w))
        values = np.stack([values, noise, -2 * w[:, 3]], axis=1)
        values[::7, 1] = np.nan
        found, axis = regression_normals(w, values)
        assert found @ truth > 0.95
        np.testing.assert_allclose(axis, -np.eye(12)[3], atol=0.02)

    def test_nothing_known_or_nothing_varies(self, samples):
        assert regression_normals(samples[0], np.full((2000, 2), np.nan)) == []
        assert regression_normals(samples[0], np.ones((2000, 2))) == []


class TestPrincipalComponents:
    def test_axes_and_deviations(self, samples):
        w, _, _ = samples
        axes, deviations = principal_components(w, 3)
        np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-9)
        np.testing.assert_allclose(((w - w.mean(0)) @ axes.T).std(0), deviations, rtol=1e-6)
        assert deviations[0] > deviations[1] > deviations[2]
        assert np.abs(axes[0]).argmax() == 11  # which varies most
        assert axes[0][11] > 0
        np.testing.assert_allclose(principal_components(w[::-1], 3)[0], axes, atol=1e-6)

    def test_too_many(self):
        with pytest.raises(ValueError, match="no 4 principal components"):
            principal_components(np.zeros((100, 3)), 4)


class TestFaceMeasures:
    @pytest.fixture
    def face(self):
        """The canonical face in a picture's axes: y down, z away."""
        return canonical_face().astype(np.float64) * [1, -1, -1]

    def test_each_follows_its_landmarks(self, face):
        plain = face_measures(face)
        assert tuple(plain) == MEASURES
        changes = {
            "smile": ([61, 291], [0, -0.03, 0]),
            "mouth_open": ([14], [0, 0.03, 0]),
            "eyes_open": ([159, 386], [0, -0.01, 0]),
            "face_width": ([454], [0.04, 0, 0]),
        }
        for name, (vertices, shift) in changes.items():
            moved = face.copy()
            moved[vertices] += shift
            measures = face_measures(moved)
            assert measures[name] > plain[name] * 1.02, name
            others = set(MEASURES) - {name} - ({"smile"} if name == "mouth_open" else set())
            assert all(measures[other] == pytest.approx(plain[other], rel=1e-6) for other in others), name

    def test_size_and_place_play_no_part(self, face):
        for name, value in face_measures(face * 250 + [40, 90, 5]).items():
            assert value == pytest.approx(face_measures(face)[name])

    def test_wrong_shape(self):
        with pytest.raises(ValueError, match=r"\[478, 3\]"):
            face_measures(np.zeros((478, 3)))


class TestMeanColours:
    def test_cheeks_and_edges(self):
        # The canonical face fills most of a crop: a grey one with red cheeks before a green wall and a blue floor.
        side = 64
        face = canonical_face().astype(np.float64) * [1, -1, -1]
        low, high = face[:, :2].min(0), face[:, :2].max(0)
        landmarks = (face - [*(low + high) / 2, 0]) * 0.7 * side / (high - low).max() + [side / 2, side / 2, 0]
        pixels = np.full((side, side, 3), 128, dtype=np.uint8)
        for cheek in (205, 425):
            x, y = landmarks[cheek, :2].astype(int)
            pixels[y - 12 : y + 12, x - 12 : x + 12] = (200, 0, 0)
        pixels[: side // 2, [*range(4), *range(side - 4, side)]] = (0, 100, 0)
        pixels[side // 2 :, :4] = (0, 0, 255)
        colours = mean_colours(pixels, region_masks(side, landmarks))
        assert colours.shape == (len(REGIONS), 3)
        np.testing.assert_allclose(colours, np.array([[200, 0, 0], [0, 100, 0]]) / 255)
        beside = mean_colours(pixels, region_masks(side, landmarks + [10 * side, 0, 0]))
        assert np.isnan(beside[0]).all() and np.isfinite(beside[1]).all()

    def test_what_is_no_crop(self):
        mask = background_mask(16)[None]
        with pytest.raises(ValueError, match="at least 16 pixels a side, got 8"):
            region_masks(8, np.zeros((468, 3)))
        for pixels in (np.zeros((16, 16, 3)), np.zeros((16, 16), np.uint8), np.zeros((16, 20, 3), np.uint8)):
            with pytest.raises(ValueError, match="pixels are uint8"):
                mean_colours(pixels, mask)
        with pytest.raises(ValueError, match="bool masks, got bool .1, 16, 16"):
            mean_colours(np.zeros((32, 32, 3), np.uint8), mask)


class TestHeldColours:
    def test_sensitivity_is_the_mean_square_move(self, tiny_folder):
        generator = load_generator(tiny_folder / "generator")
        attributes = Attributes(None, 1, torch.device("cpu"))
        random = torch.Generator().manual_seed(0)
        ws = torch.randn(10, generator.config.w_dim, generator=random)  # more than go through together
        step = 0.01 * torch.randn(generator.config.w_dim, generator=random)
        matrix = colour_sensitivity(generator, attributes, ws)
        mask = torch.from_numpy(background_mask(generator.config.image_size))
        with torch.no_grad():
            there, back = (frontal_views(generator, ws + sign * step, None)[..., mask].mean(2) for sign in (1, -1))
        # Images lie in [-1, 1] and colours in [0, 1]; noise has no skin.
        expected = ((there - back) / 4).square().mean().item()
        assert step.numpy() @ matrix @ step.numpy() == pytest.approx(expected, rel=0.02)
        np.testing.assert_allclose(matrix, matrix.T)

    @pytest.fixture
    def sensitivity(self):
        """Colours move along two axes alone."""
        return np.diag([1.0, 0.25, *[0.0] * 10])

    def test_least_change_of_the_direction(self, samples, sensitivity):
        w, truth, _ = samples
        conditions = [np.eye(12)[5], np.eye(12)[5] + 0.5 * np.eye(12)[7]]
        free = project_out(truth, conditions)

        def change(v):
            return np.sqrt(v @ sensitivity @ v) * (w @ v).std()

        kept = []
        for share in (0.5, 0.1, 0.01):
            limit = share * change(free)
            v = held_direction(truth, conditions, sensitivity, w, limit)
            assert np.linalg.norm(v) == pytest.approx(1) and np.abs(v[[5, 7]]).max() < 1e-9
            assert change(v) <= limit and change(v) == pytest.approx(limit, rel=1e-3)
            kept.append(v @ free)
        assert 1 > kept[0] > kept[1] > kept[2] > 0
        np.testing.assert_allclose(held_direction(truth, conditions, sensitivity, w, 100.0), free, atol=1e-9)
        # Where nothing but these axes may be left out, the nearest direction is without them.
        v = held_direction(truth, [], sensitivity, w, 1e-7)
        np.testing.assert_allclose(v[2:], project_out(truth, list(np.eye(12)[:2]))[2:], atol=1e-6)

    def test_what_cannot_be_held(self, samples, sensitivity):
        w, truth, _ = samples
        with pytest.raises(ValueError, match="within the span"):
            held_direction(truth, [truth], sensitivity, w, 0.1)
        with pytest.raises(ValueError, match="move with it, whatever is done"):
            held_direction(truth, [], np.eye(12), w, 0.1)


class TestTrain:
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls, tiny_folder, tmp_path_factory):
        """Of a run on the tiny generator; the attribute network has random weights."""
        torch.manual_seed(0)
        network = AgeGenderNetwork()
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        weights = tmp_path_factory.mktemp("networks") / "age_gender.safetensors"
        save_file(network.state_dict(), weights)
        return DirectionsConfig(
            generator=str(tiny_folder / "generator"),
            attributes=str(weights),
            sampling={"heads": 150, "shard": 50, "batch": 50, "workers": 1},
            # Noise has no background: without its colours the heads move as the attributes say.
            boundaries={"min_accuracy": 0.0, "conditions": {"age": ["gender"]}, "max_colour_change": None},
            components=2,
            calibration={"heads": 2},
        )

    @pytest.fixture(scope="class")
    @classmethod
    def run(cls, config, tmp_path_factory):
        folder = tmp_path_factory.mktemp("runs") / "directions"
        with pytest.warns(UserWarning, match="no direction"):
            train(config, folder)
        return folder

    def test_component_fits_the_pipeline(self, run, tiny_folder, tiny_inversion):
        component = LatentDirections.from_pretrained(run / "latent_directions")
        inverter = MetaAuxInverter.from_pretrained(tiny_folder, latent_directions=component)
        inverter.set_progress_bar_config(disable=True)
        assert {"pc1", "pc2"} <= set(inverter.directions)
        assert inverter.directions["pc1"].kind == "principal" and inverter.directions["pc1"].accuracy is None
        view = inverter.render(tiny_inversion)
        assert inverter.render(tiny_inversion, edits={"pc1": 2}) != view

    def test_report_accounts_for_every_attribute(self, run):
        report = json.loads((run / "directions.json").read_text())
        found = LatentDirections.from_pretrained(run / "latent_directions").as_dict()
        assert report["samples"] == 150
        named = {name for name in found if not name.startswith("pc")}
        assert named and named.isdisjoint(report["left_out"]), report["left_out"]
        # Random heads have no faces: what needs landmarks is left out, with the reason.
        assert named | set(report["left_out"]) == {"age", "gender", *MEASURES}
        assert all("too few" in report["left_out"][name] for name in MEASURES)
        for name in named:
            figures = report["directions"][name]
            assert figures["accuracy"] == found[name].accuracy and figures["slope"] > 0
            assert all(0 <= effect["background"] < 1 for effect in figures["effects"])
            assert len(figures["effects"]) == 6 and found[name].low <= -1 and found[name].high >= 1
        assert Image.open(run / "sheets" / "directions.png").width == 10 * 32

    def test_conditions_hold(self, run):
        report = json.loads((run / "directions.json").read_text())
        tensors = [load_file(run / "samples" / f"{index:05d}.safetensors") for index in range(3)]
        w = torch.cat([tensor["w"] for tensor in tensors]).double().numpy()
        values = torch.cat([tensor["values"][:, 1] for tensor in tensors]).double().numpy()
        gender = separate(w, values, 0.2, 0.2).normal
        if "age" not in report["left_out"]:
            age = LatentDirections.from_pretrained(run / "latent_directions").as_dict()["age"].normal
            assert abs(float(age.double().numpy() @ gender)) < 1e-4

    def test_an_interrupted_run_goes_on(self, run, config, tmp_path):
        samples = tmp_path / "again" / "samples"
        samples.mkdir(parents=True)
        for name in ("settings.json", "00000.safetensors", "00002.safetensors"):
            (samples / name).write_bytes((run / "samples" / name).read_bytes())
        kept = (samples / "00000.safetensors").stat().st_mtime_ns
        with pytest.warns(UserWarning, match="no direction"):
            train(config, tmp_path / "again", resume=True)
        assert (samples / "00000.safetensors").stat().st_mtime_ns == kept
        first, second = (load_file(folder / "samples" / "00001.safetensors") for folder in (run, tmp_path / "again"))
        torch.testing.assert_close(first, second, equal_nan=True)
        assert not list(samples.glob(".*"))

    def test_samples_are_not_mixed_or_lost(self, run, config):
        with pytest.raises(FileExistsError, match="holds samples of an earlier run: resume it"):
            train(config, run)
        changed = config.model_copy(deep=True)
        changed.sampling.truncation = 0.5
        with pytest.raises(ValueError, match="made with another truncation"):
            train(changed, run, resume=True)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"conditions": {"age": ["hair"]}}, "conditions names hair"),
            ({"extremes": 0.6}, "extremes.*\n.*less than or equal to 0.5"),
            ({"held_out": 0.0}, "held_out.*\n.*greater than 0"),
        ],
    )
    def test_settings_that_cannot_be(self, config, change, match):
        with pytest.raises(ValueError, match=match):
            DirectionsConfig(generator=config.generator, boundaries=change)
