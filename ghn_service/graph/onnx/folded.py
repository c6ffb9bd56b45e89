"""Parameters of which a file holds only what an exporter computed from them.

torch's default optimisation evaluates whatever depends on no data, and lists on the result what went into it.
Two results occur in almost every vision transformer, and for both the parameter's own shape follows from theirs:

* a class token expanded along the batch axis, (B, 1, C) from (1, 1, C);
* the relative position bias of square windows (arXiv:2103.14030): the table ((2w - 1)^2, H), read at the differences of
  all pairs of the w^2 positions of a window, as (1, H, w^2, w^2) or an earlier stage of it.

Legend: B examples, C channels, H heads, w rows and columns of a window.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable

FOLDED_KEY = "pkg.onnxscript.optimizer.folded_from"
TABLE_LEAF = "relative_position_bias_table"
"""What the table is called in torchvision, timm and transformers alike."""

_MAX_TEXT = 20_000
# Leaf names of tensors that modules keep but do not train, and of constants that the exporter names after modules.
_NOT_TRAINED = frozenset(
    {"relative_position_index", "relative_coords_table", "attention_bias_idxs", "running_mean", "running_var",
     "num_batches_tracked", "attn_mask"}
)  # fmt: skip
_LIFTED = re.compile(r"lifted_tensor_\d+$")
# Results of traced operators and of the exporter's own functions; names with a dot are never among them.
_COMPUTED = re.compile(
    r"(?:_?val|expand|expand_as|view|reshape|flatten|permute|transpose|t|unsqueeze|squeeze|clone|contiguous|repeat|tile"
    r"|index|select|slice|narrow|cat|stack|split|getitem|chunk|roll|add|sub|mul|div|neg|pow|exp|log|sqrt|rsqrt|abs|sign"
    r"|sigmoid|tanh|relu|softmax|linear|mm|addmm|matmul|mean|sum|clamp|clamp_max|clamp_min|where|eq|ne|ge|gt|le|lt|masked_fill"
    r"|cos|sin|atan|erf|gelu|silu|floor|ceil|round|pad|cumsum|norm|rsub|bmm|outer|minimum|maximum|gather|scatter|remainder"
    r"|floor_divide|reciprocal|square|amax|amin|argmax|sort|linspace|meshgrid|unbind|unflatten|stack|concat|dropout"
    r"|full|full_like|zeros|zeros_like|ones|ones_like|new_zeros|new_ones|empty|empty_like|arange|fill|scalar_tensor"
    r"|_?to|_to_copy|type_as|detach|alias|copy|upsample_bicubic2d|upsample_bilinear2d|shape|self_float|p|p_cast|value"
    r"|size|dim|start|end|step|scalar_tensor_default|lift_fresh_copy|\w+_default)(?:_\d+)*"
)


def string_list(text: str) -> list[str]:
    """The strings of a Python list literal, as exporters write them into metadata; empty if it is none."""
    try:
        value = ast.literal_eval(text) if text.startswith("[") and len(text) < _MAX_TEXT else []
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def folded_parameters(names: Iterable[str]) -> tuple[str, ...]:
    """The ``state_dict`` keys of parameters among the values that a folded tensor was computed from."""
    trained = []
    for name in names:
        leaf = name.rpartition(".")[2]
        is_other = leaf in _NOT_TRAINED or _LIFTED.match(leaf)
        if not is_other and ("." in name or _COMPUTED.fullmatch(name) is None):
            trained.append(name)
    return tuple(trained)


def token_shape(shape: tuple[int, ...], batch: int | None) -> tuple[int, ...]:
    """Shape of the token that was expanded to ``shape`` = (B, T, C): no parameter differs between examples.

    Returns:
        (1, T, C); empty if ``shape`` is no expanded token's.
    """
    return (1, *shape[1:]) if len(shape) == 3 and shape[0] == batch else ()


def is_table(names: tuple[str, ...]) -> bool:
    """Whether what was computed from these parameters was read from a table of relative position biases."""
    return len(names) == 1 and names[0].rpartition(".")[2] == TABLE_LEAF


def table_shape(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Shape ((2w - 1)^2, H) of the table behind the relative position bias ``shape``; None if it is no such bias.

    A bias has one of the shapes ([1,] H, w^2, w^2), (w^2, w^2, H) and (w^4, H); rectangular windows are not told apart.
    """
    sizes = shape[1:] if len(shape) == 4 and shape[0] == 1 else shape
    if len(sizes) == 3 and sizes[1] == sizes[2]:
        heads, area = sizes[0], sizes[1]
    elif len(sizes) == 3 and sizes[0] == sizes[1]:
        heads, area = sizes[2], sizes[0]
    elif len(sizes) == 2 and math.isqrt(sizes[0]) ** 2 == sizes[0]:
        heads, area = sizes[1], math.isqrt(sizes[0])
    else:
        return None
    side = math.isqrt(area)
    return ((2 * side - 1) ** 2, heads) if side > 1 and side * side == area else None
