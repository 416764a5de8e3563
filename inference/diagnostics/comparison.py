"""Which model predicts best: leave-one-out and K-fold cross-validation, stacking weights.

References
----------
Vehtari, A., Gelman, A. and Gabry, J. (2017). Practical Bayesian model evaluation using leave-one-out cross-validation
and WAIC. Statistics and Computing 27(5). https://arxiv.org/abs/1507.04544
Magnusson, M., Andersen, M. R., Jonasson, J. and Vehtari, A. (2019). Bayesian leave-one-out cross-validation for large
data. ICML. https://arxiv.org/abs/1904.10679
Yao, Y., Vehtari, A., Simpson, D. and Gelman, A. (2018). Using stacking to average Bayesian predictive distributions.
Bayesian Analysis 13(3). https://doi.org/10.1214/17-BA1091
Sivula, T., Magnusson, M., Matamoros, A. A. and Vehtari, A. (2025). Uncertainty in Bayesian leave-one-out
cross-validation based model comparison. Bayesian Analysis. https://arxiv.org/abs/2008.10296
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Annotated, Any

import numpy as np
import pandas as pd
import xarray as xr
from annotated_types import Ge, Interval
from numpy.typing import ArrayLike
from scipy import optimize
from scipy.special import logsumexp

from probmodels.datasets.labelled import arranged
from probmodels.errors import DiagnosticsError, ProblemError
from probmodels.inference.diagnostics import _html
from probmodels.inference.diagnostics.convergence import convergence, psis
from probmodels.inference.diagnostics.findings import Finding, label, spell
from probmodels.inference.diagnostics.guides import KHAT_MAX
from probmodels.inference.labels import group_of
from probmodels.inference.problem import Problem
from probmodels.inference.result import Result
from probmodels.options import Draws, OneOf, Seed, checked

__all__ = ["Comparison", "Elpd", "compare", "kfold", "loo"]

WEIGHTINGS = ("stacking", "pseudo_bma")
_RELATIVE_ENTRIES = 100  # observations from which the correlation of the draws is judged
_ALIKE = 4.0  # differences of elpd below which models predict alike (Sivula et al.)
_FEW = 100  # observations below which standard errors of differences are too small (Sivula et al.)

Split = Callable[[np.ndarray, np.ndarray], tuple[Problem, Problem]]


@dataclass(frozen=True)
class Elpd:
    """Expected log predictive density of new observations, estimated by cross-validation.

    Attributes
    ----------
    kind
        ``"loo"`` or ``"kfold"``.
    pointwise
        Its part from every observation, by observed site; nan where an observation is masked.
    khat
        Pareto k-hat of every observation; None for K-fold.
    khat_max
        Largest k-hat at which the part of an observation can be trusted, given the number of draws.
    num_parameters
        Effective number of parameters; nan for K-fold.
    data_key
        Checksum of the observed data; None where unknown.
    """

    kind: str
    pointwise: xr.Dataset = field(repr=False)
    khat: xr.Dataset | None = field(default=None, repr=False)
    khat_max: float = KHAT_MAX
    num_parameters: float = float("nan")
    data_key: str | None = field(default=None, repr=False)

    @cached_property
    def values(self) -> np.ndarray:
        """The parts of all observations that are not masked, in one array (observation,)."""
        every = np.concatenate([np.ravel(v.values) for v in self.pointwise.data_vars.values()])
        return every[~np.isnan(every)]

    @property
    def elpd(self) -> float:
        """Sum over the observations."""
        return float(self.values.sum())

    @property
    def se(self) -> float:
        """Standard error of the sum."""
        return float(np.sqrt(len(self.values) * self.values.var(ddof=1)))

    @property
    def bad(self) -> list[str]:
        """Labels of the observations whose part cannot be trusted, worst first."""
        found = []
        for name, shapes in (self.khat.data_vars if self.khat is not None else {}).items():
            labelled = shapes.expand_dims(("chain", "draw"))
            for place in map(tuple, np.argwhere(shapes.values > self.khat_max)):
                found.append((-float(shapes.values[place]), label(name, labelled, place)))
        return [text for _, text in sorted(found)]

    @property
    def ok(self) -> bool:
        """Whether every part can be trusted."""
        return not self.bad

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What was found, in plain words."""
        count = len(self.values)
        if self.khat is None:
            return (Finding(False, f"{count} observations predicted by exact refits without them"),)
        if not (bad := self.bad):
            return (Finding(False, f"all {count} observations have Pareto k-hat <= {self.khat_max:.2f}"),)
        shown = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        verdict = f"{len(bad)} of {count} observations have Pareto k-hat above {self.khat_max:.2f} ({shown})"
        advice = "see whether they are errors, or the tails of the model too light; kfold gives a figure to rely on"
        return (Finding(True, f"{verdict}: their part in elpd cannot be trusted", advice),)

    @property
    def _head(self) -> str:
        more = "" if np.isnan(self.num_parameters) else f", {self.num_parameters:.1f} effective parameters"
        return f"elpd by {self.kind} {self.elpd:.1f} (se {self.se:.1f}){more}"

    def __str__(self) -> str:
        return "\n".join([self._head, *spell(self.findings)])

    def _repr_html_(self) -> str:
        return _html.block(self._head, _html.listed(self.findings))


