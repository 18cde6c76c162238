"""Precisions, devices, wrappers and copies: what they change of a pipeline, and what they must not."""

from __future__ import annotations

import copy
import io
import json
import pickle
import shutil

import accelerate
import pytest
import torch

from metaaux import MetaAuxInverter
from metaaux.export.images import tensor_to_image
from metaaux.hub.loading import component_dtypes, load_component
from metaaux.models.discriminator import DualDiscriminator
from metaaux.models.eg3d import EG3DGenerator
from metaaux.models.weights import ORIGIN, generator_fingerprint

PRECISIONS = [torch.float16, torch.bfloat16]
#: Of the embedded checkpoint: what published inversions carry.
EMBEDDED = "0f5b43ca27f7b60586983dcf3c58c69d5c94d5fa3e6d8a2d4bb5b565c1a7df7c"


def quiet(inverter):
    inverter.set_progress_bar_config(disable=True)
    return inverter


@pytest.fixture
def inverter(tiny_folder):
    return quiet(MetaAuxInverter.from_pretrained(tiny_folder))


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def pixels(inverter, inversion):
    return inverter.render(inversion, yaw=10).tobytes()


class TestFingerprint:
    @pytest.mark.parametrize("asked_before", [False, True])
    @pytest.mark.parametrize("dtype", PRECISIONS)
    def test_moving_to_another_precision(self, inverter, tiny_inverter, tiny_inversion, dtype, asked_before):
        if asked_before:
            _ = inverter.fingerprint
        inverter.to(dtype)
        assert inverter.fingerprint == tiny_inverter.fingerprint
        assert inverter.render(tiny_inversion).size == (32, 32)
        inverter.to(torch.float32)
        assert inverter.fingerprint == tiny_inverter.fingerprint

    @pytest.mark.parametrize(
        "change", [lambda g: g.bfloat16(), lambda g: g.to(dtype=torch.bfloat16), lambda g: g.half()]
    )
    def test_moving_the_generator_alone(self, inverter, tiny_inverter, change):
        change(inverter.generator)
        assert inverter.fingerprint == tiny_inverter.fingerprint

    @pytest.mark.parametrize("variant", ["bf16", "fp16", "other"])
    def test_variants(self, inverter, tiny_inverter, tiny_inversion, tmp_path, variant):
        inverter.save_pretrained(tmp_path, variant=variant)
        loaded = MetaAuxInverter.from_pretrained(tmp_path, variant=variant)
        assert loaded.fingerprint == tiny_inverter.fingerprint
        assert loaded.render(tiny_inversion).size == (32, 32)

    def test_chain_of_precisions(self, inverter, tiny_inverter, tmp_path):
        inverter.save_pretrained(tmp_path / "a", variant="fp16")
        second = MetaAuxInverter.from_pretrained(tmp_path / "a", variant="fp16", dtype=torch.bfloat16)
        second.save_pretrained(tmp_path / "b")
        third = MetaAuxInverter.from_pretrained(tmp_path / "b")
        third.save_pretrained(tmp_path / "c", variant="fp16")
        fourth = MetaAuxInverter.from_pretrained(tmp_path / "c", variant="fp16", dtype="bf16")
        assert {p.fingerprint for p in (second, third, fourth)} == {tiny_inverter.fingerprint}

    def test_checkpoint_without_a_note_of_it(self, folder, tiny_inverter):
        path = folder / "generator" / "config.json"
        config = json.loads(path.read_text())
        assert config.pop(ORIGIN)["fingerprint"] == tiny_inverter.fingerprint
        path.write_text(json.dumps(config))
        for dtype in (torch.float32, *PRECISIONS):
            assert MetaAuxInverter.from_pretrained(folder, dtype=dtype).fingerprint == tiny_inverter.fingerprint

    def test_component_by_itself(self, inverter, tiny_inverter, tmp_path):
        inverter.save_pretrained(tmp_path, variant="bf16")
        generator = load_component(EG3DGenerator, tmp_path / "generator", variant="bf16")
        assert generator_fingerprint(generator) == tiny_inverter.fingerprint

    def test_directions_and_saved_heads_of_a_bfloat16_variant(self, tiny_inversion, inverter, tmp_path):
        from metaaux.models.directions import Direction, LatentDirections

        direction = Direction("smile", "interfacegan", torch.eye(16)[0], 1.0, -2.0, 2.0, None, "")
        inverter.latent_directions = LatentDirections.from_directions([direction], inverter.fingerprint)
        inverter.save_pretrained(tmp_path / "model", variant="bf16")
        tiny_inversion.save(tmp_path / "me.safetensors")
        loaded = MetaAuxInverter.from_pretrained(tmp_path / "model", variant="bf16")
        assert list(loaded.directions) == ["smile"]
        assert loaded.render(loaded.load_inversion(tmp_path / "me.safetensors"), edits={"smile": 1}).size == (32, 32)

    def test_embedded_checkpoint_keeps_its_own(self):
        assert MetaAuxInverter.from_pretrained().fingerprint == EMBEDDED

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_changed_weights_have_another(self, inverter, tiny_inverter, tiny_inversion, tmp_path, dtype):
        inverter.to(dtype)
        assert inverter.fingerprint == tiny_inverter.fingerprint
        with torch.no_grad():
            inverter.generator.backbone.b8.conv0.weight[0, 0, 0, 0] += 1
        changed = inverter.fingerprint
        assert changed != tiny_inverter.fingerprint
        with pytest.raises(ValueError, match="made with the model"):
            inverter.render(tiny_inversion)
        inverter.save_pretrained(tmp_path)
        for other in PRECISIONS:
            assert MetaAuxInverter.from_pretrained(tmp_path, dtype=other).fingerprint == changed

    def test_a_false_note_is_not_believed(self, folder, tiny_inverter):
        path = folder / "generator" / "config.json"
        config = json.loads(path.read_text())
        config[ORIGIN] = {"fingerprint": "0" * 64, "rounded": ["1" * 64]}
        path.write_text(json.dumps(config))
        assert MetaAuxInverter.from_pretrained(folder).fingerprint == tiny_inverter.fingerprint
        for wrong in ([], {"rounded": 3}, {"fingerprint": 5, "rounded": [tiny_inverter.fingerprint]}):
            config[ORIGIN] = wrong
            path.write_text(json.dumps(config))
            loaded = MetaAuxInverter.from_pretrained(folder, dtype=torch.bfloat16)
            assert loaded.fingerprint == tiny_inverter.fingerprint

    @pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel], ids=["compile", "parallel"])
    def test_wrappers(self, inverter, tiny_inverter, wrap):
        assert generator_fingerprint(wrap(inverter.generator)) == tiny_inverter.fingerprint
        inverter.generator.backbone = wrap(inverter.generator.backbone)
        assert generator_fingerprint(inverter.generator) == tiny_inverter.fingerprint

    def test_compiled_generator(self, inverter, tiny_inverter, tiny_inversion, crops, cameras, tmp_path):
        expected = pixels(inverter, tiny_inversion)
        inverter.generator = torch.compile(inverter.generator)
        assert inverter.fingerprint == tiny_inverter.fingerprint and inverter.has_viewpoints
        assert pixels(inverter, tiny_inversion) == expected
        inversion = inverter.invert(crops[1], steps=1, camera=cameras[1])
        assert inversion.fingerprint == tiny_inverter.fingerprint
        inverter.save_pretrained(tmp_path)
        loaded = MetaAuxInverter.from_pretrained(tmp_path)
        assert pixels(loaded, tiny_inversion) == expected and loaded.fingerprint == tiny_inverter.fingerprint

    @pytest.mark.parametrize("variant", [None, "fp16"])
    def test_saving_with_compiled_parts(self, inverter, tiny_inverter, tmp_path, variant):
        inverter.generator.backbone = torch.compile(inverter.generator.backbone)
        inverter.encoder = torch.compile(inverter.encoder)
        inverter.save_pretrained(tmp_path, variant=variant)
        assert "_orig_mod" in next(iter(inverter.encoder.state_dict()))
        loaded = MetaAuxInverter.from_pretrained(tmp_path, variant=variant)
        assert loaded.fingerprint == tiny_inverter.fingerprint

    def test_weights_that_are_kept_elsewhere(self, inverter, tiny_inverter, tmp_path):
        accelerate.cpu_offload(inverter.generator, torch.device("cpu"))
        assert next(inverter.generator.parameters()).is_meta
        assert inverter.fingerprint == tiny_inverter.fingerprint
        with pytest.raises(ValueError, match="the generator's weights are offloaded.*remove_all_hooks"):
            inverter.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())

    def test_compiled_2d_generator_has_one_view(self, tiny_2d_inverter):
        inverter = copy.deepcopy(tiny_2d_inverter)
        inverter.generator = torch.compile(inverter.generator)
        assert not inverter.has_viewpoints and inverter.fingerprint == tiny_2d_inverter.fingerprint


