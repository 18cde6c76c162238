"""The page in a browser: Playwright drives the system's Chromium against the embedded model.

Pictures of the page go to the folder that `METAAUX_SCREENSHOTS` names, for CI to keep.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
from pathlib import Path

import pytest
from app_server import ROOT, running_app
from playwright.sync_api import expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --use-angle=swiftshader --enable-unsafe-swiftshader"
).split()
PHOTO = ROOT / "examples" / "eileen_collins.jpg"
# Gradio's 3D viewer says so on computers without WebGPU, and goes on with WebGL.
HARMLESS = re.compile("WebGPU")
SLOW = 120_000
expect.set_options(timeout=SLOW)


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    with running_app(tmp_path_factory.mktemp("app"), METAAUX_DEVICE="cpu") as app:
        yield app


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(app, browser):
    """Opens the page as a new visitor; at the end there must have been no error in its console."""
    contexts, errors = [], []

    def open_page(**options):
        context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(app.url)
        page.wait_for_selector("#model-line .chip.ready", timeout=SLOW)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [error for error in errors if not HARMLESS.search(error)] == []


def screenshot(page, name):
    folder = os.environ.get("METAAUX_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def upload(page, path):
    page.locator("#photo input[type=file]").set_input_files(path)
    page.wait_for_selector("#crop .crop-card", timeout=SLOW)


def open_settings(page):
    """Opens the settings and waits until they can be changed.

    The first time an accordion opens, Gradio sets its components once more to their first values, some frames later:
    what a script had filled in by then is lost.
    """
    page.get_by_text("Settings", exact=True).click()
    page.locator("#steps input[type=number]").wait_for()
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    page.wait_for_timeout(500)


def invert(page, steps):
    open_settings(page)
    number = page.locator("#steps input[type=number]")
    number.fill(str(steps))
    number.press("Tab")
    expect(number).to_have_value(str(steps))
    page.get_by_text("Settings", exact=True).click()
    page.locator("#invert:not([disabled])").click(timeout=SLOW)


def view(page):
    """Bytes of the picture that is shown."""
    code = """async () => {
        const data = await (await fetch(document.querySelector('#view img').src)).arrayBuffer();
        return btoa(String.fromCharCode(...new Uint8Array(data)));
    }"""
    return base64.b64decode(page.evaluate(code))


def changed(page, before):
    """The view once it differs from `before`, and has settled."""
    for _ in range(200):
        page.wait_for_timeout(100)
        now = view(page)
        if now != before:
            return settled(page)
    raise AssertionError("the view did not change")


def settled(page):
    """The view once it has stayed the same for two seconds."""
    before, stable = None, 0
    while stable < 4:
        now = view(page)
        stable = stable + 1 if now == before else 0
        before = now
        page.wait_for_timeout(500)
    return before


def wait_for_view(page, picture):
    """Waits until the view is `picture` again."""
    for _ in range(SLOW // 200):
        if view(page) == picture:
            return
        page.wait_for_timeout(200)
    raise AssertionError("the view did not become the picture it was")


def download(page, selector):
    with page.expect_download() as found:
        page.click(selector)
    return Path(found.value.path()), found.value.suggested_filename


def test_the_whole_path(open_page, tmp_path):
    page = open_page(accept_downloads=True)
    expect(page.locator("#invert")).to_be_disabled()
    upload(page, PHOTO)
    expect(page.locator("#crop")).to_contain_text("Face found")
    invert(page, steps=2)
    page.wait_for_selector("#compare img", timeout=SLOW)
    page.wait_for_selector("#cancel")
    page.wait_for_selector("#view img", timeout=SLOW)
    expect(page.locator("#strip .thumbnail-item")).to_have_count(4)
    expect(page.locator("#losses svg")).to_have_count(3)
    expect(page.locator("#status")).to_contain_text("Done: 2 steps")
    first = settled(page)
    screenshot(page, "inverted")

    # Turning by slider, by dragging, and back.
    page.locator("#yaw input[type=range]").fill("20")
    turned = changed(page, first)
    box = page.locator("#view img").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 100, y + 20, steps=5)
    page.mouse.up()
    dragged = changed(page, turned)
    assert float(page.locator("#yaw input[type=number]").input_value()) < 10
    page.locator("#edits input[type=range]").first.fill("1")
    dragged = changed(page, dragged)
    screenshot(page, "edited")
    page.click("#reset")
    wait_for_view(page, first)

    # Keeping it.
    settled(page)
    picture, name = download(page, "#save-picture")
    assert picture.read_bytes() == first and name == "view.png"
    head, name = download(page, "#save-head")
    assert name == "head.safetensors"
    kept = tmp_path / name
    shutil.copy(head, kept)
    page.click("#make-video")
    page.wait_for_selector("#video video", timeout=SLOW)
    page.wait_for_function("document.querySelector('#video video').currentTime > 0.2", timeout=SLOW)
    assert page.evaluate("document.querySelector('#video video').error") is None
    assert page.evaluate("document.querySelector('#video video').duration") == pytest.approx(2, abs=0.1)
    page.click("#make-mesh")
    page.wait_for_selector("#mesh canvas", timeout=SLOW)
    assert download(page, "#save-mesh")[0].read_bytes()[:4] == b"glTF"
    page.wait_for_timeout(1500)
    screenshot(page, "kept")

    # A new visitor drops the file back in.
    other = open_page()
    other.get_by_text("Open a saved head").click()
    other.locator("#head-upload input[type=file]").set_input_files(kept)
    other.wait_for_selector("#view img", timeout=SLOW)
    wait_for_view(other, first)


def test_cancel(open_page):
    page = open_page(color_scheme="dark")
    upload(page, PHOTO)
    invert(page, steps=20)
    page.locator("#strip .thumbnail-item").nth(2).wait_for(timeout=SLOW)
    screenshot(page, "running-dark")
    page.click("#cancel")
    page.wait_for_selector("#invert:not([disabled])")
    expect(page.locator("#status")).to_contain_text("Cancelled")
    page.wait_for_timeout(3000)
    steps = page.locator("#strip .thumbnail-item").count()
    page.wait_for_timeout(3000)
    assert page.locator("#strip .thumbnail-item").count() == steps < 20


def test_bad_files_are_messages(open_page, tmp_path):
    page = open_page(color_scheme="dark")
    text = tmp_path / "text.jpg"
    text.write_text("I am no picture")
    upload(page, text)
    expect(page.locator("#crop")).to_contain_text("'text.jpg' is not an image")
    expect(page.locator("#invert")).to_be_disabled()
    page.get_by_text("Open a saved head").click()
    head = tmp_path / "head.safetensors"
    head.write_text("nor a head")
    page.locator("#head-upload input[type=file]").set_input_files(head)
    expect(page.locator(".toast-body").first).to_contain_text("not a safetensors file")
    screenshot(page, "messages-dark")


def test_phone(open_page):
    page = open_page(viewport={"width": 390, "height": 844}, device_scale_factor=2, is_mobile=True, has_touch=True)
    upload(page, PHOTO)
    invert(page, steps=0)
    page.wait_for_selector("#view img", timeout=SLOW)
    settled(page)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for selector in ("#invert", "#view img", "#yaw", "#save-picture", "#make-mesh"):
        page.locator(selector).scroll_into_view_if_needed()
        box = page.locator(selector).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["height"] >= 24, selector
    screenshot(page, "phone")
