"""One training step: predict a meta-batch, train through the target networks, gather the hypernetwork's gradient."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ghn_service.hypernetwork.features import collate
from ghn_service.hypernetwork.ghn import GraphHyperNetwork
from ghn_service.training.augmentation import Batches
from ghn_service.training.objective import LossAndGradient, measure
from ghn_service.training.sampling import TargetNetwork
from ghn_service.training.settings import ObjectiveSettings

logger = logging.getLogger(__name__)


@dataclass
class StepOutcome:
    """What happened in one step, in this process.

    Attributes:
        losses: Classification loss per network that counted.
        accuracies: Training accuracy per network that counted.
        not_finite: Numbers of the networks left out because loss or gradient was NaN or infinite.
        out_of_memory: Numbers of the networks left out for lack of memory.
    """

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    not_finite: list[int] = field(default_factory=list)
    out_of_memory: list[int] = field(default_factory=list)


def slot_generator(*parts: int) -> torch.Generator:
    """A generator of its own for (seed, attempt, step, slot), so that no draw depends on any other."""
    return torch.Generator().manual_seed(random.Random("/".join(map(str, parts))).getrandbits(62))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)


def accumulate_gradients(
    hypernetwork: GraphHyperNetwork,
    networks: Sequence[tuple[int, TargetNetwork]],
    batches: Batches,
    settings: ObjectiveSettings,
    *,
    seeds: tuple[int, ...],
    batches_per_network: int,
    meta_batch: int,
    precision: torch.dtype,
) -> StepOutcome:
    """Adds this process' part of the meta-batch gradient to ``hypernetwork``.

    Args:
        hypernetwork: Gets the gradients.
        networks: (slot in the whole meta-batch, network) of this process.
        batches: Source of images; a slot's images depend on ``seeds`` and the slot alone.
        settings: The loss.
        seeds: Seed, attempt and step.
        batches_per_network: Batches per network.
        meta_batch: Networks of the whole meta-batch; each counts ``1 / meta_batch``.
        precision: Number format of the target networks' passes.
    """
    outcome = StepOutcome()
    if not networks:
        return outcome
    device = hypernetwork.device
    batch = collate([network.features for _, network in networks]).to(device)
    predictions = hypernetwork(batch, seed=seeds[-1])
    outputs: list[Tensor] = []
    gradients: list[Tensor] = []
    for (slot, network), predicted in zip(networks, predictions, strict=True):
        torch.manual_seed(slot_generator(*seeds, slot, 1).initial_seed())  # dropout inside target networks
        generator = slot_generator(*seeds, slot)
        examples = [batches.draw(generator=generator) for _ in range(batches_per_network)]
        result = _measure(network, predicted, examples, settings, precision, outcome)
        if result is not None:
            outputs.extend(predicted.values())
            gradients.extend(gradient / meta_batch for gradient in result.gradients.values())
    if outputs:
        torch.autograd.backward(outputs, gradients)
    return outcome


def _measure(
    network: TargetNetwork,
    predicted: dict[str, Tensor],
    examples: list[tuple[Tensor, Tensor]],
    settings: ObjectiveSettings,
    precision: torch.dtype,
    outcome: StepOutcome,
) -> LossAndGradient | None:
    """The network's loss and gradient; ``None`` (and a note in ``outcome``) where it has to be left out."""
    try:
        result = measure(network.module, predicted, network.constants, examples, settings, precision=precision)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        logger.warning("network %d does not fit into memory; left out", network.index)
        outcome.out_of_memory.append(network.index)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None
    if not result.is_finite:
        logger.warning("network %d gives a loss or gradient that is not finite; left out", network.index)
        outcome.not_finite.append(network.index)
        return None
    outcome.losses.append(result.loss)
    outcome.accuracies.append(result.accuracy)
    return result
