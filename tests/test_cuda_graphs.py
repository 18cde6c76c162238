"""Inference by recordings: `cuda_graphs`, `replay`, and the pipeline's `enable_cuda_graphs`."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for

import pytest
import torch
from recordings import CpuGraphs, CpuLane, assert_equal_inversions, problem_of, run_through
from torch import nn
from torch.overrides import TorchFunctionMode

from metaaux import MetaAuxInverter, devices
from metaaux.cuda_graphs import CudaGraphs, HostWaits
from metaaux.models.views import private_view
from metaaux.replay import PackedTensors


@pytest.fixture
def recorded(tiny_inverter):
    """The tiny pipeline with recordings that run on the CPU, and what keeps them."""
    tiny_inverter._graphs = CpuGraphs()
    yield tiny_inverter, tiny_inverter._graphs
    tiny_inverter.disable_cuda_graphs()


class TestInversion:
    @pytest.mark.parametrize("flip", [False, True])
    def test_replays_are_the_eager_passes(self, recorded, crops, cameras, flip):
        inverter, graphs = recorded
        inverter.disable_cuda_graphs()
        photos = list(zip(crops, cameras))[:2]
        expected = [inverter.invert(crop, steps=3, camera=camera, flip=flip) for crop, camera in photos]
        views = [inverter.render(inversion, yaw=10) for inversion in expected]
        inverter._graphs = graphs
        inverter.invert(crops[2], steps=1, camera=cameras[2], flip=flip)
        inverter.render(expected[0])
        captures, replays = graphs.captures, graphs.replays
        for (crop, camera), inversion, view in zip(photos, expected, views):
            assert_equal_inversions(inverter.invert(crop, steps=3, camera=camera, flip=flip), inversion)
            assert inverter.render(inversion, yaw=10).tobytes() == view.tobytes()
        # Encoder, start, step, end; planes and view. Of each photo 3 steps.
        assert captures == 6 and graphs.captures == captures
        assert graphs.replays == replays + 2 * (3 + 3 + 2)

    def test_reports_and_settings(self, recorded, crops, cameras):
        inverter, graphs = recorded
        calls = []
        inversion = inverter.invert(crops[0], 2, lambda *call: calls.append(call), camera=cameras[0])
        assert [step for step, _, _ in calls] == [-1, 0, 1, 2]
        assert [losses for _, _, losses in calls] == inversion.steps
        assert calls[-1][1].tobytes() == inverter.render(inversion).tobytes()
        assert len({image.tobytes() for _, image, _ in calls}) == 4

    def test_flip_loss_on_some_steps_has_a_recording_of_its_own(self, tiny_components, crops, cameras):
        inverter = MetaAuxInverter(**tiny_components, flip_share=0.5)
        inverter.set_progress_bar_config(disable=True)
        expected = inverter.invert(crops[1], steps=3, camera=cameras[1], flip=True)
        inverter._graphs = CpuGraphs()
        for _ in range(2):
            assert_equal_inversions(inverter.invert(crops[1], steps=3, camera=cameras[1], flip=True), expected)
        assert inverter._graphs.captures == 5  # encoder, start, two kinds of steps, end

    def test_several_photos_and_other_rates(self, recorded, crops, cameras):
        inverter, graphs = recorded
        inverter.disable_cuda_graphs()
        expected = inverter.invert(crops[:2], steps=1, camera=cameras[:2])
        inverter._graphs = graphs
        inverter.invert(crops[0], steps=1, camera=cameras[0])
        for captures in (8, 8):
            assert_equal_inversions(inverter.invert(crops[:2], steps=1, camera=cameras[:2]), expected)
            assert graphs.captures == captures

    def test_2d_generator(self, tiny_2d_inverter, crops, cameras):
        expected = tiny_2d_inverter.invert(crops[0], steps=2, camera=cameras[0])
        view = tiny_2d_inverter.render(expected)
        tiny_2d_inverter._graphs = graphs = CpuGraphs()
        try:
            for _ in range(2):
                assert_equal_inversions(tiny_2d_inverter.invert(crops[0], steps=2, camera=cameras[0]), expected)
                assert tiny_2d_inverter.render(expected).tobytes() == view.tobytes()
            assert graphs.captures == 6
        finally:
            tiny_2d_inverter.disable_cuda_graphs()

    def test_threads_get_what_each_would_alone(self, recorded, crops, cameras):
        inverter, graphs = recorded
        solo = [inverter.invert(crop, steps=2, camera=camera) for crop, camera in zip(crops, cameras)]
        with ThreadPoolExecutor(8) as pool:
            numbers = [number % 3 for number in range(8)]
            results = list(pool.map(lambda n: inverter.invert(crops[n], steps=2, camera=cameras[n]), numbers))
        for number, result in zip(numbers, results):
            assert_equal_inversions(result, solo[number])
        assert len(graphs.lanes) <= graphs.concurrency

    def test_on_a_cpu_nothing_changes(self, tiny_inverter, tiny_inversion, crops, cameras):
        tiny_inverter.enable_cuda_graphs()
        graphs = tiny_inverter._graphs
        try:
            inversion = tiny_inverter.invert(crops[1], steps=3, camera=cameras[1])
            assert tiny_inverter.render(inversion).size == (32, 32)
            assert graphs.captures == 0 and not graphs._lanes
        finally:
            tiny_inverter.disable_cuda_graphs()
        assert_equal_inversions(inversion, tiny_inverter.invert(crops[1], steps=3, camera=cameras[1]), 0)


class TestRecordings:
    def run(self, graphs, network, *inputs):
        return graphs.bind("test", network)("pass", lambda given: {"y": [network(x) for x in given]}, list(inputs))

    def test_outputs_are_the_callers_and_inputs_stay(self):
        graphs, network = CpuGraphs(), nn.Linear(2, 2).requires_grad_(False)
        inputs = [torch.randn(3, 2) for _ in range(4)]
        kept = [x.clone() for x in inputs]
        run = graphs.bind("test", network)
        outputs = [run("pass", lambda given: network(given["x"].add_(1)), {"x": x}) for x in inputs]
        assert all(torch.equal(x, copy) for x, copy in zip(inputs, kept))
        assert all(torch.equal(y, network(x + 1)) for x, y in zip(inputs, outputs))
        assert graphs.captures == 1 and graphs.replays == 3

    def test_another_layout_or_constant_has_its_own(self):
        graphs, network = CpuGraphs(), nn.Identity()
        run = graphs.bind("test", network)
        for x in (torch.ones(2, 3), torch.ones(3, 2), torch.ones(3, 2).T, torch.ones(2, 3, dtype=torch.float64)):
            for factor in (1.0, 2.0):
                for _ in range(2):
                    result = run("scale", lambda given: given["x"] * given["by"], {"x": x, "by": factor})
                    assert torch.equal(result, x * factor)
        assert graphs.captures == graphs.replays == 8

    def test_changed_values_are_read_and_replaced_tensors_recorded_anew(self):
        graphs, network = CpuGraphs(), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval().requires_grad_(False)
        x = torch.randn(3, 2)
        self.run(graphs, network, x)
        network.load_state_dict({name: torch.ones_like(value) for name, value in network.state_dict().items()})
        assert torch.equal(self.run(graphs, network, x)["y"][0], network(x)) and graphs.captures == 1
        changes = (
            lambda: setattr(network[0], "weight", nn.Parameter(torch.randn(2, 2), requires_grad=False)),
            lambda: setattr(network[0].bias, "data", torch.randn(2)),
            lambda: network[1].register_buffer("running_mean", torch.randn(2)),
            lambda: setattr(network[1], "eps", 0.5),
            lambda: network.append(nn.ReLU()),
            lambda: network.__setitem__(2, nn.LeakyReLU(0.5)),
            lambda: setattr(network[1], "note", "new"),
            lambda: delattr(network[1], "note"),
            lambda: setattr(network[0], "bias", None),
        )
        for number, change in enumerate(changes, start=2):
            change()
            for _ in range(2):
                assert torch.equal(self.run(graphs, network, x)["y"][0], network(x))
            assert graphs.captures == number
            assert sum(len(lane.recordings) for lane in graphs.lanes) == 1  # the former one is given up

    def test_capacity(self):
        graphs = CpuGraphs(capacity=2)
        for length in (1, 2, 1, 3, 1, 2):
            self.run(graphs, nn.Identity(), torch.ones(length))
        assert graphs.captures == 4
        assert [key[3][1][0][1] for key in graphs.lanes[0].recordings] == [(1,), (2,)]

    def test_what_makes_the_host_wait_is_reported_once(self):
        graphs = CpuGraphs()
        run = graphs.bind("test", nn.Identity())
        x = torch.ones(2)
        for wait in (lambda x: x * x.sum().item(), lambda x: x[x > 0], lambda x: x * bool((x > 0).all())):
            name = f"waits {wait}"
            with pytest.warns(RuntimeWarning, match="cannot be recorded .* makes the host wait for the GPU, by aten"):
                assert run(name, wait, x).tolist() == wait(x).tolist()
            assert run(name, wait, 2 * x).tolist() == wait(2 * x).tolist()  # a second warning would be an error
        assert graphs.captures == 0

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_gradients_stay_on_or_off(self, context):
        graphs, seen = CpuGraphs(), []
        run = graphs.bind("test", nn.Identity())
        with context():
            run("pass", lambda given: seen.append(torch.is_grad_enabled()) or given["x"] * 2, {"x": torch.ones(1)})
        assert seen == [context is torch.enable_grad] * 2  # launched, then recorded

    def test_a_dispatch_mode_is_its_threads_own(self):
        graphs = CpuGraphs()
        with ThreadPoolExecutor(1) as pool, HostWaits():
            self.run(graphs, nn.Identity(), torch.ones(1))
            assert graphs.captures == 0
            pool.submit(self.run, graphs, nn.Identity(), torch.ones(1)).result()
            assert graphs.captures == 1

    @pytest.mark.parametrize("failures", [2, 3])
    def test_a_capture_that_fails_is_tried_again(self, failures, recwarn):
        class Disturbed(CpuLane):
            left = failures

            def capture(self, function):
                Disturbed.left -= 1
                if Disturbed.left >= 0:
                    raise RuntimeError("operation failed due to a previous error during capture")
                return super().capture(function)

        graphs = CpuGraphs()
        graphs.lane_type = Disturbed
        for value in range(5):
            assert self.run(graphs, nn.Identity(), torch.full((2,), value))["y"][0].tolist() == [value, value]
        assert graphs.captures == (failures < 3)
        assert [str(w.message) for w in recwarn] == [
            "the pass 'pass' cannot be recorded as a CUDA graph (operation failed due to a previous error during "
            "capture); from here on it is launched kernel by kernel"
        ] * (failures == 3)

    def test_a_lane_without_memory_leaves_the_work_to_the_others(self):
        class Small(CpuLane):
            def capture(self, function):
                if graphs.captures:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return super().capture(function)

        graphs = CpuGraphs(concurrency=3)
        graphs.lane_type = Small
        self.run(graphs, nn.Identity(), torch.ones(1))
        with graphs.lanes[0].lock:
            assert self.run(graphs, nn.Identity(), torch.ones(1))["y"][0].item() == 1
        assert len(graphs.lanes) == graphs.concurrency == graphs.captures == 1
        self.run(graphs, nn.Identity(), torch.ones(1))
        assert graphs.replays == 1

    def test_a_busy_lane_gets_company_and_a_second_one_is_waited_for(self):
        graphs, network = CpuGraphs(concurrency=2), nn.Identity()
        self.run(graphs, network, torch.ones(1))
        first = graphs.lanes[0]
        with first.lock:
            for _ in range(2):
                self.run(graphs, network, torch.ones(1))
        assert len(graphs.lanes) == 2 and graphs.captures == 2
        second = next(lane for lane in graphs.lanes if lane is not first)
        with ThreadPoolExecutor(1) as pool:
            with first.lock, second.lock:
                waiting = pool.submit(self.run, graphs, network, torch.ones(1))
                assert not waiting.done()
            assert waiting.result()["y"][0].item() == 1
        assert graphs.captures == 2

    def test_first_passes_take_turns(self):
        capturing, go_on, launched = threading.Event(), threading.Event(), []

        class Slow(CpuLane):
            def capture(self, function):
                capturing.set()
                assert go_on.wait(20)
                return super().capture(function)

        graphs = CpuGraphs(concurrency=2)
        graphs.lane_type = Slow
        run = graphs.bind("test", nn.Identity())

        def first(name):
            return run(name, lambda given: launched.append(name) or given["x"] * 2, {"x": torch.ones(1)}).item()

        with ThreadPoolExecutor(2) as pool:
            one = pool.submit(first, "one")
            assert capturing.wait(20)
            other = pool.submit(first, "other")
            assert not wait_for([other], 0.2).done and launched == ["one"]
            go_on.set()
            assert one.result(20) == other.result(20) == 2
        assert launched == ["one", "one", "other", "other"] and len(graphs.lanes) == 2

    def test_release(self, recorded, crops, cameras):
        inverter, graphs = recorded
        first = inverter.invert(crops[0], steps=1, camera=cameras[0])
        inverter.to("cpu")
        assert not graphs.lanes and inverter._graphs is graphs
        assert_equal_inversions(inverter.invert(crops[0], steps=1, camera=cameras[0]), first)
        inverter.disable_cuda_graphs()
        assert not graphs.lanes and inverter._graphs is None

    @pytest.mark.parametrize("numbers", [{"concurrency": 0}, {"capacity": 0}])
    def test_numbers_below_one(self, numbers):
        with pytest.raises(ValueError, match="1 or more"):
            CudaGraphs(**numbers)

    def test_packed_tensors(self):
        tensors = {"a": torch.randn(3, 5), "b": torch.randn(()), "c": torch.randn(1, 64)}
        packed = PackedTensors.of(tensors)
        assert list(packed) == list(tensors) and all(torch.equal(packed[name], t) for name, t in tensors.items())
        assert all(t.data_ptr() % 64 == packed.flat.data_ptr() % 64 for t in packed.values())
        packed.fill({name: tensor + 1 for name, tensor in tensors.items()})
        again = packed.with_flat(packed.flat.clone())
        assert all(torch.equal(again[name], t + 1) for name, t in tensors.items())

    def test_private_view_has_modules_of_its_own_and_shares_tensors(self, tiny_components):
        for network in tiny_components.values():
            view = private_view(network)
            assert not set(view.modules()) & set(network.modules())
            assert [id(t) for t in view.state_dict(keep_vars=True).values()] == [
                id(t) for t in network.state_dict(keep_vars=True).values()
            ]
            view.train()
            assert not any(module.training for module in network.modules())


class RefuseWaiting(TorchFunctionMode):
    """Raises where the host would wait for a GPU, or give it data of its own: what is read into Python, and tensors
    made of Python's numbers."""

    NAMES = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "new_tensor", "tensor"}
    NAMES |= {"as_tensor", "from_numpy", "nonzero", "unique", "masked_select", "argwhere", "bincount"}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        listed = name in ("__getitem__", "__setitem__") and any(
            isinstance(index, list) or isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        if name in self.NAMES or listed:
            raise AssertionError(f"{name} makes the host wait")
        return function(*args, **(kwargs or {}))


class TestHostNeverWaits:
    def test_python_is_watched(self):
        for wait in (
            lambda: torch.ones(1).item(),
            lambda: bool(torch.ones(1) > 0),
            lambda: torch.ones(3)[torch.ones(3) > 0],
            lambda: torch.ones(3)[..., [0, 1]],
            lambda: torch.ones(1).new_tensor([1.0]),
            lambda: torch.tensor([1.0]),
        ):
            with pytest.raises(AssertionError, match="makes the host wait"), RefuseWaiting():
                wait()

    @pytest.mark.parametrize("kind", ["3D", "2D"])
    def test_adaptation(self, tiny_inverter, tiny_2d_inverter, crops, cameras, monkeypatch, kind):
        inverter = tiny_inverter if kind == "3D" else tiny_2d_inverter
        begin, parameters = problem_of(inverter, crops[1], cameras[1], flip=kind == "3D")
        monkeypatch.setattr(devices, "is_cpu", lambda x: False)
        with RefuseWaiting(), HostWaits() as waits:
            image, losses, _ = run_through(begin, parameters)
        assert torch.isfinite(image).all() and torch.isfinite(losses["total"]).all()
        assert not waits.found

    def test_views(self, tiny_inverter, tiny_inversion, monkeypatch):
        head = tiny_inverter.prepare(tiny_inversion)
        generator, camera = tiny_inverter.generator, head.camera[None]
        monkeypatch.setattr(devices, "is_cpu", lambda x: False)
        with torch.no_grad(), RefuseWaiting(), HostWaits() as waits:
            planes = generator.planes(head.ws, head.weight_offsets)
            image = generator.synthesize(head.ws, camera, head.weight_offsets, head.offset_planes, planes).image
        assert torch.isfinite(image).all() and not waits.found
