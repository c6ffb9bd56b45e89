"""Frozen random networks whose norm layers can express a target, and how their blocks pair up with the target's layers.

    block:  x -> norm2( A relu( norm1( B x ) ) )        B: (n, fan_in)   A: (fan_out, n)   n >= fan_in * fan_out

For a convolution B is a full k x k convolution and A a 1 x 1 one. Giannou, Rajput and Papailiopoulos, arXiv:2302.07937;
for convolutional networks compare Burkholz, "Batch normalization is sufficient for universal function approximation in
CNNs", ICLR 2024.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ghn_client.errors import InfeasibleError, InvalidOptionError, UnsupportedModuleError
from ghn_client.finetune.inserted_norms import ChannelNorm
from ghn_client.finetune.matrix_layers import BATCH_NORM, norm_kind

Matrix = nn.Linear | nn.Conv2d
#: Between the two channels of a pair with opposite columns of A.
PAIR_DISTANCE = 8
#: Sparse blocks grow by this factor while they lack rank, to this many times their first width at most.
WIDENING, MOST_WIDENING = 1.15, 64
#: Smallest over largest eigenvalue of M^T M, below which a sparse block counts as lacking rank.
FULL_RANK_TOLERANCE = 1e-9


class FrozenBlock(nn.Module):
    """Two frozen matrices with a norm layer behind each and a ReLU in between, in place of one layer of a target."""

    def __init__(self, inner: Matrix, norm1: nn.Module, outer: Matrix, norm2: nn.Module) -> None:
        super().__init__()
        self.inner, self.norm1, self.outer, self.norm2 = inner, norm1, outer, norm2

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the replaced layer takes and returns."""
        output: torch.Tensor = self.norm2(self.outer(torch.relu(self.norm1(self.inner(inputs)))))
        return output


@dataclass(frozen=True, eq=False)
class BlockPair:
    """A layer of the target and the block of the frozen network that shall equal it."""

    name: str  # dotted path of the target's layer
    layer: Matrix  # the target's layer
    block: FrozenBlock  # its layers are those of the frozen network
    folded: nn.Module | None = None  # BatchNorm of the target that the block has to include, or ``None``

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Groups, outputs per group o, fan-in p, channels per group n."""
        groups = self.layer.groups if isinstance(self.layer, nn.Conv2d) else 1
        outputs, channels = self.layer.weight.shape[0], self.block.inner.weight.shape[0]
        return groups, outputs // groups, self.layer.weight[0].numel(), channels // groups

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """B (groups, n, p) and A (groups, o, n) in float64."""
        groups, outputs, fan_in, channels = self.sizes
        inner = self.block.inner.weight.detach().double().reshape(groups, channels, fan_in)
        return inner, self.block.outer.weight.detach().double().reshape(groups, outputs, channels)

    def target_map(self) -> tuple[torch.Tensor, torch.Tensor]:
        """W (groups, o, p) and b (groups, o) in float64, with the folded BatchNorm."""
        groups, outputs, fan_in, _ = self.sizes
        weight = self.layer.weight.detach().double().reshape(groups * outputs, fan_in)
        bias = weight.new_zeros(len(weight)) if self.layer.bias is None else self.layer.bias.detach().double()
        if self.folded is not None:
            scale, shift = norm_map(self.folded)
            weight, bias = scale[:, None] * weight, scale * bias + shift
        return weight.reshape(groups, outputs, fan_in), bias.reshape(groups, outputs)


#: Blocks for the matrix layers of a target; its other BatchNorm layers, each with the frozen one that shall equal it.
Pairing = tuple[list[BlockPair], list[tuple[nn.Module, nn.Module]]]


def norm_map(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift (C,) of a BatchNorm in eval mode, in float64."""
    mean, variance = norm.get_buffer("running_mean").double(), norm.get_buffer("running_var").double()
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    scale = torch.rsqrt(variance + float(norm.eps))  # type: ignore[arg-type]
    scale = scale if weight is None else scale * weight.detach().double()
    return scale, (0.0 if bias is None else bias.detach().double()) - scale * mean


