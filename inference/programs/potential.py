"""The negative log density of a Pyro model as a function of a flat unconstrained vector, for one chain or many."""

from __future__ import annotations

import contextlib
import logging
import math
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import is_identically_one
from pyro.infer import config_enumerate
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample, init_to_value
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

import probmodels.inference.programs.bijections  # noqa: F401 -- registers maps that torch lacks
from probmodels.errors import CaptureError, ProblemError
from probmodels.inference.problem import Problem, fault_of_enumeration
from probmodels.inference.programs.capture import batch, capture, compile_graph
from probmodels.inference.programs.enumeration import Enumeration
from probmodels.inference.programs.minibatch import whole
from probmodels.inference.programs.reading import Randomness, where
from probmodels.inference.programs.simplify import is_random
from probmodels.inference.programs.sums import Group, frames, group_sites, joint
from probmodels.inference.runtime.ops import FixGenerated

__all__ = ["Potential", "Slot"]

_log = logging.getLogger(__name__)
_EXPORT_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Slot:
    """Where a site lies in the flat vector.

    Attributes
    ----------
    start, stop
        Range of entries.
    shape
        Unconstrained shape.
    bijection
        From unconstrained space to the support of the site.
    """

    start: int
    stop: int
    shape: torch.Size
    bijection: Any


