"""The auxiliary network: identity at the start, bounds, gradients, switches, configuration, files."""

from __future__ import annotations

import copy

import pytest
import torch

from metaaux.models.auxiliary import AuxiliaryNetwork


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small lose more by handing work over than a second thread wins."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def generator(tiny_components):
    return tiny_components["generator"]


@pytest.fixture
def inputs(generator, cameras):
    seed = torch.Generator().manual_seed(1)
    size = generator.config.image_size
    w = torch.randn(2, generator.config.w_dim, generator=seed)
    with torch.no_grad():
        planes = generator.planes(w)
    return {"image": torch.rand(2, 3, size, size, generator=seed) * 2 - 1, "cameras": cameras[:2], "planes": planes}, w


def fresh(tiny_components, **overrides) -> AuxiliaryNetwork:
    """A newly initialised network of the tiny configuration."""
    config = {k: v for k, v in tiny_components["auxiliary"].config.items() if not k.startswith("_")}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return AuxiliaryNetwork(**{**config, **overrides}).eval()


def test_new_network_leaves_the_generator_as_it_is(tiny_components, generator, inputs):
    batch, w = inputs
    one = {name: value[:1] for name, value in batch.items()}
    with torch.no_grad():
        output = fresh(tiny_components)(**one)
        expected = generator.synthesize(w[:1], one["cameras"])
        actual = generator.synthesize(
            w[:1], one["cameras"], weight_offsets=output.weight_offsets, offset_planes=output.offset_planes
        )
    assert torch.equal(actual.image, expected.image)
    assert torch.equal(actual.depth, expected.depth)


def test_new_network_has_gradients_in_both_modules(tiny_components, generator, inputs):
    batch, w = inputs
    network = fresh(tiny_components)
    output = network(**batch)
    image = generator.synthesize(w, batch["cameras"], output.weight_offsets, output.offset_planes).image
    (image - batch["image"]).square().mean().backward()
    for hypernetwork in network.hypernetworks.values():
        assert hypernetwork.bias.grad.abs().max() > 0
        assert hypernetwork.to_a.weight.grad.abs().max() > 0
    assert network.offset_network.bias.grad.abs().max() > 0
    assert network.offset_network.to_offsets.weight.grad.abs().max() > 0


def test_shapes_and_layers(tiny_components, generator, inputs):
    batch, _ = inputs
    network = tiny_components["auxiliary"]
    output = network(**batch)
    layers = generator.modulated_layers
    assert set(output.weight_offsets) == set(layers)
    assert all(offset.shape == (2, *layers[name], 1, 1) for name, offset in output.weight_offsets.items())
    side = network.config.offset_resolution
    assert output.offset_planes.shape == (2, 3, 3, side, side)


def test_offsets_have_full_rank_once_the_bias_moves(tiny_components, inputs):
    batch, _ = inputs
    network = fresh(tiny_components)
    seed = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for hypernetwork in network.hypernetworks.values():
            hypernetwork.bias.normal_(generator=seed)
        offsets = network(**batch).weight_offsets
    for offset in offsets.values():
        assert torch.linalg.matrix_rank(offset[0, :, :, 0, 0].double()) == min(offset.shape[1:3])


def test_displacement_stays_within_the_bound(tiny_components, generator, inputs):
    batch, _ = inputs
    network = fresh(tiny_components, offset_bound=0.03)
    with torch.no_grad():
        network.offset_network.bias.normal_(std=1e3)
        planes = network(**batch).offset_planes
    limit = 0.03 * generator.config.box_size
    # Each look-up (Eq. 4) is a convex combination of one plane's vectors, so the sum of the longest bounds |Δp|.
    longest = planes.norm(dim=2).flatten(2).amax(dim=2).sum(dim=1)
    assert (longest <= limit * (1 + 1e-5)).all()
    assert (longest > 0.95 * limit).all()


def test_camera_and_generator_planes_matter_to_the_3d_module_only(tiny_components, inputs):
    batch, _ = inputs
    network = tiny_components["auxiliary"]
    output = network(**batch)
    for other in (
        network(**{**batch, "cameras": batch["cameras"].flip(0)}),
        network(**{**batch, "planes": batch["planes"].flip(0)}),
    ):
        assert not torch.equal(other.offset_planes, output.offset_planes)
        for name, offset in output.weight_offsets.items():
            torch.testing.assert_close(other.weight_offsets[name], offset)


