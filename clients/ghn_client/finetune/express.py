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
from ghn_client.finetune.capacity import express_width
from ghn_client.finetune.certificate import run_in_batches
from ghn_client.finetune.express_bounds import layer_bounds, network_bound
from ghn_client.finetune.express_domain import Domain, measure_domains, norm_map, watch_inputs
from ghn_client.finetune.express_layer import EXACT, LEAST_SQUARES, ExpressedLayer, matrices, sizes, solve_layer
from ghn_client.finetune.express_report import ExpressCertificate, Feasibility, LayerCertificate, LayerFeasibility
from ghn_client.finetune.express_solve import condition_of
from ghn_client.finetune.frozen_network import BlockPair, Pairing, check_norm, check_target, pair_blocks

#: Refuse systems whose matrix alone would take more than this.
MEMORY_LIMIT_BYTES = 16 * 2**30


@dataclass(frozen=True, eq=False)
class Expression:
    """A frozen network that expresses a target.

    Attributes:
        module: A copy of the frozen network, in its own precision, with the norm parameters set; the given one is
            unchanged.
        parameters: The norm parameters by dotted path in ``module``, float64. They, with the seed of the frozen
            network, are the whole model.
        certificate: What was checked.
        domains: Balls on which each layer is exact.
    """

    module: nn.Module
    parameters: Mapping[str, torch.Tensor]
    certificate: ExpressCertificate
    domains: Mapping[str, Domain]
    _target: nn.Module
    _pairs: Sequence[BlockPair]

    def covers(self, inputs: torch.Tensor) -> torch.Tensor:
        """For every input whether all layers stay on their balls, where equality is guaranteed, (B,) of bool.

        Args:
            inputs: (B, ...) network inputs.
        """
        inside = []
        for one in inputs.double():
            worst = 0.0

            def see(name: str, rows: torch.Tensor) -> None:
                nonlocal worst
                worst = max(worst, float(self.domains[name].distance(rows)))

            watch_inputs(self._target, self._pairs, one[None], see, 1)
            inside.append(worst <= 1.0)
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
        InfeasibleError: A block is too narrow, or its sparse system has no full rank; see :func:`feasibility`.
        UnsupportedModuleError: A norm layer normalises with statistics of its own input or batch.
        UnsupportedModuleError: The networks do not pair up.
        InvalidOptionError: An option is unknown.
    """
    if mode not in (EXACT, LEAST_SQUARES) or slack < 0.0:
        raise InvalidOptionError(f"expected mode exact|least_squares and slack >= 0, got {mode=}, {slack=}")
    check_target(target)
    exact_target = copy.deepcopy(target).double().eval()
    pairing = pair_blocks(exact_target, frozen)
    for pair in pairing.blocks:
        _check_memory(pair)
    domains = measure_domains(exact_target, pairing.blocks, inputs.double(), slack=slack)
    layers = [solve_layer(pair, domains[pair.name], mode=mode) for pair in pairing.blocks]
    values = _norm_parameters(frozen, pairing, layers)
    double = _with_parameters(frozen, values, torch.float64)
    single = _with_parameters(frozen, values, next(frozen.parameters()).dtype)
    certificate = _certify(exact_target, double, single, layers, domains, inputs, mode, batch_size, values)
    return Expression(single, values, certificate, domains, exact_target, pairing.blocks)


def feasibility(target: nn.Module, frozen: nn.Module, *, largest_system: int = 4096) -> Feasibility:
    """Says before solving what each block has, needs and is short of.

    Args:
        target: As in :func:`express`.
        frozen: As in :func:`express`.
        largest_system: Conditions are computed for layers with up to so many weights per group.
    """
    check_target(target)
    return Feasibility(tuple(_feasible(pair, largest_system) for pair in pair_blocks(target, frozen).blocks))


def _feasible(pair: BlockPair, largest_system: int) -> LayerFeasibility:
    groups, outputs, fan_in, channels = sizes(pair)
    needed = outputs * fan_in
    condition = None
    if channels >= needed and needed <= largest_system:
        inner, outer = matrices(pair)
        condition = max(condition_of(outer[group], inner[group]) for group in range(groups))
    short = ""
    if channels < needed:
        short = f"{needed - channels:,} channels short per group; mode='least_squares' gives the best approximation"
    elif condition == float("inf"):
        short = "no full rank: too sparse for this width; widen the block or keep more weights"
    bytes_needed = 8 * channels * needed
    if not short and bytes_needed > MEMORY_LIMIT_BYTES:
        short = f"the system takes {bytes_needed / 2**30:.0f} GiB"
    finite = condition is not None and condition < float("inf")
    return LayerFeasibility(
        name=pair.name,
        needed=needed,
        recommended=express_width(fan_in, outputs),
        channels=channels,
        condition=condition,
        predicted_float32_error=torch.finfo(torch.float32).eps * float(condition or 0.0) if finite else None,
        system_bytes=bytes_needed,
        short_of=short,
    )


def _check_memory(pair: BlockPair) -> None:
    _, outputs, fan_in, channels = sizes(pair)
    needed = 8 * outputs * fan_in * channels
    if needed > MEMORY_LIMIT_BYTES:
        raise InfeasibleError(
            f"layer {pair.name!r} needs a system of {outputs * fan_in:,} x {channels:,}, {needed / 2**30:.0f} GiB in"
            f" float64; the limit is {MEMORY_LIMIT_BYTES / 2**30:.0f} GiB. Express a narrower layer"
        )


def _norm_parameters(frozen: nn.Module, pairing: Pairing, layers: Sequence[ExpressedLayer]) -> dict[str, torch.Tensor]:
    """All norm parameters by dotted path in ``frozen``, float64."""
    names = {id(child): name for name, child in frozen.named_modules()}
    values: dict[str, torch.Tensor] = {}
    for layer in layers:
        pair = layer.pair
        first, second = _bias(pair.inner, layer.shift1), _bias(pair.outer, layer.shift2)
        one = torch.ones_like(layer.shift2)
        for norm, scale, shift, offset in (
            (pair.norm1, layer.gains, layer.shift1, first),
            (pair.norm2, one, layer.shift2, second),
        ):
            values.update(_norm_values(names[id(norm)], norm, scale.flatten(), shift.flatten(), offset))
    for wanted, norm in pairing.norms:
        scale, shift = norm_map(wanted)
        values.update(_norm_values(names[id(norm)], norm, scale, shift, torch.zeros_like(shift)))
    return values


@torch.no_grad()
def _with_parameters(frozen: nn.Module, values: Mapping[str, torch.Tensor], dtype: torch.dtype) -> nn.Module:
    """A copy of ``frozen`` in ``dtype`` and eval mode with the norm parameters ``values``."""
    module = copy.deepcopy(frozen).to(dtype).eval()
    for name, value in values.items():
        module.get_parameter(name).copy_(value)
    return module


def _bias(matrix: nn.Module, like: torch.Tensor) -> torch.Tensor:
    bias = getattr(matrix, "bias", None)
    return torch.zeros_like(like).flatten() if bias is None else bias.detach().double()


def _norm_values(
    name: str, norm: nn.Module, scale: torch.Tensor, shift: torch.Tensor, offset: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Weight and bias of a BatchNorm in eval mode that maps ``y + offset`` to ``scale * y + shift``."""
    check_norm(name, norm)
    if getattr(norm, "weight", None) is None:
        raise UnsupportedModuleError(f"{name!r} has no affine parameters (affine=False); nothing could be set")
    mean, variance = norm.get_buffer("running_mean").double(), norm.get_buffer("running_var").double()
    weight = scale * torch.sqrt(variance + float(norm.eps))  # type: ignore[arg-type]
    return {f"{name}.weight": weight, f"{name}.bias": shift - scale * (offset - mean)}


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
    dtype = next(single.parameters()).dtype
    wanted = run_in_batches(target, inputs.double(), batch_size)
    exact = run_in_batches(double, inputs.double(), batch_size)
    rounded = run_in_batches(single, inputs.to(dtype), batch_size).double()
    scale = wanted.abs().max().clamp_min(1e-300)
    bounds = [layer_bounds(layer, domains[layer.pair.name]) for layer in layers]
    total = [network_bound(target, layers, [bound[index] for bound in bounds]) for index in (0, 1)]
    entries = tuple(
        _layer_entry(layer, domains[layer.pair.name], bound) for layer, bound in zip(layers, bounds, strict=True)
    )
    return ExpressCertificate(
        layers=entries,
        mode=mode,
        num_tuned=sum(value.numel() for value in values.values()),
        num_frozen=sum(layer.pair.inner.weight.numel() + layer.pair.outer.weight.numel() for layer in layers),
        num_target=sum(parameter.numel() for parameter in target.parameters()),
        largest_output=float(scale),
        error_float64=float((exact - wanted).abs().max() / scale),
        error_float32=float((rounded - wanted).abs().max() / scale),
        same_predictions=float((rounded.flatten(1).argmax(1) == wanted.flatten(1).argmax(1)).double().mean()),
        bound_float64=None if total[0] is None else total[0] / float(scale),
        bound_float32=None if total[1] is None else total[1] / float(scale),
    )


def _layer_entry(layer: ExpressedLayer, domain: Domain, bounds: tuple[float, float]) -> LayerCertificate:
    return LayerCertificate(
        name=layer.pair.name,
        channels=layer.gains.numel(),
        equations=layer.weight.numel(),
        full_rank=all(solution.full_rank for solution in layer.solutions),
        condition=max(solution.condition for solution in layer.solutions),
        largest_gain=float(layer.gains.abs().max()),
        weight_residual=max(solution.residual for solution in layer.solutions),
        radius=float(domain.radius.max()),
        bound_float64=bounds[0],
        bound_float32=bounds[1],
    )
