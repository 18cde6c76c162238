"""Training of the auxiliary network: first plainly (Eq. 8), then by meta-learning (Alg. 1, Eq. 5-7)."""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from ..adaptation import InnerLoop, InnerProblem, Tasks, make_tasks, predict_tasks, synthesize_tasks
from ..data.dataset import FaceDataset, to_signed
from ..data.sampler import FaceSampler
from ..export.sheets import grid
from ..losses import InversionLoss, LossWeights, Reference
from ..models.auxiliary import AuxiliaryNetwork, AuxiliaryOutput
from ..models.discriminator import DualDiscriminator
from ..models.eg3d import EG3DGenerator, GeneratorOutput
from ..models.encoder import LatentEncoder
from ..models.identity import IdentityNetwork
from ..models.perceptual import LPIPS
from .cuda_graphs import CapturedFunction
from .distributed import FlatGradients, broadcast_module
from .trainer import TrainingRun, update_average


@dataclass
class FrozenNetworks:
    """What the auxiliary network is trained against; nothing here is trained.

    Attributes:
        generator: the generator G.
        encoder: gives the codes, which stay fixed.
        inner_loss: Eq. 8 as inference has it.
        outer_loss: of the objective.
    """

    generator: EG3DGenerator
    encoder: LatentEncoder
    inner_loss: InversionLoss
    outer_loss: InversionLoss

    def tasks(self, image: torch.Tensor, camera: torch.Tensor) -> Tasks:
        """Photos [B, 3, S, S] seen by cameras [B, 25] as a task each."""
        return make_tasks(self.generator, self.encoder, image, camera)


