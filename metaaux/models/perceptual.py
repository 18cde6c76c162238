"""Perceptual distances (Eq. 10): LPIPS and a distance on the features of a dual discriminator.

Both objects share one interface: `taps(image)` gives a list of feature maps, `distance(taps, taps)` compares two such
lists, and calling the object with two images does both. Callers that compare many images with one target keep the
target's taps. Both are differentiable twice, as second-order meta-learning needs (Eq. 7).
"""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

# Added to squared norms: a feature vector of zeros (all units off) must have finite first and second derivatives.
NORM_EPSILON = 1e-10

# LPIPS' normalisation of images in [-1, 1]: ImageNet's mean and standard deviation, carried over from [0, 1].
IMAGENET_SHIFT = (-0.030, -0.088, -0.188)
IMAGENET_SCALE = (0.458, 0.448, 0.450)


def resize_antialiased(image: torch.Tensor, size: int) -> torch.Tensor:
    """Resizes images [B, C, H, W] to float32 [B, C, size, size], bilinear; low-pass filtered where it reduces."""
    with torch.autocast(image.device.type, enabled=False):
        return F.interpolate(image.float(), size=(size, size), mode="bilinear", align_corners=False, antialias=True)


def unit_channels(x: torch.Tensor) -> torch.Tensor:
    """Scales each position's channel vector of [B, C, H, W] to unit length, in float32 for any input precision."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(dim=1, keepdim=True) + NORM_EPSILON)


def check_pair(x: torch.Tensor, y: torch.Tensor) -> None:
    """Raises ValueError unless x and y are image batches [B, 3, H, W] of one shape."""
    if x.ndim != 4 or x.shape[1] != 3 or x.shape != y.shape:
        raise ValueError(f"Images must be batches [B, 3, H, W] of one shape, got {list(x.shape)}, {list(y.shape)}.")


class Fire(nn.Module):
    """SqueezeNet's block (Iandola et al. 2016): 1x1 squeeze, then 1x1 and 3x3 expansions side by side."""

    def __init__(self, in_channels: int, squeeze_channels: int, expand_channels: int):
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeeze_channels, 1)
        self.expand1x1 = nn.Conv2d(squeeze_channels, expand_channels, 1)
        self.expand3x3 = nn.Conv2d(squeeze_channels, expand_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in, H, W] -> [B, 2 * expand, H, W]."""
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], dim=1)


def squeezenet_features() -> nn.Sequential:
    """Layers of SqueezeNet 1.1 before its classifier, indexed as torchvision's `squeezenet1_1.features`."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(64, 16, 64),
        Fire(128, 16, 64),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(128, 32, 128),
        Fire(256, 32, 128),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(256, 48, 192),
        Fire(384, 48, 192),
        Fire(384, 64, 256),
        Fire(512, 64, 256),
    )


def alexnet_features() -> nn.Sequential:
    """Layers of AlexNet (Krizhevsky 2014) up to its last convolution, indexed as torchvision's `alexnet.features`."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )


def vgg16_features() -> nn.Sequential:
    """Layers of VGG-16 (Simonyan & Zisserman 2015) to its last convolution, indexed as torchvision's."""
    layers: list[nn.Module] = []
    in_channels = 3
    for stage, (channels, convolutions) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]):
        if stage:
            layers.append(nn.MaxPool2d(2, 2))
        for _ in range(convolutions):
            layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.ReLU()]
            in_channels = channels
    return nn.Sequential(*layers)


# Backbone name -> (constructor, indices of the tapped layers, channels of each tap); the taps are those of LPIPS.
BACKBONES = {
    "squeeze": (squeezenet_features, (1, 4, 7, 9, 10, 11, 12), (64, 128, 256, 384, 384, 512, 512)),
    "alex": (alexnet_features, (1, 4, 7, 9, 11), (64, 192, 384, 256, 256)),
    "vgg": (vgg16_features, (3, 8, 15, 22, 29), (64, 128, 256, 512, 512)),
}


