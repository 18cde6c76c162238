"""Train EG3D's generator (EG3D §4-5): dual discrimination under camera conditioning.

Differences from EG3D's recipe, for speed and small data: each step's fake images serve both networks; the rendered
depth is drawn to a mean face at the start, which keeps a narrow range of cameras from teaching a hollow face. A second
discriminator on a frozen network's features can be added (`features`). On CUDA the passes of a step are compiled and
replayed as CUDA graphs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)
from torch import nn

from ..cameras import project_points
from ..export.sheets import head_sheet
from ..faces.canonical import canonical_face
from ..models.discriminator import DualDiscriminator
from ..models.eg3d import EG3DGenerator
from ..models.feature_discriminator import FeatureDiscriminator
from ..models.perceptual import LPIPS
from . import loop
from .augment import AdaptiveAugmentation
from .cuda_graphs import CapturedFunction
from .distributed import FlatGradients, average_buffers, broadcast_module
from .loading import find_folder, load_network
from .loop import Trainer, averaged_copy, per_process, set_learning_rates
from .schedules import average_decay, faded, update_average
from .settings import (
    AverageSettings,
    ComputeSettings,
    DataSettings,
    RunSettings,
    ScheduleSettings,
    Settings,
    Share,
    arguments_of,
)
from .trainer import TrainingRun


class GeneratorOptimiser(ScheduleSettings):
    """Adam's learning rates. After `init` they should rise slowly: a published checkpoint comes without Adam's
    moments, whose first steps would be too long."""

    generator_rate: PositiveFloat = 0.0025
    """Peak of the generator's."""
    discriminator_rate: PositiveFloat = 0.002
    """Peak of the discriminators'."""
    final_learning_rate: Share = 1.0
    """Share of the peaks at the end of the run; with 1 they stay."""


class R1Settings(Settings):
    """The discriminator's penalty on squared gradients at photos."""

    gamma: NonNegativeFloat = 0.2
    """Its weight; 0 switches it off."""
    interval: PositiveInt = 16
    """It is applied every so many steps, so many times as strongly."""
    share: Share = 0.5
    """Of the batch that it sees."""


class PoseSwapSettings(Settings):
    """Probability with which the mapping sees another camera than the renderer."""

    start: Share = 1.0
    """At the start."""
    end: Share = 0.5
    """After `images`."""
    images: PositiveInt = 1_000_000
    """Images over which it goes from start to end."""


class AugmentationSettings(Settings):
    """Of what the discriminator sees; see `AdaptiveAugmentation`."""

    target: Share = 0.6
    """Mean sign of the logits on photos at which the strength stays."""
    ramp_images: PositiveInt = 200_000
    """Images over which the strength could go from 0 to 1."""
    start: Share = 0.0
    """Strength at the start: that at which a run ended that `init` comes from."""


class GeometrySettings(Settings):
    """Weight of the mean absolute distance by which the depth is off the mean face."""

    weight: NonNegativeFloat = 20.0
    """At the start."""
    images: NonNegativeInt = 180_000
    """So long it stays."""
    fade: NonNegativeInt = 120_000
    """Images over which it goes from there to `floor`."""
    floor: NonNegativeFloat = 2.0
    """Weight from then on."""
    margin: NonNegativeFloat = 0.02
    """Distances up to this are none; world units."""


class DensitySettings(Settings):
    """Total variation of the density (EG3D's supplement)."""

    weight: NonNegativeFloat = 0.25
    """Its weight."""
    distance: PositiveFloat = 0.004
    """Between the points that are compared, in box sides."""