@dataclass(frozen=True)
class Comparison:
    """Models ranked by how well they predict.

    Attributes
    ----------
    table
        One row per model, best first: ``elpd``, ``se``, ``elpd_diff`` to the best and its standard error
        ``diff_se``, ``weight``, ``num_parameters``, and ``bad_k``, the observations whose part cannot be trusted.
    findings
        In plain words.
    method
        How to get the weights.
    """

    table: pd.DataFrame
    findings: tuple[Finding, ...]
    method: str

    @property
    def ok(self) -> bool:
        """Whether no finding is harmful."""
        return not any(finding.harmful for finding in self.findings)

    @property
    def _head(self) -> str:
        best, bad = self.table.index[0], int(self.table["bad_k"].sum())
        if not self.ok:
            doubt = f"the parts of {bad} observations in elpd cannot be trusted" if bad else "see below"
            said = f"It cannot be said which of {len(self.table)} models predicts best: {doubt}"
        elif all(map(_is_worse, *(self.table[key].iloc[1:] for key in ("elpd_diff", "diff_se")))):
            said = f"{best!r} predicts best of {len(self.table)} models"
        else:
            said = f"None of {len(self.table)} models predicts clearly best; {best!r} has the largest elpd"
        return f"{said}; weights by {self.method}."

    def __str__(self) -> str:
        shown = self.table.to_string(float_format=lambda value: f"{value:.2f}", na_rep="-")
        return "\n".join([self._head, *spell(self.findings), "", shown])

    def _repr_html_(self) -> str:
        return _html.block(self._head, _html.listed(self.findings), _html.frame(self.table))


