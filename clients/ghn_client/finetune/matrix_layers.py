"""What every strategy asks about a module's layers: which have a matrix, which normalise, which is the head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from ghn_client.errors import InvalidOptionError, UnsupportedModuleError

MatrixLayer = nn.Linear | _ConvNd

BATCH_NORM, LAYER_NORM, RMS_NORM = "batch_norm", "layer_norm", "rms_norm"
_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (_InstanceNorm, "instance_norm"),
    (_BatchNorm, BATCH_NORM),
    (nn.LayerNorm, LAYER_NORM),
    (nn.GroupNorm, "group_norm"),
    (nn.RMSNorm, RMS_NORM),
    (_NormBase, BATCH_NORM),
)
#: Names under which libraries keep the small constant of a norm layer.
EPSILON_ATTRIBUTES = ("eps", "epsilon", "variance_epsilon", "layer_norm_epsilon", "norm_eps")


def matrix_layers(module: nn.Module) -> dict[str, MatrixLayer]:
    """Linear and convolutional layers by dotted path, in the order of definition."""
    return {name: child for name, child in module.named_modules() if isinstance(child, (nn.Linear, _ConvNd))}


def shared_parameters(module: nn.Module) -> set[int]:
    """Ids of the parameters that more than one submodule holds, such as tied weights."""
    held = Counter(id(value) for part in module.modules() for value in part._parameters.values() if value is not None)
    return {identity for identity, holders in held.items() if holders > 1}


def remove_parametrization(owner: nn.Module, leaf: str, *, keep: bool) -> None:
    """Makes the tensor ``leaf`` of ``owner`` plain again: its computed value to ``keep``, else the original one."""
    # A class of its own: copies of a parametrized module share theirs, and torch would take the tensor off all.
    shared = type(owner)
    owner.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))
    parametrize.remove_parametrizations(owner, leaf, leave_parametrized=keep)


def norm_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Normalization layers by dotted path, in the order of definition, those without affine parameters included."""
    return {name: child for name, child in module.named_modules() if norm_kind(child) is not None}


def norm_kind(module: nn.Module) -> str | None:
    """``batch_norm``, ``layer_norm``, ``group_norm``, ``instance_norm`` or ``rms_norm``; ``None`` for other modules.

    Layers of other libraries (``LlamaRMSNorm``, ``T5LayerNorm``, timm's) are found by structure: they own nothing but
    one-dimensional parameters, have an epsilon, and no child with parameters.
    """
    for known, kind in _KINDS:
        if isinstance(module, known):
            return kind
    parameters = dict(module.named_parameters(recurse=False))
    looks_like_norm = (
        bool(parameters)
        and all(parameter.dim() == 1 for parameter in parameters.values())
        and any(isinstance(getattr(module, name, None), float) for name in EPSILON_ATTRIBUTES)
        and not any(True for child in module.children() for _ in child.parameters())
    )
    if not looks_like_norm:
        return None
    if "running_mean" in dict(module.named_buffers(recurse=False)):
        return BATCH_NORM
    return LAYER_NORM if len(parameters) > 1 else RMS_NORM


def find_head(module: nn.Module) -> str:
    """Dotted path of the classifier: the last linear (failing that, convolutional) layer in the order of definition."""
    layers = matrix_layers(module)
    linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
    if not layers:
        raise UnsupportedModuleError("the module has no linear or convolutional layer that could serve as head")
    return linear[-1] if linear else list(layers)[-1]


def resolve_head(module: nn.Module, head: bool | str | Sequence[str]) -> tuple[str, ...]:
    """Names of the head layers that the option ``head`` of a strategy means.

    It is ``True`` for :func:`find_head`, ``False`` for none, or one or several dotted paths.
    """
    if isinstance(head, bool):
        return (find_head(module),) if head else ()
    names = (head,) if isinstance(head, str) else tuple(head)
    known = dict(module.named_modules())
    for name in names:
        if name not in known:
            raise InvalidOptionError(
                f"head {name!r} is no submodule; the last ones are {list(known)[-8:]}", field="head"
            )
    return names


def parameters_under(module: nn.Module, layers: Iterable[str]) -> list[str]:
    """Dotted paths of all parameters of the layers with these dotted paths."""
    found = []
    for layer in layers:
        prefix = f"{layer}." if layer else ""
        found += [prefix + name for name, _ in module.get_submodule(layer).named_parameters()]
    return found


def parameter_groups(module: nn.Module, group: str, tuned: Iterable[str], head: Iterable[str]) -> dict[str, list[str]]:
    """Groups of a strategy: what it tunes, under its own name, and what else belongs to the head layers."""
    own = list(tuned)
    rest = [name for name in parameters_under(module, head) if name not in own]
    return {name: members for name, members in ((group, own), ("head", rest)) if members}
