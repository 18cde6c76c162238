"""Networks and data that a run starts from."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from accelerate.tracking import get_available_trackers
from torch import nn

from ..data.dataset import FaceDataset
from ..data.sampler import FaceSampler
from ..hub.loading import load_component
from ..losses import InversionLoss
from ..models.eg3d import EG3DGenerator
from ..models.encoder import LatentEncoder
from ..models.identity import IdentityNetwork
from ..models.perceptual import LPIPS
from ..models.recogniser import FaceRecogniser
from ..models.stylegan2 import StyleGAN2Generator
from ..tasks import Generator, Tasks, make_tasks
from .settings import DataSettings

Network = TypeVar("Network", bound=nn.Module)

#: In a run's folder: a link to the newest checkpoint or, where links cannot be made, a text file with its name.
LATEST = "latest"


def find_folder(path: str | os.PathLike) -> Path:
    """`path` itself, or where it leads if a part of it is a run's `latest` in the form of a text file."""
    found = Path()
    for part in Path(path).parts:
        found = found / part
        if part == LATEST and found.is_file():
            found = found.parent / found.read_text(encoding="utf-8").strip()
    return found


def load_network(cls: type[Network] | tuple[type[Network], ...], path: str | os.PathLike) -> Network:
    """A network in float32, in eval mode and frozen, from its folder: safetensors only, and never from the Hub.

    Args:
        cls: its class, or several of which the folder's configuration names one.
        path: the folder.

    Raises:
        FileNotFoundError, OSError, ValueError: as `hub.loading.load_component`.
    """
    return load_component(cls, find_folder(path))


def load_generator(path: str | os.PathLike) -> Generator:
    """EG3D's or, for the 2D variant (Sec. 4.5), StyleGAN2's; otherwise as `load_network`."""
    return load_network((EG3DGenerator, StyleGAN2Generator), path)


def compile_frozen(generator: Generator) -> None:
    """Fuse the passes of its convolutions and of its samples' colours, which have no second derivatives then."""
    modules = [generator.backbone]
    if generator.has_viewpoints:
        modules.append(generator.super_resolution)
        generator.shade = torch.compile(generator.shade, dynamic=False)
    for module in modules:
        # There are few sizes of batches: those of a step, with gradients and without.
        module.compile(dynamic=False)


def load_identity(path: str | os.PathLike) -> IdentityNetwork | FaceRecogniser:
    """R of Eq. 11 of either kind; otherwise as `load_network`."""
    return load_network((IdentityNetwork, FaceRecogniser), path)


def load_perceptual(path: str | os.PathLike) -> LPIPS:
    """A perceptual distance: an `LPIPS` folder, or a safetensors file of SqueezeNet 1.1 features with folded
    normalisation."""
    path = find_folder(path)
    return load_component(LPIPS, path) if path.is_dir() else LPIPS.from_features_file(path)


@dataclass
class FrozenNetworks:
    """What the auxiliary network is trained against; nothing here is trained.

    Attributes:
        generator: the generator G.
        encoder: gives the codes, which stay fixed.
        inner_loss: Eq. 8 as inference has it.
        outer_loss: of the objective.
    """

    generator: Generator
    encoder: LatentEncoder
    inner_loss: InversionLoss
    outer_loss: InversionLoss

    def tasks(self, image: torch.Tensor, camera: torch.Tensor) -> Tasks:
        """Photos [B, 3, S, S] seen by cameras [B, 25] as a task each."""
        return make_tasks(self.generator, self.encoder, image, camera, self.inner_loss.identity)


def make_sampler(data: DataSettings, dataset: FaceDataset, batch: int, device: torch.device, seed: int) -> FaceSampler:
    """Endless batches of `batch` photos of `dataset`, as the settings say."""
    return FaceSampler(
        dataset,
        batch,
        device,
        seed,
        mirror=data.mirror,
        balance_turned=data.balance_turned,
        in_memory=data.in_memory,
        workers=data.workers,
        repeats=data.repeats,
    )


def sample_cameras(generator: Generator, sampler: FaceSampler, count: int) -> torch.Tensor:
    """Cameras [count, 25] for pictures that the generator makes: those of random photos.

    A 2D generator decides its heads' poses itself and tells nobody: its pictures get the frontal camera, the mean of
    all that they may be, by which identity networks that need a camera cut out the face.
    """
    if generator.has_viewpoints:
        return sampler.sample_cameras(count)
    return generator.camera_at(0.0, 0.0).to(sampler.device).expand(count, -1)


def check_packages(modules: Iterable[str] = (), trackers: Iterable[str] = ()) -> None:
    """That what a run needs later is there before it starts.

    Raises:
        ValueError: importable `modules`, or packages of accelerate's `trackers`, are missing.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    available = {str(tracker.value) for tracker in get_available_trackers()}
    missing += [name for name in trackers if name not in available]
    if missing:
        raise ValueError(
            f"training needs {', '.join(missing)}: install metaaux[train] (or what requirements-dev.txt lists)"
            + ("; run.trackers: [] does without trackers" if set(missing) & set(trackers) else "")
        )
