"""Loading from and publishing to a Hub: real HTTP on the loopback interface, in both directions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import WORKER, LoopbackHub

from metaaux import MetaAuxInverter
from metaaux.hub.loading import check_components
from metaaux.hub.publishing import files_to_push

ROOT = Path(__file__).resolve().parent.parent
REPO = "someone/some-model"


class HubError(Exception):
    """An error that code in the other interpreter raised; `kinds` are the names of its classes."""

    def __init__(self, kinds, message):
        super().__init__(message)
        self.kinds = kinds


class Client:
    """An interpreter whose Hub is the loopback one: huggingface_hub reads HF_ENDPOINT when it is imported."""

    def __init__(self, address, home, **environment):
        environment = {
            "HF_ENDPOINT": address,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(ROOT),
            **environment,
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=kept | environment,
        )

    def __call__(self, code):
        """Runs code there; returns its variable `result`, or raises HubError."""
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        reply = json.loads(self.process.stdout.readline())
        if "kinds" in reply:
            raise HubError(reply["kinds"], reply["message"])
        return reply["result"]

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server():
    server = LoopbackHub()
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    client = Client(server.address, tmp_path_factory.mktemp("home"))
    yield client
    client.close()


@pytest.fixture
def hub(server):
    server.reset()
    return server


@pytest.fixture(scope="module")
def variants_folder(tiny_inverter, tmp_path_factory):
    """The tiny pipeline in its own precision and as fp16, side by side."""
    folder = tmp_path_factory.mktemp("variants")
    tiny_inverter.save_pretrained(folder)
    tiny_inverter.save_pretrained(folder, variant="fp16")
    return folder


def load(cache, options="", show="pipeline.fingerprint", repo=REPO):
    return f"""
