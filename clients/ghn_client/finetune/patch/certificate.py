"""What was checked about a patch, in numbers, and the check itself."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch
from torch import nn

from ghn_client.finetune.patch.capacity import three_layer_neurons, two_layer_neurons
from ghn_client.finetune.side_network import ClosedFormSideNetwork


@dataclass(frozen=True)
class PatchCertificate:
    """The evidence that a patch does what it promises, measured on the finished network.

    Attributes:
        num_changed: Samples N whose label was asked for.
        num_kept: Samples K - N whose label had to stay.
        changed_right: How many of the N now have the wanted label.
        kept_same: How many of the K - N have the label they had.
        smallest_margin: Least logit margin of a wanted label over all others.
        kept_largest_change: Largest change of any logit of a kept sample.
        neurons: Hidden neurons used.
        neuron_bound: What the construction may use at most; see ``capacity.py``.
        depth: Layers of weights, 2 or 3.
        precision: ``float32`` or ``float64``: in which the side network computes.
        construction: ``shared`` direction or ``own`` directions.
        touched: Share of held-out inputs whose logits change at all; ``None`` without held-out inputs.
        relabelled: Share of held-out inputs whose label changes.
    """

    num_changed: int
    num_kept: int
    changed_right: int
    kept_same: int
    smallest_margin: float
    kept_largest_change: float
    neurons: int
    neuron_bound: int
    depth: int
    precision: str
    construction: str
    touched: float | None = None
    relabelled: float | None = None

    @property
    def holds(self) -> bool:
        """All N changed, all others kept, within the bound."""
        right = self.changed_right == self.num_changed and self.kept_same == self.num_kept
        return right and self.neurons <= self.neuron_bound

    def to_json(self) -> str:
        """All fields and ``holds``."""
        return json.dumps({**asdict(self), "holds": self.holds})

    def __str__(self) -> str:
        lines = [
            f"changed {self.changed_right} of {self.num_changed}, kept {self.kept_same} of {self.num_kept}",
            f"{self.neurons} neurons (bound {self.neuron_bound}), {self.depth} layers, {self.construction} direction",
            f"{self.precision}: margin {self.smallest_margin:.3g}, kept logits move {self.kept_largest_change:.1e}",
        ]
        if self.touched is not None:
            lines.append(f"held-out inputs: {self.touched:.2%} touched, {self.relabelled:.2%} relabelled")
        return "\n".join(lines)


def certify(
    logits: torch.Tensor, added: torch.Tensor, wanted: torch.Tensor, side: ClosedFormSideNetwork, construction: str
) -> PatchCertificate:
    """Counts what ``logits + added`` gets right; the samples to change come first.

    Args:
        logits: (K, C) of the frozen network.
        added: (K, C) of the side network.
        wanted: (N,) labels of the samples to change.
        side: The side network.
        construction: ``shared`` or ``own``.
    """
    count, total = len(wanted), logits + added
    kept, before = total[count:], logits[count:]
    if side.depth == 2:
        bound = two_layer_neurons(count, len(logits))
    else:
        bound = sum(three_layer_neurons(number) for number in torch.bincount(wanted).tolist())
    return PatchCertificate(
        num_changed=count,
        num_kept=len(kept),
        changed_right=int((label_margins(total[:count], wanted) > 0).sum()),
        kept_same=int((kept.argmax(1) == before.argmax(1)).sum()),
        smallest_margin=float(label_margins(total[:count], wanted).min()),
        kept_largest_change=float((kept - before).abs().max()) if len(kept) else 0.0,
        neurons=side.neurons,
        neuron_bound=bound,
        depth=side.depth,
        precision=str(side.center.dtype).removeprefix("torch."),
        construction=construction,
    )


def label_margins(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logit of the label minus the largest other logit, (B,), of logits (B, C) with at least two classes."""
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return logits.gather(1, labels[:, None])[:, 0] - others.max(dim=1).values


@torch.no_grad()
def run_in_batches(module: nn.Module, inputs: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Outputs of ``module`` for all ``inputs``, ``batch_size`` at a time."""
    return torch.cat([module(chunk) for chunk in torch.split(inputs, batch_size)])
