"""Factors of a layer that match its function, not its matrix.

A layer y = phi(W x) with W (m, d) is to be trained as phi(U V^T x) with U (m, r) and V (d, r). Truncated singular
vectors give the nearest matrix; but the nearest function for Gaussian inputs has longer rows: for ReLU the projection
of row w with cosine rho to it should have length |w| kappa(rho) instead of |w| rho. That one rescaling of rows is what
``function`` does; ``function_optimized`` also improves the subspace on the exact loss (``subspace.py``).

Reference: Vodrahalli et al. 2022, "Nonlinear Initialization Methods for Low-Rank Neural Networks" (arXiv:2202.00834);
spectral initialisation: Khodak et al. 2021 (arXiv:2105.01029).

Shapes: W (m, d) with m outputs and d inputs, U (m, r), V (d, r); W is approximated by U V^T.
"""

from __future__ import annotations

import torch

from ghn_service.errors import InvalidOptionError
from ghn_service.postprocess.kernels import ActivationKernel, activation_kernel
from ghn_service.postprocess.options import require_known
from ghn_service.postprocess.subspace import improve_subspace

SPECTRAL = "spectral"
FUNCTION = "function"
FUNCTION_OPTIMIZED = "function_optimized"
WHITENED = "whitened"
METHODS = (SPECTRAL, FUNCTION, FUNCTION_OPTIMIZED, WHITENED)

OPTIMIZER_STEPS = 12
OPTIMIZER_TOLERANCE = 1e-5
COVARIANCE_RIDGE = 1e-6


