"""The inversion file: what is saved comes back, and nothing else is accepted."""

from __future__ import annotations

import dataclasses
import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from metaaux import Inversion, InversionFileError
from metaaux.cameras import camera_from_pose
from metaaux.inversion import MAX_FILE_BYTES, STEP_KEYS, max_file_bytes


@pytest.fixture
def inversion():
    generator = torch.Generator().manual_seed(0)
    return Inversion(
        w=torch.randn(8, generator=generator),
        camera=camera_from_pose(10, -5),
        weight_offsets={
            "backbone.b4.conv1": torch.randn(4, 3, 1, 1, generator=generator),
            "backbone.b8.conv0": torch.randn(4, 4, 3, 3, generator=generator),
        },
        offset_planes=torch.randn(3, 3, 4, 4, generator=generator),
        steps=[dict.fromkeys(STEP_KEYS, 0.25) | {"step": step} for step in (-1, 0, 1)],
        model="someone/some-model",
        fingerprint="0123456789abcdef" * 4,
        aligned=torch.arange(48, dtype=torch.uint8).view(3, 4, 4),
    )


@pytest.fixture
def saved(inversion, tmp_path):
    path = tmp_path / "face.safetensors"
    inversion.save(path)
    return path


def read(path):
    """Tensors and metadata of a safetensors file."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return load_file(path), json.loads(data[8 : 8 + size])["__metadata__"]


class TestRoundTrip:
    def test_everything_comes_back(self, inversion, saved):
        loaded = Inversion.load(saved, fingerprint=inversion.fingerprint)
        for name in ("w", "camera", "offset_planes", "aligned"):
            assert torch.equal(getattr(loaded, name), getattr(inversion, name)), name
        assert loaded.weight_offsets.keys() == inversion.weight_offsets.keys()
        for layer, offset in inversion.weight_offsets.items():
            assert torch.equal(loaded.weight_offsets[layer], offset)
        assert loaded.steps == inversion.steps
        assert (loaded.model, loaded.fingerprint) == (inversion.model, inversion.fingerprint)

    @pytest.mark.parametrize("absent", ["aligned", "offset_planes"])
    def test_optional_tensors_stay_absent(self, inversion, tmp_path, absent):
        path = tmp_path / "face.safetensors"
        dataclasses.replace(inversion, **{absent: None}).save(path)
        assert getattr(Inversion.load(path), absent) is None

    def test_w_plus(self, inversion, tmp_path):
        path = tmp_path / "face.safetensors"
        dataclasses.replace(inversion, w=torch.randn(6, 8)).save(path)
        assert Inversion.load(path).w.shape == (6, 8)

    def test_metadata_values_are_json(self, saved):
        metadata = read(saved)[1]
        assert {key: type(json.loads(value)) for key, value in metadata.items()} == {
            "format": str,
            "version": int,
            "model": str,
            "fingerprint": str,
            "steps": list,
        }


@pytest.fixture(scope="module")
def full_size():
    """Generator and auxiliary network of the paper's size, without memory, all layers in full kernels."""
    from metaaux.models.auxiliary import AuxiliaryNetwork
    from metaaux.models.eg3d import EG3DGenerator

    folder = Path(__file__).resolve().parent.parent / "hub_configs" / "metaaux-ffhq"
    config = AuxiliaryNetwork.load_config(folder / "auxiliary")
    with torch.device("meta"):
        generator = EG3DGenerator.from_config(EG3DGenerator.load_config(folder / "generator"))
        auxiliary = AuxiliaryNetwork.from_config(config, full_kernel_layers=[""], offset_bias_resolution=512)
    return generator, auxiliary


