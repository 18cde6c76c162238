"""Turning the head in the browser. The tiny model's heads are noise: tested is which view is shown when, and why."""

from __future__ import annotations

import io
import os
import time

import numpy as np
import pytest
from app_server import ROOT, running_app
from browser import CHROMIUM, SLOW, changed, running_browser, settled, upload, view, visitors
from PIL import Image
from playwright.sync_api import expect

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
PHOTO = ROOT / "examples" / "eileen_collins.jpg"
#: Views of a complete turntable: a coarse row and the whole grid on a CPU.
VIEWS = 10 + 31 * 7


@pytest.fixture(scope="module")
def app(smiling_folder, tmp_path_factory):
    variables = {"METAAUX_MODELS": str(smiling_folder), "METAAUX_DEVICE": "cpu"}
    with running_app(tmp_path_factory.mktemp("app"), **variables) as app:
        yield app


@pytest.fixture(scope="module")
def browser():
    with running_browser() as browser:
        yield browser


@pytest.fixture
def open_page(app, browser):
    with visitors(app, browser) as open_page:
        yield open_page


def open_head(open_page, **options):
    """A new visitor's page with an inverted head, all of whose views are there."""
    page = open_page(**options)
    upload(page, PHOTO)
    page.locator("#invert:not([disabled])").click(timeout=SLOW)
    page.wait_for_selector("#view img", timeout=SLOW)
    expect(page.locator("#view .stage")).to_have_attribute("data-views", str(VIEWS), timeout=SLOW)
    settled(page)
    return page


def open_example(open_page, **options):
    """As `open_head`, with the head of an example, which is made for the first of these visitors alone."""
    page = open_page(**options)
    page.locator("#photo-panel .gallery-item").first.click()
    page.wait_for_selector("#view img", timeout=SLOW)
    expect(page.locator("#view .stage")).to_have_attribute("data-views", str(VIEWS), timeout=SLOW)
    settled(page)
    return page


def requests_of(page):
    """List that grows with each request to the server."""
    requests = []
    page.on(
        "request", lambda request: None if request.url.startswith(("blob:", "data:")) else requests.append(request.url)
    )
    return requests


def middle(page):
    box = page.locator("#view .stage").bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, box["width"]


def shown(page):
    """Pixels of what the visitor sees now: the canvas while the head turns, the exact view at rest."""
    code = """async () => {
        const stage = document.querySelector('#view .stage'), live = stage.classList.contains('live');
        await new Promise(requestAnimationFrame);
        const source = stage.querySelector(live ? 'canvas' : 'img'), canvas = document.createElement('canvas');
        canvas.width = canvas.height = 32;
        canvas.getContext('2d').drawImage(source, 0, 0, 32, 32);
        return canvas.toDataURL();
    }"""
    return page.evaluate(code)


def angles(page):
    return tuple(float(page.locator(f"#{axis} input[type=number]").input_value()) for axis in ("yaw", "pitch"))


def test_dragging_shows_many_views_without_a_request(open_page):
    page = open_example(open_page)
    x, y, width = middle(page)
    before = view(page)
    requests = requests_of(page)
    page.mouse.move(x - 0.4 * width, y)
    page.mouse.down()
    pictures = set()
    for number in range(1, 41):
        page.mouse.move(x - 0.4 * width + number / 50 * width, y)
        pictures.add(shown(page))
    assert len(pictures) >= 15 and requests == []
    yaw, pitch = angles(page)
    assert yaw > 20
    page.mouse.up()
    exact = changed(page, before)
    assert requests and angles(page) == (yaw, pitch)
    expect(page.locator("#view .stage")).not_to_have_class("live")
    # Nearest and exact view are of the same head from nearly the same side.
    assert Image.open(io.BytesIO(exact)).size == (32, 32)


def test_keys_wheel_and_sliders_turn_it(open_page):
    page = open_example(open_page)
    stage = page.locator("#view .stage")
    stage.focus()
    yaw, pitch = angles(page)
    before = view(page)
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    assert angles(page) == (yaw + 6, pitch + 3)
    assert float(stage.get_attribute("aria-valuenow")) == yaw + 6
    assert "right" in stage.get_attribute("aria-valuetext") or yaw + 6 < 0
    before = changed(page, before)
    page.keyboard.press("Home")
    assert angles(page)[0] == -45
    before = changed(page, before)
    x, y, _ = middle(page)
    page.mouse.move(x, y)
    page.mouse.wheel(200, 0)
    page.wait_for_function("document.querySelector('#yaw input[type=number]').value > -45")
    before = changed(page, before)
    page.locator("#pitch input[type=range]").fill("-10")
    assert changed(page, before) != before and angles(page)[1] == -10