def factorize(
    weight: torch.Tensor,
    rank: int,
    *,
    method: str = FUNCTION,
    activation: str = "relu",
    input_covariance: torch.Tensor | None = None,
    steps: int = OPTIMIZER_STEPS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors (u, v) such that ``phi(x @ v @ u.T)`` stands in for ``phi(x @ weight.T)``.

    Args:
        weight: (m, d), or a convolution's (m, channels, kernel...), which is read as (m, channels * kernel).
        rank: From 1 to min(m, d).
        method: ``spectral`` (truncated SVD, the square root of the singular values in either factor), ``function`` (the
            same directions with the best length for the activation), ``function_optimized`` (after at most ``steps``
            quasi-Newton steps of the subspace on the exact loss) or ``whitened`` (``function`` for inputs of
            ``input_covariance``).
        activation: Name of the activation that follows, a key of ``ACTIVATION_KERNELS``; "" for none, where spectral is
            optimal and the methods agree.
        input_covariance: Second moments (d, d) of the layer's inputs; None for white inputs. Every method honours it.
        steps: Quasi-Newton steps of ``function_optimized``.

    Returns:
        u (m, r) and v (d, r) in the dtype of ``weight``, with ``u @ v.T`` in place of ``weight.flatten(1)``.

    Raises:
        InvalidOptionError: The rank, method, activation or covariance is impossible; ``field`` names it.
    """
    require_known(method, METHODS, field="method")
    kernel = activation_kernel(activation)
    matrix = _as_matrix(weight)
    _check_rank(rank, matrix)
    if method == WHITENED and input_covariance is None:
        raise InvalidOptionError("method 'whitened' needs an input covariance", field="input_covariance")
    if input_covariance is None:
        u, v = _factorize_white(matrix, rank, method, kernel, steps)
    else:
        root = covariance_root(input_covariance, matrix)
        u, white_v = _factorize_white(matrix @ root, rank, method, kernel, steps)
        v = torch.linalg.solve_triangular(root.mT, white_v, upper=True)
    return u.to(weight.dtype), v.to(weight.dtype)


def function_loss(
    weight: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    *,
    activation: str = "relu",
    input_covariance: torch.Tensor | None = None,
) -> torch.Tensor:
    """The exact loss E[(phi(u v^T x) - phi(W x))^2] of each output for x ~ N(0, covariance): (m,), float64."""
    matrix = _as_matrix(weight).double()
    product = u.double() @ v.double().mT
    if input_covariance is not None:
        root = covariance_root(input_covariance, matrix)
        matrix, product = matrix @ root, product @ root
    target, length, cosine = _geometry(matrix, product)
    return activation_kernel(activation).loss(target, length, cosine)


def relative_function_error(
    weight: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    *,
    activation: str = "relu",
    input_covariance: torch.Tensor | None = None,
    normalized: bool = False,
) -> float:
    """The loss of all outputs, relative to the second moment E|phi(W x)|^2 of the layer.

    With ``normalized``, a normalisation before the activation gives every row of the product the length of its row of
    W, so that only directions matter.
    """
    matrix, product = _as_matrix(weight).double(), u.double() @ v.double().mT
    if input_covariance is not None:
        root = covariance_root(input_covariance, matrix)
        matrix, product = matrix @ root, product @ root
    kernel = activation_kernel(activation)
    target, length, cosine = _geometry(matrix, product)
    loss = kernel.loss(target, target if normalized else length, cosine).sum()
    whole = float(kernel.second_moment(target).sum())
    return float(loss) / whole if whole > 0 else 0.0


def truncated_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The leading singular triplets: left (m, r), values (r,), right (d, r).

    They come from the eigenvectors of the smaller Gram matrix, several times faster than a full SVD. Squaring loses
    directions whose energy is below the rounding of the dtype (1e-7 of the largest in float32), which no truncation
    wants; the values are the lengths of the projections themselves, so that the product is exact to rounding.
    """
    rows, columns = matrix.shape
    if rows <= columns:
        left = _leading_eigenvectors(matrix @ matrix.mT, rank)
        projected = matrix.mT @ left
        values = projected.norm(dim=0)
        return left, values, projected / values.clamp_min(torch.finfo(matrix.dtype).tiny)
    right = _leading_eigenvectors(matrix.mT @ matrix, rank)
    projected = matrix @ right
    values = projected.norm(dim=0)
    return projected / values.clamp_min(torch.finfo(matrix.dtype).tiny), values, right


def covariance_root(covariance: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """The lower Cholesky factor (d, d) of a covariance with a ridge of 1e-6 of its mean variance.

    Raises:
        InvalidOptionError: It is not a finite positive semi-definite (d, d) matrix.
    """
    size = matrix.shape[1]
    if tuple(covariance.shape) != (size, size):
        raise InvalidOptionError(
            f"expected an input covariance of shape ({size}, {size}), got {tuple(covariance.shape)}",
            field="input_covariance",
        )
    covariance = covariance.to(device=matrix.device, dtype=torch.float64)
    ridge = COVARIANCE_RIDGE * covariance.diagonal().mean()
    root, info = torch.linalg.cholesky_ex(covariance + ridge * torch.eye(size).to(covariance))
    if int(info) != 0 or not bool(torch.isfinite(root).all()):
        raise InvalidOptionError("expected a finite, positive semi-definite input covariance", field="input_covariance")
    factor: torch.Tensor = root.to(matrix.dtype)
    return factor


def _factorize_white(
    matrix: torch.Tensor, rank: int, method: str, kernel: ActivationKernel, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if method == FUNCTION_OPTIMIZED:
        left, values, right = _best_projection(matrix, rank, kernel, steps)
    else:
        left, values, right = truncated_svd(matrix, rank)
    roots = values.sqrt()
    u, v = left * roots, right * roots
    if method == SPECTRAL:
        return u, v
    return rescale_rows(matrix, u, (left * values).norm(dim=1), kernel), v


def _best_projection(
    matrix: torch.Tensor, rank: int, kernel: ActivationKernel, steps: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Singular triplets of the projection of W onto the best subspace: left (m, r), values (r,), right (d, r).

    A wide W (m < d) is replaced by its coordinates (m, m) in the span of its rows, which keep lengths and angles.
    """
    rows, columns = matrix.shape
    if rows < columns:
        energies, left = torch.linalg.eigh(matrix @ matrix.mT)
        values = energies.clamp_min(0.0).sqrt()
        start = torch.eye(rows, dtype=matrix.dtype, device=matrix.device)[:, -rank:]
        basis = improve_subspace(left * values, start, kernel, steps=steps, tolerance=OPTIMIZER_TOLERANCE)
        is_there = values > values.max() * torch.finfo(matrix.dtype).eps
        inverse = torch.where(is_there, 1 / values.clamp_min(torch.finfo(matrix.dtype).tiny), 0.0)
        basis = matrix.mT @ (left * inverse @ basis)
    else:
        start = _leading_eigenvectors(matrix.mT @ matrix, rank)
        basis = improve_subspace(matrix, start, kernel, steps=steps, tolerance=OPTIMIZER_TOLERANCE)
    orthonormal, _ = torch.linalg.qr(basis)
    left, values, turn = truncated_svd(matrix @ orthonormal, rank)
    return left, values, orthonormal @ turn


def rescale_rows(
    matrix: torch.Tensor, u: torch.Tensor, lengths: torch.Tensor, kernel: ActivationKernel
) -> torch.Tensor:
    """Gives each row of a projection the length that is best for the activation.

    Args:
        matrix: W (m, d).
        u: Left factor (m, r).
        lengths: Lengths (m,) of the rows of the product, which are projections of the rows of W.
        kernel: The activation.
    """
    target, tiny = matrix.norm(dim=1), torch.finfo(matrix.dtype).tiny
    cosine = torch.where(target > 0, lengths / target.clamp_min(tiny), 1.0).clamp(0.0, 1.0)
    best = kernel.best_length(target, cosine)
    scale = torch.where(lengths > 0, best / lengths.clamp_min(tiny), 1.0)
    return u * scale[:, None]


def _geometry(matrix: torch.Tensor, product: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lengths of the rows of either matrix and the cosines between them, each (m,)."""
    target, length = matrix.norm(dim=1), product.norm(dim=1)
    scale = (target * length).clamp_min(torch.finfo(matrix.dtype).tiny)
    return target, length, ((matrix * product).sum(dim=1) / scale).clamp(-1.0, 1.0)


def _leading_eigenvectors(gram: torch.Tensor, rank: int) -> torch.Tensor:
    vectors: torch.Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors[:, -rank:].flip(1)


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


def _check_rank(rank: int, matrix: torch.Tensor) -> None:
    full_rank = min(matrix.shape)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= full_rank:
        raise InvalidOptionError(
            f"expected a rank from 1 to {full_rank} for a weight of shape {tuple(matrix.shape)}, got {rank!r}",
            field="rank",
        )
