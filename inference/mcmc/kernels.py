"""Markov kernels that `run_mcmc` drives: the protocol, and Pyro's No-U-Turn sampler behind it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal, cast

import pyro
import torch
from annotated_types import Interval
from pyro.infer import NUTS
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from probmodels.errors import ProblemError
from probmodels.inference.mcmc.metric import Metric, whiten
from probmodels.inference.problem import Problem
from probmodels.inference.programs.potential import Potential
from probmodels.inference.runtime.ops import part
from probmodels.options import Fraction, Positive, checked

__all__ = ["Kernel", "NUTSKernel"]

Params = dict[str, Tensor]


class Kernel(MCMCKernel):
    """A Pyro kernel that can be seeded, saved and continued to identical draws.

    `run_mcmc` calls, per chain: ``seed``, ``setup``, ``initial_params``, then ``sample`` again and again,
    ``end_warmup`` after the last warm-up step, and ``export`` and ``sample_stats`` for each draw that is kept.
    The global random-number states of torch, numpy and Python are seeded, saved and restored by `run_mcmc`.

    Attributes
    ----------
    dims
        Axis names of exported variables that are no sites of the model.
    vectorized
        Whether the kernel moves all chains at once: it is then made with ``num_chains``, its parameters are one tensor
        ``z`` (chain, size) in the unconstrained space of `Potential`, and its statistics are by chain.
    inits
        Names of the ways to choose starts that the kernel knows, the default first; empty where it starts its own way.
    init
        Set before ``setup``: one of ``inits``, values of the latent sites (a leading axis for chains where
        ``vectorized``), or None for the default.
    on_cpu
        Whether the kernel computes outside of torch, so that the problem has to lie on the CPU.
    tell
        Set before ``setup``: takes what `say` says; None for nobody.
    """

    dims: Mapping[str, Sequence[str]] = MappingProxyType({})
    vectorized = False
    inits: Sequence[str] = ()
    init: str | Params | None = None
    on_cpu = False
    tell: Callable[[str], object] | None = None

    @classmethod
    def prepare(cls, problem: Problem) -> None:
        """Work that all chains share, done once in the calling process before any chain starts: compilation."""

    def say(self, doing: str) -> None:
        """Show in the progress bar what ``setup`` is doing, such as ``"capturing the graph"``."""
        if self.tell is not None:
            self.tell(doing)

    def seed(self, seed: int) -> None:
        """Seed the kernel before ``setup``; the default seeds the global generators."""
        pyro.set_rng_seed(seed)

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor | int | float | str]:
        """All that ``sample`` needs to continue, generators of its own included."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` returned; called after ``setup``."""

    def export(self, params: Params) -> Params:
        """Sites of the model, in their own space, from what ``sample`` returned."""
        return params

    def sample_stats(self) -> dict[str, Any]:
        """Statistics of the latest draw: ``lp``, ``acceptance_rate`` and the like; the same keys every time."""
        return {}

    def attrs(self) -> dict[str, Any]:
        """What is to be known about the draws as a whole, JSON-ready; kept with ``sample_stats``."""
        return {}


class _RecordingNUTS(NUTS):
    """Pyro's NUTS with the statistics of its latest trajectory."""

    def sample(self, params: Params) -> Params:
        self.num_leapfrog, self.accept_sum, self.energy, self.diverged = 0, 0.0, float("nan"), False
        return super().sample(params)

    def _build_basetree(self, *args: Any) -> Any:
        tree = super()._build_basetree(*args)
        self.num_leapfrog += 1
        self.accept_sum += float(tree.sum_accept_probs)
        self.energy = float(args[-1])  # of the state that the trajectory starts from, fresh momentum included
        self.diverged = self.diverged or bool(tree.diverging)
        return tree