@checked(DiagnosticsError)
def loo(
    result: Result,
    problem: Problem | None = None,
    *,
    unit: str | None = None,
    num_samples: Draws | None = None,
    correct: bool = True,
) -> Elpd:
    """Leave-one-out cross-validation by Pareto-smoothed importance sampling, without refitting.

    Parameters
    ----------
    result
        With a group ``log_likelihood``, or else ``problem`` must be given.
    problem
        The problem that was inferred, to compute the pointwise log likelihood from.
    unit
        Dim whose entries are left out as a whole, such as the time steps of a field: the log likelihood is summed
        over all other dims and sites. None to leave out single observations of every observed site.
    num_samples
        Draws to use, evenly spaced, over all chains; None for all.
    correct
        Whether draws of a guide are corrected by their importance weights (Magnusson et al. 2019). False judges the
        guide's own predictions.

    Returns
    -------
    Elpd
        With k-hat per observation. Entries whose log likelihood is zero at every draw are masked ones, and left out.

    Raises
    ------
    DiagnosticsError
        If there is no log likelihood, it is not finite, it is of one observation only, as of a site whose dims are all
        event dims, the model has none for each observation, or there are fewer than 25 draws.
    ProblemError
        If the model observes nothing, or the posterior does not fit it.
    ResultError
        If the problem is another than the one that was inferred, by its name or its data.
    """
    from probmodels.inference import predictive

    if (terms := result.group("log_likelihood")).data_vars:
        terms = predictive.thin(terms, num_samples)
    elif problem is not None:
        result.check_problem(problem)
        drawn = predictive.thin(result.posterior, num_samples)
        terms = _log_likelihood(result, problem, drawn)
        if terms.sizes["draw"] < drawn.sizes["draw"]:
            raise DiagnosticsError(
                f"{problem.name}: all latent sites are summed over by enumeration, so that the log likelihood does not "
                "differ between draws, and its parameters are points: loo cannot judge it; use kfold"
            )
    else:
        raise DiagnosticsError("the result has no group 'log_likelihood'; give the problem: loo(result, problem)")
    log_weight = None
    if correct and "log_weight" in (stats := result.group("sample_stats")):
        stats = predictive.thin(stats[["log_weight"]], num_samples)
        log_weight = stats["log_weight"].transpose("chain", "draw").values.ravel()
    terms = _per_unit(terms, unit).transpose("chain", "draw", ...)
    if sum(values[0, 0].size for values in terms.data_vars.values()) < 2:
        raise DiagnosticsError(
            f"the model observes {', '.join(map(str, terms.data_vars))} as one whole, whose parts have no likelihood "
            "of their own, so that loo can leave nothing out; use kfold (in Python), or in a model of your own give "
            "the site a plate over its observations"
        )
    parts, shapes, lppd = {}, {}, 0.0
    count = terms.sizes["chain"] * terms.sizes["draw"]
    if count < 25:
        raise DiagnosticsError(f"{count} draws are too few for loo; 25 are the least, and 1000 are better")
    for name, values in terms.data_vars.items():
        flat = values.values.reshape(count, -1)
        part, khat, plain = _leave_out(flat, log_weight, _relative_efficiency(values.values), str(name))
        lppd += plain
        dims = values.dims[2:]
        coords = {dim: values[dim] for dim in dims if dim in values.coords}
        parts[name] = xr.DataArray(part.reshape(values.shape[2:]), coords, dims)
        shapes[name] = xr.DataArray(khat.reshape(values.shape[2:]), coords, dims)
    total = sum(float(part.sum()) for part in parts.values())
    khat_max = min(KHAT_MAX, 1 - 1 / np.log10(count))
    return Elpd("loo", xr.Dataset(parts), xr.Dataset(shapes), khat_max, lppd - total, _data_key(result.tree))


@checked(DiagnosticsError)
def kfold(
    split: Split,
    infer: Callable[[Problem, int], Any],
    num_observations: Annotated[int, Interval(ge=2, le=10**8)],
    *,
    num_folds: Annotated[int, Ge(2)] = 10,
    groups: ArrayLike | None = None,
    unit: str | None = None,
    seed: Seed = 0,
    map: Callable[..., Iterable[Any]] = map,
) -> Elpd:
    """K-fold cross-validation by exact refits.

    Parameters
    ----------
    split
        Makes ``(train, test)``, two problems, from the indices of the observations of each. The latent sites of the
        test problem must be among those of the train problem.
    infer
        Takes a problem and a seed; returns posterior draws as a Dataset (chain, draw, ...) or a Result.
    num_observations
        What the indices count, from 0.
    num_folds
        Number of refits; ``num_observations`` leaves out one at a time.
    groups
        Label of each observation; those of one label stay in one fold, as dependent ones should.
    unit
        Dim of the observed sites that the indices count; the log likelihood is summed over all others. None where
        there is one observed site with one dim.
    seed
        Seed of the folds and of each refit.
    map
        Applies a function to the numbers of the folds; as in `probmodels.inference.diagnostics.calibration.sbc`.

    Returns
    -------
    Elpd
        Observations in the order of their indices.

    Raises
    ------
    DiagnosticsError
        If arguments are out of range, or the log likelihood of a test problem is not one value per index.

    Examples
    --------
    >>> def split(train, test):  # doctest: +SKIP
    ...     return make_problem(data[train]), make_problem(data[test])
    >>> kfold(split, lambda problem, seed: run_mcmc(problem, seed=seed), len(data))  # doctest: +SKIP
    """
    places = np.arange(num_observations)
    labels = (
        places
        if groups is None
        else np.asarray(arranged(groups, "groups", {"observation": places}, error=DiagnosticsError))
    )
    if labels.shape != (num_observations,):
        raise DiagnosticsError(f"groups has shape {labels.shape}; give one label per observation ({num_observations})")
    kinds, member = np.unique(labels, return_inverse=True)
    if num_folds > len(kinds):
        what = "observations" if groups is None else "groups"
        raise DiagnosticsError(f"num_folds={num_folds}; choose at most the {len(kinds)} {what}")
    order = np.random.default_rng(seed).permutation(len(kinds))
    fold_of = np.empty(len(kinds), dtype=int)
    fold_of[order] = np.arange(len(kinds)) % num_folds
    folds = fold_of[member]
    parts = np.full(num_observations, np.nan)
    for fold, values in map(partial(_fold, split, infer, folds, unit, seed), range(num_folds)):
        parts[folds == fold] = values
    dim = unit or "observation"
    return Elpd("kfold", xr.Dataset({"elpd": (dim, parts)}, coords={dim: np.arange(num_observations)}))


