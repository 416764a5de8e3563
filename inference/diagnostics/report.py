"""Verdicts on draws: convergence of chains, health of trajectories, fit of guides; what to do where they fail."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import pandas as pd
import xarray as xr
from annotated_types import Ge

from probmodels.errors import DiagnosticsError
from probmodels.inference.diagnostics import _html
from probmodels.inference.diagnostics.convergence import EQUAL_WEIGHTS, bfmi, convergence, hdi, psis
from probmodels.inference.diagnostics.importance import RESAMPLED, importance_moments
from probmodels.inference.labels import ResultLike, group_of, read_json
from probmodels.options import Fraction, NonNegative, Probability, checked

__all__ = ["Finding", "Report", "diagnose", "summarize"]

_BFMI_MIN, KHAT_GOOD, KHAT_MAX = 0.3, 0.5, 0.7
_LEAST_DRAWS = 4  # of each chain, below which no statistic is computed
_LEAST_WEIGHTS = 25  # below which their tail has no shape, see `psis`
_SATURATED = 0.01  # share of trajectories at their limit that is worth a word
_OFF_TARGET = 0.2  # distance of the mean acceptance of a chain from its target that is worth a word
_SHIFT, _RATIO = 0.5, 1.5  # sds that a mean, and factor that an sd of a guide may be off at most
_CLOSE = 0.4  # share of these that is worth a word
_BAD_ROWS = 0.05  # share of the rows of data that a guide may fail
_LEAST_SHARE, _CLOSE_SHARE = 0.5, 0.8  # of draws that weights leave effective: for use, and for a close fit
_MOST_ROWS = 2000  # rows that are judged, evenly spaced among more
_LIMITS = (("tree_depth", "max_tree_depth"), ("n_steps", "max_leapfrog"))
_GUIDED = ("svi", "em", "bilevel")  # engines whose draws come from a guide


@dataclass(frozen=True)
class Finding:
    """One thing that was found: whether it is harmful, what it is, and what to do."""

    harmful: bool
    verdict: str
    advice: str = ""

    @property
    def mark(self) -> str:
        """✗ for what is harmful, ! for what is worth a look, ✓ for what is well."""
        return "✗" if self.harmful else "!" if self.advice else "✓"


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
        One row per variable. Of chains: entries, worst r_hat, share of entries within the limit, smallest and median
        ess (bulk and tail), worst Monte Carlo error in units of the posterior sd; from 16 chains on, worst nested
        r_hat. Of a guide: the entry that importance weights move most, its mean and sd under the guide, and the
        corrected ones with their Monte Carlo errors.
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

    @property
    def _head(self) -> str:
        return "Diagnostics passed." if self.ok else "Diagnostics FAILED: do not trust these draws yet."

    def __str__(self) -> str:
        lines = [self._head, *spell(self.findings)]
        if len(self.table):
            shown = self.table.copy()
            for column in shown.columns:
                if column.startswith("ess") or column == "entries":
                    shown[column] = shown[column].map(lambda value: f"{value:.0f}")
                elif column.endswith("share"):
                    shown[column] = shown[column].map(lambda value: f"{value:.1%}")
            lines += ["", shown.to_string(float_format=lambda value: f"{value:.3f}")]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return _html.block(self._head, _html.listed(self.findings), _html.frame(self.table))


@checked(DiagnosticsError)
def diagnose(
    result: ResultLike,
    *,
    rhat_max: Annotated[float, Ge(1)] = 1.01,
    ess_min: NonNegative = 400,
    entry_share: Probability = 0.99,
    divergence_share: Probability = 0.001,
) -> Report:
    """Say in plain words whether draws can be trusted, and what to do where not.

    Parameters
    ----------
    result
        Result of an engine. Judged are the posterior variables that the problem names in ``diagnosed`` (all by
        default) and its invariants.
    rhat_max
        Largest r_hat of a converged entry. From 16 chains on, nested r_hat may meet it instead: the r_hat of many
        short chains is larger even where all is well.
    ess_min
        Smallest bulk and tail effective sample size of a converged entry, over all chains.
    entry_share
        Share of the entries of a variable that must meet both limits.
    divergence_share
        Share of divergent trajectories up to which they are reported but not held to be harmful.

    Returns
    -------
    Report
        Whose ``ok`` is the verdict and whose ``str`` says why.

    Raises
    ------
    DiagnosticsError
        If there is nothing to judge.
    """
    tree = result.tree
    sample_stats = group_of(tree, "sample_stats")
    variables = dict(_judged(tree))
    if tree.attrs.get("engine") in _GUIDED:
        return _diagnose_guide(tree, sample_stats, variables)
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
    if sizes["draw"] < _LEAST_DRAWS:
        short = f"chains of length {sizes['draw']} are too short to tell whether they have converged"
        findings.append(Finding(True, short, f"keep at least {_LEAST_DRAWS} draws of each chain"))
    if not findings:
        text = f"r_hat <= {rhat_max} and ess >= {ess_min:g} for at least {entry_share:.0%} of the entries"
        findings.append(Finding(False, f"all {len(rows)} variables have {text}"))
    findings += _frozen(variables) if sizes["draw"] >= _LEAST_DRAWS else []
    divergences = int(sample_stats["diverging"].sum()) if "diverging" in sample_stats else None
    if divergences is not None:
        findings.append(_divergent(divergences, sample_stats["diverging"].size, divergence_share))
    fractions = None
    if "energy" in sample_stats and sizes["draw"] > 2:
        fractions = tuple(float(value) for value in bfmi(sample_stats["energy"].transpose("chain", "draw").values))
        if low := [chain for chain, value in enumerate(fractions) if not value >= _BFMI_MIN]:
            findings.append(
                Finding(
                    True,
                    f"{_chains(low)} E-BFMI below {_BFMI_MIN} (lowest {min(fractions):.2f}): the energies of the "
                    "posterior are explored too slowly",
                    "reparametrise the model, above all scales and what they scale; or run longer",
                )
            )
    findings += [*_saturated(sample_stats, tree.attrs), *_off_target(sample_stats, tree.attrs)]
    if moved := int(sample_stats.attrs.get("moved_chains", 0)):
        verdict = f"{moved} chains got stuck in warm-up and were moved to where others were"
        findings.append(Finding(False, verdict, "a mode that only they had found would be missing: try another seed"))
    ok = not any(finding.harmful for finding in findings)
    return Report(ok, tuple(findings), pd.DataFrame.from_dict(rows, orient="index"), divergences, fractions)


def spell(findings: Sequence[Finding]) -> list[str]:
    """Lines of text that say what was found and what to do."""
    lines = []
    for finding in findings:
        lines.append(f"  {finding.mark} {finding.verdict}")
        if finding.advice:
            lines.append(f"      → {finding.advice}")
    return lines


@checked(DiagnosticsError)
def summarize(posterior: xr.Dataset, *, ci_prob: Fraction = 0.94) -> pd.DataFrame:
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
    tables = []
    for name, variable in posterior.data_vars.items():
        values = variable.transpose("chain", "draw", ...)
        draws = np.asarray(values.values, dtype=np.float64)
        lower, upper = hdi(draws, ci_prob)
        columns = {"mean": draws.mean((0, 1)), "sd": draws.reshape(-1, *draws.shape[2:]).std(0, ddof=1)}
        columns |= {"hdi_lower": lower, "hdi_upper": upper, **convergence(draws)}
        index = [label(name, values, place) for place in np.ndindex(draws.shape[2:])]
        tables.append(pd.DataFrame({key: np.ravel(value) for key, value in columns.items()}, index=index))
    order = ["mean", "sd", "hdi_lower", "hdi_upper", "mcse_mean", "ess_bulk", "ess_tail", "r_hat"]
    return pd.concat(tables)[order] if tables else pd.DataFrame(columns=order)


def _judged(tree: xr.DataTree) -> Iterator[tuple[str, xr.DataArray]]:
    """Variables that diagnostics judge: the chosen posterior variables, then the invariants."""
    posterior = group_of(tree, "posterior")
    chosen = read_json(tree.attrs, "diagnosed", None)
    for name in posterior.data_vars if chosen is None else chosen:
        if name not in posterior:
            raise DiagnosticsError(f"'diagnosed' names {name!r}; the posterior has {list(posterior.data_vars)}")
        yield str(name), posterior[name].transpose("chain", "draw", ...)
    for name, variable in group_of(tree, "invariants").data_vars.items():
        if {"chain", "draw"} <= set(variable.dims):
            label = str(name) if chosen is not None and name not in chosen else f"{name} (invariant)"
            yield label, variable.transpose("chain", "draw", ...)


def _judge(
    name: str, values: xr.DataArray, rhat_max: float, ess_min: float, entry_share: float
) -> tuple[dict[str, float], list[Finding]]:
    draws = np.asarray(values.values)
    if not draws.size:
        raise DiagnosticsError(f"{name} has {draws.shape[1]} draws of {math.prod(draws.shape[2:])} entries")
    found = convergence(draws)
    spread = draws.reshape(-1, *draws.shape[2:]).std(
        0, ddof=min(1, draws.shape[0] * draws.shape[1] - 1), dtype=np.float64
    )
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
    judged = np.fmin(rhat, flat["nested_r_hat"][moving]) if "nested_r_hat" in flat else rhat
    row |= {
        "r_hat_max": rhat.max(),
        "r_hat_share": (judged <= rhat_max).mean(),
        "ess_bulk_min": bulk.min(),
        "ess_bulk_median": np.median(bulk),
        "ess_tail_min": tail.min(),
        "ess_tail_median": np.median(tail),
        "mcse_max": (flat["mcse_mean"][moving] / np.ravel(spread)[moving]).max(),
    }
    if "nested_r_hat" in flat:
        row["nested_r_hat_max"] = np.nanmax(flat["nested_r_hat"][moving])
    if row["r_hat_share"] < entry_share:
        index = int(np.flatnonzero(moving)[np.argmax(judged)])
        worst = label(name, values, np.unravel_index(index, draws.shape[2:]))
        kind = "r_hat or nested r_hat" if "nested_r_hat" in flat else "r_hat"
        verdict = f"{name}: {row['r_hat_share']:.1%} of the entries have {kind} <= {rhat_max}"
        findings.append(
            Finding(
                True,
                f"{verdict}, worst {judged.max():.3f} at {worst}: the chains have not come to agree",
                "run longer (warmup_steps, num_samples); if it stays, look at the traces for several modes, label "
                "switching or a direction that the data leave open",
            )
        )
    size = np.minimum(bulk, tail)
    share = float((size >= ess_min).mean())
    if np.isnan(size).any():
        verdict = f"{name}: {draws.shape[1]} draws per chain are too few to tell the effective sample size"
        findings.append(Finding(True, verdict, "draw at least 8 per chain (num_samples)"))
    elif share < entry_share:
        factor = max(ess_min / max(float(np.quantile(size, 1 - entry_share)), 1.0), 1.1)
        verdict = (
            f"{name}: {share:.1%} of the entries have bulk and tail ess of {ess_min:g} or more, least {size.min():.0f}"
        )
        findings.append(Finding(True, verdict, f"draw about {np.ceil(factor * 10) / 10:g} times as many samples"))
    return row, findings


def _frozen(variables: Mapping[str, xr.DataArray]) -> list[Finding]:
    """Chains in which nothing moves that moves, or differs, elsewhere."""
    moves = np.zeros(next(iter(variables.values())).sizes["chain"], bool)
    apart = False
    for values in variables.values():
        draws = np.asarray(values.values)
        moves |= (draws != draws[:, :1]).reshape(len(draws), -1).any(1)
        apart |= bool((draws[:, 0] != draws[0, 0]).any())
    if moves.all() or not (moves.any() or apart):
        return []
    stuck = np.flatnonzero(~moves).tolist()
    return [
        Finding(
            True,
            f"{_chains(stuck)} one value at all {draws.shape[1]} draws: frozen where the sampler rejects every step",
            "start from other values (seed), lengthen warmup_steps, and look for infinite densities near the start",
        )
    ]


def _divergent(count: int, total: int, share: float) -> Finding:
    if not count:
        return Finding(False, "no trajectory diverged")
    verdict = f"{count} of {total} trajectories diverged ({count / total:.2%}): parts of the posterior may be missing"
    return Finding(
        count > share * total,
        verdict,
        "raise target_accept_prob (0.95, 0.99) or reparametrise the model, above all scales and what they scale",
    )


def _setting(name: str, variable: str, sample_stats: xr.Dataset, attrs: Mapping[Any, Any]) -> float | None:
    """A setting of the sampler, wherever it is kept: a variable or attribute of the statistics, or of the tree."""
    if name in sample_stats:
        return float(sample_stats[name].max())
    places = (sample_stats[variable].attrs, sample_stats.attrs, attrs)
    return next((float(place[name]) for place in places if name in place), None)


def _saturated(sample_stats: xr.Dataset, attrs: Mapping[Any, Any]) -> Iterator[Finding]:
    """Trajectories that ended at their limit rather than by themselves: a matter of cost, which ess shows."""
    for variable, name in _LIMITS:
        if variable not in sample_stats or (limit := _setting(name, variable, sample_stats, attrs)) is None:
            continue
        share = float((sample_stats[variable] >= limit).mean())
        if share > _SATURATED:
            yield Finding(
                False,
                f"{share:.1%} of the trajectories ended at {name}={limit:g}: draws are more correlated than need be",
                f"raise {name}, or scale the parameters alike; where steps are tiny, reparametrise the model",
            )


def _off_target(sample_stats: xr.Dataset, attrs: Mapping[Any, Any]) -> Iterator[Finding]:
    """Chains whose mean acceptance has not come near its target."""
    name = "acceptance_rate"
    if name not in sample_stats or (target := _setting("target_accept_prob", name, sample_stats, attrs)) is None:
        return
    rates = sample_stats[name].mean("draw").values
    if low := np.flatnonzero(~(rates >= target - _OFF_TARGET)).tolist():
        verdict = f"{_chains(low)} mean acceptance far below the target of {target:g}, least {rates.min():.2f}"
        yield Finding(False, f"{verdict}: steps are too long there", "lengthen warmup_steps, or raise the target")
    if high := np.flatnonzero(rates > target + _OFF_TARGET).tolist():
        verdict = f"{_chains(high)} mean acceptance far above the target of {target:g}, most {rates.max():.2f}"
        yield Finding(False, f"{verdict}: steps are shorter than need be", "lengthen warmup_steps")


def _chains(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
    return f"chain {shown} has" if len(numbers) == 1 else f"chains {shown} have"


def _diagnose_guide(tree: xr.DataTree, sample_stats: xr.Dataset, variables: Mapping[str, xr.DataArray]) -> Report:
    """k-hat of the importance weights of a guide's draws, which stands in for r_hat, and what the weights correct."""
    findings, rows, resampled = [*_still_falling(tree)], {}, RESAMPLED in tree.attrs
    if broken := [name for name, values in variables.items() if not np.isfinite(values.values).all()]:
        findings.append(Finding(True, f"draws of {broken} are not finite", "lower lr or clip the gradient"))
    few: Finding | None = None
    khat = float("nan")
    if resampled:
        kept = read_json(tree.attrs, RESAMPLED, {}).get("khat")
        khat = khat if kept is None else float(kept)
    elif "log_weight" in sample_stats:
        raw = sample_stats["log_weight"].transpose("chain", "draw").values.ravel()
        smoothed, khat = psis(raw)
        few = _few_draws(raw)
        khat = khat if few is None and np.ptp(raw) > EQUAL_WEIGHTS else float("nan")
        findings += _useless_weights(raw)
        if (raw < np.inf).all() and "log_weight_by_row" not in sample_stats:
            rows = dict(_corrected(name, values, smoothed) for name, values in variables.items() if name not in broken)
    by_row = sample_stats.get("log_weight_by_row")
    if few is not None:
        findings.append(few)
    elif by_row is not None and not resampled and np.isfinite(by_row.values).all():
        found, khat = _fit_by_row(by_row)
        findings.append(found)
    elif not np.isnan(khat):
        findings += _fit_of_guide(khat, rows, resampled=resampled)
    else:
        findings += _fit_unknown(sample_stats, harmful=any(finding.harmful for finding in findings))
    table = pd.DataFrame.from_dict(rows, orient="index").drop(columns="off", errors="ignore")
    return Report(not any(finding.harmful for finding in findings), tuple(findings), table, khat=khat)


