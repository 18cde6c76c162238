"""Latent directions as a component of a checkpoint: along each, one attribute of a face changes.

A direction is a unit normal n in W with a scale, so that w + value·scale·n (InterFaceGAN's edit, Shen et al. 2020)
is a visible, natural change at a value of 1 for every direction.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

#: "interfacegan": normal of a linear boundary between faces with and without an attribute (Shen et al. 2020);
#: "principal": principal component of w (Härkönen et al. 2020, GANSpace), found without labels.
KINDS = ("interfacegan", "principal")

_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
_KEYS = {"name", "kind", "scale", "low", "high", "accuracy", "meaning"}
_OPTIONAL_KEYS = {"gain"}


@dataclass(frozen=True, eq=False)
class Direction:
    """One editing direction.

    Attributes:
        name: as in `edits={name: value}`.
        kind: one of `KINDS`.
        normal: unit vector n [w_dim], float32 on the CPU.
        scale: length of a step of 1 in W: an edit is w + value·scale·n.
        low, high: values between which faces stay faces, low < 0 < high.
        accuracy: share of held-out samples on the right side of the boundary, 0 to 1; `None` for principal components.
        meaning: what a positive value does, in a few words; "" where nobody has looked.
        gain: factor on a step for adapted heads. Weights adapted to a photo answer less to a change of w than the
            generator's own, on which scales are found; the gain makes a step as visible on both. 1 where not measured.
    """

    name: str
    kind: str
    normal: torch.Tensor
    scale: float
    low: float
    high: float
    accuracy: float | None
    meaning: str
    gain: float = 1.0


class LatentDirections(ModelMixin, ConfigMixin):
    """The directions of a checkpoint; `normals` [D, w_dim] holds their unit vectors, its configuration the rest.

    Args:
        w_dim: length of w.
        directions: for each direction a dictionary with the keys `name`, `kind`, `scale`, `low`, `high`, `accuracy`,
            `meaning` and, if wanted, `gain`, as in [`Direction`].
        generator: [`~metaaux.MetaAuxInverter.fingerprint`] of the generator that they were found in; "" if unknown.

    Raises:
        ValueError: an entry lacks a key or has an unknown one, a name occurs twice or is not in lower case letters,
            digits and underscores, a number is out of its range.
    """

    @register_to_config
    def __init__(self, w_dim: int = 512, directions: Sequence[Mapping[str, Any]] = (), generator: str = ""):
        super().__init__()
        for entry in directions:
            _check_entry(entry)
        names = [entry["name"] for entry in directions]
        if len(set(names)) < len(names):
            raise ValueError(f"latent directions need names of their own, got {names}")
        self.normals = nn.Parameter(torch.zeros(len(names), w_dim), requires_grad=False)

    @classmethod
    def from_directions(cls, directions: Sequence[Direction], generator: str = "") -> LatentDirections:
        """The component that holds `directions`, of which there must be at least one; `generator` as the constructor.

        Raises:
            ValueError: no direction, normals of different lengths or not of length 1, or as the constructor.
        """
        shapes = {tuple(direction.normal.shape) for direction in directions}
        if len(shapes) != 1 or len(shapes.copy().pop()) != 1:
            raise ValueError(f"directions must have normals of one shape [w_dim], got the shapes {sorted(shapes)}")
        normals = torch.stack([direction.normal.detach().float().cpu() for direction in directions])
        if not ((normals.norm(dim=1) - 1).abs() < 1e-3).all():
            raise ValueError("directions must have unit normals; their lengths belong into their scales")
        entries = [
            {key: getattr(direction, key) for key in sorted(_KEYS | _OPTIONAL_KEYS)} for direction in directions
        ]
        component = cls(w_dim=normals.shape[1], directions=entries, generator=generator)
        with torch.no_grad():
            component.normals.copy_(normals)
        return component.eval()

    def as_dict(self) -> dict[str, Direction]:
        """The directions by name, in the checkpoint's order."""
        # Half precision in a file must not change an edit's strength.
        normals = F.normalize(self.normals.detach().float().cpu(), dim=1)
        return {
            entry["name"]: Direction(normal=normal, **entry)
            for entry, normal in zip(self.config.directions, normals, strict=True)
        }

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Amounts [..., D], one of each direction → the change of w [..., w_dim]."""
        scales = values.new_tensor([entry["scale"] for entry in self.config.directions])
        return (values * scales) @ F.normalize(self.normals.float(), dim=1).to(values)


def _check_entry(entry: Mapping[str, Any]) -> None:
    if entry.keys() - _OPTIONAL_KEYS != _KEYS:
        raise ValueError(f"a latent direction has the keys {sorted(_KEYS)}, got {sorted(entry)}")
    name = entry["name"]
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise ValueError(f"a direction's name has lower case letters, digits and underscores only, got {name!r:.60}")
    if entry["kind"] not in KINDS:
        raise ValueError(f"direction {name}: kind must be one of {KINDS}, got {entry['kind']!r:.60}")
    if not isinstance(entry["meaning"], str):
        raise ValueError(f"direction {name}: meaning must be a text")
    low, high, scale = (float(entry[key]) for key in ("low", "high", "scale"))
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"direction {name}: scale must be positive, got {scale}")
    gain = float(entry.get("gain", 1))
    if not (math.isfinite(gain) and gain > 0):
        raise ValueError(f"direction {name}: gain must be positive, got {gain}")
    if not (math.isfinite(high - low) and low < 0 < high):
        raise ValueError(f"direction {name}: its range must hold 0 inside, got {low} to {high}")
    if entry["accuracy"] is not None and not 0 <= entry["accuracy"] <= 1:
        raise ValueError(f"direction {name}: accuracy is a share between 0 and 1, got {entry['accuracy']}")
