"""Verdicts on draws: convergence of chains, fit of guides, calibration on simulated data."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats

from probmodels.inference.convergence import bfmi, convergence, hdi, psis_khat

if TYPE_CHECKING:
    from probmodels.inference.result import Result

__all__ = ["Calibration", "DiagnosticsError", "Finding", "Report", "coverage", "diagnose", "sbc", "summarize"]

_BFMI_MIN, _KHAT_GOOD, _KHAT_MAX = 0.3, 0.5, 0.7
_INTERVALS = (0.5, 0.9, 0.95)


class DiagnosticsError(ValueError):
    """Draws or arguments that cannot be diagnosed."""


@dataclass(frozen=True)
class Finding:
    """One thing that was found: whether it is harmful, what it is, and what to do."""

    harmful: bool
    verdict: str
    advice: str = ""


@dataclass(frozen=True)
class Report:
    """What `diagnose` found.

    Attributes
    ----------
    ok
        Whether no finding is harmful.
    findings
        In plain words.
    table
        One row per variable: entries, worst r_hat, share of entries within the limit, smallest and median ess (bulk and
        tail), worst Monte Carlo error in units of the posterior sd.
    divergences
        Divergent trajectories; None where the kernel does not tell.
    bfmi
        Fraction of missing information per chain; None without energies.
    khat
        Pareto k-hat of the guide; None for MCMC.
    """

    ok: bool
    findings: tuple[Finding, ...]
    table: pd.DataFrame = field(repr=False)
    divergences: int | None = None
    bfmi: tuple[float, ...] | None = None
    khat: float | None = None

    def __str__(self) -> str:
        lines = ["Diagnostics passed." if self.ok else "Diagnostics FAILED: do not trust these draws yet."]
        for finding in self.findings:
            lines.append(f"  {'✗' if finding.harmful else '✓'} {finding.verdict}")
            if finding.advice:
                lines.append(f"      → {finding.advice}")
        if len(self.table):
            shown = self.table.copy()
            for column in shown.columns:
                if column.startswith("ess") or column == "entries":
                    shown[column] = shown[column].map(lambda value: f"{value:.0f}")
            shown["r_hat_share"] = shown["r_hat_share"].map(lambda value: f"{value:.1%}")
            lines += ["", shown.to_string(float_format=lambda value: f"{value:.3f}")]
        return "\n".join(lines)


def diagnose(result: Result, *, rhat_max: float = 1.01, ess_min: float = 400, entry_share: float = 0.99) -> Report:
    """Say in plain words whether draws can be trusted, and what to do where not.

    Parameters
    ----------
    result
        Result of an engine. Judged are the posterior variables that the problem names in ``diagnosed`` (all by
        default) and its invariants.
    rhat_max
        Largest r_hat of a converged entry.
    ess_min
        Smallest bulk and tail effective sample size of a converged entry.
    entry_share
        Share of the entries of a variable that must meet both limits.
    """
    tree = result.tree
    sample_stats = tree["sample_stats"].to_dataset() if "sample_stats" in tree.children else xr.Dataset()
    variables = dict(_judged(tree))
    if tree.attrs.get("engine") == "svi":
        return _diagnose_guide(sample_stats, variables)
    if not variables:
        raise DiagnosticsError("the posterior holds no variable to judge; check the problem's 'diagnosed'")
    rows, findings = {}, []
    for name, values in variables.items():
        rows[name], found = _judge(name, values, rhat_max, ess_min, entry_share)
        findings += found
    sizes = next(iter(variables.values())).sizes
    if sizes["chain"] < 2:
        findings.append(
            Finding(True, "there is one chain, so that nothing shows whether chains agree", "run at least four chains")
        )
    if not findings:
        text = f"r_hat <= {rhat_max} and ess >= {ess_min:g} for at least {entry_share:.0%} of the entries"
        findings.append(Finding(False, f"all {len(rows)} variables have {text}"))
    divergences = int(sample_stats["diverging"].sum()) if "diverging" in sample_stats else None
    if divergences:
        findings.append(
            Finding(
                True,
                f"{divergences} of {sample_stats['diverging'].size} trajectories diverged: parts of the posterior may "
                "be missing",
                "raise target_accept_prob (0.95, 0.99) or reparametrise the model",
            )
        )
    elif divergences == 0:
        findings.append(Finding(False, "no trajectory diverged"))
    fractions = None
    if "energy" in sample_stats and sizes["draw"] > 2:
        fractions = tuple(float(value) for value in bfmi(sample_stats["energy"].transpose("chain", "draw").values))
        low = [chain for chain, value in enumerate(fractions) if not value >= _BFMI_MIN]
        if low:
            findings.append(
                Finding(
                    True,
                    f"chains {low} have E-BFMI below {_BFMI_MIN} (lowest {min(fractions):.2f}): they explore the "
                    "energies of the posterior too slowly",
                    "reparametrise the model, above all scales and what they scale; or run longer",
                )
            )
    ok = not any(finding.harmful for finding in findings)
    return Report(ok, tuple(findings), pd.DataFrame.from_dict(rows, orient="index"), divergences, fractions)


def summarize(posterior: xr.Dataset, *, ci_prob: float = 0.94) -> pd.DataFrame:
    """Mean, sd, highest-density interval, Monte Carlo error, ess and r_hat of every entry.

    Parameters
    ----------
    posterior
        Draws, dims (chain, draw, ...).
    ci_prob
        Probability of the interval.

    Returns
    -------
    pandas.DataFrame
        One row per entry, named as in ``U[3, PC1]``.
    """
    if not 0 < ci_prob < 1:
        raise DiagnosticsError(f"ci_prob={ci_prob}; it must lie between 0 and 1")
    tables = []
    for name, variable in posterior.data_vars.items():
        values = variable.transpose("chain", "draw", ...)
        draws = np.asarray(values.values, dtype=np.float64)
        lower, upper = hdi(draws, ci_prob)
        columns = {"mean": draws.mean((0, 1)), "sd": draws.reshape(-1, *draws.shape[2:]).std(0, ddof=1)}
        columns |= {"hdi_lower": lower, "hdi_upper": upper, **convergence(draws)}
        index = [_label(name, values, place) for place in np.ndindex(draws.shape[2:])]
        tables.append(pd.DataFrame({key: np.ravel(value) for key, value in columns.items()}, index=index))
    order = ["mean", "sd", "hdi_lower", "hdi_upper", "mcse_mean", "ess_bulk", "ess_tail", "r_hat"]
    return pd.concat(tables)[order] if tables else pd.DataFrame(columns=order)


@dataclass(frozen=True)
class Calibration:
    """What simulation-based calibration found.

    Attributes
    ----------
    ok
        Whether all p-values pass after Bonferroni's correction.
    ranks
        Rank of the truth among the draws, 0 to ``num_draws``: dims (replicate, ...).
    ks, chi_square
        p-values of uniformity of the ranks, per entry.
    coverage
        Share of the replicates whose central interval holds the truth: dims (prob, ...).
    num_draws
        Draws per replicate that the truth is ranked among.
    alpha
        Chance that a calibrated method fails.
    """

    ok: bool
    ranks: xr.Dataset
    ks: xr.Dataset
    chi_square: xr.Dataset
    coverage: xr.Dataset
    num_draws: int
    alpha: float

    @property
    def num_tests(self) -> int:
        """Tests that Bonferroni's correction counts."""
        return sum(p.size for tests in (self.ks, self.chi_square) for p in tests.data_vars.values())

    def __str__(self) -> str:
        limit = self.alpha / self.num_tests
        head = f"Calibration {'passed' if self.ok else 'FAILED'}: {self.ranks.sizes['replicate']} replicates, "
        lines = [head + f"{self.num_tests} tests, each at p > {limit:.2g}"]
        for name in self.ranks.data_vars:
            shares = self.coverage[name].mean([dim for dim in self.coverage[name].dims if dim != "prob"])
            spelled = ", ".join(f"{float(prob):.0%}: {float(shares.sel(prob=prob)):.3f}" for prob in shares["prob"])
            lowest = min(float(self.ks[name].min()), float(self.chi_square[name].min()))
            lines.append(f"  {'✓' if lowest > limit else '✗'} {name}: lowest p {lowest:.2g}; coverage {spelled}")
        return "\n".join(lines)


