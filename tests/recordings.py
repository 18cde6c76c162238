"""What tests of recordings share: recordings without a GPU, an inner problem, and when two inversions are the same."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from torch.utils._pytree import tree_leaves

from metaaux.adaptation import InnerLoop, InnerProblem
from metaaux.cuda_graphs import CudaGraphs, Lane
from metaaux.export.images import image_to_tensor
from metaaux.models.views import private_view
from metaaux.tasks import Tasks


def tensors_of(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


class CpuLane(Lane):
    """A lane whose recordings compute anew on the CPU: what is tested is everything around a capture."""

    def __init__(self, device):
        super().__init__(device)
        self.replays = 0

    def capture(self, function):
        outputs = function()

        def replay():
            self.replays += 1
            with torch.no_grad():
                for old, new in zip(tensors_of(outputs), tensors_of(function()), strict=True):
                    old.copy_(new)

        return replay, outputs


class CpuGraphs(CudaGraphs):
    lane_type = CpuLane

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._computing = threading.RLock()

    def bind(self, kind, *parts):
        run = super().bind(kind, *parts)

        def alone(function, given):
            # A replay runs the Python of the thread that recorded it, on that thread's private networks; a GPU's runs
            # none.
            with self._computing:
                return function(given)

        return lambda name, function, inputs: run(name, functools.partial(alone, function), inputs)

    def runs_on(self, device):
        return True

    @property
    def lanes(self):
        return [lane for lanes in self._lanes.values() for lane in lanes]

    @property
    def replays(self):
        return sum(lane.replays for lane in self.lanes)


def assert_equal_inversions(first, second, tolerance=1e-5):
    assert torch.allclose(first.w, second.w, atol=tolerance)
    assert first.weight_offsets.keys() == second.weight_offsets.keys()
    for layer, offset in first.weight_offsets.items():
        assert torch.allclose(offset, second.weight_offsets[layer], atol=tolerance), layer
    if first.offset_planes is not None:
        assert torch.allclose(first.offset_planes, second.offset_planes, atol=tolerance)
    for one, other in zip(first.steps, second.steps, strict=True):
        for key in one.keys() - {"seconds"}:
            assert one[key] == pytest.approx(other[key], rel=tolerance, abs=tolerance), (key, one["step"])


def problem_of(inverter, crop, camera, make=InnerProblem, flip=True, steps=2):
    """The inner problem of one photo on the pipeline's device, and the parameters that it starts from."""
    device = inverter.device
    target, cameras = image_to_tensor(crop)[None].to(device), camera[None].to(device)
    network = private_view(inverter.auxiliary)
    parameters = {name: p.detach().requires_grad_() for name, p in network.adaptable_parameters().items()}
    inner = InnerLoop.of(network, steps, rates=dict.fromkeys(parameters, 1e-3), max_gradient_norm=1.0, momentum=0.5)
    with torch.no_grad():
        tasks = Tasks(target, cameras, inverter.encoder(target), None)

    def begin():
        with torch.no_grad():
            return make(inverter.generator, network, inverter.inversion_loss(flip), tasks, inner)

    return begin, parameters


def run_through(begin, parameters):
    problem = begin()
    image, _ = problem.start()
    adapted, _ = problem.run(parameters)
    offsets, image, losses = problem.finish(adapted)
    return image, losses, offsets