@checked(DiagnosticsError)
def compare(
    models: Mapping[str, Result | Elpd], *, method: Annotated[str, OneOf(WEIGHTINGS)] = "stacking"
) -> Comparison:
    """Rank models by expected log predictive density, and weigh them for prediction together.

    Parameters
    ----------
    models
        By name, results with a group ``log_likelihood`` or what `loo` or `kfold` found, of the same observations.
    method
        ``"stacking"``: weights whose mixture of predictive densities predicts best. ``"pseudo_bma"``: weights
        proportional to the exponential of elpd, averaged over a Bayesian bootstrap (pseudo-BMA+).

    Raises
    ------
    DiagnosticsError
        If there are fewer than two models, or they were not judged on the same observations.
    """
    if len(models) < 2:
        raise DiagnosticsError(f"{len(models)} models cannot be compared; give two or more")
    judged = {name: model if isinstance(model, Elpd) else loo(model) for name, model in models.items()}
    _check_same(judged)
    judged = dict(sorted(judged.items(), key=lambda item: -item[1].elpd))
    points = np.stack([found.values for found in judged.values()], axis=1)  # (observation, model)
    weights = _stack(points) if method == "stacking" else _pseudo_bma(points)
    best = points[:, :1]
    table = pd.DataFrame(
        {
            "elpd": [found.elpd for found in judged.values()],
            "se": [found.se for found in judged.values()],
            "elpd_diff": (points - best).sum(0),
            "diff_se": np.sqrt(len(points) * (points - best).var(0, ddof=1)),
            "weight": weights,
            "num_parameters": [found.num_parameters for found in judged.values()],
            "bad_k": [len(found.bad) for found in judged.values()],
        },
        index=list(judged),
    )
    findings = []
    if not any(found.bad for found in judged.values()):  # or differences mean nothing
        findings = [_tell_apart(table.index[0], name, row, len(points)) for name, row in table.iloc[1:].iterrows()]
    for name, found in judged.items():
        findings += [Finding(True, f"{name}: {x.verdict}", x.advice) for x in found.findings if x.harmful]
    if len({found.kind for found in judged.values()}) > 1:
        verdict = "some models were judged by loo and some by kfold, which leaves out more at a time"
        findings.append(Finding(False, verdict, "judge all by the same"))
    return Comparison(table, tuple(findings), method)


def _is_worse(elpd_diff: float, diff_se: float) -> bool:
    """Whether a model predicts worse than the best beyond doubt."""
    return -elpd_diff >= max(_ALIKE, 2 * diff_se)


def _tell_apart(best: Any, name: Any, row: pd.Series, count: int) -> Finding:
    gap, error = -row["elpd_diff"], row["diff_se"]
    spelled = f"elpd lower by {gap:.1f} (se {error:.1f})"
    if gap < _ALIKE:
        return Finding(False, f"{name!r} predicts about as well as {best!r}: {spelled}")
    if gap < 2 * error:
        advice = "keep both and use the weights, or collect more data"
        return Finding(False, f"{name!r} cannot be told from {best!r}: {spelled}", advice)
    caution = f"with {count} observations the se may be half of what it should be" if count < _FEW else ""
    return Finding(False, f"{name!r} predicts worse than {best!r}: {spelled}", caution)


