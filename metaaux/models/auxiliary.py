"""Auxiliary network (§3.3, Fig. 3): from a photo to offsets for the generator's weights and sampling positions.

Hypernetworks that predict residual weights, δ relative to θ, are HyperStyle's (Alaluf et al. 2022); HyperInverter
(Dinh et al. 2022) predicts them in one pass, as step 0 does here. A learning rate for each tensor is MAML++'s
(Antoniou et al. 2019). Dimensions: see `metaaux.models`.

The 2D module predicts, for each modulated convolution j of the generator, a δ_j that replaces its weight θ_j by
θ_j·(1 + δ_j). The 3D module predicts an offset tri-plane, whose look-up moves the renderer's sample points (Eq. 4).
Both are zero at the start, so that training and adaptation begin at the unchanged generator.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from transformers import ResNetBackbone, ResNetConfig

from .activation import LRELU_SLOPE
from .hypernetwork import HyperNetwork, reduce_features
from .offset_planes import BACKBONE_STRIDE, OffsetPlaneNetwork
from .stylegan2 import KERNEL_SIZE, StyleGAN2Generator
from .weights import constructor_arguments, unwrapped

#: Names of the 3D module's last biases: one a position, and the last convolution's.
_POSITION_BIAS, _OFFSET_BIAS = "offset_network.bias", "offset_network.to_offsets.bias"


@dataclass
class AuxiliaryOutput:
    """Offsets for one batch of photos.

    Attributes:
        weight_offsets: δ by generator layer (relative to the weight), each [B, C_out, C_in, 1, 1], or [B, C_out, C_in,
            3, 3] where D has full kernels; empty without the 2D module.
        offset_planes: [B, 3, 3, r, r]: for each plane a displacement vector in world units; `None` without the 3D
            module.
    """

    weight_offsets: dict[str, torch.Tensor]
    offset_planes: torch.Tensor | None


def _module_name(layer: str) -> str:
    """Of a layer's hypernetwork: layer names contain dots, which module names may not."""
    return layer.replace(".", "-")


def _check_prefixes(prefixes: Sequence[str], layers: Collection[str]) -> None:
    idle = [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in layers)]
    if idle:
        raise ValueError(f"no modulated layer of the generator starts with {idle}; it has {sorted(layers)}")


class Backbone(ResNetBackbone):
    """ResNet whose numbers are not drawn where it has no storage, as while a checkpoint is read: transformers spares
    that under `torch.device("meta")`, not under the accelerate library's empty weights, which diffusers uses."""

    def init_weights(self) -> None:
        if self.device.type != "meta":
            super().init_weights()


