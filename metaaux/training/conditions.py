"""What directions leave alone: other attributes, and the colours of skin and background.

Along a boundary's normal old people are not only older but before another background, since among photos they are. A
regression of these colours on w finds no cure: which change of w makes a background darker differs from head to head.
Their gradients at many heads do: M, the mean of g gᵀ, gives the mean square vᵀMv by which a step v moves them, and few
of its eigenvalues are large.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..tasks import Generator
from .attributes import Attributes
from .head_samples import frontal_views

# Heads whose graphs are held in memory together.
_BATCH = 8


def colour_sensitivity(
    generator: Generator, attributes: Attributes, ws: torch.Tensor, resolution: int | None = None
) -> np.ndarray:
    """How far the mean colours of skin and background move with w.

    Args:
        generator: makes the heads.
        attributes: finds their skin.
        ws: codes of heads [M, w_dim].
        resolution: rays a side; `None`: the generator's.

    Returns:
        M [w_dim, w_dim] float64, symmetric: vᵀMv is the mean square over heads, regions and channels, to first order,
        of how far a step v moves these colours, which lie in [0, 1].
    """
    total, count = torch.zeros(ws.shape[1], ws.shape[1], dtype=torch.float64), 0
    for part in ws.split(_BATCH):
        part = part.detach().requires_grad_()
        with torch.enable_grad():
            images = frontal_views(generator, part, resolution)
            masks = attributes.masks(images.detach()).to(images)
            areas = masks.sum((2, 3)).clamp_min(1)
            colours = torch.einsum("bchw,brhw->brc", images / 2 + 0.5, masks) / areas[..., None]
            # A head's colours follow from its own code alone, so that one pass serves all heads.
            outputs = colours.flatten(1).sum(0)
            gradients = [torch.autograd.grad(output, part, retain_graph=True)[0] for output in outputs]
        rows = torch.stack(gradients, dim=1).flatten(0, 1).double().cpu()
        total += rows.T @ rows
        count += int((masks.sum((2, 3)) > 0).sum()) * images.shape[1]
    return (total / max(count, 1)).numpy()


def unexplained(values: np.ndarray, conditions: np.ndarray) -> np.ndarray:
    """What is left of an attribute [N] after its linear regression on the conditions' values [N, C]; not a number
    where any of these values is none."""
    rest = np.full(len(values), np.nan)
    known = np.isfinite(values) & np.isfinite(conditions).all(1)
    if known.any():
        inputs = np.column_stack([conditions[known], np.ones(known.sum())])
        solution = np.linalg.lstsq(inputs, values[known], rcond=None)[0]
        rest[known] = values[known] - inputs @ solution
    return rest


def project_out(normal: np.ndarray, conditions: Sequence[np.ndarray]) -> np.ndarray:
    """InterFaceGAN's conditional manipulation: the unit vector nearest to `normal` [w_dim] along which no boundary of
    `conditions` is approached.

    Raises:
        ValueError: nothing of the normal is left.
    """
    if len(conditions) == 0:
        return normal
    rest = _projection(conditions) @ normal
    length = np.linalg.norm(rest)
    if length < 1e-3 * np.linalg.norm(normal):
        raise ValueError("the direction lies within the span of its conditions")
    return rest / length


def _projection(conditions: Sequence[np.ndarray]) -> np.ndarray:
    """The matrix [w_dim, w_dim] that takes the span of at least one vector [w_dim] out of another."""
    basis, _ = np.linalg.qr(np.stack(conditions, axis=1))
    return np.eye(len(basis)) - basis @ basis.T


def held_direction(
    normal: np.ndarray,
    conditions: Sequence[np.ndarray],
    sensitivity: np.ndarray,
    w: np.ndarray,
    largest_change: float,
) -> np.ndarray:
    """The unit vector near `normal` along which conditions stay and colours hardly move: v that minimises
    ‖v - normal‖² + μ vᵀMv among those orthogonal to the conditions, with the least μ that is enough.

    Args:
        normal: unit vector [w_dim].
        conditions: vectors [w_dim] along which nothing shall change.
        sensitivity: M of `colour_sensitivity`.
        w: samples [N, w_dim].
        largest_change: root mean square by which the colours may move, to first order, in a step as long as the
            deviation of the samples along v.

    Raises:
        ValueError: the normal lies within the span of its conditions, or colours cannot be held.
    """
    free = project_out(normal, conditions)
    matrix = sensitivity
    if len(conditions):
        # Nothing of `free` lies in the span of the conditions, and this matrix leads nothing into it.
        projection = _projection(conditions)
        matrix = projection @ sensitivity @ projection
    values, vectors = np.linalg.eigh(matrix)
    coordinates = vectors.T @ free

    def unit(weight: float) -> np.ndarray:
        v = vectors @ (coordinates / (1 + weight * values.clip(0)))
        return v / np.linalg.norm(v)

    def change(v: np.ndarray) -> float:
        return float(np.sqrt(max(v @ sensitivity @ v, 0)) * (w @ v).std())

    if change(free) <= largest_change:
        return free
    low, high = -4.0, 10.0
    if change(unit(10**high)) > largest_change:
        raise ValueError("colours of skin and background move with it, whatever is done")
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if change(unit(10**middle)) <= largest_change else (middle, high)
    return unit(10**high)
