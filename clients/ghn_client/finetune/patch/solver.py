"""``patch``: a side network in closed form that changes exactly the given labels and leaves all others as they are.

After Sohn, Kwon, An and Lee, "Memorization Capacity for Additive Fine-Tuning with Small ReLU Networks", UAI 2024,
arXiv:2408.00359; the constructions and constants used here are derived by us (``interpolants.py``).
A patch memorises; it does not generalise. ``touched`` in its certificate says how far it reaches beyond the samples.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import nn

from ghn_client.errors import InfeasibleError, InvalidOptionError, UnsupportedModuleError, require_known
from ghn_client.finetune.additive import FEATURES, LOGITS, AdditiveModule, base_head, head_features, run_in_batches
from ghn_client.finetune.patch.capacity import three_layer_neurons, two_layer_neurons
from ghn_client.finetune.patch.interpolants import best_line, own_directions, shared_line, three_layers
from ghn_client.finetune.side_network import ClosedFormSideNetwork

AUTO, SHARED, OWN = "auto", "shared", "own"
#: Logits of kept samples may move by so much of the margin through rounding; more needs a higher precision.
KEPT_TOLERANCE = 0.01
PRECISIONS = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class PatchCertificate:
    """The evidence that a patch does what it promises, measured on the finished network."""

    num_changed: int  # samples N whose label was asked for
    num_kept: int  # samples K - N whose label had to stay
    changed_right: int  # how many of the N now have the wanted label
    kept_same: int  # how many of the K - N have the label they had
    smallest_margin: float  # least logit margin of a wanted label over all others
    kept_largest_change: float  # largest change of any logit of a kept sample
    neurons: int  # hidden neurons used
    neuron_bound: int  # what the construction may use at most; see ``capacity.py``
    depth: int  # layers of weights, 2 or 3
    precision: str  # ``float32`` or ``float64``: in which the side network computes
    construction: str  # ``shared`` direction or ``own`` directions
    # share of held-out inputs whose logits change at all; ``None`` without held-out inputs
    touched: float | None = None
    relabelled: float | None = None  # share of held-out inputs whose label changes

    @property
    def holds(self) -> bool:
        """All N changed, all others kept, within the bound."""
        right = self.changed_right == self.num_changed and self.kept_same == self.num_kept
        return right and self.neurons <= self.neuron_bound

    def __str__(self) -> str:
        lines = [
            f"changed {self.changed_right} of {self.num_changed}, kept {self.kept_same} of {self.num_kept}",
            f"{self.neurons} neurons (bound {self.neuron_bound}), {self.depth} layers, {self.construction} direction",
            f"{self.precision}: margin {self.smallest_margin:.3g}, kept logits move {self.kept_largest_change:.1e}",
        ]
        if self.touched is not None:
            lines.append(f"held-out inputs: {self.touched:.2%} touched, {self.relabelled:.2%} relabelled")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Patch:
    """A finished patch."""

    module: AdditiveModule  # ``base + side``; set ``module.enabled = False`` to take the patch off
    side: ClosedFormSideNetwork  # the side network
    certificate: PatchCertificate  # what was checked


@dataclass(frozen=True, eq=False)
class _Problem:
    """Inputs of the construction: distinct samples, changed ones first."""

    inputs: torch.Tensor  # (K, ...) network inputs, those to change first
    features: torch.Tensor  # (K, D) what the side network reads, in the precision of the network
    logits: torch.Tensor  # (K, C) of the frozen network
    wanted: torch.Tensor  # (N,) labels
    values: torch.Tensor  # (N, C) float64, what g must add


def patch(
    module: nn.Module,
    wrong_inputs: torch.Tensor,
    wanted: torch.Tensor,
    keep_inputs: torch.Tensor,
    *,
    depth: int = 2,
    margin: float = 1.0,
    at: str = LOGITS,
    head: str | None = None,
    directions: str = AUTO,
    precision: str = AUTO,
    reach: float = 0.5,
    held_out_inputs: torch.Tensor | None = None,
    draws: int = 200,
    generator: torch.Generator | None = None,
    batch_size: int = 1024,
) -> Patch:
    """Changes the labels of ``wrong_inputs`` to ``wanted`` and those of ``keep_inputs`` not at all.

    Args:
        module: Network in eval mode that returns logits (B, C); stays as it is.
        wrong_inputs: (N, ...) samples to change.
        wanted: (N,) labels they shall have.
        keep_inputs: (K - N, ...) samples whose label must stay.
        depth: 2: at most ``min(3 N, K - 1)`` neurons. 3: about ``4 sqrt(2 N)`` per output, whatever K is, but steep.
        margin: By how much the logit of a wanted label shall exceed all others.
        at: ``logits``: the side network reads the input. ``features``: it reads what the head reads.
        head: Dotted path of the head for ``at="features"``; default the last linear layer.
        directions: ``own`` (one per sample, flat slopes), ``shared`` (one line for all), or ``auto``: the first of
            them that holds in float32, failing that in float64. Three-layer networks share one line.
        precision: ``float32``, ``float64``, or ``auto`` for the lower one that holds.
        reach: How far, in (0, 1], a bump goes towards the nearest sample; smaller touches fewer unseen inputs and is
            steeper.
        held_out_inputs: Inputs that are neither; the certificate then says what share of them the patch touches.
        draws: Random directions to choose the shared line from.
        generator: Source of the directions; default seed 0.
        batch_size: Samples per forward pass. The check is repeated one by one and in batches.

    Returns:
        The patched module and its certificate.

    Raises:
        InfeasibleError: Two equal samples want different labels, or no construction holds in the asked precision.
        UnsupportedModuleError: The module is in train mode.
        InvalidOptionError: An option or a shape is impossible.
    """
    _check_options(module, depth, margin, at, directions, precision, reach)
    path = base_head(module, head) if at == FEATURES else None
    problem = _prepare(module, wrong_inputs, wanted, keep_inputs, path, margin, batch_size)
    generator = generator or torch.Generator().manual_seed(0)
    sides = _construct(problem, depth, directions, reach, draws, generator)
    failures = []
    for name, (construction, exact) in product(PRECISIONS if precision == AUTO else (precision,), sides.items()):
        side = copy.deepcopy(exact).to(PRECISIONS[name])
        added = run_in_batches(side, problem.features, batch_size)
        certificate = _certify(problem.logits, added, problem.wanted, side, construction)
        patched = AdditiveModule(module, side, head=path).eval()
        moved = certificate.kept_largest_change
        precise = certificate.smallest_margin > 0.5 * margin and moved < KEPT_TOLERANCE * margin
        if certificate.holds and precise and _holds_inside(patched, problem, batch_size):
            if held_out_inputs is not None and len(held_out_inputs):
                touched, relabelled = _effect_on(module, patched, held_out_inputs, batch_size)
                certificate = replace(certificate, touched=touched, relabelled=relabelled)
            return Patch(patched, side, certificate)
        failures.append(f"{construction}/{name}: {str(certificate).replace(chr(10), '; ')}")
    raise InfeasibleError(
        f"no {depth}-layer patch of {len(problem.wanted)} labels holds in {precision}; tried {' | '.join(failures)}."
        " Use precision='float64', depth=2 with directions='own', or at='features'"
    )


def _check_options(
    module: nn.Module, depth: int, margin: float, at: str, directions: str, precision: str, reach: float
) -> None:
    """Refuses unknown options, and modules in train mode."""
    require_known(depth, (2, 3), field="depth")
    require_known(at, (LOGITS, FEATURES), field="at")
    require_known(directions, (AUTO, SHARED, OWN) if depth == 2 else (AUTO, SHARED), field="directions")
    require_known(precision, (AUTO, *PRECISIONS), field="precision")
    if not 0.0 < reach <= 1.0 or margin <= 0.0:
        raise InvalidOptionError(f"expected margin > 0 and reach in (0, 1], got {margin=} and {reach=}")
    if any(child.training for child in module.modules()):
        raise UnsupportedModuleError("patch needs a fixed function: call module.eval() first")


def _prepare(
    module: nn.Module,
    wrong: torch.Tensor,
    wanted: torch.Tensor,
    keep: torch.Tensor,
    head: str | None,
    margin: float,
    batch_size: int,
) -> _Problem:
    """Runs the network on all samples, once for each of equal ones, and says what has to be added."""
    if len(wrong) != len(wanted) or not len(wrong):
        raise InvalidOptionError(
            f"expected one wanted label per wrong input and at least one, got {len(wrong)} inputs"
            f" and {len(wanted)} labels"
        )
    inputs = torch.cat([wrong, keep])
    if head is None:
        features = inputs.flatten(1)
    else:
        features = torch.cat([head_features(module, head, chunk) for chunk in torch.split(inputs, batch_size)])
    first = _distinct(features, wanted, len(wrong))
    inputs, features = inputs[first], features[first]
    labels = wanted.to(features.device)[first[first < len(wrong)]].long()
    logits = run_in_batches(module, inputs, batch_size)
    if logits.dim() != 2 or not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise InvalidOptionError(f"expected logits (B, C) and labels below C, got {tuple(logits.shape)} and {labels}")
    values = torch.zeros(len(labels), logits.shape[1], dtype=torch.float64, device=logits.device)
    missing = margin - _label_margins(logits[: len(labels)].double(), labels)
    values.scatter_(1, labels[:, None], missing.clamp_min(0.0)[:, None])
    return _Problem(inputs, features, logits, labels, values)


def _distinct(features: torch.Tensor, wanted: torch.Tensor, num_wrong: int) -> torch.Tensor:
    """Indices of the first of every set of equal samples, in order; equal ones must want the same."""
    _, group = torch.unique(features, dim=0, return_inverse=True)
    first: dict[int, int] = {}
    for index, key in enumerate(group.tolist()):
        known = first.setdefault(key, index)
        if known == index or known >= num_wrong:
            continue
        if index >= num_wrong:
            raise InfeasibleError(f"wrong input {known} equals keep input {index - num_wrong}; it cannot do both")
        if int(wanted[known]) != int(wanted[index]):
            raise InfeasibleError(
                f"wrong inputs {known} and {index} are equal to the side network but want labels"
                f" {int(wanted[known])} and {int(wanted[index])}"
            )
    return torch.tensor(sorted(first.values()), device=features.device)


def _construct(
    problem: _Problem, depth: int, directions: str, reach: float, draws: int, generator: torch.Generator
) -> dict[str, ClosedFormSideNetwork]:
    """The exact side networks to try, by construction, from the most to the least robust."""
    center = problem.features.double().mean(0)
    centred = problem.features.double() - center
    active = (problem.values != 0).any(dim=1).nonzero()[:, 0]
    changed = active if len(active) else active.new_zeros(1)
    values = problem.values[changed]
    sides = {}
    if depth == 2 and directions in (AUTO, OWN):
        side = own_directions(center, centred, changed, values, reach=reach)
        if side.neurons <= two_layer_neurons(len(problem.wanted), len(centred)) or directions == OWN:
            sides[OWN] = side
    if directions in (AUTO, SHARED):
        line = best_line(center, centred, changed, draws=draws, generator=generator)
        construct = three_layers if depth == 3 and len(active) else shared_line
        sides[SHARED] = construct(line, changed, values, reach=reach)
    return sides


def _holds_inside(patched: nn.Module, problem: _Problem, batch_size: int) -> bool:
    """Runs the whole patched network again in other batches: bumps must survive another order of summation."""
    together = run_in_batches(patched, problem.inputs, max(batch_size // 2, 1)).argmax(1)
    alone = run_in_batches(patched, problem.inputs[: min(len(problem.wanted), 256)], 1).argmax(1)
    expected = torch.cat([problem.wanted, problem.logits[len(problem.wanted) :].argmax(1)])
    return torch.equal(together, expected) and torch.equal(alone, expected[: len(alone)])


def _effect_on(module: nn.Module, patched: nn.Module, inputs: torch.Tensor, batch_size: int) -> tuple[float, float]:
    """Shares of unseen inputs whose logits and whose labels change."""
    before, after = (run_in_batches(network, inputs, batch_size) for network in (module, patched))
    touched = (after - before).abs().max(1).values > 1e-3 * (1.0 + before.abs().max())
    relabelled = after.argmax(1) != before.argmax(1)
    return float(touched.float().mean()), float(relabelled.float().mean())


def _certify(
    logits: torch.Tensor, added: torch.Tensor, wanted: torch.Tensor, side: ClosedFormSideNetwork, construction: str
) -> PatchCertificate:
    """Counts what ``logits + added`` gets right; the samples to change come first."""
    count, total = len(wanted), logits + added
    kept, before = total[count:], logits[count:]
    if side.depth == 2:
        bound = two_layer_neurons(count, len(logits))
    else:
        bound = sum(three_layer_neurons(number) for number in torch.bincount(wanted).tolist())
    return PatchCertificate(
        num_changed=count,
        num_kept=len(kept),
        changed_right=int((_label_margins(total[:count], wanted) > 0).sum()),
        kept_same=int((kept.argmax(1) == before.argmax(1)).sum()),
        smallest_margin=float(_label_margins(total[:count], wanted).min()),
        kept_largest_change=float((kept - before).abs().max()) if len(kept) else 0.0,
        neurons=side.neurons,
        neuron_bound=bound,
        depth=side.depth,
        precision=str(side.center.dtype).removeprefix("torch."),
        construction=construction,
    )


def _label_margins(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logit of the label minus the largest other logit, (B,), of logits (B, C) with at least two classes."""
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return logits.gather(1, labels[:, None])[:, 0] - others.max(dim=1).values
