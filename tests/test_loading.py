"""`MetaAuxInverter`: importing, loading, saving, the embedded model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from metaaux import MetaAuxInverter
from metaaux.hub.loading import load_component
from metaaux.models.encoder import LatentEncoder
from metaaux.models.psp import PSPEncoder
from tests import warm

ROOT = Path(__file__).resolve().parent.parent


class TestImport:
    def test_importing_the_package_loads_no_framework(self):
        heavy = "{'torch', 'diffusers', 'transformers', 'mediapipe', 'gradio'}"
        code = f"import sys, metaaux; print(sorted({heavy} & set(sys.modules)))"
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert result.stdout.strip() == "[]"

    def test_public_names(self):
        import metaaux

        assert {"Head", "Inversion", "InversionFileError", "MetaAuxInverter"} <= set(dir(metaaux))
        with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
            metaaux.Nonsense  # noqa: B018


class TestLoading:
    def test_round_trip(self, tiny_components, tiny_folder, tmp_path):
        loaded = MetaAuxInverter.from_pretrained(tiny_folder)
        loaded.save_pretrained(tmp_path)
        again = MetaAuxInverter.from_pretrained(tmp_path)
        for name, component in tiny_components.items():
            state = getattr(again, name).state_dict()
            assert all(torch.equal(tensor, state[key]) for key, tensor in component.state_dict().items()), name
        assert again.fingerprint == loaded.fingerprint
        assert again.config.inner_steps == 5 and again.config.weight_identity == 0.1

    def test_saved_configurations_hold_no_path(self, tiny_folder, tmp_path):
        MetaAuxInverter.from_pretrained(tiny_folder).save_pretrained(tmp_path)
        written = list(tmp_path.rglob("*.json"))
        assert len(written) > 5
        assert not [path for path in written if str(tiny_folder) in path.read_text()]

    def test_components_are_ready_for_inference(self, tiny_inverter):
        for component in tiny_inverter.components.values():
            if component is not None:
                assert not component.training
                assert not any(parameter.requires_grad for parameter in component.parameters())

    def test_settings_are_saved(self, tiny_components, tmp_path):
        MetaAuxInverter(**tiny_components, inner_steps=3, crop_scale=0.93).save_pretrained(tmp_path)
        loaded = MetaAuxInverter.from_pretrained(tmp_path)
        assert (loaded.config.inner_steps, loaded.config.crop_scale) == (3, 0.93)
        assert loaded.aligner.crop_scale == 0.93 and loaded.aligner.image_size == 32

    def test_half_precision_files_load_as_float32(self, tiny_folder, tmp_path):
        halved = MetaAuxInverter.from_pretrained(tiny_folder)
        for component in halved.components.values():
            if component is not None:
                component.half()
        halved.save_pretrained(tmp_path)
        loaded = MetaAuxInverter.from_pretrained(tmp_path)
        assert {p.dtype for c in loaded.components.values() if c for p in c.parameters()} == {torch.float32}
        # The precision of the file makes another model of it no more than loading it in half precision does.
        assert loaded.fingerprint == halved.fingerprint == MetaAuxInverter.from_pretrained(tiny_folder).fingerprint

    def test_variant(self, tiny_components, tmp_path):
        MetaAuxInverter(**tiny_components).save_pretrained(tmp_path, variant="fp16")
        assert list(tmp_path.glob("generator/*.fp16.safetensors"))
        assert MetaAuxInverter.from_pretrained(tmp_path, variant="fp16").generator.num_ws == 6

    def test_bfloat16_is_for_generator_and_discriminator(self, tiny_folder, crops, cameras):
        inverter = MetaAuxInverter.from_pretrained(tiny_folder, dtype=torch.bfloat16)
        inverter.set_progress_bar_config(disable=True)
        assert {name: c.dtype for name, c in inverter.components.items() if c} == {
            "generator": torch.bfloat16,
            "discriminator": torch.bfloat16,
            "encoder": torch.float32,
            "auxiliary": torch.float32,
            "identity": torch.float32,
        }
        inversion = inverter.invert(crops[0], steps=1, camera=cameras[0])
        assert inverter.render(inversion, yaw=10).size == (32, 32)

    def test_pickles_are_not_read(self, tiny_folder, tmp_path):
        folder = tmp_path / "model"
        shutil.copytree(tiny_folder, folder)
        weights = folder / "encoder" / "diffusion_pytorch_model.safetensors"
        torch.save({}, weights.with_suffix(".bin"))
        weights.unlink()
        with pytest.raises(OSError, match="safetensors"):
            MetaAuxInverter.from_pretrained(folder)
        with pytest.raises(ValueError, match="pickles"):
            MetaAuxInverter.from_pretrained(tiny_folder, use_safetensors=False)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"encoder": ["os", "PathLike"]}, "names 'os' as the module of encoder"),
            ({"surprise": ["metaaux_evil", "Model"]}, "names 'metaaux_evil'"),
            ({"_class_name": "StableDiffusionPipeline"}, "holds no MetaAuxInverter"),
        ],
    )
    def test_foreign_pipelines_are_refused(self, tiny_folder, tmp_path, change, match):
        folder = tmp_path / "model"
        shutil.copytree(tiny_folder, folder)
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(ValueError, match=match):
            MetaAuxInverter.from_pretrained(folder)

    @pytest.mark.parametrize(
        "entry",
        [
            ["metaaux.models.eg3d", "torch"],
            ["metaaux.models.eg3d", "TriPlaneDecoder"],
            ["metaaux.models.eg3d", "ModelMixin"],
            ["metaaux.models.eg3d", 3],
        ],
    )
    def test_what_is_no_network_is_refused(self, tiny_folder, tmp_path, entry):
        folder = shutil.copytree(tiny_folder, tmp_path / "model")
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {"generator": entry}))
        with pytest.raises(ValueError, match="as generator, which is no network"):
            MetaAuxInverter.from_pretrained(folder)

    @pytest.mark.parametrize(
        ("text", "match"),
        [("[" * 100_000, "not valid JSON"), ("3", "holds a int"), ("x" * (2**23 + 1), "larger than 8 MiB")],
        ids=["deep", "number", "large"],
    )
    def test_damaged_index(self, tiny_folder, tmp_path, text, match):
        folder = shutil.copytree(tiny_folder, tmp_path / "model")
        (folder / "model_index.json").write_text(text)
        with pytest.raises(ValueError, match=match):
            MetaAuxInverter.from_pretrained(folder)

    def test_proxies_are_for_the_environment(self, tiny_folder):
        with pytest.raises(ValueError, match="set HTTPS_PROXY"):
            MetaAuxInverter.from_pretrained(tiny_folder, proxies={"https": "localhost:1"})

    def test_settings_in_place_of_the_checkpoints(self, tiny_folder, tiny_components):
        loaded = MetaAuxInverter.from_pretrained(
            tiny_folder, inner_steps=2, low_cpu_mem_usage=False, encoder=tiny_components["encoder"]
        )
        assert loaded.config.inner_steps == 2 and loaded.encoder is tiny_components["encoder"]

    def test_empty_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no model_index.json"):
            MetaAuxInverter.from_pretrained(tmp_path)


class TestComponent:
    """`load_component`: one network from one folder."""

    @pytest.fixture
    def folder(self, tiny_folder, tmp_path):
        return Path(shutil.copytree(tiny_folder / "encoder", tmp_path / "my encoder ü"))

    def test_loads_for_inference(self, folder, tiny_components):
        network = load_component(LatentEncoder, folder)
        assert type(network) is LatentEncoder and not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
        expected = tiny_components["encoder"].state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())

    def test_trainable(self, folder):
        network = load_component(LatentEncoder, folder, trainable=True)
        assert network.training and all(parameter.requires_grad for parameter in network.parameters())

    def test_parameters_made_in_inference_mode_are_ordinary(self, folder):
        with torch.inference_mode():
            network = load_component(LatentEncoder, folder)
        assert not any(parameter.is_inference() for parameter in network.parameters())

    def test_precision_is_the_one_asked_for(self, folder):
        load_component(LatentEncoder, folder).half().save_pretrained(folder, variant="fp16")
        assert load_component(LatentEncoder, folder, variant="fp16").dtype == torch.float32
        assert load_component(LatentEncoder, folder, dtype=torch.bfloat16).dtype == torch.bfloat16
        torch.set_default_dtype(torch.float64)
        try:
            assert load_component(LatentEncoder, folder).dtype == torch.float32
        finally:
            torch.set_default_dtype(torch.float32)

    def test_unknown_arguments(self, folder):
        with pytest.raises(TypeError, match="takes no torch_dtype"):
            load_component(LatentEncoder, folder, torch_dtype=torch.float16)

    def test_one_of_several_classes(self, folder):
        assert type(load_component((PSPEncoder, LatentEncoder), str(folder))) is LatentEncoder
        with pytest.raises(ValueError, match="holds a LatentEncoder, expected PSPEncoder"):
            load_component(PSPEncoder, folder)

    @pytest.mark.parametrize(
        "path", ["someone/absent", "absent", "./absent", "../a/b", "C:\\models\\encoder", "~/absent/x"]
    )
    def test_missing_folders_are_never_asked_of_the_hub(self, path, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
        for missing in (path, Path(path)):
            with pytest.raises(FileNotFoundError, match="there is no folder"):
                load_component(LatentEncoder, missing)
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            load_component(LatentEncoder, Path(path), allow_hub=True)

    def test_home_folder(self, folder, monkeypatch):
        monkeypatch.setenv("HOME", str(folder.parent))
        assert load_component(LatentEncoder, f"~/{folder.name}").config.w_dim == 16

    def test_pickles_are_not_read(self, folder):
        weights = folder / "diffusion_pytorch_model.safetensors"
        torch.save(load_component(LatentEncoder, folder).state_dict(), weights.with_suffix(".bin"))
        weights.unlink()
        with pytest.raises(FileNotFoundError, match="lacks diffusion_pytorch_model.safetensors.*pickles"):
            load_component(LatentEncoder, folder)

    def test_missing_variant(self, folder):
        with pytest.raises(
            FileNotFoundError, match="lacks .*model.fp16.safetensors; it has diffusion_pytorch_model.saf"
        ):
            load_component(LatentEncoder, folder, variant="fp16")

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda state: state.pop("to_offset.weight"), "missing_keys.*to_offset.weight"),
            (lambda state: state.update(other=torch.zeros(1)), "unexpected_keys.*other"),
            (
                lambda state: state.update({"to_offset.weight": torch.zeros(2, 3)}),
                "do not fit together.*to_offset.weight",
            ),
            (
                lambda state: state["to_offset.weight"].fill_(torch.nan),
                "to_offset.weight has values that are not finite",
            ),
        ],
    )
    def test_weights_that_do_not_fit(self, folder, change, match):
        path = folder / "diffusion_pytorch_model.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path, {"format": "pt"})
        with pytest.raises(ValueError, match=match):
            load_component(LatentEncoder, folder)

    def test_too_large_for_half_precision(self, folder):
        path = folder / "diffusion_pytorch_model.safetensors"
        state = load_file(path)
        state["to_offset.weight"][0, 0] = 1e5
        save_file(state, path, {"format": "pt"})
        assert load_component(LatentEncoder, folder, dtype=torch.bfloat16).dtype == torch.bfloat16
        with pytest.raises(OverflowError, match="to_offset.weight has values up to 1e.05, too large for float16"):
            load_component(LatentEncoder, folder, dtype=torch.float16)

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("[" * 100_000, "not valid JSON"),
            ("[]", "holds a list"),
            (b"\xff{}", "not valid JSON"),
            ('{"a": "' + "x" * 2**23 + '"}', "larger than 8 MiB"),
        ],
        ids=["deep", "list", "bytes", "large"],
    )
    def test_damaged_configuration(self, folder, text, match):
        (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=match):
            load_component(LatentEncoder, folder)


class TestHub:
    """Loading by Hub id, from a cache filled as `huggingface_hub` fills it: no network."""

    COMMIT = "0" * 40

    def fill_cache(self, folder, cache):
        repository = cache / "models--someone--some-model"
        shutil.copytree(folder, repository / "snapshots" / self.COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(self.COMMIT)
        return repository / "snapshots" / self.COMMIT

    def test_from_the_cache(self, tiny_folder, tmp_path, crops, cameras):
        snapshot = self.fill_cache(tiny_folder, tmp_path)
        options = {"cache_dir": tmp_path, "local_files_only": True}
        assert Path(MetaAuxInverter.download("someone/some-model", **options)) == snapshot
        inverter = MetaAuxInverter.from_pretrained("someone/some-model", **options)
        inverter.set_progress_bar_config(disable=True)
        assert inverter.invert(crops[0], steps=0, camera=cameras[0]).model == "someone/some-model"

    def test_a_foreign_pipeline_in_the_cache(self, tiny_folder, tmp_path):
        snapshot = self.fill_cache(tiny_folder, tmp_path)
        index = json.loads((snapshot / "model_index.json").read_text())
        (snapshot / "model_index.json").write_text(json.dumps(index | {"encoder": ["subprocess", "Popen"]}))
        with pytest.raises(ValueError, match="names 'subprocess'"):
            MetaAuxInverter.from_pretrained("someone/some-model", cache_dir=tmp_path, local_files_only=True)

    def test_unknown_repository(self, tmp_path):
        with pytest.raises(LocalEntryNotFoundError):
            MetaAuxInverter.from_pretrained("someone/absent", cache_dir=tmp_path, local_files_only=True)


class TestEmbeddedModel:
    def test_loads_and_inverts_offline(self, tmp_path):
        """The default model works without a network: every attempt to open a socket fails."""
        script = tmp_path / "script.py"
        script.write_text("""
import socket
def refuse(*args, **kwargs):
    raise AssertionError("the network was used")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import skimage.data, sys
from metaaux import MetaAuxInverter
inverter = MetaAuxInverter.from_pretrained()
assert not {"mediapipe", "gradio", "trimesh"} & set(sys.modules), "what was not used yet was loaded"
inverter.set_progress_bar_config(disable=True)
inversion = inverter.invert(skimage.data.astronaut(), steps=1)
assert inverter.render(inversion, yaw=15).size == (inverter.generator.config.image_size,) * 2
print(inversion.model, inversion.steps[-1]["mse"] < inversion.steps[0]["mse"])
""")
        process = warm.Popen([script], stdout=subprocess.PIPE, cwd=ROOT)
        assert process.communicate()[0].split() == [b"metaaux-mini", b"True"]
        assert process.returncode == 0

    def test_size(self):
        files = list((ROOT / "hub_configs" / "metaaux-mini").rglob("*.safetensors"))
        assert files and sum(file.stat().st_size for file in files) <= 64e6
        assert max(file.stat().st_size for file in files) <= 16 * 2**20
