"""The two named ways to build an auxiliary network and its inner loop, and which of them a network has.

`paper` is what the text describes: each hypernetwork's last layer and the last convolution of the offset planes with
an ordinary bias, plain gradient steps (Eq. 5), and meta-gradients of second order for the state after them (Alg. 1).
`extended` has what helped here besides: biases of each tap of a kernel and of each position of the offset planes,
which do most of the adaptation, momentum, meta-gradients of first order, losses on the way (MAML++).
"""

from __future__ import annotations

from typing import Any, Literal

from .auxiliary import AuxiliaryNetwork

Preset = Literal["paper", "extended"]

#: Settings of a training run by preset, section and key (`training.phases.AuxiliaryConfig`). What "extended" needs
#: besides, full kernels and the offset planes' bias, depends on the generator's size.
PRESETS: dict[Preset, dict[str, dict[str, Any]]] = {
    "paper": {
        "auxiliary": {"offset_bias_resolution": 0, "full_kernel_layers": []},
        "inner": {"order": "second", "momentum": 0.0},
        "outer": {"multi_step_weight": 0.0},
    },
    "extended": {
        "inner": {"order": "first", "momentum": 0.4},
        "outer": {"multi_step_weight": 0.2},
    },
}


def inner_loop_of(network: AuxiliaryNetwork) -> dict[str, Any]:
    """What tells the presets apart, as a network has it; plain JSON values.

    Returns:
        "full_kernel_layers": prefixes of the layers whose kernels have a bias a tap; "position_bias": side of the
        offset planes' bias, `None` without it; "momentum", "max_gradient_norm": of the steps; "training":
        `AuxiliaryNetwork`'s `inner_training`.
    """
    config, planes = network.config, network.offset_network
    return {
        "full_kernel_layers": list(config.full_kernel_layers),
        "position_bias": None if planes is None or planes.bias is None else planes.bias.shape[-1],
        "momentum": config.inner_momentum,
        "max_gradient_norm": config.inner_max_gradient_norm,
        "training": config.inner_training,
    }


def preset_of(network: AuxiliaryNetwork) -> Literal["paper", "extended", "custom"]:
    """The preset that a network really has, by its tensors and its inner loop.

    "extended" needs the tensors that its modules can have and momentum, and says nothing of the meta-gradients where
    these are not recorded. "paper" must have been meta-learnt as Alg. 1 has it. All else is "custom": a network of the
    plain phase too, unless it has the biases and the momentum of "extended".
    """
    loop = inner_loop_of(network)
    training = loop["training"] or {}
    with_taps, with_positions = bool(loop["full_kernel_layers"]), loop["position_bias"] is not None
    if not with_taps and not with_positions:
        plain_steps = loop["momentum"] == 0 and loop["max_gradient_norm"] is None
        as_alg_1 = training.get("order") == "second" and training.get("multi_step_weight") == 0
        return "paper" if plain_steps and as_alg_1 else "custom"
    complete = with_taps == bool(network.layer_names) and with_positions == (network.offset_network is not None)
    first_order = training.get("order", "first") == "first"
    return "extended" if complete and loop["momentum"] > 0 and first_order else "custom"
