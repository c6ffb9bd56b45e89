"""The loss of one predicted network on one batch of images, and the gradient with respect to its weights.

The target network's passes are separate from the hypernetwork's: the predicted tensors enter as leaves, and their
gradients are handed to the hypernetwork afterwards in one backward pass for the whole meta-batch. So a network that
fails can be left out, memory holds one target network at a time, and several batches share one prediction.

Reference: Knyazev et al. 2021 (arXiv:2110.13100), equation 2; Knyazev et al. 2023 (arXiv:2303.04143), section 4
(penalty on predicted parameters).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ghn_service.training.passes import target_passes
from ghn_service.training.settings import ObjectiveSettings


@dataclass(frozen=True, eq=False)
class LossAndGradient:
    """Result of one target network.

    Attributes:
        loss: Classification loss, without the penalty.
        accuracy: Share of the images classified right.
        gradients: Gradient per predicted tensor; zeros for one that the network does not use.
    """

    loss: float
    accuracy: float
    gradients: dict[str, Tensor]

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradients are free of NaN and infinity."""
        total = sum((gradient.sum() for gradient in self.gradients.values()), torch.tensor(self.loss))
        return bool(torch.isfinite(total))


def measure(
    module: nn.Module,
    predicted: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
    settings: ObjectiveSettings,
    *,
    precision: torch.dtype = torch.float32,
) -> LossAndGradient:
    """Loss of a network with predicted weights, and its gradient with respect to them, averaged over batches.

    Args:
        module: Target network in training mode.
        predicted: Predicted tensors by name; they are not changed, and no gradient flows into them here.
        constants: The other parameters and buffers that the network needs, by name.
        batches: Images (B, C, H, W) and labels (B,).
        settings: The loss.
        precision: Number format of the network's passes (autocast).
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
