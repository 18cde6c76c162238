"""A network's weights as such: their names seen through wrappers, their fingerprint, their precision."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any

import torch

#: Where a generator's configuration keeps what its weights are called after rounding; see [`generator_fingerprint`].
ORIGIN = "_origin"
#: Parts that wrappers put into names: torch.compile, and (Distributed)DataParallel.
_WRAPPERS = ("_orig_mod", "module")


def unwrapped(network: torch.nn.Module) -> torch.nn.Module:
    """The network itself, without torch.compile and (Distributed)DataParallel around it."""
    while inner := next((network._modules[name] for name in _WRAPPERS if name in network._modules), None):
        network = inner
    return network


def named_weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers by name, sorted, as if nothing were wrapped around the network or a part of it.

    Weights that accelerate's sequential offloading keeps elsewhere are fetched.
    """
    state = network.state_dict()
    if any(tensor.is_meta for tensor in state.values()) and any(hasattr(m, "_hf_hook") for m in network.modules()):
        from accelerate.utils import get_state_dict_offloaded_model

        state = get_state_dict_offloaded_model(network)
    named = {".".join(part for part in name.split(".") if part not in _WRAPPERS): t for name, t in state.items()}
    return dict(sorted(named.items()))


def generator_fingerprint(generator: torch.nn.Module) -> str:
    """SHA-256 over names, shapes and values of a generator's weights, 64 hexadecimal digits.

    Values count as float16, so that float16, float32 and float64 copies of a generator have one fingerprint, on every
    device. bfloat16 keeps fewer digits than float16. So `note_origin` writes down, before weights are rounded to it,
    which fingerprint they have and which digest they will have; weights that have that digest keep the fingerprint.
    Other weights, edited or trained on, have their own whatever the configuration says.
    """
    return _known_as(generator, _digest(named_weights(generator)))


def _known_as(generator: torch.nn.Module, digest: str) -> str:
    origin = unwrapped(generator).config.get(ORIGIN)
    if isinstance(origin, dict) and digest in origin.get("rounded", ()):
        known = str(origin.get("fingerprint"))
        if re.fullmatch("[0-9a-f]{64}", known):
            return known
    return digest


def _digest(weights: dict[str, torch.Tensor], rounded_to: torch.dtype | None = None) -> str:
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu()
        if rounded_to is not None and tensor.is_floating_point():
            tensor = tensor.to(rounded_to)
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.to(torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()


def origin_of(generator: torch.nn.Module) -> dict[str, Any]:
    """What `generator_fingerprint` needs to recognise a copy in bfloat16; `ORIGIN` in the generator's configuration.

    "fingerprint" is the one that the generator has, "rounded" the digests that its copies in bfloat16 have: a copy
    made from float16 weights is another one than that of the float32 weights which they were made of.
    """
    weights = named_weights(generator)
    own = _known_as(generator, _digest(weights))
    before = unwrapped(generator).config.get(ORIGIN)
    rounded = before["rounded"] if isinstance(before, dict) and before.get("fingerprint") == own else []
    return {"fingerprint": own, "rounded": list(dict.fromkeys([*rounded, _digest(weights, torch.bfloat16)]))}


def note_origin(generator: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Notes `origin_of` in a generator's configuration if `change` is about to round its weights to bfloat16.

    Args:
        generator: the generator.
        change: what `torch.nn.Module._apply` is given: makes the new tensor of an old one.
    """
    example = next(iter(generator.parameters()), None)
    if example is None or example.is_meta or example.dtype == torch.bfloat16:
        return
    if change(torch.empty(0, dtype=example.dtype, device=example.device)).dtype == torch.bfloat16:
        generator.register_to_config(**{ORIGIN: origin_of(generator)})


def check_finite(network: torch.nn.Module, what: str, dtype: torch.dtype | None = None) -> None:
    """Checks that all weights are finite numbers, and that they would be in another precision.

    Args:
        network: any.
        what: what messages call it.
        dtype: the other precision.

    Raises:
        ValueError: a weight is infinite or not a number.
        OverflowError: one is too large for `dtype`.
    """
    for name, tensor in named_weights(network).items():
        if not tensor.is_floating_point() or tensor.is_meta:
            continue
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{what}: the tensor {name} has values that are not finite")
        if dtype is not None and not torch.isfinite(tensor.detach().to(dtype)).all():
            raise OverflowError(
                f"{what}: the tensor {name} has values up to {tensor.abs().max().item():.4g}, too large for "
                f"{str(dtype).removeprefix('torch.')}; use bfloat16 or float32"
            )