class GeneratorConfig(Settings):
    """Settings of a generator run; counts are of images shown, over all GPUs."""

    data: DataSettings
    """Photos."""
    init: str | None = None
    """Published checkpoint to start from (its `generator` and `discriminator` folders, and `feature_discriminator`
    where there is one), instead of random weights."""
    generator: Annotated[dict[str, Any], AfterValidator(arguments_of(EG3DGenerator))] = {}
    """Arguments of `EG3DGenerator`, without `init`."""
    discriminator: Annotated[dict[str, Any], AfterValidator(arguments_of(DualDiscriminator))] = {}
    """Arguments of `DualDiscriminator`, without `init`."""
    features: str | None = None
    """Safetensors file of SqueezeNet 1.1 features with folded normalisation: a second discriminator sees the image
    through them."""
    feature_side: PositiveInt | None = None
    """Side in pixels of what it is shown of larger images: half of the time the whole one reduced, half of the time a
    random part at full size; null shows all of it."""
    feature_weight: NonNegativeFloat = 0.05
    """Of that discriminator in the generator's loss. With 0.05 the images' gradient through it is about three times
    the other discriminator's, which R1 keeps flat."""
    batch: PositiveInt = 256
    """Photos a step, and as many generated images."""
    rays: Annotated[list[tuple[NonNegativeInt, PositiveInt]], Field(min_length=1)] = [(0, 64)]
    """(images, side): the side in rays of a rendering from so many images on; the first from 0."""
    optimiser: GeneratorOptimiser = GeneratorOptimiser()
    """Learning rates."""
    r1: R1Settings = R1Settings()
    """R1 penalty."""
    pose_swap: PoseSwapSettings = PoseSwapSettings()
    """Swapped conditions of the mapping."""
    camera_noise: NonNegativeFloat = 0.0
    """Deviation of the noise on the discriminator's camera, in deviations of the data's."""
    augmentation: AugmentationSettings = AugmentationSettings()
    """Augmentation."""
    geometry: GeometrySettings = GeometrySettings()
    """The pull of the depth to the mean face."""
    density: DensitySettings = DensitySettings()
    """Smoothness of the density."""
    average: AverageSettings = AverageSettings(half_life_images=20_000, rampup=0.05)
    """The averaged generator."""
    compute: ComputeSettings = ComputeSettings(compile=True)
    """Precision and compilation."""
    run: RunSettings
    """Length and folder."""

    @field_validator("rays")
    @classmethod
    def _from_the_start(cls, rays: list[tuple[int, int]]) -> list[tuple[int, int]]:
        if min(start for start, _ in rays) > 0:
            raise ValueError("expected a side from 0 images on")
        return sorted(rays)


