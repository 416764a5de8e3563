"""The joint-distribution test of samplers of the Bayesian SVD whose series are a process (Geweke, 2004)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pyro import poutine

from probmodels.bayesian_svd.series_sampler import SeriesGibbs

__all__ = ["functions", "keeps_the_prior"]


def functions(draw: dict[str, Any], basis: np.ndarray) -> np.ndarray:
    """Numbers that no sign touches."""
    u, f, d = basis @ draw["U"].numpy(), draw["F"].numpy(), draw["d"].numpy()
    parts = [
        d,
        [float(draw["sigma"])],
        u[3] * f[4],
        u[1] * u[5],
        f[2] * f[9],
        np.log((f**2).sum(0)),
        [(u[2] * d) @ f[7]],
        draw["autocorrelation"].numpy(),
        draw["length_scale_space"].numpy(),
        [(d > float(draw["sigma"])).sum()],
    ]
    if "length_scale_time" in draw:
        parts.append(np.log(draw["length_scale_time"].numpy()))
    if "fixed_effects" in draw:
        parts.append(draw["fixed_effects"].numpy()[[0, 5]].ravel())
    if "shared_effects" in draw:
        parts.append(draw["shared_effects"].numpy())
    return np.concatenate([np.ravel(part) for part in parts])


def keeps_the_prior(
    made: Any, renew: Callable[[Any, dict[str, Any], np.random.Generator], None], sweeps: int, batches: int = 40
) -> None:
    """Check that parameters keep their prior where sweeps alternate with fresh data given the parameters.

    ``renew(seen, draw, rng)`` draws the data anew, in place, given a draw.
    """
    rank, basis = made.args[0].space.log_weights.shape[0], made.args[0].space.basis.numpy()
    torch.manual_seed(1)
    exact = []
    for _ in range(3000):
        nodes = poutine.trace(made.model).get_trace(*made.args, **made.kwargs).nodes
        draw = {n: node["value"] for n, node in nodes.items() if "value" in node and n != "fixed_effects"}
        exact.append(functions({"length_scale_space": torch.zeros(rank), **draw}, basis))
    rng, kernel = np.random.default_rng(3), SeriesGibbs(made, num_steps=3, num_passes=2)
    kernel.seed(5)
    kernel.setup(0)
    draw, kept = kernel.initial_params, []
    for _ in range(sweeps):
        renew(kernel._data, draw, rng)
        draw = kernel.sample(draw)
        kept.append(functions(draw, basis))
    means = np.array(kept).reshape(batches, -1, len(kept[0])).mean(1)
    error = np.sqrt(means.var(0, ddof=1) / batches + np.var(exact, 0) / len(exact))
    moving = error > 1e-9
    deviation = (means.mean(0) - np.mean(exact, 0))[moving] / error[moving]
    assert np.abs(deviation).max() < 4.5
    assert np.sqrt((deviation**2).mean()) < 1.6
