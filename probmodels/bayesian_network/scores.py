"""Scores of Bayesian networks: log marginal likelihoods of every set of parents of every node.

Of both scores here the parameters are integrated out under priors that make the marginal likelihood f(Y) of a set Y of
variables the same in every network that is complete on it. The score of node j with parents P is then::

    log f(P + j) - log f(P)

and networks that say the same independences have the same sum of scores.

- BGe, for continuous data: rows are normal, with a normal-Wishart prior of mean and precision,
- BDeu, for discrete data: states have Dirichlet priors that share one equivalent sample size out equally.

References
----------
Geiger, D. and Heckerman, D. (2002). Parameter priors for directed acyclic graphical models and the characterization of
several probability distributions. Ann. Statist. 30(5). https://doi.org/10.1214/aos/1035844981
Heckerman, D., Geiger, D. and Chickering, D. M. (1995). Learning Bayesian networks: the combination of knowledge and
statistical data. Mach. Learn. 20. https://doi.org/10.1007/BF00994016
Silander, T. and Myllymäki, P. (2006). A simple approach for finding the globally optimal Bayesian network structure.
UAI. https://arxiv.org/abs/1206.6875
Kuipers, J., Moffa, G. and Heckerman, D. (2014). Addendum on the scoring of Gaussian directed acyclic graphical models.
Ann. Statist. 42(4). https://doi.org/10.1214/14-AOS1217
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, multigammaln

__all__ = ["bdeu", "best_score", "bge", "parent_scores"]

Floats = NDArray[np.float64]


def bge(x: Floats, *, mean_weight: float = 1.0, extra_degrees: float = 2.0) -> Floats:
    """Log marginal likelihood of every set of continuous variables.

    The prior of rows of n variables: mean ~ Normal(0, (a W)^-1), precision W ~ Wishart of n + e degrees of freedom and
    scale (t I)^-1, where a is ``mean_weight``, e is ``extra_degrees`` and t = a (e - 1) / (a + 1), as in the addendum.

    Parameters
    ----------
    x
        Data (sample, variable).
    mean_weight
        How many rows the prior mean is worth, positive.
    extra_degrees
        Degrees of freedom beyond the number of variables, above 1.

    Returns
    -------
    NDArray
        By set (2^n,): variable i belongs to a set whose number has bit i.
    """
    count, size = x.shape
    scale = mean_weight * (extra_degrees - 1) / (mean_weight + 1)
    mean = x.mean(0)
    shrunk = count * mean_weight / (count + mean_weight)
    scatter = scale * np.eye(size) + (x - mean).T @ (x - mean) + shrunk * np.outer(mean, mean)
    found = np.zeros(2**size)
    for order in range(1, size + 1):
        sets = np.array(list(itertools.combinations(range(size), order)))
        blocks = scatter[sets[:, :, None], sets[:, None, :]]
        before = extra_degrees + order  # degrees of freedom of a block of the precision's inverse
        value = order / 2 * (math.log(mean_weight / (count + mean_weight)) - count * math.log(math.pi))
        value += multigammaln((before + count) / 2, order) - multigammaln(before / 2, order)
        value += before / 2 * order * math.log(scale)
        found[(2**sets).sum(1)] = value - (before + count) / 2 * np.linalg.slogdet(blocks)[1]
    return found


def bdeu(x: NDArray[np.int64], num_states: NDArray[np.int64], *, sample_size: float = 1.0) -> Floats:
    """Log marginal likelihood of every set of discrete variables.

    Parameters
    ----------
    x
        States (sample, variable), counted from 0.
    num_states
        How many each variable has (variable,).
    sample_size
        Equivalent sample size, positive: of a prior that is worth so many rows, all joint states alike.

    Returns
    -------
    NDArray
        By set (2^n,): variable i belongs to a set whose number has bit i.
    """
    size = x.shape[1]
    found = np.zeros(2**size)
    whole = gammaln(sample_size) - gammaln(sample_size + len(x))
    open_sets = [(0, 1, np.zeros(len(x), dtype=np.int64))]  # with joint states, and that of each row
    while open_sets:
        number, states, row = open_sets.pop()
        for new in range(number.bit_length(), size):
            joint = states * int(num_states[new])
            _, place, counts = np.unique(row * num_states[new] + x[:, new], return_inverse=True, return_counts=True)
            share = sample_size / joint
            found[number + 2**new] = whole + (gammaln(share + counts) - gammaln(share)).sum()
            open_sets.append((number + 2**new, joint, place))
    return found


def parent_scores(of_sets: Floats) -> Floats:
    """Score of every node with every set of parents.

    Parameters
    ----------
    of_sets
        Log marginal likelihoods (2^n,), as `bge` and `bdeu` return them.

    Returns
    -------
    NDArray
        (node, set), -inf where a node would be its own parent.
    """
    size = len(of_sets).bit_length() - 1
    sets = np.arange(2**size)
    found = np.full((size, 2**size), -np.inf)
    for node in range(size):
        without = sets[sets >> node & 1 == 0]
        found[node, without] = of_sets[without + 2**node] - of_sets[without]
    return found


def best_score(scores: Floats) -> float:
    """Score of the best graph, a sum over nodes, by the dynamic program of Silander and Myllymäki.

    Parameters
    ----------
    scores
        By node and set of parents (node, set), as `parent_scores` returns them; -inf excludes.
    """
    size = len(scores)
    sets = np.arange(2**size)
    within = scores.copy()  # best parents among a set
    for node in range(size):
        has = sets[sets >> node & 1 == 1]
        within[:, has] = np.maximum(within[:, has], within[:, has - 2**node])
    best = np.zeros(2**size)
    for chosen in range(1, 2**size):  # the last of a set in an order of its nodes has all others to choose from
        nodes = [node for node in range(size) if chosen >> node & 1]
        best[chosen] = max(best[chosen - 2**node] + within[node, chosen - 2**node] for node in nodes)
    return float(best[-1])