class TestSize:
    """The limit follows from the model; what `save` writes `load` reads."""

    def test_full_size(self, full_size, tmp_path):
        generator, auxiliary = full_size
        inversion = Inversion(
            w=torch.zeros(generator.num_ws, 512),
            camera=camera_from_pose(0, 0),
            weight_offsets={
                layer: torch.zeros(auxiliary.hypernetworks[layer.replace(".", "-")].bias.shape)
                for layer in auxiliary.layer_names
            },
            offset_planes=torch.zeros(3, 3, 512, 512),
            steps=[dict.fromkeys(STEP_KEYS, 1 / 3) | {"step": step} for step in range(-1, 9_999)],
            model="m" * 1000,
            fingerprint="0" * 64,
            aligned=torch.zeros(3, 512, 512, dtype=torch.uint8),
        )
        inversion.save(tmp_path / "me.safetensors")
        size = (tmp_path / "me.safetensors").stat().st_size
        limit = max_file_bytes(generator, auxiliary)
        assert 100e6 < size <= limit < MAX_FILE_BYTES
        # The margin is the header's: no head with one more layer would fit.
        assert limit - size < 4 * 2**20
        assert Inversion.load(tmp_path / "me.safetensors", max_bytes=limit).weight_offsets.keys() == set(
            generator.modulated_layers
        )
        inversion.check_fits(generator, "0" * 64)

    def test_larger_ones_are_not_read(self, saved):
        size = saved.stat().st_size
        assert Inversion.load(saved, max_bytes=size).w.shape == (8,)
        with pytest.raises(InversionFileError, match="larger than .* MiB, which no inversion of this model is"):
            Inversion.load(saved, max_bytes=size - 1)

    def test_pipeline_reads_its_own(self, tiny_inverter, tiny_2d_inverter, tiny_inversion, tmp_path):
        tiny_inversion.save(tmp_path / "me.safetensors")
        assert tiny_inverter.load_inversion(tmp_path / "me.safetensors").steps == tiny_inversion.steps
        limit = max_file_bytes(tiny_inverter.generator, tiny_inverter.auxiliary)
        with open(tmp_path / "me.safetensors", "r+b") as file:
            file.truncate(limit + 1)
        with pytest.raises(InversionFileError, match="which no inversion of this model is"):
            tiny_inverter.load_inversion(tmp_path / "me.safetensors")
        assert max_file_bytes(tiny_2d_inverter.generator, tiny_2d_inverter.auxiliary) < 2 * limit
        assert max_file_bytes(torch.compile(tiny_inverter.generator), tiny_inverter.auxiliary) == limit

    def test_nothing_is_written_that_cannot_be_read(self, inversion, tmp_path, monkeypatch):
        monkeypatch.setattr("metaaux.inversion.MAX_FILE_BYTES", 1000)
        with pytest.raises(InversionFileError, match="larger than"):
            inversion.save(tmp_path / "me.safetensors")
        assert not list(tmp_path.iterdir())

    def test_steps_that_lack_a_number(self, inversion, tmp_path):
        for step in ({"step": -1}, dict.fromkeys(STEP_KEYS, "x"), dict.fromkeys(STEP_KEYS), 3):
            with pytest.raises(InversionFileError, match="its steps must"):
                dataclasses.replace(inversion, steps=[step]).save(tmp_path / "me.safetensors")


