"""Weights laid out as a device's convolutions take them: values, files and fingerprints stay."""

from __future__ import annotations

import copy

import pytest
import torch

from metaaux import MetaAuxInverter
from metaaux.models.identity import IdentityNetwork
from metaaux.models.weights import lay_out

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def kernels(network):
    return [weight for weight in network.parameters() if weight.ndim == 4]


def all_in(network, layout):
    return all(weight.is_contiguous(memory_format=layout) for weight in kernels(network))


def test_a_pipeline_with_weights_as_on_cuda_is_the_same(tiny_components, tiny_inverter, crops, cameras, tmp_path):
    inverter = MetaAuxInverter(**{name: copy.deepcopy(network) for name, network in tiny_components.items()})
    networks = (inverter.generator, inverter.discriminator, inverter.identity)
    for network in networks:
        lay_out(network, CUDA)
        assert kernels(network) and all_in(network, torch.channels_last)
    assert inverter.fingerprint == tiny_inverter.fingerprint
    expected, inversion = (i.invert(crops[0], steps=1, camera=cameras[0]) for i in (tiny_inverter, inverter))
    assert inversion.steps[-1]["total"] == pytest.approx(expected.steps[-1]["total"], rel=1e-4)
    inverter.save_pretrained(tmp_path)
    loaded = MetaAuxInverter.from_pretrained(tmp_path)
    for name, tensor in inverter.generator.state_dict().items():
        assert torch.equal(loaded.generator.state_dict()[name], tensor), name
    assert inverter.to(CPU) is inverter
    assert all(all_in(network, torch.contiguous_format) for network in networks)


def test_weights_beside_group_normalisation_stay_contiguous():
    network = IdentityNetwork(
        input_size=16, stem_width=16, widths=(16,) * 4, depths=(1,) * 4, embedding_dim=16, normalization="group"
    )
    lay_out(network, CUDA)
    assert all_in(network, torch.contiguous_format)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_moving_a_pipeline_to_cuda_lays_its_weights_out(tiny_folder):
    inverter = MetaAuxInverter.from_pretrained(tiny_folder).to(CUDA)
    for network in (inverter.generator, inverter.discriminator, inverter.identity):
        assert all_in(network, torch.channels_last)
    # Its parameters are views of one packed tensor, and gradients of another layout would be added one by one.
    assert all_in(inverter.auxiliary, torch.contiguous_format)
