"""The step ``mimetic``: attention that starts as that of trained transformers looks.

In trained transformers the product of a head's queries and keys has a positive diagonal, and that of values and output
projection a negative one. A random start with these products trains better than independent random matrices.

Reference: Trockman and Kolter 2023, "Mimetic Initialization of Self-Attention Layers" (arXiv:2305.09828).

Shapes: C channels, heads of D; query, key and value weights (H * D, C), the output's (C, H * D).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ghn_service.graph.architecture import AttentionRole
from ghn_service.postprocess.options import require_at_least
from ghn_service.postprocess.weighted_layers import Change, WeightedLayer, as_matrices, from_matrices

MAX_HEADS = 128
_OVERSAMPLED, _ROUNDS = 8, 4
_VALUES = 0
"""Stands for the product of values and output among the products of an attention; heads count from 1."""


@dataclass(frozen=True, slots=True)
class Mimetic:
    """Draws attention anew, so that W_Q^T W_K of each head is near a Z + b I, and W_O W_V near c Z - d I.

    Z has entries of variance 1 / C. Only layers that keep the number of channels are drawn, in at most ``MAX_HEADS``
    heads; queries and keys share the best factors of rank D.

    Attributes:
        query_key_noise: a.
        query_key_identity: b.
        value_output_noise: c.
        value_output_identity: d.
        layer: First layer that is changed, counted from 1 in the order of the graph; 0 changes those in need.
    """

    name: ClassVar[str] = "mimetic"
    query_key_noise: float = 0.7
    query_key_identity: float = 0.7
    value_output_noise: float = 0.4
    value_output_identity: float = 0.4
    layer: int = 1

    def __post_init__(self) -> None:
        require_at_least(self.query_key_noise, 0.0, field="query_key_noise")
        require_at_least(self.query_key_identity, 0.0, field="query_key_identity")
        require_at_least(self.value_output_noise, 0.0, field="value_output_noise")
        require_at_least(self.value_output_identity, 0.0, field="value_output_identity")
        require_at_least(self.layer, 0, field="layer")

    def change(self, tensor: torch.Tensor, layer: WeightedLayer, generator: torch.Generator) -> Change:
        """The drawn weight; its counterparts in the same attention are drawn from the same seed."""
        role = layer.attributes.attention
        if role is None:
            return None, "no part of an attention whose heads are known", {}
        rows, channels = layer.spec.torch_shape[0] // layer.num_packed, layer.spec.torch_shape[1]
        width, inner = (rows, channels) if role.role == "output" else (channels, rows)
        if inner != width or inner % role.heads or role.heads > MAX_HEADS:  # drawing takes inner^2 values a head
            return None, f"{inner} channels of {width} in {role.heads} heads are not drawn", {}
        parts = [
            self._part(part, role, width, inner, generator.initial_seed())
            for part in (("query", "key", "value") if role.role == "query_key_value" else (role.role,))
        ]
        drawn = torch.stack(parts).to(tensor.device)
        rms_before = as_matrices(tensor, layer).square().mean().sqrt()
        reason = f"drawn with the diagonal that trained attention has, rms {float(drawn.square().mean().sqrt()):.3g}"
        return from_matrices(drawn, tensor, layer), reason, {"rms_before": float(rms_before)}

    def _part(self, part: str, role: AttentionRole, width: int, inner: int, seed: int) -> torch.Tensor:
        """The weight of one projection."""
        if part in ("value", "output"):
            signs = (self.value_output_noise, -self.value_output_identity)
            output, value = _factors(width, inner, *signs, seed=_seed(seed, role.number, _VALUES))
            return value if part == "value" else output.T
        heads = [
            _factors(
                *(width, inner // role.heads, self.query_key_noise, self.query_key_identity),
                seed=_seed(seed, role.number, head),
            )[part == "key"]
            for head in range(1, role.heads + 1)
        ]
        return torch.cat(heads)


def _factors(
    channels: int, rank: int, noise: float, identity: float, *, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """L and R (rank, channels) with L^T R the best approximation of ``noise`` Z + ``identity`` I."""
    generator = torch.Generator().manual_seed(seed)
    matrix = noise / channels**0.5 * torch.randn(channels, channels, generator=generator)
    matrix.diagonal().add_(identity)
    basis = torch.eye(channels)
    if rank + _OVERSAMPLED < channels // 2:  # subspace iteration finds a few leading directions much faster
        basis = torch.randn(channels, rank + _OVERSAMPLED, generator=generator)
        for _ in range(_ROUNDS):
            basis = torch.linalg.qr(matrix @ (matrix.T @ basis)).Q
    left, sizes, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    roots = sizes[:rank].sqrt()[:, None]
    return roots * (basis @ left[:, :rank]).T, roots * right[:rank]


def _seed(seed: int, number: int, product: int) -> int:
    return (seed + number * 0x9E3779B97F4A7C15 + product * 0xBF58476D1CE4E5B9) % 2**63
