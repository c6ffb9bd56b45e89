"""The two-variable kernel of an activation: how much two neurons with Gaussian inputs have in common.

For x ~ N(0, I), rows w and y of lengths a and b, and rho the cosine between them, the kernel is
K(a, b, rho) = E[phi(w.x) phi(y.x)], and the error of y standing in for w is

    E[(phi(y.x) - phi(w.x))^2] = K(a, a, 1) + K(b, b, 1) - 2 K(a, b, rho).

For ReLU the kernel is the arc-cosine kernel of degree 1, and the same closed form holds for every activation that is
linear on either side of zero. Smooth activations are expanded in normalised Hermite polynomials h_k, whose products
have the means E[h_k(u) h_l(v)] = rho^k [k = l] for standard normal u and v of correlation rho (Mehler 1866), so that

    K(a, b, rho) = sum_k c_k(a) c_k(b) rho^k  with  c_k(a) = E[phi(a z) h_k(z)].

The c_k come from Gauss-Hermite quadrature. With 64 nodes and rows no longer than 2 (He initialisation makes them 1.4)
the error is below 1e-5 of the loss for GELU, SiLU and Mish, and below 2e-4 for tanh, with its poles near the axis.

References: Cho and Saul 2009, "Kernel Methods for Deep Learning"; Daniely et al. 2016 (arXiv:1602.05897) for expansions
of dual activations; Vodrahalli et al. 2022 (arXiv:2202.00834) for their use in low-rank initialisation.

Shapes: lengths and cosines are (M,), one entry for each output channel; expansions add an axis of n nodes or degrees.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch.nn import functional

from ghn_service.postprocess.options import unknown_name

NODES = 64
# Lengths that are tried first, in units of the longest row: from 1/750 to 3/2, 2.6% apart.
SHORTEST, LONGEST, NUM_LENGTHS = 0.002, 1.5, 256
LARGEST_SLOPE = 1e3


@dataclass(frozen=True, slots=True)
class PiecewiseLinear:
    """phi(x) = x for x > 0 and ``slope`` times x below: ReLU (0), leaky ReLU, identity (1). Exact.

    With kappa(rho) = (sqrt(1 - rho^2) + (pi - arccos rho) rho) / pi and phi = slope x + (1 - slope) relu(x), the
    kernel is a b k(rho) with k(rho) = slope rho + (1 - slope)^2 kappa(rho) / 2.
    """

    slope: float

    def _kernel(self, cosine: torch.Tensor) -> torch.Tensor:
        return self.slope * cosine + (1 - self.slope) ** 2 * arc_cosine_kernel(cosine) / 2

    def second_moment(self, length: torch.Tensor) -> torch.Tensor:
        """E[phi(a z)^2] = a^2 (1 + slope^2) / 2."""
        return (1 + self.slope**2) / 2 * length.square()

    def loss(self, target: torch.Tensor, length: torch.Tensor, cosine: torch.Tensor) -> torch.Tensor:
        """E[(phi(y.x) - phi(w.x))^2] for |w| = target, |y| = length, all (M,); never below zero."""
        common = target * length * self._kernel(cosine)
        return (self.second_moment(target) + self.second_moment(length) - 2 * common).clamp_min(0.0)

    def loss_by_cosine(self, target: torch.Tensor, length: torch.Tensor, cosine: torch.Tensor) -> torch.Tensor:
        """The derivative (M,) of the loss by the cosine: -2 a b k'(rho), with kappa'(rho) = (pi - arccos rho) / pi."""
        slope_of_kappa = (math.pi - torch.arccos(cosine.clamp(-1.0, 1.0))) / math.pi
        return -2 * target * length * (self.slope + (1 - self.slope) ** 2 * slope_of_kappa / 2)

    def best_length(self, target: torch.Tensor, cosine: torch.Tensor) -> torch.Tensor:
        """The length (M,) of least loss in the given direction: a k(rho) / k(1), which for ReLU is a kappa(rho)."""
        return (target * self._kernel(cosine) / ((1 + self.slope**2) / 2)).clamp_min(0.0)


@dataclass(frozen=True)
class Quadrature:
    """Any activation, by its Hermite coefficients from Gauss-Hermite quadrature with ``nodes`` nodes.

    On n nodes the first n normalised Hermite polynomials are an orthonormal basis, so that sums over coefficients equal
    sums over nodes, and the loss of a row against itself is exactly zero.
    """

    function: Callable[[torch.Tensor], torch.Tensor]
    nodes: int = NODES

    def second_moment(self, length: torch.Tensor) -> torch.Tensor:
        """K(a, a, 1) = sum_k c_k(a)^2."""
        return self._coefficients(length).square().sum(dim=1)

    def loss(self, target: torch.Tensor, length: torch.Tensor, cosine: torch.Tensor) -> torch.Tensor:
        """sum_k c_k(a)^2 + c_k(b)^2 - 2 c_k(a) c_k(b) rho^k; never below zero."""
        wanted, given = self._coefficients(target), self._coefficients(length)
        common = wanted * given * self._powers(cosine)
        return (wanted.square() + given.square() - 2 * common).sum(dim=1).clamp_min(0.0)

    def loss_by_cosine(self, target: torch.Tensor, length: torch.Tensor, cosine: torch.Tensor) -> torch.Tensor:
        """-2 sum_k k c_k(a) c_k(b) rho^(k - 1)."""
        products = self._coefficients(target)[:, 1:] * self._coefficients(length)[:, 1:]
        degrees = torch.arange(1, self.nodes).to(products)
        return -2 * (degrees * products * self._powers(cosine)[:, :-1]).sum(dim=1)

    def best_length(self, target: torch.Tensor, cosine: torch.Tensor) -> torch.Tensor:
        """The best of a logarithmic grid of lengths, refined by a parabola; or a rho where that is better.

        The coefficients of the grid are the same for all rows, so that trying all lengths for all rows is one product
        of matrices. The parabola leaves an error of 1e-4 of the length, which adds 1e-8 to the relative loss.
        """
        longest = target.max().clamp_min(torch.finfo(target.dtype).tiny) if target.numel() else target.new_ones(())
        low, high = math.log(SHORTEST), math.log(LONGEST)
        tried = longest * torch.linspace(low, high, NUM_LENGTHS, dtype=torch.float64).exp().to(target)
        of_tried = self._coefficients(tried)
        expected = self._coefficients(target) * self._powers(cosine)
        losses = of_tried.square().sum(dim=1) - 2 * expected @ of_tried.mT  # (M, NUM_LENGTHS), less what is constant
        middle = losses.argmin(dim=1, keepdim=True).clamp(1, NUM_LENGTHS - 2)
        left, centre, right = (losses.gather(1, middle + offset)[:, 0] for offset in (-1, 0, 1))
        bend = (left - 2 * centre + right).clamp_min(torch.finfo(target.dtype).tiny)
        shift = ((left - right) / (2 * bend)).clamp(-1.0, 1.0) * (high - low) / (NUM_LENGTHS - 1)
        best, projected = tried[middle[:, 0]] * shift.exp(), target * cosine
        return torch.where(self._against(expected, best) < self._against(expected, projected), best, projected)

    def _against(self, expected: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """The loss of lengths (M,) without its constant part; ``expected`` holds c_k(a) rho^k (M, n)."""
        given = self._coefficients(length)
        return ((given - 2 * expected) * given).sum(dim=1)

    def _coefficients(self, length: torch.Tensor) -> torch.Tensor:
        """c_k (M, n) for lengths (M,)."""
        points, transform = (value.to(length) for value in gauss_hermite(self.nodes))
        return self.function(length[:, None] * points) @ transform

    def _powers(self, cosine: torch.Tensor) -> torch.Tensor:
        """rho^k (M, n)."""
        return cosine.clamp(-1.0, 1.0)[:, None] ** torch.arange(self.nodes, device=cosine.device)


@lru_cache(maxsize=8)
def gauss_hermite(nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points t_j (n,) and the matrix w_j h_k(t_j) (n, n) that turns values on them into Hermite coefficients.

    Both come from the eigenvectors of the Jacobi matrix of the Hermite polynomials (Golub and Welsch 1969), which are
    sqrt(w_j) h_k(t_j): exact for any number of nodes, where the polynomials themselves would overflow.
    """
    off_diagonal = np.sqrt(np.arange(1, nodes))
    points, vectors = np.linalg.eigh(np.diag(off_diagonal, 1) + np.diag(off_diagonal, -1))
    roots = np.abs(vectors[0])  # the square roots of the weights
    transform = (vectors * np.sign(vectors[0]) * roots).T
    with torch.inference_mode(False):  # kept for later calls, which may be outside of it
        return torch.from_numpy(points.copy()), torch.from_numpy(transform.copy())