def _useless_weights(log_weight: np.ndarray) -> Iterator[Finding]:
    """Draws that the model excludes, and weights that are no numbers."""
    if lost := int(np.isneginf(log_weight).sum()):
        verdict = f"{lost} of {log_weight.size} draws of the guide are impossible under the model"
        yield Finding(lost > 0.01 * log_weight.size, verdict, "give the guide the supports of the model")
    if not (log_weight < np.inf).all():
        verdict = "some importance weights are not numbers or infinite"
        yield Finding(True, verdict, "look for missing values and scales near zero in the model")


def _fit_unknown(sample_stats: xr.Dataset, *, harmful: bool) -> Iterator[Finding]:
    """Why no k-hat shows how well the guide fits, and what to do instead."""
    if "bound" in sample_stats:
        verdict = "the loss is a bound by sampled terms, so that draws have no importance weights to judge the fit by"
        yield Finding(False, verdict, "compare the bound of data that were held out")
    elif "log_weight" not in sample_stats:
        verdict = "the draws have no importance weights, so that nothing shows how well the guide fits"
        yield Finding(False, verdict, "check against run_mcmc, or calibrate with sbc")
    elif not harmful:
        verdict = "the importance weights of the draws have no tail to judge: the guide is a point estimate, or exact"
        yield Finding(False, verdict)


