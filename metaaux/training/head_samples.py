"""Random heads with measured attributes, among which `directions` looks for boundaries."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ..faces.measures import REGIONS
from ..files import atomic_path, write_json
from ..tasks import Generator
from .attributes import Attributes
from .settings import Settings, Share


class SamplingSettings(Settings):
    """The random heads."""

    heads: PositiveInt = 20_000
    """How many."""
    truncation: Share = 0.9
    """Of their codes."""
    max_yaw: NonNegativeFloat = 20.0
    """Degrees to either side from which the yaw that the mapping is conditioned on is drawn, so that the pose's own
    direction is known. All heads are rendered from the front. A 2D generator's heads are turned as their codes have
    it, which landmarks tell."""
    max_pitch: NonNegativeFloat = 12.0
    """Likewise, the pitch."""
    resolution: PositiveInt | None = None
    """Rays a side; null: the generator's."""
    batch: PositiveInt = 64
    """Heads rendered together."""
    shard: PositiveInt = 512
    """Heads saved together."""
    workers: PositiveInt | None = None
    """Processes that look for landmarks; null: one a core, 1 looks in this process."""
    seed: NonNegativeInt = 0
    """Of the codes."""


def frontal_cameras(generator: Generator, count: int) -> torch.Tensor:
    """[count, 25]."""
    return generator.camera_at(0.0, 0.0).to(generator.device).expand(count, -1)


def frontal_views(generator: Generator, ws: torch.Tensor, resolution: int | None) -> torch.Tensor:
    """Heads [B, w_dim] seen from the front, or in the one view that a 2D generator has of them, [B, 3, S, S]."""
    return generator.synthesize(ws, frontal_cameras(generator, len(ws)), resolution=resolution).image


class Samples:
    """Random heads with their attributes, kept in a folder.

    Args:
        folder: of the files.
        generator: makes the heads.
        attributes: measures them.
        settings: see there.
    """

    def __init__(self, folder: Path, generator: Generator, attributes: Attributes, settings: SamplingSettings):
        self.folder, self.generator, self.attributes, self.settings = folder, generator, attributes, settings

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"

    @property
    def shards(self) -> int:
        """Number of files."""
        return -(-self.settings.heads // self.settings.shard)

    def open(self, sources: dict[str, str | None], resume: bool) -> None:
        """Begin, or go on with samples of the same settings and `sources`, the networks' files by name.

        Raises:
            FileExistsError: there are samples and `resume` is off.
            ValueError: they were made with other settings.
        """
        names = ("truncation", "max_yaw", "max_pitch", "resolution", "shard", "seed")
        settings = {name: getattr(self.settings, name) for name in names}
        settings |= sources
        settings["measured"] = [*self.attributes.names, *REGIONS]
        path = self.folder / "settings.json"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(settings, path)
            return
        if not resume:
            raise FileExistsError(
                f"{self.folder} holds samples of an earlier run: resume it, or choose another folder"
            )
        earlier = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(name for name in settings if earlier.get(name) != settings[name])
        if changed:
            raise ValueError(f"{self.folder} was made with another {', '.join(changed)}; choose another folder")

    @torch.no_grad()
    def render(self, accelerator: Accelerator) -> None:
        """Render and measure this process's part of what is missing, each file from a seed of its own."""
        own = range(accelerator.process_index, self.shards, accelerator.num_processes)
        missing = [index for index in own if not self._path(index).exists()]
        total = len(missing) * self.settings.shard
        with tqdm(total=total, unit="head", disable=not accelerator.is_main_process) as bar:
            for index in missing:
                tensors = self._render_shard(index, bar)
                with atomic_path(self._path(index)) as temporary:
                    save_file(tensors, temporary)

    def _render_shard(self, index: int, bar: tqdm) -> dict[str, torch.Tensor]:
        settings, generator = self.settings, self.generator
        random = torch.Generator().manual_seed(settings.seed * 1_000_003 + index)
        z = torch.randn(settings.shard, generator.config.z_dim, generator=random)
        pose = conditions = None
        if generator.has_viewpoints:
            limits = torch.tensor([settings.max_yaw, settings.max_pitch])
            pose = (torch.rand(settings.shard, 2, generator=random) * 2 - 1) * limits
            conditions = generator.camera_at(*pose.T).to(generator.device)
        ws = generator.mapping(z.to(generator.device), conditions, settings.truncation)[:, 0]
        pending = []
        for part in ws.split(settings.batch):
            pending.append(self.attributes.start(frontal_views(generator, part, settings.resolution)))
            bar.update(len(part))
        measured = (torch.cat(parts) for parts in zip(*(wait() for wait in pending), strict=True))
        values, colours, found = (part.contiguous() for part in measured)
        return {
            "w": ws.float().cpu().contiguous(),
            "pose": found if pose is None else pose,
            "values": values,
            "colours": colours,
        }

    def load(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Codes [N, w_dim], poses [N, 2] in degrees, which no code need know, attributes [N, attributes] and colours
        [N, 6] (`attributes.Measured`), float64; not-a-numbers where no face was found."""
        shards = [load_file(self._path(index)) for index in range(self.shards)]
        joined = (torch.cat([shard[key] for shard in shards]) for key in ("w", "pose", "values", "colours"))
        return tuple(tensor[: self.settings.heads].double().numpy() for tensor in joined)
