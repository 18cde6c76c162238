"""Inputs and weights of the recorded EG3D outputs in `data/eg3d_official.safetensors`.

The outputs were recorded by running NVIDIA's official implementation (github.com/NVlabs/eg3d, PyTorch reference
operators on the CPU, float32) with the weights, latents and cameras that the formulas below give, so that no weight
needs to be stored. Tensors are filled by the names that they have here.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

RELEASED_AXES = ("xy", "xz", "zx")
CORRECT_AXES = ("xy", "xz", "zy")


def hashed(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers of zero mean and unit variance in ±√3 that depend on `name` and their index alone."""
    index = np.arange(1, math.prod(shape) + 1, dtype=np.float64)
    fraction = np.sin(12.9898 * index + zlib.crc32(name.encode()) % 10007) * 43758.5453 % 1.0
    return torch.from_numpy(((fraction - 0.5) * math.sqrt(12)).astype(np.float32)).reshape(shape)


def hashed_weights(tensors: Mapping[str, torch.Tensor], super_resolution_bias: float = 0.3) -> dict[str, torch.Tensor]:
    """A value for each of the named parameters and buffers, none of them trivial.

    `super_resolution_bias` scales that part's biases; some hundreds drive its activations into their clamp.
    """
    filled = {}
    for name, tensor in tensors.items():
        value = hashed(name, tuple(tensor.shape))
        if name.startswith("mapping_network.layers."):
            value = value * (100 if name.endswith("weight") else 20)  # learning rate multiplier 0.01
        elif name.endswith("affine.bias"):
            value = 1 + 0.3 * value
        elif name.startswith("super_resolution.") and name.endswith("bias"):
            value = value * super_resolution_bias
        elif name.startswith("backbone.") and "torgb.weight" in name:
            value = value * 0.2
        elif name == "decoder.hidden.weight":
            value = value * 3
        elif name == "decoder.out.weight":
            # Hidden units are positive: rows of zero sum and large weights make surfaces and contrasts instead of fog.
            value = 6 * (value - value.mean(dim=1, keepdim=True))
        elif name == "decoder.out.bias":
            value[0] = 3
        elif name.endswith(("bias", "noise_strength", "w_avg")):
            value = value * 0.3
        filled[name] = value
    return filled


def hashed_cameras(name: str, batch: int) -> torch.Tensor:
    """Cameras [batch, 25] at 2.7 from the origin with uncentred, skewed intrinsics of unequal focal lengths."""
    cameras = []
    for i, (yaw, pitch, a, b) in enumerate(hashed(name, (batch, 4)).tolist()):
        yaw, pitch = 0.4 * yaw, 0.2 * pitch
        forward = -torch.tensor(
            [math.sin(yaw) * math.cos(pitch), math.sin(pitch), math.cos(yaw) * math.cos(pitch)], dtype=torch.float64
        )
        right = torch.linalg.cross(forward, torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
        right = right / right.norm()
        extrinsics = torch.eye(4, dtype=torch.float64)
        extrinsics[:3, :3] = torch.stack((right, torch.linalg.cross(forward, right), forward), dim=1)
        extrinsics[:3, 3] = -2.7 * forward
        intrinsics = torch.tensor(
            [4.2647 + 0.1 * a, 0.03 * b, 0.5 + 0.01 * a, 0, 4.2 + 0.1 * b, 0.49 + 0.01 * i, 0, 0, 1],
            dtype=torch.float64,
        )
        cameras.append(torch.cat((extrinsics.flatten(), intrinsics)))
    return torch.stack(cameras).float()


@dataclass(frozen=True)
class GeneratorCase:
    """One recorded generator. `resolution`: side in rays; `psi`, `cutoff`: truncation; `seed`: of the jitter."""

    kind: str
    image_size: int
    axes: tuple[str, ...] = RELEASED_AXES
    batch: int = 1
    resolution: int = 64
    samples: tuple[int, int] = (6, 6)
    psi: float = 0.7
    cutoff: int | None = None
    pose_conditioning: bool = True
    camera_scale: float = 1.0
    mapping_layers: int = 2
    decoder_lr_multiplier: float = 1.0
    conv_clamp: float | None = None
    super_resolution_bias: float = 0.3
    antialias: bool = True
    seed: int = 7

    def config(self) -> dict:
        """The `EG3DGenerator` of this case. Plane and latent sizes are those that the official code fixes."""
        return {
            "image_size": self.image_size,
            "plane_resolution": 256,
            "channel_base": 512,
            "channel_max": 16,
            "pose_conditioning": self.pose_conditioning,
            "camera_scale": self.camera_scale,
            "mapping_layers": self.mapping_layers,
            "plane_axes": self.axes,
            "decoder_lr_multiplier": self.decoder_lr_multiplier,
            "depth_samples": self.samples[0],
            "importance_samples": self.samples[1],
            "neural_resolution": 64,
            "super_resolution_kind": self.kind,
            "super_resolution_conv_clamp": self.conv_clamp,
            "super_resolution_antialias": self.antialias,
        }


GENERATORS = {
    "2x": GeneratorCase("2X", 128, batch=2),
    "2x-unconditioned": GeneratorCase(
        "2X", 128, CORRECT_AXES, resolution=80, samples=(8, 0), pose_conditioning=False, psi=1.0, antialias=False
    ),
    "4x-clamped": GeneratorCase(
        "4X", 256, resolution=32, camera_scale=0.5, psi=0.6, cutoff=5, conv_clamp=256.0, super_resolution_bias=150.0
    ),
    "8x": GeneratorCase("8X", 512, CORRECT_AXES, resolution=128, samples=(4, 5)),
    "8xdc": GeneratorCase("8XDC", 512, mapping_layers=8, decoder_lr_multiplier=0.5, conv_clamp=256.0),
}

# image_size, raw side, channel base and max, mapping layers, clamp, group of the minibatch deviation, batch
DISCRIMINATORS = {
    "64": (64, 32, 1024, 32, 2, None, 4, 8),
    "128-clamped": (128, 64, 512, 16, 8, 1.5, 4, 4),
    "32-ragged": (32, 48, 512, 24, 8, 256.0, 4, 3),
}


def subsample(outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The part of a case's outputs that is stored; odd strides reach even and odd pixels alike."""
    strides = {"image": 17, "image_raw": 7, "depth": 7, "planes": 27}
    stored = {}
    for name, value in outputs.items():
        if name == "ws":
            value = value[:, ::5, ::17]
        elif name == "density":
            value = value[:, ::2]
        elif name in strides:
            step = strides[name]
            value = value[..., step // 2 :: step, step // 3 :: step]
            if name == "planes":
                value = value[:, :, ::5]
        stored[name] = value.contiguous()
    return stored


def inner_points(batch, count, reach):
    return (torch.rand(batch, count, 3) * 2 - 1) * reach
