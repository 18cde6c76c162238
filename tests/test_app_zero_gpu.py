"""The demo on ZeroGPU, through the worker processes of the `spaces` package; see `zero_gpu`."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from app_server import ROOT, new_client, running_app
from browser import CHROMIUM, changed, running_browser, upload, view, visitors
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from playwright.sync_api import expect
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from zero_gpu import environment, lent_gpus

PHOTO = ROOT / "examples" / "eileen_collins.jpg"


@pytest.fixture(scope="module")
def lender():
    with lent_gpus() as lender:
        yield lender


@pytest.fixture(scope="module")
def app(lender, smiling_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero-gpu")
    variables = {"METAAUX_MODELS": str(smiling_folder), **environment(lender, folder)}
    with running_app(folder, "tests/zero_gpu.py", **variables) as app:
        yield app


@pytest.fixture(scope="module")
def client(app, tmp_path_factory):
    return new_client(app, tmp_path_factory.mktemp("downloads"))


@pytest.fixture(scope="module")
def results(client):
    job = client.submit(handle_file(PHOTO), steps=1, api_name="/invert")
    results = list(job)
    job.result()
    return results


@pytest.fixture(scope="module")
def inversion(results):
    return results[-1][2]


def refused(app, lender, call, message, asked=0):
    """The message arrives whole; `asked`: how often a GPU was asked for."""
    before = len(lender.requested)
    with pytest.raises(AppError, match=re.compile(message, re.IGNORECASE)) as caught:
        call()
    assert "ZeroGPU" not in str(caught.value) and str(app.cache) not in str(caught.value)
    assert len(lender.requested) - before == asked


def test_an_inversion_is_one_request(results, lender, inversion):
    assert [report["step"] for _, report, _, _ in results] == [-1, 0, 1]
    assert len(lender.requested) >= 1 and lender.failed == 0


def test_endpoints_work_in_worker_processes(client, lender, inversion, tiny_inverter):
    before = len(lender.requested)
    picture = client.predict(handle_file(inversion), yaw=20, pitch=-5, api_name="/render")
    expected = tiny_inverter.render(tiny_inverter.load_inversion(inversion), yaw=20, pitch=-5)
    assert np.array_equal(np.asarray(Image.open(picture).convert("RGB")), np.asarray(expected))
    assert Path(client.predict(handle_file(inversion), frames=4, api_name="/orbit")).stat().st_size > 0
    grid = {"yaws": [20], "pitches": [-5]}
    picture, _ = client.predict(handle_file(inversion), **grid, api_name="/turntable")
    assert np.array_equal(np.asarray(Image.open(picture).convert("RGB")), np.asarray(expected))
    assert len(lender.requested) - before == 3


def test_visitors_have_gpus_at_the_same_time(app, lender, tmp_path):
    """Two requests are granted only once both are there."""
    clients = [new_client(app, tmp_path) for _ in range(2)]
    lender.meet = threading.Barrier(2, timeout=60)
    try:
        jobs = [client.submit(handle_file(PHOTO), steps=0, api_name="/invert") for client in clients]
        heads = [Path(job.result(120)[2]).read_bytes() for job in jobs]
    finally:
        lender.meet = None
    assert len(heads) == 2 and lender.failed == 0


@pytest.mark.parametrize("endpoint", ["/render", "/turntable", "/orbit", "/mesh"])
def test_what_cannot_work_is_said_before_a_gpu_is_asked_for(app, lender, client, inversion, tmp_path, endpoint):
    other = tmp_path / "other.safetensors"
    other.write_bytes(re.sub(rb"[0-9a-f]{64}", b"0" * 64, Path(inversion).read_bytes(), count=1))
    refused(app, lender, lambda: client.predict(handle_file(other), api_name=endpoint), "made with the model")
    text = tmp_path / "text.safetensors"
    text.write_text("not a safetensors file")
    refused(app, lender, lambda: client.predict(handle_file(text), api_name=endpoint), "not a safetensors file")
    edits = {"edits": {"nose": 1.0}}
    refused(app, lender, lambda: client.predict(handle_file(inversion), **edits, api_name=endpoint), "no direction")


def test_photos_and_settings_are_checked_before_a_gpu_is_asked_for(app, lender, client, tmp_path):
    empty = tmp_path / "grey.png"
    Image.new("RGB", (64, 64), "grey").save(empty)
    refused(app, lender, lambda: client.predict(handle_file(empty), api_name="/invert"), "no face was found")
    refused(app, lender, lambda: client.predict(handle_file(PHOTO), steps=-1, api_name="/invert"), "steps must be")


def test_errors_of_the_computation_itself_keep_their_message(app, lender, client, inversion, tmp_path):
    """A head of nothing but air, which only the surface's extraction finds out."""
    with safe_open(inversion, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(inversion)
    save_file({**tensors, "w": torch.zeros_like(tensors["w"])}, tmp_path / "air.safetensors", metadata)
    call = lambda: client.predict(handle_file(tmp_path / "air.safetensors"), resolution=32, api_name="/mesh")  # noqa: E731
    refused(app, lender, call, "no surface", asked=1)
    assert lender.failed == 1


def test_the_next_request_works_after_errors(client, inversion):
    assert Path(client.predict(handle_file(inversion), api_name="/render")).is_file()


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_visit_asks_once_an_inversion_never_for_turning_and_once_for_edits(app, lender):
    with running_browser() as browser, visitors(app, browser) as open_page:
        page = open_page()
        upload(page, PHOTO)
        stage = page.locator("#view .stage")
        before = len(lender.requested)
        page.locator("#invert:not([disabled])").click()
        expect(stage).to_have_attribute("data-views", "217")
        first = view(page)
        assert len(lender.requested) - before == 1
        stage.focus()
        turned = first
        for _ in range(3):
            page.keyboard.press("ArrowRight")
            turned = changed(page, turned)
        assert len(lender.requested) - before == 1
        slider = page.locator("#edits input[type=range]").first
        slider.fill("3")
        changed(page, turned)
        expect(stage).to_have_attribute("data-views", "217")
        assert len(lender.requested) - before == 2
        assert sum(lender.requested[before:]) <= 25 and lender.failed <= 1
