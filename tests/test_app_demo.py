"""The demo's parts: settings, checks of inputs, streaming and cancelling, sessions."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gc
import os
import threading
import time
import weakref

import gradio as gr
import pytest
import torch
from PIL import Image

from metaaux import MetaAuxInverter
from metaaux.demo import Settings, build_demo
from metaaux.demo import engine as engine_module
from metaaux.demo.engine import Engine
from metaaux.demo.handlers import FURTHER_SLIDERS, NAMED_SLIDERS, VIEWPOINT_PARTS, Handlers
from metaaux.demo.heads import HeadCache, head_bytes
from metaaux.demo.pictures import loss_charts, note_card, progress_bar
from metaaux.demo.session import Session, SessionExpiredError, Visitor, show
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
from metaaux.models.directions import Direction, LatentDirections


@pytest.fixture(scope="module")
def engine(tiny_folder):
    engine = Engine(Settings(models=(str(tiny_folder),), device="cpu"))
    engine.start()
    engine.inverter()
    return engine


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

    @pytest.mark.parametrize(
        ("name", "value"), [("METAAUX_WORKERS", "0"), ("METAAUX_MAX_QUEUE", "x"), ("METAAUX_MODELS", " ,")]
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
            check_inversion_file(str(large), Settings(max_file_mb=1))
        with pytest.raises(ValueError, match="is empty"):
            check_inversion_file(str(empty), Settings())
        with pytest.raises(ValueError, match="no inversion file"):
            check_inversion_file(None, Settings())

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

        results = engine._stream(run)
        assert next(results) == 0
        results.close()
        seen = len(reports)
        assert finished.wait(1) and len(reports) <= seen + 2
        # The only worker is free again.
        assert list(engine._stream(lambda report: report("next"))) == ["next"]

    def test_errors_of_the_computation_arrive(self, engine):
        def run(report):
            report(1)
            raise ValueError("no surface")

        results = engine._stream(run)
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

        threads = [threading.Thread(target=lambda: list(engine._stream(run))) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most[0] == engine.settings.workers == 1

    def test_unknown_model(self, engine):
        with pytest.raises(ValueError, match="no model '/etc' here"):
            engine.inverter("/etc")

    def test_a_model_that_cannot_be_loaded_is_a_message(self, tmp_path, caplog):
        engine = Engine(Settings(models=(str(tmp_path),)))
        engine.start()
        with pytest.raises(ValueError, match="could not be loaded"):
            engine.inverter()
        assert str(tmp_path) in caplog.text


class TestSession:
    def test_turning_reuses_the_planes(self, engine, tiny_inversion, tmp_path):
        path = tmp_path / "head.safetensors"
        tiny_inversion.save(path)
        session = Session(engine.settings.models[0], str(path), 0.0, 0.0)
        first = show(engine, session, 5.0, 0.0, {})
        path.unlink()
        second = show(engine, session, 10.0, 0.0, {})
        assert first.tobytes() != second.tobytes()
        assert second.tobytes() == engine.inverter().render(tiny_inversion, yaw=10.0, pitch=0.0).tobytes()
        engine.forget(session.path)
        with pytest.raises(SessionExpiredError):
            show(engine, session, 10.0, 0.0, {})

    def test_expired(self, engine, tmp_path):
        with pytest.raises(SessionExpiredError, match="invert the photo again"):
            show(engine, None, 0.0, 0.0, {})
        with pytest.raises(SessionExpiredError):
            show(engine, Session(engine.settings.models[0], str(tmp_path / "gone.safetensors"), 0.0, 0.0), 0, 0, {})


class TestHeadCache:
    def test_bytes_are_bounded_and_the_longest_unused_goes(self, tiny_inverter, tiny_inversion):
        head = tiny_inverter.prepare(tiny_inversion)
        size = head_bytes(head)
        assert size > head.planes.nbytes
        cache = HeadCache(3 * size)
        made = []

        def get(name):
            return cache.get("m", name, {}, lambda: made.append(name) or dataclasses.replace(head))

        for name in ("a", "b", "c", "a", "d"):
            get(name)
        assert made == ["a", "b", "c", "d"] and cache.bytes == 3 * size and len(cache) == 3
        get("a"), get("b")
        assert made == ["a", "b", "c", "d", "b"] and cache.bytes == 3 * size
        cache.forget("b")
        assert cache.bytes == 2 * size

    def test_a_hundred_visitors_stay_within_it(self, tiny_inverter, tiny_inversion):
        size = head_bytes(tiny_inverter.prepare(tiny_inversion))
        cache = HeadCache(10 * size)
        heads = []
        for number in range(100):
            head = cache.get("m", str(number), {}, lambda: tiny_inverter.prepare(tiny_inversion))
            heads.append(weakref.ref(head))
        del head
        gc.collect()
        assert sum(reference() is not None for reference in heads) == len(cache) == 10

    def test_edits_are_different_heads_of_one_file(self, tiny_inverter, tiny_inversion):
        head = tiny_inverter.prepare(tiny_inversion)
        cache = HeadCache(10 * head_bytes(head))
        made = []

        def get(edits):
            cache.get("m", "a", edits, lambda: made.append(edits) or head)

        for edits in ({}, {"smile": 1.0}, {"smile": 1.0}):
            get(edits)
        assert made == [{}, {"smile": 1.0}]
        cache.forget("a")
        assert len(cache) == 0 == cache.bytes

    def test_a_head_too_large_is_not_kept(self, tiny_inverter, tiny_inversion):
        head = tiny_inverter.prepare(tiny_inversion)
        cache = HeadCache(head_bytes(head) - 1)
        assert cache.get("m", "a", {}, lambda: head) is head and len(cache) == 0 == cache.bytes


class TestVisitors:
    """Views of many visitors, some slow, and heads that change meanwhile."""

    @pytest.fixture
    def slow(self, engine, tiny_inversion, tmp_path, monkeypatch):
        """Handlers whose views of `slow.safetensors` wait for an event."""
        gate, begun = threading.Event(), threading.Event()
        view = engine.view

        def delayed(model, path, *arguments):
            if path.endswith("slow.safetensors"):
                begun.set()
                assert gate.wait(30)
            return view(model, path, *arguments)

        monkeypatch.setattr(engine, "view", delayed)
        handlers = Handlers(engine, engine.settings)
        handlers.gate, handlers.begun = gate, begun
        handlers.session_of = lambda name: self.session(engine, tiny_inversion, tmp_path / f"{name}.safetensors")
        yield handlers
        gate.set()

    @staticmethod
    def session(engine, inversion, path):
        inversion.save(path)
        return Session(engine.settings.models[0], str(path), 0.0, 0.0)

    def visitor(self, session):
        visitor = Visitor()
        visitor.replace(session)
        return visitor

    def test_a_slow_view_holds_up_nobody_else(self, slow):
        late = self.visitor(slow.session_of("slow"))
        with concurrent.futures.ThreadPoolExecutor() as pool:
            waiting = pool.submit(slow.turn, late, 5.0, 0.0)
            assert slow.begun.wait(30)
            _, picture, _ = pool.submit(slow.turn, self.visitor(slow.session_of("quick")), 5.0, 0.0).result(30)
            assert picture.endswith("view.png") and not waiting.done()
            slow.gate.set()
            assert waiting.result(30)[1].endswith("view.png")

    def test_a_late_view_does_not_bring_back_the_head_before(self, slow):
        visitor = self.visitor(slow.session_of("slow"))
        after = slow.session_of("after")
        with concurrent.futures.ThreadPoolExecutor() as pool:
            waiting = pool.submit(slow.turn, visitor, 5.0, 0.0)
            assert slow.begun.wait(30)
            visitor.replace(after)
            slow.gate.set()
            assert waiting.result(30) == (gr.skip(), gr.skip(), visitor)
        assert visitor.session is after

    def test_of_several_moves_the_last_one_counts(self, slow):
        visitor = self.visitor(slow.session_of("slow"))
        with concurrent.futures.ThreadPoolExecutor() as pool:
            first = pool.submit(slow.turn, visitor, 5.0, 0.0)
            assert slow.begun.wait(30)
            second = pool.submit(slow.turn, visitor, 10.0, 0.0)
            while visitor._newest < 3:
                time.sleep(0.01)
            third = pool.submit(slow.turn, visitor, 15.0, 0.0)
            while visitor._newest < 4:
                time.sleep(0.01)
            slow.gate.set()
            pictures = [job.result(30)[1] for job in (first, second, third)]
        assert pictures[:2] == [gr.skip(), gr.skip()]
        expected = slow.engine.view(visitor.session.model, visitor.session.path, 15.0, 0.0, {})
        assert Image.open(pictures[2]).tobytes() == expected.tobytes()

    def test_while_another_head_is_made_there_is_nothing_to_show(self, slow):
        visitor = self.visitor(None)
        assert slow.turn(visitor, 5.0, 0.0) == (gr.skip(), gr.skip(), visitor)
        with pytest.raises(gr.Error, match="no longer kept"):
            slow.turn(None, 5.0, 0.0)

    def test_a_visitor_whose_time_is_over_leaves_nothing(self, slow):
        visitor = self.visitor(slow.session_of("other"))
        slow.turn(visitor, 5.0, 0.0)
        before = len(slow.engine._heads)
        slow.forget(visitor)
        assert len(slow.engine._heads) == before - 1 and visitor.session is None

    def test_the_page_keeps_places_for_many_views(self, tiny_folder):
        demo, _ = build_demo(Settings(models=(str(tiny_folder),)))
        views = [fn for fn in demo.fns.values() if fn.concurrency_id == "view"]
        assert {fn.name for fn in views} == {"turn", "render", "open_head", "kept_example"}
        assert all(fn.concurrency_limit >= 8 for fn in views)
        heavy = {fn.name for fn in demo.fns.values() if fn.concurrency_id == "heavy"}
        assert heavy == {"invert", "example", "turntable", "orbit", "mesh"}

    def test_expiry_reaches_the_engine(self, tiny_folder):
        demo, engine = build_demo(Settings(models=(str(tiny_folder),), session_minutes=7))
        states = [block for block in demo.blocks.values() if isinstance(block, gr.State)]
        assert {state.time_to_live for state in states} == {420}
        forgotten = []
        engine.forget = forgotten.append
        for state in states:
            state.delete_callback(self.visitor(Session("m", "path", 0.0, 0.0)))
        assert forgotten == ["path"]


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

    def test_the_notice_says_what_is_set(self):
        usual = notice(("metaaux-mini",), 30)
        assert "metaaux-mini" in usual and "about an hour" in usual
        other = notice(("org/metaaux-ffhq",), 10)
        assert "`metaaux-ffhq`" in other and "about 20 minutes" in other
        assert "mini" not in other and "hour" not in other
        assert "about 4 hours" in notice(("a", "b"), 120) and "`a`, `b`" in notice(("a", "b"), 120)

    def test_names_of_files_stay_text(self):
        assert "<script>" not in note_card("<script>") and "<script>" not in progress_bar("<script>", 0.5)

    def test_charts(self):
        steps = [{"mse": 0.4, "perceptual": 1.0, "identity": 0.0}, {"mse": 0.1, "perceptual": 0.5, "identity": 0.0}]
        chart = loss_charts(steps, 7)
        assert "−75 %" in chart and "−50 %" in chart and chart.count("<svg") == 3


class TestExamples:
    """The first click inverts; what it made is the next visitor's at once."""

    @pytest.fixture
    def handlers(self, engine):
        return Handlers(engine, engine.settings)

    def first(self, handlers):
        model = handlers.settings.models[0]
        visitor = handlers.kept_example(None, (0, []), model)[7]
        steps = list(handlers.example(visitor, (0, []), model))
        return visitor, steps, list(handlers.sheets(visitor))

    def test_the_first_click_inverts_and_the_second_finds_it(self, handlers, monkeypatch):
        visitor, steps, messages = self.first(handlers)
        assert len(steps) == handlers.engine.inverter().config.inner_steps + 3
        assert [len(message["sheets"]) for message in messages[1:]] == list(range(1, 9))
        # Nothing may be computed any more.
        for name in ("invert", "view", "sheets", "align"):
            monkeypatch.setattr(handlers.engine, name, None)
        values = handlers.kept_example(None, (0, []), handlers.settings.models[0])
        other, message = values[7], values[11]
        assert other is not visitor and len(message["sheets"]) == 8 and other.shown.complete
        assert list(handlers.sheets(other)) == [gr.skip()]
        first, second = (open(shown.picture, "rb").read() for shown in (visitor.shown, other.shown))
        assert first == second and visitor.shown.picture != other.shown.picture
        heads = [handlers.engine.inverter().load_inversion(one.session.path).w for one in (visitor, other)]
        assert heads[0].equal(heads[1])
        assert list(handlers.example(other, (0, []), handlers.settings.models[0])) == [(gr.skip(),) * 16]

    def test_results_outlive_the_visitors_files(self, handlers):
        visitor, _, _ = self.first(handlers)
        for path in (visitor.session.path, visitor.shown.picture, *[sheet.picture for sheet in visitor.shown.sheets]):
            os.remove(path)
        values = handlers.kept_example(None, (0, []), handlers.settings.models[0])
        assert all(os.path.isfile(sheet.picture) for sheet in values[7].shown.sheets)

    def test_who_has_turned_to_something_else_gets_no_example(self, handlers):
        model = handlers.settings.models[0]
        visitor = handlers.kept_example(None, (0, []), model)[7]
        visitor.replace(None)
        assert list(handlers.example(visitor, (0, []), model)) == [(gr.skip(),) * 16]


