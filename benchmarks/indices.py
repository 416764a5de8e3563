"""Climate indices: whether correlations and indices hold what they should, beside published indices.

    python benchmarks/indices.py correlation [--sets 400] [--seed 0] [--times 100 400]
    python benchmarks/indices.py pdo [--data DIR] [--ranks 5 10 20] [--seed 0]

``correlation``: pairs of autoregressive series of known correlation, the second the first times a number and a rest of
a decay of its own; the share of sets in which the 95 % interval of `correlate` holds it; in which Fisher's interval
does with as many times as `effective_times` counts (Bretherton et al., 1999); and in which it does with all times. The
series are known exactly: what an index adds by its own uncertainty is not in question here. Standard errors are
binomial. The prior of `correlate` was chosen on other seeds (11, 12), 300 sets of 100 times with decays .9 and .9, 0
and 0, 0 and .9, .5 and .9, and 150 of 400 times.

``pdo``: monthly ERSST v5 of the North Pacific (30 to 66 N, 150 to 250 E; ``DIR`` holds
``ersst_v5_north_pacific_1950_2019.nc``, ``pdo_ncei.csv`` and ``pdo_jisao.csv``), anomalies of 1950 to 2019, an
intercept for each cell, series that are AR(1), white noise, two chains of 300 sweeps after 200. Printed are, for the
index by definition (`mode_index`, standardised over 1950 to 1993) and for published ones in terms of modes
(`published_index`): the correlation of its mean with NOAA's Pacific Decadal Oscillation, from the same product, and the
share of months whose value by JISAO, from other products, lies in the 95 % interval. ``EOF 1`` is the leading
principal component of detrended anomalies; ``20 EOFs`` the least-squares regression of NOAA's series on twenty of
them, about the most that the field can tell. Choices (rank, whether the mean of the region is taken out) are made on
rows marked ``choice``, which use no year after 1984; rows marked ``figure`` are of later years.
"""

from __future__ import annotations

import common  # noqa: F401  # isort: skip  (pins threads before numpy is loaded)

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from probmodels import run_mcmc
from probmodels.bayesian_svd import make_problem
from probmodels.bayesian_svd.indices import correlate, load_series, mode_index, published_index
from probmodels.bayesian_svd.indices.correlation import effective_times
from probmodels.bayesian_svd.indices.series import match_series
from probmodels.datasets.sst import load_sst

DECAYS = ((0.0, 0.0), (0.9, 0.9), (0.0, 0.9), (0.9, 0.0), (0.5, 0.9), (0.9, 0.5))  # of the first, of the rest
TIMES, TRUE = (100, 400), (0.0, 0.4, 0.8)
DRAWS = 250
CHOICE = (("1950-1972", "1973-1984"),)
FIGURES = (("1950-1984", "1985-2019"), ("1950-1993", "1994-2019"))


def autoregressive(rng: np.random.Generator, decay: float, times: int) -> np.ndarray:
    """A series of unit variance (times,)."""
    out = rng.standard_normal(times)
    for t in range(1, times):
        out[t] = decay * out[t - 1] + np.sqrt(1 - decay**2) * out[t]
    return out


def fisher(x: np.ndarray, y: np.ndarray, size: float) -> tuple[float, float]:
    """95 % interval of the correlation of two series (time,) as if of so many independent times."""
    z = np.arctanh(np.corrcoef(x, y)[0, 1]) + np.array([-1.96, 1.96]) * np.sqrt(len(x) / (size * (len(x) - 3)))
    return float(np.tanh(z[0])), float(np.tanh(z[1]))


def correlation(sets: int, seed: int, lengths: Sequence[int]) -> None:
    """Print the coverage of each case."""
    dates = np.arange("1950-01", "2050-01", dtype="datetime64[M]").astype("datetime64[ns]")
    for (one, other), times, truth in itertools.product(DECAYS, lengths, TRUE):
        found: dict[str, list[tuple[float, float]]] = {}
        for index in range(sets):
            rng = np.random.default_rng([seed, index, times, int(100 * one), int(100 * other), int(100 * truth)])
            x = autoregressive(rng, one, times)
            y = truth * x + np.sqrt(1 - truth**2) * autoregressive(rng, other, times)
            time = {"time": dates[:times]}
            draws = xr.DataArray(np.broadcast_to(x, (1, DRAWS, times)), time, ("chain", "draw", "time"))
            own = correlate(draws, xr.DataArray(y, time, ("time",), name="y"), seed=index)
            low, high = np.quantile(own["correlation"], [0.025, 0.975])
            found.setdefault("correlate", []).append((float(low), float(high)))
            size = float(effective_times(x, y, np.arange(times)))
            found.setdefault("effective times", []).append(fisher(x, y, size))
            found.setdefault("all times", []).append(fisher(x, y, times))
        text = f"decays {one:.1f} and {other:.1f}, {times} times, true {truth:.1f} ({sets} sets):"
        for name, intervals in found.items():
            ends = np.array(intervals)
            held = np.mean((ends[:, 0] <= truth) & (truth <= ends[:, 1]))
            text += f"  {name} {held:.3f} ± {np.sqrt(held * (1 - held) / sets):.3f}, width {np.ptp(ends, 1).mean():.2f}"
        print(text, flush=True)


