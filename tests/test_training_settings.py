"""Settings of training: what YAML may say, and what is said of what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from metaaux.losses import LossWeights
from metaaux.models.auxiliary import AuxiliaryNetwork
from metaaux.models.eg3d import EG3DGenerator
from metaaux.models.encoder import LatentEncoder
from metaaux.training.auxiliary import AuxiliaryConfig
from metaaux.training.directions import DirectionsConfig
from metaaux.training.encoder import EncoderConfig
from metaaux.training.generator import GeneratorConfig
from metaaux.training.identity import IdentityConfig
from metaaux.training.schedules import learning_rate_factor
from metaaux.training.settings import ScheduleSettings, Settings, default_run_folder, load_settings

CONFIGS = Path(__file__).resolve().parent.parent / "metaaux" / "configs"
CLASSES = {
    "mini/generator": GeneratorConfig,
    "mini/generator-256": GeneratorConfig,
    "mini/generator-continue": GeneratorConfig,
    "mini/identity": IdentityConfig,
    "mini/encoder": EncoderConfig,
    "mini/encoder-256": EncoderConfig,
    "mini/plain": AuxiliaryConfig,
    "mini/plain-256": AuxiliaryConfig,
    "mini/meta": AuxiliaryConfig,
    "mini/meta-256": AuxiliaryConfig,
    "mini/meta-paper": AuxiliaryConfig,
    "mini/meta-paper-256": AuxiliaryConfig,
    "mini/directions": DirectionsConfig,
    "mini/directions-256": DirectionsConfig,
    "baselines/psp": EncoderConfig,
    "baselines/styletransformer": EncoderConfig,
    "baselines/plain-without-2d": AuxiliaryConfig,
    "baselines/plain-without-3d": AuxiliaryConfig,
    "ffhq/encoder": EncoderConfig,
    "ffhq/psp": EncoderConfig,
    "ffhq/styletransformer": EncoderConfig,
    "ffhq/plain": AuxiliaryConfig,
    "ffhq/plain-without-2d": AuxiliaryConfig,
    "ffhq/plain-without-3d": AuxiliaryConfig,
    "ffhq/meta-paper": AuxiliaryConfig,
    "ffhq/meta-extended": AuxiliaryConfig,
    "ffhq/directions": DirectionsConfig,
    "stylegan2/encoder": EncoderConfig,
    "stylegan2/plain": AuxiliaryConfig,
    "stylegan2/meta": AuxiliaryConfig,
    "stylegan2/directions": DirectionsConfig,
}


def test_every_shipped_configuration_loads():
    found = {path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml")}
    assert found == set(CLASSES)
    for name, cls in CLASSES.items():
        assert isinstance(load_settings(cls, CONFIGS / f"{name}.yaml"), cls)


@pytest.mark.parametrize("name", [name for name in CLASSES if name.startswith(("ffhq/", "stylegan2/"))])
def test_full_size_has_the_papers_losses_and_fits_the_published_shape(name):
    """Sec. 4.1: LPIPS 0.8, ArcFace 0.1, adversarial 0.005; and the networks of hub_configs/metaaux-ffhq."""
    cls = CLASSES[name]
    config = load_settings(cls, CONFIGS / f"{name}.yaml")
    folder = "metaaux-ffhq" if name.startswith("ffhq") else "metaaux-stylegan2"
    if cls is DirectionsConfig:
        assert (config.generator, config.identity) == (f"{folder}/generator", f"{folder}/identity")
        return
    assert config.networks.perceptual == f"{folder}/perceptual" and config.networks.identity == f"{folder}/identity"
    if cls is EncoderConfig:
        assert (config.loss.mse, config.loss.perceptual, config.loss.identity) == (1.0, 0.8, 0.1)
    else:
        paper = {"mse": 1.0, "perceptual": 0.8, "identity": 0.1, "adversarial": 0.005}
        assert config.inner.loss == config.outer.loss == paper and config.inner.steps == 5
        assert config.networks.encoder == f"runs/{name.split('/')[0]}-encoder/latest/encoder"
        assert config.batch % config.inner.tasks_per_pass == 0
        assert config.preset == ("extended" if "extended" in name else "paper")


def test_full_size_trains_the_published_networks():
    published = CONFIGS.parents[1] / "hub_configs" / "metaaux-ffhq"
    encoder = load_settings(EncoderConfig, CONFIGS / "ffhq/encoder.yaml")
    plain = load_settings(AuxiliaryConfig, CONFIGS / "ffhq/plain.yaml")
    with torch.device("meta"):
        generator = EG3DGenerator.from_config(EG3DGenerator.load_config(published / "generator"))
        networks = {
            "encoder": LatentEncoder(num_ws=generator.num_ws, **encoder.encoder),
            "auxiliary": AuxiliaryNetwork(**AuxiliaryNetwork.config_for(generator, **plain.auxiliary.arguments)),
        }
    for name, network in networks.items():
        config = type(network).load_config(published / name)
        different = {key for key in config if key[0] != "_" and _plain(network.config[key]) != _plain(config[key])}
        different -= {"offset_bias_resolution", "inner_training"}  # which make_auxiliary adds
        assert different == set()


def _plain(value):
    """Tuples as lists, as JSON has them."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def sections(cls: type[Settings], seen: set | None = None) -> set[type[Settings]]:
    seen = set() if seen is None else seen
    seen.add(cls)
    for field in cls.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            sections(field.annotation, seen)
    return seen


