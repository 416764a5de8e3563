"""Structural equation models fitted under an acyclicity constraint: one causal graph of concepts, by gradients.

Functions f of all concepts are to use few of them, and no cycle::

    x = f(x) + noise
    loss = sum over rows |x - f(x)|^2 / 2 + rows * (sparsity * strengths + constraint)

where the strength B_ij is the norm of the weights by which concept i enters the function of concept j. The constraint
h(B o B) = 0 holds exactly for acyclic graphs; it is met by an augmented Lagrangian whose multiplier follows the steps
of `fit_svi`. The graph is what remains of the strengths above a threshold once the weakest edge of every cycle is gone.

It is a point estimate: there are no probabilities, and with concepts on different scales their variances decide the
order of the graph. Up to 12 concepts, `probmodels.causal_graph` has the exact posterior.

References
----------
Zheng, X., Aragam, B., Ravikumar, P. and Xing, E. (2018). DAGs with NO TEARS. NeurIPS. https://arxiv.org/abs/1803.01422
Zheng, X., Dan, C., Aragam, B., Ravikumar, P. and Xing, E. (2020). Learning sparse nonparametric DAGs. AISTATS.
https://arxiv.org/abs/1909.13189
Bello, K., Aragam, B. and Ravikumar, P. (2022). DAGMA. NeurIPS. https://arxiv.org/abs/2209.08037
Reisach, A., Seiler, C. and Weichwald, S. (2021). Beware of the simulated DAG! NeurIPS.
https://arxiv.org/abs/2102.13647
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from annotated_types import Interval
from numpy.typing import NDArray
from pyro.distributions import constraints
from pyro.nn import PyroModule
from scipy.stats import levene
from torch import Tensor, nn

from probmodels.causal_graph.checks import dependence_findings
from probmodels.causal_graph.knowledge import Edges, Knowledge, Names
from probmodels.causal_graph.residuals import residual_tests
from probmodels.causal_graph.scores import KERNELS
from probmodels.causal_graph.tables import complete_labels, kept_labels
from probmodels.errors import DataError, ResultError
from probmodels.guides.acyclicity import log_determinant, to_dag, trace_exponential
from probmodels.inference.diagnostics.findings import Finding
from probmodels.inference.diagnostics.guides import still_falling
from probmodels.inference.problem import Problem
from probmodels.inference.result import Result
from probmodels.inference.variational.constraints import Constraint
from probmodels.options import Seed, checked, refuse_unused
from probmodels.outputs import Outputs, loss_figure, write_all

__all__ = [
    "ENGINES",
    "REFERENCE",
    "AcyclicSEM",
    "check_draws",
    "check_model",
    "fitted_edges",
    "make_problem",
    "tiny",
    "write_outputs",
]

REFERENCE = "Zheng et al. (2018), https://arxiv.org/abs/1803.01422"
ENGINES = ("svi",)

_DECAY = 0.01  # of the outer weights of networks, or strengths could shrink for nothing
_AXES = ["cause", "effect"]
_NEAR = 0.1  # of the threshold: strengths within this share of it could as well be on its other side
_UNEQUAL, _RARE = 1.25, 0.001  # ratio of standard deviations of noise, and its tail probability if they are equal
_MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "notears": trace_exponential,
    "dagma": partial(log_determinant, s=None),
}


class AcyclicSEM(PyroModule):
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
        Seed of the starting values.
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
        self.mechanism, self.measure = mechanism, _MEASURES[constraint]
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


def _no_sites() -> None:
    """Guide of a point estimate."""


@checked(DataError, keep=True)
def make_problem(
    data: xr.Dataset | xr.DataArray | pd.DataFrame,
    *,
    mechanism: Literal["any", "linear"] = "any",
    required: Edges = (),
    forbidden: Edges = (),
    tiers: Sequence[Names] | None = None,
    order: Names | None = None,
    standardise: bool = True,
    constraint: Literal["notears", "dagma"] = "notears",
    start: Literal["zero", "random", "superset"] = "zero",
    sparsity: Annotated[float, Interval(ge=0, le=1e3)] = 0.03,
    threshold: Annotated[float, Interval(ge=0, le=1e3)] = 0.3,
    hidden: Annotated[int, Interval(ge=1, le=1024)] = 10,
    seed: Seed = 0,
) -> Problem:
    """One causal graph of labelled concepts.

    Parameters
    ----------
    data
        A data set with ``label`` (data, concept), of which rows with missing labels or with ``split`` other than
        ``"train"`` are left out; an array of these dims; or a frame whose columns are concepts.
    mechanism
        ``"any"`` smooth function of the causes, a network of one hidden layer for each concept, or ``"linear"`` ones.
    required, forbidden, tiers, order
        What is known, see `probmodels.causal_graph.knowledge.Knowledge`.
    standardise
        Whether concepts are brought to mean 0 and standard deviation 1; only means are taken off otherwise.
    constraint
        ``"notears"``, the trace of the matrix exponential, or ``"dagma"``, the log-determinant.
    start
        Starting weights: near ``"zero"``, ``"random"``, or ``"superset"``, edges from each concept to all later ones.
    sparsity
        Weight of the sum of strengths.
    threshold
        Strength that an edge of the graph has to exceed.
    hidden
        Width of the networks of mechanism ``"any"``.
    seed
        Seed of the starting weights.

    Returns
    -------
    Problem
        For `fit_svi`, whose draws of ``graph`` are all the same.

    Raises
    ------
    DataError
        If labels are missing, constant or of too few rows, knowledge contradicts itself, or an option is out of range
        or not used.
    """
    if mechanism == "linear":
        refuse_unused(make_problem, "mechanism='linear'", hidden=hidden)
    labels = complete_labels(data)
    names = list(labels["concept"].values)
    knowledge = Knowledge(names, required, forbidden, tiers, order)
    x = labels.values - labels.values.mean(0)
    x = x / x.std(0) if standardise else x
    model = AcyclicSEM(
        torch.as_tensor(x, dtype=torch.get_default_dtype()),
        knowledge,
        mechanism=mechanism,
        constraint=constraint,
        sparsity=sparsity,
        start=start,
        threshold=threshold,
        hidden=hidden,
        seed=seed,
    )
    rows: Any = labels["data"].values
    return Problem(
        name="acyclic_sem",
        model=model,
        guide=_no_sites,
        coords={"cause": names, "effect": names, "concept": names, "data": rows},
        data=kept_labels(data, labels),
    )


def tiny() -> Problem:
    """Three concepts in a linear chain, for tests."""
    values = np.random.default_rng(0).standard_normal((40, 3))
    values[:, 1] += values[:, 0]
    values[:, 2] += values[:, 1]
    return make_problem(pd.DataFrame(values, columns=["a", "b", "c"]), mechanism="linear")


@checked(ResultError)
def fitted_edges(result: Result) -> pd.DataFrame:
    """Edges of the fitted graph, the strongest first.

    Parameters
    ----------
    result
        Result of `fit_svi` on a problem of this module.

    Returns
    -------
    pandas.DataFrame
        Columns ``cause``, ``effect``, ``strength``, and ``true`` where the true graph is known. A strength is no
        probability.

    Raises
    ------
    ResultError
        If the result is not one of this method.
    """
    if result.tree.attrs.get("method") != "acyclic_sem":
        raise ResultError(f"the result is of {result.tree.attrs.get('method')!r}; give one of probmodels.acyclic_sem")
    graph = result.posterior["graph"].isel(chain=0, draw=0, drop=True)
    names = graph["cause"].values
    strength = result.params()["first"].double().square().sum(-1).sqrt().numpy()
    truth = result.group("constant_data").get("true_graph")
    pairs = np.argwhere(graph.values > 0)
    columns = {
        "cause": [str(names[a]) for a, _ in pairs],
        "effect": [str(names[b]) for _, b in pairs],
        "strength": [strength[a, b] for a, b in pairs],
    }
    if truth is not None:
        columns["true"] = [int(truth.values[a, b]) for a, b in pairs]
    return pd.DataFrame(columns).sort_values("strength", ascending=False, ignore_index=True)


def check_draws(result: Result) -> Iterator[Finding]:
    """Findings on the fit of the one graph, in place of those on its draws, which are all the same.

    They cannot see whether another start would lead to another graph.
    """
    yield from still_falling(result.tree)
    model, graph = _fitted(result)
    strength = model.strength().detach().double().numpy()
    names = [str(name) for name in result.posterior["cause"].values]
    cut = [f"{names[i]} -> {names[j]}" for i, j in np.argwhere((strength > model.threshold) & ~graph)]
    verdict = f"{len(cut)} edges above the threshold were taken out to break cycles"
    verdict += f", as {cut[0]}" if cut else ""
    advice = "the constraint is not met: take more steps (num_steps), since its multiplier grows every 200"
    yield Finding(bool(cut), verdict, advice if cut else "")
    close = np.abs(strength - model.threshold) < _NEAR * model.threshold
    if close.any():
        verdict = f"{close.sum()} strengths are within {_NEAR:.0%} of threshold={model.threshold:g}"
        yield Finding(False, verdict, "whether these edges are there hangs on the threshold")
    verdict = f"one graph of {graph.sum()} edges, a point estimate: it has no probabilities, and other starts may lead "
    yield Finding(False, f"{verdict}to others", "compare other values of start and seed; up to 12 concepts, take "
                  "causal_graph")  # fmt: skip


def check_model(result: Result) -> Iterator[Finding]:
    """Findings on the noise under the graph: of one variance, and independent of causes, other concepts and rows.

    Where noise has other variances, they, and not the data's independences, decide directions.
    """
    model, graph = _fitted(result)
    residual = (model.x - model.fitted(model.x)).detach().double().numpy()
    names = [str(name) for name in result.posterior["cause"].values]
    spread = residual.std(0)
    ratio, tail = float(spread.max() / spread.min()), float(levene(*residual.T, center="median").pvalue)
    bad = ratio > _UNEQUAL and tail < _RARE
    verdict = f"noise has standard deviations of {spread.min():.2f} to {spread.max():.2f}, that of "
    verdict += f"{names[int(spread.argmin())]} and {names[int(spread.argmax())]} (ratio at most {_UNEQUAL:g}); "
    verdict += "the model has 1 for all"
    advice = "variances decide which concepts come first, so that directions may be wrong: state what is known, take "
    advice += "concepts of one unit with standardise=False, or, up to 12 concepts, take causal_graph"
    yield Finding(bad, verdict, advice if bad else "", part="model")
    kernels = ("linear",) if model.mechanism == "linear" else KERNELS
    tests = residual_tests(model.x.double().numpy(), graph, kernels=kernels)
    yield from dependence_findings(tests, names, len(residual))


def _fitted(result: Result) -> tuple[AcyclicSEM, NDArray[np.bool_]]:
    """The model with its fitted parameters, and the graph (cause, effect)."""
    model: Any = result.rebuild().model
    model.load_state_dict(model.state_dict() | result.params())
    return model, result.posterior["graph"].isel(chain=0, draw=0).transpose(*_AXES).values > 0


@checked(ResultError)
def write_outputs(
    result: Result, folder: str | Path, *, dpi: Annotated[int, Interval(ge=20, le=1200)] = 110
) -> Outputs:
    """Write ``edges.csv``, ``summary.txt`` and ``figures/graph.png``, ``figures/loss.png``.

    Parameters
    ----------
    result
        Result of `fit_svi` on a problem of this module.
    folder
        Where to; made where it is missing, files of the same names are replaced.
    dpi
        Resolution of the figures.

    Raises
    ------
    ResultError
        As `fitted_edges`.
    """
    from matplotlib.figure import Figure

    from probmodels.bayesian_network.outputs import draw_arrows

    edges = fitted_edges(result)
    graph = result.posterior["graph"].isel(chain=0, draw=0, drop=True)
    names = [str(name) for name in graph["cause"].values]
    lines = [f"  {row.strength:.3f}  {row.cause} -> {row.effect}" for row in edges.itertuples()]
    heading = f"One acyclic graph of {len(names)} concepts, {len(edges)} edges; strengths, which are no probabilities:"
    figure = Figure(figsize=(4.6, 4.6), layout="constrained")
    draw_arrows(figure.subplots(), graph.values.astype(float), names)
    return write_all(
        result,
        folder,
        table="\n".join([heading, *(lines or ["  no edge"])]),
        tables={"edges": edges},
        figures={"graph": figure} | loss_figure(result),
        dpi=dpi,
    )
