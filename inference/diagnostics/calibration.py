"""Is inference right on simulated data? Simulation-based calibration, its variational kin, coverage.

References
----------
Talts, S., Betancourt, M., Simpson, D., Vehtari, A. and Gelman, A. (2018). Validating Bayesian inference algorithms with
simulation-based calibration. https://arxiv.org/abs/1804.06788
Yao, Y., Vehtari, A., Simpson, D. and Gelman, A. (2018). Yes, but did it work? Evaluating variational inference. ICML.
https://arxiv.org/abs/1802.02538
Butler, C. C. (1969). A test for symmetry using the sample distribution function. Annals of Mathematical Statistics
40(6). https://doi.org/10.1214/aoms/1177697295
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
import pandas as pd
import xarray as xr
from annotated_types import Interval, Len
from scipy import stats

from probmodels.datasets.labelled import arranged
from probmodels.errors import DiagnosticsError
from probmodels.inference.diagnostics import _html
from probmodels.options import Fraction, Seed, checked

__all__ = ["Calibration", "coverage", "sbc", "vsbc"]

_INTERVALS = (0.5, 0.9, 0.95)

Simulate = Callable[[np.random.Generator], tuple[Mapping[str, Any], Any]]
Infer = Callable[[Any, int], Any]
Map = Callable[..., Iterable[Any]]
Probs = Annotated[Sequence[Fraction], Len(1)]
Replicates = Annotated[int, Interval(ge=20, le=1_000_000)]
Draws = Annotated[int, Interval(ge=9, le=1_000_000)]


@dataclass(frozen=True)
class Calibration:
    """What simulation-based calibration found.

    Attributes
    ----------
    ok
        Whether all p-values pass after Bonferroni's correction.
    ranks
        Rank of the truth among the draws, 0 to ``num_draws``: dims (replicate, ...).
    pvalues
        By name of the test, p-values per entry: ``ks`` and ``chi_square`` of uniform ranks from `sbc`, ``symmetry``
        of them from `vsbc`.
    coverage
        Share of the replicates whose central interval holds the truth: dims (prob, ...).
    num_draws
        Draws per replicate that the truth is ranked among.
    alpha
        Chance that a calibrated method fails.
    """

    ok: bool
    ranks: xr.Dataset
    pvalues: Mapping[str, xr.Dataset]
    coverage: xr.Dataset
    num_draws: int
    alpha: float

    @property
    def ks(self) -> xr.Dataset:
        """p-values of the Kolmogorov-Smirnov test of `sbc`."""
        return self.pvalues["ks"]

    @property
    def chi_square(self) -> xr.Dataset:
        """p-values of the chi-square test of `sbc`."""
        return self.pvalues["chi_square"]

    @property
    def num_tests(self) -> int:
        """Tests that Bonferroni's correction counts."""
        return sum(p.size for tests in self.pvalues.values() for p in tests.data_vars.values())

    @property
    def limit(self) -> float:
        """The p-value that every test must exceed."""
        return self.alpha / self.num_tests

    @property
    def table(self) -> pd.DataFrame:
        """One row per variable: whether it passed, its lowest p-value, coverage, and where the truths lie.

        ``mean_rank`` is the mean rank of the truth over ``num_draws``: above 0.5 where the draws are too low.
        """
        rows = {}
        for name in self.ranks.data_vars:
            lowest = min(float(tests[name].min()) for tests in self.pvalues.values())
            shares = self.coverage[name].mean([dim for dim in self.coverage[name].dims if dim != "prob"])
            rows[name] = {"ok": lowest > self.limit, "lowest_p": lowest}
            rows[name] |= {f"{float(prob):.0%}": float(shares.sel(prob=prob)) for prob in shares["prob"]}
            rows[name]["mean_rank"] = float(self.ranks[name].mean()) / self.num_draws
        return pd.DataFrame.from_dict(rows, orient="index")

    @property
    def _head(self) -> str:
        return (
            f"Calibration {'passed' if self.ok else 'FAILED'}: {self.ranks.sizes['replicate']} replicates, "
            f"{self.num_tests} tests, each at p > {self.limit:.2g}"
        )

    @property
    def _note(self) -> str:
        if "symmetry" not in self.pvalues:
            return ""
        return "Symmetry shows that posterior means are right on average, not that sds are: look at the coverage."

    def __str__(self) -> str:
        lines = [self._head]
        for name, row in self.table.iterrows():
            spelled = ", ".join(f"{key}: {row[key]:.3f}" for key in row.index if key.endswith("%"))
            text = f"  {'✓' if row['ok'] else '✗'} {name}: lowest p {row['lowest_p']:.2g}; coverage {spelled}"
            if not row["ok"] and "symmetry" in self.pvalues:
                text += f"; draws are too {'low' if row['mean_rank'] > 0.5 else 'high'}"
            lines.append(text)
        return "\n".join([*lines, *([self._note] if self._note else [])])

    def _repr_html_(self) -> str:
        return _html.block(self._head, _html.frame(self.table), _html.text(self._note))


