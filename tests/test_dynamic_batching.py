"""Passes of several threads run as one: `dynamic_batching`, `structures`, and inversions of several threads."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from recordings import CpuGraphs, assert_equal_inversions

from metaaux.dynamic_batching import DynamicBatching
from metaaux.structures import divided, joined


def wait_until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.001)


def waiting(batching):
    return sum(map(len, batching._waiting.values()))


class Doubling:
    """A pass that doubles, of which the first one waits until `gate` is opened; it notes how many were run as one."""

    def __init__(self, fails=lambda size: None):
        self.gate, self.sizes, self.fails = threading.Event(), [], fails

    def __call__(self, given):
        self.sizes.append(len(given["x"]))
        if len(self.sizes) == 1:
            assert self.gate.wait(20)
        if (error := self.fails(len(given["x"]))) is not None:
            raise error
        return {"twice": [given["x"] * 2], "name": given["name"]}


def run_together(batching, compute, number):
    """Results, or errors, of one request that computes, and of others that come meanwhile."""

    def run(value):
        outputs = batching.run("pass", compute, {"x": torch.full((1, 2), float(value)), "name": "constant"})
        assert outputs["name"] == "constant"
        return outputs["twice"][0].tolist()

    with ThreadPoolExecutor(number) as pool:
        futures = [pool.submit(run, 0)]
        wait_until(lambda: compute.sizes)
        for value in range(1, number):
            futures.append(pool.submit(run, value))
            wait_until(lambda: waiting(batching) == len(futures) - 1)  # in this order
        compute.gate.set()
        return [future.exception() or future.result() for future in futures]


class TestDynamicBatching:
    @pytest.mark.parametrize(
        ("most", "number", "sizes"),
        [(4, 1, [1]), (4, 3, [1, 2]), (4, 6, [1, 4, 1]), (4, 10, [1, 4, 4, 1]), (8, 8, [1, 4, 2, 1]), (1, 3, [1] * 3)],
    )
    def test_what_has_gathered_goes_together(self, most, number, sizes):
        batching, compute = DynamicBatching(most), Doubling()
        assert run_together(batching, compute, number) == [[[2.0 * n] * 2] for n in range(number)]
        assert compute.sizes == sizes
        assert batching.batches == {size: sizes.count(size) for size in sizes}
        assert not waiting(batching) and not batching._led

    def test_without_memory_for_a_batch_it_shrinks(self):
        batching = DynamicBatching(8)
        compute = Doubling(lambda size: torch.OutOfMemoryError("CUDA out of memory") if size > 2 else None)
        assert run_together(batching, compute, 9) == [[[2.0 * n] * 2] for n in range(9)]
        # Of eight the first goes alone; of the next four it is the same; then two and two and one.
        assert compute.sizes == [1, 8, 1, 4, 1, 2, 2, 2]
        assert batching.most == 2

    def test_without_memory_for_one_it_fails(self):
        compute = Doubling(lambda size: torch.OutOfMemoryError("CUDA out of memory"))
        results = run_together(DynamicBatching(4), compute, 3)
        assert [type(result) for result in results] == [torch.OutOfMemoryError] * 3

    def test_who_fails_fails_alone(self):
        errors = iter([None, ValueError("once")])
        batching, compute = DynamicBatching(4), Doubling(lambda size: next(errors, None))
        first, second, *others = run_together(batching, compute, 5)
        assert first == [[0.0, 0.0]] and str(second) == "once"
        assert others == [[[2.0 * n] * 2] for n in range(2, 5)]
        assert compute.sizes == [1, 4, 2, 1] and not waiting(batching)

    def test_who_is_interrupted_holds_up_nobody(self, monkeypatch):
        batching = DynamicBatching(4)

        def interrupted(predicate):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(batching._changed, "wait_for", interrupted)
            with pytest.raises(KeyboardInterrupt):
                batching.run("pass", Doubling(), {"x": torch.ones(1, 2), "name": "a"})
        assert not waiting(batching)
        assert run_together(batching, Doubling(), 2) == [[[0.0, 0.0]], [[2.0, 2.0]]]

    def test_who_left_is_not_tried_again(self):
        """Of a batch that fails, one thread has been interrupted meanwhile."""
        batching, compute = DynamicBatching(4), Doubling(lambda size: ValueError("once") if size > 1 else None)
        request = {"x": torch.ones(1, 2), "name": "a"}

        def leave(predicate):
            wait_for(lambda: predicate() or (len(queue) == 0 and not first.running()))
            raise KeyboardInterrupt

        with ThreadPoolExecutor(3) as pool:
            first = pool.submit(batching.run, "pass", compute, request)
            wait_until(lambda: compute.sizes)
            queue, wait_for = batching._waiting["pass"], batching._changed.wait_for
            second = pool.submit(batching.run, "pass", compute, request)
            wait_until(lambda: waiting(batching) == 1)
            batching._changed.wait_for = leave
            third = pool.submit(batching.run, "pass", compute, request)
            wait_until(lambda: waiting(batching) == 2)
            batching._changed.wait_for = wait_for
            compute.gate.set()
            assert first.result()["twice"][0].sum() == 4
            assert str(second.exception()) == "once" and isinstance(third.exception(), KeyboardInterrupt)
        assert max(compute.sizes) > 1 and not waiting(batching) and not batching._led

    def test_kinds_of_passes_do_not_wait_for_each_other(self):
        batching, slow, quick = DynamicBatching(4), Doubling(), Doubling()
        quick.gate.set()
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(batching.run, "slow", slow, {"x": torch.ones(1, 2), "name": "a"})
            wait_until(lambda: slow.sizes)
            assert batching.run("quick", quick, {"x": torch.ones(1, 2), "name": "a"})["twice"][0].sum() == 4
            assert not future.done()
            slow.gate.set()
            assert future.result()["twice"][0].sum() == 4

    def test_a_number_below_one(self):
        with pytest.raises(ValueError, match="most must be 1 or more, got 0"):
            DynamicBatching(0)


class TestStructures:
    def test_parts_make_the_whole_again(self):
        value = {"a": [torch.randn(2, 3), None], "b": (torch.randn(4), 5, "six")}
        other = {"a": [torch.randn(2, 3), None], "b": (torch.randn(4), 5, "six")}
        whole = joined([value, other])
        assert whole["a"][0].shape == (4, 3) and whole["b"][0].shape == (8,)
        for part, expected in zip(divided(whole, 2), (value, other), strict=True):
            assert torch.equal(part["a"][0], expected["a"][0]) and torch.equal(part["b"][0], expected["b"][0])
            assert part["a"][1] is None and part["b"][1:] == (5, "six")

    def test_one_stays_as_it_is(self):
        value = {"a": torch.randn(3)}
        assert joined([value]) is value and divided(value, 1) == [value]

    def test_what_cannot_be_divided(self):
        with pytest.raises(RuntimeError, match="unflatten"):
            divided({"a": torch.randn(3)}, 2)


class TestInversions:
    def together(self, inverter, calls, batch=4):
        """What each call makes while the others are at work; the first pass of all waits until all have come."""
        inverter._graphs = graphs = CpuGraphs(concurrency=1, batch=batch)
        inverter.invert(*calls[0][0], **calls[0][1] | {"steps": 0})  # makes the lane
        (lane,) = graphs.lanes
        try:
            with ThreadPoolExecutor(len(calls)) as pool:
                with lane.lock:
                    futures = [pool.submit(inverter.invert, *args, **options) for args, options in calls]
                    wait_until(lambda: waiting(graphs.batching) == len(calls) - 1)  # the first one leads
                return [future.result() for future in futures], graphs
        finally:
            inverter.disable_cuda_graphs()

    def check(self, inverter, calls):
        """That each is as alone; returns the recordings."""
        alone = [inverter.invert(*args, **options) for args, options in calls]
        results, graphs = self.together(inverter, calls)
        for result, expected in zip(results, alone, strict=True):
            assert_equal_inversions(result, expected, 2e-5)
        assert not waiting(graphs.batching)
        return graphs

    @pytest.mark.parametrize("options", [{}, {"flip": True}])
    def test_each_is_as_alone(self, tiny_inverter, crops, cameras, options):
        calls = [((crops[n % 3],), {"steps": 2, "camera": cameras[n % 3], **options}) for n in range(8)]
        assert self.check(tiny_inverter, calls).batching.batches[4] >= 1

    def test_several_photos_of_each(self, tiny_inverter, crops, cameras):
        pairs = [[0, 1], [1, 2], [2, 0]]
        calls = [(([crops[n] for n in pair],), {"steps": 2, "camera": cameras[pair], "flip": False}) for pair in pairs]
        assert self.check(tiny_inverter, calls).batching.batches[2] >= 1

    def test_2d_generator(self, tiny_2d_inverter, crops, cameras):
        calls = [((crop,), {"steps": 2, "camera": camera}) for crop, camera in zip(crops, cameras)]
        assert self.check(tiny_2d_inverter, calls).batching.batches[2] >= 1

    def test_other_numbers_of_steps(self, tiny_inverter, crops, cameras):
        longest = tiny_inverter.invert(crops[0], steps=3, camera=cameras[0])
        calls = [((crops[0],), {"steps": steps, "camera": cameras[0]}) for steps in (1, 3, 0, 2)]
        results, _ = self.together(tiny_inverter, calls)
        assert [result.steps[-1]["step"] for result in results] == [1, 3, 0, 2]
        for result in results:
            totals = [step["total"] for step in result.steps]
            assert totals == pytest.approx([step["total"] for step in longest.steps[: len(totals)]], rel=2e-5)

    def test_one_by_one(self, tiny_inverter, crops, cameras):
        calls = [((crop,), {"steps": 1, "camera": camera}) for crop, camera in zip(crops, cameras)]
        tiny_inverter._graphs = graphs = CpuGraphs(batch=1)
        try:
            with ThreadPoolExecutor(3) as pool:
                list(pool.map(lambda call: tiny_inverter.invert(*call[0], **call[1]), calls))
            assert not graphs.batching.batches
        finally:
            tiny_inverter.disable_cuda_graphs()
