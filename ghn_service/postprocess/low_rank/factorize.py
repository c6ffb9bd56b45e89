"""Factors of a layer that match its function, not its matrix.

A layer y = phi(W x) with W (m, d) is to be trained as phi(U V^T x) with U (m, r) and V (d, r). Truncated singular
vectors give the nearest matrix; but the nearest function for Gaussian inputs has longer rows: for ReLU the projection
of row w with cosine rho to it should have length |w| kappa(rho) instead of |w| rho.

    spectral            truncated SVD, the square root of the singular values in either factor
    scaled              the same times one number, so that the product has the Frobenius norm of W
    function            the same directions, each row with the best length for the activation
    function_optimized  after a few quasi-Newton steps of the subspace on the exact loss (``subspace.py``)

Reference: Vodrahalli et al. 2022, "Nonlinear Initialization Methods for Low-Rank Neural Networks" (arXiv:2202.00834);
spectral initialisation: Khodak et al. 2021 (arXiv:2105.01029).

Shapes: W (m, d) with m outputs and d inputs, k = min(m, d), U (m, r), V (d, r); W is approximated by U V^T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ghn_service.errors import InvalidOptionError
from ghn_service.postprocess.low_rank.kernels import ActivationKernel, activation_kernel
from ghn_service.postprocess.low_rank.subspace import improve_subspace
from ghn_service.postprocess.options import require_known

SPECTRAL, SCALED, FUNCTION, FUNCTION_OPTIMIZED = "spectral", "scaled", "function", "function_optimized"
METHODS = (SPECTRAL, SCALED, FUNCTION, FUNCTION_OPTIMIZED)

OPTIMIZER_STEPS = 12
OPTIMIZER_TOLERANCE = 1e-5

Triplets = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def factorize(
    weight: torch.Tensor,
    rank: int,
    *,
    method: str = SCALED,
    activation: str = "relu",
    steps: int = OPTIMIZER_STEPS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors (u, v) such that ``phi(x @ v @ u.T)`` stands in for ``phi(x @ weight.T)``.

    Args:
        weight: (m, d), or a convolution's (m, channels, kernel...), which is read as (m, channels * kernel).
        rank: From 1 to min(m, d).
        method: One of ``METHODS``.
        activation: Name of the activation that follows, a key of ``ACTIVATION_KERNELS``; "" for none, where spectral is
            optimal and the function methods agree with it.
        steps: Most quasi-Newton steps of ``function_optimized``.

    Returns:
        u (m, r) and v (d, r) in the dtype of ``weight``, with ``u @ v.T`` in place of ``weight.flatten(1)``.

    Raises:
        InvalidOptionError: The weight, rank, method or activation is impossible; ``field`` names it.
    """
    require_known(method, METHODS, field="method")
    kernel = activation_kernel(activation)
    matrix = _as_matrix(weight)
    full_rank = min(matrix.shape)
    if rank not in range(1, full_rank + 1):
        raise InvalidOptionError(
            f"expected a rank from 1 to {full_rank} for a weight of shape {tuple(matrix.shape)}, got {rank!r}",
            field="rank",
        )
    u, v = factors_of(decompose(matrix), rank, method=method, kernel=kernel, steps=steps)
    return u.to(weight.dtype), v.to(weight.dtype)


@dataclass(frozen=True, eq=False, slots=True)
class Decomposition:
    """A matrix and the eigenvectors of its smaller Gram matrix: all that any rank and any method needs.

    Several times faster than a full SVD. Squaring loses directions whose energy is below the rounding of the dtype
    (1e-7 of the largest in float32), which no truncation wants.

    Attributes:
        matrix: W (m, d), in at least float32.
        vectors: Left singular vectors (m, m) if m <= d, else right ones (d, d); those of large energy first.
        energies: Squared singular values (k,), descending.
    """

    matrix: torch.Tensor
    vectors: torch.Tensor
    energies: torch.Tensor

    @property
    def is_wide(self) -> bool:
        """Whether ``vectors`` are the left ones."""
        return self.matrix.shape[0] <= self.matrix.shape[1]

    def truncated(self, rank: int) -> Triplets:
        """The leading singular triplets: left (m, r), values (r,), right (d, r).

        The values are the lengths of the projections themselves, so that the product is exact to rounding.
        """
        leading = self.vectors[:, :rank]
        projected = (self.matrix.mT if self.is_wide else self.matrix) @ leading
        values = projected.norm(dim=0)
        other = projected / values.clamp_min(torch.finfo(projected.dtype).tiny)
        return (leading, values, other) if self.is_wide else (other, values, leading)


