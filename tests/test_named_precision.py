"""The pipeline's named precisions: what they change, what they leave alone, and how threads share PyTorch's flags."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from recordings import CpuGraphs, assert_equal_inversions

from metaaux import MetaAuxInverter
from metaaux.baselines.optimization import LatentSettings
from metaaux.baselines.registry import MethodOptions, make_methods
from metaaux.cameras import camera_from_pose
from metaaux.models import renderer
from metaaux.models.modulation import modulated_conv2d
from metaaux.models.recogniser import chips_from_crops
from metaaux.precision import PRECISIONS, _SharedFlags, check_precision, matmul_in_tf32

CUDNN = torch.backends.cudnn


@pytest.fixture
def inverter(tiny_folder):
    inverter = MetaAuxInverter.from_pretrained(tiny_folder)
    inverter.set_progress_bar_config(disable=True)
    return inverter


def test_names(inverter):
    assert inverter.precision is None
    with pytest.raises(ValueError, match="precision must be float32, tf32 or bfloat16, got 'fp8'"):
        inverter.precision = "fp8"
    with pytest.raises(ValueError, match="tf32 is a precision of NVIDIA's GPUs, the device is cpu"):
        check_precision("tf32", "cpu")
    assert check_precision("tf32", "cuda:1") == "tf32" and check_precision(None, "cpu") is None


def test_tf32_on_a_cpu(inverter, tiny_inversion, crops, cameras):
    """It may be set before a move to a GPU; calls elsewhere say what is wrong, before any work."""
    inverter.precision = "tf32"
    with pytest.raises(ValueError, match="tf32 is a precision of NVIDIA's GPUs, the device is cpu"):
        inverter.invert(crops[0], steps=0, camera=cameras[0], on_step=lambda *_: pytest.fail("it began"))
    with pytest.raises(ValueError, match="the device is cpu"):
        inverter.render(tiny_inversion)


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
    for name in ("float32", None):
        inverter.precision = name
        assert inverter.render(tiny_inversion, yaw=10) == tiny_inverter.render(tiny_inversion, yaw=10)


def test_recordings_of_each_precision(inverter, crops, cameras):
    """They are kept beside each other, so that changing to and fro takes none anew."""

    def invert(precision):
        inverter.precision = precision
        return inverter.invert(crops[0], steps=1, camera=cameras[0])

    expected = {precision: invert(precision) for precision in (None, "bfloat16")}
    inverter._graphs, captures = CpuGraphs(), []
    for precision in (None, "bfloat16", None, "bfloat16"):
        assert_equal_inversions(invert(precision), expected[precision])
        captures.append(inverter._graphs.captures)
    assert captures == [4, 8, 8, 8]  # encoder, start, step, end


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


def test_sums_of_losses_are_float32(inverter, batch):
    """They would be numbers of 8 bits else."""
    inverter.precision = "bfloat16"
    (image, camera), loss = batch, inverter.inversion_loss()
    output = inverter.generator.synthesize(inverter.codes(image, camera), camera, dtype=torch.bfloat16)
    terms = loss(output.image, output.image_raw, image, camera)
    for name, term in terms.items():
        assert term.dtype == torch.float32 and not torch.equal(term, term.bfloat16().float()), name


@pytest.mark.parametrize("name", ["encoder", "metaaux", "w", "pti", "without_auxiliary"])
def test_methods_of_an_evaluation(inverter, batch, name):
    """All of them compute in the pipeline's precision, or their times could not be compared."""
    image, camera = (tensor[:1] for tensor in batch)
    options = MethodOptions(steps=1, latent=LatentSettings(steps=2), tuning_steps=1)
    seen = []
    hook = inverter.generator.backbone.b8.conv1.register_forward_hook(
        lambda m, args, output: seen.append(output.dtype)
    )
    images = {}
    for precision in (None, "bfloat16"):
        inverter.precision = precision
        images[precision] = make_methods([name], inverter, options)[0].invert(image, camera)[0].image
    hook.remove()
    assert images[None].dtype == images["bfloat16"].dtype == torch.float32
    assert 0 < (images[None] - images["bfloat16"]).abs().max() < 0.2
    assert seen[-1] == torch.bfloat16


def flags():
    return matmul_in_tf32(), CUDNN.allow_tf32


@pytest.fixture
def restored_flags():
    before = torch.backends.cuda.matmul.allow_tf32, CUDNN.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, CUDNN.allow_tf32 = before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="TF32 is a precision of GPUs")
def test_on_cuda(inverter, crops, cameras):
    """Recordings give what plain launches give, in each precision, and PyTorch's settings are left as they were."""
    inverter.to("cuda")
    before, totals = flags(), {}
    for precision in (None, *PRECISIONS):
        inverter.precision = precision
        inverter.disable_cuda_graphs()
        plain = inverter.invert(crops[0], steps=2, camera=cameras[0])
        inverter.enable_cuda_graphs()
        for _ in range(2):
            recorded = inverter.invert(crops[0], steps=2, camera=cameras[0])
            assert_equal_inversions(recorded, plain, 1e-5 if precision == "float32" else 1e-2)
        assert flags() == before
        totals[precision] = plain.steps[-1]["total"]
    assert totals["bfloat16"] != totals["float32"]
    assert totals["tf32"] == pytest.approx(totals["float32"], rel=0.01)


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

    def test_left_alone_without_a_name(self):
        """Also by the end of the block, within which the program may have set them."""
        shared, (matmul, cudnn) = _SharedFlags(), flags()
        with shared.using(None):
            assert flags() == (matmul, cudnn)
            with shared.using(not matmul):
                assert flags() == (not matmul, not matmul)
            assert flags() == (matmul, cudnn)
            CUDNN.allow_tf32 = not cudnn
        assert flags() == (matmul, not cudnn)

    @pytest.mark.parametrize("other", [False, None])
    def test_within_each_other_of_another_kind(self, other):
        shared, outside = _SharedFlags(), flags()
        with shared.using(other), shared.using(True), shared.using(other):
            assert flags() == (outside if other is None else (False, False))
        assert flags() == outside

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