@checked(DiagnosticsError)
def sbc(
    simulate: Simulate,
    infer: Infer,
    *,
    num_replicates: Replicates = 200,
    num_draws: Draws = 99,
    seed: Seed = 0,
    alpha: Fraction = 0.01,
    probs: Probs = _INTERVALS,
    map: Map = map,
) -> Calibration:
    """Simulation-based calibration: truths from the prior must rank uniformly among their posterior draws.

    Parameters
    ----------
    simulate
        Draws ``(truth, data)`` from the model, truth by variable name.
    infer
        Takes the data and a seed; returns posterior draws as a Dataset (chain, draw, ...) or a Result. Variables
        that the truth lacks are left out.
    num_replicates
        Simulated data sets.
    num_draws
        Evenly spaced draws that the truth is ranked among: few enough to be nearly independent of each other, or
        autocorrelation alone lets the test fail.
    seed
        Seed of all replicates; replicate r is the same whatever ``num_replicates`` and ``map``.
    alpha
        Chance that a calibrated method fails.
    probs
        Central intervals whose coverage is reported.
    map
        Applies a function to the numbers of the replicates, as the builtin does: the ``map`` of a process pool, or
        ``lambda f, xs: client.gather(client.map(f, xs))`` for Dask. Then ``simulate`` and ``infer`` must pickle. The
        order of what it returns does not matter.

    Raises
    ------
    DiagnosticsError
        If there are too few replicates or draws, or truth and posterior do not fit. Errors of ``simulate`` and
        ``infer`` are their own, with a note of the replicate.

    References
    ----------
    Talts et al. (2018). https://arxiv.org/abs/1804.06788
    """
    together, shares = _replicates(simulate, infer, num_replicates, num_draws, seed, probs, map)
    jitter = _jitter(seed, num_replicates)
    pvalues = {
        "ks": together.map(lambda rank: _per_entry(rank, lambda r: _ks(r, num_draws, jitter))),
        "chi_square": together.map(lambda rank: _per_entry(rank, lambda r: _chi_square(r, num_draws))),
    }
    return _verdict(together, pvalues, shares, num_draws, alpha)


