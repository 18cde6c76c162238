"""MediaPipe's graphs: shared by the aligners of a process, closed with the last of them."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from metaaux.faces import FaceAligner
from metaaux.faces import graphs as graphs_module
from metaaux.faces.graphs import POOL
from tests import warm

pytest.importorskip("mediapipe")
ROOT = Path(__file__).parent.parent
HOPPER = ROOT / "examples" / "grace_hopper.jpg"
MEASURE = """
import gc, os, sys
import torch
from PIL import Image
from metaaux import MetaAuxInverter
from metaaux.faces import FaceAligner

def measured():
    gc.collect()
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
photo, folder = sys.argv[1:]
"""


@pytest.fixture
def run(tmp_path):
    """Runs code in a process of its own, in which no face has been looked for; returns its output and its errors."""

    def run(code, *arguments):
        script = tmp_path / "script.py"
        script.write_text(MEASURE + code)
        process = warm.Popen([script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, errors = (written.decode() for written in process.communicate(timeout=600))
        assert process.returncode == 0, errors
        return out, errors

    return run


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_45_aligners_leave_neither_memory_nor_threads(run, tiny_folder):
    code = """
start, threads = measured()
closed = []
for number in range(45):
    aligner = FaceAligner()
    aligner.align(photo)
    if number % 2:
        aligner.close()
        closed.append(aligner)
    del aligner
memory, now = measured()
print(memory - start, now - threads)
"""
    memory, threads = map(float, run(code, HOPPER, tiny_folder)[0].split())
    assert memory < 150 and threads <= 8


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_45_pipelines_leave_neither_memory_nor_threads(run, tiny_folder):
    code = """
inverter = MetaAuxInverter.from_pretrained(folder)
start, threads = measured()
for number in range(45):
    # Loading takes longest: every ninth is loaded, the others share its networks.
    loaded = number % 9 == 0
    inverter = MetaAuxInverter.from_pretrained(folder) if loaded else MetaAuxInverter(**inverter.components)
    inverter.aligner.align(photo)
del inverter
memory, now = measured()
print(memory - start, now - threads)
"""
    memory, threads = map(float, run(code, HOPPER, tiny_folder)[0].split()[-2:])
    assert memory < 150 and threads <= 8


def test_aligning_prints_nothing_and_leaves_other_messages_alone(run, tiny_folder):
    code = """
import os, threading
FaceAligner().align(photo)
with FaceAligner() as aligner:
    assert aligner.estimate_pose(Image.new("RGB", (90, 90))) is None
os.write(2, b"after")
"""
    assert run(code, HOPPER, tiny_folder) == ("", "after")
    code = """
from metaaux.faces.graphs import _without_chatter
with _without_chatter():
    os.write(2, b"INFO: Created TensorFlow Lite XNNPACK delegate\\nE0000 00:00:1 1 graph.cc:9] failed\\nown words\\n")
"""
    assert run(code, HOPPER, tiny_folder)[1] == "E0000 00:00:1 1 graph.cc:9] failed\nown words\n"


@pytest.fixture
def alone():
    """No aligner but the test's own: those of other tests are kept alive by their fixtures."""
    owners = list(POOL._owners)
    for owner in owners:
        POOL.leave(owner)
    yield
    for owner in owners:
        POOL.join(owner)


def test_graphs_are_closed_with_the_last_aligner(alone):
    first, second = FaceAligner(), FaceAligner(64)
    first.align(HOPPER)
    (graphs,) = POOL._idle
    second.align(HOPPER)
    assert list(POOL._idle) == [graphs]
    del first
    gc.collect()
    assert list(POOL._idle) == [graphs] and graphs.mesh._graph is not None
    del second
    gc.collect()
    assert not POOL._idle
    assert [graph._graph for graph in (graphs.near, graphs.far, graphs.mesh)] == [None] * 3


def test_a_closed_aligner_opens_again(alone):
    with FaceAligner() as aligner:
        before = aligner.align(HOPPER)
        assert POOL._idle
    assert not POOL._idle
    np.testing.assert_array_equal(aligner.align(HOPPER).landmarks, before.landmarks)
    aligner.close()
    aligner.close()
    assert not POOL._idle


def test_closing_while_another_thread_aligns(alone):
    aligner = FaceAligner()
    inside, closed = threading.Event(), threading.Event()

    def hold():
        POOL.join(aligner._detector)
        with POOL.lend() as graphs:
            inside.set()
            assert closed.wait(20)
            return graphs, graphs.process(graphs.mesh, np.zeros((64, 64, 3), np.uint8))

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(hold)
        assert inside.wait(60)
        aligner.close()
        closed.set()
        graphs, found = future.result()
    assert found == []
    assert not POOL._idle and graphs.mesh._graph is None


def test_failed_graphs_are_closed_and_replaced(alone):
    aligner = FaceAligner()
    aligner.align(HOPPER)
    with pytest.raises(ValueError, match="imestamp"), POOL.lend() as graphs:
        # As if the clock had gone back: MediaPipe fails for good.
        graphs.mesh._simulated_timestamp = -(10**9)
        graphs.process(graphs.mesh, np.zeros((64, 64, 3), np.uint8))
    assert [graph._graph for graph in (graphs.near, graphs.far, graphs.mesh)] == [None] * 3
    assert not POOL._idle
    assert aligner.align(HOPPER).faces_found == 1
    with pytest.raises(KeyboardInterrupt), POOL.lend() as graphs:
        raise KeyboardInterrupt
    assert graphs.near._graph is None and not POOL._idle


def test_no_more_sets_than_processors_can_use(alone, monkeypatch):
    monkeypatch.setattr(POOL, "_places", threading.BoundedSemaphore(2))
    aligners = [FaceAligner() for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        faces = list(pool.map(lambda aligner: aligner.align(HOPPER), aligners))
    assert len(POOL._idle) <= 2
    for face in faces:
        np.testing.assert_array_equal(face.landmarks, faces[0].landmarks)
    assert 1 <= graphs_module._MOST_SETS <= 8


def test_used_aligners_can_be_copied_pickled_and_saved():
    aligner = FaceAligner(image_size=64, crop_scale=0.9, min_face_size=30, max_pixels=10**6)
    expected = aligner.align(HOPPER)
    buffer = io.BytesIO()
    torch.save(aligner, buffer)
    buffer.seek(0)
    copies = [
        copy.copy(aligner),
        copy.deepcopy(aligner),
        pickle.loads(pickle.dumps(aligner)),
        torch.load(buffer, weights_only=False),
    ]
    aligner.close()
    for other in copies:
        assert (other.image_size, other.crop_scale, other.min_face_size, other.max_pixels) == (64, 0.9, 30, 10**6)
        face = other.align(HOPPER)
        np.testing.assert_array_equal(face.landmarks, expected.landmarks)
        assert face.image.tobytes() == expected.image.tobytes()


def test_a_pipelines_aligner_follows_its_generator(tiny_inverter):
    aligner = tiny_inverter.aligner
    assert tiny_inverter.aligner is aligner
    other = copy.copy(tiny_inverter)
    other._aligner = FaceAligner(image_size=aligner.image_size * 2)
    assert other.aligner.image_size == aligner.image_size