def test_switches(tiny_components, inputs):
    batch, _ = inputs
    without_3d = fresh(tiny_components, use_offset_planes=False)
    output = without_3d(batch["image"])
    assert output.offset_planes is None and output.weight_offsets
    without_2d = fresh(tiny_components, use_weight_offsets=False)
    output = without_2d(**batch)
    assert output.weight_offsets == {} and output.offset_planes is not None
    assert not any(name.startswith("hypernetworks") for name in without_2d.adaptable_parameters())
    with pytest.raises(ValueError, match="nothing is left"):
        fresh(tiny_components, use_offset_planes=False, use_weight_offsets=False)


def test_a_finer_offset_bias_shows_the_same_and_moves_as_far(tiny_components, generator, inputs):
    batch, w = inputs
    coarse = fresh(tiny_components)
    with torch.no_grad():
        coarse.offset_network.to_offsets.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(6))
        coarse.offset_network.bias.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    fine = coarse.with_offset_bias_resolution(32)
    assert fine(**batch).offset_planes.shape == (2, 3, 3, 32, 32) and fine.config.offset_bias_resolution == 32

    def step(network):
        """Planes before and after one gradient step on the bias alone; the loss falls with the mean displacement."""
        before = network(**batch).offset_planes
        bias = network.offset_network.bias
        (gradient,) = torch.autograd.grad(before[:, :, 0].mean((2, 3)).sum(), bias)
        with torch.no_grad():
            bias -= 10 * network.inner_rates()["offset_network.bias"] * gradient
        return before.detach(), network(**batch).offset_planes.detach()

    def pooled(planes):
        factor = planes.shape[-1] // 8
        return torch.nn.functional.avg_pool2d(planes.flatten(1, 2), factor)

    (before, after), (fine_before, fine_after) = step(coarse), step(fine)
    spread = before.abs().max()
    assert (pooled(fine_before) - pooled(before)).abs().max() < 0.3 * spread  # bilinear interpolation smoothes
    moved = (after - before)[:, :, 0].mean((2, 3))
    torch.testing.assert_close((fine_after - fine_before)[:, :, 0].mean((2, 3)), moved, rtol=0.05, atol=1e-7)
    assert moved.abs().min() > 0


def test_a_finer_offset_bias_saves_and_loads(tiny_components, inputs, tmp_path):
    batch, _ = inputs
    fine = fresh(tiny_components).with_offset_bias_resolution(16)
    fine.save_pretrained(tmp_path)
    loaded = AuxiliaryNetwork.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(**batch).offset_planes, fine(**batch).offset_planes)
    torch.testing.assert_close(loaded.log_inner_rates, fine.log_inner_rates)
    with pytest.raises(ValueError, match="below offset_resolution 8"):
        fine.with_offset_bias_resolution(4)
    with pytest.raises(ValueError, match="no 3D module"):
        fresh(tiny_components, use_offset_planes=False).with_offset_bias_resolution(16)


def test_config_for_selects_layers_by_prefix(generator):
    config = AuxiliaryNetwork.config_for(generator, prefixes=("super_resolution.",), hyper_rank=3)
    assert config["hyper_rank"] == 3
    assert config["layer_shapes"] == {
        name: list(shape) for name, shape in generator.modulated_layers.items() if name.startswith("super_resolution.")
    }
    with pytest.raises(ValueError, match="torgb"):
        AuxiliaryNetwork.config_for(generator, prefixes=("torgb.",))


def test_rejects_inputs_that_do_not_fit(tiny_components, inputs):
    batch, _ = inputs
    network = tiny_components["auxiliary"]
    with pytest.raises(ValueError, match="image is"):
        network(**{**batch, "image": batch["image"][..., :16]})
    with pytest.raises(ValueError, match="planes is"):
        network(**{**batch, "planes": batch["planes"][:1]})
    with pytest.raises(ValueError, match="needs cameras"):
        network(batch["image"])
    with pytest.raises(ValueError, match="multiple of 32"):
        fresh(tiny_components, image_size=72)


def test_saves_and_loads_with_its_rates(tiny_components, inputs, tmp_path):
    batch, _ = inputs
    network = fresh(tiny_components)
    with torch.no_grad():
        network.log_inner_rates.normal_()
        for parameter in network.adaptable_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    network.save_pretrained(tmp_path)
    # Copied, since weights lie in a file's pages as they come, and the same products of others are rounded otherwise.
    loaded = copy.deepcopy(AuxiliaryNetwork.from_pretrained(tmp_path)).eval()
    rates = loaded.inner_rates()
    assert all(torch.equal(rates[name], rate) for name, rate in network.inner_rates().items())
    expected, actual = network(**batch), loaded(**batch)
    assert torch.equal(actual.offset_planes, expected.offset_planes)
    assert all(torch.equal(actual.weight_offsets[n], o) for n, o in expected.weight_offsets.items())


