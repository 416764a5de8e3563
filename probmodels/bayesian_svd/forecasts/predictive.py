"""Draws of the field and of indices beyond the record, from those of the series, and their summaries."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from probmodels.bayesian_svd.draws import Draws, blocks
from probmodels.bayesian_svd.forecasts.projection import NewMonths, Record, noise_after

__all__ = ["add_field", "add_summary", "index_draws", "noise_ahead"]

Array = NDArray[np.float64]


def noise_ahead(
    rng: np.random.Generator, record: Record, new: NewMonths | None, steps: int
) -> NDArray[np.float32] | None:
    """Correlated noise beyond the last month (draw, cell, time), in data units; None where noise is white.

    It goes on, as an AR(1) process, from what effects and modes leave of the record or of new months after it.
    """
    noise = record.draws.noise
    if noise is None:
        return None
    root, sigma, scale = noise.root, record.draws.sigma[record.chosen], np.sqrt(record.draws.weight)
    state = noise_after(record, new).drawn(rng, sigma)
    found = np.empty((*state.shape, steps), dtype=np.float32)
    for step in range(steps):
        fresh = sigma[:, None] * (rng.standard_normal(state.shape) @ root.T)
        state = noise.decay * state + np.sqrt(1 - noise.decay**2) * fresh
        found[:, :, step] = state / scale
    return found


def index_draws(
    rng: np.random.Generator,
    draws: Draws,
    record: Record,
    weights: Mapping[str, Array],
    series: Array,
    noise: NDArray[np.float32] | None,
) -> Array:
    """Draws of indices (draw, index, time), a block of draws at a time."""
    steps = series.shape[1]
    own = [x if x.ndim == 2 else x[:, None] for x in weights.values()]
    size = max(x.shape[1] for x in own)  # 1 where no index has weights of its own at each step
    table = np.stack([np.broadcast_to(x, (len(x), size)) for x in own])  # (index, cell, time or 1)
    used = np.flatnonzero(table.any((0, 2)))
    table = table[:, used]
    each, found = np.broadcast_to(table, (*table.shape[:2], steps)), np.empty((len(series), len(table), steps))
    for block in blocks(len(series), used.size, max(series.shape)):
        at = record.chosen[block]
        mean = np.einsum("ict,sct->sit", each, draws.fixed(used, at), optimize=True)
        own_patterns = np.einsum("ict,sck->sitk", table, draws.patterns(used, at), optimize=True)
        mean += np.einsum("sitk,stk->sit", np.broadcast_to(own_patterns, (*mean.shape, series.shape[2])), series[block])
        if noise is not None:
            found[block] = mean + np.einsum("ict,sct->sit", each, noise[block][:, used], optimize=True)
            continue
        spread = np.einsum("ict,sc,jct->stij", table, draws.noise_sd(used, at) ** 2, table, optimize=True)
        values, vectors = np.linalg.eigh(spread)
        root = vectors * np.sqrt(np.maximum(values, 0.0))[..., None, :]  # (draw, time or 1, index, index)
        root = np.broadcast_to(root, (len(mean), steps, *root.shape[2:]))
        found[block] = mean + np.einsum("stij,sjt->sit", root, rng.standard_normal(mean.shape))
    return found


def add_field(
    out: xr.Dataset,
    rng: np.random.Generator,
    draws: Draws,
    record: Record,
    series: Array,
    noise: NDArray[np.float32] | None,
    keep_draws: bool,
) -> None:
    """Summaries of the field, a block of cells at a time."""
    num_cells, num_times = record.constant.sizes["cell"], series.shape[1]
    quantiles = out["quantile"].values
    found = {"mean": np.empty((num_times, num_cells)), "sd": np.empty((num_times, num_cells))}
    found["quantile"] = np.empty((quantiles.size, num_times, num_cells))
    kept = np.empty((len(series), num_times, num_cells), dtype=np.float32) if keep_draws else None
    for block in blocks(num_cells, len(series), num_times):
        mean = draws.fixed(block, record.chosen) + draws.patterns(block, record.chosen) @ series.transpose(0, 2, 1)
        if noise is None:
            values = mean + draws.noise_sd(block, record.chosen)[:, :, None] * rng.standard_normal(mean.shape)
        else:
            values = mean + noise[:, block]
        values = values.transpose(0, 2, 1)  # (draw, time, cell)
        found["mean"][:, block], found["sd"][:, block] = values.mean(0), values.std(0, ddof=1)
        found["quantile"][:, :, block] = np.quantile(values, quantiles, axis=0)
        if kept is not None:
            kept[:, :, block] = values
    for name, values in found.items():
        out[f"field_{name}"] = ("quantile", "time", "cell")[3 - values.ndim :], values
    if kept is not None:
        out["field"] = ("chain", "draw", "time", "cell"), record.by_chain(kept)


def add_summary(
    out: xr.Dataset, name: str, values: Array, dims: tuple[str, ...], record: Record, keep_draws: bool
) -> None:
    """Summaries of draws (draw, ...), and the draws where they are wanted."""
    out[f"{name}_mean"], out[f"{name}_sd"] = (dims, values.mean(0)), (dims, values.std(0, ddof=1))
    out[f"{name}_quantile"] = ("quantile", *dims), np.quantile(values, out["quantile"].values, axis=0)
    if keep_draws:  # a variable may not have the name of one of its dims
        out[f"{name}_draws" if name in dims else name] = ("chain", "draw", *dims), record.by_chain(values)
