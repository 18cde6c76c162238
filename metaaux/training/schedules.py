"""What follows the number of images shown: learning rates, weights of losses, averages. Never a clock: each process
has its own."""

from __future__ import annotations

import math

import torch

from .settings import AverageSettings, ScheduleSettings


# diffusers' get_scheduler counts steps instead of images, and its cosine always ends at 0.
def learning_rate_factor(images: int, total_images: int, settings: ScheduleSettings) -> float:
    """Share of the peak after `images` of `total_images`: linear from 0 to 1 over the warm-up, then half a cosine to
    `final_learning_rate`."""
    warmup, final = settings.warmup_images, settings.final_learning_rate
    if images < warmup:
        return (images + 1) / (warmup + 1)
    progress = min((images - warmup) / max(total_images - warmup, 1), 1.0)
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def faded(images: int, start: float, end: float, length: int, delay: int = 0) -> float:
    """A setting that goes linearly from `start` to `end` over `length` images, after `delay` images."""
    return start + (end - start) * min(max((images - delay) / max(length, 1), 0.0), 1.0)


def average_decay(images: int, step_images: int, settings: AverageSettings) -> float:
    """Share of the moving average that stays in a step which shows `step_images` after `images`."""
    half_life = min(settings.half_life_images, settings.rampup * (images + step_images))
    return 0.5 ** (step_images / half_life)


# diffusers' EMAModel averages no buffers (w's average, statistics of batch normalisation), and its decay is a function
# of steps.
@torch.no_grad()
def update_average(average: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """Exponential moving average: `average` ← decay·average + (1 - decay)·model; buffers are copied."""
    targets = list(average.parameters())
    torch._foreach_lerp_(targets, [p.to(t.dtype) for p, t in zip(model.parameters(), targets, strict=True)], 1 - decay)
    for target, buffer in zip(average.buffers(), model.buffers(), strict=True):
        target.copy_(buffer)
