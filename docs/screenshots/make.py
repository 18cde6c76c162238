"""Takes README's pictures of the page anew: `python docs/screenshots/make.py`, after a change of page or checkpoint.

Drives the system's Chromium as the browser tests do, with the embedded model and the photos of `examples`; some
minutes on two CPU cores. Needs requirements-dev.txt.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial import cKDTree

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from app_server import running_app  # noqa: E402
from browser import SLOW, changed, running_browser, settled, upload, view, visitors  # noqa: E402
from playwright.sync_api import Page, expect  # noqa: E402

EILEEN, GRACE = (ROOT / "examples" / name for name in ("eileen_collins.jpg", "grace_hopper.jpg"))
#: Views that a CPU makes of a head: a coarse row, then the whole grid.
VIEWS = 10 + 31 * 7
SIZE = {"width": 1440, "height": 900}
#: Of the stage's width that the hand moves to either side, and pictures of one swing.
SWING, FRAMES = 0.36, 40
#: Shows where the hand is: headless browsers draw no pointer.
POINTER = """() => {
    const hand = document.createElement("div");
    hand.style.cssText = "position:fixed;z-index:9999;width:26px;height:26px;margin:-13px;border-radius:50%;"
        + "background:#fff9;border:2px solid #0008;pointer-events:none";
    document.body.append(hand);
    addEventListener("pointermove", (event) => {
        hand.style.left = event.clientX + "px";
        hand.style.top = event.clientY + "px";
    }, true);
}"""


def invert(page: Page, photo: Path) -> None:
    """Leaves the page with a head all of whose views are there."""
    upload(page, photo)
    page.locator("#invert:not([disabled])").click(timeout=SLOW)
    expect(page.locator("#view .stage")).to_have_attribute("data-views", str(VIEWS), timeout=5 * SLOW)
    settled(page)


def picture(page: Page, **options) -> Image.Image:
    return Image.open(io.BytesIO(page.screenshot(**options))).convert("RGB")


def save(image: Image.Image, name: str) -> None:
    """Saves with 256 colours: 64 of the page's flat areas as they are, the others for the photos.

    Pillow's own `quantize` leaves no colour as it is.
    """
    colours, places = np.unique(np.asarray(image).reshape(-1, 3), axis=0, return_inverse=True)
    places = places.reshape(image.height, image.width)
    # Areas of one colour, of which a photo has none.
    areas = places[:-1, :-1][(places[:-1, :-1] == places[:-1, 1:]) & (places[:-1, :-1] == places[1:, :-1])]
    flat = np.argsort(np.bincount(areas, minlength=len(colours)))[::-1][:64]
    photos = Image.fromarray(np.delete(colours, flat, axis=0)[None])
    # Most for what there is most of; some for the rare, such as a small green dot.
    chosen = [photos.quantize(152, kmeans=3), photos.quantize(40, method=Image.Quantize.MAXCOVERAGE)]
    palette = np.concatenate([colours[flat], *(np.reshape(image.getpalette(), (-1, 3)) for image in chosen)])
    nearest = cKDTree(palette).query(colours)[1].astype(np.uint8)
    reduced = Image.fromarray(nearest[places])
    reduced.putpalette(palette.astype(np.uint8).tobytes())
    reduced.save(FOLDER / name, optimize=True)


def turning(page: Page) -> None:
    """turning.webp: a hand drags the head from one side to the other and back."""
    page.evaluate(POINTER)
    box = page.locator("#view .stage").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + 0.62 * box["height"]
    before = view(page)
    page.mouse.move(x - SWING * box["width"], y)
    page.mouse.down()
    frames = []
    for number in range(FRAMES):
        way = 1 - abs(2 * number / FRAMES - 1)
        page.mouse.move(x + (2 * way - 1) * SWING * box["width"], y)
        page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        frames.append(
            picture(page).resize((SIZE["width"] * 2 // 3, SIZE["height"] * 2 // 3), Image.Resampling.LANCZOS)
        )
    page.mouse.up()
    changed(page, before)
    page.evaluate("() => document.body.lastElementChild.remove()")
    swing = io.BytesIO()
    frames[0].save(swing, "WEBP", save_all=True, append_images=frames[1:], duration=70, loop=0, quality=62, method=6)
    (FOLDER / "turning.webp").write_bytes(swing.getvalue())


def main() -> None:
    expect.set_options(timeout=SLOW)
    with (
        tempfile.TemporaryDirectory() as folder,
        running_app(Path(folder) / "app", METAAUX_DEVICE="cpu", OMP_NUM_THREADS=str(os.cpu_count())) as app,
    ):
        with running_browser() as browser, visitors(app, browser) as open_page:
            page = open_page(viewport=SIZE)
            invert(page, EILEEN)
            turning(page)

            page.locator("#yaw input[type=range]").fill("20")
            before = settled(page)
            page.locator("#edits input[type=range]").nth(2).fill("1")
            changed(page, before)
            page.mouse.move(0, 0)
            save(picture(page, full_page=True), "desktop-light.png")

            page = open_page(viewport=SIZE, color_scheme="dark")
            upload(page, GRACE)
            page.locator("#invert:not([disabled])").click(timeout=SLOW)
            page.locator("#strip .thumbnail-item").nth(3).wait_for(timeout=SLOW)
            save(picture(page), "desktop-dark.png")

            page = open_page(
                viewport={"width": 390, "height": 844}, device_scale_factor=2, is_mobile=True, has_touch=True
            )
            invert(page, EILEEN)
            page.locator("#yaw input[type=range]").fill("-20")
            settled(page)
            page.locator("#turn-panel").evaluate("panel => panel.scrollIntoView()")
            save(picture(page), "phone.png")


if __name__ == "__main__":
    main()
