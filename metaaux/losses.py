"""The total loss between a photo and its reconstruction, Eq. 8-12: the only place where a loss is built.

Inference, both phases of training, the encoder, the baselines and the evaluation compare images by an `InversionLoss`
or by the distance that `perceptual_distance` picks, so that a checkpoint is trained for what it is used with.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from .models.discriminator import DualDiscriminator
from .models.perceptual import LPIPS, DiscriminatorPerceptualDistance
from .models.views import private_view
from .models.weights import unwrapped
from .precision import autocast


class PerceptualDistance(Protocol):
    """P of Eq. 10, as `models.perceptual` offers it.

    Attributes:
        kind: which distance it is, in a word that checkpoints record.
    """

    kind: str

    def taps(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps [B, C_l, H_l, W_l] of images [B, 3, S, S] in [-1, 1]."""

    def distance(self, x_taps: list[torch.Tensor], y_taps: list[torch.Tensor]) -> torch.Tensor:
        """Distance [B] of two lists of feature maps."""

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Distance [B] of images [B, 3, S, S] in [-1, 1]."""


class IdentityEmbedding(Protocol):
    """R of Eq. 11: what every identity network offers, whether it finds the face by the camera or not."""

    def __call__(self, image: torch.Tensor, cameras: torch.Tensor | None) -> torch.Tensor:
        """Unit vectors [B, D] of the faces of images [B, 3, S, S] in [-1, 1] seen by cameras [B, 25]."""


def perceptual_distance(
    perceptual: LPIPS | None, discriminator: DualDiscriminator | None, dtype: torch.dtype | None = None
) -> PerceptualDistance:
    """P of Eq. 10 for a checkpoint: its own perceptual network or, without one, its discriminator's features.

    Args:
        perceptual: the checkpoint's network, if it has one.
        discriminator: the checkpoint's.
        dtype: precision of the discriminator's convolutions; `None` leaves it to the discriminator.

    Raises:
        ValueError: there is neither.
    """
    if perceptual is not None:
        return perceptual
    if discriminator is None:
        raise ValueError("a perceptual distance needs a perceptual network or a discriminator, got neither")
    return DiscriminatorPerceptualDistance(discriminator, dtype=dtype)


@dataclass(frozen=True)
class LossWeights:
    """Constants of the total loss; the defaults are those of the paper's section 4.1.

    Attributes:
        mse: weight of Eq. 9.
        perceptual: λ_lpips of Eq. 8.
        identity: λ_id of Eq. 8.
        adversarial: λ_adv of Eq. 8.
        flip_perceptual: λ_1 of Eq. 12; 0 switches the term off.
        flip_adversarial: λ_2 of Eq. 12; 0 switches the term off.
    """

    mse: float = 1.0
    perceptual: float = 0.8
    identity: float = 0.1
    adversarial: float = 0.005
    flip_perceptual: float = 0.0
    flip_adversarial: float = 0.0

    @property
    def uses_flip(self) -> bool:
        """Whether Eq. 12 takes part, which costs a second view per step."""
        return self.flip_perceptual > 0 or self.flip_adversarial > 0


@dataclass(frozen=True)
class Reference:
    """A photo [B, 3, S, S] with what the loss compares: perceptual taps and identity vectors, `None` where unused."""

    image: torch.Tensor
    taps: list[torch.Tensor] | None
    identity: torch.Tensor | None


class InversionLoss:
    """The distance between a photo and its reconstruction, Eq. 8, term by term.

    Args:
        weights: the constants.
        perceptual: distance of images; `None` only where no term with a weight needs it.
        identity: network (image, cameras) -> unit vectors [B, D]; `None` only with `weights.identity == 0`.
        discriminator: network (image, image_raw, cameras) -> logits [B, 1]; `None` only where no term needs it.
        dtype: of the networks' autocast; `None` or float32: off. The squared error keeps the images' precision.

    Raises:
        ValueError: a term has a weight but not its network.
    """

    def __init__(
        self,
        weights: LossWeights,
        perceptual: PerceptualDistance | None,
        identity: IdentityEmbedding | None,
        discriminator: DualDiscriminator | None,
        dtype: torch.dtype | None = None,
    ):
        missing = [
            name
            for name, weight, network in (
                ("perceptual", max(weights.perceptual, weights.flip_perceptual), perceptual),
                ("identity", weights.identity, identity),
                ("adversarial", max(weights.adversarial, weights.flip_adversarial), discriminator),
            )
            if weight > 0 and network is None
        ]
        if missing:
            raise ValueError(f"the loss weights ask for {missing}, but the networks of these terms are None")
        self.weights = weights
        self.perceptual = perceptual
        self.identity = identity
        self.discriminator = discriminator
        self.dtype = dtype
        # Features and logits of one network can come of one pass.
        self._one_network = (
            discriminator is not None
            and isinstance(perceptual, DiscriminatorPerceptualDistance)
            and perceptual.discriminator is discriminator
            and perceptual.dtype is None
        )
        if discriminator is not None:
            # Groups of one: a photo's loss must not depend on the other photos of the batch.
            self.discriminator = private_view(discriminator)
            self.discriminator.register_to_config(deviation_group=1)

    @classmethod
    def from_components(
        cls,
        weights: LossWeights,
        discriminator: DualDiscriminator,
        identity: IdentityEmbedding,
        perceptual: LPIPS | None = None,
        dtype: torch.dtype | None = None,
    ) -> InversionLoss:
        """Eq. 8 of a checkpoint with these components, for its inversions and for the inner loop that trains it.

        Args:
            weights: the constants.
            discriminator: the adversarial term's and, without `perceptual`, that of the perceptual distance.
            identity: the identity network.
            perceptual: the checkpoint's perceptual network, if it has one.
            dtype: see [`InversionLoss`].
        """
        return cls(weights, perceptual_distance(perceptual, discriminator), identity, discriminator, dtype)

    def describe(self) -> dict[str, Any]:
        """What a checkpoint records of the loss that its inner learning rates were learnt for.

        Returns:
            {"weights": {term: weight}, "perceptual": its `kind`, "identity": the network's class}, plain JSON values.
            The flip loss is no part of it: it is switched on photo by photo.
        """
        weights = {name: value for name, value in asdict(self.weights).items() if not name.startswith("flip_")}
        return {
            "weights": weights,
            "perceptual": None if self.perceptual is None else self.perceptual.kind,
            "identity": None if self.identity is None else type(unwrapped(self.identity)).__name__,
        }

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms that are computed: "mse" and those whose network there is."""
        networks = {"perceptual": self.perceptual, "identity": self.identity, "adversarial": self.discriminator}
        return ("mse", *(name for name, network in networks.items() if network is not None))

    @torch.no_grad()
    def reference(self, target: torch.Tensor, camera: torch.Tensor) -> Reference:
        """What the loss needs of photos [B, 3, S, S] seen by cameras [B, 25], to be computed once for many calls."""
        with self._autocast(target):
            return Reference(
                target,
                None if self.perceptual is None else self.perceptual.taps(target),
                None if self.identity is None else self.identity(target, camera).to(target.dtype),
            )

    def __call__(
        self, image: torch.Tensor, image_raw: torch.Tensor, target: torch.Tensor | Reference, camera: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Each term unweighted, and their weighted sum.

        Args:
            image: reconstruction [B, 3, S, S] in [-1, 1].
            image_raw: the renderer's own image [B, 3, h, h], the dual discriminator's second input.
            target: photo [B, 3, S, S] in [-1, 1], or its `reference`.
            camera: [B, 25], the view of both.

        Returns:
            "mse", "perceptual", "identity", "adversarial" and "total", each [B]. A term without a network is 0.

        Raises:
            ValueError: image and photo differ in shape.
        """
        reference = target if isinstance(target, Reference) else self.reference(target, camera)
        if image.shape != reference.image.shape:
            raise ValueError(f"image {tuple(image.shape)} and target {tuple(reference.image.shape)} differ in shape")
        zero = image.new_zeros(len(image))
        mse = (image - reference.image).square().flatten(1).mean(1)  # Eq. 9
        perceptual = identity = adversarial = zero
        with self._autocast(image):
            taps, logits = self._seen(
                image, image_raw, camera, self.perceptual is not None, self.discriminator is not None
            )
            if taps is not None:
                perceptual = self.perceptual.distance(taps, reference.taps)  # Eq. 10
            if self.identity is not None:
                embedding = self.identity(image, camera).to(image.dtype)
                identity = 1 - F.cosine_similarity(embedding, reference.identity, dim=1)  # Eq. 11
            if logits is not None:
                adversarial = _non_saturating(logits.to(image.dtype))
        total = (
            self.weights.mse * mse
            + self.weights.perceptual * perceptual
            + self.weights.identity * identity
            + self.weights.adversarial * adversarial
        )
        return {
            "mse": mse,
            "perceptual": perceptual,
            "identity": identity,
            "adversarial": adversarial,
            "total": total,
        }

    def flip(
        self, image: torch.Tensor, image_raw: torch.Tensor, target: torch.Tensor | Reference, camera: torch.Tensor
    ) -> torch.Tensor:
        """Flip loss, Eq. 12 [B]: no squared error, since a face's other side is only similar to its mirror image.

        Args:
            image: the render at the mirrored camera.
            image_raw: the renderer's own image there.
            target: the photo, mirrored, or its `reference`.
            camera: the mirrored camera.
        """
        reference = target if isinstance(target, Reference) else self.reference(target, camera)
        loss = image.new_zeros(len(image))
        weights = self.weights
        with self._autocast(image):
            taps, logits = self._seen(
                image, image_raw, camera, weights.flip_perceptual > 0, weights.flip_adversarial > 0
            )
            if taps is not None:
                loss = loss + weights.flip_perceptual * self.perceptual.distance(taps, reference.taps)
            if logits is not None:
                loss = loss + weights.flip_adversarial * _non_saturating(logits.to(image.dtype))
        return loss

    def _autocast(self, image: torch.Tensor) -> contextlib.AbstractContextManager:
        return autocast(image.device, None if self.dtype == torch.float32 else self.dtype)

    def _seen(
        self, image: torch.Tensor, image_raw: torch.Tensor, camera: torch.Tensor, with_taps: bool, with_logits: bool
    ) -> tuple[list[torch.Tensor] | None, torch.Tensor | None]:
        """Perceptual taps of reconstructions and the discriminator's logits of them [B, 1]; `None` if not wanted."""
        discriminator, in_one_pass = self.discriminator, self._one_network and with_taps and with_logits
        if in_one_pass and not discriminator.config.dual:
            taps = discriminator.features(image, None)
            return taps, discriminator.judge(taps[-1], camera)
        if in_one_pass and (reduced := self.perceptual.reduced(image)).shape == image_raw.shape:
            # One batch of both kinds of input, which works through the weights once.
            features = discriminator.features(torch.cat((image, image)), torch.cat((reduced, image_raw)))
            judged = features[-1].chunk(2)[1]
            return [_FirstHalf.apply(feature) for feature in features], discriminator.judge(judged, camera)
        logits = discriminator(image, image_raw, camera) if with_logits else None
        return self.perceptual.taps(image) if with_taps else None, logits


class _FirstHalf(torch.autograd.Function):
    """[2·B, …] → [B, …]. Its gradient has the layout of what comes back, where a slice's is contiguous: convolutions
    of `channels_last` would copy it."""

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.narrow(0, 0, len(x) // 2)

    @staticmethod
    def setup_context(ctx, inputs, output):
        return

    @staticmethod
    def backward(ctx, gradient):
        return F.pad(gradient, (0, 0) * (gradient.ndim - 1) + (0, len(gradient)))


def _non_saturating(logits: torch.Tensor) -> torch.Tensor:
    """StyleGAN's generator loss: logits [B, 1] → [B]."""
    return F.softplus(-logits).flatten(1).mean(1)
