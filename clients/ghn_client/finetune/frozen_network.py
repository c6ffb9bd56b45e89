"""Frozen random networks whose norm layers can express a target, and how their blocks pair up with the target's layers.

    block:  x -> norm2( A relu( norm1( B x ) ) )        B: (n, fan_in)   A: (fan_out, n)   n >= fan_in * fan_out

For a convolution B is a full k x k convolution and A a 1 x 1 one. Giannou, Rajput and Papailiopoulos, arXiv:2302.07937;
for convolutional networks compare Burkholz, "Batch normalization is sufficient for universal function approximation in
CNNs", ICLR 2024.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ghn_client.errors import InvalidOptionError, UnsupportedModuleError
from ghn_client.finetune.capacity import express_width
from ghn_client.finetune.insertion import ChannelNorm
from ghn_client.finetune.layers import set_submodule
from ghn_client.finetune.norm_layers import norm_kind

Matrix = nn.Linear | nn.Conv2d
#: Between the two channels of a pair with opposite columns of A.
PAIR_DISTANCE = 8


class FrozenBlock(nn.Module):
    """Two frozen matrices with a norm layer behind each and a ReLU in between, in place of one layer of a target.

    Args:
        inner: B, to n channels.
        norm1: Behind B.
        outer: A, from n channels.
        norm2: Behind A.
    """

    def __init__(self, inner: Matrix, norm1: nn.Module, outer: Matrix, norm2: nn.Module) -> None:
        super().__init__()
        self.inner, self.norm1, self.outer, self.norm2 = inner, norm1, outer, norm2

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the replaced layer takes and returns."""
        output: torch.Tensor = self.norm2(self.outer(torch.relu(self.norm1(self.inner(inputs)))))
        return output


@dataclass(frozen=True, eq=False)
class BlockPair:
    """A layer of the target and the block of the frozen network that shall equal it.

    Attributes:
        name: Dotted path of the target's layer.
        layer: The target's layer.
        folded: BatchNorm of the target that the block has to include, or ``None``.
        folded_name: Its dotted path, empty without one.
        inner: B.
        norm1: Behind B.
        outer: A.
        norm2: Behind A.
    """

    name: str
    layer: Matrix
    folded: nn.Module | None
    inner: Matrix
    norm1: nn.Module
    outer: Matrix
    norm2: nn.Module
    folded_name: str = ""


@dataclass(frozen=True, eq=False)
class Pairing:
    """Everything in a frozen network that stands for something in a target.

    Attributes:
        blocks: One entry per matrix layer of the target.
        norms: BatchNorm of the target and of the frozen network that shall be the same map.
    """

    blocks: list[BlockPair]
    norms: list[tuple[nn.Module, nn.Module]]


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
        sparsity: Share of frozen weights that are zero, at random.
        generator: Source of the weights; default seed 0.

    Raises:
        InvalidOptionError: ``slack`` is below 1 or ``sparsity`` outside [0, 1).
        UnsupportedModuleError: A layer of the target has no such block.
    """
    if slack < 1.0 or not 0.0 <= sparsity < 1.0:
        raise InvalidOptionError(f"expected slack >= 1 and 0 <= sparsity < 1, got {slack=} and {sparsity=}")
    generator = generator or torch.Generator().manual_seed(0)
    check_target(target)
    frozen = copy.deepcopy(target)
    for name, layer in list(named_matrices(frozen)):
        set_submodule(frozen, name, _block(layer, slack, sparsity, generator))
    for child in frozen.modules():
        if norm_kind(child) == "batch_norm":
            child.reset_parameters()  # type: ignore[operator]
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    return frozen.eval()


def named_matrices(module: nn.Module) -> Iterator[tuple[str, Matrix]]:
    """Linear and Conv2d layers with their dotted paths."""
    return ((name, child) for name, child in module.named_modules() if isinstance(child, (nn.Linear, nn.Conv2d)))


def check_target(module: nn.Module) -> None:
    """Refuses what norm layers cannot express.

    Raises:
        UnsupportedModuleError: A norm layer whose output is not affine in its input, or a BatchNorm in train mode.
        UnsupportedModuleError: Parameters outside linear, Conv2d and BatchNorm layers.
    """
    for name, child in module.named_modules():
        check_norm(name, child)
        own = list(child.parameters(recurse=False))
        known = isinstance(child, (nn.Linear, nn.Conv2d)) or norm_kind(child) is not None
        if own and not known:
            raise UnsupportedModuleError(
                f"expected parameters in Linear, Conv2d and BatchNorm layers only, {name or 'the module'!r} is a"
                f" {type(child).__name__}"
            )


def check_norm(name: str, layer: nn.Module) -> None:
    """Refuses norm layers that are no affine map.

    Raises:
        UnsupportedModuleError: It normalises with statistics of its own input (LayerNorm, GroupNorm, RMSNorm,
            InstanceNorm), or is a BatchNorm in train mode.
    """
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

    Raises:
        UnsupportedModuleError: Neither is the case.
        UnsupportedModuleError: See :func:`check_norm`.
    """
    known = dict(frozen.named_modules())
    layers = list(named_matrices(target))
    if not layers:
        raise UnsupportedModuleError("the target has no linear or Conv2d layer")
    if all(isinstance(known.get(name), FrozenBlock) for name, _ in layers):
        pairing = _named_pairs(target, known)
    else:
        pairing = _sequential_pairs(target, frozen)
    for pair in pairing.blocks:
        check_norm(f"{pair.name} norm1", pair.norm1)
        check_norm(f"{pair.name} norm2", pair.norm2)
        _check_shapes(pair)
    for _, norm in pairing.norms:
        check_norm("a norm layer of the frozen network", norm)
    return pairing


