"""Small questions about modules that every strategy asks: which layer is the head, which layers have a matrix."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd

from ghn_client.errors import InvalidOptionError, UnsupportedModuleError

MatrixLayer = nn.Linear | _ConvNd


def matrix_layers(module: nn.Module) -> dict[str, MatrixLayer]:
    """Linear and convolutional layers by dotted path, in the order of definition."""
    return {name: child for name, child in module.named_modules() if isinstance(child, (nn.Linear, _ConvNd))}


def find_head(module: nn.Module) -> str:
    """Dotted path of the classifier: the last linear (failing that, convolutional) layer in the order of definition.

    Raises:
        UnsupportedModuleError: The module has no such layer.
    """
    layers = matrix_layers(module)
    linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
    if not layers:
        raise UnsupportedModuleError("the module has no linear or convolutional layer that could serve as head")
    return linear[-1] if linear else list(layers)[-1]


def resolve_head(module: nn.Module, head: bool | str | Sequence[str]) -> tuple[str, ...]:
    """Names of the head layers that the option ``head`` of a strategy means.

    Args:
        module: Where the names live.
        head: ``True`` for :func:`find_head`, ``False`` for none, or one or several dotted paths.

    Raises:
        InvalidOptionError: A path does not exist.
    """
    if isinstance(head, bool):
        return (find_head(module),) if head else ()
    names = (head,) if isinstance(head, str) else tuple(head)
    known = dict(module.named_modules())
    for name in names:
        if name not in known:
            raise InvalidOptionError(f"head {name!r} is no submodule; the last ones are {list(known)[-8:]}")
    return names


def set_submodule(root: nn.Module, name: str, new: nn.Module) -> None:
    """Puts ``new`` at the dotted path ``name`` of ``root``."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, new)
