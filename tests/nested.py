"""Nested settings with a few changes, for tests of training."""

from __future__ import annotations

import copy
from typing import Any


def nested(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy of `settings` with changes named section__key=value."""
    settings = copy.deepcopy(settings)
    for name, value in changes.items():
        *sections, key = name.split("__")
        section = settings
        for part in sections:
            section = section.setdefault(part, {})
        section[key] = value
    return settings
