"""`MetaAuxInverter`: photo in, a head that can be rendered from any side out (Sec. 3.2)."""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from .adaptation import adapt
from .cameras import camera_from_pose, frontal_shares, pose_of_camera, view_path
from .editing import apply_edits
from .export.images import image_to_tensor, tensor_to_image
from .export.mesh import DEFAULT_RESOLUTION, HeadMesh, check_glb_path, extract_mesh, write_glb
from .faces.alignment import FaceAligner
from .faces.photos import Photo, load_photo
from .head import Head
from .hub.loading import HubMixin
from .inversion import STEP_KEYS, Inversion, generator_fingerprint
from .losses import InversionLoss, LossWeights
from .models.auxiliary import AuxiliaryNetwork
from .models.directions import Direction, LatentDirections
from .models.discriminator import DualDiscriminator
from .models.eg3d import EG3DGenerator
from .models.encoder import LatentEncoder
from .models.identity import IdentityNetwork
from .models.perceptual import LPIPS, DiscriminatorPerceptualDistance
from .models.stylegan2 import StyleGAN2Generator

StepCallback = Callable[[int, Image.Image, dict[str, float]], None]
ProgressCallback = Callable[[float], None]


class MetaAuxInverter(HubMixin, DiffusionPipeline):
    """Inverts photos of faces into EG3D's latent space and renders them from other sides.

    No call changes the pipeline or its components, so threads may share one.

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
        identity: IdentityNetwork,
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

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and values of the generator's weights, 64 hexadecimal digits.

        Values count as float16, so that loading a checkpoint in another precision or onto another device leaves the
        fingerprint as it is. Computed at the first use for each generator object.
        """
        generator = self.generator
        known = getattr(self, "_generator_fingerprint", None)
        if known is None or known[0]() is not generator:
            known = (weakref.ref(generator), generator_fingerprint(generator))
            self._generator_fingerprint = known
        return known[1]

    @property
    def aligner(self) -> FaceAligner:
        """Finds and crops faces as this checkpoint's generator expects; made at the first use, shared by threads, and
        given up with the pipeline."""
        settings = {"image_size": self.generator.config.image_size, "crop_scale": self.config.crop_scale}
        aligner = getattr(self, "_aligner", None)
        # Another generator may have been put in.
        if aligner is None or any(getattr(aligner, name) != value for name, value in settings.items()):
            self._aligner = aligner = FaceAligner(**settings)
        return aligner

    @property
    def has_viewpoints(self) -> bool:
        """Whether heads can be seen from other sides: not with a 2D generator."""
        return not isinstance(self.generator, StyleGAN2Generator)

    @property
    def directions(self) -> dict[str, Direction]:
        """What `edits` may name, with the scale and the usable range of each; empty if the checkpoint has none.

        Raises:
            ValueError: the checkpoint's directions were found in another generator.
        """
        if self.latent_directions is None:
            return {}
        origin = self.latent_directions.config.generator
        if origin and origin != self.fingerprint:
            raise ValueError(
                f"this model's latent directions were found in another generator (fingerprint {origin[:12]}…, not "
                f"{self.fingerprint[:12]}…); find its own with `metaaux train directions`"
            )
        return self.latent_directions.as_dict()

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
            photo: PIL image, path, array or whatever else [`~metaaux.faces.load_photo`] reads, or a list of photos of
                one person. Several photos give one head that suits all of them: the loss is their mean, each seen by
                its own camera, and the latent code a mean in which frontal photos weigh more. `Inversion.camera` and
                `Inversion.aligned` are the first photo's.
            steps: number of gradient steps. Default: the checkpoint's `inner_steps`, 5 in the paper.
            on_step: called as (step, image, losses) for step -1 (the encoder alone), 0 (the auxiliary network's
                prediction) and 1 … `steps`, with the reconstruction of the first photo and the entry of
                `Inversion.steps`. An exception from it ends the inversion.
            camera: [25] or, for several photos, [P, 25]. If given, the photos must be aligned crops of the
                generator's size seen by these cameras; no face is looked for.
            flip: whether the far side of the head, seen by the mirrored camera, shall resemble the mirrored photo
                (Eq. 12). Default: where the face is turned beyond the checkpoint's `flip_yaw`; of several photos,
                where all of them are turned so to the same side.

        Raises:
            ValueError: a photo that cannot be read or shows no usable face (`UnreadableImageError`, `NoFaceError` and
                `FaceTooSmallError` of `metaaux.faces`), a crop of the wrong size, or negative `steps`.
            FloatingPointError: the loss became infinite or not a number.
        """
        self._check_inference_mode()
        steps = self.config.inner_steps if steps is None else steps
        if steps < 0:
            raise ValueError(f"steps must be 0 or more, got {steps}")
        photos = list(photo) if isinstance(photo, (list, tuple)) else [photo]
        if not photos:
            raise ValueError("invert needs at least one photo, got an empty list")
        crops, cameras = self._align(photos) if camera is None else self._take_aligned(photos, camera)

        if flip:
            self._check_viewpoints("the flip loss")
        flip = self._shows_one_side(cameras) if flip is None else flip
        with torch.inference_mode(False), torch.no_grad():
            target = torch.stack([image_to_tensor(crop) for crop in crops]).to(self.device)
            cameras = cameras.to(self.device)
            codes = self.encoder(target.to(self.encoder.dtype))
            shares = frontal_shares(cameras).view(-1, *[1] * (codes.ndim - 1))
            w = (shares * codes).sum(dim=0, keepdim=True)
        with self.progress_bar(total=steps + 2) as progress:

            def report(step: int, images: torch.Tensor, losses: dict[str, float]) -> None:
                progress.update()
                if on_step is not None:
                    on_step(step, tensor_to_image(images[0]), _step_entry(losses))

            result = adapt(
                self.generator,
                self.auxiliary,
                self._loss(flip),
                target,
                w,
                cameras,
                steps=steps,
                learning_rate=self.config.inner_learning_rate,
                flip_share=self.config.flip_share,
                on_step=report,
            )
        return Inversion(
            w=_stored(w[0]),
            camera=_stored(cameras[0]),
            weight_offsets={layer: _stored(offset) for layer, offset in result.weight_offsets.items()},
            offset_planes=None if result.offset_planes is None else _stored(result.offset_planes[0]),
            steps=[_step_entry(step) for step in result.steps],
            model=str(self.name_or_path or type(self.generator).__name__),
            fingerprint=self.fingerprint,
            aligned=torch.from_numpy(np.array(crops[0])).permute(2, 0, 1).contiguous(),
        )

    def load_inversion(self, path: str | os.PathLike) -> Inversion:
        """[`Inversion.load`], and the checks that it fits this pipeline's generator.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a valid inversion file or was made with another model.
        """
        inversion = Inversion.load(path, fingerprint=self.fingerprint)
        inversion.check_fits(self.generator, self.fingerprint)
        return inversion

    @torch.no_grad()
    def prepare(self, inversion: Inversion, edits: Mapping[str, float] | None = None) -> Head:
        """Computes once what all views of an inversion share; pass the result to `render` and `orbit`.

        Args:
            inversion: made with this pipeline's generator.
            edits: amounts by name of a direction of `directions`, several at once; 1 is a clearly visible change.

        Raises:
            ValueError: the inversion belongs to another generator, or an edit that this checkpoint lacks or that is no
                number within ±20.
        """
        inversion.check_fits(self.generator, self.fingerprint)
        device = self.device
        ws = apply_edits(inversion.w[None], self.directions, edits, bool(inversion.weight_offsets)).to(device)
        weight_offsets = {layer: offset.to(device) for layer, offset in inversion.weight_offsets.items()}
        return Head(
            ws=ws,
            planes=self.generator.planes(ws, weight_offsets=weight_offsets),
            weight_offsets=weight_offsets,
            offset_planes=None if inversion.offset_planes is None else inversion.offset_planes[None].to(device),
            camera=inversion.camera,
        )

    @torch.no_grad()
    def render(
        self,
        inversion: Inversion | Head,
        yaw: float | None = None,
        pitch: float | None = None,
        edits: Mapping[str, float] | None = None,
    ) -> Image.Image:
        """One view of an inverted head.

        Args:
            inversion: or what `prepare` made of it, which spares the backbone when many views are wanted.
            yaw: degrees of the head as the aligner reports them; positive turns the nose to the picture's right.
                Default: the photo's.
            pitch: degrees, positive nods down. Default: the photo's.
            edits: see `prepare`; not with a `Head`, which has its edits already.

        Raises:
            ValueError: an angle beyond ±90 degrees, or as `prepare`.
        """
        if yaw is not None or pitch is not None:
            self._check_viewpoints("yaw and pitch")
        head = self._head(inversion, edits)
        camera = head.camera
        if yaw is not None or pitch is not None:
            photo_yaw, photo_pitch = (float(angle) for angle in pose_of_camera(camera))
            camera = camera_from_pose(
                photo_yaw if yaw is None else float(yaw),
                photo_pitch if pitch is None else float(pitch),
                radius=float(camera[[3, 7, 11]].norm()),
                focal=float(camera[16]),
            )
        output = self.generator.synthesize(
            head.ws,
            camera[None].to(head.ws.device),
            weight_offsets=head.weight_offsets,
            offset_planes=head.offset_planes,
            planes=head.planes,
        )
        return tensor_to_image(output.image[0])

    def orbit(
        self,
        inversion: Inversion | Head,
        frames: int = 60,
        yaw_range: float = 25.0,
        pitch_range: float = 10.0,
        edits: Mapping[str, float] | None = None,
        path: str | Sequence[tuple[float, float]] = "ellipse",
        progress: ProgressCallback | None = None,
    ) -> list[Image.Image]:
        """Views of a closed loop around the head's front, for a video that repeats without a jump.

        Tri-planes are computed once for all views.

        Args:
            inversion: or what `prepare` made of it.
            frames: number of views, at least 1.
            yaw_range: degrees to either side.
            pitch_range: degrees up and down.
            edits: see `render`.
            path: "ellipse", around the front; "swing", from side to side and back at a pitch of 0; "nod", up and down
                at a yaw of 0; or pairs of yaw and pitch, one a view, which leave `frames` and the ranges unused.
            progress: called with the share that is done, 0 to 1.

        Raises:
            ValueError: `frames` below 1, an unknown or empty path, or as `render`.
        """
        self._check_viewpoints("orbits")
        poses = view_path(path, frames, yaw_range, pitch_range)
        head = self._head(inversion, edits)
        images = []
        for yaw, pitch in self.progress_bar(poses):
            images.append(self.render(head, yaw=yaw, pitch=pitch))
            if progress is not None:
                progress(len(images) / len(poses))
        return images

    @torch.no_grad()
    def export_mesh(
        self,
        inversion: Inversion | Head,
        path: str | os.PathLike,
        resolution: int = DEFAULT_RESOLUTION,
        edits: Mapping[str, float] | None = None,
        progress: ProgressCallback | None = None,
    ) -> HeadMesh:
        """Writes the head's surface, closed and coloured, as binary glTF, whole or not at all.

        The head stands upright (+y up) and looks along +z, as viewers expect.

        Args:
            inversion: or what `prepare` made of it.
            path: the file, ending in `.glb`.
            resolution: cells along each side of the generator's cube; see [`~metaaux.export.mesh.extract_mesh`].
            edits: see `render`.
            progress: called with the share that is done, 0 to 1.

        Returns:
            What was written.

        Raises:
            ValueError: a path that does not end in `.glb`, a resolution out of range, a head without any surface, or
                as `render`.
            FileNotFoundError: the folder of `path` does not exist.
        """
        self._check_viewpoints("meshes")
        check_glb_path(path)
        head = self._head(inversion, edits)
        mesh = extract_mesh(self.generator, head, resolution, progress)
        write_glb(mesh, path)
        return mesh

    def _head(self, inversion: Inversion | Head, edits: Mapping[str, float] | None) -> Head:
        if isinstance(inversion, Head):
            if edits:
                raise ValueError("edits belong into prepare(inversion, edits): this head was made without them")
            return inversion
        return self.prepare(inversion, edits)

    def _check_viewpoints(self, what: str) -> None:
        if not self.has_viewpoints:
            raise ValueError(f"{what} need a 3D generator; a 2D generator, as this model's, has one view: the photo's")

    def _shows_one_side(self, cameras: torch.Tensor) -> bool:
        """Whether all photos are turned beyond `flip_yaw` to the same side, and the model has a flip loss."""
        weights = (self.config.weight_flip_perceptual, self.config.weight_flip_adversarial)
        if self.config.flip_yaw is None or weights == (0, 0) or not self.has_viewpoints:
            return False
        yaws = pose_of_camera(cameras)[0]
        return bool((yaws > self.config.flip_yaw).all() or (yaws < -self.config.flip_yaw).all())

    def _loss(self, flip: bool = False) -> InversionLoss:
        config = self.config
        perceptual = self.perceptual
        if perceptual is None:
            perceptual = DiscriminatorPerceptualDistance(self.discriminator)
        weights = LossWeights(
            perceptual=config.weight_perceptual,
            identity=config.weight_identity,
            adversarial=config.weight_adversarial,
        )
        if flip:
            weights = dataclasses.replace(
                weights,
                flip_perceptual=_either(config.weight_flip_perceptual, config.weight_perceptual),
                flip_adversarial=_either(config.weight_flip_adversarial, config.weight_adversarial),
            )
            if not weights.uses_flip:
                raise ValueError(
                    "this model has no flip loss: its weight_flip_perceptual and weight_flip_adversarial are both 0"
                )
        return InversionLoss(weights, perceptual, self.identity, self.discriminator)

    def _align(self, photos: list[Photo]) -> tuple[list[Image.Image], torch.Tensor]:
        faces = [self.aligner.align(photo) for photo in photos]
        return [face.image for face in faces], torch.stack([face.camera for face in faces])

    def _take_aligned(self, photos: list[Photo], camera: torch.Tensor) -> tuple[list[Image.Image], torch.Tensor]:
        camera = torch.as_tensor(camera, dtype=torch.float32).reshape(-1, 25)
        if len(camera) != len(photos):
            raise ValueError(f"each photo needs its camera, got {len(photos)} photos and {len(camera)} cameras")
        size = self.generator.config.image_size
        crops = [load_photo(photo) for photo in photos]
        for crop in crops:
            if crop.size != (size, size):
                raise ValueError(
                    f"with a camera, the photo must be an aligned crop of {size}x{size} pixels, got "
                    f"{crop.width}x{crop.height}; leave the camera out to have the face found and aligned"
                )
        return crops, camera

    def _check_inference_mode(self) -> None:
        training = [name for name, part in self.components.items() if part is not None and part.training]
        if training:
            raise RuntimeError(
                f"the components {training} are in training mode, in which a call could change them; put them into "
                "eval mode with .eval() first (from_pretrained does)"
            )


def _either(value: float | None, default: float) -> float:
    return default if value is None else value


def _step_entry(losses: Mapping[str, float]) -> dict[str, float]:
    return {key: losses[key] for key in STEP_KEYS}


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
