"""What is told of an inversion's steps, and when: `step_reports`."""

from __future__ import annotations

import contextlib

import pytest
import torch
from recordings import assert_equal_inversions

from metaaux import step_reports
from metaaux.step_reports import StepReports, Timeline


class Ahead(Timeline):
    """A timeline like a GPU's: marks are numbers that grow with what is launched, and nothing waits for them."""

    runs_ahead = True
    made: list[Ahead] = []

    def __init__(self, device):
        super().__init__(device)
        self.launched, self.closed, self.read = 0, False, []
        self.made.append(self)

    def mark(self):
        self.launched += 1
        return self.launched

    def seconds(self, began, ended):
        return float(ended - began)

    @contextlib.contextmanager
    def reading(self, mark, *tensors):
        self.read.append((mark, len(tensors)))
        yield

    def close(self):
        self.closed = True


@pytest.fixture
def ahead(monkeypatch):
    monkeypatch.setattr(step_reports, "timeline_of", Ahead)
    monkeypatch.setattr(Ahead, "made", [])
    return Ahead.made


def losses(total):
    return {"mse": torch.tensor([total / 2]), "total": torch.tensor([total])}


class TestStepReports:
    def run(self, on_step, numbers=(-1, 0, 1), after_each=lambda: None):
        """The figures of steps whose reconstructions are full of their numbers."""
        with StepReports(torch.device("cpu"), on_step) as reports:
            reports.start()
            for number in numbers:
                reports.add(number, torch.full((1, 3), float(number)), losses(number + 2.0))
                after_each()
        return reports.steps

    def test_at_once_where_the_host_waits(self):
        calls, told = [], []
        steps = self.run(lambda *call: calls.append(call), after_each=lambda: told.append(len(calls)))
        assert told == [1, 2, 3] and steps == [entry for _, _, entry in calls]
        assert [entry["total"] for entry in steps] == [1, 2, 3] and [entry["mse"] for entry in steps] == [0.5, 1, 1.5]
        assert [entry["step"] for entry in steps] == [-1, 0, 1] and all(entry["seconds"] >= 0 for entry in steps)

    def test_a_step_late_where_it_runs_ahead(self, ahead):
        calls, told = [], []
        steps = self.run(lambda *call: calls.append(call), after_each=lambda: told.append(len(calls)))
        assert told == [0, 1, 2] and [step for step, _, _ in calls] == [-1, 0, 1]
        assert [image[0, 0].item() for _, image, _ in calls] == [-1, 0, 1]
        # A step's time begins when the step before has been looked at.
        assert [entry["seconds"] for entry in steps] == [1, 1, 1]
        assert ahead[0].read == [(2, 3), (4, 3), (6, 3)] and ahead[0].closed

    def test_who_ends_it_hears_no_more(self, ahead):
        told = []

        def end(step, image, entry):
            told.append(step)
            if step == 0:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.run(end, range(-1, 5))
        assert told == [-1, 0] and ahead[0].closed

    @pytest.mark.parametrize("total", [float("nan"), float("inf")])
    def test_a_loss_that_is_none(self, ahead, total):
        reports = StepReports(torch.device("cpu"))
        with pytest.raises(FloatingPointError, match=f"the loss is {total} at step 3"), reports:
            reports.start()
            reports.add(3, torch.zeros(1, 3), losses(total))
        assert ahead[0].closed and reports.steps == []


def test_an_inversion_that_runs_ahead_is_the_same(tiny_inverter, crops, cameras, monkeypatch):
    expected = tiny_inverter.invert(crops[1], 3, camera=cameras[1])
    monkeypatch.setattr(step_reports, "timeline_of", Ahead)
    calls = []
    result = tiny_inverter.invert(crops[1], 3, lambda *call: calls.append(call), camera=cameras[1])
    assert_equal_inversions(result, expected)
    assert [step for step, _, _ in calls] == [-1, 0, 1, 2, 3]
    assert [entry for _, _, entry in calls] == result.steps
    assert calls[-1][1].tobytes() == tiny_inverter.render(result).tobytes()
    assert len({image.tobytes() for _, image, _ in calls}) == 5