def test_every_setting_is_documented_and_no_section_is_long():
    for cls in set().union(*(sections(cls) for cls in CLASSES.values())):
        assert cls.__doc__
        assert len(cls.model_fields) <= 20
        for name, field in cls.model_fields.items():
            assert field.description, f"{cls.__name__}.{name}"


class TestValues:
    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "encoder.yaml"
        path.write_text(
            "networks: {generator: g}\ndata: {path: bilder/größe.zip, in_memory: auto}\n"
            "optimiser: {learning_rate: 1e-3}\nencoder: {widths: [16, 16, 16, 16], input_size: 32}\n"
            "run: {total_images: 100, interval_images: 50}\n",
            encoding="utf-8",
        )
        return path

    def test_what_yaml_calls_a_string_arrives_as_a_number(self, path):
        config = load_settings(EncoderConfig, path)
        assert config.optimiser.learning_rate == 1e-3 and isinstance(config.optimiser.learning_rate, float)
        assert config.data.path == "bilder/größe.zip" and config.data.in_memory == "auto"
        assert config.encoder == {"widths": [16, 16, 16, 16], "input_size": 32}

    def test_overrides(self, path):
        overrides = ["run.total_images=7", "encoder.width=16", "data.in_memory=false", "loss.mse=5e-1", "initial=null"]
        config = load_settings(EncoderConfig, path, overrides)
        assert config.run.total_images == 7 and config.run.interval_images == 50
        assert config.encoder["width"] == 16 and config.data.in_memory is False and config.loss.mse == 0.5
        assert config.initial is None

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("optimiser.learning_rate=-1", "optimiser.learning_rate: expected a number greater than or equal to 0"),
            ("optimiser.learning_rate=fast", "optimiser.learning_rate: expected a valid number.*'fast'"),
            ("optimiser.learning_rate=true", "optimiser.learning_rate: expected a number, got True"),
            ("optimiser.learning_rate=.nan", "optimiser.learning_rate: expected a finite number"),
            ("optimiser.lerning_rate=1", "optimiser: unknown setting lerning_rate; there are .*learning_rate"),
            ("run.total_images=2.5", "run.total_images: expected a valid integer.*2.5"),
            ("run.total_images=0", "run.total_images: expected a number greater than 0, got 0"),
            ("run={total_images: 5}", "run.interval_images is missing"),
            ("run.trackers=[paper]", "run.trackers: unknown paper; there are .*tensorboard"),
            ("data=faces.zip", "data: expected a section"),
            ("data.in_memory=perhaps", "data.in_memory: expected 'auto', True or False, got 'perhaps'"),
            ("data.repeats={a: 0}", "data.repeats.a: expected a number greater than 0"),
            ("networks.generator=3", "networks.generator: expected a valid string, got 3"),
            ("architecture=resnet", "architecture: expected 'styletransformer' or 'psp', got 'resnet'"),
            ("encoder.widht=3", "encoder: unknown setting widht; there are .*width"),
            ("encoder.widths=3", "encoder.widths: expected a list, got 3"),
            ("min_truncation=1.5", "min_truncation: expected a number less than or equal to 1"),
            ("nothing.at.all=1", "unknown setting nothing; there are architecture"),
            ("run.total_images", "'run.total_images' is not of the form"),
            ("data.path.x=1", "path is no section of the configuration"),
            ("run.seed=[", "is not valid YAML"),
        ],
    )
    def test_what_does_not_fit_is_said_in_one_line(self, path, override, message):
        with pytest.raises(ValueError, match=message) as caught:
            load_settings(EncoderConfig, path, [override])
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 700

    def test_files_that_hold_no_settings(self, tmp_path):
        path = tmp_path / "x.yaml"
        for text, message in (("- a\n- b", "settings by name"), ("a: [", "not valid YAML"), ("", "data is missing")):
            path.write_text(text)
            with pytest.raises(ValueError, match=message):
                load_settings(GeneratorConfig, path)
        with pytest.raises(FileNotFoundError):
            load_settings(GeneratorConfig, tmp_path / "none.yaml")

    def test_rays_begin_at_the_start(self):
        with pytest.raises(ValueError, match="from 0 images on"):
            GeneratorConfig(data={"path": "x"}, run={"total_images": 1, "interval_images": 1}, rays=[[5, 32]])

    def test_assignments_are_checked_too(self, path):
        config = load_settings(EncoderConfig, path)
        with pytest.raises(ValueError, match="greater than 0"):
            config.run.total_images = 0


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        ("metaaux/configs/mini/generator-continue.yaml", "runs/mini-generator-continue"),
        ("/somewhere/configs/baselines/psp.yaml", "runs/baselines-psp"),
        ("configs/mine.yaml", "runs/mine"),
        ("mine.yaml", "runs/mine"),
        ("configs.yaml", "runs/configs"),
    ],
)
def test_default_run_folder(path, folder):
    assert default_run_folder(path) == Path(folder)


