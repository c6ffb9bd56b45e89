"""The two-variable kernel of an activation: how much two neurons with Gaussian inputs have in common.

For x ~ N(0, I), rows w and y of lengths a and b, and rho the cosine between them, the kernel is
K(a, b, rho) = E[phi(w.x) phi(y.x)], and the error of y standing in for w is

    E[(phi(y.x) - phi(w.x))^2] = K(a, a, 1) + K(b, b, 1) - 2 K(a, b, rho).

For ReLU the kernel is the arc-cosine kernel of degree 1, and the same closed form holds for every activation that is
linear on either side of zero. Smooth activations are integrated by Gauss-Hermite quadrature, whose error with 32 nodes
is below 1e-4 of the loss for rows as long as He initialisation makes them (tanh, with its poles near the axis: 5e-3).

References: Cho and Saul 2009, "Kernel Methods for Deep Learning"; Vodrahalli et al. 2022 (arXiv:2202.00834) for its use
in low-rank initialisation.

Shapes: lengths and cosines are (M,), one entry for each output channel; quadrature adds axes of n nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch.nn import functional

from ghn_service.postprocess.options import unknown_name

NODES = 32
CHUNK = 2048


class Partials(NamedTuple):
    """Error of each row, and its derivatives with respect to the length b and the cosine rho; each (M,)."""

    loss: torch.Tensor
    by_length: torch.Tensor
    by_cosine: torch.Tensor


class ActivationKernel(Protocol):
    """The kernel of one activation, evaluated row by row."""

    def second_moment(self, length: torch.Tensor) -> torch.Tensor:
        """K(a, a, 1) = E[phi(a z)^2] for lengths (M,)."""
        ...

    def loss(self, target: torch.Tensor, length: torch.Tensor, cosine: torch.Tensor) -> torch.Tensor:
        """E[(phi(y.x) - phi(w.x))^2] for |w| = target, |y| = length; all (M,)."""
        ...

    def partials(self, target: torch.Tensor, length: torch.Tensor, cosine: torch.Tensor) -> Partials:
        """The loss with its derivatives."""
        ...

    def best_length(self, target: torch.Tensor, cosine: torch.Tensor) -> torch.Tensor:
        """The length b (M,) of least loss for the given direction, at least as good as the projection's, a rho."""
        ...


@dataclass(frozen=True, slots=True)
class PiecewiseLinear:
    """phi(x) = x for x > 0 and ``slope`` times x below: ReLU (0), leaky ReLU, identity (1). Exact.

    With kappa(rho) = (sqrt(1 - rho^2) + (pi - arccos rho) rho) / pi and phi = slope x + (1 - slope) relu(x), the
    kernel is a b k(rho) with k(rho) = slope rho + (1 - slope)^2 kappa(rho) / 2.
    """

    slope: float

    @property
    def _at_one(self) -> float:
        return (1 + self.slope**2) / 2

    def _kernel(self, cosine: torch.Tensor) -> torch.Tensor:
        return self.slope * cosine + (1 - self.slope) ** 2 * arc_cosine_kernel(cosine) / 2

    def second_moment(self, length: torch.Tensor) -> torch.Tensor:
        """E[phi(a z)^2] = a^2 (1 + slope^2) / 2."""
        return self._at_one * length.square()

    def loss(self, target: torch.Tensor, length: torch.Tensor, cosine: torch.Tensor) -> torch.Tensor:
        """The closed form; never below zero."""
        common = target * length * self._kernel(cosine)
        return (self.second_moment(target) + self.second_moment(length) - 2 * common).clamp_min(0.0)

    def partials(self, target: torch.Tensor, length: torch.Tensor, cosine: torch.Tensor) -> Partials:
        """The closed form and its derivatives; kappa'(rho) = (pi - arccos rho) / pi."""
        slope_of_kappa = (math.pi - torch.arccos(cosine.clamp(-1.0, 1.0))) / math.pi
        slope_of_kernel = self.slope + (1 - self.slope) ** 2 * slope_of_kappa / 2
        by_length = 2 * self._at_one * length - 2 * target * self._kernel(cosine)
        return Partials(self.loss(target, length, cosine), by_length, -2 * target * length * slope_of_kernel)

    def best_length(self, target: torch.Tensor, cosine: torch.Tensor) -> torch.Tensor:
        """The stationary point a k(rho) / k(1), which for ReLU is a kappa(rho)."""
        return (target * self._kernel(cosine) / self._at_one).clamp_min(0.0)