pipeline = MetaAuxInverter.from_pretrained({repo!r}, cache_dir={str(cache)!r}{options})
result = {show}
"""


def weights(names):
    return {name for name in names if name.endswith(".safetensors")}


class TestDownload:
    def test_pipeline(self, hub, client, variants_folder, tiny_inverter, tmp_path):
        hub.publish(variants_folder, REPO)
        remote = {"pipeline.py": b"raise SystemExit", "generator/diffusion_pytorch_model.bin": b"pickle"}
        hub.repositories[REPO]["main"] |= remote
        show = "[pipeline.fingerprint, pipeline.name_or_path, str(pipeline.generator.dtype), pipeline.card]"
        fingerprint, name, dtype, card = client(load(tmp_path, show=show))
        assert (fingerprint, name, dtype) == (tiny_inverter.fingerprint, REPO, "torch.float32")
        assert card == (variants_folder / "README.md").read_text()
        components = ("generator", "encoder", "auxiliary", "discriminator", "identity")
        assert weights(hub.served) == {f"{c}/diffusion_pytorch_model.safetensors" for c in components}
        assert not any(name.endswith((".py", ".bin")) for name in hub.served)

    def test_variant_has_half_the_bytes(self, hub, client, variants_folder, tiny_inverter, tmp_path):
        hub.publish(variants_folder, REPO)
        assert client(load(tmp_path, ', variant="fp16"')) == tiny_inverter.fingerprint
        assert all(".fp16." in name for name in weights(hub.served))
        files = hub.repositories[REPO]["main"]
        for name in weights(hub.served):
            plain = files[name.replace(".fp16", "")]
            # Headers have the same length but for the type's name.
            header = 2 * (8 + int.from_bytes(files[name][:8], "little"))
            assert len(files[name]) <= len(plain) / 2 + header

    def test_a_component_without_the_variant_comes_as_it_is(self, hub, client, variants_folder, tmp_path):
        hub.publish(variants_folder, REPO)
        files = hub.repositories[REPO]["main"]
        for name in [name for name in files if name.endswith("model.safetensors") and not name.startswith("encoder")]:
            del files[name]
        del files["encoder/diffusion_pytorch_model.fp16.safetensors"]
        client(load(tmp_path, ', variant="fp16"'))
        assert weights(hub.served) == weights(files)

    def test_revision(self, hub, client, variants_folder, tiny_inverter, tmp_path):
        hub.publish(variants_folder, REPO, revision="v1")
        hub.repositories[REPO]["main"] = {"README.md": b"empty"}
        assert client(load(tmp_path, ', revision="v1"')) == tiny_inverter.fingerprint
        with pytest.raises(HubError, match="has no revision 'v2'") as caught:
            client(load(tmp_path, ', revision="v2"'))
        assert "OSError" in caught.value.kinds
        with pytest.raises(HubError, match="no model_index.json"):
            client(load(tmp_path))

    def test_subfolder(self, hub, client, variants_folder, tiny_inverter, tmp_path):
        hub.publish(variants_folder, REPO, prefix="v1.0/small/")
        hub.publish(variants_folder, REPO, prefix="other/")
        assert client(load(tmp_path, ', subfolder="v1.0/small"')) == tiny_inverter.fingerprint
        assert hub.served and all(name.startswith("v1.0/small/") for name in hub.served)

    def test_local_subfolder(self, variants_folder, tiny_inverter):
        loaded = MetaAuxInverter.from_pretrained(variants_folder.parent, subfolder=variants_folder.name)
        assert loaded.fingerprint == tiny_inverter.fingerprint

    def test_token(self, hub, client, variants_folder, tiny_inverter, tmp_path):
        hub.publish(variants_folder, REPO)
        hub.token = "secret"
        with pytest.raises(HubError, match=f"no repository {REPO} on the Hub, or it is private: pass token"):
            client(load(tmp_path))
        assert client(load(tmp_path, ', token="secret"')) == tiny_inverter.fingerprint

    def test_local_files_only(self, hub, client, variants_folder, tiny_inverter, tmp_path):
        hub.publish(variants_folder, REPO)
        with pytest.raises(HubError) as caught:
            client(load(tmp_path, ", local_files_only=True"))
        assert "LocalEntryNotFoundError" in caught.value.kinds and hub.requests == []
        client(load(tmp_path))
        hub.requests.clear()
        assert client(load(tmp_path, ", local_files_only=True")) == tiny_inverter.fingerprint
        assert hub.requests == []

    def test_second_load_sends_no_file_again(self, hub, client, variants_folder, tmp_path):
        hub.publish(variants_folder, REPO)
        client(load(tmp_path))
        hub.served.clear()
        client(load(tmp_path))
        assert hub.served == []

    @pytest.mark.parametrize("subfolder", ["..", "small/../../other", "C:\\\\other"])
    def test_subfolders_lie_inside(self, hub, client, tiny_folder, tmp_path, subfolder):
        with pytest.raises(HubError, match="subfolder must lie inside"):
            client(load(tmp_path, f", subfolder={subfolder!r}"))
        with pytest.raises(ValueError, match="subfolder must lie inside"):
            MetaAuxInverter.from_pretrained(tiny_folder, subfolder=subfolder)

    def test_subfolder_with_the_other_separator(self, hub, client, variants_folder, tiny_inverter, tmp_path):
        hub.publish(variants_folder, REPO, prefix="v1/small/")
        assert client(load(tmp_path, ', subfolder="v1\\\\small"')) == tiny_inverter.fingerprint

    def test_gated(self, hub, client, variants_folder, tmp_path):
        hub.publish(variants_folder, REPO)
        hub.gated = True
        with pytest.raises(HubError, match=f"{REPO} is gated: accept its terms on the Hub") as caught:
            client(load(tmp_path))
        assert "OSError" in caught.value.kinds

    def test_missing_variant(self, hub, client, tiny_folder, tmp_path):
        hub.publish(tiny_folder, REPO)
        with pytest.raises(HubError, match="has no weights of the variant 'fp16'") as caught:
            client(load(tmp_path, ', variant="fp16"'))
        assert "FileNotFoundError" in caught.value.kinds

    @pytest.mark.parametrize(
        "name", ["/no/such/model", "./model", "../a/b", "model", "C:\\\\models\\\\mini", "~/models/x"]
    )
    def test_missing_folders_are_not_asked_of_the_hub(self, hub, client, tmp_path, name):
        with pytest.raises(HubError, match="neither a valid local path nor a valid repo id") as caught:
            client(f"MetaAuxInverter.from_pretrained({name!r})")
        assert "FileNotFoundError" in caught.value.kinds and hub.requests == []

    def test_path_objects_are_folders(self, hub, client, variants_folder):
        hub.publish(variants_folder, REPO)
        with pytest.raises(HubError, match="neither a valid local path") as caught:
            client(f"MetaAuxInverter.from_pretrained(Path({REPO!r}))")
        assert "FileNotFoundError" in caught.value.kinds and hub.requests == []

    def test_folders_with_other_names(self, hub, client, variants_folder, tiny_inverter, tmp_path, monkeypatch):
        hub.publish(variants_folder, REPO)
        place = tmp_path / "modèles и more"
        assert client(load(place, ", revision=None")) == tiny_inverter.fingerprint
        (tmp_path / "link").symlink_to(variants_folder, target_is_directory=True)
        assert MetaAuxInverter.from_pretrained(tmp_path / "link").fingerprint == tiny_inverter.fingerprint
        monkeypatch.setenv("HOME", str(tmp_path))
        tiny_inverter.save_pretrained("~/my model")
        assert MetaAuxInverter.from_pretrained("~/my model").fingerprint == tiny_inverter.fingerprint

    def test_component(self, hub, client, tiny_folder, tmp_path):
        """A network that is a repository of its own, read where a Hub id is allowed and nowhere else."""
        hub.publish(tiny_folder / "encoder", "someone/encoder")
        hub.repositories["someone/encoder"]["main"]["x.bin"] = b"pickle"
        code = """