class GeneratorTrainer(Trainer):
    """The networks, and one method a pass of a step."""

    #: Of a sheet.
    HEADS = 16

    def __init__(self, config: GeneratorConfig, accelerator: Accelerator):
        super().__init__(config, accelerator)
        self.batch = per_process(config.batch, accelerator)
        self._make_networks()
        for module in (self.generator, self.judges):
            broadcast_module(accelerator, module)
        self.average = averaged_copy(self.generator)
        self._make_optimizers()
        self.augment = AdaptiveAugmentation(
            config.augmentation.target, config.augmentation.ramp_images, device=self.device
        )
        vertices = torch.from_numpy(canonical_face())
        self.vertices = vertices[vertices[:, 2] > 0.06].to(self.device)
        self.geometry_weight = torch.zeros((), device=self.device)
        self.side = 0
        self.models = {"generator": self.average, "generator_raw": self.generator, **self.judges}
        self.augment.p = config.augmentation.start
        self.state |= {"augmentation": self.augment.p, "step": 0, "signs": []}
        self.signs: list[torch.Tensor] = []
        if config.compute.compile and self.device.type == "cuda":
            generator = self.generator
            for module in (generator.backbone, generator.super_resolution, generator.decoder, self.discriminator):
                module.compile()
            generator.shade = torch.compile(generator.shade)

    def _make_networks(self) -> None:
        config = self.config
        if config.init:
            folder = find_folder(config.init)
            generator = load_network(EG3DGenerator, folder / "generator")
            discriminator = load_network(DualDiscriminator, folder / "discriminator")
        else:
            generator, discriminator = EG3DGenerator(**config.generator), DualDiscriminator(**config.discriminator)
        self.generator = generator.to(self.device).train().requires_grad_(True)
        self.discriminator = discriminator.to(self.device).train().requires_grad_(True)
        self.judges = nn.ModuleDict({"discriminator": self.discriminator})
        if config.features:
            self.features = LPIPS.from_features_file(config.features).to(self.device)
            self.features.features.to(self.dtype)
            features = FeatureDiscriminator()
            if config.init and (folder / "feature_discriminator").is_dir():
                features = load_network(FeatureDiscriminator, folder / "feature_discriminator")
            self.judges["feature_discriminator"] = features.to(self.device).train().requires_grad_(True)

    def _make_optimizers(self) -> None:
        config, fused = self.config, self.device.type == "cuda"
        ratio = config.r1.interval / (config.r1.interval + 1)  # StyleGAN2's correction for lazy regularisation
        self.rates = {
            "generator": config.optimiser.generator_rate,
            "discriminator": config.optimiser.discriminator_rate * ratio,
        }
        self.optimizers = {
            "generator": torch.optim.Adam(
                self.generator.parameters(), lr=self.rates["generator"], betas=(0.0, 0.99), fused=fused
            ),
            "discriminator": torch.optim.Adam(
                self.judges.parameters(), lr=self.rates["discriminator"], betas=(0.0, 0.99**ratio), fused=fused
            ),
        }
        self.generator_gradients = FlatGradients(self.generator.parameters())
        self.discriminator_gradients = FlatGradients(self.judges.parameters())
        self.gradients = [self.generator_gradients, self.discriminator_gradients]

    @property
    def images_per_step(self) -> int:
        """Photos."""
        return self.config.batch

    @property
    def photos_per_process(self) -> int:
        """Its share of the batch."""
        return self.batch

    @property
    def image_size(self) -> int:
        """The generator's."""
        return self.generator.config.image_size

    def load_data(self, images: int) -> None:
        """Likewise; how far its cameras spread; how strong the augmentation is."""
        super().load_data(images)
        self.augment.p = self.state["augmentation"]
        self.signs = [torch.tensor(sign, device=self.device) for sign in self.state["signs"]]
        self.camera_deviation = self.dataset.cameras.std(dim=0).to(self.device)

    def depth_error(self, depth: torch.Tensor, cameras: torch.Tensor, margin: float = 0.0) -> torch.Tensor:
        """Mean absolute distance, beyond `margin`, of the rendered depth [B, 1, h, h] from the mean face's vertices,
        each looked up where `cameras` project it; world units."""
        positions, _ = project_points(self.vertices, cameras)
        sampled = F.grid_sample(depth, positions[:, None] * 2 - 1, align_corners=False)[:, 0, 0]
        centres = cameras[:, :16].reshape(-1, 4, 4)[:, None, :3, 3]
        distance = (self.vertices - centres).norm(dim=-1)
        return F.relu((sampled - distance).abs() - margin).mean()

    def density_variation(self, planes: torch.Tensor) -> torch.Tensor:
        """Total variation of the density field (EG3D's supplement): mean absolute difference between random points of
        the box and others `density.distance` box sides away."""
        config, size = self.config, self.generator.config.box_size
        points = (torch.rand(len(planes), 1000, 3, device=self.device) - 0.5) * size
        near = points + torch.randn_like(points) * (config.density.distance * size)
        first, second = self.generator.density(planes, torch.cat((points, near), dim=1)).chunk(2, dim=1)
        return F.l1_loss(first, second)

    def _judged(self, image, image_raw, cameras):
        """The discriminator's input: augmented, in one memory layout so that it is compiled once; noisy cameras."""
        image, image_raw = self.augment(image, image_raw)
        if self.config.camera_noise:
            cameras = cameras + torch.randn_like(cameras) * self.camera_deviation * self.config.camera_noise
        layout = torch.channels_last
        return image.contiguous(memory_format=layout), image_raw.contiguous(memory_format=layout), cameras

    def _reduced(self, image: torch.Tensor) -> torch.Tensor:
        """The photo as the neural renderer would show it: reduced to its side, filtered."""
        return F.interpolate(image, size=(self.side, self.side), mode="bilinear", antialias=True)

    def _part(self, image: torch.Tensor) -> torch.Tensor:
        """What the second discriminator sees of [B, 3, S, S]: whole and reduced, or a random part at full size."""
        size, side = image.shape[-1], self.config.feature_side or image.shape[-1]
        if side >= size:
            return image
        batch, device = len(image), image.device
        part = torch.rand(batch, 1, device=device).round()
        scale = 1 + part * (side / size - 1)
        # Whole pixels, so that a part is copied, not interpolated. A reduction by two is the mean of four pixels.
        start = (torch.rand(batch, 2, device=device) * (size - side + 1)).floor()
        centre = part * ((2 * start + side) / size - 1)
        matrix = torch.cat((torch.diag_embed(scale.expand(-1, 2)), centre[:, :, None]), dim=2)
        grid = F.affine_grid(matrix, [batch, 3, side, side], align_corners=False)
        return F.grid_sample(image, grid.to(image.dtype), padding_mode="border", align_corners=False)

    def _feature_logits(self, image: torch.Tensor) -> list[torch.Tensor]:
        """The second discriminator's maps of logits; none without one."""
        if "feature_discriminator" not in self.judges:
            return []
        return self.judges["feature_discriminator"](self.features.taps(self._part(image).to(self.dtype)))

    def generator_pass(self, z, cameras, conditions):
        """Fakes from latents z [B, z_dim] at `cameras`, the mapping seeing `conditions`; the generator's gradient.

        Returns the flat gradient, the fakes (image, raw image) and figures.
        """
        config, generator = self.config, self.generator
        generator.requires_grad_(True)
        self.judges.requires_grad_(False)
        ws = generator.mapping(z, conditions)
        with torch.no_grad():
            generator.w_avg.copy_(ws[:, 0].mean(dim=0).lerp(generator.w_avg, 0.998))
        planes = generator.planes(ws, noise="random", dtype=self.dtype)
        output = generator.synthesize(ws, cameras, planes=planes, resolution=self.side, jitter=True, dtype=self.dtype)
        judged = self._judged(output.image, output.image_raw, cameras)
        logits = self.discriminator(*judged, dtype=self.dtype)
        adversarial = F.softplus(-logits).mean()
        by_features = self._feature_logits(judged[0])
        error = self.depth_error(output.depth, cameras, config.geometry.margin)
        variation = self.density_variation(planes)
        loss = adversarial + self.geometry_weight * error + config.density.weight * variation
        loss = loss + config.feature_weight * sum(F.softplus(-x).mean() for x in by_features)
        figures = {
            "loss_generator": adversarial,
            "logits_fake": logits.mean(),
            "depth_error": error,
            "density_variation": variation,
        } | {f"feature_logits_fake_{i}": x.mean() for i, x in enumerate(by_features)}
        fakes = (output.image.detach(), output.image_raw.detach())
        return self.generator_gradients.flatten(loss), fakes, {n: v.detach() for n, v in figures.items()}

    def discriminator_pass(self, image, image_raw, cameras, photo, photo_cameras):
        """The discriminator's gradient on fakes and photos; returns it, flat, and figures."""
        self.judges.requires_grad_(True)
        judged_fake = self._judged(image, image_raw, cameras)
        judged_photo = self._judged(photo, self._reduced(photo), photo_cameras)
        logits_fake = self.discriminator(*judged_fake, dtype=self.dtype)
        logits = self.discriminator(*judged_photo, dtype=self.dtype)
        adversarial = F.softplus(logits_fake).mean() + F.softplus(-logits).mean()
        pairs = list(zip(self._feature_logits(judged_fake[0]), self._feature_logits(judged_photo[0]), strict=True))
        loss = adversarial + sum(F.softplus(fake).mean() + F.softplus(-real).mean() for fake, real in pairs)
        figures = {"loss_discriminator": adversarial, "logits_real": logits.mean(), "sign_real": logits.sign().mean()}
        figures |= {f"feature_logits_real_{i}": real.mean() for i, (_, real) in enumerate(pairs)}
        return self.discriminator_gradients.flatten(loss), {n: v.detach() for n, v in figures.items()}

    def r1_pass(self, photo, cameras):
        """R1's gradient: squared gradient of the logits on photos with respect to image and raw image."""
        config = self.config
        self.judges.requires_grad_(True)
        image, image_raw, cameras = self._judged(photo, self._reduced(photo), cameras)
        image, image_raw = image.detach().requires_grad_(True), image_raw.detach().requires_grad_(True)
        # Not through the compiled call, which has no second derivative.
        logits = self.discriminator.forward(image, image_raw, cameras, dtype=self.dtype)
        gradients = torch.autograd.grad(logits.sum(), (image, image_raw), create_graph=True)
        penalty = sum(g.square().sum(dim=(1, 2, 3)) for g in gradients).mean()
        loss = penalty * (config.r1.gamma / 2 * config.r1.interval)
        return self.discriminator_gradients.flatten(loss), {"r1_penalty": penalty.detach()}

    def _prepare(self, images: int) -> None:
        """Follow the schedules; a new side in rays needs new graphs."""
        config, geometry = self.config, self.config.geometry
        side = [side for start, side in config.rays if images >= start][-1]
        if side != self.side:
            self.side = side
            self.captured = [
                CapturedFunction(function, self.graphs)
                for function in (self.generator_pass, self.discriminator_pass, self.r1_pass)
            ]
        for name, optimizer in self.optimizers.items():
            set_learning_rates(optimizer, [self.rates[name]], images, config.run, config.optimiser)
        self.geometry_weight.fill_(faded(images, geometry.weight, geometry.floor, geometry.fade, geometry.images))

    def _update(self, gradients: FlatGradients, flat: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        gradients.set(flat, self.accelerator.num_processes)
        optimizer.step()

    def step(self, images: int) -> dict[str, torch.Tensor | float]:
        """All that is due: both networks, R1, the averages, the augmentation; returns figures."""
        config = self.config
        self._prepare(images)
        generate, discriminate, penalize = self.captured
        z = torch.randn(self.batch, self.generator.config.z_dim, device=self.device)
        cameras = self.sampler.sample_cameras(self.batch)
        swap = faded(images, config.pose_swap.start, config.pose_swap.end, config.pose_swap.images)
        swapped = torch.rand(self.batch, 1, device=self.device) < swap
        flat, fakes, figures = generate(z, cameras, torch.where(swapped, cameras.roll(1, 0), cameras))
        self._update(self.generator_gradients, flat, self.optimizers["generator"])
        # Each process has learnt it from its own codes.
        average_buffers(self.accelerator, [self.generator.w_avg])
        photo, photo_cameras = self.sampler.next()
        flat, more = discriminate(*fakes, cameras, photo, photo_cameras)
        self._update(self.discriminator_gradients, flat, self.optimizers["discriminator"])
        figures = figures | more
        if config.r1.gamma and self.state["step"] % config.r1.interval == 0:
            count = max(int(self.batch * config.r1.share), 1)
            flat, more = penalize(photo[:count], photo_cameras[:count])
            self._update(self.discriminator_gradients, flat, self.optimizers["discriminator"])
            figures = figures | more
        update_average(self.average, self.generator, average_decay(images, config.batch, config.average))
        self.state["step"] += 1
        self.signs.append(figures["sign_real"].clone())
        if len(self.signs) == 16:
            self._adapt_augmentation()
        return figures | {"augmentation": self.state["augmentation"]}

    def _adapt_augmentation(self) -> None:
        sign = torch.stack(self.signs).mean()
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(sign)
            sign = sign / self.accelerator.num_processes
        self.augment.adapt(sign.item(), len(self.signs) * self.config.batch)
        self.signs.clear()
        self.state["augmentation"] = self.augment.p

    def before_saving(self, run: TrainingRun) -> None:
        """The signs that the augmentation has not followed yet."""
        if self.signs:
            signs = torch.stack(self.signs)
            if self.accelerator.num_processes > 1:
                torch.distributed.all_reduce(signs)
                signs /= self.accelerator.num_processes
            self.state["signs"] = signs.tolist()
        else:
            self.state["signs"] = []

    def report(self, run: TrainingRun) -> None:
        """A sheet of heads."""
        run.sheet("heads", self.sheet())

    @torch.no_grad()
    def sheet(self, truncation_psi: float = 0.7):
        """`HEADS` fixed random heads of the averaged generator, five yaws and depth (see `sheets.head_sheet`)."""
        generator = torch.Generator().manual_seed(1)
        z = torch.randn(self.HEADS, self.average.config.z_dim, generator=generator).to(self.device)
        cameras = self.average.camera_at(torch.zeros(self.HEADS), torch.zeros(self.HEADS)).to(self.device)
        # Other shapes than the steps' are not worth a compilation.
        with torch.compiler.set_stance("force_eager"):
            return head_sheet(self.average, self.average.mapping(z, cameras, truncation_psi))


def train(config: GeneratorConfig, folder: str | os.PathLike, resume: bool = False) -> Path:
    """Run (or go on with) a generator's training in `folder`; returns the newest checkpoint.

    The checkpoint's `generator` is the averaged one and, with its `discriminator`, what is published.

    Raises:
        FileExistsError, FileNotFoundError, ValueError, FloatingPointError, RuntimeError: see `loop.train`.
    """
    return loop.train(GeneratorTrainer, config, folder, resume).checkpoints[-1]