def decompose(weight: torch.Tensor) -> Decomposition:
    """Decomposes (m, d), or (m, channels, kernel...) read as (m, channels * kernel).

    Raises:
        InvalidOptionError: The weight is no finite floating-point tensor of at least two axes.
    """
    matrix = _as_matrix(weight)
    is_wide = matrix.shape[0] <= matrix.shape[1]
    energies, vectors = torch.linalg.eigh(matrix @ matrix.mT if is_wide else matrix.mT @ matrix)
    return Decomposition(matrix, vectors.flip(1), energies.flip(0).clamp_min(0.0))


def factors_of(
    decomposition: Decomposition, rank: int, *, method: str, kernel: ActivationKernel, steps: int = OPTIMIZER_STEPS
) -> tuple[torch.Tensor, torch.Tensor]:
    """``factorize`` of a matrix that has been decomposed."""
    if method == FUNCTION_OPTIMIZED:
        left, values, right = _best_projection(decomposition, rank, kernel, steps)
    else:
        left, values, right = decomposition.truncated(rank)
    roots, matrix = values.sqrt(), decomposition.matrix
    if method == SCALED:
        roots = roots * (matrix.norm() / values.norm()).sqrt() if bool(values.any()) else roots
    u, v = left * roots, right * roots
    if method in (SPECTRAL, SCALED):
        return u, v
    # Each row of the product is the projection of its row of W, and gets the length that is best for the activation.
    target, lengths, tiny = matrix.norm(dim=1), (left * values).norm(dim=1), torch.finfo(matrix.dtype).tiny
    cosine = torch.where(target > 0, lengths / target.clamp_min(tiny), 1.0).clamp(0.0, 1.0)
    scale = torch.where(lengths > 0, kernel.best_length(target, cosine) / lengths.clamp_min(tiny), 1.0)
    return u * scale[:, None], v


def _best_projection(decomposition: Decomposition, rank: int, kernel: ActivationKernel, steps: int) -> Triplets:
    """Singular triplets of the projection of W onto the best subspace: left (m, r), values (r,), right (d, r).

    A wide W is replaced by its coordinates (m, m) in the span of its rows, which keep lengths and angles.
    """
    matrix, vectors = decomposition.matrix, decomposition.vectors
    if decomposition.is_wide:
        values = decomposition.energies.sqrt()
        start = torch.eye(len(values), dtype=matrix.dtype, device=matrix.device)[:, :rank]
        basis = improve_subspace(vectors * values, start, kernel, steps=steps, tolerance=OPTIMIZER_TOLERANCE)
        is_there = values > values.max() * torch.finfo(matrix.dtype).eps
        inverse = torch.where(is_there, 1 / values.clamp_min(torch.finfo(matrix.dtype).tiny), 0.0)
        basis = matrix.mT @ (vectors * inverse @ basis)
    else:
        basis = improve_subspace(matrix, vectors[:, :rank], kernel, steps=steps, tolerance=OPTIMIZER_TOLERANCE)
    orthonormal, _ = torch.linalg.qr(basis)
    left, values, turn = decompose(matrix @ orthonormal).truncated(rank)
    return left, values, orthonormal @ turn


def relative_function_error(
    weight: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    *,
    activation: str = "relu",
    normalized: bool = False,
) -> float:
    """The exact loss E|phi(u v^T x) - phi(W x)|^2 for x ~ N(0, I), relative to E|phi(W x)|^2.

    With ``normalized``, a normalisation before the activation gives every row of the product the length of its row of
    W, so that only directions matter.
    """
    matrix, product = _as_matrix(weight).double(), u.double() @ v.double().mT
    target, length = matrix.norm(dim=1), product.norm(dim=1)
    scale = (target * length).clamp_min(torch.finfo(matrix.dtype).tiny)
    cosine = ((matrix * product).sum(dim=1) / scale).clamp(-1.0, 1.0)
    kernel = activation_kernel(activation)
    loss = kernel.loss(target, target if normalized else length, cosine).sum()
    whole = float(kernel.second_moment(target).sum())
    return float(loss) / whole if whole > 0 else 0.0


def _as_matrix(weight: torch.Tensor) -> torch.Tensor:
    if weight.dim() < 2 or not weight.is_floating_point():
        raise InvalidOptionError(
            f"expected a floating-point weight of at least two axes, got {weight.dtype} {tuple(weight.shape)}",
            field="weight",
        )
    if not bool(torch.isfinite(weight).all()):
        raise InvalidOptionError("expected a finite weight, got NaN or infinity", field="weight")
    matrix = weight.flatten(1)
    return matrix if matrix.dtype == torch.float64 else matrix.float()
