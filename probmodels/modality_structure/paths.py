"""Augmented views of a row as points on a Brownian bridge between the embeddings of a pair, its times and scale latent.

A row is changed again and again. In the embedding space its views ``r_1, ..., r_K`` are points at times
``0 < t_1 < ... < t_K < 1`` of a path that leaves the embedding ``z`` of the row at 0 and ends at that of the other
modality at 1. Less the straight line between the two, each coordinate has the covariance
``scale^2 (min(t, t') - t t')``::

    path_scale  ~ LogNormal(log start, 1)
    path_steps  ~ Dirichlet(2, ..., 2)          the K + 1 steps of time; t is their running sum
    path_a_to_b ~ Normal(move_k, scale^2 d_k (1 - t_k) / (1 - t_{k-1}))      observed to be 0, d_k the k-th step

A bridge is a Markov process. Given the point before it, a point has the mean ``(1 - t_k) / (1 - t_{k-1})`` times that
point. What is left, ``move_k``, is independent of all before: the site has the log density of the whole path, since the
moves depend on the points by a matrix of determinant 1.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["STEPS_PRIOR", "bridge_moves", "path_site", "sample_path"]

STEPS_PRIOR = 2.0  # concentration: with one point its time is Beta(2, 2), away from the ends where it has no spread
_PRIOR_SD = 1.0  # of the logarithm of the scale


def sample_path(num_points: int, start: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Sites ``path_scale`` and ``path_steps`` (path_step,), with their priors.

    Parameters
    ----------
    num_points
        Points between the ends.
    start
        Median of the prior of the scale.
    like
        Whose dtype and device to take.

    Returns
    -------
    tuple
        Steps (num_points + 1,) of time, which sum to 1, and the scale.
    """
    scale = pyro.sample("path_scale", dist.LogNormal(like.new_tensor(math.log(start)), _PRIOR_SD))
    prior = dist.Dirichlet(like.new_full((num_points + 1,), STEPS_PRIOR))
    steps = pyro.sample("path_steps", prior, infer={"event_dims": ["path_step"]})  # type: ignore[arg-type]
    return steps, scale


def bridge_moves(points: Tensor, start: Tensor, end: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Independent moves of a Brownian bridge through given points, and their variances where its scale is 1.

    Parameters
    ----------
    points
        Points (..., time, size).
    start, end
        Ends (..., size) at times 0 and 1.
    steps
        Steps of time (time + 1,), positive, with sum 1.

    Returns
    -------
    tuple
        Moves (..., time, size) and variances (time,).
    """
    times = steps[:-1].cumsum(-1).unsqueeze(-1)
    left = steps.flip(-1).cumsum(-1).flip(-1)  # time that is left before each step, without cancellation
    off = points - start.unsqueeze(-2) - times * (end - start).unsqueeze(-2)
    before = torch.cat([torch.zeros_like(off[..., :1, :]), off[..., :-1, :]], -2)
    kept = left[1:] / left[:-1]
    return off - kept.unsqueeze(-1) * before, steps[:-1] * kept


def path_site(
    name: str, points: Tensor, ends: tuple[Tensor, Tensor], path: tuple[Tensor, Tensor], seen: Tensor
) -> None:
    """Site (row, path_point, component) of moves that are observed to be 0: the log density of the path.

    Parameters
    ----------
    name
        Of the site.
    points
        Embeddings (row, path_point, component) of the views along the path.
    ends
        Embeddings (row, component) at times 0 and 1.
    path
        Steps of time and scale, as `sample_path` returns them.
    seen
        Rows (row,) that have both modalities.
    """
    steps, scale = path
    moves, variances = bridge_moves(points, *ends, steps)
    sd = (scale * variances.sqrt()).unsqueeze(-1)
    counted = seen[:, None, None].expand(moves.shape)
    fn = dist.Normal(moves, sd.expand(moves.shape)).mask(counted).to_event(3)
    dims = ["fitted_row", "path_point", "component"]
    pyro.sample(name, fn, obs=torch.zeros_like(moves).detach(), infer={"event_dims": dims})  # type: ignore[arg-type]
