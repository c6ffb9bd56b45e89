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
from collections.abc import Callable, Mapping, Sequence
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
    """Loss (without the penalty) and accuracy as scalar tensors, and the gradient per predicted tensor.

    Nothing here waits for a GPU; a tensor that is not used has a gradient of zeros.
    """

    loss: Tensor
    accuracy: Tensor
    gradients: dict[str, Tensor]

    @property
    def is_finite(self) -> Tensor:
        """Whether loss and gradients are free of NaN and infinity, as a scalar tensor."""
        norms = torch._foreach_norm(list(self.gradients.values()))
        return torch.isfinite(torch.stack([self.loss, *norms]).sum())


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
    losses, accuracies = [], []
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
        losses.append(loss.detach())
        accuracies.append((logits.argmax(1) == labels).float().mean())
    gradients = sums or gradients
    if settings.penalty:
        add_penalty_gradient(gradients, predicted, settings.penalty)
    return LossAndGradient(torch.stack(losses).mean(), torch.stack(accuracies).mean(), gradients)


def record_cuda_graph(run: Callable[[], LossAndGradient]) -> tuple[Callable[[], object], LossAndGradient]:
    """Records what ``run`` does on the GPU; gives what replays it, and the result, which every replay writes anew."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries choose their algorithms and get their memory before anything is recorded
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


class LossRecorder:
    """``measure_loss`` with the launches of each network recorded once and replayed with new weights and images.

    Target networks are small, so that launching their kernels takes longer than running them. What cannot be recorded
    is computed as ever; recordings end when a fifth of the memory of the GPU is left.

    Args:
        record: Records a computation on fixed tensors, as ``record_cuda_graph`` does.
        has_room: Whether there is memory for another recording.
    """

    def __init__(
        self,
        record: Callable[[Callable[[], LossAndGradient]], tuple[Callable[[], object], LossAndGradient]],
        has_room: Callable[[], bool],
    ) -> None:
        self.record, self.has_room = record, has_room
        self._recordings: dict[int, tuple[dict[str, Tensor], Callable[[], object], LossAndGradient] | None] = {}
        self._examples: list[tuple[Tensor, Tensor]] = []

    def __call__(
        self,
        network: PreparedNetwork,
        predicted: Mapping[str, Tensor],
        examples: Sequence[tuple[Tensor, Tensor]],
        settings: ObjectiveSettings,
        *,
        precision: torch.dtype,
    ) -> LossAndGradient:
        """What ``measure_loss`` gives for this network; the tensors hold until the network's next turn."""
        if not self._examples:  # one set for all networks
            self._examples = [(images.clone(), labels.clone()) for images, labels in examples]
        for (images, labels), (new_images, new_labels) in zip(self._examples, examples, strict=True):
            images.copy_(new_images)
            labels.copy_(new_labels)
        if network.index not in self._recordings and self.has_room():
            weights = {name: tensor.detach().clone() for name, tensor in predicted.items()}

            def run() -> LossAndGradient:
                return measure_loss(
                    network.module, weights, network.constants, self._examples, settings, precision=precision
                )

            try:
                self._recordings[network.index] = (weights, *self.record(run))
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                logger.info("network %d is not recorded: %s", network.index, error)
                self._recordings[network.index] = None
        recording = self._recordings.get(network.index)
        if recording is None:
            return measure_loss(network.module, predicted, network.constants, examples, settings, precision=precision)
        weights, replay, result = recording
        with torch.no_grad():
            torch._foreach_copy_([weights[name] for name in predicted], list(predicted.values()))
        replay()
        return result


def make_recorder(device: torch.device) -> LossRecorder | None:
    """A recorder for this device; None where there is nothing to record with."""
    if device.type != "cuda":
        return None

    def has_room() -> bool:
        free, total = torch.cuda.mem_get_info(device)
        return free > total // 5

    return LossRecorder(record_cuda_graph, has_room)


@torch.no_grad()
def add_penalty_gradient(gradients: dict[str, Tensor], predicted: Mapping[str, Tensor], weight: float) -> None:
    """Adds the gradient of ``weight * sum of Frobenius norms`` of the predicted tensors, in place."""
    names = list(predicted)
    norms = torch._foreach_norm([predicted[name].detach() for name in names])
    scales = weight / torch.stack(norms).clamp_min(1e-12)
    for name, scale in zip(names, scales.unbind(), strict=True):
        gradients[name].addcmul_(predicted[name].detach(), scale)


@dataclass
class StepOutcome:
    """What happened in one step, in this process.

    Attributes:
        networks: Numbers of the networks that were run.
        results: Loss, accuracy, and 1 where those and the gradient are finite, for each of them: (3,) on the device.
            Networks that are not finite add no gradient.
        out_of_memory: Numbers of those that did not fit into memory.
    """

    networks: list[int] = field(default_factory=list)
    results: list[Tensor] = field(default_factory=list)
    out_of_memory: list[int] = field(default_factory=list)

    def totals(self, device: torch.device) -> Tensor:
        """Finite networks, the sum of their losses, others, and those out of memory: (4,), without waiting for it."""
        table = torch.stack(self.results) if self.results else torch.zeros(0, 3, device=device)
        is_finite = table[:, 2] > 0
        used, loss = is_finite.sum(), torch.where(is_finite, table[:, 0], 0.0).sum()
        lost = torch.tensor(float(len(self.out_of_memory)), device=device)
        return torch.stack([used.float(), loss, len(table) - used.float(), lost])


def slot_generator(*parts: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for (seed, attempt, step, slot), so that no draw depends on any other."""
    return torch.Generator(device).manual_seed(random.Random("/".join(map(str, parts))).getrandbits(62))


def accumulate_gradients(
    hypernetwork: GraphHyperNetwork,
    networks: Sequence[tuple[int, PreparedNetwork]],
    batches: Batches,
    settings: TrainingSettings,
    *,
    seeds: tuple[int, int, int],
    precision: torch.dtype,
    recorder: LossRecorder | None = None,
) -> StepOutcome:
    """Adds this process' part of the meta-batch gradient to ``hypernetwork``.

    Args:
        hypernetwork: Gets the gradients.
        networks: (slot in the whole meta-batch, network) of this process; each counts ``1 / meta_batch``.
        batches: Source of images; a slot's images depend on ``seeds`` and the slot alone.
        settings: Batches per network, size of the meta-batch, and the loss.
        seeds: Seed, attempt and step.
        precision: Number format of the target networks' passes.
        recorder: Replays the passes of networks that were here before.
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
        generator = slot_generator(*seeds, slot, device=hypernetwork.device)
        examples = [batches.draw(generator=generator) for _ in range(settings.data.batches_per_network)]
        try:
            if recorder is not None:
                result = recorder(network, predicted, examples, settings.objective, precision=precision)
            else:
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
        is_finite = result.is_finite
        outcome.networks.append(network.index)
        outcome.results.append(torch.stack([result.loss, result.accuracy, is_finite.float()]))
        outputs.extend(predicted.values())
        gradients.extend(
            torch.where(is_finite, gradient / settings.sampling.meta_batch, 0.0)
            for gradient in result.gradients.values()
        )
    if outputs:
        torch.autograd.backward(outputs, gradients)
    return outcome
