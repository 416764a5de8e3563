"""Starting points and a first metric for samplers: normals along quasi-Newton paths, many paths at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Paths", "find_paths"]

_TRIES = 16  # halvings of a step before a path stands still
_ROUNDS = 4  # times that paths are given the Hessian itself
_REST = 1e-2  # squared Newton decrement, in units of the posterior sd, of a path at rest
_EVERY = 3  # iterations between two normals that are tried
_FAR = 20.0  # nats, beside one per unknown, that a draw may lack to the best of its path
_TRIALS = 4  # draws per normal that estimate its elbo
_GAP = 10.0  # nats of the elbo below the best path at which a mode holds no mass


@dataclass(frozen=True)
class Paths:
    """What `find_paths` found.

    Attributes
    ----------
    starts
        One draw per path, chosen among its draws by importance weights: (path, size).
    draws
        From the best normal of every path: (draw, path, size). Paths in modes without mass draw from the normals of
        others. Draws of hardly any density are left out: copies of the path's start stand in their places.
    elbo
        Evidence lower bound of the best normal that each path met: (path,).
    steps
        Quasi-Newton iterations.
    """

    starts: Tensor
    draws: Tensor
    elbo: Tensor
    steps: int


def find_paths(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    starts: Tensor,
    *,
    num_draws: int = 10,
    max_steps: int = 60,
) -> Paths:
    """Descend from every start by BFGS and keep the normal, of those met on the way, that fits the density best.

    The normal at an iterate has the inverse Hessian of the path as covariance and a Newton step as mean; the best one
    is that of the largest evidence lower bound. It tends to lie where the mass is, also where the density has no
    maximum, as in funnels.

    Parameters
    ----------
    evaluate
        Potential (path,) and gradient (path, size) at positions (path, size).
    starts
        Positions (path, size) of finite potential.
    num_draws
        Draws per path.
    max_steps
        Quasi-Newton iterations.

    Returns
    -------
    Paths
        All starts and draws have a finite potential.

    References
    ----------
    Zhang, L., Carpenter, B., Gelman, A. and Vehtari, A. (2022). Pathfinder: parallel quasi-Newton variational
    inference. JMLR 23(306).
    """
    with torch.no_grad():
        return _Descent(evaluate, starts).run(num_draws, max_steps)


class _Descent:
    """BFGS on all paths in lock-step; a path that has come to rest keeps its place."""

    def __init__(self, evaluate: Callable[[Tensor], tuple[Tensor, Tensor]], starts: Tensor) -> None:
        self.evaluate, self.z = evaluate, starts
        self.potential, self.gradient = evaluate(starts)
        count, size = starts.shape
        self.identity = torch.eye(size, dtype=starts.dtype, device=starts.device).expand(count, size, size)
        # The first step moves by about one unit of unconstrained space.
        norm = self.gradient.norm(dim=1).clamp(min=1e-6)
        self.inverse = self.identity * (1 / norm)[:, None, None]
        self.moving = torch.ones(count, dtype=torch.bool, device=starts.device)
        self.failed = torch.zeros_like(self.moving)
        self.noise = torch.randn((_TRIALS, count, size), dtype=starts.dtype, device=starts.device)
        self.best = torch.full_like(self.potential, -math.inf)
        self.mean, self.factor = starts.clone(), torch.zeros_like(self.inverse)

    def run(self, num_draws: int, max_steps: int) -> Paths:
        step = 0
        for _ in range(_ROUNDS):
            for step in range(step + 1, max_steps + 1):  # noqa: B020 -- each round takes up the count
                self._advance(first=step == 1)
                if step % _EVERY == 0 or not bool(self.moving.any()):
                    self._consider()
                if not bool(self.moving.any()):
                    break
            self._polish()
            if step == max_steps or not bool(self.moving.any()):
                break
        draws, starts = self._draw(num_draws)
        return Paths(starts, draws, self.best, step)

    def _draw(self, num_draws: int) -> tuple[Tensor, Tensor]:
        """Draws of every path, and one draw per path chosen by its importance weights."""
        mean, factor, instead = self.mean, self.factor, self.z
        hopeless = ~(self.best > self.best.max() - _GAP)
        if bool(hopeless.any()) and not bool(hopeless.all()):
            # Draws of their own, since copies of others' would pass for more than is known of the density.
            good = torch.nonzero(~hopeless)[:, 0]
            origin = torch.arange(len(hopeless), device=hopeless.device)
            origin[hopeless] = good[torch.arange(int(hopeless.sum()), device=good.device) % len(good)]
            mean, factor, instead = mean[origin], factor[origin], instead[origin]
        draws, weights = [], []
        for _ in range(num_draws):
            noise = torch.randn_like(self.z)
            draw = self._shifted(mean, factor, noise)
            potential, gradient = self.evaluate(draw)
            finite = torch.isfinite(potential) & torch.isfinite(gradient).all(1)
            weight = 0.5 * noise.square().sum(1) - potential  # up to what all draws of a path share
            draws.append(torch.where(finite[:, None], draw, instead))
            weights.append(torch.where(finite, weight, -math.inf))
        stacked, log_weight = torch.stack(draws), torch.stack(weights)
        largest = log_weight.max(0).values
        probs = torch.where(torch.isfinite(largest), log_weight, 0.0).softmax(0)
        chosen = torch.multinomial(probs.T, 1)[:, 0]
        starts = stacked[chosen, torch.arange(len(chosen), device=chosen.device)]
        far = log_weight < largest - _FAR - self.z.shape[1]
        return torch.where(far[:, :, None], starts, stacked), starts

    def _advance(self, *, first: bool) -> None:
        direction = -torch.einsum("cij,cj->ci", self.inverse, self.gradient)
        slope = (direction * self.gradient).sum(1)
        length = torch.ones_like(slope)
        done = ~self.moving
        z, potential, gradient = self.z, self.potential, self.gradient
        for _ in range(_TRIES):
            trial = self.z + length[:, None] * direction
            value, change = self.evaluate(trial)
            # Some slack for rounding, or single precision would stop paths early.
            limit = self.potential + 1e-4 * length * slope + 1e-6 * self.potential.abs()
            good = ~done & torch.isfinite(value) & torch.isfinite(change).all(1) & (value <= limit)
            z = torch.where(good[:, None], trial, z)
            gradient = torch.where(good[:, None], change, gradient)
            potential = torch.where(good, value, potential)
            done = done | good
            if bool(done.all()):
                break
            length = torch.where(done, length, length / 2)
        s, y = z - self.z, gradient - self.gradient
        self._update(s, y, first=first)
        progress = self.potential - potential
        still = done & (progress.abs() < 1e-3) & ((direction * gradient).sum(1).abs() < 1e-3)
        # A search that fails begins anew along the gradient; one that fails twice in a row is over.
        self.moving = self.moving & ~still & (done | ~self.failed)
        self.failed = ~done
        self.z, self.potential, self.gradient = z, potential, gradient
        norm = gradient.norm(dim=1).clamp(min=1e-6)
        anew = self.identity * (1e-2 / norm)[:, None, None]
        self.inverse = torch.where((self.failed & self.moving)[:, None, None], anew, self.inverse)

    def _update(self, s: Tensor, y: Tensor, *, first: bool) -> None:
        """The BFGS formula for the inverse Hessian, where the path bends upwards."""
        curvature = (s * y).sum(1)
        good = curvature > 1e-8 * s.norm(dim=1) * y.norm(dim=1)
        curvature = torch.where(good, curvature, 1.0)
        if first:
            scale = torch.where(good, curvature / y.square().sum(1).clamp(min=1e-30), 1.0)
            start = self.identity * scale[:, None, None]
            self.inverse = torch.where(good[:, None, None], start, self.inverse)
        rho = 1 / curvature
        hy = torch.einsum("cij,cj->ci", self.inverse, y)
        weight = rho * (1 + rho * (y * hy).sum(1))
        cross = rho[:, None, None] * (s[:, :, None] * hy[:, None, :])
        new = self.inverse - cross - cross.mT + weight[:, None, None] * (s[:, :, None] * s[:, None, :])
        self.inverse = torch.where(good[:, None, None], new, self.inverse)

    def _polish(self) -> None:
        """Put the Hessian itself, from differences of gradients, in place of what the paths know of it.

        A path knows the curvature only of directions that it took, and may stand still far from the mode where it
        underrates the variance of others. Paths that a Newton step would still move go on.
        """
        size = self.z.shape[1]
        width = 1e-2 * self.inverse.diagonal(dim1=1, dim2=2).sqrt()
        least = 1e-6 if self.z.dtype == torch.float64 else 1e-4
        width = torch.maximum(width, least * (1 + self.z.abs()))
        columns = []
        for axis in range(size):
            shift = torch.zeros_like(self.z)
            shift[:, axis] = width[:, axis]
            change = self.evaluate(self.z + shift)[1] - self.evaluate(self.z - shift)[1]
            columns.append(change / (2 * width[:, axis : axis + 1]))
        hessian = torch.stack(columns, 2)
        hessian = 0.5 * (hessian + hessian.mT)
        good = torch.isfinite(hessian).all(2).all(1)
        values, vectors = torch.linalg.eigh(torch.where(good[:, None, None], hessian, self.identity))
        # At a saddle, directions that bend downwards are taken as steeply as they bend. Each path has a limit of its
        # own, or one in a steep place would narrow the normals of all others.
        values = values.abs()
        values = torch.maximum(values, 1e-9 * values.amax(1, keepdim=True).clamp(min=1e-30))
        inverse = (vectors / values[:, None, :]) @ vectors.mT
        self.inverse = torch.where(good[:, None, None], inverse, self.inverse)
        self._consider()
        decrement = torch.einsum("ci,cij,cj->c", self.gradient, self.inverse, self.gradient)
        self.moving, self.failed = good & (decrement > _REST), torch.zeros_like(good)

    def _consider(self) -> None:
        """Keep the normal at the present iterates on the paths where its elbo is the largest so far."""
        factor, failed = torch.linalg.cholesky_ex(self.inverse)
        mean = self.z - torch.einsum("cij,cj->ci", self.inverse, self.gradient)
        log_volume = factor.diagonal(dim1=1, dim2=2).log().sum(1)
        elbo = torch.zeros_like(self.best)
        for row in self.noise:
            potential, _ = self.evaluate(self._shifted(mean, factor, row))
            elbo = elbo + (0.5 * row.square().sum(1) + log_volume - potential) / len(self.noise)
        elbo = elbo + 0.5 * self.z.shape[1] * math.log(2 * math.pi)
        better = (failed == 0) & torch.isfinite(elbo) & (elbo > self.best)
        self.best = torch.where(better, elbo, self.best)
        self.mean = torch.where(better[:, None], mean, self.mean)
        self.factor = torch.where(better[:, None, None], factor, self.factor)

    @staticmethod
    def _shifted(mean: Tensor, factor: Tensor, noise: Tensor) -> Tensor:
        return mean + torch.einsum("cij,cj->ci", factor, noise)
