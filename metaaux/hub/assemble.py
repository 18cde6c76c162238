"""Parts that were trained or converted one by one: whether they make a pipeline together, and with which settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..losses import InversionLoss, LossWeights
from ..models.auxiliary import AuxiliaryNetwork
from ..models.weights import generator_fingerprint

#: Setting of the pipeline that holds the weight of each term of its loss; the squared error's weight is 1.
WEIGHT_SETTINGS = {
    "perceptual": "weight_perceptual",
    "identity": "weight_identity",
    "adversarial": "weight_adversarial",
}


def recorded_weights(auxiliary: AuxiliaryNetwork) -> dict[str, float]:
    """Settings of the pipeline for the loss that an auxiliary network's inner rates were learnt for.

    Returns:
        "weight_perceptual", "weight_identity" and "weight_adversarial"; nothing where the network does not say.

    Raises:
        ValueError: its squared error had another weight than the pipeline's 1.
    """
    if auxiliary.config.inner_loss is None:
        return {}
    weights = auxiliary.config.inner_loss["weights"]
    if weights["mse"] != 1:
        raise ValueError(
            f"the auxiliary network was trained with the squared error weighed by {weights['mse']}, a pipeline's "
            "weighs 1: train it with inner.loss divided by that"
        )
    return {setting: float(weights[term]) for term, setting in WEIGHT_SETTINGS.items()}


def check_parts(parts: Mapping[str, torch.nn.Module | None], settings: Mapping[str, Any]) -> None:
    """Checks that networks fit each other, as a pipeline needs it.

    Args:
        parts: by the pipeline's names: "generator", "encoder", "auxiliary", "discriminator", "identity", and possibly
            "perceptual" and "latent_directions".
        settings: of the pipeline; the weights of its loss are looked at.

    Raises:
        ValueError: some do not; the message says which, and why, for all of them.
    """
    checks: tuple[Callable[..., list[str]], ...] = (
        _encoder_faults,
        _auxiliary_faults,
        _discriminator_faults,
        _directions_faults,
    )
    faults = [fault for check in checks for fault in check(parts)]
    if not faults:  # a loss of parts that do not fit cannot be described
        faults = _loss_faults(parts, settings)
    if faults:
        raise ValueError("these parts do not fit each other: " + "; ".join(faults))


def _differences(part: str, config: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    return [
        f"the {part}'s {key} is {config[key]}, the generator's {value}"
        for key, value in expected.items()
        if config[key] != value
    ]


def _encoder_faults(parts: Mapping[str, torch.nn.Module]) -> list[str]:
    generator, encoder = parts["generator"], parts["encoder"]
    expected = {"image_size": generator.config.image_size, "w_dim": generator.config.w_dim}
    if encoder.latent_space == "w+":
        expected["num_ws"] = generator.num_ws
    if faults := _differences("encoder", encoder.config, expected):
        return faults
    if encoder.identity_size not in (0, parts["identity"].config.embedding_dim):
        size = parts["identity"].config.embedding_dim
        return [f"the encoder takes embeddings of length {encoder.identity_size}, the identity network's have {size}"]
    # Training takes it from the generator; files in half precision round it.
    scale = generator.w_avg.abs().max().clamp(min=1e-6)
    if (encoder.w_avg - generator.w_avg).abs().max() > 2e-3 * scale:
        return ["the encoder was trained for another generator: it starts from another average code (w_avg)"]
    return []


def _auxiliary_faults(parts: Mapping[str, torch.nn.Module]) -> list[str]:
    generator, auxiliary = parts["generator"], parts["auxiliary"]
    faults = _differences("auxiliary network", auxiliary.config, {"image_size": generator.config.image_size})
    layers = generator.modulated_layers
    if auxiliary.config.use_weight_offsets:
        wrong = sorted(
            name for name, shape in auxiliary.config.layer_shapes.items() if tuple(shape) != layers.get(name)
        )
        if wrong:
            faults.append(
                f"the auxiliary network gives offsets for {len(wrong)} layers that the generator does not have, or "
                f"not in these sizes ({', '.join(wrong[:3])})"
            )
    if auxiliary.config.use_offset_planes:
        if not generator.has_viewpoints:
            return [*faults, "the auxiliary network gives offset planes, for which a 2D generator has no use"]
        names = ("plane_features", "plane_resolution", "box_size")
        expected = {name: generator.config[name] for name in names}
        faults += _differences("auxiliary network", auxiliary.config, expected)
    return faults


def _discriminator_faults(parts: Mapping[str, torch.nn.Module]) -> list[str]:
    generator, discriminator = parts["generator"], parts["discriminator"]
    faults = _differences("discriminator", discriminator.config, {"image_size": generator.config.image_size})
    if discriminator.config.dual and not generator.has_viewpoints:
        faults.append("the discriminator is a dual one, and a 2D generator has no raw rendering to show it")
    return faults


def _directions_faults(parts: Mapping[str, torch.nn.Module | None]) -> list[str]:
    generator, directions = parts["generator"], parts.get("latent_directions")
    if directions is None:
        return []
    faults = _differences("directions", directions.config, {"w_dim": generator.config.w_dim})
    origin, fingerprint = directions.config.generator, generator_fingerprint(generator)
    if origin and origin != fingerprint:
        faults.append(
            f"the directions were found in another generator (fingerprint {origin[:12]}…, not {fingerprint[:12]}…)"
        )
    return faults


def _loss_faults(parts: Mapping[str, torch.nn.Module | None], settings: Mapping[str, Any]) -> list[str]:
    recorded = parts["auxiliary"].config.inner_loss
    if recorded is None:
        return []
    weights = LossWeights(**{term: settings[name] for term, name in WEIGHT_SETTINGS.items() if name in settings})
    networks = (parts["discriminator"], parts["identity"], parts.get("perceptual"))
    used = InversionLoss.from_components(weights, *networks).describe()
    return [
        f"the auxiliary network was trained for the inner loss's {key} {recorded.get(key)}, here it is {value}"
        for key, value in used.items()
        if recorded.get(key) != value
    ]
