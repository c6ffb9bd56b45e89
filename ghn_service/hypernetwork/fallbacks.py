"""Rules that initialise tensors which no hypernetwork predicts: class tokens, layer scales, recurrent weights, ...

``ParameterSpec.fallback`` names the rule; the origin of the tensor in a reply is ``fallback:<rule>``. A new rule is a
function and its line in ``FALLBACKS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ghn_service.errors import PredictionError

SMALL_STD = 0.02
LAYER_SCALE = 1e-6
PRELU_SLOPE = 0.25

FallbackRule = Callable[[Tensor, torch.Generator], None]


def zeros(out: Tensor, generator: torch.Generator) -> None:
    """Zero: relative position tables, biases."""
    out.zero_()


def ones(out: Tensor, generator: torch.Generator) -> None:
    """One: weights of normalisations without a node type of their own."""
    out.fill_(1.0)


def layer_scale(out: Tensor, generator: torch.Generator) -> None:
    """1e-6, the start of ConvNeXt's layer scale (arXiv:2201.03545)."""
    out.fill_(LAYER_SCALE)


def prelu(out: Tensor, generator: torch.Generator) -> None:
    """0.25, the first slope of a PReLU (arXiv:1502.01852)."""
    out.fill_(PRELU_SLOPE)


def kaiming_normal(out: Tensor, generator: torch.Generator) -> None:
    """N(0, 2 / fan-in) (arXiv:1502.01852); without a fan-in (fewer than two axes) ``truncated_normal``."""
    if out.dim() < 2:
        truncated_normal(out, generator)
    else:
        out.normal_(0.0, math.sqrt(2.0 / math.prod(out.shape[1:])), generator=generator)


def truncated_normal(out: Tensor, generator: torch.Generator) -> None:
    """N(0, 0.02) within two standard deviations, as vision transformers initialise tokens."""
    torch.nn.init.trunc_normal_(out, std=SMALL_STD, a=-2 * SMALL_STD, b=2 * SMALL_STD, generator=generator)


def embedding_normal(out: Tensor, generator: torch.Generator) -> None:
    """N(0, 0.02), as language models initialise lookup tables."""
    out.normal_(0.0, SMALL_STD, generator=generator)


def recurrent_uniform(out: Tensor, generator: torch.Generator) -> None:
    """Uniform within the inverse square root of the last axis, which is the hidden size for recurrent weights."""
    bound = 1.0 / math.sqrt(out.shape[-1]) if out.dim() else 1.0
    out.uniform_(-bound, bound, generator=generator)


FALLBACKS: dict[str, FallbackRule] = {
    "zeros": zeros,
    "ones": ones,
    "layer_scale": layer_scale,
    "prelu": prelu,
    "kaiming_normal": kaiming_normal,
    "truncated_normal": truncated_normal,
    "embedding_normal": embedding_normal,
    "recurrent_uniform": recurrent_uniform,
}


def fallback_rule(name: str) -> FallbackRule:
    """The rule of this name.

    Raises:
        PredictionError: There is none.
    """
    if name not in FALLBACKS:
        raise PredictionError(f"no rule {name!r} to initialise a tensor; known are {', '.join(FALLBACKS)}")
    return FALLBACKS[name]
