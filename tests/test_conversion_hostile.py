"""Conversions run nothing of a file: hostile pickles and archives are refused."""

from __future__ import annotations

import pickle
import struct
from collections import OrderedDict

import numpy as np
import pytest
import torch
from official_pickles import (
    Runs,
    assert_refused,
    official_names,  # noqa: F401 (a fixture)
    snapshot,
    write,
)

from metaaux.conversion.arcface import convert_arcface
from metaaux.conversion.eg3d import convert_eg3d
from metaaux.conversion.lpips import convert_lpips
from metaaux.conversion.pickles import read_pickle
from metaaux.conversion.stylegan2 import convert_stylegan2


def legacy_storage(obj):
    """torch.save's older format with `obj` in the place of the storage's description."""
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, obj, ["0"])]
    return b"".join(parts) + struct.pack("<q", 1) + b"\0\0\0\0"


class LoadFromBytes:
    """A tensor's storage as it is pickled, with any bytes."""

    def __init__(self, data):
        self.data = data

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.data,)


class Call:
    """A call of any importable function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class TestHostilePickles:
    """Each would run a command if it were opened with pickle.load (or, for storages, if torch opened it)."""

    @pytest.fixture
    def command(self, tmp_path):
        return f"touch {tmp_path / 'ran'}"

    def test_the_command_would_run(self, tmp_path, command):
        pickle.loads(pickle.dumps(Runs(command)))
        assert (tmp_path / "ran").exists()

    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    def test_reduce(self, tmp_path, command, protocol):
        source = write(tmp_path / "model.pkl", {"G_ema": Runs(command)}, protocol)
        assert_refused(source, tmp_path, r"names (posix|nt)\.system.*not run")

    def test_beside_a_valid_model(self, tmp_path, command):
        contents, _ = snapshot()
        assert_refused(write(tmp_path / "model.pkl", contents | {"D": Runs(command)}), tmp_path, r"\.system")

    def test_directly(self, tmp_path, command):
        (tmp_path / "model.pkl").write_bytes(
            b"\x80\x02cos\nsystem\nX" + struct.pack("<I", len(command)) + command.encode() + b"\x85R."
        )
        assert_refused(tmp_path / "model.pkl", tmp_path, r"names os\.system")

    def test_older_operations(self, tmp_path, command):
        (tmp_path / "model.pkl").write_bytes(
            b"\x80\x02(X" + struct.pack("<I", len(command)) + command.encode() + b"ios\nsystem\n."
        )
        assert_refused(tmp_path / "model.pkl", tmp_path, "operation INST")

    @pytest.mark.parametrize(
        ("text", "met"),
        [
            ("import os\nos.system({!r})", "os"),
            ("from subprocess import run", "subprocess"),
            ("import torch, importlib.util", "importlib.util"),
            ("class A:\n    x = __import__('os').system({!r})", "__import__"),
            ("eval({!r})", "eval"),
            ("print(().__class__.__base__.__subclasses__())", "__subclasses__"),
        ],
    )
    def test_source_text(self, tmp_path, command, text, met):
        contents, _ = snapshot(source=text.format(command))
        assert_refused(write(tmp_path / "model.pkl", contents), tmp_path, f"source text of class .* uses {met}")

    def test_source_text_is_not_run(self, tmp_path):
        contents, _ = snapshot(source=f"import torch\ntorch.save(1, {str(tmp_path / 'ran')!r})")
        convert_eg3d(write(tmp_path / "model.pkl", contents), tmp_path / "out")
        assert not (tmp_path / "ran").exists()

    def test_storage_with_a_call(self, tmp_path, command):
        source = write(tmp_path / "model.pkl", {"G_ema": LoadFromBytes(legacy_storage(Runs(command)))})
        assert_refused(source, tmp_path, r"storage names (posix|nt)\.system")

    def test_storage_that_is_a_pickle(self, tmp_path, command):
        source = write(tmp_path / "model.pkl", {"G_ema": LoadFromBytes(pickle.dumps(Runs(command)))})
        assert_refused(source, tmp_path, r"storage names (posix|nt)\.system")

    def test_storage_in_a_storage(self, tmp_path, command):
        inner = LoadFromBytes(legacy_storage(Runs(command)))
        source = write(tmp_path / "model.pkl", {"G_ema": LoadFromBytes(legacy_storage(inner))})
        assert_refused(source, tmp_path, r"storage names torch\.storage\._load_from_bytes")

    def test_storage_that_is_a_zip_archive(self, tmp_path, command):
        torch.save(Runs(command), tmp_path / "inner")
        source = write(tmp_path / "model.pkl", {"G_ema": LoadFromBytes((tmp_path / "inner").read_bytes())})
        assert_refused(source, tmp_path, "damaged pickle in a tensor's storage")

    @pytest.mark.parametrize("function", [eval, getattr, __import__, torch.load, torch.hub.load, pickle.loads, open])
    def test_functions(self, tmp_path, function):
        source = write(tmp_path / "model.pkl", [Call(function, "print")])
        assert_refused(source, tmp_path, f"names .*{function.__name__}, which")

    def test_tensor_beyond_its_storage(self, tmp_path):
        tensor = torch.arange(4.0)
        wrong = Call(torch._utils._rebuild_tensor_v2, tensor._typed_storage(), 0, (100,), (1,), False, OrderedDict())
        assert_refused(write(tmp_path / "model.pkl", [wrong]), tmp_path, "reaches beyond its storage")

    def test_state_for_a_function(self, tmp_path):
        (tmp_path / "model.pkl").write_bytes(
            b"\x80\x02ctorch._utils\n_rebuild_parameter\n}X\x05\x00\x00\x00__x__K\x01sb."
        )
        assert_refused(tmp_path / "model.pkl", tmp_path, "a state of type dict for a Name")


def test_numbers_and_tensors_survive(tmp_path):
    data = {
        "numbers": [1, -2.5, True, None, 2**70, np.float32(0.5), np.int64(-3)],
        "containers": ({1, 2}, OrderedDict(a=(1,)), ["x"], b"raw"),
        "half": torch.arange(6.0).half().view(2, 3).t(),
        "whole": torch.tensor([[1, 2], [3, 4]]),
        "none": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
    }
    shared = torch.arange(10.0)
    data["parts"] = [shared[2:5], shared[::3]]
    for protocol in (2, 3, 4, 5):
        read = read_pickle(write(tmp_path / "data.pkl", data, protocol))
        assert read["numbers"] == [1, -2.5, True, None, 2**70, 0.5, -3]
        assert read["containers"] == ({1, 2}, {"a": (1,)}, ["x"], b"raw")
        for name in ("half", "whole", "none", "scalar"):
            assert torch.equal(read[name], data[name]) and read[name].dtype == data[name].dtype
        assert all(torch.equal(a, b) for a, b in zip(read["parts"], data["parts"]))


@pytest.mark.parametrize("convert", [convert_stylegan2, convert_lpips, convert_arcface])
class TestHostileTorchFiles:
    def test_a_call(self, tmp_path, convert):
        torch.save({"w": Runs(f"touch {tmp_path / 'ran'}")}, tmp_path / "model.pt")
        assert_refused(tmp_path / "model.pt", tmp_path, r"(posix|nt)\.system|cannot be read as plain weights", convert)

    def test_a_pickle(self, tmp_path, convert):
        write(tmp_path / "model.pt", Runs(f"touch {tmp_path / 'ran'}"))
        assert_refused(tmp_path / "model.pt", tmp_path, "cannot be read|damaged", convert)

    def test_damaged(self, tmp_path, convert):
        for name, data in (("model.pt", b"PK\x03\x04 no archive"), ("model.safetensors", b"\xff" * 20)):
            (tmp_path / name).write_bytes(data)
            assert_refused(tmp_path / name, tmp_path, name, convert)

    def test_no_file(self, tmp_path, convert):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            convert(tmp_path / "none.pt", tmp_path / "out")
