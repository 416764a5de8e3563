"""Causal graphs of labelled continuous concepts: which is a direct cause of which, with probabilities.

Generative model, for concepts j = 1..n with causes P_j in a directed acyclic graph::

    graph ~ p(graph),  each edge with odds p / (1 - p), among the acyclic graphs that knowledge allows
    x_j = f_j(x_P_j) + noise_j,   f_j ~ a Gaussian process, linear or smooth; noise of some scale and shape

Functions, scales and shapes are integrated out, see `probmodels.causal_graph.scores`, so that a graph has a prior, a
sum of scores, and nothing to fit: up to 12 concepts the posterior over all graphs is computed exactly, see
`probmodels.guides.causal_graph`. `run_mcmc` draws from it independently; `fit_svi` fits the policy of
`probmodels.guides.bayesian_network` to it. An edge whose direction data do not tell has that said by its probability.

A single graph by gradients, as NOTEARS and DAGMA have it, is `probmodels.acyclic_sem`.

References
----------
Friedman, N. and Koller, D. (2003). Being Bayesian about network structure. Mach. Learn. 50.
https://doi.org/10.1023/A:1020249912095
Koivisto, M. and Sood, K. (2004). Exact Bayesian structure discovery in Bayesian networks. JMLR 5.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import pyro
import torch
import xarray as xr
from annotated_types import Interval, Len
from numpy.typing import NDArray
from scipy.stats import qmc
from torch import Tensor

from probmodels.bayesian_network.model import BayesianNetwork, Rising
from probmodels.bayesian_network.outputs import write_outputs as write_network
from probmodels.causal_graph.knowledge import Edges, Knowledge, Names
from probmodels.causal_graph.scores import FLOORS, KERNELS, Scores, mechanism_scores
from probmodels.causal_graph.tables import complete_labels, kept_labels, refuse_few_values
from probmodels.errors import DataError, ProblemError, ResultError
from probmodels.guides.bayesian_network import EdgePolicy
from probmodels.guides.causal_graph import GraphMixture, GraphTable, ModularGraphs
from probmodels.inference.flows.balance import ParallelVarGrad
from probmodels.inference.mcmc.kernels import Kernel
from probmodels.inference.problem import Problem
from probmodels.inference.result import Result
from probmodels.options import Count, Fraction, Natural, Seed, checked, refuse_unused
from probmodels.outputs import Outputs

__all__ = [
    "ENGINES",
    "REFERENCE",
    "CausalGraph",
    "ExactGraphs",
    "make_problem",
    "tiny",
    "write_outputs",
]

REFERENCE = "Koivisto and Sood (2004), https://www.jmlr.org/papers/v5/koivisto04a.html"
ENGINES = ("mcmc", "svi")

_MOST_CONCEPTS = 12  # 4^12 terms of the sums over graphs
_LARGE, _MOST_SETTINGS, _FEWER_SETTINGS = 10, 64, 8  # settings of floors, fewer for more concepts than these: memory
_STRONG = 10.0  # log Bayes factor
_UNWANTED = 100.0  # log weight that a graph of the policy loses with a required edge
_NEGLIGIBLE = 30.0  # of log probabilities
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
        sets = (graph.mT.to(self.place) @ self.place).long()
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

    on_cpu = True

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        if not isinstance(problem.model, CausalGraph):
            raise ProblemError(f"{problem.name}: there is no posterior over graphs; use fit_svi")
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


@checked(DataError, keep=True)
def make_problem(
    data: xr.Dataset | xr.DataArray | pd.DataFrame,
    *,
    mechanism: Literal["any", "linear"] = "any",
    required: Edges = (),
    forbidden: Edges = (),
    tiers: Sequence[Names] | None = None,
    order: Names | None = None,
    noise: Literal["any", "normal"] = "any",
    floors: Annotated[Sequence[Annotated[float, Interval(ge=1e-6, lt=1)]], Len(1)] = FLOORS,
    edge_probability: Fraction = 0.2,
    max_parents: Count | None = None,
    num_points: Annotated[int, Interval(ge=2, le=2000)] = 80,
    hidden: Annotated[int, Interval(ge=1, le=4096)] = 64,
    num_particles: Annotated[int, Interval(ge=2, le=1_000_000)] = 64,
    anneal: Natural = 1000,
    seed: Seed = 0,
) -> Problem:
    """A causal graph of labelled concepts.

    Parameters
    ----------
    data
        A data set with ``label`` (data, concept), of which rows with missing labels or with ``split`` other than
        ``"train"`` are left out; an array of these dims; or a frame whose columns are concepts. Concepts are brought to
        mean 0 and standard deviation 1.
    mechanism
        ``"any"`` smooth function of the causes, or ``"linear"`` ones.
    required, forbidden, tiers, order
        What is known, see `probmodels.causal_graph.knowledge.Knowledge`.
    noise
        Noise of ``"any"`` shape, or ``"normal"``.
    floors
        Standard deviations of noise, in those of a concept, that cannot be told from none. Where some causes predict a
        concept to within the largest of them, directions hang on noise that data do not show: probabilities are
        averaged over all floors, and a warning names the concepts.
    edge_probability
        Probability of an edge in the prior, but for the ban on cycles.
    max_parents
        Most causes of a concept; None for any number.
    num_points
        Rank of smooth functions, see `probmodels.causal_graph.scores.mechanism_scores`.
    hidden
        Width of the hidden layers of the policy that `fit_svi` fits.
    num_particles, anneal
        Graphs in each step of `fit_svi`, and steps in which the power of the posterior rises to 1, see
        `probmodels.bayesian_network.make_problem`.
    seed
        Seed of the policy's starting values, of the rows that functions are spanned by, and of settings of ``floors``
        where there are many.

    Returns
    -------
    Problem
        For `run_mcmc` and `fit_svi`.

    Raises
    ------
    DataError
        If labels are missing, constant, of too few rows or of too many concepts, a concept that may have causes has few
        different values, knowledge contradicts itself, or an option is out of range or not used.
    """
    if mechanism == "linear":
        refuse_unused(make_problem, "mechanism='linear'", num_points=num_points)
    floors = sorted(set(map(float, floors)))
    labels = complete_labels(data)
    names = list(labels["concept"].values)
    if len(names) > _MOST_CONCEPTS:
        raise DataError(
            f"data have {len(names)} concepts; a posterior takes up to {_MOST_CONCEPTS}; of more, "
            "probmodels.acyclic_sem fits one graph"
        )
    knowledge = Knowledge(names, required, forbidden, tiers, order)
    refuse_few_values(labels, knowledge.allowed.any(0).numpy())
    prior = _prior(knowledge, edge_probability, max_parents)
    if not math.isfinite(GraphTable(prior).log_total):
        raise DataError(f"max_parents={max_parents} is less than the causes that required edges give to a concept")
    found = mechanism_scores(
        (labels.values - labels.values.mean(0)) / labels.values.std(0),
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
    rows: Any = labels["data"].values
    return Problem(
        name="causal_graph",
        model=model,
        guide=EdgePolicy(torch.as_tensor(wanted), hidden=hidden, seed=seed),
        coords={"cause": names, "effect": names, "concept": names, "data": rows},
        data=kept_labels(data, labels),
        kernel=ExactGraphs,
        loss=ParallelVarGrad(num_particles, epsilon=0.05, floor=floor, reward_power=Rising(anneal) if anneal else 1.0),
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
            stacklevel=4,
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


@checked(ResultError)
def write_outputs(result: Result, folder: str | Path) -> Outputs:
    """Write tables and figures of edges and graphs, see `probmodels.bayesian_network.write_outputs`."""
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
