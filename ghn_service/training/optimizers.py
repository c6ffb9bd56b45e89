"""Optimizers of the hypernetwork, and the moving average of its weights.

Muon (Jordan et al. 2024) orthogonalises the momentum of each matrix; embeddings, vectors and output layers stay with
AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ghn_service.training.muon import Muon
from ghn_service.training.settings import OptimizerSettings


class OptimizerGroup:
    """The optimizers of one hypernetwork, stepped together.

    Args:
        hypernetwork: What to train.
        settings: Update rule and rates.
    """

    def __init__(self, hypernetwork: nn.Module, settings: OptimizerSettings) -> None:
        adam_groups, muon_matrices = _groups(hypernetwork, settings)
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(adam_groups, lr=settings.learning_rate, betas=settings.betas, fused=True)
        ]
        if muon_matrices:
            self.optimizers.append(
                Muon(muon_matrices, lr=settings.muon_learning_rate, weight_decay=settings.weight_decay)
            )
        self._base_rates = [[float(group["lr"]) for group in item.param_groups] for item in self.optimizers]

    def step(self, factor: float) -> None:
        """One update with all learning rates multiplied by ``factor``."""
        for optimizer, rates in zip(self.optimizers, self._base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.step()

    def zero_grad(self) -> None:
        """Forgets all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dicts(self) -> list[dict[str, Any]]:
        """State of each optimizer."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dicts(self, states: list[dict[str, Any]]) -> None:
        """Restores what ``state_dicts`` gave."""
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def _groups(hypernetwork: nn.Module, settings: OptimizerSettings) -> tuple[list[dict[str, Any]], list[nn.Parameter]]:
    """Parameter groups of AdamW (decoder or not, decayed or not), and the matrices of Muon."""
    embeddings = {id(item.weight) for item in hypernetwork.modules() if isinstance(item, nn.Embedding)}
    adam: dict[tuple[bool, bool], list[nn.Parameter]] = {}
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
    return groups, muon


class MovingAverage:
    """Exponential moving average of a module's floating-point state.

    Args:
        module: What to average.
        decay: Decay per step.
        every: Steps between updates.
    """

    def __init__(self, module: nn.Module, decay: float, every: int) -> None:
        self.decay = decay**every
        self.every = every
        self.tensors = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Takes the module's present state into the average if it is time; early steps count more."""
        if step % self.every:
            return
        updates = step // self.every
        weight = 1.0 - min(self.decay, (1.0 + updates) / (10.0 + updates))
        current = module.state_dict()
        names = [name for name, tensor in self.tensors.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self.tensors[name] for name in names], [current[name] for name in names], weight)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Replaces the average."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
