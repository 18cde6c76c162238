"""Words of the page."""

from __future__ import annotations

from collections.abc import Sequence

from ..hub.layout import CONFIG, read_json
from ..hub.loading import EMBEDDED_MODEL, embedded_model_folder

PAPER = "https://arxiv.org/abs/2305.10884"

HEADER = f"""
<div class="masthead">
  <div>
    <h1>One photo, a whole head</h1>
    <p>Turn the face of a photo into a 3D head that you can turn, edit and keep.</p>
  </div>
  <a class="chip" href="{PAPER}" target="_blank" rel="noopener">Paper</a>
</div>
"""

LOADING = '<span class="chip loading">Loading the model</span>'


def heading(number: int, title: str) -> str:
    """HTML of a numbered section's title."""
    return f'<h2 class="step"><span>{number}</span>{title}</h2>'


EMPTY_FIT = """
<div class="empty">
  <ol>
    <li><b>Encoder</b><span>guesses a head like yours</span></li>
    <li><b>Auxiliary network</b><span>predicts the details it missed</span></li>
    <li><b>A few gradient steps</b><span>fit both to your photo</span></li>
  </ol>
  <p>Add a photo and press <b>Invert</b>. Every step is shown here.</p>
</div>
"""

EMPTY_VIEW = """
<div class="empty head">
  <svg viewBox="0 0 120 120" aria-hidden="true"><circle cx="60" cy="46" r="24"/>
  <path d="M20 112c4-26 20-36 40-36s36 10 40 36"/><path class="turn" d="M18 60c0 10 19 17 42 17s42-7 42-17"/>
  <path class="turn" d="m96 52 6 8 7-7"/></svg>
  <p>Your head appears here, ready to be turned.</p>
</div>
"""

STAGE = """
<div class="stage" role="slider" tabindex="0" aria-label="Head, to be turned with the arrow keys"
  aria-valuemin="-{yaw}" aria-valuemax="{yaw}" aria-valuenow="0">
  <img alt="The head from the chosen side" draggable="false" hidden>
  <canvas aria-hidden="true"></canvas>
  <div class="tools">
    <button type="button" class="tilt" aria-pressed="false" title="Turn the head by tilting" hidden>Tilt</button>
    <button type="button" class="full" title="Full screen" aria-label="Full screen" hidden>
      <svg viewBox="0 0 16 16" aria-hidden="true"><path d="M2 6V2h4M10 2h4v4M14 10v4h-4M6 14H2v-4"/></svg>
    </button>
  </div>
</div>
"""

DRAG_HINT = '<p class="hint">Drag the picture<span class="keys">, or use the arrow keys,</span> to turn the head</p>'

HEAD_FILE_HINT = '<p class="hint">The head file opens here again, and in Python.</p>'

NO_DIRECTIONS = '<p class="hint">This model has no editing directions.</p>'

FURTHER_DIRECTIONS = '<p class="hint">Along these, the heads that the model knows differ the most.</p>'

HOW_IT_WORKS = f"""
The generator is a network that paints faces from a latent code and, since it renders them as a volume (EG3D), can show
each from any side. *Inversion* looks for the head that your photo could be a picture of.

1. **Alignment.** The face is found, cropped, and the camera is worked out from its landmarks.
2. **Encoder.** A network guesses the latent code. What it gives is a similar face, but not this one.
3. **Auxiliary network.** It predicts small changes to the generator's weights, for texture, and small shifts of the
   points at which the generator samples space, for shape.
4. **Gradient steps.** The auxiliary network was *meta-learnt*: trained so that a handful of steps on a new photo,
   five by default, fit it closely. Tuning a generator from scratch takes hundreds.

The generator itself is never changed. All that belongs to your photo is the head file.
Method: [Meta-Auxiliary Network for 3D GAN Inversion]({PAPER}), Jiang, Guo and Yang, 2023.
"""

_NOTICE = """
**For research and demonstration.** {models}{limits}Use photos of yourself, or of people who agreed. Uploads and
results are deleted from the server after about {age}.
"""

_LIMITS_OF_EMBEDDED = """ is small
({size} × {size} pixels) and learnt from few portraits of adults, most of them taken from the front: details, glasses,
hands, hats and far turns come out poorly, and some faces better than others. """


def notice(models: Sequence[str], session_minutes: int) -> str:
    """Markdown below the page: what the models offered here cannot do, and how long things are kept.

    Args:
        models: `Settings.models`.
        session_minutes: `Settings.session_minutes`; files live twice as long.
    """
    if EMBEDDED_MODEL in models:
        size = read_json(embedded_model_folder() / "generator" / CONFIG)["image_size"]
        first = f"`{EMBEDDED_MODEL}`, the model that comes with this demo,"
        limits = _LIMITS_OF_EMBEDDED.format(size=size)
    else:
        names = ", ".join(f"`{model_name(model)}`" for model in models)
        first, limits = f"The model here is {names}; its card says what it cannot do. ", ""
    return _NOTICE.format(models=first, limits=limits, age=_duration(2 * session_minutes))


def model_name(model: str) -> str:
    """What the page calls a model: the last part of its id or folder."""
    return model.rstrip("/").rsplit("/", 1)[-1]


def _duration(minutes: int) -> str:
    if minutes < 55:
        return f"{minutes} minutes"
    hours = round(minutes / 60)
    return "an hour" if hours == 1 else f"{hours} hours"