class TestSheets:
    @pytest.fixture
    def visitor(self, engine, tiny_inversion, tmp_path):
        tiny_inversion.save(tmp_path / "head.safetensors")
        visitor = Visitor()
        visitor.replace(Session(engine.settings.models[0], str(tmp_path / "head.safetensors"), 0.0, 0.0))
        Handlers(engine, engine.settings).turn(visitor, 0.0, 0.0)
        return visitor

    def test_they_come_coarse_first_and_agree_with_views(self, engine, visitor, tiny_inversion):
        messages = list(Handlers(engine, engine.settings).sheets(visitor))[1:]
        sheets = messages[-1]["sheets"]
        assert len(messages) == len(sheets) == 8 and len(sheets[0]["yaws"]) < len(sheets[1]["yaws"]) == 31
        assert [sheet["pitches"] for sheet in sheets[:2]] == [(0.0,), (0.0,)]
        assert {pitch for sheet in sheets for pitch in sheet["pitches"]} == {-30, -20, -10, 0, 10, 20, 30}
        assert [message["version"] for message in messages] == sorted({message["version"] for message in messages})

    def test_they_give_way_to_inversions(self, engine, visitor):
        """No view of a sheet is rendered while an inversion runs."""
        handlers = Handlers(engine, engine.settings)
        started, go_on = threading.Event(), threading.Event()

        def run(report):
            started.set()
            assert go_on.wait(30)

        with concurrent.futures.ThreadPoolExecutor() as pool:
            running = pool.submit(lambda: list(engine._stream(run)))
            assert started.wait(30)
            sheets = pool.submit(lambda: list(handlers.sheets(visitor)))
            time.sleep(0.5)
            assert visitor.shown.sheets == () and not sheets.done()
            go_on.set()
            running.result(30)
            assert len(sheets.result(60)) == 9

    def test_those_of_the_head_before_end(self, engine, visitor):
        handlers = Handlers(engine, engine.settings)
        sheets = handlers.sheets(visitor)
        next(sheets), next(sheets)
        visitor.replace(None)
        assert list(sheets) == [] and visitor.making_sheets is None

    def test_each_is_made_once(self, engine, visitor):
        handlers = Handlers(engine, engine.settings)
        running = handlers.sheets(visitor)
        next(running), next(running)
        assert list(handlers.sheets(visitor)) == [gr.skip()]
        assert len(list(running)) == 7
        assert list(handlers.sheets(visitor)) == [gr.skip()]


