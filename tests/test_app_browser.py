"""The page in a browser: Playwright drives the system's Chromium against the embedded model.

Pictures of the page go to the folder that `METAAUX_SCREENSHOTS` names, for CI to keep.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from app_server import ROOT, running_app
from browser import CHROMIUM, changed, running_browser, screenshot, upload, view, visitors
from playwright.sync_api import expect

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

PHOTO = ROOT / "examples" / "eileen_collins.jpg"


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    with running_app(tmp_path_factory.mktemp("app"), METAAUX_DEVICE="cpu") as app:
        yield app


@pytest.fixture(scope="module")
def browser():
    with running_browser() as browser:
        yield browser


@pytest.fixture
def open_page(app, browser):
    with visitors(app, browser) as open_page:
        yield open_page


def open_with_photo(open_page, **options):
    """A new visitor's page with a photo, which can be inverted.

    The settings are opened before the photo is added: the first time an accordion opens, Gradio sets its components
    once more to their first values, some frames later, and what a script had filled in by then is lost.
    """
    page = open_page(**options)
    expect(page.locator("#invert")).to_be_disabled()
    page.get_by_text("Settings", exact=True).click()
    page.locator("#steps input[type=number]").wait_for()
    upload(page, PHOTO)
    expect(page.locator("#crop")).to_contain_text("Face found")
    return page


def invert(page, steps):
    number = page.locator("#steps input[type=number]")
    number.fill(str(steps))
    number.press("Tab")
    expect(number).to_have_value(str(steps))
    page.locator("#invert:not([disabled])").click()


def wait_for_view(page, picture):
    """Waits until the view is `picture` again."""
    before = view(page)
    while before != picture:
        before = changed(page, before)


def download(page, selector):
    with page.expect_download() as found:
        page.click(selector)
    return Path(found.value.path()), found.value.suggested_filename


def test_the_whole_path(open_page, tmp_path):
    page = open_with_photo(open_page, accept_downloads=True)
    invert(page, steps=2)
    page.wait_for_selector("#compare img")
    page.wait_for_selector("#cancel")
    first = view(page)
    expect(page.locator("#strip .thumbnail-item")).to_have_count(4)
    expect(page.locator("#losses svg")).to_have_count(3)
    expect(page.locator("#status")).to_contain_text("Done: 2 steps")
    page.get_by_text("Settings", exact=True).click()
    screenshot(page, "inverted", pause=500)

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
    picture, name = download(page, "#save-picture")
    assert picture.read_bytes() == first and name == "view.png"
    head, name = download(page, "#save-head")
    assert name == "head.safetensors"
    kept = tmp_path / name
    shutil.copy(head, kept)
    page.click("#make-mesh")
    page.wait_for_selector("#mesh canvas")
    assert download(page, "#save-mesh")[0].read_bytes()[:4] == b"glTF"
    screenshot(page, "kept", pause=1500)

    # A new visitor drops the file back in. No more views of the first one's head are made, which take a while.
    page.close()
    other = open_page()
    other.get_by_text("Open a saved head").click()
    other.locator("#head-upload input[type=file]").set_input_files(kept)
    wait_for_view(other, first)


def test_cancel(open_page):
    page = open_with_photo(open_page, color_scheme="dark")
    invert(page, steps=20)
    page.locator("#strip .thumbnail-item").nth(2).wait_for()
    screenshot(page, "running-dark")
    page.click("#cancel")
    page.wait_for_selector("#invert:not([disabled])")
    expect(page.locator("#status")).to_contain_text("Cancelled")
    assert page.locator("#strip .thumbnail-item").count() < 20
    # The only worker is free again, and what it had begun adds nothing to the next run.
    invert(page, steps=0)
    expect(page.locator("#status")).to_contain_text("Done: 0 steps")
    view(page)
    expect(page.locator("#strip .thumbnail-item")).to_have_count(2)


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
    page = open_with_photo(
        open_page, viewport={"width": 390, "height": 844}, device_scale_factor=2, is_mobile=True, has_touch=True
    )
    invert(page, steps=0)
    page.get_by_text("Settings", exact=True).click()
    view(page)
    page.wait_for_function("document.documentElement.scrollWidth <= window.innerWidth")
    for selector in ("#invert", "#view img", "#yaw", "#save-picture", "#make-mesh"):
        page.locator(selector).scroll_into_view_if_needed()
        box = page.locator(selector).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["height"] >= 24, selector
    screenshot(page, "phone", pause=500)
