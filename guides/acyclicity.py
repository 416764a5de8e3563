"""Measures of how far a weighted graph is from being acyclic, and what to do with graphs that are.

Each measure of weights W >= 0 [cause, effect], usually squares, is 0 if and only if no cycle has positive weight. They
are sums over closed walks, of which one of length k counts::

    trace_exponential   tr e^W - n                      1 / k!
    trace_power         tr (I + W / n)^n - n            binomial(n, k) / n^k
    log_determinant     -log det(s I - W) + n log s     1 / (k s^k)

The first two nearly vanish for long cycles of small weights, the last grows fastest and has the largest gradients, but
exists only while the spectral radius of W is below s.

References
----------
Zheng, X., Aragam, B., Ravikumar, P. and Xing, E. (2018). DAGs with NO TEARS. NeurIPS. https://arxiv.org/abs/1803.01422
Yu, Y., Chen, J., Gao, T. and Yu, M. (2019). DAG-GNN. ICML. https://arxiv.org/abs/1904.10098
Bello, K., Aragam, B. and Ravikumar, P. (2022). DAGMA: learning DAGs via M-matrices and a log-determinant acyclicity
characterization. NeurIPS. https://arxiv.org/abs/2209.08037
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from probmodels.errors import ProblemError

__all__ = [
    "find_cycle",
    "is_dag",
    "log_determinant",
    "to_dag",
    "topological_order",
    "trace_exponential",
    "trace_power",
]

_MARGIN = 1.1  # of the domain, over what a bound asks for


def trace_exponential(weights: Tensor) -> Tensor:
    """``tr e^W - n`` (...) of weights (..., node, node), eq. 5 of Zheng et al."""
    return _trace(torch.linalg.matrix_exp(weights)) - weights.shape[-1]


def trace_power(weights: Tensor) -> Tensor:
    """``tr (I + W / n)^n - n`` (...) of weights (..., node, node), eq. 13 of Yu et al. with ``alpha = 1 / n``."""
    size = weights.shape[-1]
    step = torch.eye(size, dtype=weights.dtype, device=weights.device) + weights / size
    return _trace(torch.linalg.matrix_power(step, size)) - size


def log_determinant(weights: Tensor, s: float | None = 1.0) -> Tensor:
    """``-log det(s I - W) + n log s`` (...) of weights (..., node, node), eq. 7 of Bello et al.

    Parameters
    ----------
    weights
        Not negative.
    s
        Above the spectral radius of every matrix. None takes, for each matrix, 1 or a tenth more than its largest row
        sum, whichever is more: the measure then exists everywhere, and gradients treat s as a constant.

    Raises
    ------
    ProblemError
        If some matrix is not in the domain.
    """
    size = weights.shape[-1]
    if s is None:
        scale = (_MARGIN * weights.detach().sum(-1).amax(-1)).clamp(min=1.0)
    else:
        scale = torch.full(weights.shape[:-2], float(s), dtype=weights.dtype, device=weights.device)
        radius = float(torch.linalg.eigvals(weights.detach()).abs().max()) if weights.numel() else 0.0
        if not radius < s:
            raise ProblemError(
                f"the weights have spectral radius {radius:.4g}, and the log-determinant exists below s={s:g} only; "
                "make s larger, start from smaller weights, or take s=None"
            )
    eye = torch.eye(size, dtype=weights.dtype, device=weights.device)
    return -torch.linalg.slogdet(eye - weights / scale[..., None, None])[1]


def find_cycle(graph: Any) -> list[int]:
    """Nodes of a cycle in the order of its arrows, each once; none if there is no cycle.

    Parameters
    ----------
    graph
        Adjacency [cause, effect], edges where it is not 0.
    """
    arrows = _arrows(graph)
    left = set(range(len(arrows)))
    while left:
        roots = {node for node in left if not any(arrows[other, node] for other in left)}
        if not roots:
            break
        left -= roots
    if not left:
        return []
    path = [min(left)]  # every node that is left has a cause that is left
    while path.count(path[-1]) == 1:
        path.append(next(other for other in sorted(left) if arrows[other, path[-1]]))
    cycle = path[path.index(path[-1]) : -1][::-1]
    start = cycle.index(min(cycle))
    return cycle[start:] + cycle[:start]


def is_dag(graph: Any) -> bool:
    """Whether a graph [cause, effect] has no cycle."""
    return not find_cycle(graph)


def topological_order(graph: Any, names: Sequence[str] | None = None) -> list[int]:
    """Nodes of an acyclic graph [cause, effect], causes first; of those that could be next, the first.

    Raises
    ------
    ProblemError
        If there is a cycle, which is named.
    """
    arrows, order = _arrows(graph), list[int]()
    cycle = find_cycle(graph)
    if cycle:
        raise ProblemError(f"the graph has a cycle, {spell_cycle(cycle, names)}; take one of its edges away")
    left = list(range(len(arrows)))
    while left:
        node = next(node for node in left if not any(arrows[other, node] for other in left))
        left.remove(node)
        order.append(node)
    return order


def to_dag(weights: Any, threshold: float = 0.0, *, keep: Any = None) -> Tensor:
    """The graph of the weights that are larger than a threshold, without the weakest edges that close cycles.

    Edges are taken from the strongest to the weakest, and left out where a path leads back already: of every cycle the
    weakest edge goes, and no edge that could stay is lost.

    Parameters
    ----------
    weights
        (node, node) [cause, effect]; their absolute values count, those of the diagonal do not.
    threshold
        What an edge has to exceed.
    keep
        Edges (node, node) that are taken first, whatever their weights.

    Returns
    -------
    Tensor
        (node, node), 0 and 1.

    Raises
    ------
    ProblemError
        If the edges to keep have a cycle.
    """
    values = torch.as_tensor(weights).detach().abs()
    strength = values.to(torch.float64).fill_diagonal_(0)
    graph = torch.zeros_like(strength, dtype=torch.bool)
    if keep is not None:
        graph = _arrows(keep)
        topological_order(graph)
    paths = torch.eye(len(graph), dtype=torch.bool, device=graph.device)
    for _ in range(len(graph)):
        paths = paths | (paths.double() @ graph.to(paths.device).double() > 0)
    for place in strength.flatten().argsort(descending=True, stable=True).tolist():
        cause, effect = divmod(place, len(graph))
        if strength[cause, effect] <= threshold:
            break
        if not paths[effect, cause] and not graph[cause, effect]:
            graph[cause, effect] = True
            paths = paths | (paths[:, cause, None] & paths[effect])
    return graph.to(values.dtype if values.is_floating_point() else torch.get_default_dtype())


def spell_cycle(cycle: Sequence[int], names: Sequence[str] | None = None) -> str:
    """A cycle in words, ``a -> b -> a``."""
    closed = [*cycle, cycle[0]]
    return " -> ".join(str(node) if names is None else str(names[node]) for node in closed)


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def _arrows(graph: Any) -> Tensor:
    """Adjacency as booleans, a copy."""
    arrows = torch.as_tensor(graph).detach() != 0
    if arrows.ndim != 2 or arrows.shape[0] != arrows.shape[1]:
        raise ProblemError(f"a graph of shape {tuple(arrows.shape)}; give a square matrix [cause, effect]")
    return arrows