class LPIPS(ModelMixin, ConfigMixin):
    """Learned perceptual image patch similarity (Zhang et al. 2018), the P of Eq. 10.

    Parameters of the backbone are named as in torchvision (`features.<layer>...`), those of the calibration
    `calibration.<tap>.weight`, each [1, C, 1, 1] and non-negative.

    Args:
        backbone: "squeeze" (SqueezeNet 1.1), "alex" (AlexNet) or "vgg" (VGG-16).
        calibrated: weight each channel by LPIPS' linear layers. They belong to one set of backbone weights: leave them
            off with any other. Without them the distance is the plain sum over channels (LPIPS' "baseline").
        normalization: "imagenet" subtracts ImageNet's mean and divides by its standard deviation; "folded" feeds [-1,
            1] as it is, for backbones whose first layer holds the normalisation.

    Raises:
        ValueError: for an unknown backbone or normalization.
    """

    @register_to_config
    def __init__(self, backbone: str = "squeeze", calibrated: bool = False, normalization: str = "imagenet"):
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"Unknown LPIPS backbone {backbone!r}: choose one of {sorted(BACKBONES)}.")
        if normalization not in ("imagenet", "folded"):
            raise ValueError(f"Unknown LPIPS normalization {normalization!r}: choose 'imagenet' or 'folded'.")
        constructor, self.tap_layers, self.tap_channels = BACKBONES[backbone]
        self.features = constructor()
        self.calibration = nn.ModuleList(
            nn.Conv2d(channels, 1, 1, bias=False) for channels in (self.tap_channels if calibrated else ())
        )
        with torch.no_grad():
            for layer in self.calibration:
                layer.weight.abs_()  # or with random weights it would be no distance, and have no lower bound

    @property
    def kind(self) -> str:
        """Which distance it is, as checkpoints record it: "lpips-vgg" if calibrated, else "features-vgg"."""
        return f"{'lpips' if self.config.calibrated else 'features'}-{self.config.backbone}"

    @classmethod
    def from_features_file(cls, path: str | Path, backbone: str = "squeeze", normalization: str = "folded") -> LPIPS:
        """Builds the uncalibrated distance from a safetensors file of backbone weights under torchvision's
        `features.*` keys.

        Args:
            path: the file, for example `squeezenet11_features.safetensors`.
            backbone: whose weights the file holds, as in the constructor.
            normalization: as in the constructor; "folded" where the file's first layer takes RGB in [-1, 1].

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if a layer's weights are missing from the file or have another shape. Keys of a classifier are
                ignored.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no file of perceptual features at {path}.")
        model = cls(backbone=backbone, calibrated=False, normalization=normalization)
        state = {k: v for k, v in safetensors.torch.load_file(path).items() if not k.startswith("classifier.")}
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{path} does not hold the {backbone!r} backbone: {error}") from error
        return model.eval().requires_grad_(False)

    def taps(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps [B, C_l, H_l, W_l] of the tapped layers, fine to coarse, of images [B, 3, H, W] in [-1, 1]."""
        x = image
        if self.config.normalization == "imagenet":
            # A channel at a time: constants made on the CPU would be copied to the GPU, which no CUDA graph can hold.
            channels = zip(x.unbind(dim=1), IMAGENET_SHIFT, IMAGENET_SCALE, strict=True)
            x = torch.stack([(channel - shift) / scale for channel, shift, scale in channels], dim=1)
        taps = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.tap_layers:
                taps.append(x)
        return taps

    def distance(self, x_taps: list[torch.Tensor], y_taps: list[torch.Tensor]) -> torch.Tensor:
        """LPIPS [B] of two lists of taps: squared differences of unit vectors, spatial means summed over taps."""
        total = torch.zeros(x_taps[0].shape[0], dtype=torch.float32, device=x_taps[0].device)
        for index, (x, y) in enumerate(zip(x_taps, y_taps)):
            difference = (unit_channels(x) - unit_channels(y)).square()
            if self.config.calibrated:
                difference = difference * self.calibration[index].weight.float()
            total = total + difference.sum(dim=1).mean(dim=(1, 2))
        return total

    def pooled_features(self, image: torch.Tensor) -> torch.Tensor:
        """Spatial mean of the last tap, float32 [B, C] (512 for "squeeze"): the features of a Fréchet distance."""
        return self.taps(image)[-1].float().mean(dim=(2, 3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Distance [B] of images x and y, both [B, 3, H, W] in [-1, 1]. Raises ValueError for other shapes."""
        check_pair(x, y)
        return self.distance(self.taps(x), self.taps(y))


class DiscriminatorPerceptualDistance:
    """LPIPS-like distance on the features of a dual discriminator, for checkpoints that ship no third-party network.

    The discriminator sees an image and its neural rendering; here the latter is the image itself, reduced to the
    rendering's size.

    Args:
        discriminator: a `DualDiscriminator` (or anything with its `features` and a `config`). It is read, never
            changed: freeze its parameters where no gradient of them is wanted.
        raw_size: side of the reduced image; None takes `discriminator.config.raw_size` where there is one, otherwise
            half the image.
        dtype: precision of the discriminator's convolutions; None leaves it to the discriminator. Distances are
            float32 in any case.

    Attributes:
        kind: "discriminator", as checkpoints record it.
    """

    kind = "discriminator"

    def __init__(self, discriminator: nn.Module, raw_size: int | None = None, dtype: torch.dtype | None = None):
        self.discriminator = discriminator
        self.dtype = dtype
        self.raw_size = raw_size if raw_size is not None else getattr(discriminator.config, "raw_size", None)

    def taps(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Features [B, C_l, H_l, W_l] of the discriminator's blocks, fine to coarse, of images [B, 3, S, S]."""
        return self.discriminator.features(image, self.reduced(image), dtype=self.dtype)

    def reduced(self, image: torch.Tensor) -> torch.Tensor:
        """What takes the rendering's place beside images [B, 3, S, S]: [B, 3, raw_size, raw_size]."""
        raw_size = image.shape[-1] // 2 if self.raw_size is None else self.raw_size
        return resize_antialiased(image, raw_size)

    def distance(self, x_taps: list[torch.Tensor], y_taps: list[torch.Tensor]) -> torch.Tensor:
        """Distance [B] of two lists of taps: squared differences of unit vectors, spatial means summed over blocks."""
        return sum(
            (unit_channels(x) - unit_channels(y)).square().sum(dim=1).mean(dim=(1, 2)) for x, y in zip(x_taps, y_taps)
        )

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Distance [B] of images x and y, both [B, 3, S, S] in [-1, 1]. Raises ValueError for other shapes."""
        check_pair(x, y)
        return self.distance(self.taps(x), self.taps(y))