def _named_pairs(target: nn.Module, known: dict[str, nn.Module]) -> Pairing:
    blocks = []
    for name, layer in named_matrices(target):
        block = known[name]
        assert isinstance(block, FrozenBlock)
        blocks.append(BlockPair(name, layer, None, block.inner, block.norm1, block.outer, block.norm2))
    norms = [(child, known[name]) for name, child in target.named_modules() if norm_kind(child) == "batch_norm"]
    return Pairing(blocks, norms)


def _block(layer: Matrix, slack: float, sparsity: float, generator: torch.Generator) -> FrozenBlock:
    inner: Matrix
    outer: Matrix
    if isinstance(layer, nn.Linear):
        width = express_width(layer.in_features, layer.out_features, slack=slack)
        inner = nn.Linear(layer.in_features, width, bias=False)
        outer = nn.Linear(width, layer.out_features, bias=False)
        norms: list[nn.Module] = [ChannelNorm(width, channel_axis=-1), ChannelNorm(layer.out_features, channel_axis=-1)]
    else:
        groups = layer.groups
        width = groups * express_width(layer.weight[0].numel(), layer.out_channels // groups, slack=slack)
        inner = nn.Conv2d(
            layer.in_channels,
            width,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            groups,
            bias=False,
            padding_mode=layer.padding_mode,
        )
        outer = nn.Conv2d(width, layer.out_channels, 1, groups=groups, bias=False)
        norms = [nn.BatchNorm2d(width), nn.BatchNorm2d(layer.out_channels)]
    for matrix in (inner, outer):
        _randomize(matrix.weight, sparsity, generator)
    if layer.weight[0].numel() > 1:
        _make_opposite(outer.weight)
    block = FrozenBlock(inner, norms[0], outer, norms[1])
    return block.to(device=layer.weight.device, dtype=layer.weight.dtype)


@torch.no_grad()
def _randomize(weight: torch.Tensor, sparsity: float, generator: torch.Generator) -> None:
    """Gaussian of variance 1 / (fan-in times density), zero at random places."""
    values = torch.randn(weight.shape, generator=generator)
    kept = torch.rand(weight.shape, generator=generator) >= sparsity
    weight.copy_(values * kept / (weight[0].numel() * (1.0 - sparsity)) ** 0.5)


def opposite_channels(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels k and k + 8 of every full run of 16: the pairs that :func:`random_norm_network` gives opposite columns.

    The distance is that of the accumulators of common matrix kernels, in each of which a pair then cancels at once.
    """
    runs = torch.arange(width // (2 * PAIR_DISTANCE) * 2 * PAIR_DISTANCE).view(-1, 2, PAIR_DISTANCE)
    return runs[:, 0].flatten(), runs[:, 1].flatten()


@torch.no_grad()
def _make_opposite(outer: torch.Tensor) -> None:
    """Gives the pairs of channels of every group opposite columns; A has its groups one below the other."""
    first, second = opposite_channels(outer.shape[1])
    outer[:, second] = -outer[:, first]


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


def _sequential_pairs(target: nn.Module, frozen: nn.Module) -> Pairing:
    wanted, given = _leaves(target), _leaves(frozen)
    pairing = Pairing([], [])
    while wanted:
        name, layer = wanted.pop(0)
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            folds = bool(wanted) and norm_kind(wanted[0][1]) == "batch_norm"
            folded = wanted.pop(0) if folds else ("", None)
            pairing.blocks.append(_take_block(name, layer, folded, [leaf for _, leaf in given[:5]]))
            del given[:5]
            continue
        other = given.pop(0)[1] if given else None
        if type(other) is not type(layer):
            raise UnsupportedModuleError(
                f"the frozen network has {type(other).__name__} where the target has {name!r}, a {type(layer).__name__}"
            )
        if norm_kind(layer) == "batch_norm":
            assert other is not None
            pairing.norms.append((layer, other))
    if given:
        raise UnsupportedModuleError(f"the frozen network goes on after the target ends: {[n for n, _ in given][:5]}")
    return pairing


def _take_block(name: str, layer: Matrix, folded: tuple[str, nn.Module | None], five: list[nn.Module]) -> BlockPair:
    fits = (
        len(five) == 5
        and isinstance(five[0], (nn.Linear, nn.Conv2d))
        and norm_kind(five[1]) is not None
        and isinstance(five[2], nn.ReLU)
        and isinstance(five[3], (nn.Linear, nn.Conv2d))
        and norm_kind(five[4]) is not None
    )
    if not fits:
        raise UnsupportedModuleError(
            f"for the target's layer {name!r} the frozen network needs (matrix, norm, ReLU, matrix, norm), got"
            f" {[type(leaf).__name__ for leaf in five]}"
        )
    inner, norm1, _, outer, norm2 = five
    assert isinstance(inner, (nn.Linear, nn.Conv2d))
    assert isinstance(outer, (nn.Linear, nn.Conv2d))
    return BlockPair(name, layer, folded[1], inner, norm1, outer, norm2, folded[0])


def _check_shapes(pair: BlockPair) -> None:
    layer, inner, outer = pair.layer, pair.inner, pair.outer
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