class Potential:
    """Negative log density of a problem in unconstrained space.

    Generated sites are hidden, ``problem.reparam`` is applied, discrete latent sites are enumerated exactly by
    enumeration, and every other latent site is mapped to unconstrained space. ``evaluate`` runs Pyro; ``captured`` and
    ``batched`` run a graph of it, which is several times as fast. Capturing one chain first and batching after keeps
    ``vmap`` out of Pyro's enumeration, which it cannot enter.

    Plates in ``problem.batch_plates`` hold all their rows. Entries of latent sites that are masked out and that
    nothing depends on, as ``obs_mask`` makes them for what is observed, keep their own density: without one they would
    drift to infinity, and with it the posterior of all else is the same. A ``poutine.scale`` of enumerated sites
    multiplies the logarithm of the sum, as in Pyro's ``TraceEnum_ELBO``: scaled data are repeated data.

    Parameters
    ----------
    problem
        What to infer.

    Attributes
    ----------
    slots
        Place of every continuous latent site of the (reparametrised) model.
    size
        Length of the flat vector.

    Raises
    ------
    ProblemError
        If a support has no map to unconstrained space, a discrete site cannot be enumerated, the sites change between
        two runs of the model, or there is nothing to sample.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._args, self._kwargs = problem.args, problem.kwargs
        self._model: Callable[..., Any] = poutine.reparam(FixGenerated()(problem.model), dict(problem.reparam))
        self._latent = set(problem.names("latent"))
        self._discrete = [site.name for site in problem.sites.values() if site.discrete]
        self._whole = whole(problem)
        self._randomness = Randomness()
        with torch.no_grad(), pyro.validation_enabled(False):
            self._check_discrete()
            with self._explaining():
                trace = self._trace({})
            self.slots, self._like = self._read_slots(trace)
            self._check_static()
            with self._explaining():
                self._groups = self._grouped(trace) if self._discrete else []
        self._model = _KeepDensity(self._find_unused(trace), self._like)(self._model)

    @property
    def size(self) -> int:
        """Length of the flat vector."""
        return max(slot.stop for slot in self.slots.values())

    @property
    def _ordered(self) -> list[Slot]:
        return list(self.slots.values())

    @property
    def like(self) -> Tensor:
        """Empty tensor of the type and device of the flat vector: the widest among the sites."""
        return self._like

    def log_density(self, z: Tensor) -> Tensor:
        """Log density at ``z`` (size,) with respect to unconstrained space: a scalar."""
        return self._log_density(self._split(z))

    def _log_density(self, parts: Sequence[Tensor]) -> Tensor:
        values, log_volume = self._constrain(parts)
        return joint(self._trace(values), self._groups) + log_volume

    def evaluate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Potential (scalar) and its gradient (size,) at ``z`` (size,)."""
        with torch.enable_grad():
            # One leaf per site: gradients are joined at the end instead of each being padded to the whole vector.
            parts = [part.detach().requires_grad_(True) for part in self._split(z)]
            try:
                potential = -self._log_density(parts)
                gradients = torch.autograd.grad(potential, parts, materialize_grads=True)
            except LinAlgError:  # a matrix that is only just positive definite: outside the support
                return z.new_tensor(math.inf), torch.full_like(z, math.nan)
        return potential.detach(), torch.cat([gradient.reshape(-1) for gradient in gradients])

    def captured(self) -> Any:
        """`evaluate` as a graph.

        Raises
        ------
        ProblemError
            If the log density is not a function of the latent sites.
        CaptureError
            If the model branches on values, or its graph differs from it.
        """
        self._check_repeatable()
        points = [self._random(count) for count in range(4)]
        with pyro.validation_enabled(False):
            graph = capture(self.evaluate, points[0], checks=[(point,) for point in points[1:]])
        if any(is_random(node.target) for node in graph.graph.nodes):
            raise self._changes()
        return graph

    def fastest(self, compiler: str = "graph") -> Any:
        """`evaluate` as a graph, or itself (with a note in the log) where there is none or ``compiler="eager"``."""
        self._check_repeatable()
        if compiler == "eager":
            return self.evaluate
        try:
            graph = self.captured()
        except CaptureError as error:
            _log.info("%s: the potential runs in Pyro, several times as slow as a graph: %s", self.problem.name, error)
            return self.evaluate
        return compile_graph(graph, compiler, self._random(0))

    def batched(self, num_chains: int, *, compiler: str = "graph") -> Any:
        """`evaluate` for chains at once, (chain, size) to (chain,) and (chain, size).

        Parameters
        ----------
        num_chains
            Number of chains.
        compiler
            ``"graph"`` or ``"inductor"``.

        Raises
        ------
        CaptureError
            If the model cannot be captured or batched.
        """
        graph = self.captured()
        points = torch.stack([self._random(count) for count in range(num_chains)])
        batched = batch(graph, points)
        with torch.no_grad():
            rows = [graph(point) for point in points[:3]]
            together = batched(points[:num_chains])
        for index, row in enumerate(rows):
            for one, many in zip(row, together, strict=True):
                limit = 1e-8 if one.dtype == torch.float64 else 1e-3
                scale = max(float(one.abs().max().nan_to_num(0, 0, 0)), 1.0)
                if not torch.allclose(one, many[index], rtol=limit, atol=limit * scale, equal_nan=True):
                    raise CaptureError("the batched graph differs from the graph of one chain")
        return compile_graph(batched, compiler, points)

    def constrain(self, z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Values of the sites at ``z`` (size,), and the log volume change of the map (scalar)."""
        return self._constrain(self._split(z))

    def _split(self, z: Tensor) -> tuple[Tensor, ...]:
        return z.split([slot.stop - slot.start for slot in self._ordered])

    def _constrain(self, parts: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        values, log_volume = {}, parts[0].new_zeros(())
        for (name, slot), flat in zip(self.slots.items(), parts, strict=True):
            part = flat.reshape(slot.shape)
            values[name] = slot.bijection(part)
            log_volume = log_volume + slot.bijection.log_abs_det_jacobian(part, values[name]).sum()
        return values, log_volume

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """Flat vector (size,) of the values of all continuous latent sites."""
        parts = [slot.bijection.inv(values[name]).reshape(-1).to(self._like) for name, slot in self.slots.items()]
        return torch.cat(parts)

    def export(self, z: Tensor) -> dict[str, Tensor]:
        """Latent and deterministic sites of the model at ``z`` (size,), reparametrised ones recomputed."""
        with torch.no_grad():
            values, _ = self.constrain(z)
            wanted = self.problem.names("latent", "deterministic")
            nodes = self._trace(values).nodes
        return {name: nodes[name]["value"] for name in wanted if name in nodes and name not in self._discrete}

    def export_many(self, z: Tensor) -> dict[str, Tensor]:
        """Continuous latent sites of the model at ``z`` (..., size), on the CPU, in chunks of bounded memory."""
        shape = z.shape[:-1]
        pieces = z.flatten(0, -3) if z.ndim > 2 else [z.reshape(-1, self.size)]  # by chain, so that nothing is copied
        step = 1 if self.problem.reparam else max(1, _EXPORT_BYTES // (8 * self.size))
        out: dict[str, Tensor] = {}
        done = 0
        for rows in (part for piece in pieces for part in piece.split(step)):
            for name, value in self._original(rows.to(self._like.device)).items():
                if name not in out:
                    out[name] = torch.empty(shape.numel(), *value.shape[1:], dtype=value.dtype)
                out[name][done : done + len(rows)] = value
            done += len(rows)
        return {name: value.reshape(*shape, *value.shape[1:]) for name, value in out.items()}

    def from_prior(self) -> Tensor:
        """Flat vector (size,) of one draw from the prior.

        Raises
        ------
        ProblemError
            If a site has an improper prior.
        """
        self.problem.check_proper()
        with torch.no_grad():
            nodes: Any = self._trace({}).nodes
            return self.unconstrain({name: nodes[name]["value"] for name in self.slots})

    def uniform(self, radius: float) -> Tensor:
        """Random vector (size,), uniform in ``[-radius, radius]``."""
        return radius * (2 * torch.rand(self.size, dtype=torch.float64) - 1).to(self._like)

    def find_start(self, evaluate: Any, propose: Callable[[], Tensor], tries: int = 100) -> Tensor:
        """First proposal (size,) of finite potential and gradient.

        Raises
        ------
        ProblemError
            If there is none; it names the sites whose log density is not finite.
        """
        for _ in range(tries):
            z = propose()
            with torch.no_grad():
                potential, gradient = evaluate(z)
            if torch.isfinite(potential) and torch.isfinite(gradient).all():
                return z
        raise ProblemError(
            f"{self.problem.name}: none of {tries} starts has a finite log density and gradient{self.blame(z)}; "
            "check the data, pass a smaller init_radius, or choose init='prior'"
        )

    def blame(self, z: Tensor) -> str:
        """Which sites have a log density that is not finite at ``z`` (size,), as a part of a sentence."""
        with torch.no_grad(), pyro.validation_enabled(False):
            values, _ = self.constrain(z)
            with self._whole():
                trace = poutine.trace(poutine.condition(self._model, values)).get_trace(*self._args, **self._kwargs)
            trace.compute_log_prob()
        bad = [
            n for n, node in trace.nodes.items() if "log_prob" in node and not torch.isfinite(node["log_prob"]).all()
        ]
        return f" (not finite at the last: site {', '.join(map(repr, bad))})" if bad else ""

    def from_draw(self, draw: Mapping[str, Tensor]) -> Tensor:
        """Flat vector (size,) of values of the original model's sites, those of reparametrised ones derived."""
        draw = {name: value.to(self._like.device) for name, value in draw.items()}
        if self.problem.reparam:
            draw = self._reparametrised(draw)
        lost = [name for name in self.slots if name not in draw]
        if lost:
            raise ProblemError(f"{self.problem.name}: the starting values lack the sites {lost}")
        return self.unconstrain(draw)

    def _reparametrised(self, draw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        program: Any = InitMessenger(init_to_value(values=dict(draw), fallback=init_to_sample))(self._model)
        try:
            with torch.no_grad(), warnings.catch_warnings(), self._whole():
                warnings.filterwarnings("error", ".*does not commute with initialization", RuntimeWarning)
                nodes: Any = poutine.trace(program).get_trace(*self._args, **self._kwargs).nodes
        except RuntimeWarning as warning:
            raise ProblemError(
                f"{self.problem.name}: a reparametrisation cannot start at given values ({warning}); pass init by name"
            ) from warning
        return {name: nodes[name]["value"] for name in self.slots if name in nodes}

    def _original(self, rows: Tensor) -> dict[str, Tensor]:
        """Continuous latent sites of the model at ``rows`` (row, size), a single row where it is reparametrised."""
        if self.problem.reparam:
            exported = self.export(rows[0])
            return {name: value[None] for name, value in exported.items() if name in self._latent}
        return {
            name: slot.bijection(rows[:, slot.start : slot.stop].reshape(-1, *slot.shape))
            for name, slot in self.slots.items()
        }

    def _grouped(self, trace: Any) -> list[Group]:
        """What is summed over together, of the sites of a trace."""
        values = {name: trace.nodes[name]["value"] for name in self.slots}
        return group_sites(self.problem.name, self._trace(values), self._discrete)

    def _random(self, key: int) -> Tensor:
        generator = torch.Generator().manual_seed(key)
        return (2 * torch.rand(self.size, dtype=torch.float64, generator=generator) - 1).to(self._like)

    def _trace(self, values: Mapping[str, Tensor]) -> Any:
        program = poutine.condition(self._model, dict(values))
        if self._discrete:
            # Enumerated dims lie left of all plates; where values are given, nothing else is random.
            program = poutine.enum(config_enumerate(program), first_available_dim=-1 - self._nesting)
        with self._whole():
            return poutine.trace(program).get_trace(*self._args, **self._kwargs)

    @property
    def _nesting(self) -> int:
        """Deepest plate or batch axis of the model."""
        if not hasattr(self, "_nesting_found"):
            with torch.no_grad(), self._whole():
                nodes: Any = poutine.trace(self._model).get_trace(*self._args, **self._kwargs).nodes
            dims = [-frame.dim for node in nodes.values() for frame in frames(node) if frame.vectorized]
            self._nesting_found = max(dims, default=0)
        return self._nesting_found

    def _read_slots(self, trace: Any) -> tuple[dict[str, Slot], Tensor]:
        slots: dict[str, Slot] = {}
        like, start = torch.empty(0, dtype=torch.float16), 0
        for name, node in _stochastic(trace):
            if name in self._discrete:
                continue
            try:
                bijection = biject_to(node["fn"].support)
                unconstrained = bijection.inv(node["value"])
            except NotImplementedError as error:
                raise ProblemError(
                    f"{self.problem.name}: site {name!r} has support {node['fn'].support}, which has no map to "
                    f"unconstrained space; give the problem reparam={{{name!r}: ...}} or a kernel of its own"
                ) from error
            stop = start + unconstrained.numel()
            slots[name] = Slot(start, stop, unconstrained.shape, bijection)
            start = stop
            like = unconstrained.new_empty(0).to(torch.promote_types(like.dtype, unconstrained.dtype))
        if not slots:
            raise ProblemError(f"{self.problem.name}: the model has no continuous latent site to sample")
        return slots, like

    def _check_static(self) -> None:
        """Refuse models whose sites change from run to run, which no flat vector can hold."""
        slots, _ = self._read_slots(self._trace({}))
        changed = sorted(set(slots) ^ set(self.slots))
        changed += [n for n in slots if n in self.slots and slots[n].shape != self.slots[n].shape]
        if changed:
            raise ProblemError(
                f"{self.problem.name}: sites {changed} come, go or change shape between two runs of the model; "
                "gradient-based samplers need the same sites in every run"
            )
        for name, slot in slots.items():
            points = [shift + self._like.new_zeros(slot.shape) for shift in (-0.5, 1.0)]
            before = self.slots[name].bijection
            if not all(torch.allclose(slot.bijection(point), before(point), equal_nan=True) for point in points):
                raise ProblemError(
                    f"{self.problem.name}: the support of site {name!r} moves with other sites; let the site have a "
                    "fixed support, as a fraction of the moving range, and derive the value with pyro.deterministic"
                )

    def _check_discrete(self) -> None:
        """Refuse discrete sites that Pyro's enumeration would misread or fail at."""
        if not self._discrete:
            return
        with self._whole():
            nodes: Any = poutine.trace(self._model).get_trace(*self._args, **self._kwargs).nodes
        for name in self._discrete:
            if name in nodes and (fault := fault_of_enumeration(nodes[name]["fn"], _dims(nodes[name]))):
                raise ProblemError(
                    f"{self.problem.name}: discrete site {name!r} {fault}; or use a kernel that moves it"
                )
        Enumeration(self.problem).check()

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        """Say what failed where discrete sites are enumerated, or arguments are no tensors."""
        try:
            yield
        except (ProblemError, LinAlgError):
            raise
        except (ValueError, RuntimeError, TypeError, IndexError, AssertionError) as error:
            first = (str(error).strip() or type(error).__name__).partition("\nTrace Shapes:")[0]
            # Pyro's checks of shapes say which site it is; other errors come from a line of the model.
            line = "" if isinstance(error, ValueError) else where(traceback.extract_tb(error.__traceback__))
            if self._discrete:
                raise ProblemError(
                    f"{self.problem.name}: the discrete sites {self._discrete} cannot be enumerated: {first}{line}; "
                    "write the model so that it broadcasts over dims left of its plates, as for Pyro's parallel "
                    "enumeration"
                ) from error
            if arrays := self.problem.arrays():
                raise ProblemError(f"{self.problem.name}: the gradient fails: {first}{line}{arrays}") from error
            raise

    def _check_repeatable(self) -> None:
        """Refuse log densities that differ between runs at one point: chains would not leave them invariant."""
        point = self._random(0)
        with pyro.validation_enabled(False), self._explaining():
            with self._randomness:
                first = self.evaluate(point)[0]
            others = [self.evaluate(point)[0] for _ in range(1 if self._randomness.line is None else 8)]
        if not all(torch.allclose(first, other, rtol=1e-6, atol=0.0, equal_nan=True) for other in others):
            raise self._changes()

    def _changes(self) -> ProblemError:
        """The error of a log density that differs between runs, with what makes it differ."""
        with torch.no_grad():
            nodes: Any = self._trace({}).nodes
        subsets = [name for name, node in nodes.items() if isinstance(node.get("fn"), _Subsample)]
        subsets = [name for name in subsets if len(nodes[name]["value"]) < nodes[name]["fn"].size]
        if subsets:
            why = f"plates {subsets} hold random subsets of their rows; name them in batch_plates, so that all are used"
        elif self._randomness.line is not None:
            why = (
                f"the model draws random numbers that are no sites ({self._randomness.name}{self._randomness.line}); "
                "make them by pyro.sample, and switch dropout off by module.eval()"
            )
        else:
            why = "make all random numbers by pyro.sample, and leave what the model reads unchanged"
        return ProblemError(f"{self.problem.name}: the log density differs between runs at one point; {why}")

    def _find_unused(self, trace: Any) -> dict[str, Tensor]:
        """Entries, in batch shape, of latent sites that are masked out and that nothing depends on."""
        masks = {name: trace.nodes[name]["mask"] for name in self.slots}
        names = [name for name, mask in masks.items() if mask is not None and mask is not True]
        unused: dict[str, Tensor] = {}
        if not names:
            return unused
        for key in range(3):
            with torch.enable_grad(), pyro.validation_enabled(False):
                values = {n: v.detach().requires_grad_(True) for n, v in self.constrain(self._random(key))[0].items()}
                try:
                    run = self._trace(values)
                    wanted = [values[name] for name in names]
                    gradients = torch.autograd.grad(joint(run, self._groups), wanted, materialize_grads=True)
                except LinAlgError:
                    return {}
            for name, gradient in zip(names, gradients, strict=True):
                node = run.nodes[name]
                idle = gradient == 0
                idle = idle.flatten(idle.dim() - node["fn"].event_dim).all(-1) if node["fn"].event_dim else idle
                idle = idle & ~torch.as_tensor(node["mask"], device=idle.device)
                unused[name] = unused.get(name, idle) & idle
        shapes = {name: trace.nodes[name]["fn"].batch_shape for name in names}
        return {name: idle for name, idle in unused.items() if idle.any() and idle.shape == shapes[name]}


class _KeepDensity(Messenger):
    """Lift mask and scale from some entries of sites: masks (*batch) by name."""

    def __init__(self, entries: Mapping[str, Tensor], like: Tensor) -> None:
        super().__init__()
        self._entries, self._like = entries, like

    def _pyro_sample(self, msg: Any) -> None:
        entries = self._entries.get(msg["name"])
        if entries is not None:
            msg["mask"] = entries | msg["mask"]
            if not is_identically_one(msg["scale"]):
                msg["scale"] = torch.where(entries, 1.0, torch.as_tensor(msg["scale"]).to(self._like))


def _stochastic(trace: Any) -> Iterator[tuple[str, Any]]:
    """Latent sites of a trace; subsampling sites are left out."""
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and not node["is_observed"] and not isinstance(node["fn"], _Subsample):
            yield name, node


def _dims(node: Any) -> set[int]:
    """Dims of the plates around a site."""
    return {frame.dim for frame in frames(node) if frame.vectorized}
