"""The inversion methods that `evaluate` compares."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import IMAGE_SIZE
from test_stylegan2_2d import inverter as flat_inverter  # noqa: F401 (a fixture)

from metaaux.baselines import METHODS, MethodOptions, make_methods
from metaaux.baselines.optimization import (
    LatentSettings,
    TuningSettings,
    optimize_latent,
    reconstruction_loss,
    tune_generator,
)
from metaaux.baselines.registry import register
from metaaux.models.auxiliary import AuxiliaryNetwork
from metaaux.models.psp import PSPEncoder

FAST = MethodOptions(latent=LatentSettings(steps=2), tuning_steps=2)


@pytest.fixture(scope="module")
def fingerprint_of():
    def digest(module):
        return [tensor.clone() for tensor in module.state_dict().values()]

    return digest


class TestOptimization:
    def test_rate_rises_and_falls(self):
        settings = LatentSettings(steps=100, learning_rate=0.5)
        rates = [settings.rate(step) for step in range(100)]
        assert rates[0] == 0 and rates[5] == rates[75] == pytest.approx(0.5)
        assert rates[2] == pytest.approx(0.5 * 2 / 5) and rates[99] < 0.01
        assert rates[87] > rates[88] > rates[99]

    @pytest.mark.parametrize("space", ["w", "w+"])
    def test_latent_code_comes_nearer_and_batch_changes_nothing(self, tiny_inverter, batch, space):
        image, camera = batch
        generator, loss = tiny_inverter.generator, reconstruction_loss(tiny_inverter)
        settings = LatentSettings(steps=12, learning_rate=0.2)
        w = optimize_latent(generator, loss, image[:2], camera[:2], settings, space)
        assert w.shape == ((2, 16) if space == "w" else (2, generator.num_ws, 16)) and not w.requires_grad
        alone = optimize_latent(generator, loss, image[1:2], camera[1:2], settings, space)
        torch.testing.assert_close(w[1:], alone, atol=1e-3, rtol=1e-3)

        def total(code):
            output = generator.synthesize(code, camera[:2])
            return loss(output.image, output.image_raw, image[:2], camera[:2])["total"]

        assert (total(w) < total(generator.w_avg.expand(2, -1))).all()

    def test_unknown_space(self, tiny_inverter, batch):
        with pytest.raises(ValueError, match="'w' or 'w"):
            optimize_latent(tiny_inverter.generator, None, *batch, LatentSettings(), "z")

    def test_tuning_improves_a_copy_only(self, tiny_inverter, batch, fingerprint_of):
        image, camera = batch[0][:1], batch[1][:1]
        generator, loss = tiny_inverter.generator, reconstruction_loss(tiny_inverter)
        before, w = fingerprint_of(generator), tiny_inverter.encoder(image)
        tuned, steps = tune_generator(generator, loss, image, camera, w, TuningSettings(steps=8, learning_rate=1e-3))
        assert steps == 8
        assert all(torch.equal(a, b) for a, b in zip(before, fingerprint_of(generator)))
        assert not any(parameter.requires_grad for parameter in tuned.parameters())
        errors = [(g.synthesize(w, camera).image - image).square().mean() for g in (generator, tuned)]
        assert errors[1] < errors[0]

    def test_tuning_stops_at_the_distance(self, tiny_inverter, batch):
        image, camera = batch[0][:1], batch[1][:1]
        loss, w = reconstruction_loss(tiny_inverter), tiny_inverter.encoder(image)
        settings = TuningSettings(steps=3, stop_distance=1e9)
        assert tune_generator(tiny_inverter.generator, loss, image, camera, w, settings)[1] == 0
        settings = TuningSettings(steps=3, stop_distance=-1.0)
        assert tune_generator(tiny_inverter.generator, loss, image, camera, w, settings)[1] == 3

    def test_divergence_is_an_error(self, tiny_inverter, batch):
        image, camera = batch[0][:1], batch[1][:1]
        settings = TuningSettings(steps=3, learning_rate=1e30)
        with pytest.raises(FloatingPointError, match="lower the learning rate"):
            tune_generator(
                tiny_inverter.generator,
                reconstruction_loss(tiny_inverter),
                image,
                camera,
                tiny_inverter.encoder(image),
                settings,
            )

    def test_perceptual_weight_is_in_units_of_lpips(self, tiny_inverter):
        # The tiny pipeline has the paper's weight of 0.8, so its distance counts as LPIPS itself.
        weights = reconstruction_loss(tiny_inverter).weights
        assert (weights.mse, weights.perceptual, weights.adversarial) == (1, pytest.approx(1), 0)
        assert tiny_inverter.inversion_loss().weights.perceptual == pytest.approx(0.8)


class TestMethods:
    def test_ours_is_what_the_pipeline_does(self, tiny_inverter, crops, batch):
        method = make_methods(["metaaux"], tiny_inverter, MethodOptions(steps=2))[0]
        found = method.invert(batch[0][1:2], batch[1][1:2])[0]
        inversion = tiny_inverter.invert(crops[1], steps=2, camera=batch[1][1])
        torch.testing.assert_close(found.w[0], inversion.w)
        torch.testing.assert_close(found.offset_planes[0], inversion.offset_planes)
        for layer, offset in inversion.weight_offsets.items():
            torch.testing.assert_close(found.weight_offsets[layer], offset)

    def test_steps_in_the_name(self, tiny_inverter, batch):
        three, zero = make_methods(["metaaux-3", "metaaux-0"], tiny_inverter, MethodOptions(steps=2))
        ours = make_methods(["metaaux"], tiny_inverter, MethodOptions(steps=3))[0]
        photo = batch[0][:1], batch[1][:1]
        torch.testing.assert_close(three.invert(*photo)[0].image, ours.invert(*photo)[0].image)
        assert (three.label, zero.label) == ("Ours, 3 steps", "Ours, no adaptation")
        assert (three.settings()["steps"], zero.settings()["steps"]) == (3, 0)

    def test_steps_on_a_part_of_the_tensors(self, tiny_inverter, batch):
        names = ["full", "predicted_only", "free_only", "full-0"]
        full, predicted, free, none = make_methods(names, tiny_inverter, MethodOptions(steps=1))
        assert (predicted.settings()["moved"], free.settings()["moved"]) == ("predicted", "free")
        moved = {name for name, rate in free.rates().items() if rate}
        layers = [name.replace(".", "-") for name in tiny_inverter.auxiliary.layer_names]
        assert moved == {f"hypernetworks.{layer}.bias" for layer in layers} | {
            "offset_network.bias",
            "offset_network.to_offsets.bias",
        }
        for name, rate in full.rates().items():
            assert {predicted.rates()[name], free.rates()[name]} == {0.0, rate}
        found = [method.invert(batch[0][:1], batch[1][:1])[0] for method in (full, predicted, free, none)]
        layer, limit = "backbone.b8.conv0", tiny_inverter.auxiliary.config.hyper_rank
        changes = [(one.weight_offsets[layer] - found[3].weight_offsets[layer]).flatten(1) for one in found[1:3]]
        ranks = [torch.linalg.matrix_rank(change, rtol=1e-2).item() for change in changes]
        # The predicted part is of low rank, and so is its change; D is not.
        assert 0 < ranks[0] <= 2 * limit < ranks[1]
        moves = [(one.image - found[3].image).abs().max() for one in found[:3]]
        assert min(moves) > 0 and moves[0] not in moves[1:]

    @pytest.mark.parametrize("name", ["metaaux", "metaaux-0", "encoder", "without_auxiliary", "free_only"])
    def test_batch_equals_photos_alone_and_own_view_is_the_image(self, tiny_inverter, batch, name):
        method = make_methods([name], tiny_inverter, MethodOptions(steps=2, generator_rate=1e-4))[0]
        together = method.invert(*batch)
        for index, found in enumerate(together):
            alone = method.invert(batch[0][index : index + 1], batch[1][index : index + 1])[0]
            torch.testing.assert_close(found.image, alone.image, atol=2e-4, rtol=1e-3)
            torch.testing.assert_close(found.views(batch[1][index : index + 1])[0], found.image, atol=1e-5, rtol=0)
            # Several views at once, and several codes.
            cameras, codes = (
                batch[1][[0, 1, 0, 1, 0]],
                found.w * torch.linspace(0.5, 1.5, 5).view(-1, *[1] * (found.w.ndim - 1)),
            )
            for own in (None, codes):
                each = [found.views(cameras[i : i + 1], None if own is None else own[i : i + 1]) for i in range(5)]
                torch.testing.assert_close(found.views(cameras, own), torch.cat(each), atol=1e-5, rtol=1e-5)

    def test_pti_keeps_its_pivot(self, tiny_inverter, batch):
        pti, w = make_methods(["pti", "w"], tiny_inverter, FAST)
        tuned, pivot = pti.invert(batch[0][:1], batch[1][:1])[0], w.invert(batch[0][:1], batch[1][:1])[0]
        torch.testing.assert_close(tuned.w, pivot.w)
        assert tuned.generator is not tiny_inverter.generator and pivot.generator is tiny_inverter.generator
        assert not torch.equal(tuned.image, pivot.image)

    def test_pti_stops_at_a_share_of_the_average_faces_distance(self, tiny_inverter, batch):
        image, camera = batch[0][:1], batch[1][:1]
        steps = [
            make_methods(["pti"], tiny_inverter, replace(FAST, pti_stop_share=share))[0].invert(image, camera)[0]
            for share in (100.0, None)
        ]
        assert [found.tuning_steps for found in steps] == [0, FAST.tuning_steps]

    def test_networks_from_folders(self, tiny_inverter, tiny_components, batch, tmp_path):
        tiny_components["auxiliary"].save_pretrained(tmp_path / "auxiliary")
        tiny_components["encoder"].save_pretrained(tmp_path / "encoder")
        folder = tmp_path / "auxiliary"
        encoder = tmp_path / "encoder"
        options = MethodOptions(steps=1, styletransformer=encoder, hyperinverter=folder, without_meta=folder)
        names = ["styletransformer", "hyperinverter", "without_meta-0", "without_meta"]
        names += ["encoder", "metaaux-0", "metaaux-0", "metaaux"]
        images = [
            method.invert(batch[0][:1], batch[1][:1])[0].image
            for name in names
            for method in make_methods([name], tiny_inverter, options)
        ]
        for own, embedded in zip(images[:4], images[4:]):
            torch.testing.assert_close(own, embedded)
        assert not torch.equal(images[2], images[3])
        with pytest.raises(ValueError, match="holds a LatentEncoder, expected PSPEncoder"):
            make_methods(["psp"], tiny_inverter, MethodOptions(psp=encoder))

    def test_psp_from_a_folder(self, tiny_inverter, batch, tmp_path):
        generator = tiny_inverter.generator
        encoder = PSPEncoder(
            image_size=IMAGE_SIZE,
            input_size=32,
            w_dim=generator.config.w_dim,
            num_ws=generator.num_ws,
            widths=(16, 16, 16, 16),
            depths=(1, 1, 1, 1),
            width=16,
        )
        encoder.set_latent_statistics(generator.w_avg, torch.ones_like(generator.w_avg))
        encoder.save_pretrained(tmp_path)
        psp = make_methods(["psp"], tiny_inverter, MethodOptions(psp=tmp_path))[0]
        image = psp.invert(*batch)[0].image
        average = generator.synthesize(generator.w_avg[None], batch[1][:1]).image
        torch.testing.assert_close(image, average[0].clamp(-1, 1))

    def test_ablations_must_lack_their_module(self, tiny_inverter, tiny_components, batch, tmp_path):
        kept = (
            "backbone_layer_type",
            "backbone_depths",
            "backbone_embedding_size",
            "backbone_hidden_sizes",
            "neck_channels",
            "hyper_channels",
            "offset_resolution",
            "offset_channels",
            "camera_channels",
        )
        settings = {key: tiny_components["auxiliary"].config[key] for key in kept}
        config = AuxiliaryNetwork.config_for(tiny_components["generator"], **settings)
        flat, rigid = tmp_path / "without_2d", tmp_path / "without_3d"
        AuxiliaryNetwork(**config | {"use_weight_offsets": False}).save_pretrained(flat)
        AuxiliaryNetwork(**config | {"use_offset_planes": False}).save_pretrained(rigid)
        options = MethodOptions(steps=1, without_2d=flat, without_3d=rigid)
        first, second = make_methods(["without_2d", "without_3d"], tiny_inverter, options)
        assert not first.invert(batch[0][:1], batch[1][:1])[0].weight_offsets
        assert all(found.offset_planes is None for found in second.invert(*batch))
        with pytest.raises(ValueError, match="3D module, not one without"):
            make_methods(["without_3d"], tiny_inverter, MethodOptions(without_3d=flat))
        with pytest.raises(ValueError, match="2D module, not one without"):
            make_methods(["without_2d"], tiny_inverter, MethodOptions(without_2d=rigid))

    def test_registration(self):
        with pytest.raises(ValueError, match="method 'pti' already"):
            register("pti", "another PTI")
        with pytest.raises(ValueError, match="no folder for the method 'e4e'"):
            register("e4e", "e4e", needs_folder=True)
        assert "e4e" not in METHODS

    def test_labels_say_what_is_not_its_authors_network(self):
        """The networks of these rows are ours, in the manner of the papers that their names refer to."""
        labels = {name: METHODS[name].label for name in ("psp", "styletransformer", "hyperinverter")}
        assert labels == {
            "psp": "pSp-style (W+, our trunk)",
            "styletransformer": "StyleTransformer-style (W+, our encoder)",
            "hyperinverter": "HyperInverter-style (our network, no steps)",
        }

    def test_folders_are_not_asked_of_the_hub(self, tiny_inverter, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no folder org/name"):
            make_methods(["hyperinverter"], tiny_inverter, MethodOptions(hyperinverter="org/name"))
        (tmp_path / "config.json").write_text('{"_class_name": "AuxiliaryNetwork"}')
        (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
        with pytest.raises(FileNotFoundError, match="no safetensors file"):
            make_methods(["without_meta"], tiny_inverter, MethodOptions(without_meta=tmp_path))

    @pytest.mark.parametrize(
        ("names", "match"),
        [
            (["nonsense"], "unknown methods"),
            (["metaaux-five"], "unknown methods"),
            (["encoder-3"], "unknown methods"),
            (["without_meta-0"], "--without-meta"),
            ([], "once each"),
            (["w", "w"], "once each"),
            (["psp"], "--psp"),
        ],
    )
    def test_names(self, tiny_inverter, names, match):
        with pytest.raises(ValueError, match=match):
            make_methods(names, tiny_inverter)
