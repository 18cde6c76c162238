"""Pickles of the form that the official EG3D code writes, and hostile ones."""

from __future__ import annotations

import os
import pickle
import sys
from collections import OrderedDict
from types import ModuleType

import numpy as np
import pytest
import torch
from eg3d_reference import GENERATORS, hashed_weights

from metaaux.conversion.eg3d import convert_eg3d
from metaaux.conversion.pickles import ConversionError
from metaaux.models.discriminator import DualDiscriminator
from metaaux.models.eg3d import EG3DGenerator

# The form of the official pickles: modules are rebuilt by this function from a class's source text and its state.
SOURCE_TEXT = "import torch\nfrom torch_utils import persistence\n\nclass Anything(torch.nn.Module):\n    pass\n"


FILTER = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8


FILTER = FILTER[:, None] * FILTER


@pytest.fixture(autouse=True)
def official_names(monkeypatch):
    """Lets Python's pickler write the official names, which it only does if they can be imported."""
    names = {
        "torch_utils.persistence": ["_reconstruct_persistent_obj"],
        "dnnlib.util": ["EasyDict"],
        "training.triplane": ["OSGDecoder"],
        "training.volumetric_rendering.renderer": ["ImportanceRenderer"],
    }
    for path, entries in names.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            monkeypatch.setitem(sys.modules, name, sys.modules.get(name) or ModuleType(name))
        for entry in entries:
            if entry[0] == "_":
                made = lambda meta: pytest.fail("the official function was called")  # noqa: E731
                made.__name__ = made.__qualname__ = entry
                made.__module__ = path
            else:
                made = type(entry, (dict,) if entry == "EasyDict" else (), {"__module__": path})
            monkeypatch.setattr(sys.modules[path], entry, made, raising=False)


class Persistent:
    """An object that is pickled as the official code pickles its modules."""

    def __init__(self, class_name, state, source=SOURCE_TEXT):
        self.meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state}

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,), None


def module_state(tensors=(), **attributes):
    """`__dict__` of a module with these parameters (names in dots make submodules)."""
    state = {
        "training": False,
        "_parameters": OrderedDict(),
        "_buffers": OrderedDict(),
        "_modules": OrderedDict(),
        "_non_persistent_buffers_set": set(),
        "_backward_hooks": OrderedDict(),
        **attributes,
    }
    for name, tensor in dict(tensors).items():
        if name.endswith(("noise_const", "w_avg", "resample_filter")):
            state["_buffers"][name] = tensor
        else:
            state["_parameters"][name] = torch.nn.Parameter(tensor)
    return state


def module(class_name, tensors, attributes=None, source=SOURCE_TEXT):
    """A persistent module with submodules. `attributes`: {submodule: {name: value}}, "" for the module itself."""
    attributes = attributes or {}
    groups = {}
    for name, tensor in tensors.items():
        first, dot, rest = name.partition(".")
        groups.setdefault(first if dot else None, {})[rest if dot else name] = tensor
    state = module_state(groups.pop(None, {}), **attributes.get("", {}))
    for name, part in groups.items():
        below = {key.partition(".")[2]: v for key, v in attributes.items() if key.partition(".")[0] == name}
        kind = attributes.get("classes", {}).get(name, "Layer")
        state["_modules"][name] = module(kind, part, below, source)
    return Persistent(class_name, state, source)


def official_generator_name(name):
    for ours, official in {
        "mapping_network.layers.": "backbone.mapping.fc",
        "mapping_network.": "backbone.mapping.",
        "backbone.": "backbone.synthesis.",
        "super_resolution.": "superresolution.",
        "decoder.hidden.": "decoder.net.0.",
        "decoder.out.": "decoder.net.2.",
    }.items():
        if name.startswith(ours):
            return official + name[len(ours) :]
    return name


def official_discriminator_name(name):
    if name.startswith("mapping_network.layers."):
        return "mapping.fc" + name.removeprefix("mapping_network.layers.")
    if name.startswith("mapping_network."):
        return "mapping." + name.removeprefix("mapping_network.")
    return f"b4.{name}" if name.split(".")[0] in ("conv", "fc", "out") else name


def snapshot(case=GENERATORS["2x"], source=SOURCE_TEXT, generator=None, **rendering):
    """(contents of a pickle, the networks that it describes)."""
    networks = (
        EG3DGenerator(**case.config()).eval(),
        DualDiscriminator(image_size=case.image_size, channel_base=512, channel_max=16, raw_size=64),
    )
    for network in networks:
        network.load_state_dict(hashed_weights(network.state_dict()))
    return eg3d_contents(*networks, source, generator, **rendering), networks