def _still_falling(tree: xr.DataTree) -> Iterator[Finding]:
    """Whether the last tenth of the steps has a loss surely, and by half a nat, below the tenth before it."""
    fit = group_of(tree, "fit")
    loss = np.asarray(fit["loss"].values if "loss" in fit else ())
    width = len(loss) // 10
    if width < 20:
        return
    before, after = loss[-2 * width : -width], loss[-width:]
    drop = float(before.mean() - after.mean())
    if drop > max(0.5, 4 * float(np.hypot(before.std(), after.std())) / np.sqrt(width)):
        verdict = f"the loss was still falling: by {drop:.3g} over the last {width} steps"
        yield Finding(False, verdict, "take more steps (num_steps), or a larger lr that decays")


def _fit_of_guide(khat: float, rows: Mapping[str, Mapping[str, float]], *, resampled: bool) -> Iterator[Finding]:
    """What k-hat says of the importance weights and, where they can be relied on, what they say of the guide."""
    start = f"Pareto k-hat of the guide is {khat:.2f}: "
    if khat > KHAT_MAX:
        meaning = "the guide misses part of the posterior; its sds and intervals may be wrong"
        meaning += ", and resampling its draws cannot mend that" if resampled else ""
        yield Finding(True, start + meaning, "take more steps or a richer guide, or check against run_mcmc")
        return
    worst = max(rows, key=lambda name: rows[name]["off"], default=None)
    if resampled:
        yield Finding(False, f"{start}the resampled draws stand for the posterior")
    elif worst is not None and rows[worst]["off"] > _CLOSE:
        row = rows[worst]
        yield Finding(False, f"{start}its draws can be corrected by their importance weights")
        verdict = f"of {worst}, the guide has mean {row['guide_mean']:.3g} and sd {row['guide_sd']:.3g}, where the "
        verdict += f"weights give {row['corrected_mean']:.3g} and {row['corrected_sd']:.3g}"
        advice = "use importance_resample(result) in place of the raw draws, or take more steps or a richer guide"
        yield Finding(row["off"] > 1, verdict, advice)
    elif khat > KHAT_GOOD:
        advice = "importance_resample(result) brings its draws closer"
        yield Finding(False, f"{start}the guide is usable, though not close to the posterior", advice)
    else:
        yield Finding(False, f"{start}the guide fits the posterior closely")


