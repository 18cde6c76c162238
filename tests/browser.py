"""Driving the page: the system's Chromium, new visitors, and what their pages show.

Pages change some time after an action, later on a busy machine: tests wait for a state, by Playwright's `expect` or by
what is here, and look at nothing right after an action.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --use-angle=swiftshader --enable-unsafe-swiftshader"
).split()
# Gradio's 3D viewer says so on computers without WebGPU, and goes on with WebGL.
HARMLESS = re.compile("WebGPU")
SLOW = 120_000
expect.set_options(timeout=SLOW)


@contextmanager
def running_browser():
    """Yields Chromium, and ends it."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


class Visitors:
    """Opens the page as new visitors, whose pages share nothing.

    Args:
        app: which server.
        browser: which browser.
    """

    def __init__(self, app, browser):
        self.app = app
        self.browser = browser
        self.contexts = []
        self._errors = []

    def __call__(self, **options):
        """A new visitor's page, once the model is there; `options` are those of the browser's context."""
        context = self.browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
        self.contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(SLOW)
        page.on("pageerror", lambda error: self._errors.append(str(error)))
        page.on("console", lambda message: self._errors.append(message.text) if message.type == "error" else None)
        page.goto(self.app.url)
        page.wait_for_selector("#model-line .chip.ready")
        return page

    def check(self):
        """There must have been no error in any console since the last check."""
        errors = [error for error in self._errors if not HARMLESS.search(error)]
        self._errors.clear()
        assert errors == []


@contextmanager
def visitors(app, browser):
    """Yields `Visitors`; at the end there must have been no error in any console."""
    visitors = Visitors(app, browser)
    yield visitors
    for context in visitors.contexts:
        context.close()
    visitors.check()


def screenshot(page, name, pause=0):
    """Keeps a picture of the page in the folder that `METAAUX_SCREENSHOTS` names, for CI.

    Args:
        page: which page.
        name: of the picture.
        pause: milliseconds for what is moving on the page, where a picture is kept.
    """
    folder = os.environ.get("METAAUX_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.wait_for_timeout(pause)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def upload(page, path):
    """Adds a photo and waits until it has been looked at."""
    page.locator("#photo input[type=file]").set_input_files(path)
    page.wait_for_selector("#crop .crop-card")


def view(page):
    """Bytes of the exact view, once it is shown; see turn.js."""
    code = """async () => {
        const source = document.querySelector('#view .stage.exact img')?.src;
        if (source === undefined) return null;
        const data = await (await fetch(source)).arrayBuffer();
        return btoa(String.fromCharCode(...new Uint8Array(data)));
    }"""
    picture = None
    while picture is None:
        page.wait_for_selector("#view .stage.exact")
        picture = page.evaluate(code)
    return base64.b64decode(picture)


def changed(page, before):
    """The exact view once it differs from `before`."""
    deadline = time.monotonic() + SLOW / 1000
    while time.monotonic() < deadline:
        now = view(page)
        if now != before:
            return now
        page.wait_for_timeout(50)
    raise AssertionError("the view did not change")


def expect_angles(page, yaw, pitch):
    """Waits until the sliders say so, degrees."""
    for axis, degrees in (("yaw", yaw), ("pitch", pitch)):
        expect(page.locator(f"#{axis} input[type=number]")).to_have_value(f"{degrees:g}")
