"""Learning-rate schedules over the progress of a run, from 0 to 1."""

from __future__ import annotations

import math

from ghn_service.training.settings import OptimizerSettings, SamplingSettings


def rate_factor(progress: float, settings: OptimizerSettings) -> float:
    """Factor on the learning rate at a progress between 0 and 1: warm-up, then cosine or trapezoid, ending at 0."""
    if settings.warmup and progress < settings.warmup:
        return max(progress / settings.warmup, 0.01)
    if settings.schedule == "cosine":
        done = (progress - settings.warmup) / (1.0 - settings.warmup)
        return 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
    return min(1.0, max(0.0, 1.0 - progress) / settings.cooldown)


def largest_macs(progress: float, settings: SamplingSettings) -> float:
    """Multiply-adds of the largest target network at a progress: grows geometrically from small to large networks."""
    if settings.growth == 0 or progress >= settings.growth:
        return settings.largest_macs
    share = progress / settings.growth
    return float(settings.start_macs ** (1.0 - share) * settings.largest_macs**share)
