"""What happens on the page: each method serves one event, and returns the values of that event's outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from ..export.turntable import Turntable
from .engine import Engine, Step
from .examples import ExampleStore, Kept, Key
from .pictures import crop_card, loss_charts, note_card, progress_bar
from .run_view import RunView
from .session import AlignedPhotos, Session, SessionExpiredError, Sheet, Shown, Visitor, show
from .settings import Settings
from .texts import model_name
from .uploads import new_file, save_picture
from .validation import (
    MAX_PITCH,
    MAX_YAW,
    check_edits,
    check_flip,
    check_integer,
    check_inversion_file,
    explained,
    read_photos,
)

if TYPE_CHECKING:
    import torch

    from ..models.directions import Direction

_EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
#: Pictures to try, in the order in which the page shows them: photos, then renders of people who do not exist.
EXAMPLES = [*sorted(_EXAMPLES.glob("*.jpg")), *sorted((_EXAMPLES / "generated").glob("*.png"))]
#: Parts of the page that a 2D model has no use for: turning, video and mesh.
VIEWPOINT_PARTS = 3
#: Sliders laid out for editing: for directions with a meaning, and for further ones such as principal components.
#: Those that a model has no direction for stay hidden.
NAMED_SLIDERS, FURTHER_SLIDERS = 8, 8
EDIT_SLIDERS = NAMED_SLIDERS + FURTHER_SLIDERS

_CANCELLING = progress_bar("Cancelling", 0.0)


class Handlers:
    """The page's events.

    Args:
        engine: computes.
        settings: limits.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings
        self.examples = ExampleStore()

    def opened(self, model: str, steps: Any) -> tuple:
        """The page was opened, or another model chosen: waits for the model, shows its directions.

        Args:
            model: as `Engine.inverter`.
            steps: what the slider says.

        Returns:
            the line about the model, the steps slider, the note on directions, the further directions' part, what only
            heads with other views have (see `VIEWPOINT_PARTS`), then each edit slider.
        """
        with explained():
            inverter = self.engine.inverter(model)
        line = f'<span class="chip ready">{model_name(model)} · {self.engine.describe_device()}</span>'
        slots = _slots(inverter.directions)
        sliders = [
            gr.update(visible=False, value=0)
            if direction is None
            else gr.update(
                label=direction.name.replace("_", " ").capitalize(),
                minimum=direction.low,
                maximum=direction.high,
                value=0,
                visible=True,
            )
            for direction in slots
        ]
        usual = min(inverter.config.inner_steps, self.settings.max_steps)
        return (
            line,
            # Left alone where it is right already: the visitor may have moved it while the model was being loaded.
            gr.skip() if steps == usual else usual,
            gr.update(visible=not any(slots)),
            gr.update(visible=any(slots[NAMED_SLIDERS:])),
            *[gr.update(visible=inverter.has_viewpoints)] * VIEWPOINT_PARTS,
            *sliders,
        )

    def align(self, photo: str | None, more: list[str] | None, model: str) -> tuple:
        """A photo was chosen or taken away.

        Returns:
            the aligned photos, the card about them, the *Invert* button.
        """
        if not photo and not more:
            return None, gr.update(visible=False), gr.update(interactive=False)
        try:
            with explained():
                photos = read_photos([photo, *(more or [])], self.settings)
                faces = self.engine.align(model, photos)
        except gr.Error as error:
            return None, gr.update(value=note_card(error.message), visible=True), gr.update(interactive=False)
        card = gr.update(value=crop_card(faces, photos), visible=True)
        return AlignedPhotos(model, tuple(faces)), card, gr.update(interactive=True)

    def invert(
        self, visitor: Visitor | None, aligned: AlignedPhotos | None, steps: Any, flip: Any, model: str
    ) -> Iterator[tuple]:
        """*Invert* was pressed: a result a step, the last one with the head."""
        with explained():
            steps = check_integer("steps", steps, 0, self.settings.max_steps)
            flip = check_flip(flip)
            if aligned is None or aligned.model != model:
                raise ValueError("there is no aligned photo yet; add a photo and wait until its face is shown")
        yield from self._run(visitor, aligned, steps, flip)

    def kept_example(self, visitor: Visitor | None, chosen: tuple[int, list], model: str) -> tuple:
        """An example was clicked: shows what was made of it before, which waits for nobody's inversion.

        Args:
            visitor: whose page it is.
            chosen: number of the example, and the values it stands for.
            model: as `Engine.inverter`.
        """
        key = (model, str(EXAMPLES[chosen[0]]))
        self.forget(visitor)
        visitor = visitor or Visitor()
        kept = self.examples.get(key)
        if kept is None:
            visitor.waiting_for = key
            return RunView(True, progress_bar("Starting", 0.02), visitor).values
        session = Session(model, kept.head, kept.yaw, kept.pitch, key)
        visitor.replace(session)
        pose = _offered_pose(kept.yaw, kept.pitch)
        message = visitor.show(Shown(session, {}, kept.picture, *pose, kept.sheets, bool(kept.sheets)))
        status = progress_bar(f"Done: {len(kept.steps) - 2} steps, kept from an earlier visit", 1.0, busy=False)
        charts, strip = loss_charts(kept.losses, len(kept.losses)), list(kept.steps)
        compare = (kept.photo, kept.steps[-1][0])
        view = RunView(False, status, visitor, compare, strip, charts, message, pose, kept.head, kept.picture)
        return view.values

    def example(self, visitor: Visitor | None, chosen: tuple[int, list], model: str) -> Iterator[tuple]:
        """Inverts an example that nothing was kept of, unless its visitor has turned to something else meanwhile."""
        key = (model, str(EXAMPLES[chosen[0]]))
        if visitor is None or visitor.waiting_for != key:
            yield (gr.skip(),) * len(RunView(True, "", visitor).values)
            return
        with explained():
            steps = min(self.engine.inverter(model).config.inner_steps, self.settings.max_steps)
            faces = self.engine.align(model, read_photos([key[1]], self.settings))
        yield from self._run(visitor, AlignedPhotos(model, tuple(faces)), steps, None, key)

    def _run(
        self, visitor: Visitor | None, aligned: AlignedPhotos, steps: int, flip: bool | None, key: Key | None = None
    ) -> Iterator[tuple]:
        """An inversion step by step, until its visitor asks for another head; kept if it is the example `key`."""
        model = aligned.model
        self.forget(visitor)
        visitor = visitor or Visitor()
        head = visitor.heads
        yield RunView(True, progress_bar("Starting", 0.02), visitor).values

        crops = [face.image for face in aligned.faces]
        crop = save_picture(crops[0], "photo.png")
        cameras = [face.camera for face in aligned.faces]
        images: list[tuple[str, str]] = []
        losses: list[dict[str, float]] = []
        with explained():
            grid = self.engine.makes_turntables_at_once and self.engine.inverter(model).has_viewpoints
        run = self.engine.invert(model, crops, cameras, steps, flip, new_file("head.safetensors"), grid)
        with explained(), closing(run) as results:
            for result in results:
                if visitor.heads != head:
                    return
                picture = save_picture(result.image, "step.png")
                images.append((picture, _step_name(result.step)))
                losses.append(result.losses)
                compare = (crop, picture)
                charts = loss_charts(losses, steps + 2)
                if result.path is None:
                    text = f"{_step_name(result.step).capitalize()} done, fitting to your photo"
                    status = progress_bar(text, len(images) / (steps + 2))
                    yield RunView(True, status, visitor, compare, images, charts).values
                else:
                    seconds = sum(entry["seconds"] for entry in losses)
                    status = progress_bar(f"Done: {steps} steps in {seconds:.1f} s", 1.0, busy=False)
                    session = self._session(model, result.path, cameras[0], key)
                    finished = self._finished(status, visitor, session, compare, images, charts, result)
                    self._keep_example(visitor.shown, crop, images, losses)
                    yield finished

    def cancelling(self) -> tuple:
        """*Cancel* was pressed; the run ends at its next step. Until then the page would not start another one.

        Returns:
            the *Cancel* button, the status.
        """
        return gr.update(interactive=False), _CANCELLING

    def failed(self, status: str | None) -> str:
        """A run has ended before its time.

        Args:
            status: what the page shows.

        Returns:
            the status: nothing beside the message that an error shows itself.
        """
        return progress_bar("Cancelled", 0.0, busy=False) if status == _CANCELLING else ""

    def ended(self) -> tuple:
        """A run has ended, one way or another.

        Returns:
            the *Invert* button, the *Cancel* button.
        """
        return gr.update(visible=True), gr.update(visible=False, interactive=True)

    def open_head(self, visitor: Visitor | None, path: str | None, model: str) -> tuple:
        """A head file was dropped in."""
        with explained():
            inverter = self.engine.inverter(model)
            inversion = inverter.load_inversion(check_inversion_file(path, self.engine.max_head_bytes(model)))
            # Written anew, so that what is kept and offered for download is what was checked, under our own name.
            kept = new_file("head.safetensors")
            inversion.save(kept)
            if self.engine.zero_gpu:
                image, table = self.engine.edit(model, kept, None, None, {})
            else:
                image, table = self.engine.view(model, kept, None, None, {}), None
        crop = image
        if inversion.aligned is not None:
            crop = Image.fromarray(inversion.aligned.permute(1, 2, 0).numpy())
        charts = loss_charts(inversion.steps, len(inversion.steps)) if inversion.steps else None
        status = progress_bar("Opened from your file", 1.0, busy=False)
        compare = (save_picture(crop, "photo.png"), save_picture(image, "step.png"))
        session = self._session(model, kept, inversion.camera)
        opened = Step(0, image, {}, kept, table)
        return self._finished(status, visitor or Visitor(), session, compare, None, charts, opened)

    def turn(self, visitor: Visitor | None, yaw: float, pitch: float, *amounts: float) -> tuple:
        """The head has come to rest after a turn, or an edit was made.

        Returns:
            the view, the picture's download, the visitor; without any change where the visitor has moved on by then.
        """
        with explained():
            if visitor is None:
                raise SessionExpiredError
            with visitor.newest() as request:
                # Of several moves the last one counts; without a head another one is being made.
                if not request.is_current or request.session is None:
                    return gr.skip(), gr.skip(), visitor
                edits = self._edits(request.session.model, amounts)
                shown = self._look(request.session, edits, yaw, pitch, visitor.shown)
                message = visitor.show(shown, request)
        if message is None:
            return gr.skip(), gr.skip(), visitor
        return message, shown.picture, visitor

    def sheets(self, visitor: Visitor | None) -> Iterator[Any]:
        """A new view is there: what the page needs to turn the head by itself, unless it has it or will get it."""
        yield gr.skip()
        shown = None if visitor is None else visitor.shown
        if shown is None or shown.complete or shown.is_alike(visitor.making_sheets):
            return
        session = shown.session
        if not self.engine.inverter(session.model).has_viewpoints:
            return
        visitor.making_sheets = shown
        try:
            with explained():
                parts = self.engine.sheets(
                    session.model, session.path, shown.edits, lambda: shown.is_alike(visitor.shown)
                )
                for table, last in parts:
                    message = visitor.add_sheet(shown, _save_sheet(table), last)
                    if message is None:
                        return
                    yield message
                self._keep_sheets(visitor.shown)
        finally:
            if visitor.making_sheets is shown:
                visitor.making_sheets = None

    def _keep_sheets(self, shown: Shown | None) -> None:
        if shown is not None and shown.complete and shown.session.example is not None and not shown.edits:
            self.examples.put_sheets(shown.session.example, shown.sheets)

    def reset(self, visitor: Visitor | None) -> list:
        """*Reset* was pressed.

        Returns:
            yaw, pitch, then 0 for each edit slider.
        """
        session = None if visitor is None else visitor.session
        yaw, pitch = (0.0, 0.0) if session is None else _offered_pose(session.yaw, session.pitch)
        return [yaw, pitch, *[0] * EDIT_SLIDERS]

    def forget(self, visitor: Visitor | None) -> None:
        """A visitor's head is not shown any more."""
        if visitor is not None:
            session = visitor.replace(None)
            if session is not None:
                self.engine.forget(session.path)

    def orbit(
        self,
        visitor: Visitor | None,
        *amounts: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple:
        """*Make video* was pressed.

        Returns:
            the video, its download.
        """

        def compute(model: str, head: str, edits: dict[str, float], path: str) -> Iterator[float]:
            return self.engine.orbit(model, head, 60, (25.0, 10.0), edits, path)

        return self._export(visitor, amounts, "orbit.mp4", compute, progress, "Rendering views")

    def mesh(
        self,
        visitor: Visitor | None,
        *amounts: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple:
        """*Make mesh* was pressed.

        Returns:
            the mesh, its download.
        """

        def compute(model: str, head: str, edits: dict[str, float], path: str) -> Iterator[float]:
            return self.engine.mesh(model, head, 160, edits, path)

        return self._export(visitor, amounts, "head.glb", compute, progress, "Extracting the surface")

    def _export(
        self,
        visitor: Visitor | None,
        amounts: tuple[float, ...],
        name: str,
        compute: Callable[[str, str, dict[str, float], str], Iterator[float]],
        progress: gr.Progress,
        activity: str,
    ) -> tuple:
        """Has a file made from the visitor's head; returns it for its player and for its download."""
        session = None if visitor is None else visitor.session
        with explained():
            if session is None:
                raise SessionExpiredError
            path = new_file(name)
            progress(0, desc=activity)
            edits = self._edits(session.model, amounts)
            with closing(compute(session.model, session.path, edits, path)) as shares:
                for share in shares:
                    progress(share, desc=activity)
        return gr.update(value=path, visible=True), gr.update(value=path, visible=True)

    def _keep_example(
        self, shown: Shown | None, crop: str, images: list[tuple[str, str]], losses: list[dict[str, float]]
    ) -> None:
        if shown is not None and shown.session.example is not None:
            session = shown.session
            files = session.path, crop, shown.picture
            kept = Kept(*files, tuple(images), tuple(losses), session.yaw, session.pitch, shown.sheets)
            self.examples.put(session.example, kept)

    def _session(self, model: str, path: str, camera: torch.Tensor, example: Key | None = None) -> Session:
        from ..faces import pose_of_camera

        # Of the camera as the file holds it, so that the same file always opens with the same view.
        yaw, pitch = (float(angle) for angle in pose_of_camera(camera))
        return Session(model, path, yaw, pitch, example)

    def _finished(
        self,
        status: str,
        visitor: Visitor,
        session: Session,
        compare: tuple,
        images: Any,
        charts: str | None,
        last: Step,
    ) -> tuple:
        """Gives the visitor a head, and the page what it shows of it."""
        yaw, pitch = _offered_pose(session.yaw, session.pitch)
        sheets = () if last.turntable is None else (_save_sheet(last.turntable),)
        with explained():
            # Another view than the one at hand, which differs by a quarter of a degree, would cost a request there.
            image = last.image if self.engine.zero_gpu else self._view(session, yaw, pitch, {})
        picture = save_picture(image)
        before = visitor.replace(session)
        if before is not None:
            self.engine.forget(before.path)
        message = visitor.show(Shown(session, {}, picture, yaw, pitch, sheets, bool(sheets)))
        view = RunView(False, status, visitor, compare, images, charts, message, (yaw, pitch), session.path, picture)
        return view.values

    def _look(
        self, session: Session, edits: dict[str, float], yaw: float, pitch: float, before: Shown | None
    ) -> Shown:
        """The head from another side or with other edits.

        On ZeroGPU views cost quota: there a turned head is shown as its sheet has it, which is near, and an edit
        brings a new sheet along.
        """
        if not self.engine.zero_gpu:
            return Shown(session, edits, save_picture(self._view(session, yaw, pitch, edits)), yaw, pitch)
        if before is not None and before.session is session and before.edits == edits and before.sheets:
            image = Turntable.load(before.sheets[0].picture).view(yaw, pitch)
            return Shown(session, edits, save_picture(image), yaw, pitch)
        turns = self.engine.inverter(session.model).has_viewpoints
        angles = (yaw, pitch) if turns else (None, None)
        try:
            image, table = self.engine.edit(session.model, session.path, *angles, edits)
        except FileNotFoundError:
            raise SessionExpiredError from None
        sheets = () if table is None else (_save_sheet(table),)
        return Shown(session, edits, save_picture(image), yaw, pitch, sheets, True)

    def _view(self, session: Session, yaw: float, pitch: float, edits: dict[str, float]) -> Image.Image:
        if not self.engine.inverter(session.model).has_viewpoints:
            return show(self.engine, session, None, None, edits)
        return show(self.engine, session, yaw, pitch, edits)

    def _edits(self, model: str, amounts: tuple[float, ...]) -> dict[str, float]:
        directions = self.engine.inverter(model).directions
        slots = zip(_slots(directions), amounts)
        edits = {direction.name: amount for direction, amount in slots if direction is not None}
        return check_edits(edits, directions)


def _save_sheet(table: Turntable) -> Sheet:
    path = new_file("turntable.webp")
    table.save(path, quality=90)
    return Sheet(path, table.yaws, table.pitches, table.size)


def _slots(directions: Mapping[str, Direction]) -> list[Direction | None]:
    """The direction of each edit slider: those with a meaning first, the others behind them."""
    named = [direction for direction in directions.values() if direction.kind != "principal"]
    shown = named[:NAMED_SLIDERS]
    further = [direction for direction in directions.values() if direction not in shown][:FURTHER_SLIDERS]
    padding = [None] * EDIT_SLIDERS
    return (shown + padding)[:NAMED_SLIDERS] + (further + padding)[:FURTHER_SLIDERS]


def _step_name(step: int) -> str:
    return "encoder" if step < 0 else f"step {step}"


def _offered_pose(yaw: float, pitch: float) -> tuple[float, float]:
    """The view nearest to a photo's that the sliders can show, in their steps."""
    return round(2 * min(max(yaw, -MAX_YAW), MAX_YAW)) / 2, round(2 * min(max(pitch, -MAX_PITCH), MAX_PITCH)) / 2
