"""Factors of a layer that match its function, not its matrix.

A layer y = phi(W x) with W (m, d) is to be trained as phi(U V^T x) with U (m, r) and V (d, r). Truncated singular
vectors give the nearest matrix; but the nearest function for Gaussian inputs has longer rows: for ReLU the projection
of row w with cosine rho to it should have length |w| kappa(rho) instead of |w| rho. That one rescaling of rows is what
``function`` does; ``function_optimized`` then improves U and V together on the exact loss, without sampling.

Reference: Vodrahalli et al. 2022, "Nonlinear Initialization Methods for Low-Rank Neural Networks" (arXiv:2202.00834);
spectral initialisation: Khodak et al. 2021 (arXiv:2105.01029).

Shapes: W (m, d) with m outputs and d inputs, U (m, r), V (d, r); W is approximated by U V^T.
"""

from __future__ import annotations

import math

import torch

from ghn_service.errors import InvalidOptionError
from ghn_service.postprocess.kernels import ActivationKernel, activation_kernel
from ghn_service.postprocess.options import require_known

SPECTRAL = "spectral"
FUNCTION = "function"
FUNCTION_OPTIMIZED = "function_optimized"
WHITENED = "whitened"
METHODS = (SPECTRAL, FUNCTION, FUNCTION_OPTIMIZED, WHITENED)

OPTIMIZER_STEPS = 40
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
            same directions with the best length for the activation), ``function_optimized`` (then ``steps``
            quasi-Newton steps on the exact loss) or ``whitened`` (``function`` for inputs of ``input_covariance``).
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


def loss_and_gradient(
    matrix: torch.Tensor, product: torch.Tensor, kernel: ActivationKernel
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss summed over rows, and its gradient (m, d) with respect to ``product``; both matrices are (m, d).

    With b = |y| and rho = w.y / (a b): dL/dy = L_b y / b + L_rho (w / a - rho y / b) / b.
    """
    target, length, cosine = _geometry(matrix, product)
    partials = kernel.partials(target, length, cosine)
    tiny = torch.finfo(matrix.dtype).tiny
    y_direction = product / length.clamp_min(tiny)[:, None]
    w_direction = matrix / target.clamp_min(tiny)[:, None]
    turn = (partials.by_cosine / length.clamp_min(tiny))[:, None] * (w_direction - cosine[:, None] * y_direction)
    return partials.loss.sum(), partials.by_length[:, None] * y_direction + turn


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
    left, values, right = truncated_svd(matrix, rank)
    roots = values.sqrt()
    u, v = left * roots, right * roots
    if method == SPECTRAL:
        return u, v
    u = rescale_rows(matrix, u, (left * values).norm(dim=1), kernel)
    if method == FUNCTION_OPTIMIZED:
        u, v = _optimize(matrix, u, v, kernel, steps)
    return u, v


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
    target = matrix.double().norm(dim=1)
    spectral = lengths.double()
    cosine = torch.where(target > 0, spectral / target.clamp_min(torch.finfo(torch.float64).tiny), 1.0).clamp(0.0, 1.0)
    best = kernel.best_length(target, cosine)
    scale = torch.where(spectral > 0, best / spectral.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
    return u * scale.to(u.dtype)[:, None]


def _optimize(
    matrix: torch.Tensor, u: torch.Tensor, v: torch.Tensor, kernel: ActivationKernel, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """L-BFGS on both factors in float64, from (u, v); the better of start and end."""
    # Predictions run in inference mode, whose tensors an optimizer cannot update; clones made outside of it are plain.
    with torch.inference_mode(False), torch.enable_grad():
        matrix64 = matrix.clone().double()
        factors = [u.clone().double().requires_grad_(), v.clone().double().requires_grad_()]
        scale = float(matrix64.square().sum()) or 1.0

        def closure() -> torch.Tensor:
            left, right = (factor.detach() for factor in factors)
            loss, gradient = loss_and_gradient(matrix64, left @ right.mT, kernel)
            factors[0].grad, factors[1].grad = gradient @ right / scale, gradient.mT @ left / scale
            return loss / scale

        start = closure()
        optimizer = torch.optim.LBFGS(factors, max_iter=steps, history_size=10, line_search_fn="strong_wolfe")
        optimizer.step(closure)  # type: ignore[no-untyped-call]
        end = closure()
    if not math.isfinite(float(end)) or float(end) >= float(start):
        return u, v
    return factors[0].detach().to(u.dtype), factors[1].detach().to(v.dtype)


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
