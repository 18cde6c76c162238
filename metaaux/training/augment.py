"""Adaptive discriminator augmentation (Karras et al., "Training GANs with Limited Data", 2020), for paired images.

The image and its raw rendering are transformed alike. Transformations that would not leak are applied with
probability `p` each; mirroring and quarter turns are left out, since the camera tells the discriminator the pose.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


# kornia's augmentations take their probability as a number and read on the host which images they hit; a captured CUDA
# graph can replay neither.
class AdaptiveAugmentation:
    """Geometric and colour augmentation whose strength follows the discriminator's overfitting.

    Args:
        target: mean sign of the discriminator's logits on photos at which the strength stays (0.6).
        ramp_images: images over which the strength could go from 0 to 1.
        limit: greatest strength; non-leaking up to about 0.8.
    """

    def __init__(
        self,
        target: float = 0.6,
        ramp_images: int = 100_000,
        limit: float = 0.8,
        device: torch.device | str = "cpu",
    ):
        self.target, self.ramp_images, self.limit = target, ramp_images, limit
        # Constants and the strength lie on the device, so that a captured step can be replayed with another strength.
        self.strength = torch.zeros((), device=device)
        self.grey_axis = torch.full((3, 3), 1 / 3, device=device)
        self.cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=device) * 3**-0.5

    @property
    def p(self) -> float:
        """The strength, 0 to `limit`: the probability of each transformation."""
        return self.strength.item()

    @p.setter
    def p(self, value: float) -> None:
        self.strength.fill_(value)

    def adapt(self, mean_sign: float, images: int) -> None:
        """Move the strength after `images` more, given the mean sign of the logits on photos over them."""
        step = math.copysign(images / self.ramp_images, mean_sign - self.target)
        self.p = min(max(self.p + step, 0.0), self.limit)

    def __call__(self, image: torch.Tensor, image_raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """image [B, 3, S, S], image_raw [B, 3, h, h] → both transformed alike, the raw one brought to S; in [-1, 1].

        With strength 0 the image comes back unchanged but for rounding.
        """
        side = image.shape[-1]
        raw = F.interpolate(image_raw, size=(side, side), mode="bilinear", align_corners=False)
        pair = self._colour(self._geometry(torch.cat((image, raw), dim=1)))
        return pair[:, :3], pair[:, 3:]

    def _chance(self, x: torch.Tensor, value: torch.Tensor, neutral: float) -> torch.Tensor:
        """`value` [B] where a coin of probability p falls so, else `neutral`."""
        return torch.where(torch.rand(len(x), device=x.device) < self.strength, value, torch.full_like(value, neutral))

    def _geometry(self, x: torch.Tensor) -> torch.Tensor:
        batch, device = len(x), x.device

        def normal(deviation):
            return torch.randn(batch, device=device) * deviation

        angle = self._chance(x, (torch.rand(batch, device=device) * 2 - 1) * (math.pi / 6), 0.0)
        scale = self._chance(x, torch.exp2(normal(0.2)), 1.0)
        stretch = self._chance(x, torch.exp2(normal(0.1)), 1.0)
        shift_x, shift_y = (self._chance(x, normal(0.125), 0.0) for _ in range(2))
        cos, sin = torch.cos(angle), torch.sin(angle)
        row0 = torch.stack((cos * scale * stretch, -sin * scale * stretch, 2 * shift_x), dim=-1)
        row1 = torch.stack((sin * scale / stretch, cos * scale / stretch, 2 * shift_y), dim=-1)
        grid = F.affine_grid(torch.stack((row0, row1), dim=1), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid.to(x.dtype), padding_mode="reflection", align_corners=False)

    def _colour(self, x: torch.Tensor) -> torch.Tensor:
        batch, device = len(x), x.device
        identity = torch.eye(3, device=device).expand(batch, 3, 3)
        brightness = self._chance(x, torch.randn(batch, device=device) * 0.2, 0.0)
        contrast = self._chance(x, torch.exp2(torch.randn(batch, device=device) * 0.5), 1.0)
        saturation = self._chance(x, torch.exp2(torch.randn(batch, device=device)), 1.0)
        hue = self._chance(x, (torch.rand(batch, device=device) * 2 - 1) * math.pi, 0.0)
        # Hue turns colours about the grey axis (Rodrigues); saturation scales what is perpendicular to it.
        grey = self.grey_axis
        cos, sin = torch.cos(hue)[:, None, None], torch.sin(hue)[:, None, None]
        turn = identity * cos + self.cross * sin + grey * (1 - cos)
        matrix = (grey + (identity - grey) * saturation[:, None, None]) @ turn * contrast[:, None, None]
        pixels = x.unflatten(1, (2, 3)).flatten(3)
        y = matrix.to(x.dtype)[:, None] @ pixels + brightness.to(x.dtype)[:, None, None, None]
        return y.unflatten(3, x.shape[2:]).flatten(1, 2)
