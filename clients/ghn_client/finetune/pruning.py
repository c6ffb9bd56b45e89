"""``prune_disabled_channels``: really removes channels that norm layers switched off; the function stays the same.

Where it cannot be proved that a channel may go - the other side of a residual addition still carries something, a
constant meets zero padding, an operation is not understood - the channel stays, and the report says why.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from ghn_client.errors import InfeasibleError, UnsupportedModuleError
from ghn_client.finetune.channel_flow import ChannelFlow, LayerUse
from ghn_client.finetune.gamma import DEFAULT_THRESHOLD, zero_scales
from ghn_client.finetune.insertion import CHILD
from ghn_client.finetune.norm_layers import find_norm_layers


@dataclass(frozen=True)
class PruneReport:
    """What was removed.

    Attributes:
        disabled: Channels of norm layers with a scale below the threshold.
        removed: Channels that were removed, by norm layer.
        kept: Disabled channels that stayed, by norm layer, with the reason.
        parameters_before: Parameters of the module.
        parameters_after: Parameters of the smaller one.
        largest_difference: Largest difference of the outputs on the example, relative to the largest output.
    """

    disabled: int
    removed: Mapping[str, int]
    kept: Mapping[str, tuple[int, str]]
    parameters_before: int
    parameters_after: int
    largest_difference: float

    def __str__(self) -> str:
        share = 1.0 - self.parameters_after / max(self.parameters_before, 1)
        removed = sum(self.removed.values())
        lines = [f"{removed:,} of {self.disabled:,} disabled channels removed, {share:.1%} fewer parameters"]
        lines += [f"  {name}: kept {count}, {reason}" for name, (count, reason) in self.kept.items()]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Pruned:
    """The smaller module and what was done."""

    module: nn.Module
    report: PruneReport


def prune_disabled_channels(
    module: nn.Module, example_inputs: torch.Tensor, *, threshold: float = DEFAULT_THRESHOLD
) -> Pruned:
    """A smaller copy of ``module`` without the channels whose scale is below ``threshold``.

    Its function is that of ``module`` in eval mode with those scales set to exactly zero.

    Args:
        module: Network that ``torch.fx`` can trace; stays as it is.
        example_inputs: A batch on which shapes are read and the result is checked.
        threshold: Scales below it in absolute value count as off.

    Raises:
        UnsupportedModuleError: The network cannot be traced, or has unmerged updates.
        InfeasibleError: The smaller network computes something else; it is not returned.
    """
    _check_merged(module)
    reference = copy.deepcopy(module).eval()
    disabled = zero_scales(reference, threshold=threshold)
    flow = _follow(reference, example_inputs)
    cut = _wires_to_cut(flow)
    smaller = copy.deepcopy(reference)
    for use in flow.uses.values():
        _shrink(smaller.get_submodule(use.name), use, flow, cut)
    difference = _difference(reference, smaller, example_inputs)
    smaller.train(module.training)
    removed, kept = _account(reference, flow, cut)
    report = PruneReport(
        disabled=disabled,
        removed=removed,
        kept=kept,
        parameters_before=sum(parameter.numel() for parameter in module.parameters()),
        parameters_after=sum(parameter.numel() for parameter in smaller.parameters()),
        largest_difference=difference,
    )
    return Pruned(smaller, report)


def _check_merged(module: nn.Module) -> None:
    for name, child in module.named_modules():
        if hasattr(child, CHILD) or parametrize.is_parametrized(child):
            raise UnsupportedModuleError(
                f"{name or 'the module'!r} has an update that is not merged; call handle.merge()"
            )


def _follow(module: nn.Module, example: torch.Tensor) -> ChannelFlow:
    try:
        traced = fx.symbolic_trace(module)
    except Exception as error:  # tracing runs foreign code, which may fail in any way
        raise UnsupportedModuleError(
            f"torch.fx cannot trace {type(module).__name__} ({type(error).__name__}: {error}), so that"
            " channels cannot be followed"
        ) from error
    flow = ChannelFlow(traced)
    with torch.no_grad():
        flow.run(example)
    return flow


def _wires_to_cut(flow: ChannelFlow) -> set[int]:
    """Wires that are not blocked and from which every mixing layer reads a constant; at least one stays per layer."""
    reasons = flow.wires.reasons
    for use in flow.uses.values():
        if use.reads is not None and use.constants is not None:
            alive = use.constants.isnan()
            flow.wires.block(use.reads[alive], f"{use.name} reads a channel that still varies")
    read = {
        wire for use in flow.uses.values() if use.reads is not None for wire in flow.wires.roots(use.reads).tolist()
    }
    cut = {wire for wire in read if wire not in reasons}
    for use in flow.uses.values():
        for wires in (use.writes, use.reads):
            if wires is not None and len(wires):
                roots = flow.wires.roots(wires).tolist()
                if cut.issuperset(roots):
                    cut.discard(roots[0])
                    reasons.setdefault(roots[0], f"{use.name} needs at least one channel")
    return cut


@torch.no_grad()
def _shrink(layer: nn.Module, use: LayerUse, flow: ChannelFlow, cut: set[int]) -> None:
    keep_out = _keep(use.writes, flow, cut)
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        if use.reads is not None:
            _fold_constants(layer, use, ~_keep(use.reads, flow, cut))
            layer.weight = _sliced(layer.weight, _keep(use.reads, flow, cut), 1)
        layer.weight = _sliced(layer.weight, keep_out, 0)
        if layer.bias is not None:
            layer.bias = _sliced(layer.bias, keep_out, 0)
        _set_sizes(layer)
        return
    for name, parameter in list(layer.named_parameters(recurse=False)):
        setattr(layer, name, _sliced(parameter, keep_out, 0))
    for name, buffer in list(layer.named_buffers(recurse=False)):
        if buffer.dim() == 1:
            setattr(layer, name, buffer[keep_out.to(buffer.device)])
    layer.num_features = int(keep_out.sum())  # type: ignore[assignment]


def _fold_constants(layer: nn.Conv2d | nn.Linear, use: LayerUse, removed: torch.Tensor) -> None:
    """Adds what the removed channels contribute to the bias."""
    assert use.constants is not None
    constants = torch.where(removed, use.constants, 0.0).to(layer.weight.device)
    weight = layer.weight.double()
    summed = weight if weight.dim() == 2 else weight.sum(dim=(2, 3))
    shift = (summed @ constants).to(layer.weight.dtype)
    if layer.bias is not None:
        layer.bias.add_(shift)
    elif bool((shift != 0).any()):
        layer.bias = nn.Parameter(shift, requires_grad=layer.weight.requires_grad)


def _set_sizes(layer: nn.Conv2d | nn.Linear) -> None:
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
        return
    depthwise = layer.groups > 1
    layer.out_channels = layer.weight.shape[0]
    layer.in_channels = layer.out_channels if depthwise else layer.weight.shape[1]
    layer.groups = layer.out_channels if depthwise else 1


def _keep(wires: torch.Tensor, flow: ChannelFlow, cut: set[int]) -> torch.Tensor:
    return torch.tensor([wire not in cut for wire in flow.wires.roots(wires).tolist()], dtype=torch.bool)


def _sliced(parameter: torch.Tensor, keep: torch.Tensor, dim: int) -> nn.Parameter:
    index = keep.nonzero()[:, 0].to(parameter.device)
    return nn.Parameter(parameter.detach().index_select(dim, index), requires_grad=parameter.requires_grad)


@torch.no_grad()
def _difference(reference: nn.Module, smaller: nn.Module, example: torch.Tensor) -> float:
    wanted = reference(example)
    try:
        given = smaller(example)
    except (RuntimeError, ValueError) as error:
        raise UnsupportedModuleError(f"the forward code of this network depends on channel counts: {error}") from error
    difference = float((given - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
    if not difference < 1e-3:
        raise InfeasibleError(f"the pruned network differs by {difference:.1e} on the example; it is not returned")
    return difference


def _account(module: nn.Module, flow: ChannelFlow, cut: set[int]) -> tuple[dict[str, int], dict[str, tuple[int, str]]]:
    removed: dict[str, int] = {}
    kept: dict[str, tuple[int, str]] = {}
    for layer in find_norm_layers(module):
        scale = layer.parameters.get("weight")
        off = [] if scale is None else (scale == 0).nonzero()[:, 0].tolist()
        if layer.name not in flow.uses:
            if off:
                kept[layer.name] = len(off), "the layer is not followed (it normalises over channels)"
            continue
        roots = flow.wires.roots(flow.uses[layer.name].writes).tolist()
        gone = sum(root in cut for root in roots)
        stayed = [root for index, root in enumerate(roots) if index in off and root not in cut]
        if gone:
            removed[layer.name] = gone
        if stayed:
            kept[layer.name] = len(stayed), flow.wires.reasons.get(stayed[0], "nothing reads it")
    return removed, kept
