"""NVIDIA's own EG3D code beside this one's: timed in a process of its own, from a checkout that the user has fetched.

The code is under NVIDIA's licence and no part of this package.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ..cameras import camera_from_pose
from ..models.eg3d import EG3DGenerator
from ..models.super_resolution import block_channels

#: Image sizes that the official super-resolution modules have.
_IMAGE_SIZES = {"2X": 128, "4X": 256, "8X": 512, "8XDC": 512}
_WORKER = Path(__file__).with_name("official_worker.py")


def official_arguments(generator: torch.nn.Module) -> dict[str, Any]:
    """What the official `TriPlaneGenerator` takes for a generator of the same shape.

    Raises:
        ValueError: the official code has no generator of this shape.
    """
    config = generator.config
    if (
        not isinstance(generator, EG3DGenerator)
        or (config.plane_resolution, config.plane_features, config.decoder_hidden) != (256, 32, 64)
        or config.image_size != _IMAGE_SIZES[config.super_resolution_kind]
        or block_channels(config.super_resolution_kind, config.super_resolution_channels)
        != block_channels(config.super_resolution_kind)
    ):
        raise ValueError(
            "the official code has no generator of this model's shape: its planes have 256² pixels of 32 features, "
            f"its images {', '.join(f'{size} pixels ({kind})' for kind, size in _IMAGE_SIZES.items())}, "
            "its super-resolution the channels of its kind"
        )
    widths = {"channel_base": config.channel_base, "channel_max": config.channel_max}
    rendering = {
        "image_resolution": config.image_size,
        "disparity_space_sampling": False,
        "clamp_mode": "softplus",
        "superresolution_module": f"training.superresolution.SuperresolutionHybrid{config.super_resolution_kind}",
        "superresolution_noise_mode": "none",
        "sr_antialias": config.super_resolution_antialias,
        "c_gen_conditioning_zero": not config.pose_conditioning,
        "c_scale": config.camera_scale,
        "decoder_lr_mul": config.decoder_lr_multiplier,
        "depth_resolution": config.depth_samples,
        "depth_resolution_importance": config.importance_samples,
        "ray_start": config.ray_start,
        "ray_end": config.ray_end,
        "box_warp": config.box_size,
    }
    return {
        "z_dim": config.z_dim,
        "c_dim": config.camera_dim,
        "w_dim": config.w_dim,
        "img_resolution": config.image_size,
        "img_channels": 3,
        "sr_num_fp16_res": 4,
        "num_fp16_res": 0,
        "conv_clamp": config.conv_clamp,
        "fused_modconv_default": "inference_only",
        "mapping_kwargs": {"num_layers": config.mapping_layers},
        "rendering_kwargs": rendering,
        "sr_kwargs": {**widths, "fused_modconv_default": "inference_only"},
        **widths,
    }


def official_code(folder: Path) -> Path:
    """Where the modules of a checkout of github.com/NVlabs/eg3d lie.

    Raises:
        ValueError: the folder holds none.
    """
    code = folder.resolve() / "eg3d"
    if not (code / "training" / "triplane.py").is_file():
        raise ValueError(f"{folder} holds no checkout of NVlabs/eg3d: there is no eg3d/training/triplane.py")
    return code


def run_official(
    folder: Path, generator: torch.nn.Module, device: torch.device, repeats: int = 10, warmup: int = 3
) -> dict[str, Any]:
    """Times the official generator of the same shape with random weights.

    Measures are those of `run_benchmark`: "synthesis" (backbone, rendering, super-resolution of a code), "cached_view"
    (the same with the planes of an earlier call) and "tuning_step" (a picture, the gradient of its mean squared error
    with regard to all of the generator's weights, and a step along it). Noise is constant; sample distances are drawn
    at random, as its code always does. Configurations: "released", with super-resolution in float16 on CUDA and
    PyTorch's own TF32 settings, as its scripts run it; "float32", with IEEE products throughout.

    Args:
        folder: checkout of github.com/NVlabs/eg3d.
        generator: whose shape is taken.
        device, repeats, warmup: see `run_benchmark`.

    Returns:
        {"operations": "plugins" where its CUDA plugins were built, else "reference", "reason" for the latter, and
        "measures": {configuration: {name: {"median_ms", …}}}}.

    Raises:
        ValueError: the folder holds no checkout, or the official code has no generator of this shape.
        RuntimeError: its process failed; its messages are on the standard error stream.
    """
    code = official_code(folder)
    settings = {
        "arguments": official_arguments(generator),
        "neural_resolution": generator.config.neural_resolution,
        "camera": camera_from_pose(5.0, 0.0).tolist(),
        "side_camera": camera_from_pose(20.0, -5.0).tolist(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "warmup": warmup,
    }
    # The worker's folder must not be on its path: modules there have names that the official code may ask for.
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(code)}
    command = [sys.executable, "-W", "ignore", str(_WORKER), json.dumps(settings)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=code)
    if process.returncode:
        raise RuntimeError(f"the official code in {folder} ended with code {process.returncode}; see above")
    return json.loads(process.stdout)