from metaaux.hub.loading import load_component
from metaaux.models.encoder import LatentEncoder
result = load_component(LatentEncoder, "someone/encoder", cache_dir={cache!r}, {option}).config.w_dim
"""
        with pytest.raises(HubError, match="there is no folder someone/encoder") as caught:
            client(code.format(cache=str(tmp_path), option=""))
        assert "FileNotFoundError" in caught.value.kinds and hub.requests == []
        assert client(code.format(cache=str(tmp_path), option="allow_hub=True")) == 16
        assert set(hub.served) == {"config.json", "diffusion_pytorch_model.safetensors"}
        hub.requests.clear()
        assert client(code.format(cache=str(tmp_path), option="allow_hub=True, local_files_only=True")) == 16
        assert hub.requests == []

    def test_unknown_repository(self, hub, client, tmp_path):
        with pytest.raises(HubError, match=f"no repository {REPO} on the Hub") as caught:
            client(load(tmp_path))
        assert "OSError" in caught.value.kinds

    def test_offline(self, hub, variants_folder, client, tiny_inverter, tmp_path):
        hub.publish(variants_folder, REPO)
        client(load(tmp_path))
        hub.requests.clear()
        offline = Client(hub.address, tmp_path / "home", HF_HUB_OFFLINE="1")
        try:
            assert offline(load(tmp_path)) == tiny_inverter.fingerprint
            with pytest.raises(HubError, match="someone/absent is not in the cache") as caught:
                offline(load(tmp_path, repo="someone/absent"))
            with pytest.raises(HubError, match="could not be published"):
                offline(f"MetaAuxInverter.from_pretrained({str(variants_folder)!r}).push_to_hub({REPO!r}, token='t')")
        finally:
            offline.close()
        assert "OSError" in caught.value.kinds
        assert hub.requests == []


class TestFailures:
    GENERATOR = "generator/diffusion_pytorch_model.safetensors"

    def blobs(self, cache):
        return [path for path in cache.rglob("blobs/*") if not path.name.endswith(".incomplete")]

    def test_connection_breaks_off(self, hub, client, variants_folder, tiny_inverter, tmp_path):
        hub.publish(variants_folder, REPO)
        hub.break_off[self.GENERATOR] = 1000
        with pytest.raises(HubError, match=f"{REPO} could not be downloaded") as caught:
            client("import huggingface_hub.file_download as f, time; time.sleep = lambda s: None\n" + load(tmp_path))
        assert "OSError" in caught.value.kinds
        data = hub.repositories[REPO]["main"]
        assert all(path.read_bytes() in data.values() for path in self.blobs(tmp_path))
        hub.break_off.clear()
        assert client(load(tmp_path)) == tiny_inverter.fingerprint

    def test_damaged_on_the_way(self, hub, client, variants_folder, tiny_inverter, tmp_path):
        hub.publish(variants_folder, REPO)
        hub.damage.add(self.GENERATOR)
        with pytest.raises(HubError, match=f"{self.GENERATOR} of {REPO} is damaged.*removed from the cache") as caught:
            client(load(tmp_path))
        assert "OSError" in caught.value.kinds
        hub.damage.clear()
        hub.served.clear()
        assert client(load(tmp_path)) == tiny_inverter.fingerprint
        assert weights(hub.served) == {self.GENERATOR}

    def test_damaged_on_the_hub(self, hub, client, variants_folder, tmp_path):
        hub.publish(variants_folder, REPO)
        files = hub.repositories[REPO]["main"]
        files[self.GENERATOR] = files[self.GENERATOR][:-100]
        with pytest.raises(HubError, match=self.GENERATOR) as caught:
            client(load(tmp_path))
        assert "OSError" in caught.value.kinds

    @pytest.mark.parametrize(
        ("name", "match"),
        [
            ("identity/config.json", "lacks the component identity"),
            ("identity/diffusion_pytorch_model.safetensors", "lacks the weights of identity"),
        ],
    )
    def test_component_missing(self, hub, client, tiny_folder, tmp_path, name, match):
        hub.publish(tiny_folder, REPO)
        del hub.repositories[REPO]["main"][name]
        with pytest.raises(HubError, match=f"{REPO} {match}") as caught:
            client(load(tmp_path))
        assert "FileNotFoundError" in caught.value.kinds

    def test_another_pipeline_costs_no_weights(self, hub, client, tiny_folder, tmp_path):
        hub.publish(tiny_folder, REPO)
        files = hub.repositories[REPO]["main"]
        files["model_index.json"] = files["model_index.json"].replace(b"MetaAuxInverter", b"OtherPipeline")
        with pytest.raises(HubError, match="holds no MetaAuxInverter"):
            client(load(tmp_path))
        assert not weights(hub.served)

    def test_configuration_without_weights(self):
        folder = ROOT / "hub_configs" / "metaaux-ffhq"
        with pytest.raises(FileNotFoundError, match="is a configuration without weights"):
            MetaAuxInverter.from_pretrained(folder)


class TestPublish:
    def test_round_trip(self, hub, client, tiny_folder, tiny_inverter, tiny_inversion, tmp_path):
        """save → push → from_pretrained by id → the same picture."""
        tiny_inversion.save(tmp_path / "me.safetensors")
        address = client(f"""
