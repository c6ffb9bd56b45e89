"""``express``: gammas and betas with which a frozen random network equals a given trained one.

The construction is the proof of Giannou, Rajput and Papailiopoulos, "The Expressive Power of Tuning Only the
Normalization Layers", COLT 2023, arXiv:2302.07937, made into a solver: (1) gains g with ``A diag(g) B = W``; (2) a
shift that keeps the inner ReLU linear on a ball of inputs; (3) a shift behind A that takes the first one back and
adds the bias. The width of 1.25 channels per weight, the calibrated ball and the error bounds are ours. Compare
Burkholz, "Batch normalization is sufficient for universal function approximation in CNNs", ICLR 2024.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ghn_client.errors import InfeasibleError, InvalidOptionError, UnsupportedModuleError
from ghn_client.finetune.additive import run_in_batches
from ghn_client.finetune.express.certificate import (
    ExpressCertificate,
    Feasibility,
    LayerCertificate,
    LayerFeasibility,
    layer_bound,
    network_bound,
)
from ghn_client.finetune.express.domain import Domain, measure_domains, watch_inputs
from ghn_client.finetune.express.linear_system import (
    EXACT,
    LEAST_SQUARES,
    ExpressedLayer,
    condition_of,
    memory_shortage,
    shortage,
    solve_layer,
)
from ghn_client.finetune.express.pairing import (
    BlockPair,
    Matrix,
    check_norm,
    check_target,
    express_width,
    norm_map,
    pair_blocks,
)

LARGEST_CONDITIONED = 4096
"""Weights per group of the largest layer whose condition is computed."""


@dataclass(frozen=True, eq=False)
class Expression:
    """A frozen network that expresses a target."""

    # A copy of the frozen network, in its own precision, with the norm parameters set; the given one is unchanged
    module: nn.Module
    # the norm parameters by dotted path in ``module``, float64. They, with the seed of the frozen network, are the
    # whole model
    parameters: Mapping[str, torch.Tensor]
    certificate: ExpressCertificate  # what was checked
    domains: Mapping[str, Domain]  # balls on which each layer is exact
    _target: nn.Module
    _pairs: Sequence[BlockPair]

    def covers(self, inputs: torch.Tensor) -> torch.Tensor:
        """Whether all layers stay on their balls, where equality is guaranteed, for each of the inputs (B, ...)."""
        inside = []
        for one in inputs.double():
            distances: list[float] = []

            def see(name: str, rows: torch.Tensor, seen: list[float] = distances) -> None:
                domain = self.domains[name]
                seen.append(float(((rows - domain.center[:, None]).norm(dim=2) / domain.radius[:, None]).max()))

            watch_inputs(self._target, self._pairs, one[None], see)
            inside.append(max(distances) <= 1.0)
        return torch.tensor(inside)


def express(
    target: nn.Module,
    frozen: nn.Module,
    *,
    inputs: torch.Tensor,
    mode: str = EXACT,
    slack: float = 0.5,
    batch_size: int = 256,
) -> Expression:
    """Sets only norm parameters of a frozen network so that it computes what ``target`` computes.

    Args:
        target: Trained network of linear, Conv2d and BatchNorm layers in eval mode, with any parameter-free layers.
        frozen: Network from :func:`random_norm_network`, or an ``nn.Sequential`` of the same pattern. Not changed.
        inputs: (S, ...) samples: they set the domain, and the certificate is measured on them.
        mode: ``exact``, or ``least_squares`` for the best gains in function space where the network is too narrow.
        slack: How much larger than measured the balls round the mean input of every layer are made.
        batch_size: Samples per forward pass of the check.

    Returns:
        The expressed module, its norm parameters and the certificate.

    Raises:
        InfeasibleError: A block is too narrow, or its system too sparse or too large; see :func:`feasibility`.
        UnsupportedModuleError: The networks do not pair up, a norm layer normalises with statistics of its own input,
            or a BatchNorm is in train mode.
        InvalidOptionError: An option is unknown.
    """
    if mode not in (EXACT, LEAST_SQUARES) or slack < 0.0:
        raise InvalidOptionError(f"expected mode exact|least_squares and slack >= 0, got {mode=}, {slack=}")
    check_target(target)
    exact_target = copy.deepcopy(target).double().eval()
    pairs, norms = pair_blocks(exact_target, frozen)
    for pair in pairs:
        if too_large := memory_shortage(pair):
            raise InfeasibleError(f"layer {pair.name!r}: {too_large}")
    domains = measure_domains(exact_target, pairs, inputs.double(), slack=slack)
    layers = [solve_layer(pair, domains[pair.name], mode=mode) for pair in pairs]
    values = _norm_parameters(frozen, layers, norms)
    double = _with_parameters(frozen, values, torch.float64)
    single = _with_parameters(frozen, values, next(frozen.parameters()).dtype)
    certificate = _certify(exact_target, double, single, layers, domains, inputs, mode, batch_size, values)
    return Expression(single, values, certificate, domains, exact_target, pairs)


def feasibility(target: nn.Module, frozen: nn.Module) -> Feasibility:
    """Says before solving what each block has, needs and is short of.

    Conditions are computed for layers with up to 4,096 weights per group.
    """
    check_target(target)
    found = []
    for pair in pair_blocks(target, frozen)[0]:
        groups, outputs, fan_in, channels = pair.sizes
        needed, condition = outputs * fan_in, None
        if channels >= needed and needed <= LARGEST_CONDITIONED:
            inner, outer = pair.matrices()
            condition = max(condition_of(outer[group], inner[group]) for group in range(groups))
        found.append(
            LayerFeasibility(
                name=pair.name,
                needed=needed,
                recommended=express_width(fan_in, outputs),
                channels=channels,
                condition=condition,
                short_of=shortage(pair, full_rank=condition != float("inf")),
            )
        )
    return Feasibility(tuple(found))


def _norm_parameters(
    frozen: nn.Module, layers: Sequence[ExpressedLayer], norms: Sequence[tuple[nn.Module, nn.Module]]
) -> dict[str, torch.Tensor]:
    """All norm parameters by dotted path in ``frozen``, float64."""
    names = {id(child): name for name, child in frozen.named_modules()}
    values: dict[str, torch.Tensor] = {}

    def put(norm: nn.Module, scale: torch.Tensor, shift: torch.Tensor, before: Matrix | None = None) -> None:
        """Makes ``norm``, behind the bias of ``before``, the map ``scale * y + shift`` of what precedes that bias."""
        name = names[id(norm)]
        check_norm(name, norm)
        if getattr(norm, "weight", None) is None:
            raise UnsupportedModuleError(f"{name!r} has no affine parameters (affine=False); nothing could be set")
        mean, variance = norm.get_buffer("running_mean").double(), norm.get_buffer("running_var").double()
        bias = None if before is None else before.bias
        offset = torch.zeros_like(shift) if bias is None else bias.detach().double()
        values[f"{name}.weight"] = scale * torch.sqrt(variance + float(norm.eps))  # type: ignore[arg-type]
        values[f"{name}.bias"] = shift - scale * (offset - mean)

    for layer in layers:
        block, shift2 = layer.pair.block, layer.shift2.flatten()
        put(block.norm1, layer.gains.flatten(), layer.shift1.flatten(), block.inner)
        put(block.norm2, torch.ones_like(shift2), shift2, block.outer)
    for wanted, norm in norms:
        put(norm, *norm_map(wanted))
    return values


@torch.no_grad()
def _with_parameters(frozen: nn.Module, values: Mapping[str, torch.Tensor], dtype: torch.dtype) -> nn.Module:
    """A copy of ``frozen`` in ``dtype`` and eval mode with the norm parameters ``values``."""
    module = copy.deepcopy(frozen).to(dtype).eval()
    for name, value in values.items():
        module.get_parameter(name).copy_(value)
    return module


def _certify(
    target: nn.Module,
    double: nn.Module,
    single: nn.Module,
    layers: Sequence[ExpressedLayer],
    domains: Mapping[str, Domain],
    inputs: torch.Tensor,
    mode: str,
    batch_size: int,
    values: Mapping[str, torch.Tensor],
) -> ExpressCertificate:
    """Measures the finished networks on ``inputs`` and bounds them on the domains."""
    wanted = run_in_batches(target, inputs.double(), batch_size)
    exact = run_in_batches(double, inputs.double(), batch_size)
    rounded = run_in_batches(single, inputs.to(next(single.parameters()).dtype), batch_size).double()
    scale = float(wanted.abs().max().clamp_min(1e-300))
    bounds = {
        dtype: [layer_bound(layer, domains[layer.pair.name], dtype) for layer in layers]
        for dtype in (torch.float64, torch.float32)
    }
    total = {dtype: network_bound(target, layers, own) for dtype, own in bounds.items()}
    relative = {dtype: None if bound is None else bound / scale for dtype, bound in total.items()}
    entries = tuple(
        LayerCertificate(
            name=layer.pair.name,
            channels=layer.gains.numel(),
            equations=layer.weight.numel(),
            full_rank=all(solution.full_rank for solution in layer.solutions),
            condition=max(solution.condition for solution in layer.solutions),
            largest_gain=float(layer.gains.abs().max()),
            weight_residual=max(solution.residual for solution in layer.solutions),
            radius=float(domains[layer.pair.name].radius.max()),
            bound_float64=bounds[torch.float64][index],
            bound_float32=bounds[torch.float32][index],
        )
        for index, layer in enumerate(layers)
    )
    return ExpressCertificate(
        layers=entries,
        mode=mode,
        num_tuned=sum(value.numel() for value in values.values()),
        num_frozen=sum(layer.inner.numel() + layer.outer.numel() for layer in layers),
        num_target=sum(parameter.numel() for parameter in target.parameters()),
        largest_output=scale,
        error_float64=float((exact - wanted).abs().max()) / scale,
        error_float32=float((rounded - wanted).abs().max()) / scale,
        same_predictions=float((rounded.flatten(1).argmax(1) == wanted.flatten(1).argmax(1)).double().mean()),
        bound_float64=relative[torch.float64],
        bound_float32=relative[torch.float32],
    )