def _few_draws(log_weight: np.ndarray) -> Finding | None:
    """What is said of weights that are too few for the shape of a tail, unless all are equal."""
    count = log_weight.size
    if count >= _LEAST_WEIGHTS or (count > 1 and np.ptp(log_weight) <= EQUAL_WEIGHTS):
        return None
    verdict = f"{count} draw{' is' if count == 1 else 's are'} too few to judge the fit by their importance weights"
    return Finding(False, verdict, f"draw {_LEAST_WEIGHTS} or more, as by num_samples=1000")


def _fit_by_row(log_weight: xr.DataArray) -> tuple[Finding, float]:
    """What weights say of a guide whose rows of data are judged each by itself; k-hat that 95 % of them do not exceed.

    Of few values k-hat finds no fault with a guide that is far off. So the share of draws that weights leave effective,
    1 / (1 + chi-square divergence), is judged as well.
    """
    values = log_weight.transpose("chain", "draw", ...).values
    shape = values.shape[2:]
    judged = np.unique(np.linspace(0, math.prod(shape) - 1, min(math.prod(shape), _MOST_ROWS)).astype(int))
    flat = values.reshape(-1, math.prod(shape))[:, judged]
    khat = np.array([psis(row)[1] if np.ptp(row) > EQUAL_WEIGHTS else -1.0 for row in flat.T])
    khat = np.fmax(khat, -1.0)  # the shape of a handful of values means nothing below
    weight = np.exp(flat - flat.max(0))
    share = weight.mean(0) ** 2 / np.square(weight).mean(0)
    last = math.ceil((1 - _BAD_ROWS) * len(khat)) - 1
    level, least = float(np.sort(khat)[last]), float(np.sort(share)[::-1][last])
    plates = " and ".join(str(dim) for dim in log_weight.dims[2:])
    worst = label(plates, log_weight, np.unravel_index(int(judged[np.argmin(share)]), shape))
    verdict = (
        f"in {1 - _BAD_ROWS:.0%} of {len(khat)} rows of {plates}, each judged by itself, Pareto k-hat of the guide "
    )
    verdict += (
        f"is at most {level:.2f}, and {least:.0%} or more of its draws are effective ({worst}: {share.min():.0%}): "
    )
    if level > KHAT_MAX or least < _LEAST_SHARE:
        advice = "take more steps or a richer guide, and look at check_weights or check_exact"
        return Finding(True, f"{verdict}the guide misses part of many posteriors", advice), level
    how = "fits the posterior closely" if least >= _CLOSE_SHARE else "is usable, though not close to the posterior"
    return Finding(False, f"{verdict}the guide {how}"), level


