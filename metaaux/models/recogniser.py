"""dlib's face recognition network (Davis King, `dlib_face_recognition_resnet_model_v1`, public domain), in PyTorch.

A ResNet with 29 convolutions takes an upright face chip of 150² pixels to 128 numbers, whose Euclidean distance tells
persons apart. The chip is cut out of an aligned crop by its camera: there are no landmarks to detect, and an image's
gradient passes through, any number of times.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .perceptual import resize_antialiased
from .renderer import bilinear_gather

CHIP_SIZE = 150
#: What the network subtracts from RGB in 0 to 255, and then divides by.
MEAN_RGB, SCALE = (122.782, 117.001, 104.298), 256.0
#: Eye corners (outer and inner of the picture's right eye, then of its left one) and nose base: in dlib's chip with a
#: padding of 0.25, units of its side ...
CHIP_POINTS = (
    (0.739712, 0.308999),
    (0.597374, 0.319312),
    (0.247050, 0.309152),
    (0.389389, 0.319376),
    (0.493408, 0.585198),
)
#: ... and in the world of the cameras, fitted to dlib's landmarks of 188 aligned crops.
WORLD_POINTS = (
    (0.1057, 0.0508, 0.1276),
    (0.0450, 0.0471, 0.1389),
    (-0.1057, 0.0508, 0.1276),
    (-0.0450, 0.0471, 0.1389),
    (0.0, -0.0596, 0.1917),
)
#: Distance below which two aligned crops show one person. dlib's own 0.6 is loose for them.
SAME_PERSON = 0.45
# Larger crops are reduced first: the chip is 0.57 to 0.7 of a crop's side, so that its look-up would skip pixels.
_LARGEST_CROP = 256


class ChannelAffine(nn.Module):
    """One factor and one offset a channel: what a frozen batch normalisation leaves."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] → the same shape."""
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class ConvolutionAffine(nn.Module):
    """Convolution and affine. dlib pads a convolution by half its kernel, but not at all where it has a stride."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2 if stride == 1 else 0)
        self.affine = ChannelAffine(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in, H, W] → [B, out, ·, ·]."""
        return self.affine(self.conv(x))


class PaddedResidual(nn.Module):
    """Two 3×3 convolutions added to their input, which a `down` block pools by 2.

    Where the two terms differ in channels, height or width, the smaller one is padded with zeros at the end.
    """

    def __init__(self, in_channels: int, out_channels: int, down: bool):
        super().__init__()
        self.down = down
        self.first = ConvolutionAffine(in_channels, out_channels, 3, 2 if down else 1)
        self.second = ConvolutionAffine(out_channels, out_channels, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in, H, W] → [B, out, ·, ·], half the size if `down`."""
        y = self.second(F.relu(self.first(x)))
        if self.down:
            x = F.avg_pool2d(x, 2)
        shape = [max(a, b) for a, b in zip(x.shape[1:], y.shape[1:], strict=True)]
        return F.relu(_padded(x, shape) + _padded(y, shape))


def _padded(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Zeros behind the channels, rows and columns of [B, C, H, W], up to `shape` [C, H, W]."""
    channels, height, width = (wanted - has for wanted, has in zip(shape, x.shape[1:], strict=True))
    return F.pad(x, (0, width, 0, height, 0, channels))


def _on_device(rows: Sequence[Sequence[float]], device: torch.device) -> torch.Tensor:
    """Constants as a float32 matrix, made on the device: a copy from the CPU is what no CUDA graph can hold."""
    return torch.stack([torch.full((), value, device=device) for row in rows for value in row]).unflatten(
        0, (len(rows), -1)
    )


def chip_transforms(cameras: torch.Tensor) -> torch.Tensor:
    """Where chips lie in crops: cameras [B, 25] → [B, 2, 3], from chip to crop, both in units of their sides.

    The eye corners and the nose base of a mean face, projected with the camera, stand in for detected landmarks. The
    chip is the square that a similarity transform (least squares) makes of dlib's template.
    """
    template, world = _on_device(CHIP_POINTS, cameras.device), _on_device(WORLD_POINTS, cameras.device)
    extrinsics, intrinsics = cameras[:, :16].float().unflatten(1, (4, 4)), cameras[:, 16:].float().unflatten(1, (3, 3))
    points = (world - extrinsics[:, None, :3, 3]) @ extrinsics[:, :3, :3]
    points = ((points / points[..., 2:]) @ intrinsics.mT)[..., :2]

    a, b = template - template.mean(0), points - points.mean(1, keepdim=True)
    square = a.square().sum()
    cos = (b * a).sum((1, 2)) / square
    sin = (a[:, 0] * b[..., 1] - a[:, 1] * b[..., 0]).sum(1) / square
    linear = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
    origin = points.mean(1) - (linear @ template.mean(0)[:, None])[..., 0]
    return torch.cat((linear, origin[..., None]), dim=-1)