def eg3d_contents(network, judge, source=SOURCE_TEXT, generator=None, **rendering):
    """Contents of an EG3D pickle with these networks, or with another `generator`. The super-resolution is of kind 2X,
    the plane axes are the released ones."""
    config = network.config
    dictionary = sys.modules["dnnlib.util"].EasyDict
    options = (
        dict(
            image_resolution=config.image_size,
            disparity_space_sampling=False,
            clamp_mode="softplus",
            superresolution_module="training.superresolution.SuperresolutionHybrid2X",
            c_gen_conditioning_zero=not config.pose_conditioning,
            c_scale=config.camera_scale,
            decoder_lr_mul=1.0,
            superresolution_noise_mode="none",
            sr_antialias=config.super_resolution_antialias,
            depth_resolution=config.depth_samples,
            depth_resolution_importance=config.importance_samples,
            ray_start=2.25,
            ray_end=np.float64(3.3),
            box_warp=1,
        )
        | rendering
    )
    options = dictionary(options)
    arguments = dictionary(
        z_dim=config.z_dim,
        w_dim=config.w_dim,
        c_dim=25,
        img_resolution=config.image_size,
        img_channels=3,
        conv_clamp=None,
        sr_num_fp16_res=0,
        rendering_kwargs=options,
    )
    tensors = {official_generator_name(name): tensor for name, tensor in network.state_dict().items()}
    tensors |= {f"backbone.synthesis.b{r}.resample_filter": FILTER for r in (4, 256)}
    made = generator or module(
        "TriPlaneGenerator",
        tensors,
        {
            "": {
                "_init_kwargs": arguments,
                "rendering_kwargs": options,
                "neural_rendering_resolution": config.neural_resolution,
            },
            "classes": {"superresolution": "SuperresolutionHybrid2X"},
        },
        source,
    )
    renderer = sys.modules["training.volumetric_rendering.renderer"].ImportanceRenderer()
    renderer.__dict__ = module_state(
        plane_axes=torch.tensor(
            [[[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 0, 1], [0, 1, 0]], [[0, 0, 1], [1, 0, 0], [0, 1, 0]]],
            dtype=torch.float32,
        )
    )
    if generator is None:
        made.meta["state"]["_modules"]["renderer"] = renderer
    discriminator = module(
        "DualDiscriminator",
        {official_discriminator_name(name): tensor for name, tensor in judge.state_dict().items()},
        {"": {"_init_kwargs": {"c_dim": 25, "img_resolution": config.image_size, "conv_clamp": 256}}},
    )
    return {
        "training_set_kwargs": dictionary(path="x.zip"),
        "G": made,
        "D": discriminator,
        "G_ema": made,
        "augment_pipe": None,
    }


def stylegan2_contents(generator, judge):
    """Contents of a pickle of stylegan2-ada-pytorch with these networks."""
    tensors = {}
    for name, tensor in generator.state_dict().items():
        name = name.replace("mapping_network.layers.", "mapping.fc").replace("mapping_network.", "mapping.")
        tensors[name.replace("backbone.", "synthesis.")] = tensor
    config = generator.config
    arguments = {
        "z_dim": config.z_dim,
        "c_dim": 0,
        "w_dim": config.w_dim,
        "img_resolution": config.image_size,
        "img_channels": 3,
        "synthesis_kwargs": {"conv_clamp": config.conv_clamp},
    }
    return {
        "G_ema": module("Generator", tensors, {"": {"_init_kwargs": arguments}}),
        "D": module(
            "Discriminator",
            {official_discriminator_name(name): tensor for name, tensor in judge.state_dict().items()},
            {"": {"_init_kwargs": {"c_dim": 0, "img_resolution": config.image_size}}},
        ),
    }


def write(path, data, protocol=4):
    with path.open("wb") as file:
        pickle.dump(data, file, protocol=protocol)
    return path


class Runs:
    """An object whose unpickling runs a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def assert_refused(source, folder, match, convert=convert_eg3d, **options):
    """The conversion fails with an error of that text, runs nothing and leaves nothing behind."""
    with pytest.raises(ConversionError, match=match):
        convert(source, folder / "out", **options)
    assert not (folder / "out").exists()
    assert not (folder / "ran").exists()
