"""What is found of the draws of chains: convergence, health of trajectories, chains that stand still."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from probmodels.errors import DiagnosticsError
from probmodels.inference.diagnostics.convergence import bfmi, convergence
from probmodels.inference.diagnostics.findings import Finding, Report, label

__all__ = ["Limits", "judge_chains"]

_BFMI_MIN = 0.3
_LEAST_DRAWS = 4  # of each chain, below which no statistic is computed
_SATURATED = 0.01  # share of trajectories at their limit that is worth a word
_OFF_TARGET = 0.2  # distance of the mean acceptance of a chain from its target that is worth a word
_LIMITS = (("tree_depth", "max_tree_depth"), ("n_steps", "max_leapfrog"))


@dataclass(frozen=True)
class Limits:
    """What `diagnose` asks of chains."""

    rhat_max: float
    ess_min: float
    entry_share: float
    divergence_share: float


def judge_chains(
    attrs: Mapping[Any, Any], sample_stats: xr.Dataset, variables: Mapping[str, xr.DataArray], limits: Limits
) -> Report:
    """The verdict on draws of a sampler, of dims (chain, draw, ...)."""
    if not variables:
        raise DiagnosticsError("the posterior holds no variable to judge; check the problem's 'diagnosed'")
    rows, judged = {}, {}
    for name, values in variables.items():
        rows[name], judged[name] = _judge(name, values, limits)
    worst = sorted(judged, key=lambda name: -_distance(rows[name], limits))
    findings = [finding for name in worst for finding in judged[name].broken]
    findings += [*_disagreeing([judged[name] for name in worst]), *_short([judged[name] for name in worst])]
    table = pd.DataFrame.from_dict(rows, orient="index")
    sizes = next(iter(variables.values())).sizes
    if sizes["chain"] < 2:
        findings.append(
            Finding(True, "there is one chain, so that nothing shows whether chains agree", "run at least four chains")
        )
    if sizes["draw"] < _LEAST_DRAWS:
        short = f"chains of length {sizes['draw']} are too short to tell whether they have converged"
        findings.append(Finding(True, short, f"keep at least {_LEAST_DRAWS} draws of each chain"))
    frozen = _frozen(variables) if sizes["draw"] >= _LEAST_DRAWS else []
    if not findings and not frozen:
        findings += _converged(table, limits)
    findings += frozen
    divergences = int(sample_stats["diverging"].sum()) if "diverging" in sample_stats else None
    if divergences is not None:
        findings.append(_divergent(divergences, sample_stats["diverging"].size, limits.divergence_share))
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
    findings += [*_saturated(sample_stats, attrs), *_off_target(sample_stats, attrs)]
    if moved := int(sample_stats.attrs.get("moved_chains", 0)):
        verdict = f"{moved} chains got stuck in warm-up and were moved to where others were"
        findings.append(Finding(False, verdict, "a mode that only they had found would be missing: try another seed"))
    return Report(tuple(findings), table, divergences, fractions)


def _distance(row: Mapping[str, float], limits: Limits) -> float:
    """How far a variable is from its limits: infinite where it has no statistics."""
    least = min(row["ess_bulk_min"], row["ess_tail_min"])
    if not (np.isfinite(row["r_hat_max"]) and np.isfinite(least)):
        return math.inf
    return float(max(row["r_hat_max"] - limits.rhat_max, 0.0) + 0.01 * limits.ess_min / max(least, 1.0))


def _converged(table: pd.DataFrame, limits: Limits) -> Iterator[Finding]:
    """What held of the variables that vary, in the words of the criterion that it met; then those that do not vary."""
    fixed = [str(name) for name in table.index[table["r_hat_share"].isna()]]
    moving = table[table["r_hat_share"].notna()]
    if len(moving):
        share, worst = float(moving["r_hat_share"].min()), float(moving["r_hat_max"].max())
        least = float(moving[["ess_bulk_min", "ess_tail_min"]].min().min())
        nested = "nested_r_hat_max" in moving and worst > limits.rhat_max
        r_hat, ess = f"r_hat at most {worst:.3f} (limit {limits.rhat_max:g})", f"ess at least {least:.0f}"
        if worst > limits.rhat_max:
            where = (
                "at every entry" if share == 1 else f"at {share:.1%} of the entries (needed {limits.entry_share:.0%})"
            )
            r_hat = f"r_hat{' or nested r_hat' * nested} <= {limits.rhat_max:g} {where}, largest r_hat {worst:.4f}"
        if least < limits.ess_min:
            ess = f"ess >= {limits.ess_min:g} at {limits.entry_share:.0%} of the entries, least {least:.0f}"
        else:
            ess += f" (limit {limits.ess_min:g})"
        yield Finding(False, f"{f'{len(moving)} variables' if len(moving) > 1 else moving.index[0]}: {r_hat}, {ess}")
    if fixed and len(moving):
        shown = f"{', '.join(fixed[:5])}{f' and {len(fixed) - 5} more' * (len(fixed) > 5)}"
        yield Finding(False, f"{shown}: the same at all draws, so that there was nothing to judge")
    elif fixed:
        verdict = "every variable is the same at all draws, so that nothing can be judged"
        advice = "name variables that vary in the problem's 'diagnosed'; if none should be fixed, the sampler is stuck"
        yield Finding(False, verdict, advice, judged=False)


class _Missed(NamedTuple):
    """A limit that a variable misses: by how much, and in words."""

    by: float
    verdict: str


@dataclass
class _Judged:
    """What is found of one variable: draws that cannot be judged, and the limits that it misses."""

    broken: list[Finding] = field(default_factory=list)
    r_hat: _Missed | None = None
    ess: _Missed | None = None


def _worst_of(missed: list[_Missed]) -> str:
    """The variable that misses a limit by most, and how many others do."""
    found = max(missed, key=lambda x: x.by).verdict
    others = len(missed) - 1
    return f"{found}; {others} other variable{'s miss it' if others > 1 else ' misses it'} too" if others else found


def _disagreeing(judged: list[_Judged]) -> Iterator[Finding]:
    """Variables on which chains do not agree, in one sentence: the worst, and how many more."""
    if missed := [x.r_hat for x in judged if x.r_hat is not None]:
        advice = "run longer (warmup_steps, num_samples); if it stays, look at the traces for several modes, label "
        advice += "switching or a direction that the data leave open"
        yield Finding(True, f"{_worst_of(missed)}: the chains have not come to agree", advice)


def _short(judged: list[_Judged]) -> Iterator[Finding]:
    """Variables whose draws tell too little, in one sentence: the worst, how many more, and what suffices for all."""
    if missed := [x.ess for x in judged if x.ess is not None]:
        factor = max(x.by for x in missed)
        advice = f"draw about {np.ceil(factor * 10) / 10:g} times as many samples"
        yield Finding(True, _worst_of(missed), f"{advice}{', which suffices for all' * (len(missed) > 1)}")


def _judge(name: str, values: xr.DataArray, limits: Limits) -> tuple[dict[str, float], _Judged]:
    rhat_max, ess_min, entry_share = limits.rhat_max, limits.ess_min, limits.entry_share
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
    out = _Judged()
    if broken.any():
        out.broken.append(
            Finding(
                True,
                f"{name}: {broken.sum()} of {broken.size} entries have draws that are not finite",
                "check the model",
            )
        )
    if not moving.any():
        return row, out  # constant, as entries fixed by an identification are
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
        verdict = (
            f"{name}: {row['r_hat_share']:.1%} of the entries have {kind} <= {rhat_max} (needed {entry_share:.0%})"
        )
        out.r_hat = _Missed(float(judged.max()), f"{verdict}, worst {judged.max():.4f} at {worst}")
    size = np.minimum(bulk, tail)
    share = float((size >= ess_min).mean())
    if np.isnan(size).any():
        verdict = f"{name}: {draws.shape[1]} draws per chain are too few to tell the effective sample size"
        out.broken.append(Finding(True, verdict, "draw at least 8 per chain (num_samples)"))
    elif share < entry_share:
        factor = max(ess_min / max(float(np.quantile(size, 1 - entry_share)), 1.0), 1.1)
        verdict = (
            f"{name}: {share:.1%} of the entries have bulk and tail ess of {ess_min:g} or more (needed "
            f"{entry_share:.0%}), least {size.min():.0f}"
        )
        out.ess = _Missed(factor, verdict)
    return row, out


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