def test_an_edit_is_one_request_and_renews_the_views(open_page):
    page = open_example(open_page)
    before, old = view(page), page.evaluate("document.querySelector('#view .stage').dataset.views")
    joined = []
    page.on("request", lambda request: joined.append(request) if request.url.endswith("/queue/join?") else None)
    slider = page.locator("#edits input[type=range]").first
    for amount in ("0.5", "1", "1.5", "2"):
        slider.fill(amount)
    edited = changed(page, before)
    # The view, and the sheets that follow it.
    assert len(joined) <= 2
    expect(page.locator("#view .stage")).to_have_attribute("data-views", old, timeout=SLOW)
    x, y, width = middle(page)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 0.3 * width, y, steps=3)
    assert page.locator("#view .stage.live").count() == 1
    page.mouse.move(x, y, steps=3)
    page.mouse.up()
    assert settled(page) == edited


def test_a_finger_turns_it_and_still_scrolls_the_page(open_page):
    page = open_example(
        open_page, viewport={"width": 390, "height": 844}, device_scale_factor=2, is_mobile=True, has_touch=True
    )
    page.locator("#view .stage").scroll_into_view_if_needed()
    x, y, width = middle(page)
    yaw, pitch = angles(page)
    before = view(page)
    touch = page.context.new_cdp_session(page)

    def send(kind, *point):
        points = [{"x": point[0], "y": point[1]}] if point else []
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    send("touchStart", x, y)
    for number in range(1, 11):
        send("touchMove", x + number * width / 40, y)
    page.wait_for_timeout(100)
    assert angles(page)[0] > yaw + 10 and angles(page)[1] == pitch
    send("touchEnd")
    assert changed(page, before) != before
    assert page.evaluate("getComputedStyle(document.querySelector('#view .stage')).touchAction") == "pan-y"


def test_without_motion_there_is_no_tilting(open_page):
    options = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
    page = open_head(open_page, **options)
    assert page.locator("#view .tilt").is_visible()
    page.locator("#view .tilt").click()
    assert page.locator("#view .tilt").get_attribute("aria-pressed") == "true"
    yaw, _ = angles(page)
    for gamma in (0, 12):
        page.evaluate(f"dispatchEvent(new DeviceOrientationEvent('deviceorientation', {{beta: 40, gamma: {gamma}}}))")
    assert angles(page)[0] == yaw + 12
    calm = open_head(open_page, reduced_motion="reduce", **options)
    assert not calm.locator("#view .tilt").is_visible()


def test_the_next_head_replaces_all_views(open_page):
    page = open_head(open_page)
    first = np.asarray(Image.open(io.BytesIO(view(page))))
    page.locator("#yaw input[type=range]").fill("30")
    turned = changed(page, view(page))
    page.locator("#invert:not([disabled])").click(timeout=SLOW)
    page.wait_for_selector("#view", state="detached", timeout=SLOW)
    page.wait_for_selector("#view img", timeout=SLOW)
    expect(page.locator("#view .stage")).to_have_attribute("data-views", str(VIEWS), timeout=SLOW)
    again = settled(page)
    assert again != turned and np.array_equal(np.asarray(Image.open(io.BytesIO(again))), first)


def test_a_second_visitor_finds_an_examples_head_at_once(open_page):
    page = open_page()
    page.locator("#photo-panel .gallery-item").first.click()
    page.wait_for_selector("#view img", timeout=SLOW)
    expect(page.locator("#view .stage")).to_have_attribute("data-views", str(VIEWS), timeout=SLOW)
    page.wait_for_timeout(1000)
    other = open_page()
    clicked = time.monotonic()
    other.locator("#photo-panel .gallery-item").first.click()
    expect(other.locator("#view .stage")).to_have_attribute("data-views", str(VIEWS), timeout=SLOW)
    seconds = time.monotonic() - clicked
    x, y, width = middle(other)
    before = shown(other)
    other.mouse.move(x, y)
    other.mouse.down()
    other.mouse.move(x + 0.3 * width, y, steps=3)
    assert shown(other) != before
    other.mouse.up()
    expect(other.locator("#status")).to_contain_text("kept from an earlier visit")
    # On an idle machine it takes a fraction of a second; tests share theirs with others.
    assert seconds < 3 * max(1.0, os.getloadavg()[0] / os.cpu_count())
