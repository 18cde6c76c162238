"""Editing along latent directions (the paper's §2.3 and 4.3): ω_edit = ω + Σ value·scale·n."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .models.directions import Direction

#: Largest amount of one direction, either sign. Usable ranges end long before.
MAX_VALUE = 20.0


def check_edits(directions: Mapping[str, Direction], edits: Mapping[str, float] | None) -> dict[str, float]:
    """The edits as plain numbers, in the order of `directions`.

    Raises:
        ValueError: a name that `directions` lacks (the message lists those there are), or a value that is not a
            number between -`MAX_VALUE` and `MAX_VALUE`.
    """
    checked = {}
    for name, value in (edits or {}).items():
        if name not in directions:
            known = ", ".join(directions) or "none"
            raise ValueError(f"unknown edit {name!r:.60}; this model's directions: {known}")
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"the edit {name} needs a number, got {value!r:.60}") from None
        if not -MAX_VALUE <= number <= MAX_VALUE:
            raise ValueError(f"the edit {name} must lie between -{MAX_VALUE:g} and {MAX_VALUE:g}, got {number}")
        checked[name] = number
    # Sums of floats depend on their order; what is asked for must not.
    return {name: checked[name] for name in directions if name in checked}


def apply_edits(
    w: torch.Tensor, directions: Mapping[str, Direction], edits: Mapping[str, float] | None, adapted: bool = False
) -> torch.Tensor:
    """Moves a latent code along several directions at once.

    Args:
        w: [..., w_dim], in W or W+; every entry of W+ is moved alike.
        directions: those of the checkpoint, by name.
        edits: amounts by name; a direction's step of 1 is its `scale` long, `gain` times that with `adapted`.
        adapted: whether the code is that of a head with weights adapted to a photo.

    Raises:
        ValueError: as `check_edits`, or a direction of another length than w.
    """
    for name, value in check_edits(directions, edits).items():
        direction = directions[name]
        if direction.normal.shape[-1] != w.shape[-1]:
            raise ValueError(f"direction {name} has {direction.normal.shape[-1]} values, w has {w.shape[-1]}")
        step = direction.scale * (direction.gain if adapted else 1)
        w = w + value * step * direction.normal.to(w)
    return w
