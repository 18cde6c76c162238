"""The 2D module of the auxiliary network (§3.3): a hypernetwork for each modulated convolution of the generator.

Dimensions: see `metaaux.models`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .activation import LRELU_SLOPE


class HyperNetwork(nn.Module):
    """H_j: the residual weights of one convolution, δ = A(z)·B(z)ᵀ/√rank + D.

    As in HyperStyle, strided convolutions reduce the image features to a vector z (`reduce_features`). A [C_out, rank]
    and B [C_in, rank] are linear in z; D [C_out, C_in] is the bias of the last layer: what suits all photos, and the
    full-rank part that gradient steps on one photo can move freely. A and D start at zero and B does not, so δ is zero
    and yet A and D have gradients. With `kernel_size` 3 D is [C_out, C_in, 3, 3]: steps move each tap of a kernel by
    itself, while the prediction still scales the kernel as a whole.

    Args:
        in_channels: channels of the image features.
        out_features: C_out of the generator's layer.
        in_features: its C_in.
        channels: length of z and width of the convolutions.
        rank: of the predicted part.
        num_convs: number of strided 3×3 convolutions.
        kernel_size: side of D's kernels, 1 or `KERNEL_SIZE`.
    """

    def __init__(
        self,
        in_channels: int,
        out_features: int,
        in_features: int,
        channels: int,
        rank: int,
        num_convs: int,
        kernel_size: int = 1,
    ):
        super().__init__()
        self.out_features, self.in_features, self.rank = out_features, in_features, rank
        self.convs = nn.ModuleList(
            nn.Conv2d(channels if i else in_channels, channels, 3, stride=2, padding=1) for i in range(num_convs)
        )
        self.to_a = nn.Linear(channels, out_features * rank)
        self.to_b = nn.Linear(channels, in_features * rank)
        taps = (kernel_size, kernel_size) if kernel_size > 1 else ()
        self.bias = nn.Parameter(torch.zeros(out_features, in_features, *taps))
        nn.init.zeros_(self.to_a.weight)
        nn.init.zeros_(self.to_a.bias)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """z [B, channels] → δ [B, C_out, C_in, k, k], where k is `kernel_size`."""
        a = self.to_a(z).unflatten(1, (self.out_features, self.rank))
        b = self.to_b(z).unflatten(1, (self.in_features, self.rank))
        delta = (a @ b.transpose(1, 2) / math.sqrt(self.rank))[..., None, None]
        return delta + (self.bias if self.bias.ndim == 4 else self.bias[..., None, None])


def reduce_features(features: torch.Tensor, hypernetworks: Sequence[HyperNetwork]) -> torch.Tensor:
    """Image features [B, C, h, w] → z of each of J hypernetworks [J, B, channels], through their convolutions.

    Written as matrix products of patches for all hypernetworks at once: where each task has weights of its own, cuDNN
    works through dozens of tiny convolutions group by group.
    """
    count = len(hypernetworks)
    x = features[:, None]  # the first convolutions share their input
    for convs in zip(*(hypernetwork.convs for hypernetwork in hypernetworks), strict=True):
        batch, inputs, _, height, width = x.shape
        patches = F.unfold(x.flatten(0, 1), 3, padding=1, stride=2).unflatten(0, (batch, inputs))
        weight = torch.stack([conv.weight.flatten(1) for conv in convs])
        bias = torch.stack([conv.bias for conv in convs])
        x = F.leaky_relu(weight @ patches + bias[..., None], LRELU_SLOPE)
        x = x.unflatten(-1, ((height + 1) // 2, (width + 1) // 2))
    return x.mean(dim=(3, 4)).expand(-1, count, -1).transpose(0, 1)