class TestSave:
    def test_refuses_what_would_not_load_and_keeps_the_old_file(self, inversion, saved):
        before = saved.read_bytes()
        inversion.w[3] = float("nan")
        with pytest.raises(InversionFileError, match="'w' has values that are not finite"):
            inversion.save(saved)
        assert saved.read_bytes() == before
        assert [path.name for path in saved.parent.iterdir()] == [saved.name]

    def test_missing_folder(self, inversion, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            inversion.save(tmp_path / "nowhere" / "face.safetensors")

    def test_an_empty_fingerprint_is_refused(self, inversion, tmp_path):
        with pytest.raises(InversionFileError, match="fingerprint"):
            dataclasses.replace(inversion, fingerprint="").save(tmp_path / "face.safetensors")


class TestHostileFiles:
    def assert_refused(self, path, match):
        with pytest.raises(InversionFileError, match=match) as error:
            Inversion.load(path)
        assert path.name in str(error.value)
        assert isinstance(error.value, ValueError)

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\x89PNG\r\n\x1a\n" + bytes(100),
            pickle.dumps({"w": [1.0]}),
            struct.pack("<Q", 2**63) + b"{}",
            struct.pack("<Q", 2**64 - 1),
            struct.pack("<Q", 10**9) + b"{" * 100,
            struct.pack("<Q", 3) + b"[1]",
            struct.pack("<Q", 50_000) + b"[" * 50_000,
        ],
        ids=["empty", "png", "pickle", "header 2^63", "header 2^64-1", "header past the end", "list", "deep nesting"],
    )
    def test_not_safetensors(self, tmp_path, data):
        path = tmp_path / "bad.safetensors"
        path.write_bytes(data)
        self.assert_refused(path, "not a safetensors file")

    def test_every_truncation_is_refused(self, saved):
        data = saved.read_bytes()
        for length in range(0, len(data), 97):
            saved.write_bytes(data[:length])
            self.assert_refused(saved, "not a safetensors file")

    def test_tensor_data_outside_the_file(self, tmp_path):
        header = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
        path = tmp_path / "bad.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
        self.assert_refused(path, "not a safetensors file")

    def test_too_large(self, tmp_path):
        path = tmp_path / "huge.safetensors"
        with path.open("wb") as file:
            file.truncate(MAX_FILE_BYTES + 1)
        self.assert_refused(path, f"larger than {MAX_FILE_BYTES // 2**20} MiB")

    def test_another_safetensors_file(self, tmp_path):
        path = tmp_path / "weights.safetensors"
        save_file({"conv.weight": torch.zeros(2)}, path, {"format": "pt"})
        self.assert_refused(path, "metadata")

    @pytest.mark.parametrize(
        ("name", "tensor", "match"),
        [
            ("w", None, "lacks the tensors .*'w'"),
            ("camera", None, "lacks the tensors .*'camera'"),
            ("w", torch.zeros(8, dtype=torch.float64), "'w' is F64, expected F32"),
            ("w", torch.zeros(8, dtype=torch.int64), "'w' is I64"),
            ("w", torch.zeros(2, 2, 2), "'w' has the wrong shape"),
            ("w", torch.zeros(0), "'w' has the wrong shape"),
            ("w", torch.full((8,), float("inf")), "'w' has values that are not finite"),
            ("camera", torch.zeros(24), "'camera' has the wrong shape"),
            ("camera", torch.zeros(25), "not a rigid camera-to-world"),
            ("camera", camera_from_pose(0, 0) * torch.tensor([1.0] * 16 + [-1.0] * 9), "focal length"),
            ("offset_planes", torch.zeros(3, 3, 4, 5), "'offset_planes' has the wrong shape"),
            ("offset_planes", torch.full((3, 3, 4, 4), float("nan")), "'offset_planes' has values"),
            ("aligned", torch.zeros(3, 4, 4), "'aligned' is F32, expected U8"),
            ("weight_offsets.backbone.b4.conv1", torch.zeros(4, 3, 3, 1), "wrong shape"),
            ("weight_offsets.../etc", torch.zeros(4, 3, 1, 1), "unknown tensor"),
            ("surprise", torch.zeros(1), "unknown tensor 'surprise'"),
        ],
    )
    def test_tensors(self, saved, name, tensor, match):
        tensors, metadata = read(saved)
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
        save_file(tensors, saved, metadata)
        self.assert_refused(saved, match)

    @pytest.mark.parametrize(
        ("key", "value", "match"),
        [
            ("format", '"other"', "format is 'other'"),
            ("version", "2", "version 2"),
            ("version", "not json", "not valid JSON"),
            ("steps", "[" * 100_000, "not valid JSON"),
            ("steps", "NaN", "NaN is not a number"),
            ("steps", "{}", "must be a list"),
            ("steps", '[{"step": -1}]', "exactly the keys"),
            ("steps", json.dumps([dict.fromkeys(STEP_KEYS, 0.5)]), "numbered"),
            ("steps", json.dumps([dict.fromkeys(STEP_KEYS, 0.5) | {"step": -1, "mse": "0"}]), "mse of its step -1"),
            ("steps", json.dumps([dict.fromkeys(STEP_KEYS, 0.5) | {"step": -1}]).replace("0.5", "1e999"), "finite"),
            ("model", "3", "model must be a text"),
            ("fingerprint", '"xyz"', "64 hexadecimal digits"),
            ("surprise", "1", "metadata has the keys"),
        ],
    )
    def test_metadata(self, saved, key, value, match):
        tensors, metadata = read(saved)
        save_file(tensors, saved, metadata | {key: value})
        self.assert_refused(saved, match)

    def test_another_models_file(self, saved):
        with pytest.raises(InversionFileError, match="made with the model 'someone/some-model'"):
            Inversion.load(saved, fingerprint="f" * 64)

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            Inversion.load(tmp_path / "none.safetensors")