@checked(DiagnosticsError)
def vsbc(
    simulate: Simulate,
    infer: Infer,
    *,
    num_replicates: Replicates = 200,
    num_draws: Draws = 99,
    seed: Seed = 0,
    alpha: Fraction = 0.01,
    probs: Probs = _INTERVALS,
    map: Map = map,
) -> Calibration:
    """Variational simulation-based calibration: truths must rank symmetrically among the draws of their guides.

    Guides are seldom exact, so that `sbc` fails for almost all of them. This asks for less: that the means of the
    guide are right on average, whatever its sds. Quantiles of the truths under the guide lie symmetrically about one
    half then; more of them above one half mean that the guide is too low.

    Parameters
    ----------
    simulate, infer, num_replicates, num_draws, seed, alpha, probs, map
        As for `sbc`; ``infer`` fits a guide, as in ``lambda data, seed: fit_svi(make_problem(data), seed=seed)``.

    References
    ----------
    Yao et al. (2018). https://arxiv.org/abs/1802.02538, with the exact test of Butler (1969) in place of a
    two-sample test: the two samples compared, quantiles and their mirror images, are not independent.
    """
    together, shares = _replicates(simulate, infer, num_replicates, num_draws, seed, probs, map)
    jitter = _jitter(seed, num_replicates)
    symmetry = together.map(lambda rank: _per_entry(rank, lambda r: _symmetry(r, num_draws, jitter)))
    return _verdict(together, {"symmetry": symmetry}, shares, num_draws, alpha)


@checked(DiagnosticsError)
def coverage(truth: Mapping[str, Any], posterior: xr.Dataset, *, probs: Probs = _INTERVALS) -> xr.Dataset:
    """Which true values the central intervals of the posterior hold.

    Parameters
    ----------
    truth
        True values by variable name.
    posterior
        Draws, dims (chain, draw, ...).
    probs
        Probabilities of the intervals.

    Returns
    -------
    xr.Dataset
        Booleans, dims (prob, ...).
    """
    out = {}
    for name, (value, draws) in _pairs(truth, posterior).items():
        rows = []
        for prob in probs:
            low, high = np.quantile(draws.values, [(1 - prob) / 2, (1 + prob) / 2], axis=0)
            rows.append((low <= value) & (value <= high))
        out[name] = xr.DataArray(np.stack(rows), dims=("prob", *draws.dims[1:]), coords={"prob": list(probs)})
    return xr.Dataset(out)


def _replicates(
    simulate: Simulate,
    infer: Infer,
    num_replicates: int,
    num_draws: int,
    seed: int,
    probs: Sequence[float],
    map: Map,
) -> tuple[xr.Dataset, xr.Dataset]:
    """Ranks of the truths (replicate, ...) and shares of covered ones (prob, ...)."""
    task = partial(_replicate, simulate, infer, num_draws, seed, tuple(probs))
    found = sorted(map(task, range(num_replicates)), key=lambda item: item[0])
    if [number for number, *_ in found] != list(range(num_replicates)):
        raise DiagnosticsError(f"map returned {len(found)} of {num_replicates} replicates; it must return each once")
    ranks = xr.concat([rank for _, rank, _ in found], "replicate")
    return ranks, xr.concat([held for *_, held in found], "replicate").astype(float).mean("replicate")