def test_default_backbone_is_resnet_101():
    from transformers import ResNetBackbone

    with torch.device("meta"):
        network = AuxiliaryNetwork({"backbone.b4.conv1": [512, 512]})
    assert isinstance(network.backbone, ResNetBackbone)
    # torchvision's ResNet-101 has 44.55 M parameters, 2.05 M of which are its classifier.
    assert sum(p.numel() for p in network.backbone.parameters()) == 42_500_160


def test_without_a_module_the_other_predicts_the_same(tiny_components, inputs):
    batch, _ = inputs
    whole = fresh(tiny_components).with_full_kernels(["backbone.b8"])
    with torch.no_grad():
        whole.log_inner_rates.copy_(torch.arange(len(whole.log_inner_rates)) * 0.01)
    expected, rates = whole(**batch), whole.inner_rates()
    flat = whole.without_module("3d")
    assert flat.offset_network is None and flat.config.offset_bias_resolution == 0
    assert flat.config.full_kernel_layers == ["backbone.b8"]
    torch.testing.assert_close(flat(batch["image"]).weight_offsets, expected.weight_offsets)
    deep = whole.without_module("2d")
    assert not deep.layer_names and not deep(**batch).weight_offsets and not deep.config.full_kernel_layers
    torch.testing.assert_close(deep(**batch).offset_planes, expected.offset_planes)
    for network in (flat, deep):
        assert 0 < len(network.inner_rates()) < len(rates)
        assert all(torch.equal(rate, rates[name]) for name, rate in network.inner_rates().items())
    for network, module in ((flat, "2d"), (flat, "3d"), (whole, "4d")):
        with pytest.raises(ValueError, match="can lose '2d' or '3d'"):
            network.without_module(module)


def test_full_kernels_predict_the_same_and_let_steps_move_each_tap(tiny_components, inputs, generator, tmp_path):
    batch, w = inputs
    layer, name = "super_resolution.block1.conv1", "hypernetworks.super_resolution-block1-conv1.bias"
    whole = fresh(tiny_components)
    with torch.no_grad():
        whole.get_parameter(name).normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    full = whole.with_full_kernels(["super_resolution.block1"])
    assert full.config.full_kernel_layers == ["super_resolution.block1"]
    before, after = whole(**batch).weight_offsets, full(**batch).weight_offsets
    for key, offset in before.items():
        taps = (3, 3) if key.startswith("super_resolution.block1") else (1, 1)
        assert after[key].shape == (*offset.shape[:3], *taps)
        torch.testing.assert_close(after[key], offset.expand_as(after[key]))
    rates, old_rates = full.inner_rates(), whole.inner_rates()
    torch.testing.assert_close(rates[name], 3 * old_rates[name])
    assert sum(not torch.equal(rates[key], old_rates[key]) for key in rates) == 2

    # The generator takes them, one a sample or one for all, and each tap has a gradient of its own.
    image = generator.synthesize(w, batch["cameras"], weight_offsets=after).image
    torch.testing.assert_close(image, generator.synthesize(w, batch["cameras"], weight_offsets=before).image)
    (gradient,) = torch.autograd.grad(image.square().mean(), full.get_parameter(name))
    assert gradient.flatten(2).std(2).min() > 0
    one = generator.synthesize(w[:1], batch["cameras"][:1], weight_offsets={layer: after[layer][0]}).image
    each = generator.synthesize(w[:1], batch["cameras"][:1], weight_offsets={layer: after[layer][:1]}).image
    torch.testing.assert_close(one, each, rtol=1e-4, atol=1e-5)

    full.save_pretrained(tmp_path)
    loaded = AuxiliaryNetwork.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(**batch).weight_offsets[layer], after[layer])
    again = loaded.with_full_kernels(["super_resolution"])
    torch.testing.assert_close(again.inner_rates()[name], rates[name])
    with pytest.raises(ValueError, match="no modulated layer of the generator starts with"):
        whole.with_full_kernels(["b1024"])
    with pytest.raises(ValueError, match="must be .*1, 1.* or .*3, 3"):
        generator.planes(w, {"backbone.b8.conv0": torch.zeros(*generator.modulated_layers["backbone.b8.conv0"], 3, 1)})
