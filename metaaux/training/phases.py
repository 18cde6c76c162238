"""What both phases of the auxiliary network's training share: settings, frozen networks, start, calibration, held-out
figures. `plain` and `meta` hold what they differ in."""

from __future__ import annotations

import warnings
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from ..losses import InversionLoss, LossWeights
from ..models.auxiliary import AuxiliaryNetwork
from ..models.discriminator import DualDiscriminator
from ..models.encoder import LatentEncoder
from ..models.presets import PRESETS, Preset, inner_loop_of, preset_of
from ..tasks import Generator
from .calibration import calibrate_rates
from .distributed import FlatGradients, broadcast_module
from .loading import FrozenNetworks, compile_frozen, load_generator, load_identity, load_network, load_perceptual
from .loop import Trainer, averaged_copy, per_process, set_learning_rates
from .schedules import average_decay, update_average
from .settings import (
    AverageSettings,
    DataSettings,
    FrozenGeneratorCompute,
    OptimiserSettings,
    RunSettings,
    Settings,
    Share,
    arguments_of,
)
from .trainer import TrainingRun
from .validation import Validation

LossSetting = Annotated[dict[str, float], AfterValidator(arguments_of(LossWeights))]
#: Photos of each process by whose gradients inner rates are calibrated, where its batch has so many.
_CALIBRATION_TASKS = 16
#: Arguments of `AuxiliaryNetwork` that the generator decides.
GIVEN_ARGUMENTS = ("layer_shapes", "image_size", "plane_features", "plane_resolution", "box_size")


class FrozenNetworkSettings(Settings):
    """Folders of trained networks that are used as they are."""

    generator: str
    """The generator."""
    encoder: str
    """Gives the codes, which stay fixed."""
    discriminator: str
    """Of the adversarial term and, without `perceptual`, of the perceptual distance."""
    identity: str
    """Of the identity term."""
    perceptual: str | None = None
    """The perceptual network of the checkpoint to be, and so of the inner loop: an `LPIPS` folder or a safetensors
    file of SqueezeNet features; null: the discriminator's features."""


class AuxiliarySettings(Settings):
    """The network to start from."""

    initial: str | None = None
    """Its folder (meta: that of the plain phase's network); null: a new one."""
    layer_prefixes: tuple[str, ...] = ("",)
    """Generator layers whose name starts with one of these get weight offsets, "" being all (new network only)."""
    arguments: Annotated[dict[str, Any], AfterValidator(arguments_of(AuxiliaryNetwork, *GIVEN_ARGUMENTS))] = {}
    """Further arguments of `AuxiliaryNetwork` (new network only)."""
    offset_bias_resolution: NonNegativeInt | None = None
    """Where given, the network started from gets offset planes of this side, or with 0 loses its bias a position
    (`AuxiliaryNetwork.with_offset_bias_resolution`)."""
    without: Literal["2d", "3d"] | None = None
    """An ablation of Table 3: it loses this module (`AuxiliaryNetwork.without_module`)."""
    full_kernel_layers: tuple[str, ...] = ()
    """Its layers whose name starts with one of these get full kernels (`AuxiliaryNetwork.with_full_kernels`)."""


class InnerSettings(Settings):
    """The inner loop, Eq. 5, which is also that of inference; of the plain phase for held-out figures alone."""

    steps: PositiveInt = 5
    """K."""
    loss: LossSetting = {}
    """`LossWeights`, which are to be the checkpoint's; stored in the network."""
    max_gradient_norm: PositiveFloat | None = None
    """Clipping in Eq. 5, stored in the network; null keeps the network's."""
    momentum: NonNegativeFloat | None = None
    """μ of `adaptation.gradient_step`, likewise."""
    order: Literal["first", "second"] = "second"
    """Whether the inner gradients are differentiated through (second, MAML) or taken for constants (first)."""
    resolution: PositiveInt | None = None
    """Rays a side; null: the generator's."""
    tasks_per_pass: PositiveInt = 8
    """Tasks of a process whose inner loops run side by side; less needs less memory."""
    checkpoint: bool = False
    """Of second order: keep the parameters of each step alone and compute it again in the backward pass, which takes a
    third more time and the memory of one step instead of K. Needs graphs off."""
    learn_rates: bool = True
    """Whether the inner learning rates are learnt too."""
    rates_learning_rate: PositiveFloat = 0.02
    """Peak of the learning rate of their logarithms."""
    calibrate_rates: NonNegativeFloat = 0.002
    """Where positive, the inner rates are set such that a step changes each tensor by this fraction of its root mean
    square: at the start of the meta phase, and at each checkpoint of the plain phase."""
    calibrate_backbone: PositiveFloat = 1.0
    """The ResNet's tensors then change by so many times what the others do. All that is predicted comes from its
    features, so that a step of its first layers is one of everything: plain gradient steps run apart there first."""