class TestPrecision:
    @pytest.mark.parametrize("dtype", PRECISIONS)
    def test_moved_pipeline_inverts(self, inverter, crops, cameras, dtype):
        inverter.to(dtype)
        dtypes = {name: network.dtype for name, network in inverter.components.items() if network is not None}
        assert dtypes["generator"] == dtypes["discriminator"] == dtype
        assert {dtypes[name] for name in ("encoder", "auxiliary", "identity")} == {torch.float32}
        inversion = inverter.invert(crops[0], steps=1, camera=cameras[0])
        assert inverter.render(inversion, yaw=10).getextrema()[0][1] > 0

    def test_float16_on_a_cpu_is_float32_from_float16_weights(self, inverter, tiny_inversion, tiny_inverter):
        inverter.to(torch.float16)
        image = inverter.render(tiny_inversion)
        reference = tiny_inverter.render(tiny_inversion)
        difference = max(abs(a - b) for a, b in zip(image.tobytes(), reference.tobytes()))
        assert difference <= 2

    def test_float16_is_for_the_super_resolution(self, tiny_components, cameras, monkeypatch):
        generator = copy.deepcopy(tiny_components["generator"]).half()
        seen = {}
        for name in ("backbone", "super_resolution"):
            forward = getattr(generator, name).forward
            monkeypatch.setattr(
                getattr(generator, name),
                "forward",
                lambda *args, name=name, forward=forward: seen.update({name: args}) or forward(*args),
            )
        w = torch.zeros(1, 16)
        generator.synthesize(w, cameras[:1])
        assert torch.float32 in seen["backbone"] and torch.float16 not in seen["backbone"]
        monkeypatch.setattr("metaaux.models.eg3d.half_dtype", lambda network: network.dtype)
        image = generator.synthesize(w, cameras[:1]).image
        assert torch.float16 in seen["super_resolution"] and torch.float16 not in seen["backbone"]
        assert image.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn, "float64", "nonsense", 3])
    def test_others_are_refused_by_name(self, inverter, tiny_folder, dtype):
        name = str(dtype).removeprefix("torch.")
        with pytest.raises(ValueError, match=f"float32, bfloat16 or float16, not in .*{name}"):
            MetaAuxInverter.from_pretrained(tiny_folder, dtype=dtype)
        if isinstance(dtype, torch.dtype):
            with pytest.raises(ValueError, match=f"not in .*{name}"):
                inverter.to(dtype)

    def test_networks_in_the_wrong_precision_are_named(self, inverter, crops, cameras, tiny_inversion):
        inverter.encoder.half()
        with pytest.raises(ValueError, match="the encoder is in float16, but it computes in float32"):
            inverter.invert(crops[0], steps=0, camera=cameras[0])
        inverter.to(torch.float32).generator.double()
        with pytest.raises(ValueError, match="the generator is in float64"):
            inverter.render(tiny_inversion)

    @pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16", "bf16"])
    def test_names(self, name):
        assert component_dtypes(name)["generator"] == torch.bfloat16
        assert component_dtypes("auto") == component_dtypes(None) == component_dtypes(torch.float32)

    def test_older_name_and_devices(self, tiny_folder):
        loaded = MetaAuxInverter.from_pretrained(tiny_folder, torch_dtype="bfloat16", device_map="cpu")
        assert loaded.generator.dtype == torch.bfloat16 and loaded.encoder.dtype == torch.float32
        with pytest.raises(ValueError, match="device_map takes the name of one device.*'balanced'"):
            MetaAuxInverter.from_pretrained(tiny_folder, device_map="balanced")

    def test_overflow_names_the_tensor(self, inverter, tmp_path):
        with torch.no_grad():
            inverter.generator.decoder.out.bias[3] = 1e6
        for change in (lambda: inverter.save_pretrained(tmp_path, variant="fp16"), lambda: inverter.to(torch.float16)):
            with pytest.raises(OverflowError, match="generator: the tensor decoder.out.bias .* too large for float16"):
                change()
        assert not list(tmp_path.iterdir())
        inverter.save_pretrained(tmp_path, variant="bf16")
        with torch.no_grad():
            inverter.generator.decoder.out.bias[3] = torch.nan
        with pytest.raises(ValueError, match="generator: the tensor decoder.out.bias has values that are not finite"):
            inverter.save_pretrained(tmp_path)

    def test_no_picture_of_what_is_not_finite(self):
        for value in (torch.nan, torch.inf):
            image = torch.zeros(3, 4, 4)
            image[0, 1, 1] = value
            with pytest.raises(FloatingPointError, match="not finite"):
                tensor_to_image(image)