class AuxiliaryNetwork(ModelMixin, ConfigMixin):
    """Predicts weight offsets and offset planes from a photo.

    A ResNet (batch normalisation, transformers' `ResNetBackbone`) gives the image features. Run it in eval mode for
    inference and adaptation: a single photo has no batch statistics.

    With its weights the network stores how it is to be adapted: one learning rate a tensor (`inner_rates`), the norm
    to which gradients are clipped (`config.inner_max_gradient_norm`) and the momentum (`config.inner_momentum`).

    Args:
        layer_shapes: {generator layer: [C_out, C_in]} of the convolutions that get offsets (`config_for` fills it).
        image_size: side of the photos, a multiple of 32.
        backbone_layer_type: "bottleneck" or "basic"; "bottleneck" with the default depths is ResNet-101.
        backbone_depths: residual units of each of the four stages.
        backbone_embedding_size: channels of the first convolution.
        backbone_hidden_sizes: channels of each stage.
        neck_channels: channels to which the top feature map is reduced for both modules.
        hyper_channels: width of each hypernetwork.
        hyper_rank: rank of the predicted part of δ.
        hyper_convs: strided convolutions of each hypernetwork.
        use_weight_offsets: whether there is a 2D module.
        full_kernel_layers: layers whose name starts with one of these have a D of full kernels (`HyperNetwork`).
        use_offset_planes: whether there is a 3D module; a 2D generator has no use for it.
        plane_features: channels of each of the generator's planes.
        plane_resolution: side R of the generator's planes.
        offset_resolution: side of the predicted offsets, a divisor of `plane_resolution`.
        offset_bias_resolution: side r of the offset planes, to which the prediction is interpolated and at which it
            has a bias a position, for gradient steps to move; at least `offset_resolution`. `None`: the same; 0: no
            such bias.
        offset_channels: width of the 3D module.
        offset_image_features: channels of each plane of image features.
        camera_channels: length of the camera's style vector.
        box_size: side of the renderer's box, world units.
        offset_bound: largest displacement |Δp| as a fraction of the box.
        inner_learning_rate: α of Eq. 5 at the start, for all tensors.
        inner_max_gradient_norm: clipping of the gradient in Eq. 5; `None`: off.
        inner_momentum: μ of the steps' momentum; 0: Eq. 5 itself.
        inner_loss: `losses.InversionLoss.describe` of the loss for which training set its inner rates; `None` where
            that is not known.
        inner_training: how it was meta-learnt, {"steps": K, "order": "first" or "second", "multi_step_weight": the
            share of the losses on the way}; `None` where it was not or that is not known.

    Raises:
        ValueError: sizes do not fit together, both modules are switched off, or one of `full_kernel_layers` begins no
            layer's name.
    """

    @register_to_config
    def __init__(
        self,
        layer_shapes: dict[str, Sequence[int]],
        image_size: int = 512,
        backbone_layer_type: str = "bottleneck",
        backbone_depths: Sequence[int] = (3, 4, 23, 3),
        backbone_embedding_size: int = 64,
        backbone_hidden_sizes: Sequence[int] = (256, 512, 1024, 2048),
        neck_channels: int = 512,
        hyper_channels: int = 128,
        hyper_rank: int = 8,
        hyper_convs: int = 2,
        full_kernel_layers: Sequence[str] = (),
        use_weight_offsets: bool = True,
        use_offset_planes: bool = True,
        plane_features: int = 32,
        plane_resolution: int = 256,
        offset_resolution: int = 64,
        offset_bias_resolution: int | None = None,
        offset_channels: int = 128,
        offset_image_features: int = 16,
        camera_channels: int = 128,
        box_size: float = 1.0,
        offset_bound: float = 0.05,
        inner_learning_rate: float = 0.01,
        inner_max_gradient_norm: float | None = None,
        inner_momentum: float = 0.0,
        inner_loss: dict[str, Any] | None = None,
        inner_training: dict[str, Any] | None = None,
    ):
        super().__init__()
        self._check_config()
        self.backbone = Backbone(
            ResNetConfig(
                layer_type=backbone_layer_type,
                depths=list(backbone_depths),
                embedding_size=backbone_embedding_size,
                hidden_sizes=list(backbone_hidden_sizes),
                out_features=[f"stage{len(backbone_depths)}"],
            )
        )
        self.neck = nn.Conv2d(backbone_hidden_sizes[-1], neck_channels, 1)
        # Sorted, because a saved configuration is sorted too.
        self.layer_names = sorted(layer_shapes) if use_weight_offsets else []
        _check_prefixes(full_kernel_layers, self.layer_names)
        self.hypernetworks = nn.ModuleDict()
        for name in self.layer_names:
            kernel_size = KERNEL_SIZE if name.startswith(tuple(full_kernel_layers)) else 1
            sizes = (hyper_channels, hyper_rank, hyper_convs, kernel_size)
            self.hypernetworks[_module_name(name)] = HyperNetwork(neck_channels, *layer_shapes[name], *sizes)
        self.offset_network = None
        if use_offset_planes:
            sizes = (offset_channels, camera_channels, plane_features, offset_image_features, offset_resolution)
            side = offset_resolution if offset_bias_resolution is None else offset_bias_resolution
            self.offset_network = OffsetPlaneNetwork(
                neck_channels, image_size // BACKBONE_STRIDE, *sizes, side, offset_bound * box_size
            )
        self.log_inner_rates = nn.Parameter(
            torch.full((len(self.adaptable_parameters()),), math.log(inner_learning_rate))
        )

    def _check_config(self) -> None:
        """Raises ValueError for sizes that do not fit together."""
        config = self.config
        if not config.use_weight_offsets and not config.use_offset_planes:
            raise ValueError("use_weight_offsets and use_offset_planes are both off: nothing is left to predict")
        if config.use_weight_offsets and not config.layer_shapes:
            raise ValueError("layer_shapes is empty: name the generator's layers, or switch use_weight_offsets off")
        if config.image_size % BACKBONE_STRIDE:
            raise ValueError(f"image_size must be a multiple of {BACKBONE_STRIDE}, got {config.image_size}")
        if not config.use_offset_planes:
            return
        side, bias_side = config.offset_resolution, config.offset_bias_resolution
        if config.plane_resolution % side:
            raise ValueError(f"offset_resolution {side} does not divide the planes' {config.plane_resolution}")
        if bias_side and bias_side < side:
            raise ValueError(f"offset_bias_resolution {bias_side} is below offset_resolution {side}")

    @staticmethod
    def config_for(generator: nn.Module, prefixes: Sequence[str] = ("",), **overrides: Any) -> dict[str, Any]:
        """Constructor arguments that fit an `EG3DGenerator`, or a `StyleGAN2Generator` (2D module alone).

        Args:
            generator: its `modulated_layers` and `config` are read.
            prefixes: layers whose name starts with one of these get offsets. Default: all.
            overrides: further constructor arguments.

        Raises:
            ValueError: a prefix matches no layer.
        """
        layers = generator.modulated_layers
        _check_prefixes(prefixes, layers)
        config = {
            "layer_shapes": {n: list(shape) for n, shape in layers.items() if n.startswith(tuple(prefixes))},
            "image_size": generator.config.image_size,
        }
        if isinstance(unwrapped(generator), StyleGAN2Generator):
            return {**config, "use_offset_planes": False, **overrides}
        return {
            **config,
            "plane_features": generator.config.plane_features,
            "plane_resolution": generator.config.plane_resolution,
            "box_size": generator.config.box_size,
            **overrides,
        }

    def adaptable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters θ^Aux that Eq. 5 moves, sorted by name: all but the learning rates themselves."""
        return {name: p for name, p in sorted(self.named_parameters()) if name != "log_inner_rates"}

    def inner_rates(self) -> dict[str, torch.Tensor]:
        """α of Eq. 5 for each adaptable parameter, scalars; differentiable, as meta-training learns them."""
        return dict(zip(self.adaptable_parameters(), self.log_inner_rates.exp().unbind(), strict=True))

    def inner_rate_values(self) -> dict[str, float]:
        """`inner_rates` as numbers, read at once: one by one, each would make the host wait for a GPU."""
        return dict(zip(self.adaptable_parameters(), self.log_inner_rates.exp().tolist(), strict=True))

    def _log_rates(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.adaptable_parameters(), self.log_inner_rates.unbind(), strict=True))

    def free_parameters(self) -> frozenset[str]:
        """Names of those adaptable parameters that are added to the offsets as they are, whatever the photo shows: the
        biases of the last layers, of the kernels' taps and of the offset planes' positions."""
        names = {f"hypernetworks.{_module_name(layer)}.bias" for layer in self.layer_names}
        names |= {_POSITION_BIAS, _OFFSET_BIAS}
        return frozenset(names & self.adaptable_parameters().keys())

    @torch.no_grad()
    def with_offset_bias_resolution(self, resolution: int) -> AuxiliaryNetwork:
        """A copy whose offset planes have another side, with the bias interpolated and its learning rate adjusted.

        The gradient of the loss with regard to one of s² times as many positions is s² times smaller; with a rate s²
        times larger a step moves smooth offsets as far as before. Where there was no bias a position, the new one is
        zero and has the rate of the last convolution's bias, likewise adjusted.

        Args:
            resolution: at least the prediction's; 0 takes the bias away, whose mean goes into that of the last
                convolution.

        Raises:
            ValueError: there is no 3D module, or `resolution` is below the prediction's.
        """
        if self.offset_network is None:
            raise ValueError("this auxiliary network has no 3D module, so there is no offset bias to refine")
        old, log_rates, changed = self.offset_network.bias, self._log_rates(), {}
        if old is None and resolution:
            bias = torch.zeros(9, resolution, resolution, device=self.device)
            changed[_POSITION_BIAS] = bias, log_rates[_OFFSET_BIAS] + 2 * math.log(resolution)
        elif old is not None and resolution:
            bias = F.interpolate(old[None].float(), (resolution, resolution), mode="bilinear", align_corners=False)
            changed[_POSITION_BIAS] = bias[0], log_rates[_POSITION_BIAS] + 2 * math.log(resolution / old.shape[-1])
        elif old is not None:
            mean = self.get_parameter(_OFFSET_BIAS) + old.mean((1, 2))
            changed = {_POSITION_BIAS: None, _OFFSET_BIAS: (mean, log_rates[_OFFSET_BIAS])}
        return self._with({"offset_bias_resolution": resolution}, changed)

    @torch.no_grad()
    def with_full_kernels(self, prefixes: Sequence[str]) -> AuxiliaryNetwork:
        """A copy that predicts the same and whose layers starting with one of `prefixes` have a D of full kernels.

        A step along a kernel's own gradient, whose taps mostly disagree, is then as long as before with a rate larger
        by the kernel's side: each tap's gradient is about that much smaller than that of their sum.

        Raises:
            ValueError: a prefix matches no layer.
        """
        changed, log_rates = {}, self._log_rates()
        for layer in self.layer_names:
            name = f"hypernetworks.{_module_name(layer)}.bias"
            old = self.get_parameter(name)
            if layer.startswith(tuple(prefixes)) and old.ndim == 2:
                kernels = old[..., None, None].repeat(1, 1, KERNEL_SIZE, KERNEL_SIZE)
                changed[name] = kernels, log_rates[name] + math.log(KERNEL_SIZE)
        return self._with({"full_kernel_layers": sorted({*self.config.full_kernel_layers, *prefixes})}, changed)

    @torch.no_grad()
    def without_module(self, module: Literal["2d", "3d"]) -> AuxiliaryNetwork:
        """A copy without weight offsets ("2d") or offset planes ("3d"), as in the paper's ablations (Table 3), which
        predicts the others as this one does.

        Raises:
            ValueError: there is no such module, or no other.
        """
        has = {"2d": self.config.use_weight_offsets, "3d": self.config.use_offset_planes}
        if module not in has or not all(has.values()):
            raise ValueError(
                f"only a network with both modules can lose '2d' or '3d'; got {module!r} for one that has "
                f"{', '.join(name for name, there in has.items() if there)}"
            )
        config = {"use_weight_offsets": False, "full_kernel_layers": []}
        if module == "3d":
            config = {"use_offset_planes": False, "offset_bias_resolution": 0}
        with torch.device("meta"):
            kept = AuxiliaryNetwork(**constructor_arguments(self, **config)).state_dict()
        return self._with(config, {name: None for name in self.state_dict() if name not in kept})

    def _with(
        self, config: dict[str, Any], parameters: dict[str, tuple[torch.Tensor, torch.Tensor] | None]
    ) -> AuxiliaryNetwork:
        """A copy with another configuration, and parameters by name with the logarithms of their rates; `None`: left
        out."""
        copy = AuxiliaryNetwork(**constructor_arguments(self, **config)).to(self.device)
        state, log_rates = self.state_dict(), self._log_rates()
        for name, changed in parameters.items():
            if changed is None:
                del state[name]
            else:
                state[name], log_rates[name] = changed[0].to(self.dtype), changed[1]
        state["log_inner_rates"] = torch.stack([log_rates[name] for name in copy.adaptable_parameters()])
        copy.load_state_dict(state)
        return copy.to(self.dtype).train(self.training)

    def forward(
        self, image: torch.Tensor, cameras: torch.Tensor | None = None, planes: torch.Tensor | None = None
    ) -> AuxiliaryOutput:
        """Offsets for each photo.

        Args:
            image: photos [B, 3, S, S] in [-1, 1].
            cameras: [B, 25]; needed by the 3D module.
            planes: the generator's own planes [B, 3, C, R, R] for the initial code, without offsets; likewise.

        Raises:
            ValueError: shapes differ from the configuration, or the 3D module lacks cameras or planes.
        """
        size = self.config.image_size
        if image.ndim != 4 or image.shape[1:] != (3, size, size):
            raise ValueError(f"image is {tuple(image.shape)}, expected [B, 3, {size}, {size}]")
        features = F.leaky_relu(self.neck(self.backbone(image).feature_maps[-1]), LRELU_SLOPE)
        weight_offsets, offset_planes = {}, None
        if self.layer_names:
            hypernetworks = [self.hypernetworks[_module_name(name)] for name in self.layer_names]
            codes = reduce_features(features, hypernetworks)
            weight_offsets = {n: h(z) for n, h, z in zip(self.layer_names, hypernetworks, codes, strict=True)}
        if self.offset_network is not None:
            self._check_3d_inputs(image, cameras, planes)
            offset_planes = self.offset_network(features, cameras, planes)
        return AuxiliaryOutput(weight_offsets, offset_planes)

    def _check_3d_inputs(self, image, cameras, planes) -> None:
        if cameras is None or planes is None:
            raise ValueError("the 3D module needs cameras and the generator's planes (or set use_offset_planes=False)")
        if cameras.shape != (len(image), 25):
            raise ValueError(f"cameras is {tuple(cameras.shape)}, expected {(len(image), 25)}")
        side = self.config.plane_resolution
        expected = (len(image), 3, self.config.plane_features, side, side)
        if planes.shape != expected:
            raise ValueError(f"planes is {tuple(planes.shape)}, expected {expected}")