def _replicate(
    simulate: Simulate, infer: Infer, num_draws: int, seed: int, probs: Sequence[float], replicate: int
) -> tuple[int, xr.Dataset, xr.Dataset]:
    """One replicate, whose random numbers depend on nothing but the seed and its number."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(replicate,)))
    try:
        truth, data = simulate(rng)
        found = infer(data, int(rng.integers(2**31)))
    except Exception as error:
        error.add_note(f"in replicate {replicate} of calibration with seed={seed}")
        raise
    posterior = found if isinstance(found, xr.Dataset) else found.posterior
    pairs = _pairs(truth, posterior)
    ranks = xr.Dataset({name: _rank(value, draws, num_draws, rng) for name, (value, draws) in pairs.items()})
    return replicate, ranks, coverage(truth, posterior, probs=probs)


def _verdict(
    ranks: xr.Dataset, pvalues: Mapping[str, xr.Dataset], shares: xr.Dataset, num_draws: int, alpha: float
) -> Calibration:
    every = np.concatenate([p.values.ravel() for tests in pvalues.values() for p in tests.data_vars.values()])
    return Calibration(bool(every.min() > alpha / len(every)), ranks, pvalues, shares, num_draws, alpha)


def _jitter(seed: int, num_replicates: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(num_replicates,)))


def _pairs(truth: Mapping[str, Any], posterior: xr.Dataset) -> dict[str, tuple[np.ndarray, xr.DataArray]]:
    """True value and draws (sample, ...) of every variable that both have."""
    pairs = {}
    for name in truth:
        if name not in posterior:
            continue
        draws = posterior[name].transpose("chain", "draw", ...)
        axes = {str(dim): draws[dim].values if dim in draws.coords else None for dim in draws.dims[2:]}
        value = np.asarray(arranged(truth[name], f"the truth of {name}", axes, error=DiagnosticsError))
        if value.shape != draws.shape[2:]:
            raise DiagnosticsError(f"{name}: the truth has shape {value.shape}, a draw has {draws.shape[2:]}")
        flat = draws.values.reshape(-1, *value.shape)
        kept = {dim: draws[dim] for dim in draws.dims[2:] if dim in draws.coords}
        pairs[str(name)] = (value, xr.DataArray(flat, dims=("sample", *draws.dims[2:]), coords=kept))
    if not pairs:
        raise DiagnosticsError(f"truth {list(truth)} and posterior {list(posterior.data_vars)} share no variable")
    return pairs


def _rank(value: np.ndarray, draws: xr.DataArray, num_draws: int, rng: np.random.Generator) -> xr.DataArray:
    """Number of evenly spaced draws below the truth; ties are broken at random."""
    if draws.sizes["sample"] < num_draws:
        raise DiagnosticsError(f"{draws.sizes['sample']} posterior draws are fewer than num_draws={num_draws}")
    keep = np.linspace(0, draws.sizes["sample"] - 1, num_draws).round().astype(int)
    chosen = draws.values[keep]
    below, equal = (chosen < value).sum(0), (chosen == value).sum(0)
    rank = below + rng.integers(0, equal + 1)
    return xr.DataArray(rank, dims=draws.dims[1:], coords={dim: draws[dim] for dim in draws.coords})


def _per_entry(rank: xr.DataArray, test: Callable[[np.ndarray], float]) -> xr.DataArray:
    return xr.apply_ufunc(test, rank, input_core_dims=[["replicate"]], vectorize=True, output_dtypes=[float])


def _ks(rank: np.ndarray, num_draws: int, rng: np.random.Generator) -> float:
    """Kolmogorov-Smirnov p-value of ranks spread uniformly over their cells."""
    return float(stats.kstest((rank + rng.uniform(size=len(rank))) / (num_draws + 1), "uniform").pvalue)


def _chi_square(rank: np.ndarray, num_draws: int) -> float:
    """Chi-square p-value of ranks in up to 20 bins that expect about ten ranks or more each."""
    bins = np.array_split(np.arange(num_draws + 1), int(np.clip(len(rank) // 10, 2, min(20, num_draws + 1))))
    observed = np.array([np.isin(rank, cell).sum() for cell in bins])
    expected = len(rank) * np.array([len(cell) for cell in bins]) / (num_draws + 1)
    return float(stats.chisquare(observed, expected).pvalue)


def _symmetry(rank: np.ndarray, num_draws: int, rng: np.random.Generator) -> float:
    """Butler's p-value of ranks symmetric about their middle.

    Walked from the most extreme quantile inwards, one step up for a high one and one down for a low one: under
    symmetry a simple random walk, whose largest distance from zero is the statistic.
    """
    offset = (rank + rng.uniform(size=len(rank))) / (num_draws + 1) - 0.5
    walk = np.cumsum(np.sign(offset)[np.argsort(-np.abs(offset))])
    reach = int(np.abs(walk).max())
    inside = np.zeros(2 * reach - 1)  # probabilities of the places that the walk has not left for -reach or reach
    inside[reach - 1] = 1.0
    for _ in range(len(rank)):
        inside = np.convolve(inside, [0.5, 0.0, 0.5])[1:-1]
    return float(np.clip(1 - inside.sum(), 0, 1))
