"""Optimizers of the hypernetwork, their schedule, and the moving average of its weights.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) orthogonalises the momentum of each matrix;
embeddings and vectors stay with AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ghn_service.training.settings import OptimizerSettings


class OptimizerGroup:
    """The optimizers of one hypernetwork, stepped together."""

    def __init__(self, hypernetwork: nn.Module, settings: OptimizerSettings) -> None:
        embeddings = {id(item.weight) for item in hypernetwork.modules() if isinstance(item, nn.Embedding)}
        adam: dict[tuple[bool, bool], list[nn.Parameter]] = {}  # by whether in the decoder, and whether a matrix
        muon: list[nn.Parameter] = []
        for name, parameter in hypernetwork.named_parameters():
            is_matrix = parameter.ndim == 2 and id(parameter) not in embeddings
            if settings.name == "muon" and is_matrix and min(parameter.shape) <= settings.muon_largest_side:
                muon.append(parameter)
            else:
                adam.setdefault((name.startswith("decoder"), is_matrix), []).append(parameter)
        groups = [
            {
                "params": parameters,
                "lr": settings.learning_rate * (settings.decoder_scale if in_decoder else 1.0),
                "weight_decay": settings.weight_decay if is_matrix else 0.0,
            }
            for (in_decoder, is_matrix), parameters in adam.items()
        ]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)
        ]
        if muon:
            self.optimizers.append(
                torch.optim.Muon(
                    muon,
                    lr=settings.muon_learning_rate,
                    weight_decay=settings.weight_decay,
                    adjust_lr_fn="original",  # the square root of rows per column, at least 1
                )
            )
        self._base_rates = [[float(group["lr"]) for group in item.param_groups] for item in self.optimizers]

    def step(self, factor: float) -> None:
        """One update with all learning rates multiplied by ``factor``."""
        for optimizer, rates in zip(self.optimizers, self._base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.step()

    def state_dicts(self) -> list[dict[str, Any]]:
        """State of each optimizer."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dicts(self, states: list[dict[str, Any]]) -> None:
        """Restores what ``state_dicts`` gave."""
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def moving_average(hypernetwork: nn.Module, settings: OptimizerSettings) -> AveragedModel:
    """The exponential moving average of the weights, to be updated every ``ema_every`` steps; early ones count more."""
    decay = settings.ema_decay**settings.ema_every

    @torch.no_grad()
    def follow(averaged: Any, current: Any, updates: Tensor | int) -> None:
        count = int(updates)
        torch._foreach_lerp_(averaged, current, 1.0 - min(decay, (1.0 + count) / (10.0 + count)))

    return AveragedModel(hypernetwork, multi_avg_fn=follow)


def rate_factor(progress: float, settings: OptimizerSettings) -> float:
    """Factor on the learning rate at a progress between 0 and 1: warm-up, then cosine or trapezoid, ending at 0."""
    if settings.warmup and progress < settings.warmup:
        return max(progress / settings.warmup, 0.01)
    if settings.schedule == "cosine":
        done = (progress - settings.warmup) / (1.0 - settings.warmup)
        return 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
    return min(1.0, max(0.0, 1.0 - progress) / settings.cooldown)
