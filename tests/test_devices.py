"""Which device is chosen, and that a Mac's GPU has what an inversion asks for; no Mac is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import resources

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from metaaux import devices
from metaaux.devices import MPS_FALLBACK_OPERATORS, best_device, device_name, usable_device


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_gpus_come_first(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert best_device() == expected


def test_usable_device(monkeypatch):
    assert usable_device("cpu") == "cpu" and device_name(torch.device("cpu")) == "cpu"
    with pytest.raises(ValueError, match="the device 'abacus' cannot be used"):
        usable_device("abacus")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    if sys.platform != "darwin":
        with pytest.raises(ValueError, match="the device 'mps' cannot be used"):
            usable_device(None)


@pytest.mark.parametrize(("platform", "expected"), [("darwin", "1"), ("linux", "None")])
def test_fallback_is_on_before_torch_is_imported(platform, expected):
    code = (
        f"import os, sys; sys.platform = {platform!r}; import metaaux; "
        "print('torch' in sys.modules, os.environ.get('PYTORCH_ENABLE_MPS_FALLBACK'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTORCH_ENABLE_MPS_FALLBACK"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.split() == ["False", expected]


class Watch(TorchDispatchMode):
    """Notes the operators that run, and those that make double precision."""

    def __init__(self):
        super().__init__()
        self.operators, self.double = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operators.add(function)
        for value in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
                self.double.add(function)
        return result


def test_an_inversion_needs_what_apples_gpus_have(tiny_inverter, crops, cameras, monkeypatch):
    monkeypatch.setattr(devices, "is_cpu", lambda x: False)
    with Watch() as watch:
        inversion = tiny_inverter.invert(crops[1], steps=1, camera=cameras[1], flip=True)
        tiny_inverter.render(inversion, yaw=20)
    assert not watch.double
    functions = yaml.safe_load(
        resources.files("torchgen").joinpath("packaged/ATen/native/native_functions.yaml").read_text("utf-8")
    )
    kernels = {entry["func"].split("(")[0]: entry for entry in functions}

    def runs_on_mps(name):
        entry = kernels[name]
        entry = kernels[entry.get("structured_delegate", name)]
        # Without a kernel of its own, an operator is made of others, which are noted themselves.
        dispatch = ", ".join(entry.get("dispatch", {"CompositeImplicitAutograd": None}))
        return "MPS" in dispatch or "Composite" in dispatch

    # Attention has a kernel for each kind of device; the one noted here is the CPU's.
    names = {
        function._schema.name.removeprefix("aten::")
        + ("" if function._overloadname == "default" else f".{function._overloadname}")
        for function in watch.operators
        if "_for_cpu" not in function._schema.name
    }
    assert "convolution" in names and "grid_sampler_2d" in names
    missing = {name for name in names if not runs_on_mps(name)}
    assert missing <= set(MPS_FALLBACK_OPERATORS)
