"""EG3D's networks against outputs recorded from the official implementation (see `eg3d_reference`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from eg3d_reference import DISCRIMINATORS, GENERATORS, hashed, hashed_cameras, hashed_weights, subsample
from safetensors.torch import load_file

from metaaux.models.discriminator import DualDiscriminator
from metaaux.models.eg3d import EG3DGenerator

RECORDED = Path(__file__).resolve().parent / "data" / "eg3d_official.safetensors"


@pytest.fixture(scope="module")
def recorded():
    return load_file(RECORDED)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "8xdc" else ()) for name in GENERATORS]
)
@torch.no_grad()
def test_generator_equals_official(name, recorded):
    case = GENERATORS[name]
    model = EG3DGenerator(**case.config()).eval()
    model.load_state_dict(hashed_weights(model.state_dict(), case.super_resolution_bias))
    ws = model.mapping(
        hashed(f"{name}/z", (case.batch, 512)), hashed_cameras(f"{name}/condition", case.batch), case.psi, case.cutoff
    )
    planes = model.planes(ws)
    points = 0.3 * hashed(f"{name}/points", (case.batch, 60, 3))
    torch.manual_seed(case.seed)
    output = model.synthesize(
        ws, hashed_cameras(f"{name}/camera", case.batch), planes=planes, resolution=case.resolution, jitter=True
    )
    actual = {
        "ws": ws,
        "planes": planes,
        "image": output.image,
        "image_raw": output.image_raw,
        "depth": output.depth,
        "density": model.density(planes, points),
    }
    expected = {key: value for key, value in recorded.items() if key.startswith(f"{name}/")}
    assert len(expected) == len(actual)
    for key, value in subsample(actual).items():
        reference = expected[f"{name}/{key}"]
        # float32 rounding, which the planes' slopes and a thin ray's division by its opacity magnify
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", DISCRIMINATORS)
@torch.no_grad()
def test_discriminator_equals_official(name, recorded):
    size, raw, base, widest, layers, clamp, group, batch = DISCRIMINATORS[name]
    model = DualDiscriminator(
        image_size=size,
        raw_size=raw,
        channel_base=base,
        channel_max=widest,
        mapping_layers=layers,
        conv_clamp=clamp,
        deviation_group=group,
    )
    model.load_state_dict(hashed_weights(model.state_dict()))
    logits = model(
        hashed(f"{name}/image", (batch, 3, size, size)),
        hashed(f"{name}/image_raw", (batch, 3, raw, raw)),
        hashed_cameras(f"{name}/camera", batch),
    )
    torch.testing.assert_close(logits, recorded[f"{name}/logits"], rtol=0, atol=1e-5)


def test_default_configuration_has_the_released_size():
    with torch.device("meta"):
        generator, discriminator = EG3DGenerator(), DualDiscriminator()
    assert sum(p.numel() for p in generator.parameters()) == 30_662_136
    assert sum(p.numel() for p in discriminator.parameters()) == 31_359_744
    assert generator.num_ws == 14