def sbc(
    simulate: Callable[[np.random.Generator], tuple[Mapping[str, Any], Any]],
    infer: Callable[[Any, int], Any],
    *,
    num_replicates: int = 200,
    num_draws: int = 99,
    seed: int = 0,
    alpha: float = 0.01,
    probs: Sequence[float] = _INTERVALS,
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
        Of all replicates; replicate r is the same whatever ``num_replicates``.
    alpha
        Chance that a calibrated method fails.
    probs
        Central intervals whose coverage is reported.

    References
    ----------
    Talts, S., Betancourt, M., Simpson, D., Vehtari, A. and Gelman, A. (2018). Validating Bayesian inference
    algorithms with simulation-based calibration. https://arxiv.org/abs/1804.06788
    """
    if num_replicates < 20 or num_draws < 9:
        raise DiagnosticsError(f"num_replicates={num_replicates}, num_draws={num_draws}; at least 20 and 9 are needed")
    ranks, covered = [], []
    jitter = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(num_replicates,)))
    for replicate in range(num_replicates):
        stream = np.random.SeedSequence(seed, spawn_key=(replicate,))
        rng = np.random.default_rng(stream)
        try:
            truth, data = simulate(rng)
            found = infer(data, int(rng.integers(2**31)))
        except Exception as error:
            error.add_note(f"in replicate {replicate} of sbc(seed={seed})")
            raise
        posterior = found if isinstance(found, xr.Dataset) else found.posterior
        pairs = _pairs(truth, posterior)
        ranks.append(xr.Dataset({name: _rank(value, draws, num_draws, rng) for name, (value, draws) in pairs.items()}))
        covered.append(coverage(truth, posterior, probs=probs))
    together = xr.concat(ranks, "replicate")
    ks = together.map(lambda rank: _per_entry(rank, lambda r: _ks(r, num_draws, jitter)))
    chi_square = together.map(lambda rank: _per_entry(rank, lambda r: _chi_square(r, num_draws)))
    pvalues = [p.values.ravel() for tests in (ks, chi_square) for p in tests.data_vars.values()]
    smallest = min(float(p.min()) for p in pvalues)
    ok = smallest > alpha / sum(len(p) for p in pvalues)
    shares = xr.concat(covered, "replicate").astype(float).mean("replicate")
    return Calibration(ok, together, ks, chi_square, shares, num_draws, alpha)


def coverage(truth: Mapping[str, Any], posterior: xr.Dataset, *, probs: Sequence[float] = _INTERVALS) -> xr.Dataset:
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


def _judged(tree: xr.DataTree) -> Iterator[tuple[str, xr.DataArray]]:
    """Variables that diagnostics judge: the chosen posterior variables, then the invariants."""
    posterior = tree["posterior"].to_dataset()
    chosen = json.loads(tree.attrs.get("diagnosed", "null"))
    for name in posterior.data_vars if chosen is None else chosen:
        if name not in posterior:
            raise DiagnosticsError(f"'diagnosed' names {name!r}; the posterior has {list(posterior.data_vars)}")
        yield str(name), posterior[name].transpose("chain", "draw", ...)
    if "invariants" in tree.children:
        for name, variable in tree["invariants"].to_dataset().data_vars.items():
            if {"chain", "draw"} <= set(variable.dims):
                label = str(name) if chosen is not None and name not in chosen else f"{name} (invariant)"
                yield label, variable.transpose("chain", "draw", ...)


def _judge(
    name: str, values: xr.DataArray, rhat_max: float, ess_min: float, entry_share: float
) -> tuple[dict[str, float], list[Finding]]:
    draws = np.asarray(values.values)
    if draws.shape[1] < 4 or not draws.size:
        raise DiagnosticsError(
            f"{name} has {draws.shape[1]} draws of {draws[0, 0].size} entries; 4 draws are the least"
        )
    found = convergence(draws)
    spread = draws.reshape(-1, *draws.shape[2:]).std(0, ddof=1, dtype=np.float64)
    flat = {key: np.ravel(value) for key, value in found.items()}
    broken = ~np.isfinite(draws).all((0, 1)).ravel()
    moving = ~np.isnan(flat["r_hat"]) & ~broken
    row = {"entries": draws[0, 0].size, "r_hat_max": np.nan, "r_hat_share": np.nan}
    row |= dict.fromkeys(("ess_bulk_min", "ess_bulk_median", "ess_tail_min", "ess_tail_median", "mcse_max"), np.nan)
    findings = []
    if broken.any():
        findings.append(
            Finding(
                True,
                f"{name}: {broken.sum()} of {broken.size} entries have draws that are not finite",
                "check the model",
            )
        )
    if not moving.any():
        return row, findings  # constant, as entries fixed by an identification are
    rhat, bulk, tail = (flat[key][moving] for key in ("r_hat", "ess_bulk", "ess_tail"))
    row |= {
        "r_hat_max": rhat.max(),
        "r_hat_share": (rhat <= rhat_max).mean(),
        "ess_bulk_min": bulk.min(),
        "ess_bulk_median": np.median(bulk),
        "ess_tail_min": tail.min(),
        "ess_tail_median": np.median(tail),
        "mcse_max": (flat["mcse_mean"][moving] / np.ravel(spread)[moving]).max(),
    }
    if row["r_hat_share"] < entry_share:
        worst = _label(name, values, np.unravel_index(np.nanargmax(found["r_hat"]), found["r_hat"].shape))
        verdict = (
            f"{name}: {row['r_hat_share']:.1%} of the entries have r_hat <= {rhat_max}, worst {row['r_hat_max']:.3f}"
        )
        findings.append(
            Finding(
                True,
                f"{verdict} at {worst}: the chains have not come to agree",
                "run longer (warmup_steps, num_samples); if it stays, look at the traces for several modes, label "
                "switching or a direction that the data leave open",
            )
        )
    size = np.minimum(bulk, tail)
    share = float((size >= ess_min).mean())
    if share < entry_share:
        factor = max(ess_min / max(float(np.quantile(size, 1 - entry_share)), 1.0), 1.1)
        verdict = (
            f"{name}: {share:.1%} of the entries have bulk and tail ess of {ess_min:g} or more, least {size.min():.0f}"
        )
        findings.append(Finding(True, verdict, f"draw about {np.ceil(factor * 10) / 10:g} times as many samples"))
    return row, findings


def _diagnose_guide(sample_stats: xr.Dataset, variables: Mapping[str, xr.DataArray]) -> Report:
    """k-hat of the importance weights of a guide's draws, which stands in for r_hat."""
    khat = psis_khat(sample_stats["log_weight"].values) if "log_weight" in sample_stats else float("nan")
    broken = [name for name, values in variables.items() if not np.isfinite(values.values).all()]
    findings = [Finding(True, f"draws of {broken} are not finite", "lower lr or clip the gradient")] if broken else []
    if np.isnan(khat):
        verdict = "the importance weights of the draws have no tail to judge: the guide is a point estimate, or exact"
        findings.append(Finding(False, verdict))
    else:
        meaning, harmful = "the guide fits the posterior closely", False
        if khat > _KHAT_MAX:
            meaning, harmful = "the guide misses part of the posterior; its sds and intervals may be wrong", True
        elif khat > _KHAT_GOOD:
            meaning = "the guide is usable, though not close to the posterior"
        advice = "take more steps or a richer guide, or check against run_mcmc" if harmful else ""
        findings.append(Finding(harmful, f"Pareto k-hat of the guide is {khat:.2f}: {meaning}", advice))
    ok = not any(finding.harmful for finding in findings)
    return Report(ok, tuple(findings), pd.DataFrame(), khat=khat)


def _label(name: Hashable, values: xr.DataArray, place: tuple[Any, ...]) -> str:
    """Name of an entry by its coordinate labels, as in ``U[3, PC1]``."""
    labels = [
        values[dim].values[i] if dim in values.coords else i for dim, i in zip(values.dims[2:], place, strict=True)
    ]
    return f"{name}[{', '.join(str(label) for label in labels)}]" if labels else str(name)


def _pairs(truth: Mapping[str, Any], posterior: xr.Dataset) -> dict[str, tuple[np.ndarray, xr.DataArray]]:
    """True value and draws (sample, ...) of every variable that both have."""
    pairs = {}
    for name in truth:
        if name not in posterior:
            continue
        draws = posterior[name].transpose("chain", "draw", ...)
        value = np.asarray(truth[name])
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