def express_width(fan_in: int, fan_out: int, *, slack: float = 1.25, sparsity: float = 0.0) -> int:
    """Frozen channels that should express a dense layer exactly.

    One channel per weight is the theorem's width (arXiv:2302.07937); the slack of 1.25 keeps the system well
    conditioned. Of sparse matrices a share ``sparsity ** fan_out`` of the channels leads nowhere, and is made up for.
    Both are ours.
    """
    return math.ceil(slack * fan_in * fan_out / (1.0 - sparsity**fan_out))


def random_norm_network(
    target: nn.Module,
    *,
    slack: float = 1.25,
    sparsity: float = 0.0,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """A frozen random network that is large enough to express ``target`` by its norm layers alone.

    A copy of the target in which every linear and convolutional layer is a :class:`FrozenBlock` with Gaussian weights;
    nothing of the target's values is left, its BatchNorm layers start anew. Columns of A come in pairs of opposite sign
    with independent rows of B: the large shifts that keep the ReLU linear then cancel pair by pair, not only at the end
    of the sum, which makes the float32 result several times as precise (ours, not the theorem's; rank and condition are
    as before).

    Args:
        target: Network of linear and convolutional layers.
        slack: Frozen channels per weight of the target; 1 is the theorem's square system, which is poorly conditioned.
        sparsity: Share of frozen weights that are zero, at random. Blocks are then widened until the system of their
            layer has full rank, so that any weights can be expressed.
        generator: Source of the weights; default seed 0.

    Raises:
        InvalidOptionError: ``slack`` is below 1 or ``sparsity`` outside [0, 1).
        UnsupportedModuleError: A layer of the target has no such block.
        InfeasibleError: So sparse a layer expresses nothing, however wide.
    """
    if slack < 1.0 or not 0.0 <= sparsity < 1.0:
        raise InvalidOptionError(f"expected slack >= 1 and 0 <= sparsity < 1, got {slack=} and {sparsity=}")
    generator = generator or torch.Generator().manual_seed(0)
    check_target(target)
    frozen = copy.deepcopy(target)
    for name, layer in _matrices(frozen).items():
        if name:
            frozen.set_submodule(name, _block(layer, slack, sparsity, generator))
        else:
            frozen = _block(layer, slack, sparsity, generator)
    for child in frozen.modules():
        if norm_kind(child) == BATCH_NORM:
            child.reset_parameters()  # type: ignore[operator]
    return frozen.requires_grad_(False).eval()


def _block(layer: Matrix, slack: float, sparsity: float, generator: torch.Generator) -> FrozenBlock:
    """A random block in place of ``layer``, as narrow as ``express_width`` says, wider where it lacks rank."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    fan_in, fan_out = layer.weight[0].numel(), layer.weight.shape[0] // groups
    width = narrowest = express_width(fan_in, fan_out, slack=slack, sparsity=sparsity)
    block = _random_block(layer, groups * width, sparsity, generator)
    while sparsity and not _has_full_rank(layer, block):
        width = math.ceil(WIDENING * width)
        if width > MOST_WIDENING * narrowest:
            raise InfeasibleError(
                f"a layer of {fan_in} x {fan_out} lacks rank even with {width:,} channels of sparsity {sparsity:g};"
                " keep more of the weights"
            )
        block = _random_block(layer, groups * width, sparsity, generator)
    return block


def _has_full_rank(layer: Matrix, block: FrozenBlock) -> bool:
    """Whether any weights of ``layer`` can be expressed: M^T M of each group (``linear_system.py``) is regular."""
    inner, outer = BlockPair("", layer, block).matrices()
    for b, a in zip(inner, outer, strict=True):
        system = (a[:, None] * b.T).flatten(0, 1)  # M^T (o p, n)
        energies = torch.linalg.eigvalsh(system @ system.T)
        if float(energies[0]) <= FULL_RANK_TOLERANCE * float(energies[-1]):
            return False
    return True


def _random_block(layer: Matrix, width: int, sparsity: float, generator: torch.Generator) -> FrozenBlock:
    """A block of ``width`` channels: Gaussian of variance 1 / (fan-in times density), zero at random places."""
    inner: Matrix
    outer: Matrix
    if isinstance(layer, nn.Linear):
        inner = nn.Linear(layer.in_features, width, bias=False)
        outer = nn.Linear(width, layer.out_features, bias=False)
        norms: list[nn.Module] = [ChannelNorm(width, channel_axis=-1), ChannelNorm(layer.out_features, channel_axis=-1)]
    else:
        inner = nn.Conv2d(
            layer.in_channels,
            width,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            layer.groups,
            bias=False,
            padding_mode=layer.padding_mode,
        )
        outer = nn.Conv2d(width, layer.out_channels, 1, groups=layer.groups, bias=False)
        norms = [nn.BatchNorm2d(width), nn.BatchNorm2d(layer.out_channels)]
    with torch.no_grad():
        for weight in (inner.weight, outer.weight):
            values = torch.randn(weight.shape, generator=generator)
            kept = torch.rand(weight.shape, generator=generator) >= sparsity
            weight.copy_(values * kept / (weight[0].numel() * (1.0 - sparsity)) ** 0.5)
        if layer.weight[0].numel() > 1:  # A has its groups one below the other: the columns are those of each group
            first, second = opposite_channels(outer.weight.shape[1])
            outer.weight[:, second] = -outer.weight[:, first]
    block = FrozenBlock(inner, norms[0], outer, norms[1])
    return block.to(device=layer.weight.device, dtype=layer.weight.dtype)


def opposite_channels(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels k and k + 8 of every full run of 16: the pairs that :func:`random_norm_network` gives opposite columns.

    The distance is that of the accumulators of common matrix kernels, in each of which a pair then cancels at once.
    """
    runs = torch.arange(width // (2 * PAIR_DISTANCE) * 2 * PAIR_DISTANCE).view(-1, 2, PAIR_DISTANCE)
    return runs[:, 0].flatten(), runs[:, 1].flatten()


def _matrices(module: nn.Module) -> dict[str, Matrix]:
    """Linear and Conv2d layers by dotted path."""
    return {name: child for name, child in module.named_modules() if isinstance(child, (nn.Linear, nn.Conv2d))}


def check_target(module: nn.Module) -> None:
    """Refuses parameters outside linear, Conv2d and BatchNorm layers, and what :func:`check_norm` refuses."""
    for name, child in module.named_modules():
        check_norm(name, child)
        known = isinstance(child, (nn.Linear, nn.Conv2d)) or norm_kind(child) is not None
        if not known and list(child.parameters(recurse=False)):
            raise UnsupportedModuleError(
                f"expected parameters in Linear, Conv2d and BatchNorm layers only, {name or 'the module'!r} is a"
                f" {type(child).__name__}"
            )


def check_norm(name: str, layer: nn.Module) -> None:
    """Refuses norm layers that normalise with statistics of their own input, BatchNorm in train mode included."""
    if norm_kind(layer) is None:
        return
    if getattr(layer, "running_mean", None) is None:
        raise UnsupportedModuleError(
            f"{name!r} is a {type(layer).__name__}: it normalises with statistics of its own input, so that scale and"
            " shift do not make it an affine map; use BatchNorm with running statistics"
        )
    if layer.training:
        raise UnsupportedModuleError(f"{name!r} normalises with batch statistics (train mode); call .eval() first")


def pair_blocks(target: nn.Module, frozen: nn.Module) -> Pairing:
    """Which block of ``frozen`` stands for which layer of ``target``.

    Either the frozen network has a :class:`FrozenBlock` at the path of every layer of the target, or both are
    ``nn.Sequential`` and the frozen one repeats (matrix, norm, ReLU, matrix, norm) for every matrix of the target.
    """
    known, layers = dict(frozen.named_modules()), _matrices(target)
    if not layers:
        raise UnsupportedModuleError("the target has no linear or Conv2d layer")
    blocks = {name: block for name in layers if isinstance(block := known.get(name), FrozenBlock)}
    if len(blocks) == len(layers):
        pairs = [BlockPair(name, layers[name], block) for name, block in blocks.items()]
        norms = [(child, known[name]) for name, child in target.named_modules() if norm_kind(child) == BATCH_NORM]
    else:
        pairs, norms = _sequential_pairs(_leaves(target), _leaves(frozen))
    for pair in pairs:
        check_norm(f"{pair.name} norm1", pair.block.norm1)
        check_norm(f"{pair.name} norm2", pair.block.norm2)
        _check_shapes(pair)
    for _, norm in norms:
        check_norm("a norm layer of the frozen network", norm)
    return pairs, norms


def _leaves(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules of nested ``nn.Sequential`` in the order of execution, without those that do nothing in eval mode."""
    if not isinstance(module, nn.Sequential):
        raise UnsupportedModuleError(
            "expected a FrozenBlock at the path of every target layer (random_norm_network builds them), or target and"
            f" frozen network both as nn.Sequential; got {type(module).__name__}"
        )
    found = []
    for name, child in module.named_children():
        if isinstance(child, nn.Sequential):
            found += [(f"{name}.{inner}", leaf) for inner, leaf in _leaves(child)]
        elif not isinstance(child, (nn.Identity, nn.modules.dropout._DropoutNd)):
            found.append((name, child))
    return found


def _sequential_pairs(wanted: list[tuple[str, nn.Module]], given: list[tuple[str, nn.Module]]) -> Pairing:
    """Pairs the leaves of a target with those of a frozen network; consumes both lists."""
    pairs: list[BlockPair] = []
    norms: list[tuple[nn.Module, nn.Module]] = []
    while wanted:
        name, layer = wanted.pop(0)
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            folds = bool(wanted) and norm_kind(wanted[0][1]) == BATCH_NORM
            folded = wanted.pop(0)[1] if folds else None
            five = [leaf for _, leaf in given[:5]]
            del given[:5]
            pattern: list[Any] = [(nn.Linear, nn.Conv2d), nn.Module, nn.ReLU, (nn.Linear, nn.Conv2d), nn.Module]
            fits = len(five) == 5 and all(isinstance(leaf, kind) for leaf, kind in zip(five, pattern, strict=True))
            if not fits or norm_kind(five[1]) is None or norm_kind(five[4]) is None:
                raise UnsupportedModuleError(
                    f"for the target's layer {name!r} the frozen network needs (matrix, norm, ReLU, matrix, norm), got"
                    f" {[type(leaf).__name__ for leaf in five]}"
                )
            block = FrozenBlock(five[0], five[1], five[3], five[4])  # type: ignore[arg-type]
            pairs.append(BlockPair(name, layer, block, folded))
            continue
        other = given.pop(0)[1] if given else None
        if type(other) is not type(layer):
            raise UnsupportedModuleError(
                f"the frozen network has {type(other).__name__} where the target has {name!r}, a {type(layer).__name__}"
            )
        if norm_kind(layer) == BATCH_NORM:
            assert other is not None
            norms.append((layer, other))
    if given:
        raise UnsupportedModuleError(f"the frozen network goes on after the target ends: {[n for n, _ in given][:5]}")
    return pairs, norms


def _check_shapes(pair: BlockPair) -> None:
    """Refuses a block that is not shaped like its layer."""
    layer, inner, outer = pair.layer, pair.block.inner, pair.block.outer
    same = type(layer) is type(inner) is type(outer) and layer.weight.shape[1:] == inner.weight.shape[1:]
    same = same and layer.weight.shape[0] == outer.weight.shape[0]
    if same and isinstance(layer, nn.Conv2d) and isinstance(outer, nn.Conv2d):
        names = ("stride", "padding", "dilation", "groups", "padding_mode")
        same = all(getattr(layer, name) == getattr(inner, name) for name in names)
        plain = (outer.kernel_size, outer.stride, outer.padding, outer.groups)
        same = same and plain == ((1, 1), (1, 1), (0, 0), layer.groups)
    if not same:
        raise UnsupportedModuleError(
            f"the block for {pair.name!r} must be (like {layer}, with any number of channels), then a plain matrix or"
            f" 1 x 1 convolution to {layer.weight.shape[0]} outputs; got {inner} and {outer}"
        )
