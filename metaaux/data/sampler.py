"""Endless random batches of faces with cameras."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch

from ..cameras import mirror_camera, pose_of_camera
from .dataset import FaceDataset, to_signed
from .memory import default_workers, free_memory, place_for


class _EndlessSampler(torch.utils.data.Sampler):
    """Indices drawn from `order` with replacement, for ever, from the `start`-th on.

    Drawn in blocks, each from a seed of its own, so that a resumed run need not draw all that were before.
    """

    BLOCK = 4096

    def __init__(self, order: torch.Tensor, seed: int, start: int = 0):
        self.order, self.seed, self.start = order, seed, start

    def __iter__(self) -> Iterator[int]:
        block, skipped = divmod(self.start, self.BLOCK)
        while True:
            random = torch.Generator().manual_seed(self.seed * 1_000_003 + block)
            chosen = torch.randint(len(self.order), (self.BLOCK,), generator=random)
            yield from self.order[chosen[skipped:]].tolist()
            block, skipped = block + 1, 0


class FaceSampler:
    """Endless random batches (image [B, 3, S, S] in [-1, 1], camera [B, 25]) on `device`.

    Args:
        dataset: the pictures.
        batch: pictures a batch (of this process).
        device: where the batches go.
        seed: of the order; give each process another.
        mirror: mirror half of them, picture and camera together.
        balance_turned: show those turned beyond 12° twice and beyond 20° four times as often.
        in_memory: True keeps all decoded pictures on `device` (11,847 of 128² take 0.6 GB, 70,000 of 512² 55 GB); with
            False worker processes decode them as they are asked for, and no more are held than are about to be shown.
            "auto" keeps them where they take no more than `memory.MEMORY_SHARE` of what is free: on `device`, else in
            the host's memory, else nowhere.
        workers: of these; 0 decodes in this process. Default: `memory.default_workers`.
        repeats: {source: times} by which pictures of a source, as their attributes name it, are shown more often.

    Raises:
        ValueError: `repeats` names a source that no picture has, or `in_memory` is True and memory does not suffice.
    """

    def __init__(
        self,
        dataset: FaceDataset,
        batch: int,
        device: torch.device | str,
        seed: int = 0,
        mirror: bool = True,
        balance_turned: bool = True,
        in_memory: bool | Literal["auto"] = "auto",
        workers: int | None = None,
        repeats: Mapping[str, int] | None = None,
    ):
        self.dataset, self.batch, self.device, self.mirror = dataset, batch, torch.device(device), mirror
        self.seed, self.workers = seed, default_workers() if workers is None else workers
        self.generator = torch.Generator(self.device).manual_seed(seed)
        counts = torch.ones(len(dataset), dtype=torch.long)
        if balance_turned:
            yaw = pose_of_camera(dataset.cameras)[0].abs()
            counts[yaw > 12] = 2
            counts[yaw > 20] = 4
        sources = [attributes.get("source") for attributes in dataset.attributes]
        for source, times in (repeats or {}).items():
            if source not in sources:
                known = ", ".join(sorted({name for name in sources if name})) or "none, for want of attributes.json"
                raise ValueError(f"repeats names the source {source!r}; those of the data set are {known}")
            counts[torch.tensor([name == source for name in sources])] *= times
        self.order = torch.repeat_interleave(torch.arange(len(dataset)), counts).to(self.device)
        self.cameras = dataset.cameras.to(self.device)
        self.batches_streamed = 0
        place = self._place(in_memory)
        self.images = None if place is None else dataset.load(place)
        self.loader = None

    def _place(self, in_memory: bool | Literal["auto"]) -> torch.device | None:
        """Where decoded pictures are kept; `None` where they are streamed."""
        size = self.dataset.decoded_bytes
        if in_memory == "auto":
            return place_for(size, self.device)
        if in_memory and size > (free := free_memory(self.device)):
            raise ValueError(
                f"{len(self.dataset)} decoded pictures of {self.dataset.image_size}² take {size / 1e9:.1f} GB, of "
                f"which {free / 1e9:.1f} GB are free on {self.device}: let them be streamed (in_memory auto or false)"
            )
        return self.device if in_memory else None

    def _stream(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches decoded by workers, from the next one on."""
        loader = torch.utils.data.DataLoader(
            self.dataset,
            self.batch,
            sampler=_EndlessSampler(self.order.cpu(), self.seed, self.batches_streamed * self.batch),
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            # The workers' seeds are taken from here, not from the training's random numbers.
            generator=torch.Generator().manual_seed(self.seed),
        )
        return iter(loader)

    def state(self) -> dict[str, torch.Tensor]:
        """Where this sampler is, for `set_state` of one with the same pictures, batch and seed."""
        return {
            "generator": self.generator.get_state(),
            "seed": torch.tensor(self.seed),
            "batches_streamed": torch.tensor(self.batches_streamed),
        }

    def set_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on where a sampler was that gave this `state`."""
        self.generator.set_state(state["generator"])
        self.seed, self.batches_streamed = int(state["seed"]), int(state["batches_streamed"])
        self.loader = None

    def sample_cameras(self, count: int) -> torch.Tensor:
        """Cameras of random pictures [count, 25], half of them mirrored where pictures are."""
        return self._mirrored(None, self.cameras[self._draw(count)])[1]

    def _draw(self, count: int) -> torch.Tensor:
        return self.order[torch.randint(len(self.order), (count,), generator=self.generator, device=self.device)]

    def _mirrored(self, images, cameras):
        if not self.mirror:
            return images, cameras
        flip = torch.rand(len(cameras), generator=self.generator, device=self.device) < 0.5
        if images is not None:
            images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        return images, torch.where(flip[:, None], mirror_camera(cameras), cameras)

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next batch."""
        if self.images is not None:
            index = self._draw(self.batch)
            images = self.images[index.to(self.images.device)].to(self.device)
            cameras = self.cameras[index]
        else:
            if self.loader is None:
                self.loader = self._stream()
            images, cameras = (t.to(self.device, non_blocking=True) for t in next(self.loader))
            self.batches_streamed += 1
        images, cameras = self._mirrored(images, cameras)
        return to_signed(images), cameras