class TestSurroundings:
    """Defaults of the process that uses the package."""

    @pytest.fixture(params=["float64", "bfloat16", "meta"])
    def surroundings(self, request):
        if request.param == "meta":  # whatever forgets to name its device gets tensors without values
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, request.param))
        yield
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)

    def test_same_results(self, surroundings, tiny_folder, tiny_inverter, tiny_inversion, crops, cameras, tmp_path):
        inverter = quiet(MetaAuxInverter.from_pretrained(tiny_folder))
        assert {p.dtype for c in inverter.components.values() if c for p in c.parameters()} == {torch.float32}
        assert {p.device.type for c in inverter.components.values() if c for p in c.parameters()} == {"cpu"}
        inversion = inverter.invert(crops[1], steps=2, camera=cameras[1], flip=True)
        inversion = inverter.invert(crops[1], steps=2, camera=cameras[1].tolist())
        assert torch.equal(inversion.w, tiny_inversion.w)
        assert [step["total"] for step in inversion.steps] == [step["total"] for step in tiny_inversion.steps]
        inversion.save(tmp_path / "me.safetensors")
        loaded = inverter.load_inversion(tmp_path / "me.safetensors")
        assert pixels(inverter, loaded) == pixels(tiny_inverter, tiny_inversion)
        assert len(inverter.orbit(loaded, frames=2)) == 2
        inverter.save_pretrained(tmp_path / "model")
        assert MetaAuxInverter.from_pretrained(tmp_path / "model").fingerprint == tiny_inverter.fingerprint


