"""Driving the page: the system's Chromium, new visitors, and what their pages show."""

from __future__ import annotations

import base64
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --use-angle=swiftshader --enable-unsafe-swiftshader"
).split()
# Gradio's 3D viewer says so on computers without WebGPU, and goes on with WebGL.
HARMLESS = re.compile("WebGPU")
SLOW = 120_000


@contextmanager
def running_browser():
    """Yields Chromium, and ends it."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visitors(app, browser):
    """Yields a function that opens the page as a new visitor; at the end there must have been no error in any
    console."""
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
    """Keeps a picture of the page in the folder that `METAAUX_SCREENSHOTS` names, for CI."""
    folder = os.environ.get("METAAUX_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def upload(page, path):
    """Adds a photo and waits until it has been looked at."""
    page.locator("#photo input[type=file]").set_input_files(path)
    page.wait_for_selector("#crop .crop-card", timeout=SLOW)


def view(page):
    """Bytes of the picture that is shown."""
    code = """async () => {
        const data = await (await fetch(document.querySelector('#view img').src)).arrayBuffer();
        return btoa(String.fromCharCode(...new Uint8Array(data)));
    }"""
    return base64.b64decode(page.evaluate(code))


def settled(page):
    """The view once it has stayed the same for two seconds."""
    before, stable = None, 0
    while stable < 4:
        now = view(page)
        stable = stable + 1 if now == before else 0
        before = now
        page.wait_for_timeout(500)
    return before


def changed(page, before):
    """The view once it differs from `before`, and has settled."""
    for _ in range(200):
        page.wait_for_timeout(100)
        now = view(page)
        if now != before:
            return settled(page)
    raise AssertionError("the view did not change")