pipeline = MetaAuxInverter.from_pretrained({str(tiny_folder)!r})
pipeline.card += "[Terms](LICENSE)\\n"
pipeline.card_files = {{"LICENSE": b"terms"}}
result = pipeline.push_to_hub({REPO!r}, license="other", base_models=["someone/base"], tags=["portraits"],
                              figures={{"mean squared error": 0.0123}}, max_shard_size="15MB", token="t")
""")
        assert address.startswith(f"{hub.address}/{REPO}/commit/")
        files = hub.repositories[REPO]["main"]
        assert "generator/diffusion_pytorch_model.fp16.safetensors" in files
        _, front, text = files["README.md"].decode().split("---\n", 2)
        front = yaml.safe_load(front)
        assert front["library_name"] == "diffusers" and front["license"] == "other"
        assert front["base_model"] == ["someone/base"]
        assert {"3d-gan-inversion", "faces", "portraits"} <= set(front["tags"])
        assert "from_pretrained" in text and "| mean squared error | 0.0123 |" in text
        assert f"`{tiny_inverter.fingerprint}`" in text
        assert files["LICENSE"] == b"terms"

        for options in ("", ', variant="fp16"'):
            code = (
                load(tmp_path / "cache", options, show="None")
                + f"""
inversion = pipeline.load_inversion({str(tmp_path / "me.safetensors")!r})
result = pipeline.render(inversion, yaw=10).tobytes().hex()
"""
            )
            pixels = client(code)
            assert next((tmp_path / "cache").rglob("LICENSE")).read_bytes() == b"terms"
            if not options:
                assert pixels == tiny_inverter.render(tiny_inversion, yaw=10).tobytes().hex()

    def test_revision_and_subfolder(self, hub, client, tiny_folder, tiny_inverter, tmp_path):
        hub.repositories[REPO] = {"main": {"README.md": b"old"}}
        client(f"""
