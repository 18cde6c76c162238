"""Directions that leave the light as it is: how colours of skin and background answer to w, and what to do about it.

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
    rest = np.eye(len(normal))
    if len(conditions):
        _, lengths, axes = np.linalg.svd(np.stack(conditions))
        rest = axes[int((lengths > 1e-9 * lengths[0]).sum()) :].T
    start, matrix = rest.T @ normal, rest.T @ sensitivity @ rest
    if np.linalg.norm(start) < 1e-3:
        raise ValueError("the direction lies within the span of its conditions")
    values, vectors = np.linalg.eigh(matrix)
    coordinates = vectors.T @ start

    def unit(weight: float) -> np.ndarray:
        v = rest @ (vectors @ (coordinates / (1 + weight * values.clip(0))))
        return v / np.linalg.norm(v)

    def change(v: np.ndarray) -> float:
        return float(np.sqrt(max(v @ sensitivity @ v, 0)) * (w @ v).std())

    if change(unit(0)) <= largest_change:
        return unit(0)
    low, high = -4.0, 10.0
    if change(unit(10**high)) > largest_change:
        raise ValueError("colours of skin and background move with it, whatever is done")
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if change(unit(10**middle)) <= largest_change else (middle, high)
    return unit(10**high)
