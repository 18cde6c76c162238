"""A network's weights as such: their names seen through wrappers, their fingerprint, their precision."""

from __future__ import annotations

import copy
import hashlib
import itertools
import re
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

#: Where a generator's configuration keeps what its weights are called after rounding; see [`generator_fingerprint`].
ORIGIN = "_origin"
#: Components of a pipeline that may have a precision below float32; gradients or embeddings need it of the others.
REDUCIBLE = ("generator", "discriminator")
#: Precisions that the networks compute in, with shorter names.
PRECISIONS = ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16"))
#: Parts that wrappers put into names: torch.compile, and (Distributed)DataParallel.
_WRAPPERS = ("_orig_mod", "module")


def constructor_arguments(network: torch.nn.Module, **changed: Any) -> dict[str, Any]:
    """What a network was constructed with, as its configuration holds it, but for the arguments in `changed`."""
    return {name: value for name, value in network.config.items() if not name.startswith("_")} | changed


def unwrapped(network: torch.nn.Module) -> torch.nn.Module:
    """The network itself, without torch.compile and (Distributed)DataParallel around it."""
    while wrapper := next((name for name in _WRAPPERS if name in network._modules), None):
        network = network._modules[wrapper]
    return network


def without_wrappers(network: torch.nn.Module) -> torch.nn.Module:
    """The network itself; if parts of it are wrapped, a copy without wrappers that shares its tensors."""
    network = unwrapped(network)
    if not any(part in _WRAPPERS for name, _ in network.named_modules() for part in name.split(".")):
        return network
    tensors = itertools.chain(network.parameters(), network.buffers())
    network = copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            module._modules[name] = unwrapped(child)
    return network


def named_weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers by name, sorted, as if nothing were wrapped around the network or a part of it.

    Weights that accelerate's sequential offloading keeps elsewhere are fetched.
    """
    state = network.state_dict()
    if any(tensor.is_meta for tensor in state.values()) and any(hasattr(m, "_hf_hook") for m in network.modules()):
        from accelerate.utils.modeling import get_state_dict_offloaded_model

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
    origin = _noted_origin(generator)
    return origin["fingerprint"] if digest in origin["rounded"] else digest


def _noted_origin(generator: torch.nn.Module) -> dict[str, Any]:
    """What the generator's configuration, which may be a stranger's, says of its origin."""
    origin = unwrapped(generator).config.get(ORIGIN)
    fields = {"fingerprint", "rounded"}
    if isinstance(origin, dict) and origin.keys() == fields and isinstance(origin["rounded"], list):
        if re.fullmatch("[0-9a-f]{64}", str(origin["fingerprint"])):
            return origin
    return {"fingerprint": "", "rounded": []}


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
    before = _noted_origin(generator)
    rounded = before["rounded"] if before["fingerprint"] == own else []
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


class FingerprintCache:
    """`generator_fingerprint`, computed once for each generator and state of its weights.

    A change of weights is known by where they lie and how often torch has changed them, which writing through `.data`
    is not counted in.
    """

    def __init__(self) -> None:
        self.known: tuple[weakref.ref, tuple, str] | None = None

    def __call__(self, generator: torch.nn.Module) -> str:
        state = tuple(
            (tensor.data_ptr(), tensor.dtype, None if tensor.is_inference() else tensor._version)
            for tensor in itertools.chain(generator.parameters(), generator.buffers())
        )
        known = self.known
        if known is None or known[0]() is not generator or known[1] != state:
            known = self.known = (weakref.ref(generator), state, generator_fingerprint(generator))
        return known[2]


def weight_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """The dtype that a name such as "bfloat16", "torch.float16" or "fp16" stands for; of "auto" and `None` float32.

    Raises:
        ValueError: it is none in which the networks compute.
    """
    names = {"auto": torch.float32, None: torch.float32}
    for precision, *others in PRECISIONS:
        names |= dict.fromkeys((precision, str(precision), str(precision).removeprefix("torch."), *others), precision)
    if not isinstance(dtype, (torch.dtype, str, type(None))) or dtype not in names:
        raise ValueError(f"the networks compute in float32, bfloat16 or float16, not in {dtype}")
    return names[dtype]


def full_dtype(network: torch.nn.Module) -> torch.dtype:
    """Precision of computations for which float16 is too coarse or too narrow: float32 then, else the weights'."""
    return torch.float32 if network.dtype == torch.float16 else network.dtype


def half_dtype(network: torch.nn.Module) -> torch.dtype:
    """Precision of computations for which float16 suffices: that of the weights, but float32 for float16 where
    gradients are wanted, which would underflow, and on a CPU, where it saves no time."""
    return full_dtype(network) if torch.is_grad_enabled() or network.device.type == "cpu" else network.dtype


def check_computable(components: Mapping[str, torch.nn.Module | None]) -> None:
    """Checks that the networks of a pipeline have precisions in which they compute.

    Raises:
        ValueError: generator or discriminator is in something else than float32, bfloat16 or float16, or another
            network is not in float32.
    """
    for name, network in components.items():
        if network is None:
            continue
        known = [precision for precision, *_ in PRECISIONS] if name in REDUCIBLE else [torch.float32]
        if network.dtype not in known:
            texts = " or ".join(str(precision).removeprefix("torch.") for precision in known)
            raise ValueError(
                f"the {name} is in {str(network.dtype).removeprefix('torch.')}, but it computes in {texts}; put the "
                "pipeline into another precision with .to(torch.float32), .to(torch.bfloat16) or .to(torch.float16)"
            )


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


def cast(network: torch.nn.Module, what: str, dtype: torch.dtype) -> torch.nn.Module:
    """Puts a network's weights into another precision, in place, once `check_finite` has passed; returns it."""
    check_finite(network, what, dtype)
    # diffusers' own `to` warns of modules that should stay in float32, of which these networks have none.
    return torch.nn.Module.to(network, dtype)


def lay_out(network: torch.nn.Module, device: torch.device) -> None:
    """Lays out a network's weights, in place, as convolutions on a device take them: on CUDA as `channels_last`.

    That is the activations' layout there, into which cuDNN would copy weights of another one, forth and back, in each
    pass. Where group normalisation, whose results are contiguous on CUDA, takes turns with convolutions, contiguous
    weights are right.
    """
    grouped = any(isinstance(module, torch.nn.GroupNorm) for module in network.modules())
    layout = torch.channels_last if device.type == "cuda" and not grouped else torch.contiguous_format
    torch.nn.Module.to(network, memory_format=layout)