def _log_likelihood(result: Result, problem: Problem, drawn: xr.Dataset) -> xr.Dataset:
    """Log likelihood of the observations at the draws; where discrete sites forbid it, what that means for loo."""
    from probmodels.inference import predictive
    from probmodels.inference.programs.programs import with_parameters

    predictive.check_observed(problem)
    try:
        with with_parameters(problem, result.guide_state) as trained:
            return predictive.log_likelihood(trained, drawn)
    except ProblemError as error:
        if not any(site.discrete for site in problem.sites.values()):
            raise
        raise DiagnosticsError(
            "loo needs the likelihood of each observation by itself, which this model does not give; compare such "
            f"models on held-out data. {error}"
        ) from error


def _per_unit(terms: xr.Dataset, unit: str | None) -> xr.Dataset:
    if unit is None:
        return terms
    lacking = [name for name, values in terms.data_vars.items() if unit not in values.dims]
    if lacking:
        own = {str(dim): None for values in terms.data_vars.values() for dim in values.dims[2:]}
        said = f"its dims are {', '.join(own)}" if own else "it is of the data as one whole"
        raise DiagnosticsError(
            f"unit={unit!r} is no dim of the log likelihood of {', '.join(map(str, lacking))}; {said}"
        )
    keep = {"chain", "draw", unit}
    joint = sum(values.sum([dim for dim in values.dims if dim not in keep]) for values in terms.data_vars.values())
    return xr.Dataset({"+".join(map(str, terms.data_vars)): joint})


def _leave_out(
    terms: np.ndarray, log_weight: np.ndarray | None, r_eff: float, name: str
) -> tuple[np.ndarray, np.ndarray, float]:
    """Parts of elpd and k-hats of every column of ``terms`` (draw, observation), and their plain log density."""
    if log_weight is not None and len(log_weight) != len(terms):
        raise DiagnosticsError(
            f"{len(terms)} draws of the log likelihood of {name} but {len(log_weight)} importance weights; "
            "pass correct=False"
        )
    base = np.zeros(len(terms)) if log_weight is None else log_weight
    plain = psis(base)[0]  # equal weights stay equal
    elpd, khat, lppd = np.full(terms.shape[1], np.nan), np.full(terms.shape[1], np.nan), 0.0
    for i in range(terms.shape[1]):
        term = np.asarray(terms[:, i], dtype=np.float64)
        if not term.any():
            continue
        if not np.isfinite(term).all():
            raise DiagnosticsError(
                f"the log likelihood of observation {i} of {name} is not finite at {(~np.isfinite(term)).sum()} draws; "
                "look for missing values, or values that the model holds to be impossible"
            )
        ratio = base - term
        smoothed, shape = psis(ratio, r_eff=r_eff)
        elpd[i] = logsumexp(smoothed + term)
        khat[i] = np.inf if np.isnan(shape) and np.ptp(ratio) > 1e-8 else shape
        lppd += float(logsumexp(plain + term))
    return elpd, khat, lppd


def _relative_efficiency(terms: np.ndarray) -> float:
    """Effective draws per draw of the likelihoods (chain, draw, ...), from some observations; 1 for one chain."""
    if terms.shape[0] == 1 or terms.shape[1] < 8:
        return 1.0
    flat = terms.reshape(*terms.shape[:2], -1)
    picked = np.linspace(0, flat.shape[2] - 1, min(flat.shape[2], _RELATIVE_ENTRIES)).round().astype(int)
    chosen = flat[..., picked].astype(np.float64)
    chosen = np.exp(chosen - chosen.max((0, 1)))
    chosen = chosen[..., np.ptp(chosen, axis=(0, 1)) > 0]
    ess = np.square(chosen.std((0, 1), ddof=1) / convergence(chosen)["mcse_mean"])
    ess = ess[np.isfinite(ess) & (ess > 0)]
    return float(ess.mean() / (terms.shape[0] * terms.shape[1])) if ess.size else 1.0


