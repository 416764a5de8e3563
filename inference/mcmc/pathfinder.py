"""Starting points and a first metric for samplers: normals along a few limited-memory quasi-Newton paths."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Paths", "find_paths"]

_PATHS = 8  # about so many paths are descended, however many starts there are
_HISTORY = 8  # pairs of steps and changes of the gradient that a path remembers
_TRIES = 16  # halvings of a step before a path stands still
_EVERY = 3  # iterations between two normals that are tried
_PATIENCE = 5  # normals without a better one after which a path ends
_TRIALS = 4  # least number of draws per normal that estimate its elbo
_GAIN = 0.1  # nats of the elbo below which a normal is no better
_CURVATURES = 40  # calls of the potential up to which the Hessian itself is asked for
_ROUNDS = 4  # times that it is
_CHORDS = 5  # Newton steps with one Hessian
_REST = 1e-2  # squared Newton decrement, in units of the posterior sd, of a path at rest
_FAR = 20.0  # nats, beside one per unknown, that a draw may lack to the best of its path
_WEIGHED = 10  # draws per start of which importance weights choose one
_GAP = 10.0  # nats of the elbo below the best path at which a mode holds no mass

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Paths:
    """What `find_paths` found.

    Attributes
    ----------
    starts
        A point per start that was given, chosen among draws by importance weights: (start, size).
    draws
        From the best normals of the paths: (draw, start, size). Paths in modes without mass draw from the normals of
        others. Draws of hardly any density are left out: copies of the start stand in their places.
    elbo
        Evidence lower bound of the best normal that each path met: (path,).
    steps
        Quasi-Newton iterations.
    calls
        Calls of the potential.
    """

    starts: Tensor
    draws: Tensor
    elbo: Tensor
    steps: int
    calls: int


def find_paths(evaluate: Evaluate, starts: Tensor, *, num_draws: int = 10, max_steps: int = 150) -> Paths:
    """Descend from some of the starts by L-BFGS and keep the normals, of those met on the way, that fit best.

    The normal at an iterate has the path's inverse Hessian as covariance, a diagonal plus low rank, and a Newton step
    as mean; the best one is that of the largest evidence lower bound. It tends to lie where the mass is, also where the
    density has no maximum, as in funnels. A path ends at rest, or when its normals no longer get better.

    There are about eight paths, however many starts are given: the other rows of a call hold further step lengths and
    draws of the same paths. Where there are few unknowns, the Hessian itself follows, from differences of gradients.

    Parameters
    ----------
    evaluate
        Potential (start,) and gradient (start, size) at positions (start, size).
    starts
        Positions (start, size) of finite potential.
    num_draws
        Draws per start.
    max_steps
        Quasi-Newton iterations.

    Returns
    -------
    Paths
        All starts have a finite potential.

    References
    ----------
    Zhang, L., Carpenter, B., Gelman, A. and Vehtari, A. (2022). Pathfinder: parallel quasi-Newton variational
    inference. JMLR 23(306).
    """
    with torch.no_grad():
        return _Descent(_Rows(evaluate, starts)).run(num_draws, max_steps)


class _Rows:
    """The potential of many rows at once, as that of some points for each of few paths.

    Points and what is known of them are in double precision on the CPU, where small matrices are handled best.
    """

    def __init__(self, evaluate: Evaluate, starts: Tensor) -> None:
        self._evaluate, self.starts, self.calls = evaluate, starts, 0
        self.per_path = max(1, len(starts) // _PATHS)
        self.paths = len(starts) // self.per_path

    def at(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Potential (point, path), infinite where it or its gradient is not, and gradient (point, path, size)."""
        parts = [self._call(part) for part in points.split(self.per_path)]
        potential, gradient = (torch.cat(columns) for columns in zip(*parts, strict=True))
        finite = torch.isfinite(potential) & torch.isfinite(gradient).all(-1)
        return torch.where(finite, potential, math.inf), torch.where(finite[..., None], gradient, 0.0)

    def each_start(self, points: Tensor) -> Tensor:
        """Potential (point, start) of a point for every start, infinite where it or its gradient is not finite."""
        self.calls += len(points)
        found = [self._evaluate(row.to(self.starts)) for row in points]
        values = [torch.where(torch.isfinite(slope).all(1), value, math.inf) for value, slope in found]
        return torch.stack(values).to(points).nan_to_num(math.inf, math.inf, math.inf)

    def rounded(self, points: Tensor) -> Tensor:
        """Points that the precision of the potential can tell apart."""
        return points.to(self.starts.dtype).double()

    def _call(self, points: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        flat = points.flatten(0, 1)
        rest = flat[:1].expand(len(self.starts) - len(flat), -1)
        found = self._evaluate(torch.cat([flat, rest]).to(self.starts))
        potential, gradient = (part[: len(flat)].to(points) for part in found)
        return potential.unflatten(0, points.shape[:2]), gradient.unflatten(0, points.shape[:2])


@dataclass
class _Normals:
    """A normal per path, of covariance F F' with F = diag(scale) (I + Q (L - I) Q') and orthonormal columns Q.

    Mean and scale (path, size), Q (path, size, rank), L (path, rank, rank).
    """

    mean: Tensor
    scale: Tensor
    Q: Tensor
    L: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """``F x`` for x (..., path, size)."""
        return self.scale * (x + self._along(x, self.L))

    def transposed(self, x: Tensor) -> Tensor:
        """``F' x``."""
        x = self.scale * x
        return x + self._along(x, self.L.mT)

    def draw(self, noise: Tensor) -> Tensor:
        """Draws from standard normal noise (..., path, size)."""
        return self.mean + self.forward(noise)

    def newton(self, gradient: Tensor) -> Tensor:
        """The Newton step ``-F F' g``."""
        return -self.forward(self.transposed(gradient))

    @property
    def log_volume(self) -> Tensor:
        """Log determinant of F: (path,)."""
        return self.scale.log().sum(1) + self.L.diagonal(dim1=1, dim2=2).abs().log().sum(1)

    def chosen(self, paths: Tensor) -> _Normals:
        """The normals of some paths, which may repeat."""
        return _Normals(*(value[paths] for value in vars(self).values()))

    def where(self, better: Tensor, other: _Normals) -> _Normals:
        """``other`` on the paths where it is better."""
        rank = max(self.Q.shape[2], other.Q.shape[2])
        pairs = zip(vars(self._padded(rank)).values(), vars(other._padded(rank)).values(), strict=True)
        return _Normals(*(torch.where(better.reshape(-1, *[1] * (old.dim() - 1)), new, old) for old, new in pairs))

    def _along(self, x: Tensor, matrix: Tensor) -> Tensor:
        inside = torch.einsum("pdr,...pd->...pr", self.Q, x)
        return torch.einsum("pdr,...pr->...pd", self.Q, torch.einsum("prk,...pk->...pr", matrix, inside) - inside)

    def _padded(self, rank: int) -> _Normals:
        more = rank - self.Q.shape[2]
        L = torch.nn.functional.pad(self.L, (0, more, 0, more))
        L.diagonal(dim1=1, dim2=2)[:, rank - more :] = 1.0
        return _Normals(self.mean, self.scale, torch.nn.functional.pad(self.Q, (0, more)), L)


class _Memory:
    """What paths remember of the inverse Hessian: a diagonal, and the latest steps with the changes of the gradient."""

    def __init__(self, like: Tensor) -> None:
        self.diagonal = torch.ones_like(like)
        self.s = self.y = like.new_zeros(*like.shape, _HISTORY)
        self._fresh = torch.ones_like(like[:, 0], dtype=torch.bool)

    def forget(self, paths: Tensor, diagonal: Tensor) -> None:
        """Begin some paths anew, with a multiple (path,) of the identity."""
        self.diagonal = torch.where(paths[:, None], diagonal[:, None], self.diagonal)
        self.s, self.y = (torch.where(paths[:, None, None], 0.0, kept) for kept in (self.s, self.y))
        self._fresh = self._fresh | paths

    def add(self, s: Tensor, y: Tensor) -> None:
        """Remember a step where the path bends upwards, and fit the diagonal to it (Zhang et al. 2022, section 2)."""
        curvature = (s * y).sum(1)
        good = curvature > 1e-8 * s.norm(dim=1) * y.norm(dim=1)
        b = torch.where(good, curvature, 1.0)
        flat = (b / y.square().sum(1).clamp(min=1e-300))[:, None].expand_as(s)
        diagonal = torch.where((good & self._fresh)[:, None], flat, self.diagonal)
        a = (diagonal * y.square()).sum(1, keepdim=True)
        c = (s.square() / diagonal).sum(1, keepdim=True).clamp(min=1e-300)
        fitted = b[:, None] / (a / diagonal + y.square() - a / c * (s / diagonal).square())
        usable = good & (torch.isfinite(fitted) & (fitted > 0)).all(1)
        self.diagonal = torch.where(usable[:, None], fitted, diagonal)
        self._fresh = self._fresh & ~good
        root = b.sqrt()[:, None]  # of unit curvature, which changes nothing of the formula
        self.s, self.y = (
            torch.where(good[:, None, None], torch.cat([kept[..., 1:], (new / root)[..., None]], 2), kept)
            for kept, new in ((self.s, s), (self.y, y))
        )

    def normals(self, z: Tensor, gradient: Tensor) -> tuple[_Normals, Tensor]:
        """Normals at iterates ``z``, and the paths where rounding left them whole.

        The compact form of L-BFGS (Byrd, Nocedal and Schnabel 1994), turned into a factor by a QR decomposition.
        """
        eye = torch.eye(_HISTORY, dtype=z.dtype)
        root, wide = self.diagonal.sqrt(), self.diagonal[..., None] * self.y
        inverse = torch.linalg.solve_triangular(
            (self.s.mT @ self.y).triu(1) + eye, eye.expand(len(z), -1, -1), upper=True
        )
        corner = inverse.mT @ (eye + self.y.mT @ wide) @ inverse
        middle = torch.cat([torch.cat([corner, -inverse.mT], 2), torch.cat([-inverse, torch.zeros_like(corner)], 2)], 1)
        Q, R = torch.linalg.qr(torch.cat([self.s, wide], 2) / root[..., None])
        L, failed = torch.linalg.cholesky_ex(R @ middle @ R.mT + torch.eye(R.shape[1], dtype=z.dtype))
        whole = (failed == 0) & torch.isfinite(L).all(2).all(1)
        identity = torch.eye(L.shape[1], dtype=z.dtype)
        normals = _Normals(z, root, Q, torch.where(whole[:, None, None], L, identity))
        normals.mean = z + normals.newton(gradient)
        return normals, whole


class _Descent:
    """L-BFGS on all paths in lock-step; a path that has ended keeps its place."""

    def __init__(self, rows: _Rows) -> None:
        self.rows = rows
        self.z = rows.starts[: rows.paths].cpu().double()
        potential, gradient = rows.at(self.z[None])
        self.potential, self.gradient = potential[0], gradient[0]
        self.memory = _Memory(self.z)
        # The first step moves by about one unit of unconstrained space.
        self.moving = torch.ones_like(self.potential, dtype=torch.bool)
        self.memory.forget(self.moving, 1 / self._norm())
        self.failed = torch.zeros_like(self.moving)
        draws = max(_TRIALS, min(rows.per_path, 2 * _TRIALS))
        self.noise = torch.randn((draws, *self.z.shape), dtype=self.z.dtype)
        self.elbo = torch.full_like(self.potential, -math.inf)
        self.idle = torch.zeros_like(self.potential)
        self.normals, self.whole = self.memory.normals(self.z, self.gradient)
        self.best = self.normals

    def run(self, num_draws: int, max_steps: int) -> Paths:
        step = 0
        for step in range(1, max_steps + 1):
            self._advance()
            if step % _EVERY == 0 or not bool(self.moving.any()):
                self._consider()
            if not bool(self.moving.any()):
                break
        if math.ceil(2 * self.z.shape[1] / self.rows.per_path) <= _CURVATURES:
            self._polish()
        draws, starts = self._draw(num_draws)
        return Paths(starts, draws, self.elbo, step, self.rows.calls)

    def _draw(self, num_draws: int) -> tuple[Tensor, Tensor]:
        """Draws for every start, and one of them chosen by its importance weights."""
        count, size = self.rows.starts.shape
        good = torch.nonzero(self.elbo > self.elbo.max() - _GAP)[:, 0]
        if not len(good):
            good = torch.arange(self.rows.paths)
        # Starts of paths without mass draw from the normals of others: copies would pass for more than is known.
        origin = torch.arange(count) % self.rows.paths
        lost = ~torch.isin(origin, good)
        origin[lost] = good[torch.arange(int(lost.sum())) % len(good)]
        normals = self.best.chosen(origin)
        noise = torch.randn((max(num_draws, _WEIGHED), count, size), dtype=self.z.dtype)
        draws = self.rows.rounded(normals.draw(noise))
        potential = self.rows.each_start(draws[:_WEIGHED])
        log_weight = 0.5 * noise[:_WEIGHED].square().sum(2) - potential  # up to what all draws of a normal share
        largest = log_weight.amax(0)
        finite = torch.isfinite(largest)
        chosen = torch.multinomial(torch.where(finite, log_weight, 0.0).softmax(0).T, 1)[:, 0]
        starts = torch.where(finite[:, None], draws[chosen, torch.arange(count)], self.z[origin])
        far = log_weight < largest - _FAR - size
        # What most draws miss says nothing by those that were not weighed either.
        unweighed = (far.double().mean(0) > 0.5).expand(len(draws) - _WEIGHED, -1)
        far = torch.cat([far | ~finite, unweighed | ~finite])
        return torch.where(far[..., None], starts, draws)[:num_draws], starts

    def _norm(self) -> Tensor:
        return self.gradient.norm(dim=1).clamp(min=1e-6)

    def _advance(self) -> None:
        direction = self.normals.mean - self.z
        slope = (direction * self.gradient).sum(1)
        astray = ~self.whole | ~(slope < 0)
        direction = torch.where(astray[:, None], -self.gradient / self._norm()[:, None], direction)
        before, gradient, potential = self.z, self.gradient, self.potential
        done = self._search(direction, self.moving)
        s, y = self.z - before, self.gradient - gradient
        self.memory.add(s, y)
        progress = potential - self.potential
        still = done & (progress.abs() < 1e-3) & ((direction * self.gradient).sum(1).abs() < 1e-3)
        # A search that fails begins anew along the gradient; one that fails twice in a row is over.
        self.moving = self.moving & ~still & (done | ~self.failed)
        self.failed = ~done
        self.memory.forget(self.failed & self.moving, 1e-2 / self._norm())
        self.normals, self.whole = self.memory.normals(self.z, self.gradient)

    def _search(self, direction: Tensor, paths: Tensor) -> Tensor:
        """Move some paths by the longest of halved steps that descends enough; on which paths there was one."""
        slope = (direction * self.gradient).sum(1)
        done = ~paths
        z, value, gradient = self.z, self.potential, self.gradient
        lengths = 0.5 ** torch.arange(_TRIES, dtype=z.dtype)
        for part in lengths.split(self.rows.per_path):
            trials = self.rows.rounded(self.z + part[:, None, None] * direction)
            found, change = self.rows.at(trials)
            # Some slack for rounding, or single precision would stop paths early.
            limit = self.potential + 1e-4 * part[:, None] * slope + 1e-6 * self.potential.abs()
            good = found <= limit
            first = good.double().argmax(0)
            here = torch.arange(len(done))
            new = good.any(0) & ~done
            z = torch.where(new[:, None], trials[first, here], z)
            gradient = torch.where(new[:, None], change[first, here], gradient)
            value = torch.where(new, found[first, here], value)
            done = done | new
            if bool(done.all()):
                break
        self.z, self.potential, self.gradient = z, value, gradient
        return done

    def _consider(self) -> None:
        """Try the normals at the present iterates, and end the paths whose normals no longer get better."""
        better = self._keep(self.normals, self.whole)
        self.idle = torch.where(better | ~torch.isfinite(self.elbo), 0.0, self.idle + 1)
        self.moving = self.moving & (self.idle < _PATIENCE)

    def _keep(self, normals: _Normals, whole: Tensor) -> Tensor:
        """Keep normals on the paths where their elbo is the largest so far; on which paths it grew by much."""
        potential, _ = self.rows.at(self.rows.rounded(normals.draw(self.noise)))
        size = self.z.shape[1]
        elbo = (0.5 * self.noise.square().sum(2) - potential).mean(0) + normals.log_volume
        elbo = torch.where(whole & torch.isfinite(elbo), elbo + 0.5 * size * math.log(2 * math.pi), -math.inf)
        better, much = elbo > self.elbo, elbo > self.elbo + _GAIN
        self.best = self.best.where(better, normals)
        self.elbo = torch.where(better, elbo, self.elbo)
        return much

    def _polish(self) -> None:
        """Normals of the Hessian itself, from differences of gradients, and Newton steps towards the mode.

        A path knows the curvature only of directions that it took, and may stand still far from the mode where it
        underrates the variance of others.
        """
        moving = torch.ones_like(self.moving)
        for _ in range(_ROUNDS):
            self.normals, self.whole = self._curved()
            self._keep(self.normals, self.whole)
            moving = moving & self.whole
            for _ in range(_CHORDS):
                direction = self.normals.newton(self.gradient)
                decrement = -(direction * self.gradient).sum(1)
                moving = moving & (decrement > _REST)
                if not bool(moving.any()):
                    return
                moving = self._search(direction, moving) & moving

    def _curved(self) -> tuple[_Normals, Tensor]:
        """Normals whose precision is the Hessian with negative curvature turned positive; where it is finite."""
        eye = torch.eye(self.z.shape[1], dtype=self.z.dtype)
        sd = self.normals.transposed(eye[:, None].expand(-1, len(self.z), -1)).norm(dim=2).T
        least = 1e-6 if self.rows.starts.dtype == torch.float64 else 1e-4
        width = torch.maximum(1e-2 * sd, least * (1 + self.z.abs()))
        shifts = torch.cat([eye, -eye])[:, None] * width
        points = self.rows.rounded(self.z + shifts)
        potential, gradient = self.rows.at(points)
        ahead, behind = points.chunk(2)
        apart = (ahead - behind).diagonal(dim1=0, dim2=2)  # (path, size), as rounded
        hessian = ((gradient[: len(eye)] - gradient[len(eye) :]) / apart.T[..., None]).permute(1, 2, 0)
        hessian = 0.5 * (hessian + hessian.mT)
        whole = torch.isfinite(potential).all(0) & torch.isfinite(hessian).all(2).all(1)
        hessian = torch.where(whole[:, None, None], hessian, eye)
        # Unknowns of unlike scales are brought to one before small eigenvalues are told from rounding.
        scale = hessian.diagonal(dim1=1, dim2=2).abs()
        scale = 1 / torch.where(scale > 0, scale, 1.0).sqrt()
        values, vectors = torch.linalg.eigh(scale[:, :, None] * hessian * scale[:, None, :])
        # At a saddle, directions that bend downwards are taken as steeply as they bend.
        values = values.abs()
        values = torch.maximum(values, 1e-9 * values.amax(1, keepdim=True).clamp(min=1e-30))
        normals = _Normals(self.z, scale, vectors, torch.diag_embed(1 / values.sqrt()))
        normals.mean = self.z + normals.newton(self.gradient)
        return normals, whole