@dataclass
class AuxiliaryConfig:
    """Settings of both phases.

    Attributes:
        generator, encoder, discriminator, identity: folders of the trained, from now on frozen networks.
        data: EG3D data set to train on. validation: one to measure on, or `None`.
        phase: "plain" or "meta".
        initial_auxiliary: folder of the network to start from (meta: that of the plain phase); `None`: a new one.
        offset_bias_resolution: where given, the network started from gets offset planes of this side
            (`AuxiliaryNetwork.with_offset_bias_resolution`).
        full_kernel_layers: where given, its layers whose name starts with one of these get full kernels
            (`AuxiliaryNetwork.with_full_kernels`).
        layer_prefixes: generator layers that get weight offsets (new network only).
        auxiliary: further `AuxiliaryNetwork` arguments (new network only).
        perceptual: the perceptual network of the checkpoint to be, and so of the inner loop: an `LPIPS` folder, a
            safetensors file of SqueezeNet features, or `None` for the discriminator's features.
        inner_loss: `LossWeights` of the inner loop, which are to be the checkpoint's; stored in the network.
        outer_loss: `LossWeights` of the objective that the optimiser sees.
        outer_perceptual: the objective's perceptual distance, where it is another than `perceptual`.
        total_images, interval_images, max_seconds: see `TrainingRun`; an image is a task in the meta phase.
        batch: photos per optimiser step, of all processes together.
        sample_fraction: part of the plain phase's batch that is generated instead of photographed.
        learning_rate: of Adam (β of Eq. 7), falling along a cosine to `final_learning_rate` of it.
        warmup_images: images over which the learning rate rises at first.
        max_gradient_norm: clipping of the optimiser's gradient.
        average_images: half-life of the averaged network that is saved as `auxiliary_average`; 0: none.
        precision: "bf16" or "fp32", of the generator and, in the plain phase, of the auxiliary network. A CPU computes
            in fp32.
        resolution: rays a side for the objective; `None`: the generator's. inner_resolution: of the inner loop.
        inner_steps: K of the inner loop.
        inner_max_gradient_norm: clipping in Eq. 5, stored in the network; `None` keeps the network's.
        inner_momentum: μ of `adaptation.gradient_step`, likewise.
        order: "second" differentiates through the inner gradients (MAML), "first" takes them for constants.
        tasks_per_pass: tasks of a process whose inner loops run side by side; less needs less memory.
        multi_step_weight: share of the objective that is put on the inner loss of the states before the last (MAML++).
        learn_rates: whether the inner learning rates are learnt too, with `rates_learning_rate`.
        calibrate_rates: where positive, the inner rates are set such that a step changes each tensor by this fraction
            of its root mean square: at the start of the meta phase, and at each interval of the plain phase.
        validation_photos: photos of the validation set that are inverted at each interval.
        graphs: replay steps as CUDA graphs.
        seed: of the order of the photos and of generated ones.
    """

    generator: str
    encoder: str
    discriminator: str
    identity: str
    data: str
    validation: str | None = None
    phase: str = "plain"
    initial_auxiliary: str | None = None
    offset_bias_resolution: int | None = None
    full_kernel_layers: Sequence[str] = ()
    layer_prefixes: Sequence[str] = ("backbone.", "super_resolution.")
    auxiliary: dict[str, Any] = field(default_factory=dict)
    perceptual: str | None = None
    inner_loss: dict[str, float] = field(default_factory=dict)
    outer_loss: dict[str, float] = field(default_factory=dict)
    outer_perceptual: str | None = None
    total_images: int = 400_000
    interval_images: int = 40_000
    max_seconds: float | None = None
    batch: int = 32
    sample_fraction: float = 0.0
    learning_rate: float = 5e-4
    final_learning_rate: float = 0.05
    warmup_images: int = 2_000
    max_gradient_norm: float = 1.0
    average_images: float = 5_000
    precision: str = "bf16"
    resolution: int | None = None
    inner_resolution: int | None = None
    inner_steps: int = 5
    inner_max_gradient_norm: float | None = None
    inner_momentum: float | None = None
    order: str = "second"
    tasks_per_pass: int = 8
    multi_step_weight: float = 0.2
    learn_rates: bool = True
    rates_learning_rate: float = 0.02
    calibrate_rates: float = 0.002
    validation_photos: int = 32
    graphs: bool = True
    seed: int = 0

    def __post_init__(self):
        for name, known in (
            ("phase", ("plain", "meta")), ("order", ("first", "second")), ("precision", ("bf16", "fp32"))
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if self.inner_steps < 1:
            raise ValueError(f"inner_steps must be at least 1, got {self.inner_steps}")


def meta_objective(
    networks: FrozenNetworks, auxiliary: AuxiliaryNetwork, tasks: Tasks, config: AuxiliaryConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Eq. 6 for a batch of tasks, differentiable with regard to θ^Aux and the inner rates; and figures of it.

    With `config.multi_step_weight` the states before the last step share that part of the objective, by their inner
    loss, whose gradient the inner loop has computed anyway.
    """
    rates = auxiliary.inner_rates()
    if not config.learn_rates:
        rates = {name: rate.detach() for name, rate in rates.items()}
    dtype = _reduced_precision(config, tasks.image)
    inner = InnerLoop.of(
        auxiliary, config.inner_steps, rates=rates, resolution=config.inner_resolution,
        differentiable=config.order == "second", losses=config.multi_step_weight > 0, dtype=dtype,
    )  # fmt: skip
    problem = InnerProblem(networks.generator, auxiliary, networks.inner_loss, tasks, inner)
    adapted, seen = problem.run(auxiliary.adaptable_parameters())
    offsets = predict_tasks(auxiliary, adapted, tasks)
    last = synthesize_tasks(networks.generator, tasks, offsets, config.resolution, dtype=dtype)

    reference = networks.outer_loss.reference(tasks.image, tasks.camera)
    losses = _outer(networks, last, reference, tasks)
    objective = (1 - config.multi_step_weight) * losses["total"].mean()
    if config.multi_step_weight > 0:
        objective = objective + config.multi_step_weight * torch.stack([step.loss for step in seen]).mean()
    first_mse = (seen[0].image - tasks.image).square().mean()
    figures = {"objective": objective, "mse_before": first_mse}
    return objective, figures | {name: value.mean() for name, value in losses.items()}


def _reduced_precision(config: AuxiliaryConfig, tensor: torch.Tensor) -> torch.dtype | None:
    """bfloat16 where the settings ask for it and the tensor's device gains by it."""
    return torch.bfloat16 if config.precision == "bf16" and tensor.is_cuda else None


def _outer(networks: FrozenNetworks, output: GeneratorOutput, reference: Reference, tasks: Tasks):
    return networks.outer_loss(output.image, output.image_raw, reference, tasks.camera)


def plain_objective(
    networks: FrozenNetworks, auxiliary: AuxiliaryNetwork, tasks: Tasks, config: AuxiliaryConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Eq. 8 of the prediction before any gradient step; and figures of it."""
    dtype = _reduced_precision(config, tasks.image)
    with torch.autocast(tasks.image.device.type, dtype=dtype) if dtype else contextlib.nullcontext():
        offsets = auxiliary(tasks.image, tasks.camera, tasks.planes)
    offsets = AuxiliaryOutput(
        {name: offset.float() for name, offset in offsets.weight_offsets.items()}, offsets.offset_planes
    )
    output = synthesize_tasks(networks.generator, tasks, offsets, config.resolution, dtype=dtype)
    losses = _outer(networks, output, networks.outer_loss.reference(tasks.image, tasks.camera), tasks)
    figures = {name: value.mean() for name, value in losses.items()}
    return figures["total"], figures


@torch.no_grad()
def calibrate_rates(
    networks: FrozenNetworks,
    auxiliary: AuxiliaryNetwork,
    tasks: Tasks,
    relative_step: float,
    accelerator: Accelerator,
) -> None:
    """Set the inner rates such that a step changes each tensor by `relative_step` of its root mean square.

    The scales of gradients differ by orders of magnitude between tensors (a tensor at zero counts as 0.01), which
    one rate for all cannot suit and learning them from there would take long. Tensors without gradient keep theirs.
    """
    parameters = auxiliary.adaptable_parameters()
    was_training = auxiliary.training
    auxiliary.eval()
    with torch.enable_grad():
        stacked = {n: p.detach().expand(len(tasks.image), *p.shape).requires_grad_() for n, p in parameters.items()}
        problem = InnerProblem(networks.generator, auxiliary, networks.inner_loss, tasks, InnerLoop.of(auxiliary, 0))
        _, losses = problem.evaluate(0, predict_tasks(auxiliary, stacked, tasks))
        gradients = torch.autograd.grad(losses["total"].sum(), list(stacked.values()))
    auxiliary.train(was_training)
    logs = []
    for current, parameter, gradient in zip(auxiliary.log_inner_rates, parameters.values(), gradients, strict=True):
        size = parameter.square().mean().sqrt().clamp(min=0.01)
        slope = gradient.square().mean().sqrt()
        logs.append(torch.where(slope > 1e-9, (relative_step * size / slope.clamp(min=1e-9)).log(), current))
    auxiliary.log_inner_rates.copy_(accelerator.reduce(torch.stack(logs), reduction="mean"))


def average_statistics(accelerator: Accelerator, module: torch.nn.Module) -> None:
    """Mean of the batch-normalisation statistics over all processes."""
    if accelerator.num_processes > 1:
        buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        flat = accelerator.reduce(torch.cat([buffer.flatten() for buffer in buffers]), reduction="mean")
        for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))


class Validation:
    """Inverts photos that are not trained on: figures and a sheet (rows: photo, encoder, before and after K steps)."""

    def __init__(self, networks: FrozenNetworks, config: AuxiliaryConfig, device: torch.device):
        dataset = FaceDataset(config.validation, networks.generator.config.image_size, limit=config.validation_photos)
        self.networks, self.config = networks, config
        self.image = to_signed(dataset.load()).to(device)
        self.camera = dataset.cameras.to(device)

    def measure(self, auxiliary: AuxiliaryNetwork) -> tuple[dict[str, float], Image.Image]:
        """MSE at steps -1, 0 and K, and a sheet of the first eight photos; `auxiliary` must be in eval mode."""
        config, generator = self.config, self.networks.generator
        inner = InnerLoop.of(auxiliary, config.inner_steps)
        images: dict[int, list[torch.Tensor]] = {-1: [], 0: [], config.inner_steps: []}
        for tasks in self.networks.tasks(self.image, self.camera).split(config.tasks_per_pass):
            with torch.no_grad():
                images[-1].append(generator.synthesize(tasks.w, tasks.camera, planes=tasks.planes).image)
            parameters = {n: p.detach().requires_grad_() for n, p in auxiliary.adaptable_parameters().items()}
            adapted, seen = InnerProblem(generator, auxiliary, self.networks.inner_loss, tasks, inner).run(parameters)
            images[0].append(seen[0].image)
            with torch.no_grad():
                last = synthesize_tasks(generator, tasks, predict_tasks(auxiliary, adapted, tasks))
            images[config.inner_steps].append(last.image)
        columns = {step: torch.cat(parts) for step, parts in images.items()}
        figures = {
            f"validation_mse_step_{step}": (image - self.image).square().mean().item()
            for step, image in columns.items()
        }
        return figures, grid([self.image[:8], *(image[:8] for image in columns.values())])


def load_networks(config: AuxiliaryConfig, device: torch.device) -> FrozenNetworks:
    """The frozen networks and both losses on `device`."""

    def load(cls, folder):
        return cls.from_pretrained(folder, torch_dtype=torch.float32).to(device).eval().requires_grad_(False)

    discriminator = load(DualDiscriminator, config.discriminator)
    identity = load(IdentityNetwork, config.identity)
    perceptual = None if config.perceptual is None else LPIPS.from_path(config.perceptual).to(device)
    outer_perceptual = perceptual
    if config.outer_perceptual is not None:
        outer_perceptual = LPIPS.from_path(config.outer_perceptual).to(device)
    return FrozenNetworks(
        load(EG3DGenerator, config.generator),
        load(LatentEncoder, config.encoder),
        InversionLoss.from_components(LossWeights(**config.inner_loss), discriminator, identity, perceptual),
        InversionLoss.from_components(LossWeights(**config.outer_loss), discriminator, identity, outer_perceptual),
    )


def make_auxiliary(config: AuxiliaryConfig, generator: EG3DGenerator) -> AuxiliaryNetwork:
    """A new network that fits the generator, or the one that the configuration starts from."""
    if config.initial_auxiliary is None:
        arguments = AuxiliaryNetwork.config_for(generator, tuple(config.layer_prefixes), **config.auxiliary)
        auxiliary = AuxiliaryNetwork(**arguments)
    else:
        auxiliary = AuxiliaryNetwork.from_pretrained(config.initial_auxiliary)
        if config.offset_bias_resolution is not None:
            auxiliary = auxiliary.with_offset_bias_resolution(config.offset_bias_resolution)
        if config.full_kernel_layers:
            auxiliary = auxiliary.with_full_kernels(config.full_kernel_layers)
    for name in ("inner_max_gradient_norm", "inner_momentum"):
        if getattr(config, name) is not None:
            auxiliary.register_to_config(**{name: getattr(config, name)})
    return auxiliary


def learning_rate_factor(images: int, config: AuxiliaryConfig) -> float:
    """Linear warm-up, then a cosine from 1 to `final_learning_rate`."""
    warmup = min(1.0, (images + 1) / max(config.warmup_images, 1))
    cosine = (1 + math.cos(math.pi * min(1.0, images / config.total_images))) / 2
    return warmup * (config.final_learning_rate + (1 - config.final_learning_rate) * cosine)


def train(config: AuxiliaryConfig, run_folder: str | os.PathLike, resume: bool = False) -> bool:
    """Train in `run_folder`; with `resume` from its newest checkpoint. True where the run reached its end.

    The networks are saved as `auxiliary` and, for use, `auxiliary_average`.

    Raises:
        FileExistsError: the folder has checkpoints already and `resume` is off.
        ValueError: the batch cannot be divided among the processes and passes.
    """
    accelerator = Accelerator()
    device = accelerator.device
    parts = accelerator.num_processes * (config.tasks_per_pass if config.phase == "meta" else 1)
    if config.batch % parts:
        raise ValueError(f"a batch of {config.batch} cannot be divided into {parts} processes times tasks_per_pass")
    own_batch = config.batch // accelerator.num_processes
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.seed)  # of the initialisation: the same in every process
    networks = load_networks(config, device)
    auxiliary = make_auxiliary(config, networks.generator).to(device)
    auxiliary.register_to_config(inner_loss=networks.inner_loss.describe())
    broadcast_module(accelerator, auxiliary)
    average = copy.deepcopy(auxiliary).eval().requires_grad_(False) if config.average_images else None

    parameters = list(auxiliary.adaptable_parameters().values())
    groups = [{"params": parameters, "lr": config.learning_rate}]
    if config.phase == "meta" and config.learn_rates:
        groups.append({"params": [auxiliary.log_inner_rates], "lr": config.rates_learning_rate})
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    initial_rates = [group["lr"] for group in groups]
    run = TrainingRun(
        run_folder, accelerator, config.total_images, config.interval_images,
        models={"auxiliary": auxiliary} | ({"auxiliary_average": average} if average is not None else {}),
        optimizers={"auxiliary": optimizer}, config=config, max_seconds=config.max_seconds,
    )  # fmt: skip
    if run.checkpoints and not resume:
        raise FileExistsError(f"{run_folder} holds a run already: resume it, or choose another folder")
    resumed = run.resume() if resume else False

    # Every process sees other photos, and a resumed run does not see those of its beginning again.
    seed = config.seed + 1009 * accelerator.process_index + run.images
    torch.manual_seed(seed)
    sampler = FaceSampler(FaceDataset(config.data, networks.generator.config.image_size), own_batch, device, seed=seed)

    def calibrate(run: TrainingRun) -> None:
        tasks = networks.tasks(*sampler.next()).split(config.tasks_per_pass)[0]
        calibrate_rates(networks, average or auxiliary, tasks, config.calibrate_rates, accelerator)
        if average is not None:
            auxiliary.log_inner_rates.data.copy_(average.log_inner_rates)

    if config.phase == "plain":
        auxiliary.train()
        if config.calibrate_rates > 0:
            run.on_interval(calibrate)  # so that its checkpoints can be adapted too
    else:
        auxiliary.eval()  # a task is one photo, which has no batch statistics
        run.CHECK_EVERY = 1  # a step takes seconds
        if config.calibrate_rates > 0 and not resumed:
            calibrate(run)
    if config.validation is not None:
        validation = Validation(networks, config, device)
        run.on_interval(lambda run: _validate(run, validation, average or auxiliary))

    gradients = FlatGradients(parameter for group in groups for parameter in group["params"])

    def plain_pass(image, camera, sample_camera):
        if len(sample_camera):
            samples = _samples(networks.generator, sample_camera, config)
            image, camera = torch.cat([image, samples]), torch.cat([camera, sample_camera])
        objective, figures = plain_objective(networks, auxiliary, networks.tasks(image, camera), config)
        return gradients.flatten(objective), {name: value.detach() for name, value in figures.items()}

    def meta_pass(image, camera):
        objective, figures = meta_objective(networks, auxiliary, networks.tasks(image, camera), config)
        return gradients.flatten(objective), {name: value.detach() for name, value in figures.items()}

    captured = CapturedFunction(plain_pass if config.phase == "plain" else meta_pass, config.graphs)
    generated = round(config.sample_fraction * own_batch) if config.phase == "plain" else 0
    while run.active():
        factor = learning_rate_factor(run.schedule_images, config)
        for group, rate in zip(optimizer.param_groups, initial_rates, strict=True):
            group["lr"] = rate * factor
        image, camera = sampler.next()
        if config.phase == "plain":
            flat, figures = captured(image[generated:], camera[generated:], sampler.sample_cameras(generated))
            average_statistics(accelerator, auxiliary)
        else:
            flat, figures = _mean_over_parts(captured, image, camera, config.tasks_per_pass)
        gradients.set(flat, accelerator.num_processes)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_gradient_norm)
        optimizer.step()
        if average is not None:
            # The half-life is at most a tenth of the images so far, so that the start is forgotten soon.
            half_life = min(config.average_images, 0.1 * (run.images + config.batch))
            update_average(average, auxiliary, 0.5 ** (config.batch / half_life))
        run.advance(config.batch, figures | {"gradient_norm": norm, "learning_rate": factor * config.learning_rate})
    if config.phase == "plain" and config.calibrate_rates > 0:
        calibrate(run)
    return run.finish()


def _mean_over_parts(function, image, camera, size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean of `function`'s gradients (Eq. 7's, as a mean instead of a sum) and figures over parts of `size` photos."""
    flats, collected = [], []
    for part in zip(image.split(size), camera.split(size), strict=True):
        flat, figures = function(*part)
        # Clones, since a captured function's next call overwrites what this one returned.
        flats.append(flat.clone())
        collected.append({name: value.clone() for name, value in figures.items()})
    means = {name: torch.stack([figures[name] for figures in collected]).mean() for name in collected[0]}
    return torch.stack(flats).mean(0), means


@torch.no_grad()
def _samples(generator: EG3DGenerator, cameras: torch.Tensor, config: AuxiliaryConfig) -> torch.Tensor:
    z = torch.randn(len(cameras), generator.config.z_dim, device=cameras.device)
    dtype = _reduced_precision(config, cameras)
    return generator.synthesize(generator.mapping(z, cameras), cameras, dtype=dtype).image.clamp(-1, 1)


def _validate(run: TrainingRun, validation: Validation, auxiliary: AuxiliaryNetwork) -> None:
    if run.accelerator.is_main_process:
        was_training = auxiliary.training
        figures, sheet = validation.measure(auxiliary.eval())
        auxiliary.train(was_training)
        run.record({"images": run.images, **figures})
        run.sheet("inversion", sheet)
