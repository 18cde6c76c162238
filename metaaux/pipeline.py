"""`MetaAuxInverter`: photo in, a head that can be rendered from any side out (Sec. 3.2).

The way of a photo: `faces` finds and crops it, the encoder gives its code, the auxiliary network its offsets, and
`adaptation` five gradient steps on that network. What renders the result is in `rendering`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image

from .adaptation import AdaptationResult, InnerProblem, adapt
from .cameras import camera_from_pose, frontal_shares, pose_of_camera
from .editing import check_edits
from .export.images import image_to_tensor, tensor_to_image
from .faces.alignment import FaceAligner
from .faces.photos import Photo, load_photo
from .hub import HubMixin
from .inversion import STEP_KEYS, Inversion, max_file_bytes
from .losses import InversionLoss, LossWeights
from .models.auxiliary import AuxiliaryNetwork
from .models.directions import LatentDirections
from .models.discriminator import DualDiscriminator
from .models.eg3d import EG3DGenerator
from .models.encoder import LatentEncoder
from .models.identity import IdentityNetwork
from .models.perceptual import LPIPS
from .models.presets import preset_of
from .models.recogniser import FaceRecogniser
from .models.stylegan2 import StyleGAN2Generator
from .models.weights import check_computable, lay_out, unwrapped
from .precision import check_precision, reduced_dtype
from .rendering import RenderingMixin
from .replay import ReplayedProblem
from .tasks import encode

StepCallback = Callable[[int, Image.Image, dict[str, float]], None]


@dataclass
class MetaAuxInverterOutput(BaseOutput):
    """What [`MetaAuxInverter`] makes of a photo.

    Attributes:
        images: the head as it was asked for, one picture of the generator's size.
        inversion: for further views and edits.
    """

    images: list[Image.Image]
    inversion: Inversion


class MetaAuxInverter(HubMixin, RenderingMixin, DiffusionPipeline):
    """Inverts photos of faces into EG3D's latent space and renders them from other sides.

    No call changes the pipeline or its components, so threads may share one. All networks have to be on one device: an
    inversion's gradients pass through all of them, so that diffusers' offloading is refused.

    Examples:
        >>> from metaaux import Inversion, MetaAuxInverter
        >>> inverter = MetaAuxInverter.from_pretrained()  # the embedded checkpoint; or a Hub id or a folder
        >>> inversion = inverter.invert("examples/grace_hopper.jpg", steps=1)
        >>> inverter.render(inversion, yaw=20, pitch=-5, edits={"age": 1.5, "smile": -1}).save("older.png")
        >>> len(inverter.orbit(inversion, frames=2))
        2
        >>> inversion.save("me.safetensors")
        >>> inverter.render(Inversion.load("me.safetensors")) == inverter.render(inversion)
        True

    Args:
        generator: the generator G; with a 2D one (the paper's section 4.5) there is one view, the photo's.
        encoder: predicts the initial latent code; stays fixed.
        auxiliary: the auxiliary network Aux, meta-learnt; a private copy of its parameters adapts to each photo.
        discriminator: judge of Eq. 8's adversarial term.
        identity: R of Eq. 11.
        perceptual: P of Eq. 10; without it, features of `discriminator` take its place.
        latent_directions: what `edits` names; without it, nothing can be edited.
        inner_steps: default number of gradient steps of an inversion (Eq. 5).
        inner_learning_rate: α of Eq. 5 for all tensors; `None` takes the rates learnt with the auxiliary network.
        weight_perceptual: λ_lpips of Eq. 8.
        weight_identity: λ_id of Eq. 8.
        weight_adversarial: λ_adv of Eq. 8.
        weight_flip_perceptual: λ_1 of Eq. 12, used where `invert` applies the flip loss. Default: as
            `weight_perceptual`.
        weight_flip_adversarial: λ_2 of Eq. 12. Default: as `weight_adversarial`.
        flip_share: part of the gradient steps, the first ones, whose loss holds Eq. 12; with the others alone to end
            on, the photo's own view loses less for the same gain of the mirrored one. In the paper it is all of them.
        flip_yaw: photos turned further than this many degrees get the flip loss by themselves. `None`: only where
            `invert` is asked for it.
        crop_scale: framing of the aligned crop, as [`~metaaux.faces.alignment.FaceAligner`] takes it: that of the
            generator's training images.
    """

    _optional_components = ["perceptual", "latent_directions"]

    def __init__(
        self,
        generator: EG3DGenerator | StyleGAN2Generator,
        encoder: LatentEncoder,
        auxiliary: AuxiliaryNetwork,
        discriminator: DualDiscriminator,
        identity: IdentityNetwork | FaceRecogniser,
        perceptual: LPIPS | None = None,
        latent_directions: LatentDirections | None = None,
        inner_steps: int = 5,
        inner_learning_rate: float | None = None,
        weight_perceptual: float = 0.8,
        weight_identity: float = 0.1,
        weight_adversarial: float = 0.005,
        weight_flip_perceptual: float | None = None,
        weight_flip_adversarial: float | None = None,
        flip_share: float = 1.0,
        flip_yaw: float | None = 15.0,
        crop_scale: float = 1.0,
    ):
        super().__init__()
        self.register_modules(
            generator=generator,
            encoder=encoder,
            auxiliary=auxiliary,
            discriminator=discriminator,
            identity=identity,
            perceptual=perceptual,
            latent_directions=latent_directions,
        )
        self.register_to_config(
            inner_steps=inner_steps,
            inner_learning_rate=inner_learning_rate,
            weight_perceptual=weight_perceptual,
            weight_identity=weight_identity,
            weight_adversarial=weight_adversarial,
            weight_flip_perceptual=weight_flip_perceptual,
            weight_flip_adversarial=weight_flip_adversarial,
            flip_share=flip_share,
            flip_yaw=flip_yaw,
            crop_scale=crop_scale,
        )
        self._aligner: FaceAligner | None = None
        self.loss_weights = LossWeights(
            perceptual=weight_perceptual, identity=weight_identity, adversarial=weight_adversarial
        )
        self.flip_loss_weights = dataclasses.replace(
            self.loss_weights,
            flip_perceptual=weight_perceptual if weight_flip_perceptual is None else weight_flip_perceptual,
            flip_adversarial=weight_adversarial if weight_flip_adversarial is None else weight_flip_adversarial,
        )
        trained = auxiliary.config.inner_loss
        if trained is not None and trained != (used := self.inversion_loss().describe()):
            warnings.warn(
                f"the auxiliary network's inner learning rates were learnt for another loss than this pipeline adapts "
                f"it with: {trained} in training, {used} here; inversions will be worse than those that were measured",
                stacklevel=2,
            )

    @property
    def preset(self) -> str:
        """How the auxiliary network is built and adapted: "paper", "extended" or "custom"; see `models.presets`."""
        return preset_of(unwrapped(self.auxiliary))

    @property
    def aligner(self) -> FaceAligner:
        """Finds and crops faces as this checkpoint's generator expects; made at the first use, shared by threads, and
        given up with the pipeline."""
        config, known = self.generator.config, self._aligner
        settings = config.image_size, self.config.crop_scale, tuple(config.get("camera_pivot", (0.0, 0.0, 0.0)))
        # Another generator may have been put in.
        if known is None or (known.image_size, known.crop_scale, known.pivot) != settings:
            self._aligner = FaceAligner(settings[0], crop_scale=settings[1], pivot=settings[2])
        return self._aligner

    def __call__(
        self,
        photo: Photo | Sequence[Photo],
        steps: int | None = None,
        yaw: float | None = None,
        pitch: float | None = None,
        edits: Mapping[str, float] | None = None,
        on_step: StepCallback | None = None,
        camera: torch.Tensor | None = None,
        flip: bool | None = None,
        return_dict: bool = True,
    ) -> MetaAuxInverterOutput | tuple[list[Image.Image], Inversion]:
        """Inverts the face of a photo and renders it: `invert`, then `render`.

        Args:
            photo: see `invert`, as `steps`, `on_step`, `camera` and `flip`.
            yaw: degrees of the head in the picture, see `render`, as `pitch` and `edits`. Default: the photo's.
            return_dict: whether the result is a [`MetaAuxInverterOutput`], else it is a tuple.

        Raises:
            ValueError, RuntimeError, FloatingPointError: as `invert` and `render`. Angles and edits are checked before
                the photo is inverted.

        Examples:
            >>> output = inverter("examples/grace_hopper.jpg", steps=1, yaw=20, edits={"smile": 1})
            >>> output.images[0].size == output.inversion.aligned.shape[1:]
            True
            >>> inverter.render(output.inversion, yaw=-20).save("turned.png")
        """
        check_edits(self.directions, edits)
        if yaw is not None or pitch is not None:
            self._check_viewpoints("yaw and pitch")
            camera_from_pose(yaw or 0.0, pitch or 0.0)
        inversion = self.invert(photo, steps, on_step, camera, flip)
        images = [self.render(inversion, yaw, pitch, edits)]
        if not return_dict:
            return images, inversion
        return MetaAuxInverterOutput(images=images, inversion=inversion)

    def invert(
        self,
        photo: Photo | Sequence[Photo],
        steps: int | None = None,
        on_step: StepCallback | None = None,
        camera: torch.Tensor | None = None,
        flip: bool | None = None,
    ) -> Inversion:
        """Inverts the face of a photo: encoder, then `steps` gradient steps on the auxiliary network (Eq. 5).

        Args:
            photo: what [`~metaaux.faces.load_photo`] reads, or a list of photos of one person. These give one head
                that suits all: the loss is their mean, each seen by its own camera, and the latent code a mean in
                which frontal photos weigh more. `Inversion.camera` and `Inversion.aligned` are the first photo's.
            steps: number of gradient steps. Default: the checkpoint's `inner_steps`, 5 in the paper.
            on_step: called as (step, image, losses) for step -1 (the encoder alone), 0 (the auxiliary network's
                prediction) and 1 … `steps`, with the reconstruction of the first photo and the entry of
                `Inversion.steps`. An exception from it ends the inversion.
            camera: [25] or, for several photos, [P, 25]. If given, the photos must be aligned crops of the
                generator's size seen by these cameras; no face is looked for.
            flip: whether the far side of the head, seen by the mirrored camera, shall resemble the mirrored photo
                (Eq. 12). Default: where all photos are turned beyond the checkpoint's `flip_yaw` to the same side.

        Raises:
            ValueError: a photo that cannot be read or shows no usable face (`metaaux.faces` has an error for each
                case), a crop of the wrong size, or negative `steps`.
            RuntimeError: a component is in training mode.
            FloatingPointError: the loss became infinite or not a number.

        Examples:
            >>> inversion = inverter.invert("examples/grace_hopper.jpg", steps=1)
            >>> [step["step"] for step in inversion.steps]
            [-1, 0, 1]
        """
        # 1. Check the settings
        self._check_ready()
        steps = self.config.inner_steps if steps is None else steps
        if steps < 0:
            raise ValueError(f"steps must be 0 or more, got {steps}")
        if flip:
            self._check_viewpoints("the flip loss")
        # 2. Find the faces and where they are seen from.
        crops, cameras = self._crops(photo, camera)
        loss = self.inversion_loss(self._shows_one_side(cameras) if flip is None else flip)

        with self._own_stream(), self._products(), self.progress_bar(total=steps + 2) as progress:
            # 3. Encode.
            target, cameras, w = self._encode(crops, cameras)

            # 4. Adapt.
            def report(step: int, images: torch.Tensor, losses: dict[str, float]) -> None:
                progress.update()
                if on_step is not None:
                    on_step(step, tensor_to_image(images[0]), _step_entry(losses))

            result = self._adapt(loss, target, w, cameras, steps, on_step=report)
            return self._inversion(result, w[0], cameras[0], crops[0])

    def to(self, *args: Any, **kwargs: Any) -> MetaAuxInverter:
        """As [`~metaaux.hub.HubMixin.to`]; recordings (`enable_cuda_graphs`) are made anew after a move."""
        moved = super().to(*args, **kwargs)
        # Those whose convolutions see `channels_last` activations and whose weights no step changes.
        for network in (self.generator, self.discriminator, self.identity):
            lay_out(network, self.device)
        if self._graphs is not None:
            self._graphs.release()
        return moved

    def enable_model_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Refused, as every kind of offloading.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "networks cannot be kept off the GPU one by one: each gradient step of an inversion goes forth and back "
            "through all of them. Nor would it save much: at full size the weights are 0.9 of the 6 GB that it takes. "
            "Move the whole pipeline with .to(device), and back with .to('cpu') while it is not used"
        )

    enable_sequential_cpu_offload = enable_group_offload = enable_model_cpu_offload

    def load_inversion(self, path: str | os.PathLike) -> Inversion:
        """[`Inversion.load`], and the checks that it fits this pipeline's generator.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a valid inversion file or was made with another model.
        """
        limit = max_file_bytes(self.generator, self.auxiliary)
        inversion = Inversion.load(path, fingerprint=self.fingerprint, max_bytes=limit)
        inversion.check_fits(self.generator, self.fingerprint)
        return inversion

    def _shows_one_side(self, cameras: torch.Tensor) -> bool:
        """Whether all photos are turned beyond `flip_yaw` to the same side, and the model has a flip loss."""
        if self.config.flip_yaw is None or not self.flip_loss_weights.uses_flip or not self.has_viewpoints:
            return False
        yaws = pose_of_camera(cameras)[0]
        return bool((yaws > self.config.flip_yaw).all() or (yaws < -self.config.flip_yaw).all())

    @property
    def make_problem(self) -> Callable[..., InnerProblem]:
        """How [`~metaaux.adaptation.adapt`] takes its steps with this pipeline's networks: by recordings, or not."""
        graphs = self._recordings
        if graphs is None:
            return InnerProblem
        networks = (self.generator, self.auxiliary, self.discriminator, self.identity, self.perceptual)
        networks = [network for network in networks if network is not None]
        return functools.partial(ReplayedProblem, graphs, networks=networks)

    def inversion_loss(self, flip: bool = False) -> InversionLoss:
        """Eq. 8 with this checkpoint's weights and networks; with `flip` Eq. 12 takes part, as `InversionLoss.flip`.

        Raises:
            ValueError: `flip` is wanted and the checkpoint has no weight for it.
        """
        if flip and not self.flip_loss_weights.uses_flip:
            raise ValueError(
                "this model has no flip loss: its weight_flip_perceptual and weight_flip_adversarial are both 0"
            )
        weights = self.flip_loss_weights if flip else self.loss_weights
        components = (self.discriminator, self.identity, self.perceptual)
        return InversionLoss.from_components(weights, *components, dtype=reduced_dtype(self.precision))

    def _adapt(self, *arguments: Any, **options: Any) -> AdaptationResult:
        """[`~metaaux.adaptation.adapt`] with this pipeline's networks and settings, but for `options`."""
        settings = {"learning_rate": self.config.inner_learning_rate, "flip_share": self.config.flip_share}
        settings |= {"make_problem": self.make_problem, "dtype": reduced_dtype(self.precision)}
        return adapt(self.generator, self.auxiliary, *arguments, **settings | options)

    def _inversion(
        self, result: AdaptationResult, w: torch.Tensor, camera: torch.Tensor, aligned: Image.Image
    ) -> Inversion:
        return Inversion(
            w=_stored(w),
            camera=_stored(camera),
            weight_offsets={layer: _stored(offset) for layer, offset in result.weight_offsets.items()},
            offset_planes=None if result.offset_planes is None else _stored(result.offset_planes[0]),
            steps=[_step_entry(step) for step in result.steps],
            model=str(self.name_or_path or type(self.generator).__name__),
            fingerprint=self.fingerprint,
            aligned=torch.from_numpy(np.array(aligned)).permute(2, 0, 1).contiguous(),
        )

    def _check_ready(self) -> None:
        """Raises RuntimeError where a component is in training mode, ValueError for precisions that do not compute."""
        check_precision(self.precision, self._weights_device)
        training = [name for name, part in self.components.items() if part is not None and part.training]
        if training:
            raise RuntimeError(
                f"the components {training} are in training mode, in which a call could change them; put them into "
                "eval mode with .eval() first (from_pretrained does)"
            )
        check_computable(self.components)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _encode(
        self, crops: Sequence[Image.Image], cameras: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Crops of one person → [P, 3, S, S] in [-1, 1], cameras [P, 25] and the code [1, …] on the device.

        Of several photos, the code is a mean in which frontal ones weigh more.
        """
        device = self._weights_device
        target = torch.stack([image_to_tensor(crop) for crop in crops]).to(device)
        cameras = cameras.to(device)
        codes = self.codes(target, cameras)
        shares = frontal_shares(cameras).view(-1, *[1] * (codes.ndim - 1))
        return target, cameras, (shares * codes).sum(dim=0, keepdim=True)

    @torch.inference_mode(False)
    @torch.no_grad()
    def codes(self, target: torch.Tensor, cameras: torch.Tensor) -> torch.Tensor:
        """The encoder's codes [P, …] of aligned photos [P, 3, S, S] in [-1, 1], seen by cameras [P, 25], on the
        pipeline's device."""

        def pass_of(given: dict[str, Any]) -> torch.Tensor:
            return encode(self.encoder, self.identity, given["image"], given["cameras"], given["dtype"])

        given = {"image": target.to(self.encoder.dtype), "cameras": cameras, "dtype": reduced_dtype(self.precision)}
        return self._run_pass("encoding", self.encoder, self.identity)("encode", pass_of, given)

    def _crops(
        self, photo: Photo | Sequence[Photo], camera: torch.Tensor | None
    ) -> tuple[list[Image.Image], torch.Tensor]:
        """The aligned crops of one or several photos and their cameras [P, 25]; see `invert`."""
        photos = list(photo) if isinstance(photo, (list, tuple)) else [photo]
        if not photos:
            raise ValueError("invert needs at least one photo, got an empty list")
        if camera is None:
            faces = [self.aligner.align(photo) for photo in photos]
            return [face.image for face in faces], torch.stack([face.camera for face in faces])
        cameras = torch.as_tensor(camera, dtype=torch.float32, device="cpu").reshape(-1, 25)
        if len(cameras) != len(photos):
            raise ValueError(f"each photo needs its camera, got {len(photos)} photos and {len(cameras)} cameras")
        size = self.generator.config.image_size
        crops = [load_photo(photo) for photo in photos]
        for crop in crops:
            if crop.size != (size, size):
                raise ValueError(
                    f"with a camera, the photo must be an aligned crop of {size}x{size} pixels, got "
                    f"{crop.width}x{crop.height}; leave the camera out to have the face found and aligned"
                )
        return crops, cameras


def _step_entry(losses: Mapping[str, float]) -> dict[str, float]:
    return {key: losses[key] for key in STEP_KEYS}


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