class NUTSKernel(Kernel):
    """Pyro's No-U-Turn sampler on the `Potential` of a problem.

    ``sample`` moves one flat vector ``x``; ``export`` returns the sites of the model, reparametrised and deterministic
    ones recomputed. The unconstrained vector is ``z = c + S x``, where the start ``c`` and the map ``S``, which makes
    scales alike and removes correlations, come from a normal along a quasi-Newton path (``init="pathfinder"``); with
    other starts, ``z = x``. The potential runs as a captured graph where the model has one.

    Parameters
    ----------
    problem
        What to infer.
    target_accept_prob
        Acceptance that the step size is tuned to; raise it where trajectories diverge.
    max_tree_depth
        Trajectories have at most ``2**max_tree_depth - 1`` leapfrog steps.
    full_mass
        Dense instead of diagonal mass matrix.
    init_radius
        Chains start uniformly in ``[-init_radius, init_radius]`` in unconstrained space.
    compiler
        ``"graph"`` for a captured graph, ``"inductor"`` for machine code, ``"eager"`` for Pyro itself.

    Raises
    ------
    ProblemError
        If the model cannot be sampled by gradients (see `Potential`), or no finite start is found.

    References
    ----------
    Hoffman, M. D. and Gelman, A. (2014). The No-U-Turn sampler. JMLR 15.
    """

    inits = ("pathfinder", "uniform", "prior")

    @checked(ProblemError)
    def __init__(
        self,
        problem: Problem,
        *,
        target_accept_prob: Fraction = 0.8,
        max_tree_depth: Annotated[int, Interval(ge=1, le=20)] = 10,
        full_mass: bool = False,
        init_radius: Positive = 2.0,
        compiler: Literal["graph", "inductor", "eager"] = "graph",
    ) -> None:
        super().__init__()
        self._problem, self._init_radius = problem, init_radius
        self._potential = Potential(problem)
        self._compiler = compiler
        self._options = {"target_accept_prob": target_accept_prob, "max_tree_depth": max_tree_depth}
        self._nuts: Any = _RecordingNUTS(
            potential_fn=self._energy_at,
            target_accept_prob=target_accept_prob,
            max_tree_depth=max_tree_depth,
            full_mass=full_mass,
        )

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Capture the potential, find a start of finite density and a first step size."""
        self.say("capturing the graph")
        self._evaluate = self._potential.fastest(self._compiler)
        self.say("finding starting points")
        z, self._centre, self._metric = self._find_start(), None, None
        if self.init in (None, "pathfinder"):
            with torch.no_grad():
                starts, self._metric = whiten(self._evaluate_rows, z[None])
            z, self._centre = torch.zeros_like(z), starts[0]
        self._nuts.initial_params = {"x": z}
        self._nuts.setup(warmup_steps)

    @property
    def initial_params(self) -> Params:
        """Start of the chain: ``x`` (size,)."""
        return self._nuts.initial_params

    @initial_params.setter
    def initial_params(self, params: Params) -> None:
        self._nuts.initial_params = params

    def sample(self, params: Params) -> Params:
        """One trajectory from ``params``; ``x`` (size,) to ``x`` (size,)."""
        return self._nuts.sample(params)

    def export(self, params: Params) -> Params:
        """Values of the model's latent and deterministic sites at ``x``."""
        return self._potential.export(self._unwhitened(params["x"]))

    def attrs(self) -> dict[str, Any]:
        """Target acceptance and largest tree depth."""
        return dict(self._options)

    def sample_stats(self) -> dict[str, Any]:
        """Log density in unconstrained space, energy, acceptance, step size, trajectory length and divergence."""
        nuts = self._nuts
        return {
            "lp": -float(nuts._potential_energy_last),
            "energy": nuts.energy,
            "acceptance_rate": nuts.accept_sum / max(nuts.num_leapfrog, 1),
            "step_size": float(nuts.step_size),
            "n_steps": nuts.num_leapfrog,
            "tree_depth": nuts.num_leapfrog.bit_length(),
            "diverging": nuts.diverged,
        }

    def logging(self) -> dict[str, str]:
        """Step size and mean acceptance for the progress bar."""
        return self._nuts.logging()

    def diagnostics(self) -> dict[str, Any]:
        """Divergences and acceptance rate since the end of warm-up."""
        return self._nuts.diagnostics()

    def cleanup(self) -> None:
        """Forget the chain."""
        self._nuts.cleanup()

    def state_dict(self) -> dict[str, Tensor | int | float | str]:
        """Position, step size, mass matrix and the state of their adaptation."""
        nuts, adapter = self._nuts, self._nuts._adapter
        averaging = adapter._step_size_adapt_scheme
        mass = adapter.mass_matrix_adapter
        (welford,) = mass._adapt_scheme.values()
        (inverse_mass,) = mass.inverse_mass_matrix.values()
        state: dict[str, Tensor | int | float | str] = {
            "x": nuts._z_last["x"],
            "potential": nuts._potential_energy_last,
            "gradient": nuts._z_grads_last["x"],
            "t": nuts._t,
            "accept_count": nuts._accept_cnt,
            "mean_accept": nuts._mean_accept_prob,
            "inverse_mass": inverse_mass,
            "step_size": float(adapter.step_size),
            "window": adapter._current_window,
            "welford_count": welford.n_samples,
            **{f"averaging_{key}": float(value) for key, value in vars(averaging).items()},
        }
        if welford.n_samples:
            state |= {"welford_mean": welford._mean, "welford_m2": welford._m2}
        if self._metric is not None and self._centre is not None:
            state |= {"centre": self._centre}
            state |= {f"metric/{name}": value for name, value in self._metric.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``."""
        nuts, adapter = self._nuts, self._nuts._adapter
        self._centre = state.get("centre")
        self._metric = None if self._centre is None else Metric(**part(state, "metric/"))
        nuts._cache({"x": state["x"]}, state["potential"], {"x": state["gradient"]})
        nuts._t, nuts._accept_cnt = int(state["t"]), int(state["accept_count"])
        nuts._mean_accept_prob = float(state["mean_accept"])
        mass = adapter.mass_matrix_adapter
        mass.inverse_mass_matrix = dict.fromkeys(mass.inverse_mass_matrix, state["inverse_mass"])
        adapter.step_size, adapter._current_window = float(state["step_size"]), int(state["window"])
        (welford,) = mass._adapt_scheme.values()
        welford.n_samples = int(state["welford_count"])
        if welford.n_samples:
            welford._mean, welford._m2 = state["welford_mean"], state["welford_m2"]
        averaging = adapter._step_size_adapt_scheme
        for key, value in state.items():
            if key.startswith("averaging_"):
                name = key.removeprefix("averaging_")
                setattr(averaging, name, int(value) if name == "_t" else value)

    def _unwhitened(self, x: Tensor) -> Tensor:
        """``z`` (size,) of ``x`` (size,)."""
        if self._metric is None or self._centre is None:
            return x
        return self._centre + self._metric.forward(x[None])[0]

    def _energy_at(self, params: Params) -> Tensor:
        return cast("Tensor", _WithGradient.apply(params["x"], self._evaluate_whitened))

    def _evaluate_whitened(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Potential and its gradient with respect to ``x`` (size,)."""
        potential, gradient = self._evaluate(self._unwhitened(x))
        return potential, gradient if self._metric is None else self._metric.transposed(gradient[None])[0]

    def _evaluate_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Potential (1,) and gradient (1, size) of a single row of ``z``."""
        potential, gradient = self._evaluate(rows[0])
        return potential[None], gradient[None]

    def _find_start(self, tries: int = 100) -> Tensor:
        potential = self._potential
        if isinstance(self.init, Mapping):
            return potential.from_draw(self.init)
        if self.init == "prior":
            return potential.find_start(self._evaluate, potential.from_prior, tries)
        return potential.find_start(self._evaluate, lambda: potential.uniform(self._init_radius), tries)


class _WithGradient(torch.autograd.Function):
    """A scalar function whose gradient comes with its value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, evaluate: Any) -> Tensor:
        with torch.no_grad():
            value, gradient = evaluate(x)
        ctx.save_for_backward(gradient)
        return cast("Tensor", value)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return outputs[0] * gradient, None
