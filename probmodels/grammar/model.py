"""Grammar induction: trees of sentences, and the grammar that explains them, from words alone.

Generative model, a probabilistic grammar in Chomsky normal form, for sentences s = 1..N of n_s words::

    root label ~ root,  (left, right) | label ~ rule[label],  word | preterminal ~ emission[preterminal]

Children are nonterminals, which have children of their own, or preterminals, which have a word; preterminals are summed
out node by node, so that the latent tree has labels at its inner nodes only. With ``parents=True`` rules depend on the
label above as well, rule[parent, label]: the density of a tree is then no product over its nodes alone.

Lengths are data. The density of a tree is that of the grammar, over trees of all lengths; draws of trees are exact ones
given the length. With ``left_branching`` b, exp(-b) weighs every left child that is no word: a prior of shapes.

The parameters are fitted: by `fit_em` with the policy of `probmodels.guides.grammar` as the guide, or, ``exact=True``,
on the likelihood with trees marginalised by the inside algorithm, which is there for both kinds of rules.

References
----------
Baker, J. K. (1979). Trainable grammars for speech recognition. J. Acoust. Soc. Am. 65.
https://doi.org/10.1121/1.2017061
Hu, E. J., Malkin, N., Jain, M., Everett, K., Graikos, A. and Bengio, Y. (2023). GFlowNet-EM for learning compositional
latent variable models. ICML. https://arxiv.org/abs/2302.06576
Johnson, M., Griffiths, T. L. and Goldwater, S. (2007). Bayesian inference for PCFGs via Markov chain Monte Carlo.
NAACL. https://aclanthology.org/N07-1018 (Dirichlet priors of rules.)
Kim, Y., Dyer, C. and Rush, A. M. (2019). Compound probabilistic context-free grammars for grammar induction. ACL.
https://arxiv.org/abs/1906.10225
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import pyro
import torch
import xarray as xr
from annotated_types import Interval
from pyro.nn import PyroModule
from torch import Tensor, nn

from probmodels.datasets.text import check_sentences, simulate_sentences
from probmodels.errors import DataError, ProblemError
from probmodels.grammar.inside import Tables, draw_trees, leaf_weights, log_likelihood, span_probabilities
from probmodels.grammar.trees import Trees, Words
from probmodels.guides.grammar import TreePolicy
from probmodels.inference.flows.balance import TrajectoryBalance, VarGrad
from probmodels.inference.problem import Problem
from probmodels.inference.programs.programs import fitted
from probmodels.inference.result import Result
from probmodels.options import OneOf, Seed, Width, checked, refuse_unused

__all__ = [
    "ENGINES",
    "REFERENCE",
    "Grammar",
    "draw_posterior_trees",
    "exact_log_likelihood",
    "exact_span_probabilities",
    "fitted_tables",
    "make_problem",
    "tiny",
]

REFERENCE = "Hu et al. (2023), https://arxiv.org/abs/2302.06576"
ENGINES = ("em",)
_UNIT = 12.0  # of log weights, so that one step size suits grammar and policy
_LOSSES: dict[str, Any] = {"VarGrad": VarGrad, "TrajectoryBalance": TrajectoryBalance}
_MOST_RULES = 2**27  # numbers of a table of rules
_Symbols = Annotated[int, Interval(ge=1, le=500)]


class Grammar(PyroModule):
    """The model.

    Parameters
    ----------
    tables
        The grammar at the start.
    size
        Positions, the most words of a sentence.
    learn
        Whether the grammar is fitted.
    exact
        Whether trees are marginalised.
    concentration
        Concentration of Dirichlet priors of rules and emissions.
    left_branching
        Energy of a left child that is no word.
    """

    def __init__(
        self,
        tables: Tables,
        size: int,
        *,
        learn: bool = True,
        exact: bool = False,
        concentration: float = 1.0,
        left_branching: float = 0.0,
    ) -> None:
        super().__init__()
        self.size, self.exact, self.concentration, self.left_branching = size, exact, concentration, left_branching
        self.learn = learn
        for name, table in tables._asdict().items():
            if learn:
                setattr(self, name, nn.Parameter(table.clamp(min=torch.finfo(table.dtype).tiny).log() / _UNIT))
            else:
                self.register_buffer(name, table.clone())

    def tables(self) -> Tables:
        """The grammar as it stands."""
        root, rule, emission = self.root, self.rule, self.emission
        if not self.learn:
            return Tables(root, rule, emission)
        root, rule, emission = ((_UNIT * x).softmax(-1) for x in (root, rule.flatten(2), emission))
        return Tables(root, rule.reshape(self.rule.shape), emission)

    def weighted_tables(self) -> Tables:
        """The same with the prior of shapes."""
        return self.tables().weighted(self.left_branching)

    def forward(self, word: Tensor, length: Tensor) -> None:
        """Sites ``tree`` (sentence, split, node), latent or, with trees marginalised, generated; ``word`` (sentence,
        position), observed.

        Parameters
        ----------
        word
            Codes (sentence, position).
        length
            Words of each sentence (sentence,).
        """
        tables = self.tables()
        named: Any = {"event_dims": ["split", "node"]}
        words: Any = {"event_dims": ["position"]}
        generated: Any = {**named, "generated": True}
        with pyro.plate("sentence", len(word), dim=-1) as rows:
            count, word, length = len(word), word[rows], length[rows]
            if self.concentration != 1:
                logs = tables.rule.clamp(min=1e-30).log().sum() + tables.emission.clamp(min=1e-30).log().sum()
                prior = (self.concentration - 1) * logs / count  # a share for every sentence
                pyro.factor("concentration", prior.expand(len(word)))
            if self.exact:
                weighted = self.weighted_tables()
                pyro.sample("word", Words(weighted, length, self.size), obs=word, infer=words)
                given = Trees(weighted, length, self.size, word=word)
                pyro.sample("tree", given, infer=generated)
                return
            tree = pyro.sample("tree", Trees(tables, length, self.size), infer=named)
            if self.left_branching:
                pyro.factor("shape", -self.left_branching * _left_branches(tree))
            pyro.sample("word", Words(tables, length, self.size, tree=tree), obs=word, infer=words)


def _left_branches(tree: Tensor) -> Tensor:
    """Number of left children that are no words."""
    split = torch.arange(tree.shape[-2], device=tree.device)
    return ((tree[..., 0] >= 0) & (tree[..., 1] < split)).sum(-1)


def _shapes(draws: xr.Dataset) -> xr.Dataset:
    """Invariant of draws: ``left_branches`` (..., sentence), the number of left children that are no words."""
    tree = draws["tree"]
    count = _left_branches(torch.as_tensor(tree.values)).double().numpy()
    return xr.Dataset({"left_branches": (tree.dims[:-2], count)})


@checked(DataError, keep=True)
def make_problem(
    data: xr.Dataset,
    *,
    num_nonterminals: _Symbols = 5,
    num_preterminals: _Symbols = 5,
    parents: bool = False,
    exact: bool = False,
    learn: bool = True,
    tables: Tables | None = None,
    concentration: Annotated[float, Interval(gt=0, le=1e6)] = 1.0,
    left_branching: Annotated[float, Interval(ge=-50, le=50)] = 0.0,
    spread: Annotated[float, Interval(gt=0, le=100)] = 1.0,
    loss: Annotated[str, OneOf(_LOSSES)] = "TrajectoryBalance",
    num_particles: Annotated[int, Interval(ge=1, le=10_000)] | None = None,
    epsilon: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
    width: Width = 64,
    layers: Annotated[int, Interval(ge=1, le=64)] = 2,
    heads: Annotated[int, Interval(ge=1, le=64)] = 4,
    look_ahead: bool = True,
    seed: Seed = 0,
) -> Problem:
    """A grammar of sentences, with a policy that draws their trees.

    Parameters
    ----------
    data
        Sentences, as `probmodels.datasets.text` describes them.
    num_nonterminals, num_preterminals
        Labels of inner nodes, and classes of words.
    parents
        Whether rules depend on the label of the parent.
    exact
        Whether trees are marginalised: for `fit_svi`, or the phase ``"wake"`` of `fit_em`, without a policy. Draws of
        trees are then exact.
    learn
        Whether the grammar is fitted; otherwise it is ``tables``, or the one that the data bring, ``true_rule`` and so
        on, and `fit_svi` fits the policy.
    tables
        The grammar at the start, with the symbols that it has; None for a random one.
    concentration
        Concentration of Dirichlet priors of rules and emissions, whose mode is fitted; 1 for flat ones.
    left_branching
        Energy of a left child that is no word; positive for trees that branch to the right.
    spread
        Standard deviation of the log weights of a random start.
    loss
        ``"TrajectoryBalance"`` or ``"VarGrad"``.
    num_particles
        Trees of each sentence in a step; None for 1, and 4 for ``"VarGrad"``, which needs at least 2.
    epsilon
        Share of uniform actions while the policy is trained; where the grammar learns from the same draws, 0.
    width, layers, heads
        Size of the policy's transformer; the width is a multiple of the number of heads.
    look_ahead
        Whether the policy looks at the grammar: actions start from what they add to the density.
    seed
        Seed of the start.

    Returns
    -------
    Problem
        For `fit_em`, whose default phases move policy and grammar by turns; plate ``sentence`` may be subsampled.

    Raises
    ------
    DataError
        If the data do not fit, or an option is out of range or not used.
    """
    check_sentences(data)
    if exact and not learn:
        raise DataError("exact=True with learn=False leaves nothing to fit; see exact_log_likelihood")
    of_policy: dict[str, Any] = {
        "loss": loss,
        "num_particles": num_particles,
        "epsilon": epsilon,
        "look_ahead": look_ahead,
    }
    of_policy |= {"width": width, "layers": layers, "heads": heads}
    of_start: dict[str, Any] = {"num_nonterminals": num_nonterminals, "num_preterminals": num_preterminals}
    of_start |= {"parents": parents, "spread": spread}
    _refuse_unused(exact, learn, tables is not None, of_policy, of_start, concentration, seed)
    if width % heads:
        raise DataError(f"width={width} is no multiple of heads={heads}; choose one that is")
    if loss == "VarGrad" and num_particles == 1:
        raise DataError("num_particles=1 with loss='VarGrad'; give at least 2, whose spread is the loss")
    num_words, size = data.sizes["vocabulary"], data.sizes["position"]
    if tables is not None:
        _check_tables(tables, num_words)
    elif not learn:
        tables = _true_tables(data)
    else:
        tables = _random_tables(num_nonterminals, num_preterminals, num_words, parents, spread, seed)
    word, length = (torch.as_tensor(data[name].values, dtype=torch.long) for name in ("word", "length"))
    model = Grammar(tables, size, learn=learn, exact=exact, concentration=concentration, left_branching=left_branching)
    policy = TreePolicy(
        num_words,
        tables.num_nonterminals,
        size,
        width=width,
        layers=layers,
        heads=heads,
        tables=model.weighted_tables if look_ahead else None,
        log_z=loss == "TrajectoryBalance",
        seed=seed,
    )
    given: dict[str, Any] = {} if num_particles is None else {"num_particles": num_particles}
    coords: dict[str, Any] = {
        "sentence": data["sentence"].values if "sentence" in data.coords else np.arange(len(word)),
        "position": np.arange(size),
        "split": np.arange(1, size),
        "node": ["label", "start", "end"],
    }
    return Problem(
        name="grammar",
        model=model,
        guide=_nothing if exact else policy,
        args=(word, length),
        coords=coords,
        data=data,
        batch_plates=("sentence",),
        invariants=_shapes,
        diagnosed=(),  # labels of trees are exchangeable; their shapes are not
        loss="Trace_ELBO" if exact else _LOSSES[loss](epsilon=epsilon, **given),
    )


def _refuse_unused(
    exact: bool,
    learn: bool,
    given: bool,
    of_policy: dict[str, Any],
    of_start: dict[str, Any],
    concentration: float,
    seed: int,
) -> None:
    """Refuse options of a policy that there is not, and of a start that is not random."""
    if exact:
        refuse_unused(make_problem, "exact=True", **of_policy)
    if given or not learn:
        start = "tables" if given else "learn=False"
        refuse_unused(make_problem, start, **of_start)
        if exact:
            refuse_unused(make_problem, f"exact=True and {start}", seed=seed)
    if not learn:
        refuse_unused(make_problem, "learn=False", concentration=concentration)


def _nothing(word: Tensor, length: Tensor) -> None:
    """Guide of a model without latent sites."""


def _random_tables(labels: int, classes: int, words: int, parents: bool, spread: float, seed: int) -> Tables:
    generator = torch.Generator().manual_seed(seed)
    symbols = labels + classes
    shape = (labels + 1 if parents else 1, labels, symbols**2)
    if math.prod(shape) > _MOST_RULES:
        raise DataError(
            f"num_nonterminals={labels} and num_preterminals={classes} have {math.prod(shape):,} rules; take fewer, at "
            f"most {_MOST_RULES:,} rules"
        )
    root, rule, emission = (
        (spread * torch.randn(*size, generator=generator)).softmax(-1) for size in ((labels,), shape, (classes, words))
    )
    return Tables(root, rule.reshape(*shape[:2], symbols, symbols), emission)


def _true_tables(data: xr.Dataset) -> Tables:
    names = [f"true_{name}" for name in Tables._fields]
    lost = [name for name in names if name not in data]
    if lost:
        raise DataError(f"learn=False needs a grammar: give tables, or data with {lost}")
    tables = Tables(*(torch.as_tensor(data[name].values, dtype=torch.get_default_dtype()) for name in names))
    _check_tables(tables, data.sizes["vocabulary"])
    return tables


def _check_tables(tables: Tables, num_words: int) -> None:
    labels, symbols = tables.root.shape[-1], tables.root.shape[-1] + tables.emission.shape[0]
    wanted: dict[str, list[tuple[int, ...]]] = {"root": [(labels,)], "emission": [(symbols - labels, num_words)]}
    wanted["rule"] = [(contexts, labels, symbols, symbols) for contexts in (1, labels + 1)]
    for name, shapes in wanted.items():
        table = getattr(tables, name)
        if tuple(table.shape) not in shapes:
            raise DataError(f"tables.{name} has shape {tuple(table.shape)}; give {' or '.join(map(str, shapes))}")
        sums = table.flatten(2).sum(-1) if name == "rule" else table.sum(-1)
        if not (table >= 0).all() or not ((sums - 1).abs() < 1e-4).all():
            raise DataError(f"tables.{name} are no probabilities: they have to be non-negative and sum to 1")


@checked(ProblemError)
def fitted_tables(problem: Problem, result: Result | None = None) -> Tables:
    """The grammar of a problem, at the start or as it was fitted.

    Raises
    ------
    ProblemError
        If the problem is none of a grammar.
    """
    if not isinstance(problem.model, Grammar):
        raise ProblemError(f"{problem.name} is no problem of grammars; make it by probmodels.grammar.make_problem")
    if result is None or result.guide_state is None:
        return Tables(*(table.detach() for table in problem.model.tables()))
    with fitted(problem, result.guide_state, seed=0) as (model, _):
        assert isinstance(model, Grammar)
        return Tables(*(table.detach().clone() for table in model.tables()))


@checked(ProblemError)
def exact_log_likelihood(
    problem: Problem, result: Result | None = None, data: xr.Dataset | None = None
) -> xr.DataArray:
    """Log probability (sentence,) of sentences with their trees marginalised, without priors of the grammar.

    Parameters
    ----------
    problem
        Problem of a grammar, with either kind of rules.
    result
        Result of a fit; None for the grammar at the start.
    data
        Other sentences, of the same vocabulary; None for those of the problem.
    """

    def function(tables: Tables, leaf: Tensor, length: Tensor) -> Tensor:
        return log_likelihood(tables, leaf, length)

    return xr.DataArray(_each(problem, result, data, function), dims="sentence")


@checked(ProblemError)
def exact_span_probabilities(
    problem: Problem, result: Result | None = None, data: xr.Dataset | None = None
) -> xr.DataArray:
    """Posterior probability (sentence, start, end) that words from start to before end are those below a node.

    Parameters are those of `exact_log_likelihood`.
    """
    return xr.DataArray(_each(problem, result, data, span_probabilities), dims=("sentence", "start", "end"))


@checked(ProblemError)
def draw_posterior_trees(
    problem: Problem, result: Result | None = None, data: xr.Dataset | None = None, *, seed: Seed = 0
) -> xr.DataArray:
    """One exact posterior draw (sentence, split, node) of the tree of each sentence.

    Parameters are those of `exact_log_likelihood`, and ``seed`` of the draws.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return xr.DataArray(_each(problem, result, data, draw_trees), dims=("sentence", "split", "node"))