class TestCopies:
    @pytest.fixture
    def used(self, inverter, tiny_inversion):
        inverter.render(tiny_inversion)
        _ = inverter.fingerprint, inverter.aligner
        return inverter

    @pytest.mark.parametrize("way", ["deepcopy", "copy", "pickle", "torch.save"])
    def test_used_pipelines(self, used, tiny_inversion, way):
        if way == "torch.save":
            data = io.BytesIO()
            torch.save(used, data)
            data.seek(0)
            other = torch.load(data, weights_only=False)
        else:
            ways = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda p: pickle.loads(pickle.dumps(p))}
            other = ways[way](used)
        quiet(other)
        assert pixels(other, tiny_inversion) == pixels(used, tiny_inversion)
        assert other.fingerprint == used.fingerprint and other.config == used.config
        assert other.aligner is not used.aligner and other.aligner.crop_scale == used.aligner.crop_scale
        if way != "copy":
            with torch.no_grad():
                other.generator.decoder.out.bias += 1
            assert other.fingerprint != used.fingerprint

    def test_deepcopy_of_a_copy_in_bfloat16(self, used, tiny_inverter):
        assert copy.deepcopy(used.to(torch.bfloat16)).fingerprint == tiny_inverter.fingerprint


class MyInverter(MetaAuxInverter):
    """A user's own pipeline."""


class MyDiscriminator(DualDiscriminator):
    """A user's own network."""


class TestSubclasses:
    def test_of_the_pipeline(self, tiny_components, tiny_inverter, tiny_inversion, tmp_path):
        MyInverter(**tiny_components, inner_steps=3).save_pretrained(tmp_path)
        assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "MetaAuxInverter"
        for cls in (MetaAuxInverter, MyInverter):
            loaded = quiet(cls.from_pretrained(tmp_path))
            assert type(loaded) is cls and loaded.config.inner_steps == 3
            assert pixels(loaded, tiny_inversion) == pixels(tiny_inverter, tiny_inversion)
        MyInverter.from_pretrained(tmp_path).save_pretrained(tmp_path / "again", variant="fp16")
        assert MetaAuxInverter.from_pretrained(tmp_path / "again", variant="fp16").config.inner_steps == 3

    def test_of_a_component(self, tiny_components, tiny_folder, tmp_path):
        own = MyDiscriminator(**{k: v for k, v in tiny_components["discriminator"].config.items() if k[0] != "_"})
        inverter = MetaAuxInverter(**{**tiny_components, "discriminator": own.eval()})
        with pytest.raises(
            ValueError, match=r"discriminator is a .*MyDiscriminator.*weights into a DualDiscriminator"
        ):
            inverter.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())
        loaded = MetaAuxInverter.from_pretrained(tiny_folder, discriminator=own)
        assert loaded.discriminator is own and not any(p.requires_grad for p in own.parameters())


class TestSaving:
    def test_over_the_folder_it_was_loaded_from(self, folder, tiny_inverter, tiny_inversion):
        inverter = quiet(MetaAuxInverter.from_pretrained(folder))
        expected = pixels(inverter, tiny_inversion)
        inverter.save_pretrained(folder, max_shard_size="60KB")
        assert not (folder / "generator" / "diffusion_pytorch_model.safetensors").exists()
        inverter.save_pretrained(folder, variant="fp16")
        inverter.save_pretrained(folder)
        assert not list((folder / "generator").glob("*-of-*")) and not list(folder.glob(".*"))
        assert sorted(path.name for path in (folder / "generator").iterdir()) == [
            "config.json",
            "diffusion_pytorch_model.fp16.safetensors",
            "diffusion_pytorch_model.safetensors",
        ]
        assert pixels(quiet(MetaAuxInverter.from_pretrained(folder)), tiny_inversion) == expected

    def test_an_error_leaves_the_older_one(self, folder, tiny_inverter, monkeypatch):
        inverter = MetaAuxInverter.from_pretrained(folder)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        monkeypatch.setattr(
            type(inverter.identity), "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(OSError(28))
        )
        with pytest.raises(OSError):
            inverter.save_pretrained(folder)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
