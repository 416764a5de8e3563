"""Whether past forecasts said what came: their score, and ranks of what came among their draws.

Where a forecast is right, the ranks of what came are uniform at each lead, and those of forecasts that do not overlap
are independent (Diebold, Gunther and Tay, 1998). The second is what tells a forecast that leaves out what the last
months say: the climatology of a persistent series has uniform ranks, but one rank is then like the next.

References
----------
Diebold, F. X., Gunther, T. A. and Tay, A. S. (1998). Evaluating density forecasts with applications to financial risk
management. Int. Econ. Rev. 39. https://doi.org/10.2307/2527342
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from probmodels.bayesian_svd.gaps.blocks import crps_of_draws
from probmodels.errors import SummaryError
from probmodels.options import Count, Fraction, Seed, checked

__all__ = ["rank_calibration", "score_draws", "score_normal"]

Array = NDArray[np.float64]

_PERMUTATIONS = 2000
_LEAST = 10  # forecasts that do not overlap
_DOUBT = 0.01  # p-value of all leads together below which a forecast is said to be wrong
_EDGE = 1e-4  # of ranks, whose normal scores would be infinite at 0 and 1


def score_draws(draws: Array, truth: Array, rng: np.random.Generator) -> dict[str, Array]:
    """Continuous ranked probability score ``crps``, ``error`` of the mean and rank of the truth ``pit``, 0 to 1, from
    draws (draw, ...); each of the shape of the truth."""
    below = (draws < truth).sum(0)
    return {
        "crps": crps_of_draws(draws.reshape(len(draws), -1), truth.ravel()).reshape(truth.shape),
        "error": truth - draws.mean(0),
        "pit": (below + rng.random(below.shape)) / (len(draws) + 1),
    }


def score_normal(mean: Array, sd: Array, truth: Array) -> dict[str, Array]:
    """The same of a normal forecast."""
    z = (truth - mean) / sd
    crps = sd * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi))
    return {"crps": crps, "error": truth - mean, "pit": stats.norm.cdf(z)}


@checked(SummaryError)
def rank_calibration(
    pit: ArrayLike, *, apart: Count = 1, period: Count | None = None, level: Fraction = 0.8, seed: Seed = 0
) -> xr.Dataset:
    """Check ranks of what came, lead by lead.

    Parameters
    ----------
    pit
        Ranks (origin, series, lead), 0 to 1, as of `score_draws`: of forecasts from origins in their order, evenly
        apart; leads 1, 2, ... steps. Series at one origin are taken for independent of each other where their ranks
        are compared with the uniform distribution; give principal components, or one index at a time.
    apart
        Steps between neighbouring origins.
    period
        Steps of a cycle, 12 for months: ranks must not differ between origins at different places in it. None for none.
    level
        Of the central interval whose coverage is counted.
    seed
        Seed of the permutations.

    Returns
    -------
    xr.Dataset
        Over lead: ``coverage`` of all forecasts; ``p_uniform``, of a Kolmogorov-Smirnov test of forecasts that do not
        overlap; ``correlation`` of the normal scores of the ranks of neighbouring ones of these, and
        ``p_independent``, by permutations of the origins, two-sided. Where that leaves out origins, each choice of
        them is tested: p is twice the mean, which holds whatever their dependence. Nan where fewer than ten forecasts
        do not overlap. With ``period`` also ``p_cycle``, of the rank test of Kruskal and Wallis, where neighbouring
        forecasts do not overlap. Attributes ``p_uniform``, ``p_independent`` and ``p_cycle``, of all leads together
        (Bonferroni), and ``verdict``.

    Raises
    ------
    SummaryError
        If ranks are not of three dims or not from 0 to 1, or fewer than ten; or if all origins are at one place in the
        cycle, or fewer than five at some.
    """
    ranks = np.asarray(pit, dtype=float)
    if ranks.ndim != 3 or len(ranks) < _LEAST or ranks.size == 0 or not np.all((ranks >= 0) & (ranks <= 1)):
        raise SummaryError(
            f"ranks of shape {ranks.shape}; give numbers from 0 to 1, (origin, series, lead), at least {_LEAST} origins"
        )
    rng = np.random.default_rng(seed)
    leads = np.arange(1, ranks.shape[2] + 1)
    uniform, correlation, independent, cycle = np.full((4, len(leads)), np.nan)
    phase = None if period is None else _phases(len(ranks), apart, period)
    for place, lead in enumerate(leads):
        stride = -(-int(lead) // apart)
        parts = [ranks[first::stride, :, place] for first in range(stride)]
        if len(parts[-1]) >= _LEAST:
            uniform[place] = _together([stats.kstest(part.ravel(), "uniform").pvalue for part in parts])
            found = [_serial(part, rng) for part in parts]
            correlation[place] = np.mean([r for r, _ in found])
            independent[place] = _together([p for _, p in found])
        if phase is not None and stride == 1:
            cycle[place] = _p_cycle(ranks[:, :, place], phase)
    out = xr.Dataset(coords={"lead": leads})
    out["coverage"] = "lead", np.mean(np.abs(ranks - 0.5) < level / 2, axis=(0, 1))
    out["correlation"] = "lead", correlation
    out.attrs["level"] = level
    for name, values in {"uniform": uniform, "independent": independent, "cycle": cycle}.items():
        if np.isfinite(values).any():
            out[f"p_{name}"] = "lead", values
            out.attrs[f"p_{name}"] = min(1.0, float(np.nanmin(values)) * int(np.isfinite(values).sum()))
    return out.assign_attrs(verdict=_verdict(out))


def _together(p: list[float]) -> float:
    """A p-value of dependent ones."""
    return p[0] if len(p) == 1 else min(1.0, 2 * float(np.mean(p)))


def _serial(ranks: Array, rng: np.random.Generator) -> tuple[float, float]:
    """Correlation of normal scores (origin, series) of neighbouring origins, mean over series, and its p-value."""
    z = stats.norm.ppf(np.clip(ranks, _EDGE, 1 - _EDGE))
    z = (z - z.mean(0)) / np.maximum(z.std(0), 1e-12)
    orders = rng.permuted(np.tile(np.arange(len(z)), (_PERMUTATIONS, 1)), axis=1)
    mixed = z[orders]
    chance = np.mean(mixed[:, 1:] * mixed[:, :-1], axis=(1, 2))
    found = float(np.mean(z[1:] * z[:-1]))
    centre = float(chance.mean())
    beyond = int(np.sum(np.abs(chance - centre) >= abs(found - centre)))
    return found, (1 + beyond) / (1 + _PERMUTATIONS)


def _phases(count: int, apart: int, period: int) -> NDArray[np.int64]:
    """Place of each origin in the cycle, by number."""
    places, phase, sizes = np.unique(np.arange(count) * apart % period, return_inverse=True, return_counts=True)
    if len(places) < 2 or sizes.min() < _LEAST // 2:
        raise SummaryError(
            f"period={period}: {count} origins, {apart} steps apart, are at {len(places)} places of the cycle, "
            f"{sizes.min()} or more at each; at least {_LEAST // 2} at each of two places are needed"
        )
    return phase


def _p_cycle(ranks: Array, phase: NDArray[np.int64]) -> float:
    """Whether ranks (origin, series) are the same at all places of a cycle."""
    groups = range(phase.max() + 1)
    h = [stats.kruskal(*(column[phase == group] for group in groups)).statistic for column in ranks.T]
    return float(stats.chi2.sf(np.sum(h), len(h) * (len(groups) - 1)))


def _verdict(found: xr.Dataset) -> str:
    """What ranks say, in words."""
    wrong = []
    if found.attrs["p_uniform"] < _DOUBT:
        lead = int(found["lead"][int(np.nanargmin(found["p_uniform"].values))])
        coverage = float(found["coverage"].sel(lead=lead))
        wrong.append(
            f"ranks are not uniform, least so at lead {lead} (p = {float(found['p_uniform'].min()):.2g}), where "
            f"{100 * found.attrs['level']:g} % intervals hold {coverage:.0%}"
        )
    if found.attrs["p_independent"] < _DOUBT:
        lead = int(found["lead"][int(np.nanargmin(found["p_independent"].values))])
        wrong.append(
            f"errors of forecasts that do not overlap are alike (correlation "
            f"{float(found['correlation'].sel(lead=lead)):.2f} at lead {lead}): the forecast leaves out what the "
            "months before it say"
        )
    if found.attrs.get("p_cycle", 1.0) < _DOUBT:
        wrong.append("ranks differ between places in the cycle: the forecast misses a cycle of these steps")
    if wrong:
        return "Ranks are not those of a right forecast: " + "; ".join(wrong)
    return "Ranks of what came are uniform, and those of forecasts that do not overlap independent"