def test_learning_rate_rises_then_falls():
    schedule = ScheduleSettings(warmup_images=100, final_learning_rate=0.1)
    assert learning_rate_factor(0, 1000, schedule) < 0.02
    assert learning_rate_factor(100, 1000, schedule) > 0.95
    assert learning_rate_factor(1000, 1000, schedule) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "path",
    [
        "mini/plain.yaml",
        "mini/meta.yaml",
        "mini/meta-paper.yaml",
        "baselines/plain-without-2d.yaml",
        "baselines/plain-without-3d.yaml",
    ],
)
def test_shipped_auxiliary_configurations_fit_a_network(path):
    config = load_settings(AuxiliaryConfig, CONFIGS / path)
    phase = "meta" if "meta" in path else "plain"
    assert config.phase == phase
    assert config.batch % config.inner.tasks_per_pass == 0
    LossWeights(**config.inner.loss), LossWeights(**config.outer.loss)
    if phase == "plain":
        generator = EG3DGenerator(
            image_size=128,
            plane_resolution=128,
            channel_base=8192,
            channel_max=256,
            neural_resolution=64,
            super_resolution_kind="2X",
        )
        network = AuxiliaryNetwork(**AuxiliaryNetwork.config_for(generator, **config.auxiliary.arguments))
        assert sum(p.numel() for p in network.parameters()) <= 4_000_000
