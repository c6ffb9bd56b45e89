"""Networks whose weights are products of two thin matrices: made from a low-rank prediction, trained, made dense again.

    x -> U (V x) + b             V: (R, in)                 U: (out, R)         in place of a linear layer
    x -> 1x1 conv of k x k conv  V: (R, in / groups, k, k)  U: (out, R, 1, 1)   in place of a plain convolution

A prediction with low-rank output holds ``<name>.factor_in`` (V) and ``<name>.factor_out`` (U) in the place of a weight
``<name>``. Linear layers and plain convolutions become the pairs above. Where the dense weight is read by other code
(packed attention projections, subclasses with a forward of their own), the weight becomes a product through torch's
parametrizations: the same parameters are saved, the same interface is kept, but no arithmetic is saved.

Frobenius decay penalises ``||U V||_F^2``, the norm of the product, instead of those of the factors
(Khodak, Tenenholtz, Mackey and Fusi, "Initialization and Regularization of Factorized Neural Layers", ICLR 2021).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ghn_client.batchnorm import UPDATE, travelling_statistics
from ghn_client.errors import InvalidOptionError, UnsupportedModuleError
from ghn_client.factors import FACTOR_IN, FACTOR_OUT, FactorPair, factor_pairs
from ghn_client.finetune.handle import FineTuneHandle, Part
from ghn_client.finetune.matrix_layers import (
    parameter_groups,
    parameters_under,
    remove_parametrization,
    resolve_head,
)
from ghn_client.prediction import Prediction


class FactoredLayer(nn.Module):
    """Stands in for a linear layer or plain convolution: ``v`` to a bottleneck of ``rank`` channels, ``u`` out of it.

    Of the dense ``layer`` the sizes and options are taken, the values are not; ``rank`` is at most the full rank.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int) -> None:
        super().__init__()
        outputs, has_bias = len(layer.weight), layer.bias is not None
        full = min(outputs, layer.weight[0].numel())
        if not 1 <= rank <= full:
            raise InvalidOptionError(f"rank must be from 1 to {full} (full rank), got {rank}")
        self.v = _like(layer, rank)
        self.u: nn.Linear | nn.Conv2d
        if isinstance(layer, nn.Linear):
            self.u = nn.Linear(rank, outputs, bias=has_bias)
        else:
            self.u = nn.Conv2d(rank, outputs, 1, bias=has_bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the dense layer takes and returns."""
        output: torch.Tensor = self.u(self.v(inputs))
        return output

    @property
    def weight(self) -> torch.Tensor:
        """What a forward reads that computes with the weights of its layers, as torch's encoder layers do."""
        return self.dense_weight()

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of the dense layer."""
        return self.u.bias

    def dense_weight(self) -> torch.Tensor:
        """The product, of the shape of the dense layer's weight."""
        if isinstance(self.v, nn.Linear):
            return self.u.weight @ self.v.weight
        return torch.einsum("or,rikl->oikl", self.u.weight[:, :, 0, 0], self.v.weight)


def _like(layer: nn.Linear | nn.Conv2d, outputs: int) -> nn.Linear | nn.Conv2d:
    """A new layer without bias that reads what ``layer`` reads, with its kernel, stride, padding and dilation."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, outputs, bias=False)
    options: Any = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation")}
    return nn.Conv2d(layer.in_channels, outputs, bias=False, **options)


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
            the place of weights. Every other tensor is loaded as it is, running statistics of a source too.
        inplace: Change and return ``module`` itself.

    Returns:
        The factored network. ``low_rank`` trains it with Frobenius decay; ``defactorize_module`` undoes it.

    Raises:
        InvalidOptionError: A name or shape does not fit the module; nothing has been changed then.
    """
    state = prediction
    if isinstance(prediction, Prediction):
        state = {**prediction.state_dict(), **prediction.statistics}
    pairs = factor_pairs(state)
    dense = {name: tensor for name, tensor in state.items() if not name.endswith((FACTOR_IN, FACTOR_OUT))}
    _check_fits(module, pairs, dense)
    result = module if inplace else copy.deepcopy(module)
    shared = _shared_parameters(result)
    result.load_state_dict(dense, strict=False)
    for name, pair in pairs.items():
        path, _, leaf = name.rpartition(".")
        owner = result.get_submodule(path)
        if name in shared:
            with torch.no_grad():
                weight = owner.get_parameter(leaf)
                weight.copy_(pair.dense().mT if _keeps_transposed(owner) else pair.dense())
        elif (replacement := _factored_layer(owner, leaf, pair)) is None:
            product = LowRankProduct(pair, is_transposed=_keeps_transposed(owner))
            # Unsafe skips torch's check that the product equals the weight that was there, which it must not.
            parametrize.register_parametrization(owner, leaf, product, unsafe=True)
        elif not path:
            return replacement
        else:
            _replace(result, path, replacement)
    return result


def defactorize_module(module: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The dense network that a factored one is equal to: every pair becomes one layer with the product as its weight.

    ``module`` is left as it is unless ``inplace``.
    """
    result = module if inplace else copy.deepcopy(module)
    if isinstance(result, FactoredLayer):
        return _dense_layer(result)
    for path, child in list(result.named_modules()):
        if isinstance(child, FactoredLayer):
            _replace(result, path, _dense_layer(child))
    for _, owner, leaf in list(_products(result)):
        remove_parametrization(owner, leaf, keep=True)
    return result


class LowRankProduct(nn.Module):
    """The parametrization of a weight as ``factor_out @ factor_in``; transposed where the owner keeps (in, out)."""

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


def _check_fits(module: nn.Module, pairs: Mapping[str, FactorPair], dense: Mapping[str, torch.Tensor]) -> None:
    """Raises ``InvalidOptionError`` unless every pair and every dense tensor has its place in the module."""
    own = module.state_dict()
    for name, pair in pairs.items():
        path, _, leaf = name.rpartition(".")
        try:
            owner = module.get_submodule(path)
            expected = tuple(owner.get_parameter(leaf).shape)
        except AttributeError:
            raise InvalidOptionError(
                f"the prediction has factors of {name!r}, but {type(module).__name__} has no such parameter; is this "
                "the module that the prediction was made for?"
            ) from None
        product = (pair.factor_out.shape[0], *pair.factor_in.shape[1:])
        product = product[::-1] if _keeps_transposed(owner) else product
        if product != expected:
            raise InvalidOptionError(
                f"the factors of {name!r} multiply to {product}, but the module's weight is {expected}"
            )
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
    # With a hook, other code than the module's own forward may be reading its weight.
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    if leaf != "weight" or parametrize.is_parametrized(owner) or any(getattr(owner, hook, None) for hook in hooks):
        return None
    if not isinstance(owner, nn.Linear | nn.Conv2d) or type(owner) not in (nn.Linear, nn.Conv2d):
        return None
    if isinstance(owner, nn.Conv2d) and (owner.groups != 1 or owner.padding_mode != "zeros"):
        return None
    weight = owner.weight
    layer = FactoredLayer(owner, pair.rank).to(device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.v.weight.copy_(pair.factor_in)
        layer.u.weight.copy_(pair.factor_out)
    if owner.bias is not None:
        layer.u.bias = owner.bias
    for factor in (layer.u.weight, layer.v.weight):
        factor.requires_grad_(weight.requires_grad)
    return layer.train(owner.training)


def _dense_layer(pair: FactoredLayer) -> nn.Module:
    layer = _like(pair.v, len(pair.u.weight)).to(device=pair.u.weight.device, dtype=pair.u.weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(pair.dense_weight())
    layer.bias = pair.u.bias
    layer.weight.requires_grad_(pair.u.weight.requires_grad)
    return layer.train(pair.training)


def _keeps_transposed(owner: nn.Module) -> bool:
    """Whether a module keeps a linear weight as (in, out), as the Conv1D of the transformers library does."""
    return type(owner).__name__ == "Conv1D" and hasattr(owner, "nf")


def _replace(module: nn.Module, path: str, replacement: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, replacement)


def factored_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Dotted paths and modules of all pairs of matrix layers of any library: ``v`` without bias, then ``u``."""
    for name, child in module.named_modules():
        u, v = getattr(child, "u", None), getattr(child, "v", None)
        if isinstance(u, nn.Linear | nn.Conv2d) and isinstance(v, nn.Linear | nn.Conv2d) and v.bias is None:
            yield name, child


def _products(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Dotted path, module and name there of every weight that is a ``LowRankProduct``."""
    for path, child in module.named_modules():
        if parametrize.is_parametrized(child) and isinstance(child.parametrizations, nn.ModuleDict):
            for leaf, chain in child.parametrizations.items():
                if isinstance(chain, nn.ModuleList) and any(isinstance(link, LowRankProduct) for link in chain):
                    yield path, child, leaf


def _factor_names(module: nn.Module) -> list[tuple[str, str]]:
    """Dotted paths of U and V of every factored layer and weight of ``module``."""
    layers = [(f"{path}.u.weight", f"{path}.v.weight") for path, _ in factored_modules(module)]
    weights = [f"{path}.parametrizations.{leaf}" for path, _, leaf in _products(module)]
    pairs = [*layers, *((f"{weight}.original0", f"{weight}.original1") for weight in weights)]
    return [(u.removeprefix("."), v.removeprefix(".")) for u, v in pairs]


def frobenius_decay(module: nn.Module) -> torch.Tensor:
    """Half the sum of ``||U V||_F^2`` over all factored layers and weights of ``module``."""
    return _decay([(module.get_parameter(u), module.get_parameter(v)) for u, v in _factor_names(module)], 1.0)


def _decay(pairs: Sequence[tuple[nn.Parameter, nn.Parameter]], factor: float) -> torch.Tensor:
    """Uses ``||U V||_F^2 = tr((U^T U)(V V^T))``, without forming the product: O(R^2 (in + out))."""
    flat = [(u.flatten(1), v.flatten(1)) for u, v in pairs]
    terms = [((u.T @ u) * (v @ v.T)).sum() for u, v in flat]
    return 0.5 * factor * torch.stack(terms).sum() if terms else torch.zeros(())


def low_rank(
    module: nn.Module,
    *,
    head: bool | str | Sequence[str] = True,
    frobenius_decay: float = 1e-4,
    statistics: str = UPDATE,
) -> FineTuneHandle:
    """Trains the factors (and their biases) of every factored layer and freezes the rest.

    Args:
        module: Network with factored layers, for example from ``factorize_module``.
        head: The classifier to tune too, as in ``norm_only``.
        frobenius_decay: Weight of ``1/2 ||U V||_F^2``, added to the loss by ``handle.loss_penalty()``; 0 for none.
        statistics: What happens to running statistics; see ``ghn_client.batchnorm``.

    Raises:
        UnsupportedModuleError: No layer is factored.
        InvalidOptionError: The decay is negative.
    """
    if frobenius_decay < 0:
        raise InvalidOptionError(f"frobenius_decay must not be negative, got {frobenius_decay}")
    pairs = _factor_names(module)
    if not pairs:
        raise UnsupportedModuleError(
            f"{type(module).__name__} has no factored layer; factorize it first, or use low_rank_update (LoRA)"
        )
    head_names = resolve_head(module, head)
    factors = parameters_under(module, (name for name, _ in factored_modules(module)))
    factors += [name for names in pairs for name in names if name not in factors]
    config = {"head": list(head_names), "frobenius_decay": frobenius_decay, "statistics": statistics}
    products = [(module.get_parameter(u), module.get_parameter(v)) for u, v in pairs]
    penalty = partial(_decay, products, frobenius_decay) if frobenius_decay else None
    groups = parameter_groups(module, "factors", factors, head_names)
    part = Part("low_rank", config, module, groups, travelling_statistics(module, statistics))
    return FineTuneHandle(part, penalty=penalty, statistics=statistics)
