"""The pipeline's named precisions: what they change, what they leave alone, and how threads share PyTorch's flags."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from metaaux import MetaAuxInverter
from metaaux.cameras import camera_from_pose
from metaaux.models import renderer
from metaaux.models.modulation import modulated_conv2d
from metaaux.models.recogniser import chips_from_crops
from metaaux.precision import _SharedFlags, check_precision, matmul_in_tf32

CUDNN = torch.backends.cudnn


@pytest.fixture
def inverter(tiny_folder):
    inverter = MetaAuxInverter.from_pretrained(tiny_folder)
    inverter.set_progress_bar_config(disable=True)
    return inverter


def test_names(inverter):
    assert inverter.precision == "float32"
    with pytest.raises(ValueError, match="precision must be float32, tf32 or bfloat16, got 'fp8'"):
        inverter.precision = "fp8"
    with pytest.raises(ValueError, match="tf32 is a precision of NVIDIA's GPUs, the device is cpu"):
        check_precision("tf32", "cpu")
    assert check_precision("tf32", "cuda:1") == "tf32"


def test_inversions_and_views_in_bfloat16(inverter, tiny_inverter, tiny_inversion, crops, cameras):
    """Results resemble those of float32 and differ; weights and what is stored stay in float32."""
    arguments = {"steps": 1, "camera": cameras[0]}
    expected = tiny_inverter.invert(crops[0], **arguments)
    inverter.precision = "bfloat16"
    inversion = inverter.invert(crops[0], **arguments)
    assert {tensor.dtype for tensor in (inversion.w, *inversion.weight_offsets.values())} == {torch.float32}
    assert inverter.generator.dtype == torch.float32 and inverter.fingerprint == tiny_inverter.fingerprint
    for before, after in zip(expected.steps, inversion.steps, strict=True):
        assert after["total"] != before["total"]
        assert after["total"] == pytest.approx(before["total"], rel=0.05)
    reduced, full = (np.asarray(p.render(tiny_inversion, yaw=10)).astype(float) for p in (inverter, tiny_inverter))
    difference = np.abs(reduced - full)
    assert 0 < difference.max() and difference.mean() < 3
    inverter.precision = "float32"
    assert inverter.render(tiny_inversion, yaw=10) == tiny_inverter.render(tiny_inversion, yaw=10)


def test_positions_are_not_rounded():
    """Where samples and faces lie, and how strong kernels are, is computed in float32 in any case."""
    planes, points = torch.rand(1, 3, 4, 64, 64), torch.rand(1, 200, 3) - 0.5
    axes = ("xy", "xz", "zx")
    full = renderer.sample_planes(planes.bfloat16().float(), points, axes, 1.0)
    torch.testing.assert_close(renderer.sample_planes(planes.bfloat16(), points, axes, 1.0), full.bfloat16())
    crop, camera = torch.rand(1, 3, 64, 64), camera_from_pose(20.0, 5.0)[None]
    x, weight, styles = torch.rand(2, 8, 4, 4).bfloat16(), torch.rand(8, 8, 3, 3), torch.rand(2, 8)
    chips, strengths = chips_from_crops(crop, camera), modulated_conv2d(x, weight, styles)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(chips_from_crops(crop, camera), chips)
        assert torch.equal(modulated_conv2d(x, weight, styles), strengths)


def flags():
    return matmul_in_tf32(), CUDNN.allow_tf32


@pytest.fixture
def restored_flags():
    before = torch.backends.cuda.matmul.allow_tf32, CUDNN.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, CUDNN.allow_tf32 = before


@pytest.mark.usefixtures("restored_flags")
class TestFlags:
    @pytest.mark.parametrize("before", [(False, True), (True, True), (False, False)])
    def test_are_as_before_afterwards(self, before):
        torch.backends.cuda.matmul.allow_tf32, CUDNN.allow_tf32 = before
        shared = _SharedFlags()
        for tf32 in (True, False):
            with pytest.raises(KeyError), shared.using(tf32):
                assert flags() == (tf32, tf32)
                assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
                raise KeyError
            assert flags() == before

    @pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="PyTorch 2.9 has the newer names")
    def test_set_by_the_newer_names(self):
        torch.backends.cuda.matmul.fp32_precision, CUDNN.conv.fp32_precision = "tf32", "ieee"
        try:
            with _SharedFlags().using(False):
                assert not matmul_in_tf32()
            assert torch.backends.cuda.matmul.fp32_precision == "tf32" and CUDNN.conv.fp32_precision == "ieee"
        finally:
            torch.backends.cuda.matmul.fp32_precision, CUDNN.conv.fp32_precision = "none", "tf32"

    def test_within_each_other(self):
        shared, outside = _SharedFlags(), flags()
        with shared.using(True):
            with shared.using(True), shared.using(False):
                assert flags() == (False, False)
                with shared.using(True):
                    assert flags() == (True, True)
                assert flags() == (False, False)
            assert flags() == (True, True)
        assert flags() == outside

    def test_threads_of_one_precision_run_side_by_side_and_others_wait(self):
        shared = _SharedFlags()
        together, seen = threading.Barrier(3, timeout=60), []
        inside, other_done = threading.Event(), threading.Event()

        def same():
            with shared.using(True):
                together.wait()  # passes only while all three are inside

        def other():
            inside.wait(60)
            with shared.using(False):
                seen.append(flags())
            other_done.set()

        threads = [threading.Thread(target=target) for target in (same, same, other)]
        for thread in threads:
            thread.start()
        with shared.using(True):
            together.wait()
            inside.set()
            assert not other_done.wait(0.2)  # it cannot be, however long one waits
            assert flags() == (True, True)
        for thread in threads:
            thread.join(60)
        assert seen == [(False, False)]

    def test_threads_that_change_within_do_not_block_each_other(self):
        shared, inside = _SharedFlags(), threading.Barrier(2, timeout=60)

        def change():
            with shared.using(True):
                inside.wait()
                with shared.using(False):
                    assert flags() == (False, False)
                results.append(flags())

        results = []
        threads = [threading.Thread(target=change, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert results == [(True, True)] * 2