pipeline = MetaAuxInverter.from_pretrained({str(tiny_folder)!r})
pipeline.push_to_hub({REPO!r}, revision="next", subfolder="small", variants=[None], token="t")
""")
        assert hub.repositories[REPO]["main"] == {"README.md": b"old"}
        loaded = client(load(tmp_path, ', revision="next", subfolder="small"'))
        assert loaded == tiny_inverter.fingerprint

    def test_refused(self, hub, client, tiny_folder):
        hub.refuse_commits = True
        with pytest.raises(HubError, match="could not be published.*nothing was committed") as caught:
            client(f"MetaAuxInverter.from_pretrained({str(tiny_folder)!r}).push_to_hub({REPO!r}, token='t')")
        assert "OSError" in caught.value.kinds
        assert hub.repositories[REPO]["main"] == {}


class TestFolders:
    def test_shards(self, tiny_inverter, tiny_inversion, tmp_path):
        tiny_inverter.save_pretrained(tmp_path, max_shard_size="60KB")
        shards = sorted((tmp_path / "generator").glob("*-of-*.safetensors"))
        assert len(shards) > 1
        assert all(path.stat().st_size <= 80_000 for path in shards)
        loaded = MetaAuxInverter.from_pretrained(tmp_path)
        assert loaded.render(tiny_inversion).tobytes() == tiny_inverter.render(tiny_inversion).tobytes()
        shards[0].unlink()
        with pytest.raises(FileNotFoundError, match=f"lacks generator/{shards[0].name}"):
            MetaAuxInverter.from_pretrained(tmp_path)

    def test_half_precision_file(self, variants_folder, tiny_inverter):
        loaded = MetaAuxInverter.from_pretrained(variants_folder, variant="fp16")
        assert loaded.fingerprint == tiny_inverter.fingerprint
        # Saving as fp16 left the pipeline's own weights alone.
        assert str(tiny_inverter.generator.dtype) == "torch.float32"

    def test_card_travels(self, tiny_folder, tmp_path):
        pipeline = MetaAuxInverter.from_pretrained(tiny_folder)
        pipeline.card = "---\nlicense: mit\n---\n# Mine\n"
        pipeline.save_pretrained(tmp_path)
        assert MetaAuxInverter.from_pretrained(tmp_path).card == pipeline.card

    def test_a_cards_licence_and_pictures_travel(self, tiny_folder, tmp_path):
        source = shutil.copytree(tiny_folder, tmp_path / "source")
        (source / "README.md").write_text(
            "---\nlicense: other\nlicense_link: LICENSE.md\n---\n# Mine\n![A head](docs/head.png) "
            "[elsewhere](https://a.b/c.png) [outside](../secret.png) [missing](missing.png) [notes](notes.txt)\n"
        )
        (source / "docs").mkdir()
        files = {"LICENSE.md": b"terms", "docs/head.png": b"picture", "notes.txt": b"no", "other.png": b"no"}
        for name, content in files.items():
            (source / name).write_bytes(content)
        (tmp_path / "secret.png").write_bytes(b"secret")
        pipeline = MetaAuxInverter.from_pretrained(source)
        assert pipeline.card_files == {"LICENSE.md": b"terms", "docs/head.png": b"picture"}
        pipeline.save_pretrained(tmp_path / "copy")
        assert MetaAuxInverter.from_pretrained(tmp_path / "copy").card_files == pipeline.card_files
        assert "docs/head.png" in files_to_push(tmp_path / "copy")

    def test_damaged_index_of_shards(self, tiny_inverter, tmp_path):
        tiny_inverter.save_pretrained(tmp_path, max_shard_size="60KB")
        (tmp_path / "generator" / "diffusion_pytorch_model.safetensors.index.json").write_text("[]")
        with pytest.raises(ValueError, match="generator/.*index.json is damaged"):
            check_components(tmp_path, ["generator"])

    def test_card_states_the_fingerprint_of_today(self, tiny_folder, tmp_path):
        pipeline = MetaAuxInverter.from_pretrained(tiny_folder)
        before = pipeline.fingerprint
        assert before in pipeline.card
        with torch.no_grad():
            pipeline.generator.decoder.out.bias += 1
        pipeline.save_pretrained(tmp_path)
        card = MetaAuxInverter.from_pretrained(tmp_path).card
        assert card == pipeline.card.replace(before, pipeline.fingerprint) != pipeline.card

    @pytest.mark.parametrize("variant", ["../fp16", "*", "a b", ""])
    def test_variants_are_words(self, tiny_inverter, tiny_folder, tmp_path, variant):
        with pytest.raises(ValueError, match="a variant is a word"):
            tiny_inverter.save_pretrained(tmp_path, variant=variant)
        with pytest.raises(ValueError, match="a variant is a word"):
            MetaAuxInverter.from_pretrained(tiny_folder, variant=variant)
        with pytest.raises(ValueError, match="a variant is a word"):
            MetaAuxInverter.download(REPO, variant=variant)
        assert not list(tmp_path.iterdir())

    def test_pickles_are_not_written(self, tiny_inverter, tmp_path):
        with pytest.raises(ValueError, match="safe_serialization must stay True"):
            tiny_inverter.save_pretrained(tmp_path, safe_serialization=False)
        assert not list(tmp_path.iterdir())
