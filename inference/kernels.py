"""Markov kernels that `run_mcmc` drives: the protocol, and Pyro's No-U-Turn sampler behind it."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import NUTS
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from pyro.ops.integrator import potential_grad
from torch import Tensor
from torch.distributions import biject_to

from probmodels.inference.ops import FixGenerated
from probmodels.inference.problem import Problem, ProblemError

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
    """

    dims: Mapping[str, Sequence[str]] = MappingProxyType({})

    @classmethod
    def prepare(cls) -> None:
        """Work that all chains share, done once in the calling process before any chain starts: compilation."""

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

    def sample_stats(self) -> dict[str, float]:
        """Statistics of the latest draw: ``lp``, ``acceptance_rate`` and the like; the same keys every time."""
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
    """Pyro's No-U-Turn sampler on the log density of a problem.

    Generated sites are hidden and ``problem.reparam`` is applied, so that every remaining site must be continuous
    and have a map to unconstrained space. ``sample`` moves one flat unconstrained vector ``z``; ``export`` returns
    the sites of the model, reparametrised and deterministic ones recomputed.

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

    Raises
    ------
    ProblemError
        If a site is discrete or its support has no map to unconstrained space, or no finite start is found.

    References
    ----------
    Hoffman, M. D. and Gelman, A. (2014). The No-U-Turn sampler. JMLR 15.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        target_accept_prob: float = 0.8,
        max_tree_depth: int = 10,
        full_mass: bool = False,
        init_radius: float = 2.0,
    ) -> None:
        super().__init__()
        discrete = [site.name for site in problem.sites.values() if site.discrete]
        if discrete:
            raise ProblemError(f"{problem.name}: NUTS cannot move discrete sites {discrete}; sum them out of the model")
        self._problem = problem
        self._model = poutine.reparam(FixGenerated()(problem.model), dict(problem.reparam))
        self._exported = set(problem.names("latent", "deterministic"))
        self._init_radius = init_radius
        self._nuts: Any = _RecordingNUTS(
            potential_fn=self._potential,
            target_accept_prob=target_accept_prob,
            max_tree_depth=max_tree_depth,
            full_mass=full_mass,
        )
        self._layout: OrderedDict[str, tuple[Any, torch.Size]] = OrderedDict()

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Read the sites, find a start of finite density and a first step size."""
        self._args, self._kwargs = args, kwargs
        self._layout = self._read_layout()
        self._nuts.initial_params = {"z": self._find_start()}
        self._nuts.setup(warmup_steps)

    @property
    def initial_params(self) -> Params:
        """Start of the chain: ``z`` (size,), unconstrained."""
        return self._nuts.initial_params

    @initial_params.setter
    def initial_params(self, params: Params) -> None:
        self._nuts.initial_params = params

    def sample(self, params: Params) -> Params:
        """One trajectory from ``params``; ``z`` (size,) to ``z`` (size,)."""
        return self._nuts.sample(params)

    def export(self, params: Params) -> Params:
        """Values of the model's latent and deterministic sites at ``z``."""
        values = self._constrain(params["z"])[0]
        with torch.no_grad():
            nodes = self._run(values).nodes
        return {name: nodes[name]["value"] for name in nodes if name in self._exported}

    def sample_stats(self) -> dict[str, float]:
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
            "z": nuts._z_last["z"],
            "potential": nuts._potential_energy_last,
            "gradient": nuts._z_grads_last["z"],
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
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``."""
        nuts, adapter = self._nuts, self._nuts._adapter
        nuts._cache({"z": state["z"]}, state["potential"], {"z": state["gradient"]})
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

    def _run(self, values: Params) -> Any:
        return poutine.trace(poutine.condition(self._model, values)).get_trace(*self._args, **self._kwargs)

    def _read_layout(self) -> OrderedDict[str, tuple[Any, torch.Size]]:
        """Bijection and unconstrained shape of every latent site of the reparametrised model."""
        layout: OrderedDict[str, tuple[Any, torch.Size]] = OrderedDict()
        self._like = torch.empty(0, dtype=torch.float16)  # grows to the widest type among the sites
        with torch.no_grad():
            trace: Any = poutine.trace(self._model).get_trace(*self._args, **self._kwargs)
            for name in trace.stochastic_nodes:
                node = trace.nodes[name]
                if type(node["fn"]).__name__ == "_Subsample":
                    continue
                try:
                    bijection = biject_to(node["fn"].support)
                except NotImplementedError as error:
                    raise ProblemError(
                        f"{self._problem.name}: site {name!r} has support {node['fn'].support}, which has no map to "
                        f"unconstrained space; give the problem reparam={{{name!r}: ...}} or a kernel of its own"
                    ) from error
                unconstrained = bijection.inv(node["value"])
                layout[name] = (bijection, unconstrained.shape)
                self._like = unconstrained.new_empty(0).to(torch.promote_types(self._like.dtype, unconstrained.dtype))
        if not layout:
            raise ProblemError(f"{self._problem.name}: the model has no latent site to sample")
        return layout

    def _find_start(self, tries: int = 100) -> Tensor:
        size = sum(shape.numel() for _, shape in self._layout.values())
        for _ in range(tries):
            z = (2 * torch.rand(size, dtype=torch.float64) - 1).to(self._like) * self._init_radius
            gradient, potential = potential_grad(self._potential, {"z": z})
            if torch.isfinite(potential) and torch.isfinite(gradient["z"]).all():
                return z
        raise ProblemError(
            f"{self._problem.name}: none of {tries} starts within {self._init_radius} of the origin of unconstrained "
            "space has a finite log density and gradient; check the data, or pass a smaller init_radius"
        )

    def _constrain(self, z: Tensor) -> tuple[Params, Tensor]:
        """Values of the sites at ``z`` (size,), and the log volume change of the map."""
        values, log_volume, start = {}, z.new_zeros(()), 0
        for name, (bijection, shape) in self._layout.items():
            part = z[start : start + shape.numel()].reshape(shape)
            values[name] = bijection(part)
            log_volume = log_volume + bijection.log_abs_det_jacobian(part, values[name]).sum()
            start += shape.numel()
        return values, log_volume

    def _potential(self, params: Params) -> Tensor:
        values, log_volume = self._constrain(params["z"])
        return -(self._run(values).log_prob_sum() + log_volume)