def arc_cosine_kernel(cosine: torch.Tensor) -> torch.Tensor:
    """kappa(rho) = (sqrt(1 - rho^2) + (pi - arccos rho) rho) / pi, from 0 at -1 over 1/pi at 0 to 1 at 1."""
    rho = cosine.clamp(-1.0, 1.0)
    return ((1 - rho.square()).clamp_min(0.0).sqrt() + (math.pi - torch.arccos(rho)) * rho) / math.pi


ActivationKernel = PiecewiseLinear | Quadrature
"""The kernel of one activation, evaluated row by row."""

ACTIVATION_KERNELS: dict[str, ActivationKernel] = {
    "": PiecewiseLinear(slope=1.0),
    "identity": PiecewiseLinear(slope=1.0),
    "relu": PiecewiseLinear(slope=0.0),
    # Rows as long as He initialisation makes them never reach 6: the probability is below 1e-4.
    "relu6": PiecewiseLinear(slope=0.0),
    "leaky_relu": PiecewiseLinear(slope=0.01),
    "gelu": Quadrature(functional.gelu),
    "gelu_tanh": Quadrature(partial(functional.gelu, approximate="tanh")),
    "silu": Quadrature(functional.silu),
    "swish": Quadrature(functional.silu),
    "mish": Quadrature(functional.mish),
    "softplus": Quadrature(functional.softplus),
    "elu": Quadrature(functional.elu),
    "celu": Quadrature(functional.celu),
    "selu": Quadrature(functional.selu),
    "hardswish": Quadrature(functional.hardswish),
    "hardsigmoid": Quadrature(functional.hardsigmoid),
    "softsign": Quadrature(functional.softsign),
    "tanh": Quadrature(torch.tanh),
    "sigmoid": Quadrature(torch.sigmoid),
}


def activation_kernel(name: str) -> ActivationKernel:
    """The kernel of an activation; ``leaky_relu:0.2`` is a leaky ReLU with that slope below zero.

    Raises:
        InvalidOptionError: The activation has no kernel here.
    """
    if (kernel := find_kernel(name)) is None:
        raise unknown_name("activation", name, ACTIVATION_KERNELS, field="activation")
    return kernel


def find_kernel(name: str) -> ActivationKernel | None:
    """The kernel of an activation, or None; a leaky ReLU has one if its slope is no number that overflows."""
    base, separator, slope = name.partition(":")
    if not separator:
        return ACTIVATION_KERNELS.get(base)
    try:
        is_known = base == "leaky_relu" and abs(float(slope)) <= LARGEST_SLOPE
    except ValueError:
        return None
    return PiecewiseLinear(slope=float(slope)) if is_known else None
