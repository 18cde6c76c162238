"""The demo's parts: settings, checks of inputs, streaming and cancelling, sessions."""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from dataclasses import replace

import gradio as gr
import pytest
import torch
from PIL import Image

from metaaux import MetaAuxInverter
from metaaux.demo import Settings, build_demo, launch
from metaaux.demo.engine import Engine
from metaaux.demo.handlers import FURTHER_SLIDERS, NAMED_SLIDERS, VIEWPOINT_PARTS, Handlers
from metaaux.demo.pictures import loss_charts, note_card, progress_bar
from metaaux.demo.session import Session, Visitor
from metaaux.demo.texts import notice
from metaaux.demo.validation import (
    check_angle,
    check_edits,
    check_flip,
    check_integer,
    check_inversion_file,
    explained,
    read_photos,
)
from metaaux.hub.loading import embedded_model_folder
from metaaux.inversion import max_file_bytes
from metaaux.models.directions import Direction, LatentDirections


@pytest.fixture(scope="module", autouse=True)
def warmed_up():
    """No engine is left warming up: Python would stop its thread at the end inside of PyTorch, which then aborts."""
    yield
    for thread in threading.enumerate():
        if thread.name == "load-models":
            thread.join()


@pytest.fixture(scope="module")
def flat_handlers(tiny_2d_inverter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flat") / "model"
    tiny_2d_inverter.save_pretrained(folder)
    settings = Settings(models=(str(folder),), device="cpu")
    engine = Engine(settings)
    engine.start()
    return Handlers(engine, settings)


class TestSettings:
    def test_defaults_are_the_embedded_model(self):
        assert Settings.from_environment({}) == Settings() and Settings().models == ("metaaux-mini",)

    def test_environment(self):
        settings = Settings.from_environment(
            {"METAAUX_MODELS": "a/b, c", "METAAUX_MCP": "1", "METAAUX_WORKERS": "3", "METAAUX_DEVICE": "cpu"}
        )
        assert settings.models == ("a/b", "c") and settings.mcp and settings.workers == 3 and settings.device == "cpu"

    def test_tools_are_offered_where_they_can_be(self):
        assert Settings().mcp == (importlib.util.find_spec("mcp") is not None)
        assert not Settings.from_environment({"METAAUX_MCP": "0"}).mcp

    def test_recordings_are_made_unless_they_are_not_wanted(self, engine):
        assert Settings().cuda_graphs and engine.inverter()._graphs is not None
        assert not Settings.from_environment({"METAAUX_CUDA_GRAPHS": "off"}).cuda_graphs

    def test_precision(self, tiny_folder, monkeypatch):
        monkeypatch.setattr(Engine, "_warm_up", lambda self: None)
        assert Settings().precision is None
        settings = Settings.from_environment({"METAAUX_PRECISION": "bfloat16", "METAAUX_DEVICE": "cpu"})
        assert settings.precision == "bfloat16"
        engine = Engine(replace(settings, models=(str(tiny_folder),)))
        engine.start()
        assert engine.inverter().precision == "bfloat16"

    def test_no_recordings_where_a_process_lives_for_one_call(self, tiny_folder, monkeypatch):
        monkeypatch.setattr("metaaux.demo.engine.spaces_config.zero_gpu", True)
        monkeypatch.setattr("metaaux.demo.engine.on_gpu", lambda function, duration: function)
        engine = Engine(Settings(models=(str(tiny_folder),), device="cpu"))
        engine.start()
        assert engine.inverter()._graphs is None

    @pytest.mark.parametrize(
        ("name", "value"),
        [("METAAUX_WORKERS", "0"), ("METAAUX_MAX_QUEUE", "x"), ("METAAUX_MODELS", " ,"), ("METAAUX_PRECISION", "fp8")],
    )
    def test_wrong_values_are_named(self, name, value):
        with pytest.raises(ValueError, match=name):
            Settings.from_environment({name: value})


class TestChecks:
    @pytest.mark.parametrize("value", [-1, 21, 2.5, float("nan"), float("inf"), "3", True, None, [1]])
    def test_integer_refuses(self, value):
        with pytest.raises(ValueError, match="steps must be a"):
            check_integer("steps", value, 0, 20)

    def test_integer_takes_whole_floats(self):
        result = check_integer("steps", 3.0, 0, 20)
        assert result == 3 and isinstance(result, int)

    @pytest.mark.parametrize("value", [45.1, -46, float("nan"), "1"])
    def test_angle_refuses(self, value):
        with pytest.raises(ValueError, match="yaw must"):
            check_angle("yaw", value, 45)

    def test_angle_none_is_the_photos(self):
        assert check_angle("yaw", None, 45) is None and check_angle("yaw", -45, 45) == -45.0

    def test_edits(self):
        smile = Direction("smile", "interfacegan", None, 1.0, -2.0, 2.5, 0.9, "smiles")
        directions = {"smile": smile}
        assert check_edits({"smile": 2}, directions) == {"smile": 2.0}
        assert check_edits(None, directions) == {} == check_edits({"smile": 0}, directions)
        for wrong, message in (
            ({"age": 1}, "no direction 'age'; available: smile"),
            ({"smile": 2.6}, "between -2 and 2.5"),
            ({"smile": "x"}, "must be a number"),
            ([1], "must be a dictionary"),
        ):
            with pytest.raises(ValueError, match=message):
                check_edits(wrong, directions)
        with pytest.raises(ValueError, match="model has no directions"):
            check_edits({"age": 1}, {})

    def test_flip(self):
        assert [check_flip(name) for name in ("automatic", "on", "off")] == [None, True, False]
        for wrong in (None, "maybe", True):
            with pytest.raises(ValueError, match="flip must be one of"):
                check_flip(wrong)

    def test_photos(self, tmp_path):
        paths = []
        for number in range(3):
            paths.append(str(tmp_path / f"{number}.png"))
            Image.new("RGB", (8, 4)).save(paths[-1])
        settings = Settings(max_photos=2)
        assert [photo.size for photo in read_photos([paths[0], None], settings)] == [(8, 4)]
        with pytest.raises(ValueError, match="up to 2 photos"):
            read_photos(paths, settings)
        with pytest.raises(ValueError, match="no photo yet"):
            read_photos([None], settings)

    def test_messages_name_the_file_and_not_its_folder(self, tmp_path):
        path = tmp_path / "holiday.jpg"
        path.write_text("not a picture")
        with pytest.raises(ValueError, match="'holiday.jpg' is not an image") as caught:
            read_photos([str(path)], Settings())
        assert str(tmp_path) not in str(caught.value)

    def test_file_limits(self, tmp_path):
        large, empty = tmp_path / "large.safetensors", tmp_path / "empty.safetensors"
        large.write_bytes(b"0" * 1_000_001)
        empty.touch()
        with pytest.raises(ValueError, match="up to 1 MB"):
            check_inversion_file(str(large), 1_000_000)
        with pytest.raises(ValueError, match="is empty"):
            check_inversion_file(str(empty), 10)
        with pytest.raises(ValueError, match="no inversion file"):
            check_inversion_file(None, 10)

    def test_errors_of_input_are_shown_and_others_are_not(self, caplog):
        with pytest.raises(gr.Error, match="Too small"):
            with explained():
                raise ValueError("too  small")
        with pytest.raises(gr.Error, match="Something went wrong") as caught:
            with explained():
                raise KeyError("/secret/path")
        assert "secret" not in caught.value.message and "secret" in caplog.text


class TestEngine:
    def test_every_step_is_one_result_and_the_last_has_the_file(self, engine, crops, cameras, tmp_path):
        path = tmp_path / "head.safetensors"
        model = engine.settings.models[0]
        results = list(engine.invert(model, [crops[0]], [cameras[0]], 2, None, str(path)))
        assert [result.step for result in results] == [-1, 0, 1, 2]
        assert [result.path for result in results] == [None, None, None, str(path)]
        direct = engine.inverter().invert(crops[0], steps=2, camera=cameras[0])
        assert engine.inverter().load_inversion(path).w.equal(direct.w)

    def test_closing_frees_the_worker_within_one_step(self, engine):
        finished = threading.Event()
        reports = []

        def run(report):
            try:
                for number in range(1000):
                    time.sleep(0.02)
                    reports.append(number)
                    report(number)
            finally:
                finished.set()

        results = engine._workers.stream(run)
        assert next(results) == 0
        results.close()
        seen = len(reports)
        assert finished.wait(1) and len(reports) <= seen + 2
        # The only worker is free again.
        assert list(engine._workers.stream(lambda report: report("next"))) == ["next"]

    def test_errors_of_the_computation_arrive(self, engine):
        def run(report):
            report(1)
            raise ValueError("no surface")

        results = engine._workers.stream(run)
        assert next(results) == 1
        with pytest.raises(ValueError, match="no surface"):
            next(results)

    def test_no_more_than_workers_compute(self, engine):
        running, most = [0], [0]

        def run(report):
            running[0] += 1
            most[0] = max(most[0], running[0])
            time.sleep(0.02)
            running[0] -= 1

        threads = [threading.Thread(target=lambda: list(engine._workers.stream(run))) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most[0] == engine.settings.workers == 1

    def test_every_head_of_the_model_may_be_uploaded(self, engine, tiny_inversion, tmp_path):
        inverter = engine.inverter()
        tiny_inversion.save(tmp_path / "head.safetensors")
        assert (tmp_path / "head.safetensors").stat().st_size <= engine.max_head_bytes()
        assert engine.max_head_bytes() == max_file_bytes(inverter.generator, inverter.auxiliary)

    def test_unknown_model(self, engine):
        with pytest.raises(ValueError, match="no model '/etc' here"):
            engine.inverter("/etc")

    def test_a_model_that_cannot_be_loaded_is_a_message(self, tmp_path, caplog):
        engine = Engine(Settings(models=(str(tmp_path),)))
        engine.start()
        with pytest.raises(ValueError, match="could not be loaded"):
            engine.inverter()
        assert str(tmp_path) in caplog.text


class TestTwoDimensionalModel:
    """Its heads have one view, the photo's: nothing to turn, no video, no mesh."""

    def test_viewpoint_controls_are_hidden(self, flat_handlers, engine):
        flat = flat_handlers.opened(flat_handlers.settings.models[0], 5)[4 : 4 + VIEWPOINT_PARTS]
        solid = Handlers(engine, engine.settings).opened(engine.settings.models[0], 5)[4 : 4 + VIEWPOINT_PARTS]
        assert [part["visible"] for part in flat] == [False] * 3
        assert [part["visible"] for part in solid] == [True] * 3

    def test_photo_to_view(self, flat_handlers, crops, cameras, tmp_path, monkeypatch):
        model = flat_handlers.settings.models[0]
        path = tmp_path / "head.safetensors"
        *_, last = flat_handlers.engine.invert(model, [crops[0]], [cameras[0]], 1, None, str(path))
        monkeypatch.setattr("metaaux.demo.handlers.save_picture", lambda image, name="view.png": image)
        visitor = Visitor()
        visitor.replace(Session(model, last.path, 5.0, 0.0))
        _, image, same = flat_handlers.turn(visitor, 10.0, 0.0)
        assert image.tobytes() == last.image.tobytes() and same.session.model == model

    def test_steps_that_are_right_are_left_alone(self, flat_handlers):
        model = flat_handlers.settings.models[0]
        usual = flat_handlers.engine.inverter().config.inner_steps
        assert flat_handlers.opened(model, usual)[1] == gr.skip()
        assert flat_handlers.opened(model, usual + 1)[1] == usual


class TestEditSliders:
    @pytest.fixture
    def handlers(self, tiny_folder, tmp_path):
        axes = torch.eye(16)
        directions = [
            Direction("pc1", "principal", axes[0], 1.0, -3.0, 3.0, None, ""),
            Direction("smile", "interfacegan", axes[1], 1.0, -2.0, 2.5, 0.9, "smiles more"),
        ]
        component = LatentDirections.from_directions(directions)
        MetaAuxInverter.from_pretrained(tiny_folder, latent_directions=component).save_pretrained(tmp_path / "model")
        engine = Engine(Settings(models=(str(tmp_path / "model"),), device="cpu"))
        engine.start()
        return Handlers(engine, engine.settings)

    def test_directions_with_a_meaning_come_first(self, handlers):
        model = handlers.settings.models[0]
        _, _, none, further, *rest = handlers.opened(model, 5)
        sliders = rest[VIEWPOINT_PARTS:]
        assert (none["visible"], further["visible"]) == (False, True)
        shown = {number: slider["label"] for number, slider in enumerate(sliders) if slider["visible"]}
        assert shown == {0: "Smile", NAMED_SLIDERS: "Pc1"}
        assert (sliders[0]["minimum"], sliders[0]["maximum"]) == (-2.0, 2.5)

    def test_a_slider_moves_its_direction(self, handlers, tiny_inversion, tmp_path, monkeypatch):
        model = handlers.settings.models[0]
        monkeypatch.setattr("metaaux.demo.handlers.save_picture", lambda image, name="view.png": image)
        path = tmp_path / "head.safetensors"
        tiny_inversion.save(path)
        amounts = [0.0] * (NAMED_SLIDERS + FURTHER_SLIDERS)
        amounts[NAMED_SLIDERS] = 2.0
        visitor = Visitor()
        visitor.replace(Session(model, str(path), 0.0, 0.0))
        _, image, _ = handlers.turn(visitor, 5.0, 0.0, *amounts)
        inverter = handlers.engine.inverter(model)
        expected = inverter.render(tiny_inversion, yaw=5.0, pitch=0.0, edits={"pc1": 2.0})
        assert image.tobytes() == expected.tobytes()
        assert image.tobytes() != inverter.render(tiny_inversion, yaw=5.0, pitch=0.0).tobytes()


class TestPage:
    def test_public_endpoints_are_those_of_the_contract(self, tiny_folder):
        demo, _ = build_demo(Settings(models=(str(tiny_folder),)))
        public = {fn.api_name for fn in demo.fns.values() if fn.api_visibility == "public"}
        assert public == {"invert", "render", "turntable", "orbit", "mesh", "directions"}
        # gr.Examples adds one of its own, which only hands out the example photos.
        callable_too = {fn.api_name for fn in demo.fns.values() if fn.api_visibility == "undocumented"}
        assert callable_too <= {"load_example"}

    def test_components_of_our_own_are_drawn_as_gradios(self, tiny_folder):
        """A browser looks for another script of a component of which Gradio knows none by the name of its parent."""
        demo, _ = build_demo(Settings(models=(str(tiny_folder),)))
        own = [block for block in demo.blocks.values() if type(block).__module__.startswith("metaaux")]
        assert {block.get_block_name() for block in own} == {"image", "file", "json"}

    def test_the_notice_says_what_is_set(self):
        usual = notice(("metaaux-mini",), 30)
        assert "metaaux-mini" in usual and "about an hour" in usual
        config = json.loads((embedded_model_folder() / "generator" / "config.json").read_text())
        assert "({0} × {0} pixels)".format(config["image_size"]) in usual
        other = notice(("org/metaaux-ffhq",), 10)
        assert "`metaaux-ffhq`" in other and "about 20 minutes" in other
        assert "mini" not in other and "hour" not in other
        assert "about 4 hours" in notice(("a", "b"), 120) and "`a`, `b`" in notice(("a", "b"), 120)

    def test_uploads_may_be_as_large_as_the_models_heads(self, tiny_folder, monkeypatch):
        demo, engine = build_demo(Settings(models=(str(tiny_folder),), device="cpu", max_file_mb=1))
        monkeypatch.setattr(engine, "max_head_bytes", lambda model=None: 135_000_000)
        try:
            launch(demo, engine, block=False, quiet=True)
            engine.inverter()
            deadline = time.monotonic() + 60
            while demo.config["max_file_size"] != 135_000_000:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert demo.max_file_size == 135_000_000
        finally:
            demo.close()

    def test_names_of_files_stay_text(self):
        assert "<script>" not in note_card("<script>") and "<script>" not in progress_bar("<script>", 0.5)

    def test_charts(self):
        steps = [{"mse": 0.4, "perceptual": 1.0, "identity": 0.0}, {"mse": 0.1, "perceptual": 0.5, "identity": 0.0}]
        chart = loss_charts(steps, 7)
        assert "−75 %" in chart and "−50 %" in chart and chart.count("<svg") == 3
