"""Causal graphs of labelled continuous concepts: which is a direct cause of which, with probabilities.

Generative model, for concepts j = 1..n with causes P_j in a directed acyclic graph::

    graph ~ p(graph),  each edge with odds p / (1 - p), among the acyclic graphs that knowledge allows
    x_j = f_j(x_P_j) + noise_j,   f_j ~ a Gaussian process, linear or smooth; noise of some scale and shape

Functions, scales and shapes are integrated out, see `probmodels.causal_graph.scores`, so that a graph has a prior, a
sum of scores, and nothing to fit: up to 12 concepts the posterior over all graphs is computed exactly, see
`probmodels.guides.causal_graph`. `run_mcmc` draws from it independently; `fit_svi` fits the policy of
`probmodels.guides.bayesian_network` to it. An edge whose direction data do not tell has that said by its probability.

With ``graph="point"`` one graph is fitted by gradients instead, of least squares, sparsity and a constraint to be
acyclic, as NOTEARS and DAGMA have it::

    sum over rows |x - f(x)|^2 / 2 + rows * (sparsity * strengths + constraint)

References
----------
Friedman, N. and Koller, D. (2003). Being Bayesian about network structure. Mach. Learn. 50.
https://doi.org/10.1023/A:1020249912095
Koivisto, M. and Sood, K. (2004). Exact Bayesian structure discovery in Bayesian networks. JMLR 5.
Zheng, X., Aragam, B., Ravikumar, P. and Xing, E. (2018). DAGs with NO TEARS. NeurIPS. https://arxiv.org/abs/1803.01422
Zheng, X., Dan, C., Aragam, B., Ravikumar, P. and Xing, E. (2020). Learning sparse nonparametric DAGs. AISTATS.
https://arxiv.org/abs/1909.13189
Bello, K., Aragam, B. and Ravikumar, P. (2022). DAGMA. NeurIPS. https://arxiv.org/abs/2209.08037
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from numpy.typing import NDArray
from pyro.distributions import constraints
from pyro.nn import PyroModule
from scipy.stats import qmc
from torch import Tensor, nn

from probmodels.bayesian_network.model import BayesianNetwork, Rising
from probmodels.bayesian_network.outputs import write_outputs as write_network
from probmodels.causal_graph.knowledge import Knowledge
from probmodels.causal_graph.scores import FLOORS, KERNELS, Scores, mechanism_scores
from probmodels.errors import DataError, ProblemError
from probmodels.guides.acyclicity import log_determinant, to_dag, trace_exponential
from probmodels.guides.bayesian_network import EdgePolicy
from probmodels.guides.causal_graph import GraphMixture, GraphTable, ModularGraphs
from probmodels.inference.flows.balance import ParallelVarGrad
from probmodels.inference.mcmc.kernels import Kernel
from probmodels.inference.problem import Problem
from probmodels.inference.result import Result
from probmodels.inference.variational.constraints import Constraint
from probmodels.options import check_choices, check_counts, check_numbers
from probmodels.outputs import Outputs

__all__ = [
    "ENGINES",
    "REFERENCE",
    "CausalGraph",
    "ExactGraphs",
    "PointGraph",
    "edge_probabilities",
    "make_problem",
    "tiny",
    "write_outputs",
]

REFERENCE = "Koivisto and Sood (2004), Zheng et al. (2018), https://arxiv.org/abs/1803.01422"
ENGINES = ("mcmc", "svi")

_MOST_CONCEPTS = 12  # 4^12 terms of the sums over graphs
_FEWEST_ROWS = 10
_LARGE, _MOST_SETTINGS, _FEWER_SETTINGS = 10, 64, 8  # settings of floors, fewer for more concepts than these: memory
_STRONG = 10.0  # log Bayes factor
_UNWANTED = 100.0  # log weight that a graph of the policy loses with a required edge
_NEGLIGIBLE = 30.0  # of log probabilities
_DECAY = 0.01  # of the outer weights of networks, or strengths could shrink for nothing
_AXES = ["cause", "effect"]

Floats = NDArray[np.float64]


class CausalGraph(BayesianNetwork):
    """Graphs with the marginal likelihood of their mechanisms.

    With several settings of what data cannot tell, such as how little noise there is, the posterior is the mean of
    those of each setting: data have no say in their weights.

    Parameters
    ----------
    scores
        Log marginal likelihood of every concept given every set of causes (setting, concept, set).
    prior
        Log weights of the same sets in the prior (concept, set), -inf for those that cannot be.
    """

    every: Tensor
    offset: Tensor

    def __init__(self, scores: Floats, prior: Floats) -> None:
        super().__init__(torch.as_tensor(scores[0]))
        self.prior = GraphTable(prior)
        self.posterior = GraphMixture([GraphTable(prior + np.where(np.isfinite(prior), one, 0.0)) for one in scores])
        empty = scores[:, :, :1]
        self.register_buffer("every", torch.as_tensor(scores - empty).flatten(1).to(torch.get_default_dtype()))
        # Of a graph with no edge, in units of the evidence of a setting.
        offset = empty.sum((1, 2)) - [table.log_total for table in self.posterior.tables] + self.posterior.log_total
        self.register_buffer("offset", torch.as_tensor(offset).to(self.every))

    def forward(self) -> None:
        """Site ``graph`` (cause, effect) and the factor ``score``."""
        named: Any = {"event_dims": _AXES}
        graph = pyro.sample("graph", ModularGraphs(self.prior), infer=named)
        pyro.factor("score", self.log_likelihood(graph))

    def log_likelihood(self, graph: Tensor) -> Tensor:
        """Log marginal likelihood (...) of graphs (..., parent, child)."""
        sets = (graph.mT.to(self.place.dtype) @ self.place).long()
        each = self.every[:, sets + self.first].sum(-1)  # (setting, ...)
        offset = self.offset.reshape(-1, *[1] * (each.dim() - 1))
        return (each + offset).logsumexp(0) - math.log(len(self.offset))


class ExactGraphs(Kernel):
    """Independent draws from the posterior.

    Parameters
    ----------
    problem
        As `make_problem` makes it.

    Raises
    ------
    ProblemError
        If the problem has no posterior over graphs.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        if not isinstance(problem.model, CausalGraph):
            raise ProblemError(f"{problem.name}: graph='point' has one graph and no posterior; use fit_svi")
        self._posterior = problem.model.posterior
        self._density = 0.0

    def seed(self, seed: int) -> None:
        """Draws use a generator of the kernel's own."""
        self._generator = np.random.default_rng(seed)

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare."""

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """A draw."""
        return self.sample({})

    @initial_params.setter
    def initial_params(self, params: Mapping[str, Tensor]) -> None:
        """Starts do not matter."""

    def sample(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A draw, whatever the one before."""
        graph = self._posterior.draw(self._generator)
        self._density = self._posterior.log_probability(graph)
        return {"graph": torch.as_tensor(graph, dtype=torch.get_default_dtype())}

    def sample_stats(self) -> dict[str, Any]:
        """``lp``, the log posterior probability."""
        return {"lp": self._density}

    def state_dict(self) -> dict[str, Tensor | int | float | str]:
        """The generator."""
        return {"generator": json.dumps(self._generator.bit_generator.state)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._generator.bit_generator.state = json.loads(str(state["generator"]))


def edge_probabilities(problem: Problem) -> xr.DataArray:
    """Exact posterior probabilities of edges (cause, effect), without draws.

    Raises
    ------
    ProblemError
        If the problem has no posterior over graphs.
    """
    if not isinstance(problem.model, CausalGraph):
        raise ProblemError(f"{problem.name}: graph='point' has one graph and no posterior")
    found = problem.model.posterior.edge_probability()
    return xr.DataArray(found, dims=_AXES, coords={axis: problem.coords[axis] for axis in _AXES})


class PointGraph(PyroModule):
    """Functions of all concepts that are to use few of them and no cycle.

    Parameters
    ----------
    x
        Values (data, concept).
    knowledge
        Edges that may and must be there.
    mechanism
        ``"linear"``, or ``"any"`` for a network of one hidden layer for each concept.
    constraint
        ``"notears"`` or ``"dagma"``.
    sparsity
        Weight of the sum of strengths.
    start
        ``"zero"``, ``"random"``, or ``"superset"``: edges from each concept to all later ones.
    threshold
        Strength that an edge of the graph has to exceed.
    hidden
        Width of the networks.
    seed
        Of the start.
    """

    allowed: Tensor
    required: Tensor
    x: Tensor

    def __init__(
        self,
        x: Tensor,
        knowledge: Knowledge,
        *,
        mechanism: str,
        constraint: str,
        sparsity: float,
        start: str,
        threshold: float,
        hidden: int,
        seed: int,
    ) -> None:
        super().__init__()
        size, self.sparsity, self.threshold = x.shape[1], sparsity, threshold
        for name, value in (("x", x), ("allowed", knowledge.allowed.to(x)), ("required", knowledge.required.to(x))):
            self.register_buffer(name, value)
        generator = torch.Generator().manual_seed(seed)
        width = hidden if mechanism == "any" else 1
        first = torch.randn(size, size, width, generator=generator)
        first = {
            "zero": 1e-3 * first,
            "random": first / math.sqrt(width),
            "superset": torch.ones(size, size).triu(1).unsqueeze(-1) * first.sign() / math.sqrt(width),
        }[start]
        self.first = nn.Parameter(first.to(x))  # (cause, effect, unit)
        if mechanism == "any":
            self.bias = nn.Parameter(torch.randn(size, width, generator=generator).to(x))
            self.second = nn.Parameter((torch.randn(size, width, generator=generator) / math.sqrt(width)).to(x))
            self.constant = nn.Parameter(torch.zeros(size).to(x))
        self.mechanism = mechanism
        self.measure = {"notears": trace_exponential, "dagma": _dagma}[constraint]
        self.constraint = Constraint(self.violation, every=200, growth=4.0, fall=0.25)

    def strength(self) -> Tensor:
        """Norm of the weights by which a concept enters the function of another (cause, effect)."""
        return (self.first.square().sum(-1) + 1e-12).sqrt() * self.allowed

    def violation(self) -> Tensor:
        """How far the strengths are from an acyclic graph ()."""
        return self.measure(self.strength().square())

    def fitted(self, x: Tensor) -> Tensor:
        """Functions (data, effect) of concepts (data, cause)."""
        weights = self.first * self.allowed.unsqueeze(-1)
        if self.mechanism == "linear":
            return x @ weights.squeeze(-1)
        units = torch.einsum("dc,ceu->deu", x, weights) + self.bias
        return (units.tanh() * self.second).sum(-1) + self.constant

    def forward(self) -> None:
        """Observed ``label`` (data, concept), penalties, and the leaf ``graph`` (cause, effect) with its strengths."""
        count, strength = len(self.x), self.strength()
        shrunk = self.sparsity * (strength * (1 - self.required)).sum()
        if self.mechanism == "any":
            shrunk = shrunk + _DECAY / 2 * self.second.square().sum()
        pyro.factor("penalty", -count * (shrunk + self.constraint()))
        rows: Any = {"event_dims": ["concept"]}
        with pyro.plate("data", count):
            pyro.sample("label", dist.Normal(self.fitted(self.x), 1.0).to_event(1), obs=self.x, infer=rows)
        leaf: Any = {"event_dims": _AXES, "generated": True}
        pyro.sample("graph", _Cut(strength, self.threshold, self.required), infer=leaf)


class _Cut(dist.TorchDistribution):
    """The acyclic graph of strengths, computed where it is asked for."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 -- as torch declares it
    support = constraints.independent(constraints.boolean, 2)

    def __init__(self, strength: Tensor, threshold: float, required: Tensor) -> None:
        self.strength, self.threshold, self.required = strength, threshold, required
        super().__init__(torch.Size(), strength.shape, validate_args=False)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 -- torch's own signature
        return to_dag(self.strength, self.threshold, keep=self.required).expand(*sample_shape, *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return value.new_zeros(value.shape[:-2])


def _dagma(weights: Tensor) -> Tensor:
    return log_determinant(weights, s=None)


def _no_sites() -> None:
    """Guide of a point."""


def make_problem(
    data: xr.Dataset | xr.DataArray | pd.DataFrame,
    *,
    graph: str = "posterior",
    mechanism: str = "any",
    required: Sequence[Sequence[str]] = (),
    forbidden: Sequence[Sequence[str]] = (),
    tiers: Sequence[Sequence[str]] | None = None,
    order: Sequence[str] | None = None,
    standardise: bool = True,
    noise: str = "any",
    floors: Sequence[float] = FLOORS,
    edge_probability: float = 0.2,
    max_parents: int | None = None,
    num_points: int = 80,
    hidden: int | None = None,
    num_particles: int = 64,
    anneal: int = 1000,
    constraint: str = "notears",
    start: str = "zero",
    sparsity: float = 0.03,
    threshold: float = 0.3,
    seed: int = 0,
) -> Problem:
    """A causal graph of labelled concepts.

    Parameters
    ----------
    data
        A data set with ``label`` (data, concept), of which rows with missing labels or with ``split`` other than
        ``"train"`` are left out; an array of these dims; or a frame whose columns are concepts.
    graph
        ``"posterior"`` over all graphs, or one ``"point"``.
    mechanism
        ``"any"`` smooth function of the causes, or ``"linear"`` ones.
    required, forbidden, tiers, order
        What is known, see `probmodels.causal_graph.knowledge.Knowledge`.
    standardise
        Whether concepts are brought to mean 0 and standard deviation 1; only means are taken off otherwise.
    noise
        Of the posterior: of ``"any"`` shape, or ``"normal"``.
    floors
        Of the posterior: standard deviations of noise, in those of a concept, that cannot be told from none. Where some
        causes predict a concept to within the largest of them, directions hang on noise that data do not show:
        probabilities are averaged over all floors, and a warning names the concepts.
    edge_probability
        Of the posterior's prior: odds of each edge, but for the ban on cycles.
    max_parents
        Of the posterior: most causes of a concept; None for any number.
    num_points
        Of the posterior: rank of smooth functions, see `probmodels.causal_graph.scores.mechanism_scores`.
    hidden
        Width of layers: of the policy, or of a point's networks; None for 64 and 10.
    num_particles, anneal
        Of `fit_svi` with a posterior, see `probmodels.bayesian_network.make_problem`.
    constraint
        Of a point: ``"notears"``, the trace of the matrix exponential, or ``"dagma"``, the log-determinant.
    start
        Of a point: ``"zero"``, ``"random"``, or ``"superset"``, edges from each concept to all later ones.
    sparsity
        Of a point: weight of strengths.
    threshold
        Of a point: strength that an edge has to exceed.
    seed
        Of starts, of the rows that functions are spanned by, and of settings of ``floors`` where there are many.

    Returns
    -------
    Problem
        For `run_mcmc` and `fit_svi`; a point for `fit_svi`.

    Raises
    ------
    DataError
        If labels are missing, constant, of too few rows or of too many concepts, or an option is out of range.
    ProblemError
        If knowledge contradicts itself.
    """
    check_choices(
        graph=(graph, ("posterior", "point")),
        mechanism=(mechanism, ("any", "linear")),
        noise=(noise, ("any", "normal")),
        constraint=(constraint, ("notears", "dagma")),
        start=(start, ("zero", "random", "superset")),
    )
    check_numbers(0, 1, ends="()", edge_probability=edge_probability)
    check_numbers(0, sparsity=sparsity, threshold=threshold)
    floors = sorted({float(floor) for floor in np.atleast_1d(floors)})
    if not floors or not all(0 < floor < 1 for floor in floors):
        raise DataError(f"floors={floors}; give standard deviations between 0 and 1, such as {FLOORS}")
    check_counts(2, num_points=num_points, num_particles=num_particles)
    check_counts(0, anneal=anneal)
    for name, value in (("max_parents", max_parents), ("hidden", hidden)):
        if value is not None:
            check_counts(1, **{name: value})
    labels = _labels(data)
    names = [str(name) for name in labels["concept"].values]
    if graph == "posterior" and len(names) > _MOST_CONCEPTS:
        raise DataError(f"data have {len(names)} concepts; a posterior takes up to {_MOST_CONCEPTS}, or graph='point'")
    knowledge = Knowledge(names, required, forbidden, tiers, order)
    x = labels.values - labels.values.mean(0)
    x = x / x.std(0) if standardise or graph == "posterior" else x
    kept: dict[str, Any] = {"label": labels}
    if isinstance(data, xr.Dataset) and "graph" in data:
        kept["true_graph"] = (_AXES, np.asarray(data["graph"].transpose(*_AXES).values))
    coords: dict[str, Any] = {"cause": names, "effect": names, "concept": names, "data": labels["data"].values}
    common: dict[str, Any] = {
        "name": "causal_graph",
        "coords": coords,
        "data": xr.Dataset(kept, attrs={"graph": graph}),
        "kernel": ExactGraphs,
    }
    if graph == "point":
        point = PointGraph(
            torch.as_tensor(x, dtype=torch.get_default_dtype()),
            knowledge,
            mechanism=mechanism,
            constraint=constraint,
            sparsity=sparsity,
            start=start,
            threshold=threshold,
            hidden=hidden or 10,
            seed=seed,
        )
        return Problem(model=point, guide=_no_sites, **common)
    prior = _prior(knowledge, edge_probability, max_parents)
    if not math.isfinite(GraphTable(prior).log_total):
        raise DataError(f"max_parents={max_parents} is less than the causes that required edges give to a concept")
    found = mechanism_scores(
        x,
        max_parents=max_parents,
        kernels=KERNELS if mechanism == "any" else ("linear",),
        noise=noise,
        num_points=num_points,
        allowed=knowledge.allowed.numpy(),
        floors=floors,
        seed=seed,
    )
    scores = _settings(found, knowledge, floors, seed)
    model = CausalGraph(scores, prior)
    # A policy can leave out any edge: graphs that lack required ones are improbable for it, not impossible.
    typical = scores.mean(0)
    wanted = _prior(knowledge, edge_probability, max_parents, _UNWANTED) + np.where(np.isfinite(typical), typical, 0.0)
    log_count = GraphTable(np.where(np.isfinite(prior), 0.0, -np.inf)).log_total
    floor = model.posterior.log_total - model.prior.log_total - log_count - _NEGLIGIBLE
    return Problem(
        model=model,
        guide=EdgePolicy(torch.as_tensor(wanted), hidden=hidden or 64, seed=seed),
        loss=ParallelVarGrad(num_particles, epsilon=0.05, floor=floor, reward_power=Rising(anneal) if anneal else 1.0),
        **common,
    )


def _settings(found: Scores, knowledge: Knowledge, floors: Sequence[float], seed: int) -> Floats:
    """Scores (setting, concept, set) for floors of the noise of each concept whose noise data do not show."""
    scores, count = found.log_likelihood, len(floors)
    # Of few rows some sets that are no causes fit all: those count that data prefer, and by far to no cause at all.
    likely = (scores[0] > scores[0].max(1, keepdims=True) - _STRONG) & (scores[0] > scores[0, :, :1] + _STRONG)
    hidden = np.flatnonzero((likely & (found.remainder < max(floors))).any(1))
    if not len(hidden):
        return scores[:1]
    names = list(knowledge.names)
    if (knowledge.allowed & knowledge.allowed.T)[hidden].any():
        warnings.warn(
            f"other concepts predict {', '.join(names[place] for place in hidden)} to within {max(floors):g} standard "
            "deviations: directions of these relations hang on noise that the data do not show. Probabilities of edges "
            f"are averaged over floors of that noise, {floors}; what is known of them, give as order, tiers, required "
            "or forbidden",
            stacklevel=3,
        )
    if count == 1:
        return scores
    most = _MOST_SETTINGS if len(names) <= _LARGE else _FEWER_SETTINGS
    if count ** len(hidden) <= most:
        picked = np.stack(np.meshgrid(*[np.arange(count)] * len(hidden)), -1).reshape(-1, len(hidden))
    else:  # every floor of every concept equally often
        picked = (qmc.LatinHypercube(len(hidden), rng=seed).random(most) * count).astype(int)
    settings = np.zeros((len(picked), len(names)), dtype=int)
    settings[:, hidden] = picked
    return scores[settings, np.arange(len(names))]


def tiny() -> Problem:
    """Three concepts in a linear chain with normal noise, whose directions data do not tell, for tests."""
    values = np.random.default_rng(0).standard_normal((40, 3))
    values[:, 1] += values[:, 0]
    values[:, 2] += values[:, 1]
    return make_problem(pd.DataFrame(values, columns=["a", "b", "c"]), hidden=8, num_particles=16, anneal=0)


def write_outputs(result: Result, folder: str | Path) -> Outputs:
    """Write tables and figures of edges and graphs, see `probmodels.bayesian_network.outputs.write_network`."""
    return write_network(result, folder)


def _prior(knowledge: Knowledge, probability: float, most: int | None, unwanted: float = math.inf) -> Floats:
    """Log weights of sets of causes (concept, set); each required edge that is lacking costs ``unwanted``."""
    size = len(knowledge.names)
    holds = np.arange(2**size)[:, None] >> np.arange(size) & 1 == 1  # (set, cause)
    number = holds.sum(1)
    found = np.tile(number * math.log(probability / (1 - probability)), (size, 1))
    for node in range(size):
        lacking = (knowledge.required[:, node].numpy() & ~holds).sum(1)
        found[node, lacking > 0] -= unwanted * lacking[lacking > 0]
        found[node, (holds & ~knowledge.allowed[:, node].numpy()).any(1) | (number > (most or size))] = -np.inf
    return found


def _labels(data: Any) -> xr.DataArray:
    """Labels (data, concept) of the rows that have all of them."""
    if isinstance(data, pd.DataFrame):
        bad = [str(name) for name, kind in data.dtypes.items() if kind.kind not in "iufb"]
        if bad:
            raise DataError(f"column {bad[0]!r} holds no numbers; leave it out, or give its categories numbers")
        coords = {"concept": [str(name) for name in data.columns], "data": np.arange(len(data))}
        table = xr.DataArray(data.to_numpy(dtype=np.float64), dims=("data", "concept"), coords=coords)
    elif isinstance(data, xr.Dataset | xr.DataArray):
        if isinstance(data, xr.Dataset):
            if "label" not in data:
                raise DataError(f"data hold {list(data.data_vars)}; name the concepts' values 'label' (data, concept)")
            table = data["label"]
            if "split" in data:
                table = table[(data["split"] == "train").values]
        else:
            table = data
        if set(table.dims) != {"data", "concept"}:
            raise DataError(f"labels have dims {table.dims}; expected data and concept")
        table = table.transpose("data", "concept").astype(np.float64)
    else:
        raise DataError(f"data of type {type(data).__name__}; give a frame, or an xarray array or data set")
    for dim in table.dims:
        if dim not in table.coords:
            table = table.assign_coords({dim: np.arange(table.sizes[dim])})
    names = pd.Index(table["concept"].values)
    if len(names) < 2:
        raise DataError(f"data have {len(names)} concepts; a graph needs at least 2")
    if not names.is_unique:
        raise DataError(f"concept {str(names[names.duplicated()][0])!r} occurs twice; give each a name of its own")
    complete = table[~np.isnan(table.values).any(1)]
    if len(complete) < _FEWEST_ROWS:
        raise DataError(f"{len(complete)} of {len(table)} rows have all labels; give at least {_FEWEST_ROWS}")
    values = complete.values
    if not np.isfinite(values).all():
        raise DataError("labels hold infinite values; drop their rows")
    constant = np.ptp(values, axis=0) <= 1e-12 * np.abs(values).max(0)
    if constant.any():
        raise DataError(f"concept {str(names[constant.argmax()])!r} is constant; leave it out")
    return complete.reset_coords(drop=True).rename(None)
