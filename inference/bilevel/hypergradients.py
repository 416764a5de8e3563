"""Gradients through the solution of an inner problem, by four methods.

With the inner loss ``L(w, h)``, its approximate minimum ``w(h)`` and the outer loss ``F(w, h)``::

    dF/dh = F_h + F_w dw/dh

*Unrolling* differentiates the steps that led to ``w``. The *implicit function theorem*, ``dw/dh = -L_ww^-1 L_wh``,
needs the minimum alone; the product with the inverse Hessian is found by conjugate gradients or a Neumann series. A
*finite difference* takes one step of gradient descent for the minimum, and a difference for the mixed derivative.

References
----------
Franceschi, L., Donini, M., Frasconi, P. and Pontil, M. (2017). Forward and reverse gradient-based hyperparameter
optimization. https://arxiv.org/abs/1703.01785
Lorraine, J., Vicol, P. and Duvenaud, D. (2020). Optimizing millions of hyperparameters by implicit differentiation.
https://arxiv.org/abs/1911.02590
Liu, H., Simonyan, K. and Yang, Y. (2019). DARTS: differentiable architecture search. https://arxiv.org/abs/1806.09055
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "HYPERGRADIENTS",
    "OPTIMISERS",
    "Descent",
    "Found",
    "Losses",
    "agreement",
    "gradient",
    "hypergradient",
    "norm",
]

HYPERGRADIENTS = ("unrolled", "cg", "neumann", "finite_difference")
OPTIMISERS = ("adam", "sgd")
_BETAS, _EPS = (0.9, 0.999), 1e-8
_ROOT = 1e-16  # under Adam's root, which has no derivative at zero
_DIFFERENCE = 0.01  # length of the step of a finite difference

Values = dict[str, Tensor]
Loss = Callable[[Values], Tensor]


class Losses(NamedTuple):
    """Inner and outer loss () as functions of all parameters by name, inner and hyper."""

    inner: Loss
    outer: Loss


class Found(NamedTuple):
    """What `hypergradient` returns.

    Attributes
    ----------
    gradient
        By hyperparameter.
    inner
        Inner parameters after the steps.
    inner_loss, inner_norm
        Loss and gradient norm before the last step.
    lowest
        Lowest loss before a step.
    outer_loss
        Outer loss at the inner parameters.
    """

    gradient: Values
    inner: Values
    inner_loss: float
    inner_norm: float
    lowest: float
    outer_loss: float


@dataclass
class Descent:
    """Inner optimiser whose steps can be differentiated.

    Attributes
    ----------
    kind
        ``"adam"`` or ``"sgd"``.
    lr
        Step size.
    moments
        First and second moments of Adam by ``<name>/first`` and ``<name>/second``.
    count
        Steps that these moments have seen.
    """

    kind: str
    lr: float
    moments: Values
    count: int = 0

    def step(self, values: Values, slopes: Values) -> Values:
        """Parameters after one step."""
        if self.kind == "sgd":
            return add(values, -self.lr, slopes)
        self.count += 1
        moved = {}
        for name, slope in slopes.items():
            zero = torch.zeros_like(slope)
            first = torch.lerp(slope, self.moments.get(f"{name}/first", zero), _BETAS[0])
            second = torch.lerp(slope * slope, self.moments.get(f"{name}/second", zero), _BETAS[1])
            self.moments[f"{name}/first"], self.moments[f"{name}/second"] = first, second
            root = (second / (1 - _BETAS[1] ** self.count) + _ROOT).sqrt() + _EPS
            moved[name] = values[name] - self.lr / (1 - _BETAS[0] ** self.count) * first / root
        return moved

    def copy(self) -> Descent:
        """The same, cut off from what led to it."""
        return Descent(self.kind, self.lr, {name: value.detach() for name, value in self.moments.items()}, self.count)


def hypergradient(
    method: str,
    losses: Losses,
    inner: Values,
    hyper: Values,
    descent: Descent,
    steps: int,
    *,
    solver_steps: int = 20,
    damping: float = 0.0,
) -> Found:
    """Make some inner steps, and differentiate the outer loss after them.

    Parameters
    ----------
    method
        One of `HYPERGRADIENTS`.
    losses
        May draw random numbers; the implicit methods and finite differences use one draw of the inner loss throughout.
    inner, hyper
        Parameters by name.
    descent
        Makes the steps, and keeps its moments.
    steps
        How many; 0 for none, which only the methods other than ``"unrolled"`` can use.
    solver_steps, damping
        For ``"cg"`` and ``"neumann"``: steps of the solver, and what is added to the Hessian.
    """
    inner = {name: value.detach().requires_grad_() for name, value in inner.items()}
    hyper = {name: value.detach().requires_grad_() for name, value in hyper.items()}
    unrolled, loss, size = method == "unrolled", math.nan, math.nan
    lowest = math.inf
    with torch.enable_grad():
        for _ in range(steps):
            value = losses.inner(inner | hyper)
            slopes = gradient(value, inner, create_graph=unrolled)
            loss, size = float(value.detach()), norm(slopes)
            lowest = min(lowest, loss)
            inner = descent.step(inner, slopes)
            if not unrolled:
                inner = {name: value.detach().requires_grad_() for name, value in inner.items()}
        if unrolled:
            outer = losses.outer(inner | hyper)
            found = gradient(outer, hyper)
        elif method == "finite_difference":
            outer, found = _finite_difference(losses, inner, hyper, descent.lr)
        else:
            outer, found = _implicit(losses, inner, hyper, _solver(method, descent.lr, solver_steps), damping)
    descent.moments = descent.copy().moments
    return Found(
        found, {name: value.detach() for name, value in inner.items()}, loss, size, lowest, float(outer.detach())
    )


def agreement(found: Values, other: Values) -> tuple[float, float]:
    """Cosine of two hypergradients, and the norm of their difference over that of the second."""
    size, size_other = norm(found), norm(other)
    cosine = _dot(found, other) / max(size * size_other, 1e-300)
    return cosine, norm(add(found, -1.0, other)) / max(size_other, 1e-300)


def gradient(
    of: Tensor | Values,
    to: Values,
    weights: Values | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> Values:
    """Gradients by name, zero where there is no path."""
    found = torch.autograd.grad(
        list(of.values()) if isinstance(of, dict) else [of],
        list(to.values()),
        None if weights is None else list(weights.values()),
        create_graph=create_graph,
        retain_graph=retain_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(to, found, strict=True))


def norm(values: Values) -> float:
    """Euclidean norm of all values."""
    return math.sqrt(_dot(values, values))


def add(values: Values, factor: float, others: Values) -> Values:
    """``values + factor * others``."""
    return {name: value + factor * others[name] for name, value in values.items()}


def _implicit(
    losses: Losses, inner: Values, hyper: Values, solve: Callable[..., Values], damping: float
) -> tuple[Tensor, Values]:
    """Outer loss, and ``F_h - L_hw (L_ww + damping)^-1 F_w``.

    Parameters in which the inner loss is constant or linear have no solution to follow, and count as constants.
    """
    value = losses.inner(inner | hyper)
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        value, list(inner.values()), create_graph=True, allow_unused=True
    )
    slopes = {n: slope for n, slope in zip(inner, found, strict=True) if slope is not None and slope.requires_grad}
    curved = {name: inner[name] for name in slopes}
    outer = losses.outer(inner | hyper)
    both = gradient(outer, inner | hyper)

    def product(vector: Values) -> Values:
        return add(gradient(slopes, curved, vector, retain_graph=True), damping, vector)

    if not slopes:
        return outer, {name: both[name] for name in hyper}
    solution = solve(product, {name: both[name] for name in curved})
    mixed = gradient(slopes, hyper, solution)
    return outer, {name: both[name] - mixed[name] for name in hyper}


def _solver(method: str, lr: float, steps: int) -> Callable[..., Values]:
    """Approximate solution ``v`` of ``H v = target``, with ``H`` given by its product with a vector."""

    def conjugate_gradients(product: Callable[[Values], Values], target: Values) -> Values:
        solution = {name: torch.zeros_like(value) for name, value in target.items()}
        rest, direction, size = target, target, _dot(target, target)
        for _ in range(steps):
            image = product(direction)
            curvature = _dot(direction, image)
            if size == 0 or curvature <= 0:  # solved, or a direction in which the inner loss has no minimum
                break
            solution = add(solution, size / curvature, direction)
            rest = add(rest, -size / curvature, image)
            before, size = size, _dot(rest, rest)
            direction = add(rest, size / before, direction)
        return solution

    def neumann(product: Callable[[Values], Values], target: Values) -> Values:
        term, total = target, target
        for _ in range(steps):
            term = add(term, -lr, product(term))
            total = add(total, 1.0, term)
        return {name: lr * value for name, value in total.items()}

    return conjugate_gradients if method == "cg" else neumann


def _finite_difference(losses: Losses, inner: Values, hyper: Values, lr: float) -> tuple[Tensor, Values]:
    """Outer loss after one step of gradient descent, and its gradient, the mixed term by a central difference."""
    seed = int(torch.randint(2**31, ()))

    def inner_loss(values: Values) -> Tensor:
        with torch.random.fork_rng(devices=[]):  # the same noise at every point, or it would be the difference
            torch.manual_seed(seed)
            return losses.inner(values | hyper)

    def apart(values: Values) -> Values:  # modules warn of parameters that take no gradient
        return {name: value.detach().requires_grad_() for name, value in values.items()}

    ahead = apart(inner)
    ahead = apart(add(inner, -lr, gradient(inner_loss(ahead), ahead)))
    outer = losses.outer(ahead | hyper)
    both = gradient(outer, ahead | hyper)
    direction = {name: both[name] for name in inner}
    length = _DIFFERENCE / max(norm(direction), 1e-30)
    above, below = (gradient(inner_loss(apart(add(inner, side * length, direction))), hyper) for side in (1, -1))
    mixed = {name: (above[name] - below[name]) / (2 * length) for name in hyper}
    return outer, {name: both[name] - lr * mixed[name] for name in hyper}


def _dot(values: Values, others: Values) -> float:
    return sum(float(torch.sum(value.detach() * others[name].detach())) for name, value in values.items())