class TestQuota:
    """Seconds of ZeroGPU that a visit asks for; a visitor without an account has a few minutes a day."""

    def test_a_usual_visit(self):
        """One inversion, any number of turns, two edits: measured at full size on one H100."""
        assert (engine_module.INVERSION_SECONDS, engine_module.VIEW_SECONDS) == (1.025, 0.0074)
        inversion = engine_module._seconds_of_inversion("m", [None], [None], 5, None, "path", True)
        turns, edit = 0, engine_module._seconds_of_edit("m", "path", 0.0, 0.0, {"smile": 1.0})
        assert inversion + 50 * turns + 2 * edit <= 25
        # What is asked for covers what was measured.
        assert inversion > 1.025 + 217 * 0.0074 and edit > 0.021 + 217 * 0.0074

    def test_more_work_asks_for_more(self):
        seconds = engine_module._seconds_of_inversion
        assert seconds("m", [0], [0], 20, None, "p", True) > seconds("m", [0], [0], 5, None, "p", True)
        assert seconds("m", [0] * 3, [0] * 3, 5, None, "p", True) > seconds("m", [0], [0], 5, None, "p", True)
        assert seconds("m", [0], [0], 5, False, "p", False) < seconds("m", [0], [0], 5, None, "p", False)
        assert engine_module._seconds_of_orbit("m", "p", 240, (25, 10), {}, "v") > 5
        assert seconds("m", [0] * 5, [0] * 5, 20, None, "p", True) <= 120
