"""What the demo keeps for its visitors: sessions, heads, examples, sheets, quota."""

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
from PIL import Image

from metaaux.demo import Settings, build_demo, quota
from metaaux.demo import engine as engine_module
from metaaux.demo.api import Api
from metaaux.demo.handlers import EXAMPLES, Handlers
from metaaux.demo.heads import HeadCache, head_bytes
from metaaux.demo.session import Session, SessionExpiredError, Visitor, show


@pytest.fixture
def few_views(monkeypatch):
    """Sheets of three columns in place of 31: what is tested is when they come."""
    parts = [(yaws[:: len(yaws) // 2], pitches) for yaws, pitches in engine_module._PARTS]
    monkeypatch.setattr(engine_module, "_PARTS", parts)


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
        assert heavy == {"invert", "example", "orbit", "mesh"}
        (turntable,) = [fn for fn in demo.fns.values() if fn.concurrency_id == "turntable"]
        assert turntable.name == "turntable" and turntable.concurrency_limit >= 2
        waiting = [fn.concurrency_limit for fn in demo.fns.values() if fn.queue and fn.concurrency_id != "heavy"]
        assert all(limit is None or limit > 1 for limit in waiting)

    def test_turning_never_waits_for_an_inversion(self, engine, tiny_inversion, tmp_path):
        """The only worker is taken, and stays so until all that turns a head has been answered."""
        handlers, api = Handlers(engine, engine.settings), Api(engine, engine.settings)
        session = self.session(engine, tiny_inversion, tmp_path / "head.safetensors")
        begun, go_on = threading.Event(), threading.Event()

        def invert(report):
            begun.set()
            assert go_on.wait(60)

        with concurrent.futures.ThreadPoolExecutor() as pool:
            try:
                running = pool.submit(lambda: list(engine._workers.stream(invert)))
                assert begun.wait(60)
                turned = pool.submit(handlers.turn, self.visitor(session), 5.0, 0.0)
                rendered = pool.submit(api.render, session.path, 5.0, 0.0)
                table = pool.submit(api.turntable, session.path, [5.0], [0.0])
                pictures = [turned.result(60)[1], rendered.result(60), table.result(60)[0]]
                assert not running.done()
            finally:
                go_on.set()
        expected = engine.inverter().render(tiny_inversion, yaw=5.0, pitch=0.0).tobytes()
        assert [Image.open(picture).convert("RGB").tobytes() for picture in pictures] == [expected] * 3

    def test_expiry_reaches_the_engine(self, tiny_folder):
        demo, engine = build_demo(Settings(models=(str(tiny_folder),), session_minutes=7))
        states = [block for block in demo.blocks.values() if isinstance(block, gr.State)]
        assert {state.time_to_live for state in states} == {420}
        forgotten = []
        engine.forget = forgotten.append
        for state in states:
            state.delete_callback(self.visitor(Session("m", "path", 0.0, 0.0)))
        assert forgotten == ["path"]


class TestExamples:
    """The first click inverts; what it made is the next visitor's at once."""

    def test_there_are_people_of_several_kinds(self):
        assert [path.suffix for path in EXAMPLES] == [".jpg"] * 2 + [".png"] * 4
        described = (EXAMPLES[0].parent / "README.md").read_text()
        for path in EXAMPLES:
            assert path.stat().st_size <= 120_000 or path.suffix == ".jpg"
            assert path.name in described or f"({path.stem}, " in described

    @pytest.fixture
    def handlers(self, engine, few_views):
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

    def test_of_two_examples_the_last_one_counts(self, handlers):
        """What was begun for the first ends at its next step, shows nothing more and makes room."""
        model = handlers.settings.models[0]
        visitor = handlers.kept_example(None, (0, []), model)[7]
        first = handlers.example(visitor, (0, []), model)
        next(first), next(first)
        assert handlers.kept_example(visitor, (1, []), model)[7] is visitor
        assert list(first) == [] and visitor.session is None
        second = list(handlers.example(visitor, (1, []), model))
        assert len(second) == handlers.engine.inverter().config.inner_steps + 3
        assert visitor.session.example == (model, str(EXAMPLES[1]))

    def test_a_head_that_is_opened_meanwhile_stays(self, handlers, tiny_inversion, tmp_path):
        model = handlers.settings.models[0]
        tiny_inversion.save(tmp_path / "head.safetensors")
        visitor = handlers.kept_example(None, (0, []), model)[7]
        run = handlers.example(visitor, (0, []), model)
        next(run), next(run)
        handlers.open_head(visitor, str(tmp_path / "head.safetensors"), model)
        opened = visitor.session
        assert list(run) == [] and visitor.session is opened and opened.example is None

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

    def test_they_give_way_to_inversions(self, engine, visitor, few_views):
        """No view of a sheet is rendered while an inversion runs."""
        handlers = Handlers(engine, engine.settings)
        started, go_on = threading.Event(), threading.Event()

        def run(report):
            started.set()
            assert go_on.wait(30)

        with concurrent.futures.ThreadPoolExecutor() as pool:
            running = pool.submit(lambda: list(engine._workers.stream(run)))
            assert started.wait(30)
            sheets = pool.submit(lambda: list(handlers.sheets(visitor)))
            time.sleep(0.5)
            assert visitor.shown.sheets == () and not sheets.done()
            go_on.set()
            running.result(30)
            assert len(sheets.result(60)) == 9

    def test_those_of_the_head_before_end(self, engine, visitor, few_views):
        handlers = Handlers(engine, engine.settings)
        sheets = handlers.sheets(visitor)
        next(sheets), next(sheets)
        visitor.replace(None)
        assert list(sheets) == [] and visitor.making_sheets is None

    def test_each_is_made_once(self, engine, visitor, few_views):
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
        assert (quota.INVERSION_SECONDS, quota.VIEW_SECONDS) == (1.025, 0.0074)
        inversion = quota.seconds_of_inversion("m", [None], [None], 5, None, "path", True)
        turns, edit = 0, quota.seconds_of_edit("m", "path", 0.0, 0.0, {"smile": 1.0})
        assert inversion + 50 * turns + 2 * edit <= 25
        # What is asked for covers what was measured.
        assert inversion > 1.025 + 217 * 0.0074 and edit > 0.021 + 217 * 0.0074

    def test_more_work_asks_for_more(self):
        seconds = quota.seconds_of_inversion
        assert seconds("m", [0], [0], 20, None, "p", True) > seconds("m", [0], [0], 5, None, "p", True)
        assert seconds("m", [0] * 3, [0] * 3, 5, None, "p", True) > seconds("m", [0], [0], 5, None, "p", True)
        assert seconds("m", [0], [0], 5, False, "p", False) < seconds("m", [0], [0], 5, None, "p", False)
        assert quota.seconds_of_orbit("m", "p", 240, (25, 10), {}, "v") > 5
        assert seconds("m", [0] * 5, [0] * 5, 20, None, "p", True) <= 120
        coarse, fine = (quota.seconds_of_mesh("m", "p", resolution, {}, "g") for resolution in (160, 256))
        assert 12.5 < coarse < fine < 60
