"""Makes the pictures of the embedded model in these pages anew: `python docs/pictures.py`, when its weights change.

Photos are those of `examples`, and faces that the generator makes. Some ten minutes on two CPU cores. The pictures of
the page are `docs/screenshots/make.py`'s.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

from metaaux import Inversion, MetaAuxInverter  # noqa: E402
from metaaux.evaluation.flip import TurnedFace, compare_flip, flip_picture  # noqa: E402
from metaaux.evaluation.mesh import evaluate_mesh  # noqa: E402
from metaaux.evaluation.report import comparison_picture  # noqa: E402
from metaaux.export.images import label_strip, tensor_to_image  # noqa: E402
from metaaux.export.sheets import head_sheet  # noqa: E402

PORTRAITS = ("eileen_collins", "grace_hopper")
#: Seeds of faces that do not exist, which are seen from the side.
TURNED_SEEDS = (12, 38, 59)
#: Degrees by which those are turned, and by which heads are shown to turn.
TURNED_YAW, YAWS = 27, (-40, -20, 0, 20, 40)
TRUNCATION = 0.75
EDITS = ("age", "gender", "smile", "eyes_open")
ALPHAS = (-3, -2, -1, 0, 1, 2, 3)


def codes(inverter: MetaAuxInverter, seeds: tuple[int, ...]) -> torch.Tensor:
    """Latent codes [N, num_ws, w_dim] of faces that do not exist."""
    size = inverter.generator.config.z_dim
    z = torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    frontal = inverter.generator.camera_at(0.0, 0.0).expand(len(seeds), -1)
    with torch.no_grad():
        return inverter.generator.mapping(z, frontal, truncation_psi=TRUNCATION)


def turned_face(inverter: MetaAuxInverter, seed: int, yaw: float) -> TurnedFace:
    """A face that does not exist, seen from the side."""
    camera = inverter.generator.camera_at(yaw, 0.0)
    with torch.no_grad():
        image = inverter.generator.synthesize(codes(inverter, (seed,)), camera[None]).image
    return TurnedFace(str(seed), tensor_to_image(image[0].clamp(-1, 1)), camera)


def inverted(inverter: MetaAuxInverter, photo: Path) -> tuple[Inversion, list[Image.Image]]:
    """A photo's inversion, and the aligned photo before the picture of each step: encoder, prediction, 1, 2 …"""
    images: list[Image.Image] = []
    inversion = inverter.invert(photo, on_step=lambda step, image, losses: images.append(image))
    return inversion, [Image.fromarray(inversion.aligned.permute(1, 2, 0).numpy()), *images]


def steps(images: list[Image.Image]) -> Image.Image:
    """What the command line's `invert` draws, smaller."""
    small = [image.resize((160, 160), Image.Resampling.LANCZOS) for image in images]
    return label_strip(small, ["input", "encoder", *(f"step {step}" for step in range(len(images) - 2))])


def comparison(inverter: MetaAuxInverter, heads: list[tuple[Inversion, list[Image.Image]]]) -> Image.Image:
    """Photos, encoder, prediction, five steps, and the heads from the sides."""
    rows = []
    for inversion, images in heads:
        head = inverter.prepare(inversion)
        rows.append([*images[:3], images[-1], *(inverter.render(head, yaw) for yaw in (-30, 30))])
    return comparison_picture(rows, ["Input", "Encoder", "Prediction", "5 steps", "turned by -30°", "by 30°"])


def edited(inverter: MetaAuxInverter, inversion: Inversion) -> Image.Image:
    """Each edit in a row."""
    rows = [[inverter.render(inversion, edits={name: alpha}) for alpha in ALPHAS] for name in EDITS]
    return comparison_picture(rows, [str(alpha) for alpha in ALPHAS])


def several_photos(inverter: MetaAuxInverter) -> Image.Image:
    """Faces known from one side, and from two."""
    rows = []
    for seed in TURNED_SEEDS[:2]:
        photos = [turned_face(inverter, seed, yaw) for yaw in (TURNED_YAW, -TURNED_YAW)]
        empty = Image.new("RGB", photos[0].photo.size, "white")
        for count in (1, 2):
            camera = torch.stack([face.camera for face in photos[:count]])
            inversion = inverter.invert([face.photo for face in photos[:count]], camera=camera, flip=False)
            head = inverter.prepare(inversion)
            views = [inverter.render(head, yaw, 0) for yaw in (TURNED_YAW, 0, -TURNED_YAW)]
            rows.append([photos[0].photo, photos[1].photo if count == 2 else empty, *views])
    return comparison_picture(rows, ["photo 1", "photo 2", "view 1", "front", "view 2"])


def reduced(picture: Image.Image, width: int) -> Image.Image:
    """No wider than `width`."""
    height = round(picture.height * width / picture.width)
    return picture if picture.width <= width else picture.resize((width, height), Image.Resampling.LANCZOS)


def main() -> None:
    inverter = MetaAuxInverter.from_pretrained()
    inverter.set_progress_bar_config(disable=True)

    def save(picture: Image.Image, path: Path, width: int) -> None:
        reduced(picture.convert("RGB"), width).save(path, quality=88, optimize=True)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e3:.0f} kB")

    portraits = [inverted(inverter, ROOT / "examples" / f"{name}.jpg") for name in PORTRAITS]
    generated = [inverted(inverter, path) for path in sorted((ROOT / "examples" / "generated").glob("*.png"))]
    for name, (_, images) in zip(PORTRAITS, portraits, strict=True):
        save(steps(images), DOCS / f"steps_{name}.jpg", 1280)
    eileen = portraits[0][0]
    head = inverter.prepare(eileen)
    yaws = range(-30, 31, 10)
    turned = label_strip([inverter.render(head, yaw) for yaw in yaws], [f"{yaw}°" for yaw in yaws])
    save(turned, ROOT / "hub_configs" / "metaaux-mini" / "turned.jpg", 1280)
    frames = [frame.resize((192, 192), Image.Resampling.LANCZOS) for frame in inverter.orbit(eileen, frames=48)]
    frames[0].save(DOCS / "orbit.webp", save_all=True, append_images=frames[1:], duration=60, loop=0, quality=70)
    save(edited(inverter, eileen), DOCS / "edits.jpg", 1280)
    save(comparison(inverter, portraits + generated), DOCS / "comparison.jpg", 1280)
    with tempfile.TemporaryDirectory() as folder:
        evaluate_mesh(inverter, eileen, Path(folder), 192, 1024, lambda share: None)
        shutil.copy(Path(folder) / "mesh.jpg", DOCS / "mesh.jpg")
    save(several_photos(inverter), DOCS / "several_photos.jpg", 1280)
    faces = [turned_face(inverter, seed, TURNED_YAW) for seed in TURNED_SEEDS]
    save(flip_picture(compare_flip(inverter, faces)), DOCS / "flip.jpg", 900)
    save(head_sheet(inverter.generator, codes(inverter, tuple(range(16))), YAWS), DOCS / "heads.jpg", 1536)


if __name__ == "__main__":
    main()