class OuterSettings(Settings):
    """The objective that the optimiser sees."""

    loss: LossSetting = {}
    """`LossWeights`."""
    perceptual: str | None = None
    """Its perceptual distance, where it is another than `networks.perceptual`; what that may be."""
    resolution: PositiveInt | None = None
    """Rays a side; null: the generator's."""
    multi_step_weight: Share = 0.2
    """Share of the meta phase's objective that is put on the inner loss of the states before the last (MAML++)."""
    max_gradient_norm: PositiveFloat | None = None
    """Of each pass of the meta phase, before the mean over them; null: none. Where a task's inner steps run apart, its
    meta-gradient of second order is a thousand times as long as the others', and all that is left of the mean once it
    is clipped (`optimiser.max_gradient_norm`). Best with `inner.tasks_per_pass: 1`."""
    sample_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Part of the plain phase's batch that is generated instead of photographed."""


class AuxiliaryConfig(Settings):
    """Settings of both phases; counts are of images shown, over all processes: in the meta phase, of tasks."""

    phase: Literal["plain", "meta"] = "plain"
    """Prediction alone (Eq. 8), or meta-learning (Alg. 1)."""
    preset: Preset | None = None
    """Gives settings that this configuration leaves out their values (`models.presets`): "paper" is the method as the
    text has it, "extended" needs `auxiliary.offset_bias_resolution` and `auxiliary.full_kernel_layers` besides, which
    the plain phase leaves to the meta phase."""
    networks: FrozenNetworkSettings
    """What it is trained with."""
    auxiliary: AuxiliarySettings = AuxiliarySettings()
    """The network."""
    data: DataSettings
    """Photos."""
    inner: InnerSettings = InnerSettings()
    """Inner loop."""
    outer: OuterSettings = OuterSettings()
    """Objective."""
    batch: PositiveInt = 32
    """Photos per optimiser step."""
    optimiser: OptimiserSettings = OptimiserSettings(learning_rate=5e-4, final_learning_rate=0.05, warmup_images=2_000)
    """AdamW; its learning rate is β of Eq. 7."""
    average: AverageSettings = AverageSettings(half_life_images=5_000)
    """The averaged network, saved as `auxiliary_average`."""
    validation_photos: PositiveInt = 32
    """Photos of the validation set that are inverted at each interval."""
    compute: FrozenGeneratorCompute = FrozenGeneratorCompute()
    """Precision: of the generator, of the outer loss's networks and, in the plain phase, of the auxiliary network.
    `micro_batch` is the plain phase's; the meta phase's batch is divided by `inner.tasks_per_pass`. `compile` is for
    derivatives of first order."""
    run: RunSettings
    """Length and folder."""

    @model_validator(mode="before")
    @classmethod
    def _preset_values(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("preset") not in PRESETS:
            return values
        sections = PRESETS[values["preset"]].items()
        return values | {name: _filled(values.get(name), defaults) for name, defaults in sections}

    @model_validator(mode="after")
    def _memory(self) -> AuxiliaryConfig:
        if self.compute.graphs and self.inner.checkpoint and self.phase == "meta":
            raise ValueError(
                "inner.checkpoint computes in the backward pass, which graphs do not capture: compute.graphs: false"
            )
        if self.compute.compile and self.phase == "meta" and self.inner.order == "second":
            raise ValueError(
                "what is compiled has no second derivative, which inner.order: second needs: compute.compile: false"
            )
        if self.phase == "meta" and self.compute.micro_batch is not None:
            raise ValueError("compute.micro_batch is the plain phase's; inner.tasks_per_pass divides this one's batch")
        return self


def _filled(section: Any, defaults: dict[str, Any]) -> Any:
    """A section of settings with `defaults` for what it leaves out; what is no section is left to be refused."""
    if isinstance(section, Settings):
        # A section again, since pydantic does not look at it where another value is assigned.
        return type(section).model_validate(defaults | section.model_dump(exclude_unset=True))
    return defaults if section is None else defaults | section if isinstance(section, dict) else section


def load_networks(config: AuxiliaryConfig, device: torch.device, dtype: torch.dtype | None = None) -> FrozenNetworks:
    """The frozen networks and both losses on `device`; `dtype`: reduced precision of the outer loss's networks."""
    folders = config.networks
    discriminator = load_network(DualDiscriminator, folders.discriminator).to(device)
    identity = load_identity(folders.identity).to(device)
    perceptual = None if folders.perceptual is None else load_perceptual(folders.perceptual).to(device)
    outer_perceptual = perceptual
    if config.outer.perceptual is not None:
        outer_perceptual = load_perceptual(config.outer.perceptual).to(device)
    inner_weights, outer_weights = LossWeights(**config.inner.loss), LossWeights(**config.outer.loss)
    return FrozenNetworks(
        load_generator(folders.generator).to(device),
        load_network(LatentEncoder, folders.encoder).to(device),
        InversionLoss.from_components(inner_weights, discriminator, identity, perceptual),
        InversionLoss.from_components(outer_weights, discriminator, identity, outer_perceptual, dtype),
    )


def make_auxiliary(config: AuxiliaryConfig, generator: Generator) -> AuxiliaryNetwork:
    """A new network that fits the generator, or the one that the configuration starts from."""
    start = config.auxiliary
    if start.initial is None:
        auxiliary = AuxiliaryNetwork(**AuxiliaryNetwork.config_for(generator, start.layer_prefixes, **start.arguments))
    else:
        auxiliary = load_network(AuxiliaryNetwork, start.initial)
    if start.without is not None:
        auxiliary = auxiliary.without_module(start.without)
    if start.offset_bias_resolution or (start.offset_bias_resolution == 0 and auxiliary.offset_network is not None):
        auxiliary = auxiliary.with_offset_bias_resolution(start.offset_bias_resolution)
    if start.full_kernel_layers:
        auxiliary = auxiliary.with_full_kernels(start.full_kernel_layers)
    for name in ("max_gradient_norm", "momentum"):
        if getattr(config.inner, name) is not None:
            auxiliary.register_to_config(**{f"inner_{name}": getattr(config.inner, name)})
    auxiliary.register_to_config(inner_training=_inner_training(config))
    if config.phase == "meta" and config.preset not in (None, found := preset_of(auxiliary)):
        warnings.warn(
            f"preset: {config.preset}, but with the settings given beside it and the network that it starts from this "
            f"run trains one that is {found}: {inner_loop_of(auxiliary)}",
            stacklevel=2,
        )
    return auxiliary.requires_grad_(True)


def _inner_training(config: AuxiliaryConfig) -> dict[str, Any] | None:
    """What the network records of its meta-learning."""
    if config.phase == "plain":
        return None
    inner = config.inner
    return {"steps": inner.steps, "order": inner.order, "multi_step_weight": config.outer.multi_step_weight}


class AuxiliaryTrainer(Trainer):
    """The networks of a run, and all of a step but its objective."""

    def __init__(self, config: AuxiliaryConfig, accelerator: Accelerator):
        super().__init__(config, accelerator)
        self.own_batch = per_process(config.batch, accelerator)
        self.reduced = None if self.dtype == torch.float32 else self.dtype
        self.networks = load_networks(config, self.device, self.reduced)
        self.networks.generator.rays_at_once = config.compute.rays_at_once
        auxiliary = make_auxiliary(config, self.networks.generator).to(self.device)
        auxiliary.register_to_config(inner_loss=self.networks.inner_loss.describe())
        broadcast_module(accelerator, auxiliary)
        self.auxiliary, self.average = auxiliary, averaged_copy(auxiliary)
        self.models = {"auxiliary": self.auxiliary, "auxiliary_average": self.average}

        self.parameters = list(auxiliary.adaptable_parameters().values())
        groups: list[dict[str, Any]] = [{"params": self.parameters, "weight_decay": config.optimiser.weight_decay}]
        self.peaks = [config.optimiser.learning_rate]
        if config.phase == "meta" and config.inner.learn_rates:
            groups.append({"params": [auxiliary.log_inner_rates], "weight_decay": 0.0})
            self.peaks.append(config.inner.rates_learning_rate)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=self.device.type == "cuda")
        self.optimizers = {"auxiliary": self.optimizer}
        self.gradients = [FlatGradients(parameter for group in groups for parameter in group["params"])]
        if config.compute.compile and self.device.type == "cuda":
            self.compile()

    def compile(self) -> None:
        """Fuse the passes of the generator and of the losses' discriminator, which have no second derivatives then."""
        compile_frozen(self.networks.generator)
        for loss in (self.networks.inner_loss, self.networks.outer_loss):
            judge = loss.discriminator  # each loss's own view
            judge.features = torch.compile(judge.features, dynamic=False)

    @property
    def images_per_step(self) -> int:
        """Photos and samples, or tasks."""
        return self.config.batch

    @property
    def needs_cameras(self) -> bool:
        """Not for a 2D generator."""
        return self.networks.generator.has_viewpoints

    @property
    def image_size(self) -> int:
        """The generator's."""
        return self.networks.generator.config.image_size

    def load_data(self, images: int) -> None:
        """Likewise, and the photos of the held-out figures."""
        super().load_data(images)
        self.validation = None
        if self.config.data.validation:
            held_out = self.held_out(self.config.validation_photos)
            inner = self.config.inner
            self.validation = Validation(self.networks, held_out, inner.steps, inner.tasks_per_pass, self.device)

    def calibrate(self) -> None:
        """Inner rates from the averaged network's gradients, for both."""
        at_once, relative_step = self.config.inner.tasks_per_pass, self.config.inner.calibrate_rates
        # Of one photo alone, a tensor's rate may be ten times another photo's.
        image, camera = (tensor[: max(at_once, _CALIBRATION_TASKS)] for tensor in self.sampler.next())
        # Other sizes than the steps' are not worth a compilation, here and in held-out figures.
        with torch.compiler.set_stance("force_eager"):
            tasks = self.networks.tasks(image, camera)
            backbone = self.config.inner.calibrate_backbone
            calibrate_rates(self.networks, self.average, tasks, relative_step, self.accelerator, at_once, backbone)
        self.auxiliary.log_inner_rates.data.copy_(self.average.log_inner_rates)

    def update(self, flat: torch.Tensor, images: int) -> dict[str, torch.Tensor | float]:
        """Eq. 7 with the gradient `flat` of this process; returns figures."""
        config = self.config
        factor = set_learning_rates(self.optimizer, self.peaks, images, config.run, config.optimiser)
        self.gradients[0].set(flat, self.accelerator.num_processes)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.optimiser.max_gradient_norm)
        self.optimizer.step()
        update_average(self.average, self.auxiliary, average_decay(images, config.batch, config.average))
        return {"gradient_norm": norm, "learning_rate": factor * config.optimiser.learning_rate}

    def report(self, run: TrainingRun) -> None:
        """Held-out figures and a sheet of the averaged network."""
        if self.validation is not None:
            with torch.compiler.set_stance("force_eager"):
                figures, sheet = self.validation.measure(self.average)
            run.record({"images": run.images, **figures})
            run.sheet("inversion", sheet)
