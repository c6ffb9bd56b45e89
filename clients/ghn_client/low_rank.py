"""Networks with factored layers: made from a low-rank prediction, trained as usual, and turned back into dense ones.

A prediction with low-rank output holds ``<name>.factor_in`` (r, in, ...) and ``<name>.factor_out`` (out, r, ...) in the
place of a weight ``<name>``; ``factor_out.flatten(1) @ factor_in.flatten(1)`` stands in for the flattened weight.
Linear layers and plain convolutions become the pairs of ``finetune/factored.py``. Where the dense weight is read by
other code (packed attention projections, subclasses with a forward of their own), the weight becomes a product through
torch's parametrizations: the same parameters are saved, the same interface is kept, but no arithmetic is saved.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize

from ghn_client.errors import InvalidOptionError
from ghn_client.factors import FACTOR_IN, FACTOR_OUT, FactorPair, factor_pairs
from ghn_client.finetune.factored import FactoredConv2d, FactoredLinear
from ghn_client.prediction import Prediction


def factorize_module(
    module: nn.Module,
    prediction: Prediction | Mapping[str, torch.Tensor],
    *,
    inplace: bool = False,
) -> nn.Module:
    """A module of the same interface with factored layers, and the prediction loaded into it.

    Args:
        module: The network that the prediction is for. It is left as it is unless ``inplace``.
        prediction: A ``Prediction`` with low-rank factors, or tensors by the module's own names with factor pairs in
            the place of weights. Every other tensor is loaded as it is.
        inplace: Change and return ``module`` itself.

    Returns:
        The factored network. ``finetune.low_rank`` trains it with Frobenius decay; ``defactorize_module`` undoes it.

    Raises:
        InvalidOptionError: A name or shape does not fit the module; nothing has been changed then.
    """
    state = prediction.state_dict() if isinstance(prediction, Prediction) else prediction
    pairs = factor_pairs(state)
    owners = {name: _owner(module, name) for name in pairs}
    for name, pair in pairs.items():
        _check_fits(name, pair, *owners[name])
    dense = {name: t for name, t in state.items() if not name.endswith((FACTOR_IN, FACTOR_OUT))}
    _check_dense(module, dense)
    result = module if inplace else copy.deepcopy(module)
    shared = _shared_parameters(result)
    result.load_state_dict(dense, strict=False)
    for name, pair in pairs.items():
        path, _, leaf = name.rpartition(".")
        owner = result.get_submodule(path)
        if name in shared:
            with torch.no_grad():
                _weight_of(owner, leaf).copy_(_in_layout_of(owner, pair.dense()))
            continue
        replacement = _factored_layer(owner, leaf, pair)
        if replacement is None:
            _parametrize(owner, leaf, pair)
        elif not path:
            return replacement
        else:
            _replace(result, path, replacement)
    return result


def defactorize_module(module: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The dense network that a factored one is equal to: every pair becomes one layer with the product as its weight.

    Args:
        module: A network from ``factorize_module``, trained or not. It is left as it is unless ``inplace``.
        inplace: Change and return ``module`` itself.
    """
    result = module if inplace else copy.deepcopy(module)
    if isinstance(result, FactoredLinear | FactoredConv2d):
        return _dense_layer(result)
    for path, child in list(result.named_modules()):
        if isinstance(child, FactoredLinear | FactoredConv2d):
            _replace(result, path, _dense_layer(child))
    for owner, leaf in list(_parametrized(result)):
        _own_class(owner)
        parametrize.remove_parametrizations(owner, leaf, leave_parametrized=True)
    return result


class LowRankProduct(nn.Module):
    """The parametrization of a weight as ``factor_out @ factor_in``.

    Args:
        pair: The factors to start from.
        is_transposed: Whether the owner keeps its weight as (in, out).
    """

    def __init__(self, pair: FactorPair, *, is_transposed: bool) -> None:
        super().__init__()
        self._start: FactorPair | None = pair
        self.is_transposed = is_transposed
        self.kernel_shape = tuple(pair.factor_in.shape[1:])

    def forward(self, factor_out: torch.Tensor, factor_in: torch.Tensor) -> torch.Tensor:
        """The weight of (out, r) and (r, in * kernel)."""
        product = (factor_out @ factor_in).reshape(factor_out.shape[0], *self.kernel_shape)
        return product.mT if self.is_transposed else product

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors: those given at construction the first time, a balanced truncation of ``weight`` later."""
        if self._start is not None:
            pair, self._start = self._start, None
            factor_out, factor_in = pair.factor_out.flatten(1).to(weight), pair.factor_in.flatten(1).to(weight)
            self.rank = pair.rank
            return factor_out.clone(), factor_in.clone()
        matrix = (weight.mT if self.is_transposed else weight).flatten(1)
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        roots = values[: self.rank].sqrt()
        return left[:, : self.rank] * roots, roots[:, None] * right[: self.rank]


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    try:
        owner = module.get_submodule(path)
        owner.get_parameter(leaf)
    except AttributeError:
        raise InvalidOptionError(
            f"the prediction has factors of {name!r}, but {type(module).__name__} has no such parameter; is this the "
            "module that the prediction was made for?"
        ) from None
    return owner, leaf


def _check_fits(name: str, pair: FactorPair, owner: nn.Module, leaf: str) -> None:
    expected = tuple(_weight_of(owner, leaf).shape)
    product = (pair.factor_out.shape[0], *pair.factor_in.shape[1:])
    if _keeps_transposed(owner):
        product = product[::-1]
    if product != expected:
        raise InvalidOptionError(
            f"the factors of {name!r} multiply to {product}, but the module's weight is {expected}"
        )


def _check_dense(module: nn.Module, dense: Mapping[str, torch.Tensor]) -> None:
    own = module.state_dict()
    for name, tensor in dense.items():
        if name not in own:
            raise InvalidOptionError(f"{type(module).__name__} has no tensor {name!r} to load the prediction into")
        if own[name].shape != tensor.shape:
            raise InvalidOptionError(f"{name!r} has shape {tuple(own[name].shape)}, predicted is {tuple(tensor.shape)}")


def _shared_parameters(module: nn.Module) -> set[str]:
    """Names of parameters that more than one place of the module holds; factoring one place would untie them."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}