def chips_from_crops(crops: torch.Tensor, cameras: torch.Tensor) -> torch.Tensor:
    """Face chips [B, 3, 150, 150] of aligned crops [B, 3, H, H] with cameras [B, 25], in float32.

    Differentiable in `crops` any number of times, which `grid_sample` is not on CUDA. Beyond the crop its border is
    continued.
    """
    if crops.shape[-1] > _LARGEST_CROP:
        crops = resize_antialiased(crops, _LARGEST_CROP)
    with torch.autocast(crops.device.type, enabled=False):  # positions in float32, whatever the network computes in
        return _chips(crops.float(), cameras.float())


def _chips(crops: torch.Tensor, cameras: torch.Tensor) -> torch.Tensor:
    side = crops.shape[-1]
    centres = (torch.arange(CHIP_SIZE, device=crops.device) + 0.5) / CHIP_SIZE
    v, u = torch.meshgrid(centres, centres, indexing="ij")
    positions = torch.stack((u, v, torch.ones_like(u)), dim=-1).flatten(0, 1) @ chip_transforms(cameras).mT
    # Pixel centres of the border lie half a pixel inside.
    positions = (positions * 2 - 1).clamp(1 / side - 1, 1 - 1 / side)
    return bilinear_gather(crops, positions).mT.unflatten(2, (CHIP_SIZE, CHIP_SIZE))


class FaceRecogniser(ModelMixin, ConfigMixin):
    """Whose face an aligned crop shows: images and their cameras to vectors, near for one person.

    The default configuration is dlib's network; others serve tests.

    Args:
        widths: channels of each stage.
        depths: residual blocks of each stage; each stage but the first halves the size.
        embedding_dim: length of the result.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        widths: tuple[int, ...] = (32, 64, 128, 256, 256),
        depths: tuple[int, ...] = (3, 4, 3, 3, 1),
        embedding_dim: int = 128,
    ):
        super().__init__()
        if len(widths) != len(depths):
            raise ValueError(f"as many depths as widths are needed, got {list(depths)} and {list(widths)}")
        self.stem = ConvolutionAffine(3, widths[0], 7, 2)
        blocks, channels = [], widths[0]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for index in range(depth):
                blocks.append(PaddedResidual(channels, width, down=stage > 0 and index == 0))
                channels = width
        self.blocks = nn.ModuleList(blocks)
        self.fc = nn.Linear(channels, embedding_dim, bias=False)

    @classmethod
    def from_weights_file(cls, path: str | Path) -> FaceRecogniser:
        """dlib's network, frozen and in float32, from a safetensors file of its weights in any precision.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds other weights.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no face recognition network at {path}")
        model = cls()
        try:
            model.load_state_dict({n: v.float() for n, v in safetensors.torch.load_file(path).items()})
        except RuntimeError as error:
            raise ValueError(f"{path} does not hold dlib's face recognition network: {error}") from error
        return model.eval().requires_grad_(False)

    def embed_chips(self, chips: torch.Tensor) -> torch.Tensor:
        """Chips [B, 3, 150, 150] in [-1, 1] → [B, embedding_dim]."""
        # A channel at a time, so that the constants stay numbers (see `_on_device`).
        channels = [(c * 127.5 + (127.5 - mean)) / SCALE for c, mean in zip(chips.unbind(1), MEAN_RGB, strict=True)]
        x = torch.stack(channels, dim=1).to(self.dtype)
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))

    def forward(self, images: torch.Tensor, cameras: torch.Tensor) -> torch.Tensor:
        """Aligned crops [B, 3, H, H] of any size in [-1, 1], cameras [B, 25] → [B, embedding_dim], not normalised.

        Raises:
            ValueError: images that are not square RGB, or not as many cameras.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
            raise ValueError(f"images must be [B, 3, H, H], got {list(images.shape)}")
        if cameras.shape != (len(images), 25):
            raise ValueError(f"{len(images)} images need cameras [{len(images)}, 25], got {list(cameras.shape)}")
        return self.embed_chips(chips_from_crops(images, cameras))

    @staticmethod
    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Euclidean distance [B] of embeddings [B, D]; below `SAME_PERSON` they are of one person."""
        return torch.linalg.vector_norm(a - b, dim=-1)
