"""An encoder that is told the person by the identity network, on the whole way of a photo."""

from __future__ import annotations

import pytest
import torch
from recordings import CpuGraphs

from metaaux import MetaAuxInverter
from metaaux.baselines import MethodOptions, make_methods
from metaaux.models.encoder import LatentEncoder
from metaaux.models.weights import constructor_arguments
from metaaux.tasks import encode
from metaaux.training.loading import FrozenNetworks


@pytest.fixture(scope="module")
def told(tiny_components):
    """The tiny pipeline with such an encoder."""
    torch.manual_seed(0)
    size = tiny_components["identity"].config.embedding_dim
    encoder = LatentEncoder(**constructor_arguments(tiny_components["encoder"], identity_size=size)).eval()
    torch.nn.init.normal_(encoder.to_offset.weight, std=0.1)
    encoder.set_latent_statistics(tiny_components["encoder"].w_avg, tiny_components["encoder"].w_std)
    inverter = MetaAuxInverter(**tiny_components | {"encoder": encoder})
    inverter.set_progress_bar_config(disable=True)
    return inverter


@pytest.fixture(scope="module")
def codes(told, batch):
    image, camera = batch
    return encode(told.encoder, told.identity, image, camera)


def test_inversion(told, codes, batch, crops, cameras, tmp_path):
    told.save_pretrained(tmp_path)
    loaded = MetaAuxInverter.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    for inverter in (told, loaded):
        for number in (0, 1):
            result = inverter.invert(crops[number], steps=1, camera=cameras[number])
            torch.testing.assert_close(result.w, codes[number], rtol=1e-3, atol=1e-4)
    assert (codes[0] - codes[1]).abs().max() > 1e-2
    with pytest.raises(ValueError, match="length"):
        told.encoder(batch[0])


def test_recordings(told, codes, crops, cameras, monkeypatch):
    monkeypatch.setattr(told, "_graphs", CpuGraphs())
    for number in (0, 1, 0):
        result = told.invert(crops[number], steps=1, camera=cameras[number])
        torch.testing.assert_close(result.w, codes[number], rtol=1e-3, atol=1e-4)


def test_tasks(told, codes, batch):
    loss = told.inversion_loss()
    tasks = FrozenNetworks(told.generator, told.encoder, loss, loss).tasks(*batch)
    torch.testing.assert_close(tasks.w, codes)


@pytest.mark.parametrize("name", ["encoder", "metaaux", "without_auxiliary"])
def test_methods(told, codes, batch, name):
    image, camera = batch
    (method,) = make_methods([name], told, MethodOptions())
    for count in (1, 2):
        for number, one in enumerate(method.invert(image[:count], camera[:count])):
            torch.testing.assert_close(one.w, codes[number : number + 1], rtol=1e-3, atol=1e-4)