def _factored_layer(owner: nn.Module, leaf: str, pair: FactorPair) -> nn.Module | None:
    """The factored layer that can take the place of a whole module, or None if only its weight can be replaced."""
    if leaf != "weight" or parametrize.is_parametrized(owner) or not _is_plain(owner):
        return None
    weight = _weight_of(owner, leaf)
    layer: FactoredLinear | FactoredConv2d
    if type(owner) is nn.Linear:
        layer = FactoredLinear(owner.in_features, owner.out_features, pair.rank, bias=owner.bias is not None)
    elif type(owner) is nn.Conv2d and owner.groups == 1 and owner.padding_mode == "zeros":
        layer = FactoredConv2d(
            owner.in_channels,
            owner.out_channels,
            (owner.kernel_size[0], owner.kernel_size[1]),
            pair.rank,
            stride=(owner.stride[0], owner.stride[1]),
            padding=owner.padding if isinstance(owner.padding, str) else (owner.padding[0], owner.padding[1]),
            dilation=(owner.dilation[0], owner.dilation[1]),
            bias=owner.bias is not None,
        )
    else:
        return None
    layer = layer.to(device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.v.weight.copy_(pair.factor_in)
        layer.u.weight.copy_(pair.factor_out)
    if owner.bias is not None:
        layer.u.bias = owner.bias
    for factor in (layer.u.weight, layer.v.weight):
        factor.requires_grad_(weight.requires_grad)
    return layer.train(owner.training)


def _dense_layer(pair: FactoredLinear | FactoredConv2d) -> nn.Module:
    layer: nn.Linear | nn.Conv2d
    if isinstance(pair, FactoredLinear):
        layer = nn.Linear(pair.in_features, pair.out_features, bias=False)
    else:
        v = pair.v
        layer = nn.Conv2d(
            v.in_channels,
            pair.out_channels,
            (v.kernel_size[0], v.kernel_size[1]),
            (v.stride[0], v.stride[1]),
            v.padding if isinstance(v.padding, str) else (v.padding[0], v.padding[1]),
            (v.dilation[0], v.dilation[1]),
            bias=False,
        )
    with torch.no_grad():
        layer = layer.to(device=pair.u.weight.device, dtype=pair.u.weight.dtype)
        layer.weight.copy_(pair.dense_weight())
    layer.bias = pair.u.bias
    layer.weight.requires_grad_(pair.u.weight.requires_grad)
    return layer.train(pair.training)


def _parametrize(owner: nn.Module, leaf: str, pair: FactorPair) -> None:
    product = LowRankProduct(pair, is_transposed=_keeps_transposed(owner))
    # Unsafe skips torch's check that the product equals the weight that was there, which it must not.
    parametrize.register_parametrization(owner, leaf, product, unsafe=True)


def _parametrized(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for child in module.modules():
        if parametrize.is_parametrized(child) and isinstance(child.parametrizations, nn.ModuleDict):
            for leaf, chain in child.parametrizations.items():
                if isinstance(chain, nn.ModuleList) and any(isinstance(link, LowRankProduct) for link in chain):
                    yield child, leaf


def _own_class(owner: nn.Module) -> None:
    """Gives a parametrized module a class of its own: copies share theirs, and torch would take the weight off all."""
    shared = type(owner)
    owner.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))


def _is_plain(owner: nn.Module) -> bool:
    """Whether nothing but the module's own forward can be reading its weight."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return not any(getattr(owner, name, None) for name in hooks)


def _keeps_transposed(owner: nn.Module) -> bool:
    """Whether a module keeps a linear weight as (in, out), as the Conv1D of the transformers library does."""
    return type(owner).__name__ == "Conv1D" and hasattr(owner, "nf")


def _in_layout_of(owner: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    return weight.mT if _keeps_transposed(owner) else weight


def _weight_of(owner: nn.Module, leaf: str) -> torch.Tensor:
    weight: torch.Tensor = getattr(owner, leaf)
    return weight


def _replace(module: nn.Module, path: str, replacement: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, replacement)
