"""Which modules are normalization layers, also those of other libraries, found by structure.

A norm layer is a module of one of torch's norm classes, or one that looks like them: it owns nothing but
one-dimensional parameters, has an epsilon, and no child of its own with parameters (``LlamaRMSNorm``,
``T5LayerNorm``, timm's norm layers).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

BATCH_NORM = "batch_norm"
LAYER_NORM = "layer_norm"
GROUP_NORM = "group_norm"
INSTANCE_NORM = "instance_norm"
RMS_NORM = "rms_norm"

#: Names under which libraries keep the small constant of a norm layer.
EPSILON_ATTRIBUTES = ("eps", "epsilon", "variance_epsilon", "layer_norm_epsilon", "norm_eps")


@dataclass(frozen=True, eq=False)
class NormLayer:
    """One normalization layer inside a module.

    Attributes:
        name: Dotted path of the layer.
        module: The layer.
        kind: ``batch_norm``, ``layer_norm``, ``group_norm``, ``instance_norm`` or ``rms_norm``.
        parameters: Local name to parameter: the affine ones, empty where ``affine=False``.
    """

    name: str
    module: nn.Module
    kind: str
    parameters: dict[str, nn.Parameter]

    @property
    def has_running_statistics(self) -> bool:
        """True where evaluation normalises with stored statistics, which makes the layer affine in its input."""
        return getattr(self.module, "running_mean", None) is not None


def norm_kind(module: nn.Module) -> str | None:
    """The kind of norm layer that ``module`` is, or ``None``."""
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return INSTANCE_NORM
    if isinstance(module, _BatchNorm):
        return BATCH_NORM
    if isinstance(module, nn.LayerNorm):
        return LAYER_NORM
    if isinstance(module, nn.GroupNorm):
        return GROUP_NORM
    if isinstance(module, nn.RMSNorm):
        return RMS_NORM
    return _kind_by_structure(module)


def _kind_by_structure(module: nn.Module) -> str | None:
    if isinstance(module, _NormBase):
        return BATCH_NORM
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


def find_norm_layers(module: nn.Module) -> tuple[NormLayer, ...]:
    """All normalization layers of ``module`` in the order of its definition.

    A layer that is used under two names is listed once, under the first.
    """
    found = []
    for name, child in module.named_modules():
        kind = norm_kind(child)
        if kind is not None:
            found.append(NormLayer(name, child, kind, dict(child.named_parameters(recurse=False))))
    return tuple(found)
