"""One training step: predict a meta-batch, train through the target networks, gather the hypernetwork's gradient.

The target networks' passes are separate from the hypernetwork's: predicted tensors enter as leaves, and their gradients
are handed to the hypernetwork afterwards in one backward pass for the whole meta-batch. So a network that fails can be
left out, memory holds one target network at a time, and several batches share one prediction.

Reference: Knyazev et al. 2021 (arXiv:2110.13100), equation 2; Knyazev et al. 2023 (arXiv:2303.04143), section 4
(penalty on predicted parameters).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from ghn_service.errors import is_out_of_memory
from ghn_service.hypernetwork.features import collate
from ghn_service.hypernetwork.ghn import GraphHyperNetwork
from ghn_service.training.images import Batches
from ghn_service.training.networks import PreparedNetwork
from ghn_service.training.precision import target_passes
from ghn_service.training.settings import ObjectiveSettings, TrainingSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LossAndGradient:
    """Loss (without the penalty), accuracy, and gradient per predicted tensor; zeros for one that is not used."""

    loss: float
    accuracy: float
    gradients: dict[str, Tensor]

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradients are free of NaN and infinity."""
        total = sum((gradient.sum() for gradient in self.gradients.values()), torch.tensor(self.loss))
        return bool(torch.isfinite(total))


def measure_loss(
    module: nn.Module,
    predicted: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
    settings: ObjectiveSettings,
    *,
    precision: torch.dtype = torch.float32,
) -> LossAndGradient:
    """Loss of a network with predicted weights, and its gradient with respect to them, averaged over batches.

    ``constants`` are the other parameters and buffers of the network, which is in training mode; ``batches`` are pairs
    of images (B, C, H, W) and labels (B,). No gradient flows into ``predicted`` here.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in predicted.items()}
    sums = {name: torch.zeros_like(tensor) for name, tensor in leaves.items()} if len(batches) > 1 else {}
    loss_sum = accuracy_sum = 0.0
    gradients: dict[str, Tensor] = {}
    for images, labels in batches:
        with target_passes(images.device, precision):
            logits = torch.func.functional_call(module, {**constants, **leaves}, (images,))
        logits = logits.float()
        loss = functional.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        gradients = {
            name: torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
        }
        for name, total in sums.items():
            total.add_(gradients[name], alpha=1.0 / len(batches))
        loss_sum += loss.item() / len(batches)
        accuracy_sum += (logits.argmax(1) == labels).float().mean().item() / len(batches)
    gradients = sums or gradients
    if settings.penalty:
        add_penalty_gradient(gradients, predicted, settings.penalty)
    return LossAndGradient(loss_sum, accuracy_sum, gradients)


@torch.no_grad()
def add_penalty_gradient(gradients: dict[str, Tensor], predicted: Mapping[str, Tensor], weight: float) -> None:
    """Adds the gradient of ``weight * sum of Frobenius norms`` of the predicted tensors, in place."""
    names = list(predicted)
    norms = torch._foreach_norm([predicted[name].detach() for name in names])
    scales = (weight / torch.stack(norms).clamp_min(1e-12)).tolist()
    for name, scale in zip(names, scales, strict=True):
        gradients[name].add_(predicted[name].detach(), alpha=scale)


@dataclass
class StepOutcome:
    """What happened in one step, in this process: results of the networks that counted, numbers of those left out."""

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    not_finite: list[int] = field(default_factory=list)
    out_of_memory: list[int] = field(default_factory=list)


def slot_generator(*parts: int) -> torch.Generator:
    """A generator of its own for (seed, attempt, step, slot), so that no draw depends on any other."""
    return torch.Generator().manual_seed(random.Random("/".join(map(str, parts))).getrandbits(62))


def accumulate_gradients(
    hypernetwork: GraphHyperNetwork,
    networks: Sequence[tuple[int, PreparedNetwork]],
    batches: Batches,
    settings: TrainingSettings,
    *,
    seeds: tuple[int, int, int],
    precision: torch.dtype,
) -> StepOutcome:
    """Adds this process' part of the meta-batch gradient to ``hypernetwork``.

    Args:
        hypernetwork: Gets the gradients.
        networks: (slot in the whole meta-batch, network) of this process; each counts ``1 / meta_batch``.
        batches: Source of images; a slot's images depend on ``seeds`` and the slot alone.
        settings: Batches per network, size of the meta-batch, and the loss.
        seeds: Seed, attempt and step.
        precision: Number format of the target networks' passes.
    """
    outcome = StepOutcome()
    if not networks:
        return outcome
    batch = collate([network.features for _, network in networks]).to(hypernetwork.device)
    predictions = hypernetwork(batch, seed=seeds[-1])
    outputs: list[Tensor] = []
    gradients: list[Tensor] = []
    for (slot, network), predicted in zip(networks, predictions, strict=True):
        torch.manual_seed(slot_generator(*seeds, slot, 1).initial_seed())  # dropout inside target networks
        generator = slot_generator(*seeds, slot)
        examples = [batches.draw(generator=generator) for _ in range(settings.data.batches_per_network)]
        try:
            result = measure_loss(
                network.module, predicted, network.constants, examples, settings.objective, precision=precision
            )
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("network %d does not fit into memory; left out", network.index)
            outcome.out_of_memory.append(network.index)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        if not result.is_finite:
            logger.warning("network %d gives a loss or gradient that is not finite; left out", network.index)
            outcome.not_finite.append(network.index)
            continue
        outcome.losses.append(result.loss)
        outcome.accuracies.append(result.accuracy)
        outputs.extend(predicted.values())
        gradients.extend(gradient / settings.sampling.meta_batch for gradient in result.gradients.values())
    if outputs:
        torch.autograd.backward(outputs, gradients)
    return outcome
