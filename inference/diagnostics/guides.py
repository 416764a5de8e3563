"""What is found of the draws of a guide: the weights of its draws, what they correct, and the loss of its fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr

from probmodels.inference.diagnostics.convergence import EQUAL_WEIGHTS, psis
from probmodels.inference.diagnostics.findings import Finding, Report, label
from probmodels.inference.diagnostics.importance import RESAMPLED, importance_moments
from probmodels.inference.labels import group_of, read_json

__all__ = ["KHAT_MAX", "Spread", "judge_evidence", "judge_guide", "still_falling"]

_KHAT_GOOD, KHAT_MAX = 0.5, 0.7
_LEAST_WEIGHTS = 25  # below which they say nothing
_SHIFT, _RATIO = 0.5, 1.5  # sds that a mean, and factor that an sd of a guide may be off at most
_CLOSE = 0.4  # share of these that is worth a word
_BAD_ROWS = 0.05  # share of the rows of data that a guide may fail
_LEAST_SHARE, _CLOSE_SHARE = 0.5, 0.8  # of draws that weights leave effective: for use, and for a close fit
_MOST_DISTANCE, _CLOSE_DISTANCE = 0.1, 0.05  # total variation of discrete sites: for use, and for a close fit
_MOST_MISSED = 0.05  # share of the posterior mass that a guide may lack
_LEAST_ANNEALED = 100  # effective draws by annealing that can be trusted
_LEAST_RESAMPLED = 100  # effective draws behind draws that were resampled
_MOST_ROWS = 2000  # rows that are judged, evenly spaced among more
_FALLING, _FALLING_BY_VALUE = 5.0, 0.01  # nats, in all and by observed value, by which a loss may still fall
_LEAST_STEPS = 50


@dataclass(frozen=True)
class Spread:
    """How unequal importance weights are.

    Attributes
    ----------
    size
        Number of weights.
    share
        Effective draws by draw, (sum w)^2 / (n sum w^2), an estimate of 1 / (1 + chi-square divergence of the
        posterior from the guide).
    distance
        Total variation between guide and posterior on what the guide draws, mean |w / mean w - 1| / 2.
    distance_error
        Monte Carlo error of the distance.
    gap
        log mean w - mean log w, an estimate of log evidence less ELBO, KL(guide || posterior).
    """

    size: int
    share: float
    distance: float
    distance_error: float
    gap: float

    @classmethod
    def of(cls, log_weight: np.ndarray) -> Spread:
        """Of log weights (draw,), of which one at least is finite; minus infinity is a weight of zero."""
        top = float(log_weight.max())
        weight = np.exp(log_weight - top)
        mean = float(weight.mean())
        apart = np.abs(weight / mean - 1) / 2
        return cls(
            weight.size,
            mean**2 / float(np.square(weight).mean()),
            float(apart.mean()),
            float(apart.std()) / math.sqrt(weight.size),
            top + math.log(mean) - float(log_weight.mean()),
        )


def judge_guide(tree: xr.DataTree, sample_stats: xr.Dataset, variables: Mapping[str, xr.DataArray]) -> Report:
    """The verdict on draws of a guide, by their importance weights.

    Of continuous sites Pareto k-hat says whether the weights can be relied on. Of sites of finitely many values weights
    are bounded, so that k-hat finds no fault with a guide that is far off: they are judged by total variation and by
    the share of draws that weights leave effective. No weight shows a part of the posterior that the guide never draws:
    annealed draws do, where `check_modes` was called.
    """
    findings, rows, khat = [*still_falling(tree)], dict[str, dict[str, float]](), float("nan")
    broken = [name for name, values in variables.items() if not np.isfinite(values.values).all()]
    if broken:
        findings.append(Finding(True, f"draws of {broken} are not finite", "lower lr or clip the gradient"))
    finite = bool(tree.attrs.get("finite_support", 0))
    by_row = sample_stats.get("log_weight_by_row")
    if RESAMPLED in tree.attrs:
        found, khat = _resampled(tree, finite=finite)
        findings += found
    elif "log_weight" not in sample_stats:
        findings.append(_no_weights(sample_stats))
    else:
        raw = sample_stats["log_weight"].transpose("chain", "draw").values.ravel().astype(np.float64)
        findings += _useless_weights(raw)
        if (raw < np.inf).all() and (raw > -np.inf).any():
            unequal = raw.size > 1 and np.ptp(raw) > EQUAL_WEIGHTS
            if raw.size < _LEAST_WEIGHTS and (unequal or raw.size == 1):
                findings.append(_few_draws(raw.size))
            elif by_row is not None and np.isfinite(by_row.values).all():
                found, khat = _fit_by_row(by_row, finite=finite)
                findings += found
            elif not unequal:
                findings.append(_equal_weights(variables))
            else:
                smoothed, khat = psis(raw)
                rows = dict(
                    _corrected(name, values, smoothed) for name, values in variables.items() if name not in broken
                )
                khat = float("nan") if finite else khat
                findings += _fit_of_guide(Spread.of(raw), khat, rows, finite=finite)
    if "log_weight" in sample_stats or RESAMPLED in tree.attrs:
        findings += _modes(group_of(tree, "modes"), findings)
    table = pd.DataFrame.from_dict(rows, orient="index").drop(columns="off", errors="ignore")
    return Report(tuple(findings), table, khat=khat)


def judge_evidence(tree: xr.DataTree, log_evidence: np.ndarray, rows: np.ndarray | None = None) -> Iterator[Finding]:
    """Findings on a guide of discrete sites whose evidence is known exactly, in place of those by its weights alone.

    With evidence Z and weights w the total variation of guide q and posterior p is E_q[max(0, 1 - w / Z)]: an average
    of numbers between 0 and 1, which, unlike the weights by themselves, sees what the guide never draws.

    Parameters
    ----------
    tree
        Result with weights ``log_weight_by_row``, or ``log_weight`` where all sites are one. Without them, with draws
        that were resampled, or with few draws, nothing is found here.
    log_evidence
        Exact log evidence (row,), or of shape ().
    rows
        Positions of these rows among all; None for all.
    """
    stats = group_of(tree, "sample_stats")
    name = "log_weight_by_row" if "log_weight_by_row" in stats else "log_weight"
    if name not in stats or RESAMPLED in tree.attrs:
        return
    weights = stats[name].transpose("chain", "draw", ...)
    flat = weights.values.astype(np.float64).reshape(weights.sizes["chain"] * weights.sizes["draw"], -1)
    flat = flat if rows is None else flat[:, rows]
    if len(flat) < _LEAST_WEIGHTS or flat.shape[1] != np.size(log_evidence) or np.isnan(flat).any():
        return
    yield from still_falling(tree)
    lost = 1 - np.exp(np.minimum(flat - np.ravel(log_evidence), 0.0))
    distance, error = lost.mean(0), lost.std(0) / math.sqrt(len(flat))
    level = float(np.sort(np.maximum(distance - 2 * error, 0.0))[math.ceil((1 - _BAD_ROWS) * len(distance)) - 1])
    where = "" if len(distance) == 1 else f" in {1 - _BAD_ROWS:.0%} of {len(distance)} rows, each judged by itself"
    verdict = (
        f"by the exact evidence, total variation between guide and posterior is at most {level:.2f}{where} (at most "
    )
    verdict += (
        f"{_MOST_DISTANCE}), {distance.mean():.3f} ± {2 * float(np.hypot.reduce(error)) / len(error):.3f} on average"
    )
    if bad := not level <= _MOST_DISTANCE:
        yield Finding(bad, f"{verdict}: the guide misses part of many posteriors", "take more steps or a richer guide")
    elif level <= _CLOSE_DISTANCE:
        yield Finding(False, f"{verdict}: the guide fits the posterior closely")
    else:
        yield Finding(False, f"{verdict}: the guide is usable, though not close to the posterior")


def _useless_weights(log_weight: np.ndarray) -> Iterator[Finding]:
    """Draws that the model excludes, and weights that are no numbers."""
    if lost := int(np.isneginf(log_weight).sum()):
        share = lost / log_weight.size
        verdict = (
            f"{lost} of {log_weight.size} draws of the guide are impossible under the model ({share:.1%}, at most 1%)"
        )
        yield Finding(share > 0.01, verdict, "give the guide the supports of the model")
    if not (log_weight < np.inf).all():
        verdict = "some importance weights are not numbers or infinite"
        yield Finding(True, verdict, "look for missing values and scales near zero in the model")


def _no_weights(sample_stats: xr.Dataset) -> Finding:
    if "bound" in sample_stats:
        verdict = "the loss is a bound by sampled terms: draws have no importance weights by which to judge the fit"
        return Finding(False, verdict, "compare the bound of data that were held out", judged=False)
    verdict = "the draws have no importance weights, so that nothing shows how well the guide fits"
    return Finding(False, verdict, "check against run_mcmc, or calibrate with sbc", judged=False)


def _few_draws(count: int) -> Finding:
    verdict = f"{count} draw{' is' if count == 1 else 's are'} too few to judge the fit by their importance weights"
    return Finding(False, verdict, f"draw {_LEAST_WEIGHTS} or more, as by num_samples=1000", judged=False)


def _equal_weights(variables: Mapping[str, xr.DataArray]) -> Finding:
    """Equal weights: a point, beside which others may be drawn, or a guide that is exact wherever it draws."""
    fixed = [name for name, values in variables.items() if (values.values == values.values[:1, :1]).all()]
    if fixed:
        shown = f"{', '.join(fixed[:5])}{f' and {len(fixed) - 5} more' * (len(fixed) > 5)}"
        verdict = (
            f"the draws of {shown} are all the same, as of a point estimate: nothing shows the uncertainty around it"
        )
        return Finding(False, verdict, "take a guide that has a spread, or run_mcmc", judged=False)
    verdict = (
        "the importance weights are equal: wherever the guide draws it is exact; what it never draws does not show"
    )
    return Finding(False, verdict)


def _modes(modes: xr.Dataset, findings: Sequence[Finding]) -> Iterator[Finding]:
    """What annealed draws say of the parts of the posterior that a guide never draws."""
    if not modes.data_vars:
        if all(finding.judged and not finding.harmful for finding in findings):
            verdict = (
                "whether the guide lacks a part of the posterior, as a mode that it never draws, was not looked for"
            )
            yield Finding(False, verdict, "call check_modes(problem, result), which keeps what it finds in the result")
        return

    def most(values: xr.DataArray) -> float:
        """What 95 % of the rows do not exceed."""
        found = np.sort(values.values.ravel())
        return float(found[math.ceil((1 - _BAD_ROWS) * found.size) - 1])

    where = "" if modes["ess"].ndim == 0 else f" in {1 - _BAD_ROWS:.0%} of {modes['ess'].size} rows"
    lacks: dict[str, float] = {}  # at least
    may: dict[str, float] = {}  # at most
    if "missed" in modes:
        lacks["missed"] = most(modes["missed"] - 2 * modes["missed_mcse"])
        may["missed"] = most(modes["missed"] + 2 * modes["missed_mcse"])
    if "guide_log_evidence" in modes:
        gap, error = modes["log_evidence"] - modes["guide_log_evidence"], np.hypot(modes["mcse"], modes["guide_mcse"])
        lacks["gap"] = most(1 - np.exp(2 * error - gap))
        may["gap"] = most(1 - np.exp(-2 * error - gap))
    apart = most(modes["distance"] - 2 * modes["distance_mcse"]) if "distance" in modes else 0.0
    if max(lacks.values(), default=0.0) > _MOST_MISSED:
        share = max(lacks.values())
        verdict = f"the guide misses at least {share:.0%} of the mass of the posterior{where} (at most "
        verdict += f"{_MOST_MISSED:.0%}): annealed draws find it where the guide draws (almost) nothing"
        advice = "take more steps, an objective that explores (epsilon, temperature), or check against run_mcmc"
        yield Finding(True, verdict, advice)
    elif apart > _MOST_DISTANCE:
        verdict = f"total variation between guide and posterior on annealed draws is at least {apart:.2f}{where} "
        yield Finding(True, f"{verdict}(at most {_MOST_DISTANCE})", "take more steps or a richer guide")
    elif not may:
        verdict = (
            "annealed draws cannot be compared with this guide, which has neither a density nor weights to compare"
        )
        yield Finding(False, verdict, "check against run_mcmc, or calibrate with sbc")
    elif most(-modes["ess"]) > -_LEAST_ANNEALED or most(modes["khat"]) > KHAT_MAX:
        verdict = f"annealing found too little to say whether the guide lacks a part of the posterior{where}: "
        verdict += f"{-most(-modes['ess']):.0f} effective draws of {_LEAST_ANNEALED} needed, Pareto k-hat "
        verdict += f"{most(modes['khat']):.2f} of at most {KHAT_MAX}"
        yield Finding(False, verdict, "call check_modes with more num_particles, or check against run_mcmc")
    elif not where and "distance" in modes and float(modes["distance"] + 2 * modes["distance_mcse"]) > _MOST_DISTANCE:
        verdict = (
            f"total variation between guide and posterior on annealed draws is about {float(modes['distance']):.2f} "
        )
        verdict += (
            f"(at most {_MOST_DISTANCE}): its Monte Carlo error of {float(modes['distance_mcse']):.3f} leaves open "
        )
        verdict += "whether the guide is close enough"
        advice = "take more steps, or call check_modes with more num_particles"
        yield Finding(False, verdict, advice, judged=False)
    else:
        verdict = (
            f"the guide lacks no more than {max(0.0, may.get('missed', may.get('gap', 0.0))):.1%} of the mass that "
        )
        yield Finding(False, f"{verdict}annealed draws find{where} (at most {_MOST_MISSED:.0%})")


def still_falling(tree: xr.DataTree, by_value: float = _FALLING_BY_VALUE) -> Iterator[Finding]:
    """Whether the last tenth of the steps has a loss surely, and by half a nat, below the tenth before it.

    It is harmful if it falls by more than ``by_value`` nats for each observed value.
    """
    fit = group_of(tree, "fit")
    loss = np.asarray(fit["loss"].values if "loss" in fit else ())
    width = len(loss) // 10
    if len(loss) < _LEAST_STEPS:
        return
    before, after = loss[-2 * width : -width], loss[-width:]
    drop = float(before.mean() - after.mean())
    if drop > max(0.5, 4 * float(np.hypot(before.std(), after.std())) / np.sqrt(width)):
        values = sum(variable.size for variable in group_of(tree, "observed_data").data_vars.values())
        most = max(_FALLING, by_value * values)
        verdict = f"the loss was still falling: by {drop:.3g} over the last {width} steps (at most {most:.3g})"
        yield Finding(drop > most, verdict, "take more steps (num_steps), or a larger lr that decays")


def _resampled(tree: xr.DataTree, *, finite: bool) -> tuple[list[Finding], float]:
    """What is found of draws that were resampled by their weights."""
    about = read_json(tree.attrs, RESAMPLED, {})
    kept = about.get("khat")
    khat = float("nan") if kept is None or finite else float(kept)
    effective, unequal = float(about.get("effective", math.nan)), bool(about.get("unequal", True))
    findings = []
    if khat > KHAT_MAX:
        verdict = f"Pareto k-hat of the guide was {khat:.2f}, above {KHAT_MAX}: it misses part of the posterior, and "
        verdict += "resampling its draws cannot mend that"
        findings.append(Finding(True, verdict, "take more steps or a richer guide, or check against run_mcmc"))
    elif not effective >= _LEAST_RESAMPLED:
        verdict = (
            f"the resampled draws stand on {effective:.0f} effective draws of the guide, of {_LEAST_RESAMPLED} needed"
        )
        findings.append(Finding(True, verdict, "draw more (num_samples), take more steps, or a richer guide"))
    elif math.isnan(khat) and unequal and not finite:
        verdict = "the weights that the draws were resampled by have no tail to judge, though they are unequal"
        findings.append(Finding(True, verdict, "take more steps or a richer guide, or check against run_mcmc"))
    else:
        how = "" if math.isnan(khat) else f" (Pareto k-hat {khat:.2f}, at most {KHAT_MAX})"
        verdict = f"the resampled draws stand for the posterior, on {effective:.0f} effective draws of the guide{how}"
        findings.append(Finding(False, verdict))
    return findings, khat


def _fit_of_guide(
    spread: Spread, khat: float, rows: Mapping[str, Mapping[str, float]], *, finite: bool
) -> Iterator[Finding]:
    """What the importance weights of all sites together say of a guide."""
    richer = "take more steps or a richer guide, or check against run_mcmc"
    effective = f"{spread.share:.0%} of its draws are effective"
    if finite:
        distance = f"total variation between guide and posterior is about {spread.distance:.2f} on what it draws"
        start = f"{distance} (at most {_MOST_DISTANCE}), {effective} (at least {_LEAST_SHARE:.0%}), and log evidence "
        start += f"less ELBO is {spread.gap:.2f}: "
        failed = spread.share < _LEAST_SHARE or spread.distance - 2 * spread.distance_error > _MOST_DISTANCE
        if not failed and spread.distance + 2 * spread.distance_error > _MOST_DISTANCE:
            error = f"{spread.distance_error:.3f}"
            verdict = f"{start}its Monte Carlo error of {error} leaves open whether the guide is close enough"
            yield Finding(False, verdict, "draw more (num_samples), or take more steps", judged=False)
            return
        meaning = "the guide is not the posterior, and what it draws has other probabilities"
        close = spread.share >= _CLOSE_SHARE and spread.distance <= _CLOSE_DISTANCE
    else:
        told = "cannot be computed, since too few weights are not negligible" if math.isnan(khat) else f"is {khat:.2f}"
        start = f"Pareto k-hat of the guide {told} (at most {KHAT_MAX}), {effective}: "
        failed = not khat <= KHAT_MAX
        meaning = "the guide misses part of the posterior; its sds and intervals may be wrong"
        close = khat <= _KHAT_GOOD
    if failed:
        yield Finding(True, start + meaning, richer)
        return
    worst = max(rows, key=lambda name: rows[name]["off"], default=None)
    # Of finitely many values total variation bounds every moment, and a rare value moves the sd of one that is nearly
    # constant by any factor.
    if not finite and worst is not None and rows[worst]["off"] > _CLOSE:
        row = rows[worst]
        yield Finding(False, f"{start}its draws can be corrected by their importance weights")
        verdict = f"of {worst}, the guide has mean {row['guide_mean']:.3g} and sd {row['guide_sd']:.3g}, where the "
        verdict += f"weights give {row['corrected_mean']:.3g} and {row['corrected_sd']:.3g}; harmful from {_SHIFT} sd "
        verdict += f"or a factor of {_RATIO} on"
        advice = "use importance_resample(result) in place of the raw draws, or take more steps or a richer guide"
        yield Finding(row["off"] > 1, verdict, advice)
    elif close:
        yield Finding(False, f"{start}where it draws, the guide fits the posterior closely")
    else:
        advice = "importance_resample(result) brings its draws closer"
        yield Finding(False, f"{start}the guide is usable, though not close to the posterior", advice)


def _fit_by_row(log_weight: xr.DataArray, *, finite: bool) -> tuple[list[Finding], float]:
    """What weights say of a guide whose rows of data are judged each by itself; k-hat that 95 % of them do not exceed.

    The share of draws that weights leave effective, 1 / (1 + chi-square divergence), is judged of all rows; with it
    k-hat of rows of continuous sites, and total variation of rows of finitely many values.
    """
    values = log_weight.transpose("chain", "draw", ...).values.astype(np.float64)
    shape = values.shape[2:]
    judged = np.unique(np.linspace(0, math.prod(shape) - 1, min(math.prod(shape), _MOST_ROWS)).astype(int))
    flat = values.reshape(-1, math.prod(shape))[:, judged]
    spreads = [Spread.of(row) for row in flat.T]
    share = np.array([spread.share for spread in spreads])
    last = math.ceil((1 - _BAD_ROWS) * len(share)) - 1
    least = float(np.sort(share)[::-1][last])
    plates = " and ".join(str(dim) for dim in log_weight.dims[2:])
    worst = label(plates, log_weight, np.unravel_index(int(judged[np.argmin(share)]), shape))
    effective = f"{least:.0%} or more of its draws are effective (at least {_LEAST_SHARE:.0%})"
    if finite:
        level, khat = float(np.sort([x.distance for x in spreads])[last]), math.nan
        sure = float(np.sort([x.distance - 2 * x.distance_error for x in spreads])[last])
        said = f"total variation between guide and posterior is at most {level:.2f} (at most {_MOST_DISTANCE})"
        failed, close = sure > _MOST_DISTANCE, level <= _CLOSE_DISTANCE
        unsure = not failed and level > _MOST_DISTANCE
    else:
        shapes = np.array([psis(row)[1] if np.ptp(row) > EQUAL_WEIGHTS else -1.0 for row in flat.T])
        level = khat = float(np.sort(np.nan_to_num(shapes, nan=np.inf))[last])
        told = "below 0" if level < 0 else f"at most {level:.2f}"
        said = f"Pareto k-hat of the guide is {told} (at most {KHAT_MAX})"
        failed, close, unsure = level > KHAT_MAX, level <= KHAT_MAX, False
    rows = f"{1 - _BAD_ROWS:.0%} of {len(share)} rows of {plates}"
    verdict = f"in {rows}, each judged by itself, {said} and {effective}; fewest {share.min():.0%} in {worst}: "
    if failed or least < _LEAST_SHARE:
        advice = "take more steps or a richer guide, and look at check_weights or check_exact"
        return [Finding(True, f"{verdict}the guide misses part of many posteriors", advice)], khat
    if unsure:
        verdict += "Monte Carlo error leaves open whether the guide is close enough"
        return [Finding(False, verdict, "draw more (num_samples), or take more steps", judged=False)], khat
    how = (
        "fits the posterior closely"
        if close and least >= _CLOSE_SHARE
        else "is usable, though not close to the posterior"
    )
    return [Finding(False, f"{verdict}the guide {how}")], khat


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
    place = np.unravel_index(int(np.argmax(np.where(sd > 0, off, -np.inf))), off.shape)  # of those that vary
    row = {"entries": draws[0].size, "guide_mean": mean[place], "guide_sd": sd[place]}
    row |= {"corrected_mean": found["mean"][place], "corrected_sd": found["sd"][place]}
    row |= {"mcse_mean": found["mcse_mean"][place], "mcse_sd": found["mcse_sd"][place], "off": off[place]}
    return label(name, values, place), row
