"""Inference by recordings on a GPU: what the CPU's stand-in for a capture leaves open."""

from __future__ import annotations

import contextlib
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from recordings import assert_equal_inversions, problem_of, run_through
from torch import nn

from metaaux import MetaAuxInverter
from metaaux.adaptation import InnerProblem
from metaaux.models.auxiliary import AuxiliaryOutput
from metaaux.precision import products
from metaaux.replay import ReplayedProblem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU"),
]


@contextlib.contextmanager
def no_waiting():
    """PyTorch itself refuses to wait for the GPU within."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def inverter(tiny_folder):
    inverter = MetaAuxInverter.from_pretrained(tiny_folder).to("cuda")
    inverter.set_progress_bar_config(disable=True)
    # TF32 makes of the last bits, which sums by atomic additions leave to chance, differences of some 1e-5.
    inverter.precision = "float32"
    return inverter


@pytest.fixture
def graphs(inverter):
    inverter.enable_cuda_graphs()
    yield inverter._graphs
    inverter.disable_cuda_graphs()


@pytest.fixture(scope="module")
def eager(inverter, crops, cameras):
    return [inverter.invert(crop, steps=3, camera=camera) for crop, camera in zip(crops, cameras)]


def test_synthesis_and_views(inverter, eager, graphs):
    head = inverter.prepare(eager[0])
    given = (head.ws, head.camera[None].cuda(), head.weight_offsets, head.offset_planes)
    with torch.no_grad(), products(inverter.precision, inverter.device):
        for planes in (None, head.planes):
            expected = inverter.generator.synthesize(*given, planes).image
            for _ in range(3):
                torch.testing.assert_close(inverter.synthesize(*given, planes), expected, rtol=0, atol=1e-5)
        for inversion in eager:
            replayed = inverter.prepare(inversion)
            expected = inverter.generator.planes(replayed.ws, replayed.weight_offsets)
            torch.testing.assert_close(replayed.planes, expected, rtol=0, atol=1e-5)
    assert graphs.captures == 3


def test_second_photo_replays(inverter, eager, graphs, crops, cameras):
    for number, (crop, camera) in enumerate(zip(crops, cameras)):
        calls = []
        result = inverter.invert(crop, 3, lambda *call: calls.append(call), camera=camera)  # noqa: B023
        assert_equal_inversions(result, eager[number])
        assert [step for step, _, _ in calls] == [-1, 0, 1, 2, 3]
        assert graphs.captures == 4


def test_flip_loss_and_several_photos(inverter, eager, graphs, crops, cameras):
    inverter.disable_cuda_graphs()
    flipped = inverter.invert(crops[1], steps=2, camera=cameras[1], flip=True)
    several = inverter.invert(crops, steps=2, camera=cameras)
    inverter.enable_cuda_graphs()
    for _ in range(2):
        assert_equal_inversions(inverter.invert(crops[1], steps=2, camera=cameras[1], flip=True), flipped)
        assert_equal_inversions(inverter.invert(crops, steps=2, camera=cameras), several)


def test_threads(inverter, eager, graphs, crops, cameras):
    ready = threading.Barrier(8)

    def invert(number):
        ready.wait()
        result = inverter.invert(crops[number % 3], steps=3, camera=cameras[number % 3])
        return result, inverter.render(result, yaw=5)

    for _ in range(2):  # the first time recordings are made meanwhile
        with ThreadPoolExecutor(8) as pool:
            for number, (result, view) in enumerate(pool.map(invert, range(8))):
                assert_equal_inversions(result, eager[number % 3])
                assert view.size == (32, 32)
    assert 1 <= len(graphs._lanes[inverter.device]) <= graphs.concurrency


def test_new_values_are_read_and_a_move_records_anew(inverter, eager, graphs, crops, cameras):
    inverter.invert(crops[0], steps=1, camera=cameras[0])
    weight = inverter.generator.decoder.out.weight
    saved = weight.clone()
    with torch.no_grad():
        weight.mul_(0.5)
    captures = graphs.captures
    changed = inverter.invert(crops[0], steps=1, camera=cameras[0])
    assert graphs.captures == captures
    with torch.no_grad():
        weight.copy_(saved)
    assert abs(changed.steps[-1]["mse"] - eager[0].steps[2]["mse"]) > 1e-4
    inverter.generator.decoder.out.weight = nn.Parameter(saved.clone(), requires_grad=False)
    assert_equal_inversions(inverter.invert(crops[0], steps=3, camera=cameras[0]), eager[0])
    assert graphs.captures > captures


def test_host_never_waits(inverter, graphs, crops, cameras):
    def replayed(*arguments):
        return ReplayedProblem(graphs, *arguments)

    results = []
    for make in (InnerProblem, replayed):
        begin, parameters = problem_of(inverter, crops[1], cameras[1], make)
        run_through(begin, parameters)
        with no_waiting():
            results.append(run_through(begin, parameters))
    (image, losses, offsets), (other, other_losses, other_offsets) = results
    assert torch.allclose(image, other, atol=1e-5)
    assert isinstance(other_offsets, AuxiliaryOutput)
    assert losses["total"].item() == pytest.approx(other_losses["total"].item(), rel=1e-5)
    assert torch.allclose(offsets.offset_planes, other_offsets.offset_planes, atol=1e-5)


def test_views_never_wait(inverter, eager, graphs):
    head = inverter.prepare(eager[1])
    given = (head.ws, head.camera[None].cuda(), head.weight_offsets, head.offset_planes)
    for _ in range(2):
        inverter.synthesize(*given), inverter.synthesize(*given, head.planes)
    with no_waiting():
        inverter.synthesize(*given), inverter.synthesize(*given, head.planes)
        inverter.generator.synthesize(*given)


def test_disabling_frees_the_memory(inverter, crops, cameras):
    inverter.disable_cuda_graphs()
    inverter.enable_cuda_graphs()
    inverter.invert(crops[0], steps=2, camera=cameras[0])
    lanes = inverter._graphs._lanes[inverter.device]
    pools = [tuple(lane.pool) for lane in lanes]

    def small_blocks():
        segments = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) in pools]
        blocks = [block for segment in segments for block in segment["blocks"]]
        # cuBLAS keeps its workspaces, which are larger than any tensor of the tiny networks.
        return [b["size"] for b in blocks if b["state"].startswith("active") and b["size"] < 2**20]

    del lanes
    assert small_blocks()
    inverter.disable_cuda_graphs()
    assert not small_blocks()


def test_what_cannot_be_captured_goes_on_without(graphs):
    run = graphs.bind("test", nn.Identity())
    x = torch.arange(3.0, device="cuda")
    with pytest.warns(RuntimeWarning, match="makes the host wait"):
        first = run("sync", lambda given: given["x"] * given["x"].sum().item(), {"x": x})
    second = run("sync", lambda given: given["x"] * given["x"].sum().item(), {"x": x + 1})
    assert first.tolist() == [0, 3, 6] and second.tolist() == [6, 12, 18]

    def hidden(given):
        torch.cuda.current_stream().synchronize()  # no operator, and refused in a capture
        return given["x"] * 3

    # What is first noticed in the capture does not do harm either: the next recordings are made.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(3)
        for _ in range(2):
            assert run("hidden", hidden, {"x": x}).tolist() == [0, 3, 6]
    drawn = torch.rand(2, device="cuda")
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2, device="cuda"), drawn)
    for _ in range(2):
        assert run("double", lambda given: given["x"] * 2, {"x": x}).tolist() == [0, 2, 4]
    assert graphs.captures == 1