def _fold(
    split: Split, infer: Callable[[Problem, int], Any], folds: np.ndarray, unit: str | None, seed: int, fold: int
) -> tuple[int, np.ndarray]:
    """Log predictive densities of the observations of one fold, in their order."""
    from probmodels.inference.predictive import log_likelihood

    test = np.flatnonzero(folds == fold)
    seeds = np.random.SeedSequence(seed, spawn_key=(fold,))
    try:
        train_problem, test_problem = split(np.flatnonzero(folds != fold), test)
        found = infer(train_problem, int(seeds.generate_state(1)[0] >> 1))
        terms = log_likelihood(test_problem, found if isinstance(found, xr.Dataset) else found.posterior)
    except Exception as error:
        error.add_note(f"in fold {fold} of kfold(seed={seed})")
        raise
    if unit is None and (len(terms) != 1 or next(iter(terms.data_vars.values())).ndim != 3):
        dims = {name: values.dims[2:] for name, values in terms.data_vars.items()}
        raise DiagnosticsError(f"the test problem observes {dims}; name the dim that the indices count by unit=")
    values = next(iter(_per_unit(terms, unit).data_vars.values())).transpose("chain", "draw", ...).values
    if values.shape[2] != len(test):
        raise DiagnosticsError(f"fold {fold} holds {len(test)} observations, but its test problem {values.shape[2]}")
    flat = values.reshape(-1, len(test)).astype(np.float64)
    return fold, np.where(flat.any(0), logsumexp(flat, axis=0) - np.log(len(flat)), np.nan)


def _check_same(judged: Mapping[str, Elpd]) -> None:
    """Raise unless all models were judged on the same observations."""
    first, *others = judged
    one = judged[first]
    for name in others:
        other = judged[name]
        if len(one.values) != len(other.values):
            what = f"{len(one.values)} and {len(other.values)} observations"
        elif one.kind == other.kind and not one.pointwise.isnull().equals(other.pointwise.isnull()):
            what = f"sites, dims, labels or gaps that differ: {one.pointwise.sizes}, {other.pointwise.sizes}"
        elif None not in (one.data_key, other.data_key) and one.data_key != other.data_key:
            what = "other observed data"
        else:
            continue
        raise DiagnosticsError(f"{first!r} and {name!r} have {what}; compare models of the same data")


def _data_key(tree: xr.DataTree) -> str | None:
    """Checksum of the observed values, in single precision, so that the precision of a model does not matter."""
    observed = group_of(tree, "observed_data")
    if not observed.data_vars:
        return None
    total = hashlib.sha256()
    for name, values in sorted(observed.data_vars.items(), key=lambda item: str(item[0])):
        total.update(f"{name}{values.dims}{values.shape}".encode())
        total.update(np.ascontiguousarray(values.values, dtype=np.float32).tobytes())
    return total.hexdigest()


def _stack(points: np.ndarray) -> np.ndarray:
    """Weights of the mixture with the largest log predictive density, from log densities (observation, model)."""
    density = np.exp(points - points.max(1, keepdims=True))
    count, num_models = density.shape

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        mixed = density @ weights
        return -float(np.log(mixed).mean()), -(density / mixed[:, None]).sum(0) / count

    found = optimize.minimize(
        loss,
        np.full(num_models, 1 / num_models),
        jac=True,
        method="SLSQP",
        bounds=[(1e-12, 1)] * num_models,
        constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-12, "maxiter": 1000},
    )
    weights = np.where(found.x > 1e-9, found.x, 0)
    return np.asarray(weights / weights.sum())


def _pseudo_bma(points: np.ndarray, num_replicates: int = 1000) -> np.ndarray:
    """Weights proportional to the exponential of elpd, averaged over a Bayesian bootstrap of the observations."""
    share = np.random.default_rng(0).dirichlet(np.ones(len(points)), num_replicates)
    totals = len(points) * share @ points
    weights = np.exp(totals - logsumexp(totals, axis=1, keepdims=True))
    return np.asarray(weights.mean(0))
