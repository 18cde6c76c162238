"""Train EG3D's generator (EG3D §4-5): dual discrimination under camera conditioning.

Differences from EG3D's recipe, for speed and small data: each step's fake images serve both networks; the rendered
depth is drawn to a mean face at the start, which keeps a narrow range of cameras from teaching a hollow face. A second
discriminator on a frozen network's features can be added (`features`). On CUDA the passes of a step are compiled and
replayed as CUDA graphs.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from ..faces.cameras import camera_from_pose, project_points
from ..faces.canonical import canonical_face
from ..models import eg3d
from ..models.discriminator import DualDiscriminator
from ..models.eg3d import EG3DGenerator
from ..models.feature_discriminator import FeatureDiscriminator
from ..models.perceptual import LPIPS
from .augment import AdaptiveAugmentation
from .data import FaceDataset, FaceSampler
from .graphs import CapturedFunction, FlatGradients
from .loop import TrainingRun, broadcast_module, seed_process, update_average
from .sheets import head_sheet


@dataclass
class GeneratorConfig:
    """Settings of a generator run; counts are of images shown, over all GPUs.

    Attributes:
        data: EG3D data set, zip or folder, or several that are read as one.
        least_sharp: {source: smallest `sharp`} of the pictures that are used (see `FaceDataset`).
        repeats: {source: times} by which pictures of a source are shown more often (see `FaceSampler`).
        init: published checkpoint to start from (its `generator` and `discriminator` folders, and the
            `feature_discriminator` where there is one); without it, random weights of the sizes that `generator` and
            `discriminator` (keyword arguments of the models) give.
        rays: [[images, side], …], the side in rays of a rendering from so many images on.
        generator_rate, discriminator_rate: Adam's learning rates, reached linearly over the run's first
            `warmup_images`: a checkpoint comes without Adam's moments, whose first steps would be too long.
        final_rate: share of these rates to which they fall, linearly, by the end of the run.
        r1_gamma, r1_interval, r1_share: R1 penalty, every so many steps, on that share of the batch.
        density_weight, density_distance: total variation of the density between points that far apart, in box sides.
        pose_swap_start, pose_swap_end, pose_swap_images: probability with which the mapping sees another camera than
            the renderer, going from start to end over so many images.
        camera_noise: deviation of the noise on the discriminator's camera, in deviations of the data's.
        augment_target, augment_ramp_images: see `AdaptiveAugmentation`. augment_start: its strength at the start.
        geometry_weight: of the mean absolute distance by which the depth is off the mean face by more than
            `geometry_margin`, for `geometry_images`, then fading over `geometry_fade` to `geometry_floor`.
        features: safetensors file of SqueezeNet 1.1 features with folded normalisation: a second discriminator, which
            sees the image through them, is trained from scratch; None for none.
        feature_weight: of that discriminator in the generator's loss. With 0.05 the images' gradient through it is
            about three times the other discriminator's, which R1 keeps flat.
        feature_side: side in pixels of what it is shown of larger images: half of the time the whole one reduced, half
            of the time a random part at full size; None shows all of it.
        average_images: half-life of the averaged generator, at most the share `average_rampup` of the images so far.
        compile: fuse passes with `torch.compile` (CUDA). graphs: replay steps as CUDA graphs.
    """

    data: str | list[str]
    least_sharp: dict = field(default_factory=dict)
    repeats: dict = field(default_factory=dict)
    init: str | None = None
    generator: dict = field(default_factory=dict)
    discriminator: dict = field(default_factory=dict)
    total_images: int = 1_000_000
    interval_images: int = 100_000
    batch: int = 256
    rays: list = field(default_factory=lambda: [[0, 64]])
    generator_rate: float = 0.0025
    discriminator_rate: float = 0.002
    warmup_images: int = 0
    final_rate: float = 1.0
    r1_gamma: float = 0.2
    r1_interval: int = 16
    r1_share: float = 0.5
    density_weight: float = 0.25
    density_distance: float = 0.004
    pose_swap_start: float = 1.0
    pose_swap_end: float = 0.5
    pose_swap_images: int = 1_000_000
    camera_noise: float = 0.0
    augment_target: float = 0.6
    augment_ramp_images: int = 200_000
    augment_start: float = 0.0
    geometry_weight: float = 20.0
    geometry_images: int = 180_000
    geometry_fade: int = 120_000
    geometry_floor: float = 2.0
    geometry_margin: float = 0.02
    features: str | None = None
    feature_weight: float = 0.05
    feature_side: int | None = None
    average_images: int = 20_000
    average_rampup: float = 0.05
    balance_turned: bool = True
    mirror: bool = True
    in_memory: bool = True
    bf16: bool = True
    compile: bool = True
    graphs: bool = True
    seed: int = 0
    max_seconds: float | None = None


def faded(images: int, start: float, end: float, length: int, delay: int = 0) -> float:
    """A setting that goes linearly from `start` to `end` over `length` images, after `delay` images."""
    return start + (end - start) * min(max((images - delay) / max(length, 1), 0.0), 1.0)


class GeneratorTrainer:
    """The state of a run and one method a phase; `train` drives it."""

    def __init__(self, config: GeneratorConfig, accelerator: Accelerator):
        self.config, self.accelerator, self.device = config, accelerator, accelerator.device
        if config.batch % accelerator.num_processes:
            raise ValueError(f"batch {config.batch} is not divisible by {accelerator.num_processes} processes")
        self.batch = config.batch // accelerator.num_processes
        self.dtype = torch.bfloat16 if config.bf16 and self.device.type == "cuda" else torch.float32
        if config.init:
            generator = EG3DGenerator.from_pretrained(Path(config.init) / "generator", torch_dtype=torch.float32)
            discriminator = DualDiscriminator.from_pretrained(
                Path(config.init) / "discriminator", torch_dtype=torch.float32
            )
        else:
            generator, discriminator = EG3DGenerator(**config.generator), DualDiscriminator(**config.discriminator)
        self.generator = generator.to(self.device).train()
        self.discriminator = discriminator.to(self.device).train()
        self.judges = nn.ModuleDict({"discriminator": self.discriminator})
        if config.features:
            self.features = LPIPS.from_features_file(config.features).to(self.device)
            self.features.features.to(self.dtype)
            self.judges["feature_discriminator"] = self._feature_discriminator().to(self.device).train()
        for module in (self.generator, self.judges):
            broadcast_module(accelerator, module)
        self.average = copy.deepcopy(self.generator).eval().requires_grad_(False)
        ratio = config.r1_interval / (config.r1_interval + 1)  # StyleGAN2's correction for lazy regularisation
        fused = self.device.type == "cuda"
        self.generator_optimizer = torch.optim.Adam(
            self.generator.parameters(), lr=config.generator_rate, betas=(0.0, 0.99), fused=fused
        )
        self.discriminator_optimizer = torch.optim.Adam(
            self.judges.parameters(),
            lr=config.discriminator_rate * ratio,
            betas=(0.0, 0.99**ratio),
            fused=fused,
        )
        self.rates = [
            (group, group["lr"])
            for optimizer in (self.generator_optimizer, self.discriminator_optimizer)
            for group in optimizer.param_groups
        ]
        self.generator_gradients = FlatGradients(self.generator.parameters())
        self.discriminator_gradients = FlatGradients(self.judges.parameters())
        self.augment = AdaptiveAugmentation(config.augment_target, config.augment_ramp_images, device=self.device)
        self.augment.p = config.augment_start
        vertices = torch.from_numpy(canonical_face())
        self.vertices = vertices[vertices[:, 2] > 0.06].to(self.device)
        self.geometry_weight = torch.zeros((), device=self.device)
        self.signs: list[torch.Tensor] = []
        self.side = 0
        if config.compile and self.device.type == "cuda":
            for module in (
                self.generator.backbone,
                self.generator.super_resolution,
                self.generator.decoder,
                self.discriminator,
            ):
                module.compile()
            eg3d.shade = torch.compile(eg3d.shade)

    def _feature_discriminator(self) -> FeatureDiscriminator:
        """The starting checkpoint's, or one with random weights."""
        folder = Path(self.config.init or "") / "feature_discriminator"
        if self.config.init and folder.is_dir():
            return FeatureDiscriminator.from_pretrained(folder, torch_dtype=torch.float32)
        return FeatureDiscriminator()

    def load_data(self, images: int) -> None:
        """Decode the data set and start the random streams of this process at a point of the run."""
        config = self.config
        dataset = FaceDataset(config.data, self.generator.config.image_size, least_sharp=config.least_sharp)
        seed = seed_process(self.accelerator, config.seed, images)
        self.sampler = FaceSampler(
            dataset,
            self.batch,
            self.device,
            seed,
            config.mirror,
            config.balance_turned,
            config.in_memory,
            repeats=config.repeats,
        )
        self.camera_deviation = dataset.cameras.std(dim=0).to(self.device)

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
        the box and others `density_distance` box sides away."""
        config, size = self.config, self.generator.config.box_size
        points = (torch.rand(len(planes), 1000, 3, device=self.device) - 0.5) * size
        near = points + torch.randn_like(points) * (config.density_distance * size)
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
        image = self._part(image)
        return self.judges["feature_discriminator"](self.features.taps(image.to(self.dtype)))

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
        error = self.depth_error(output.depth, cameras, config.geometry_margin)
        variation = self.density_variation(planes)
        loss = adversarial + self.geometry_weight * error + config.density_weight * variation
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
        loss = penalty * (config.r1_gamma / 2 * config.r1_interval)
        return self.discriminator_gradients.flatten(loss), {"r1_penalty": penalty.detach()}

    def _prepare(self, images: int, progress: float = 0.0) -> None:
        """Follow the schedules, `progress` being the share of the run that is done; a new side in rays needs new
        graphs."""
        config = self.config
        side = [side for start, side in config.rays if images >= start][-1]
        if side != self.side:
            self.side = side
            self.captured = [
                CapturedFunction(function, config.graphs)
                for function in (self.generator_pass, self.discriminator_pass, self.r1_pass)
            ]
        warm = min(1.0, (images + config.batch) / max(config.warmup_images, 1))
        fall = 1 + (config.final_rate - 1) * min(progress, 1.0)
        for group, rate in self.rates:
            group["lr"] = rate * warm * fall
        self.geometry_weight.fill_(
            faded(images, config.geometry_weight, config.geometry_floor, config.geometry_fade, config.geometry_images)
        )

    def _update(self, gradients: FlatGradients, flat: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        gradients.set(flat, self.accelerator.num_processes)
        optimizer.step()

    def step(self, index: int, images: int, progress: float = 0.0) -> dict:
        """All that is due at step `index`: both networks, R1, the average, the augmentation; returns figures."""
        config = self.config
        self._prepare(images, progress)
        generate, discriminate, penalize = self.captured
        z = torch.randn(self.batch, self.generator.config.z_dim, device=self.device)
        cameras = self.sampler.sample_cameras(self.batch)
        swap = faded(images, config.pose_swap_start, config.pose_swap_end, config.pose_swap_images)
        swapped = torch.rand(self.batch, 1, device=self.device) < swap
        flat, fakes, figures = generate(z, cameras, torch.where(swapped, cameras.roll(1, 0), cameras))
        self._update(self.generator_gradients, flat, self.generator_optimizer)
        photo, photo_cameras = self.sampler.next()
        flat, more = discriminate(*fakes, cameras, photo, photo_cameras)
        self._update(self.discriminator_gradients, flat, self.discriminator_optimizer)
        figures = figures | more
        if config.r1_gamma and index % config.r1_interval == 0:
            count = max(int(self.batch * config.r1_share), 1)
            flat, more = penalize(photo[:count], photo_cameras[:count])
            self._update(self.discriminator_gradients, flat, self.discriminator_optimizer)
            figures = figures | more
        half_life = min(config.average_images, max(images, 1) * config.average_rampup)
        update_average(self.average, self.generator, 0.5 ** (config.batch / max(half_life, 1e-8)))
        self.signs.append(figures["sign_real"].clone())
        if len(self.signs) == 16:
            self._adapt_augmentation()
        return figures

    def _adapt_augmentation(self) -> None:
        sign = torch.stack(self.signs).mean()
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(sign)
            sign = sign / self.accelerator.num_processes
        self.augment.adapt(sign.item(), len(self.signs) * self.config.batch)
        self.signs.clear()

    @torch.no_grad()
    def sheet(self, heads: int = 16, truncation_psi: float = 0.7):
        """`heads` fixed random heads of the averaged generator, five yaws and depth (see `sheets.head_sheet`)."""
        generator = torch.Generator().manual_seed(1)
        z = torch.randn(heads, self.average.config.z_dim, generator=generator).to(self.device)
        cameras = camera_from_pose(torch.zeros(heads), torch.zeros(heads)).to(self.device)
        # Other shapes than the steps' are not worth a compilation.
        with torch.compiler.set_stance("force_eager"):
            return head_sheet(self.average, self.average.mapping(z, cameras, truncation_psi))


def train(config: GeneratorConfig, folder: str | os.PathLike, resume: bool = False) -> Path:
    """Run (or go on with) a generator's training in `folder`; returns the newest checkpoint.

    The checkpoint's `generator` is the averaged one and, with its `discriminator`, what is published.

    Raises:
        FileNotFoundError, ValueError: the data set, the starting checkpoint or the settings do not fit.
    """
    accelerator = Accelerator()
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    set_seed(config.seed)
    trainer = GeneratorTrainer(config, accelerator)
    state = {"augmentation": config.augment_start, "step": 0}
    run = TrainingRun(
        folder,
        accelerator,
        config.total_images,
        config.interval_images,
        models={
            "generator": trainer.average,
            "generator_raw": trainer.generator,
            **trainer.judges,
        },
        optimizers={"generator": trainer.generator_optimizer, "discriminator": trainer.discriminator_optimizer},
        config=config,
        state=state,
        max_seconds=config.max_seconds,
    )
    if resume:
        run.resume()
        trainer.augment.p = state["augmentation"]
    trainer.load_data(run.images)

    def show(run):
        if accelerator.is_main_process:
            run.sheet("heads", trainer.sheet())

    run.on_interval(show)
    while run.active():
        figures = trainer.step(state["step"], run.images, run.schedule_images / config.total_images)
        state["step"] += 1
        if not trainer.signs:  # it has just been adapted
            state["augmentation"] = trainer.augment.p
        run.advance(config.batch, figures | {"augmentation": state["augmentation"]})
    run.finish()
    return run.checkpoints[-1]