@dataclass(frozen=True)
class Quadrature:
    """Any activation, integrated with ``nodes`` Gauss-Hermite nodes along each of two variables.

    With y.x = b t for a standard normal t, and w.x = a (rho t + sqrt(1 - rho^2) g), everything about w that y can match
    is the function h(t) = E_g[phi(w.x)]; once it is known on the nodes, the loss for any b is a one-dimensional sum.
    """

    function: Callable[[torch.Tensor], torch.Tensor]
    nodes: int = NODES

    def second_moment(self, length: torch.Tensor) -> torch.Tensor:
        """E[phi(a z)^2] on the nodes."""
        points, weights = self._rule(length)
        return (self.function(length[:, None] * points).square() * weights).sum(dim=1)

    def loss(self, target: torch.Tensor, length: torch.Tensor, cosine: torch.Tensor) -> torch.Tensor:
        """The quadrature of the loss; never below zero."""
        expected = self._expected(target, cosine)
        points, weights = self._rule(length)
        values = self.function(length[:, None] * points)
        return (self.second_moment(target) + ((values - 2 * expected) * values * weights).sum(dim=1)).clamp_min(0.0)

    def partials(self, target: torch.Tensor, length: torch.Tensor, cosine: torch.Tensor) -> Partials:
        """The loss, differentiated through the quadrature."""
        with torch.enable_grad():
            length, cosine = (value.detach().requires_grad_() for value in (length, cosine))
            loss = self.loss(target, length, cosine)
            by_length, by_cosine = torch.autograd.grad(loss.sum(), (length, cosine))
        return Partials(loss.detach(), by_length, by_cosine)

    def best_length(self, target: torch.Tensor, cosine: torch.Tensor) -> torch.Tensor:
        """A golden-section search between 0 and 1.5 a, or a rho where that is better; in float32, to 1e-3 of a.

        An error of 1e-3 in the length adds 1e-6 to the relative loss, since the loss is flat at its minimum.
        """
        a, rho = target.float(), cosine.float()
        expected = self._expected(a, rho)
        points, weights = self._rule(a)

        def objective(length: torch.Tensor) -> torch.Tensor:
            values = self.function(length[:, None] * points)
            return ((values - 2 * expected) * values * weights).sum(dim=1)

        best, projected = golden_section(objective, torch.zeros_like(a), 1.5 * a), a * rho
        return torch.where(objective(best) < objective(projected), best, projected).to(target.dtype)

    def _expected(self, target: torch.Tensor, cosine: torch.Tensor) -> torch.Tensor:
        """The function h (M, n): the mean of phi(w.x) given t, on the nodes of t."""
        points, weights = self._rule(target)
        rows = []
        for a, rho in zip(torch.split(target, CHUNK), torch.split(cosine, CHUNK), strict=True):
            rho = rho.clamp(-1.0, 1.0)[:, None, None]
            rest = (1 - rho.square()).clamp_min(1e-14).sqrt()
            inputs = a[:, None, None] * (rho * points[:, None] + rest * points)
            rows.append((self.function(inputs) * weights).sum(dim=2))
        return torch.cat(rows)

    def _rule(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        points, weights = _gauss_hermite(self.nodes)
        return points.to(like), weights.to(like)


@lru_cache(maxsize=8)
def _gauss_hermite(nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points and weights (n,) with which a weighted sum of f(points) is E[f(z)] for a standard normal z."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    with torch.inference_mode(False):  # kept for later calls, which may differentiate
        return torch.from_numpy(points), torch.from_numpy(weights / math.sqrt(2 * math.pi))


def golden_section(
    objective: Callable[[torch.Tensor], torch.Tensor], low: torch.Tensor, high: torch.Tensor, *, steps: int = 20
) -> torch.Tensor:
    """The minimum of many unimodal functions of one variable at once, each within its own bracket (M,)."""
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = objective(left), objective(right)
    for _ in range(steps):
        is_left = at_left < at_right
        low, high = torch.where(is_left, low, left), torch.where(is_left, right, high)
        new = torch.where(is_left, high - ratio * (high - low), low + ratio * (high - low))
        at_new = objective(new)
        left, right = torch.where(is_left, new, right), torch.where(is_left, left, new)
        at_left, at_right = torch.where(is_left, at_new, at_right), torch.where(is_left, at_left, at_new)
    return (low + high) / 2


def arc_cosine_kernel(cosine: torch.Tensor) -> torch.Tensor:
    """kappa(rho) = (sqrt(1 - rho^2) + (pi - arccos rho) rho) / pi, from 0 at -1 over 1/pi at 0 to 1 at 1."""
    rho = cosine.clamp(-1.0, 1.0)
    return ((1 - rho.square()).clamp_min(0.0).sqrt() + (math.pi - torch.arccos(rho)) * rho) / math.pi


def _gelu_tanh(values: torch.Tensor) -> torch.Tensor:
    return functional.gelu(values, approximate="tanh")


ACTIVATION_KERNELS: dict[str, ActivationKernel] = {
    "": PiecewiseLinear(slope=1.0),
    "identity": PiecewiseLinear(slope=1.0),
    "relu": PiecewiseLinear(slope=0.0),
    # Rows as long as He initialisation makes them never reach 6: the probability is below 1e-4.
    "relu6": PiecewiseLinear(slope=0.0),
    "leaky_relu": PiecewiseLinear(slope=0.01),
    "gelu": Quadrature(functional.gelu),
    "gelu_tanh": Quadrature(_gelu_tanh),
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
    base, _, slope = name.partition(":")
    if base == "leaky_relu" and slope:
        try:
            return PiecewiseLinear(slope=float(slope))
        except ValueError:
            raise unknown_name("activation", name, ACTIVATION_KERNELS, field="activation") from None
    if name not in ACTIVATION_KERNELS:
        raise unknown_name("activation", name, ACTIVATION_KERNELS, field="activation")
    return ACTIVATION_KERNELS[name]