def _each(
    problem: Problem,
    result: Result | None,
    data: xr.Dataset | None,
    function: Callable[[Tables, Tensor, Tensor], Tensor],
    rows: int = 256,
) -> np.ndarray:
    """A function of grammar, leaves and lengths, some sentences at a time."""
    tables = fitted_tables(problem, result)
    assert isinstance(problem.model, Grammar)
    tables = tables.weighted(problem.model.left_branching)
    word, length = problem.args
    if data is not None:
        check_sentences(data)
        if data.sizes["vocabulary"] != tables.emission.shape[1]:
            raise DataError(
                f"data have {data.sizes['vocabulary']} words, the grammar has {tables.emission.shape[1]}; load them "
                "with vocabulary=, that of the sentences that it was fitted to"
            )
        word, length = (torch.as_tensor(data[name].values, dtype=torch.long) for name in ("word", "length"))
    with torch.no_grad():
        found = [
            function(tables, leaf_weights(tables, w, w), n)
            for w, n in zip(word.split(rows), length.split(rows), strict=True)
        ]
    return torch.cat(found).numpy()


def tiny() -> Problem:
    """Twelve sentences, for the conformance tests."""
    data = simulate_sentences(12, max_length=5)
    return make_problem(data, num_nonterminals=2, num_preterminals=2, width=8, heads=2, layers=1)
