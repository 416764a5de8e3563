"""Verdicts on draws and on the model that they are of; what to do where they fail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import pandas as pd
import xarray as xr
from annotated_types import Ge

from probmodels.errors import DiagnosticsError, ResultError, SpecError
from probmodels.inference.diagnostics.chains import Limits, judge_chains
from probmodels.inference.diagnostics.convergence import convergence, hdi
from probmodels.inference.diagnostics.findings import Finding, Part, Report, label
from probmodels.inference.diagnostics.guides import judge_guide
from probmodels.inference.diagnostics.predictive_checks import predictive_findings
from probmodels.inference.labels import ResultLike, group_of, read_json
from probmodels.methods import get_method, refuse_code
from probmodels.options import Fraction, NonNegative, Probability, checked

__all__ = ["diagnose", "judge_draws", "summarize"]

_GUIDED = ("svi", "em", "bilevel")  # engines whose draws come from a guide
_LIMITS = Limits(rhat_max=1.01, ess_min=400, entry_share=0.99, divergence_share=0.001)


@checked(DiagnosticsError)
def diagnose(
    result: ResultLike,
    *,
    rhat_max: Annotated[float, Ge(1)] = _LIMITS.rhat_max,
    ess_min: NonNegative = _LIMITS.ess_min,
    entry_share: Probability = _LIMITS.entry_share,
    divergence_share: Probability = _LIMITS.divergence_share,
) -> Report:
    """Say in plain words whether draws and model can be trusted, and what to do where not.

    Parameters
    ----------
    result
        Result of an engine. Judged are the posterior variables that the problem names in ``diagnosed`` (all by
        default) and its invariants; and the fit of the model, where its method checks it or the result has the group
        ``posterior_predictive``.
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

    Notes
    -----
    A method may define two functions of a result that yield `Finding` objects: ``check_model``, on how its model fits
    the data; and ``check_draws``, on its draws, in place of those made here, where these mean nothing for them.
    """
    tree = result.tree
    sample_stats = group_of(tree, "sample_stats")
    variables = dict(_judged(tree))
    if tree.attrs.get("engine") in _GUIDED:
        report = judge_guide(tree, sample_stats, variables)
    else:
        limits = Limits(rhat_max, ess_min, entry_share, divergence_share)
        report = judge_chains(tree.attrs, sample_stats, variables, limits)
    draws, model = (_found_by_method(result, name) for name in ("check_draws", "check_model"))
    broken = [name for name, values in variables.items() if not np.isfinite(values.values).all()]
    if draws and broken:  # which no method has to look for
        draws = [Finding(True, f"draws of {broken} are not finite", "check the model"), *draws]
    return replace(report, findings=(*(draws or report.findings), *model, *predictive_findings(tree)))


def judge_draws(tree: xr.DataTree, *, ess_min: float) -> Report:
    """The part of `diagnose` that is of the draws of chains, with its default limits but for ``ess_min``."""
    return judge_chains(
        tree.attrs, group_of(tree, "sample_stats"), dict(_judged(tree)), replace(_LIMITS, ess_min=ess_min)
    )


def _found_by_method(result: ResultLike, function: str) -> list[Finding]:
    """What the method of a result finds by a function of its own; nothing where it has none."""
    attrs = result.tree.attrs
    try:
        written = read_json(attrs, "spec", {}).get("method")
        name = written if isinstance(written, str) and "." in written else str(attrs.get("method"))  # a dotted path
        refuse_code(name)
        check: Any = getattr(get_method(name), function, None)
    except (ResultError, SpecError):  # a model of the user's own
        return []
    if check is None:
        return []
    try:
        return list(check(result))
    except ResultError as error:  # its problem cannot be made again, which the check needs
        if function == "check_draws":
            return []
        return [Finding(False, f"{function} of {name} could not be run: {error}", part="model", judged=False)]
    except (KeyError, ValueError, AttributeError, TypeError, IndexError) as error:  # of a result that it did not make
        part: Part = "model" if function == "check_model" else "inference"
        verdict = f"{function} of {name} could not be run: {type(error).__name__}: {error}"
        return [Finding(False, verdict, "was the result made by this method?", part, judged=False)]


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