class Record:
    """The two published series beside the months of the field."""

    def __init__(self, folder: Path, time: xr.DataArray) -> None:
        self.noaa, self.jisao = (load_series(folder / f"pdo_{name}.csv") for name in ("ncei", "jisao"))
        self.year = time.dt.year.values
        self.values = {"noaa": match_series(self.noaa, time), "jisao": match_series(self.jisao, time)}

    def within(self, period: str) -> np.ndarray:
        """Months of a period."""
        first, last = (int(x) for x in period.split("-"))
        return (self.year >= first) & (self.year <= last)

    def row(self, mark: str, name: str, mean: np.ndarray, interval: np.ndarray | None, period: str) -> None:
        """Print how an index (month,) and its interval (2, month) do over a period."""
        at = self.within(period)
        jisao = at & np.isfinite(self.values["jisao"])
        text = f"{mark:7s}{name:52s}{period}  correlation with NOAA {self.correlation(mean, 'noaa', at):.3f}, "
        text += f"JISAO {self.correlation(mean, 'jisao', jisao):.3f}"
        if interval is not None:
            for key, where in (("JISAO", jisao), ("NOAA", at)):
                values = self.values[key.lower()][where]
                share = np.mean((interval[0, where] <= values) & (values <= interval[1, where]))
                text += f"; interval holds {key} {share:.3f}"
            text += f", width {np.mean(interval[1] - interval[0]):.2f}"
        print(text, flush=True)

    def correlation(self, mean: np.ndarray, key: str, at: np.ndarray) -> float:
        """Correlation with a published series over some months."""
        return float(np.corrcoef(mean[at], self.values[key][at])[0, 1])


def summary(draws: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (month,) and 95 % interval (2, month) of an index."""
    over = ("chain", "draw")
    return draws.mean(over).values[0], draws.quantile([0.025, 0.975], over).values[:, 0]


def baselines(field: xr.DataArray, record: Record) -> None:
    """Rows of empirical orthogonal functions."""
    cells = field.stack(cell=("lat", "lon")).dropna("cell").transpose("time", "cell")
    root = np.sqrt(np.cos(np.deg2rad(cells["lat"].values)))
    line = np.linalg.qr(np.stack([np.ones(len(cells)), np.arange(len(cells))], 1))[0]
    for name, count, basis in (("EOF 1, detrended", 1, line), ("20 EOFs, regression on NOAA's", 20, line[:, :1])):
        z = (cells.values - basis @ (basis.T @ cells.values)) * root
        left, size, _ = np.linalg.svd(z, full_matrices=False)
        for fitted, period in FIGURES:
            columns = np.concatenate([np.ones((len(z), 1)), left[:, :count] * size[:count]], axis=1)
            use = record.within(fitted)
            coefficients = np.linalg.lstsq(columns[use], record.values["noaa"][use], rcond=None)[0]
            record.row("figure", name, columns @ coefficients, None, period)


def pdo(folder: Path, ranks: Sequence[int], seed: int) -> None:
    """Print the rows of all indices."""
    field = load_sst(str(folder / "ersst_v5_north_pacific_1950_2019.nc"))
    record = Record(folder, field["time"])
    baselines(field, record)
    for rank in ranks:
        problem = make_problem(
            field, rank=rank, fixed_effects=["intercept"], series="ar1", num_length_scales=8, tail=1e-4
        )
        sampling = {"num_samples": 300, "warmup_steps": 200, "num_chains": 2, "chain_method": "sequential"}
        tree = run_mcmc(problem, **sampling, seed=seed, progress=False).tree
        for removed in (False, True):
            found = mode_index(tree, "pdo", remove_mean=removed)
            name = f"rank {rank}, by definition{', mean of region removed' * removed}"
            name += f", agreement {float(found['pattern_agreement'][0]):.2f}"
            mean, interval = summary(found["signal"])
            record.row("choice", name, mean, interval, "1950-1984")
            record.row("figure", name, mean, interval, "1985-2019")
        for key, series in (("NOAA", record.noaa), ("JISAO", record.jisao)):
            for mark, spans in (("choice", CHOICE), ("figure", FIGURES)):
                for fitted, period in spans:
                    found = published_index(tree, series, fitted=fitted, seed=seed)
                    record.row(mark, f"rank {rank}, {key} of {fitted} in modes", *summary(found["published"]), period)


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["correlation", "pdo"])
    parser.add_argument("--sets", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--times", type=int, nargs="+", default=TIMES, help="lengths of the series")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the files")
    parser.add_argument("--ranks", type=int, nargs="+", default=[5, 10, 20])
    options = parser.parse_args()
    if options.what == "correlation":
        correlation(options.sets, options.seed, options.times)
    else:
        pdo(options.data, options.ranks, options.seed)


if __name__ == "__main__":
    main()