def _corrected(name: str, values: xr.DataArray, log_weight: np.ndarray) -> tuple[str, dict[str, float]]:
    """The entry that importance weights correct most, its moments without and with them, and how far off it is.

    ``off`` is 1 where the mean or the sd of the guide is surely, by three Monte Carlo errors, at its limit.
    """
    draws = np.asarray(values.values, dtype=np.float64).reshape(-1, *values.shape[2:])
    mean, sd = draws.mean(0), draws.std(0)
    found = importance_moments(draws, log_weight)
    with np.errstate(divide="ignore", invalid="ignore"):  # entries that are constant
        shift = (np.abs(found["mean"] - mean) - 3 * found["mcse_mean"]) / found["sd"]
        ratio = np.abs(np.log(sd / found["sd"])) - 3 * found["mcse_sd"] / found["sd"]
    off = np.nan_to_num(np.fmax(shift / _SHIFT, ratio / np.log(_RATIO)), posinf=0.0, neginf=0.0)
    place = np.unravel_index(int(np.argmax(off)), off.shape)
    row = {"entries": draws[0].size, "guide_mean": mean[place], "guide_sd": sd[place]}
    row |= {"corrected_mean": found["mean"][place], "corrected_sd": found["sd"][place]}
    row |= {"mcse_mean": found["mcse_mean"][place], "mcse_sd": found["mcse_sd"][place], "off": off[place]}
    return label(name, values, place), row


def label(name: Hashable, values: xr.DataArray, place: tuple[Any, ...]) -> str:
    """Name of an entry by its coordinate labels, as in ``U[3, PC1]``."""
    labels = [
        values[dim].values[i] if dim in values.coords else i for dim, i in zip(values.dims[2:], place, strict=True)
    ]
    return f"{name}[{', '.join(str(label) for label in labels)}]" if labels else str(name)
