"""Whether embeddings match rows that were held out, and what can be said of inferred weights."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from probmodels.datasets.paired.views import kind_of
from probmodels.inference.diagnostics.findings import Finding
from probmodels.inference.diagnostics.guides import still_falling
from probmodels.inference.labels import read_json
from probmodels.inference.metrics.copies import near_copies
from probmodels.inference.result import Result
from probmodels.modality_structure.fused import fused_scores
from probmodels.modality_structure.measures import embed, information_rows, shared_rows
from probmodels.modality_structure.model import make_problem
from probmodels.modality_structure.views import tensors
from probmodels.options import options_of

__all__ = ["check_draws", "check_model"]

_FEWEST = 20  # rows held out that have both modalities
_SURE = 4.0  # standard deviations above chance
_PERMUTATIONS = 400
_FAR = 2.0  # how many times more information of fitted rows than of those held out is worth a word
_ERRORS = 3.0  # standard errors by which a bound is surely above 0
_NATS = 0.1  # of fitted rows above those held out, that are worth a word
_COPY = 1e-4  # largest difference of a number of a copy, in standard deviations
_COPIES = 0.05  # share of the rows held out from which on copies decide what is found
_DIRECTIONS = 16  # on which rows are projected where their distances are compared
_FALLING = 0.1  # nats by matched row
_PRIOR_SDS = 3.0  # of a logarithm, beyond which a weight has left its prior


def check_draws(result: Result) -> Iterator[Finding]:
    """Findings on the fit, in place of those on the weights of the guide: towers are point estimates.

    A weight that was inferred must not have left its prior: towers can meet a structure ever more closely, and its
    precision then grows until only the prior holds it.
    """
    sizes = {str(name): site.size for name, site in result.group("observed_data").items()}
    matched = sum(
        size for name, size in sizes.items() if name.startswith("match_")
    )  # not pairs of rows, which are many
    yield from still_falling(result.tree, _FALLING * matched / max(sum(sizes.values()), 1))
    options = read_json(result.tree.attrs, "options", {})
    follow = "towers and {} follow each other away from the prior: {}"
    for name in options.get("inferred", ()):
        advice = follow.format("weight", "fix this weight instead of inferring it")
        yield _near_prior(result, f"weight_{name}", f"the weight of {name!r}", options[name], advice)
    if options.get("path"):
        start = options.get("path_scale", options_of(make_problem)["path_scale"].default)
        advice = follow.format("path", "give a weight to bridge, which is fixed, in place of path")
        yield _near_prior(result, "path_scale", "the scale of the path", start, advice)
    verdict = "towers are point estimates: draws of temperature and weights hold for these towers, and are not judged"
    yield Finding(False, verdict, "compare other values of seed before trusting small differences")


def check_model(result: Result) -> Iterator[Finding]:
    """Findings on rows that were held out: that they are matched better than by chance, and with honest probabilities.

    They cannot see whether what the modalities share is what the user cares about, nor whether private factors were
    kept; probes on labels say that.
    """
    if read_json(result.tree.attrs, "options", {}).get("fusion"):
        yield from _fused(result)
    data = result.rebuild().data
    assert data is not None
    yield from _copied(data)
    yield from _in_order(data)
    held_out, known = embed(result, "test"), embed(result, "train")
    for a, b in held_out.pairs:
        z, other = shared_rows(held_out, a, b)
        count = len(z)
        if count < _FEWEST:
            verdict = f"{a} and {b}: {count} rows held out have both, too few to judge (at least {_FEWEST})"
            yield Finding(False, verdict, "hold out more rows", judged=False)  # and so nothing passes
            continue
        yield _matched(f"{a} and {b}", z @ other.T)
        gained = information_rows(z @ other.T / held_out.temperature)
        yield _informed(f"{a} and {b}", gained)
        first, second = shared_rows(known, a, b)
        some = np.linspace(0, len(first) - 1, min(count, len(first))).round().astype(int)  # as many candidates
        learned = information_rows(first[some] @ second[some].T / known.temperature)
        yield from _by_heart(f"{a} and {b}", gained, learned)


def _by_heart(what: str, gained: NDArray[np.float64], learned: NDArray[np.float64]) -> Iterator[Finding]:
    """Whether fitted rows hold surely, and far, more information than rows held out that hold some."""
    bound, fitted = float(gained.mean()), float(learned.mean())
    above = max(_NATS, _ERRORS * float(np.hypot(_error(gained), _error(learned))))
    if bound > 0 and fitted > _FAR * bound and fitted - bound > above:
        verdict = f"{what}: {fitted:.2f} nats in {len(learned)} fitted rows, far above those held out"
        advice = "the towers learn rows by heart: more rows, fewer steps, or a smaller hidden"
        yield Finding(False, verdict, advice, part="model")


def _error(values: NDArray[np.float64]) -> float:
    """Standard error of the mean over rows."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _informed(what: str, gained: NDArray[np.float64]) -> Finding:
    """Whether the bound on information, the mean of what rows add to it, is surely above 0."""
    count, bound, error = len(gained), float(gained.mean()), _error(gained)
    verdict = f"{what}: {bound:.2f} nats of information in {count} rows held out (standard error {error:.2g}), a lower "
    verdict += f"bound that cannot exceed log {count} = {np.log(count):.2f} (above 0 by {_ERRORS:g} standard errors)"
    bad = not bound > _ERRORS * error
    if bound > 0:
        advice = "the bound may be above 0 by luck: hold out more rows, or fit more rows or steps"
    else:
        advice = (
            "matching is surer than it is right, worse than guessing: a larger temperature, fewer steps, or more rows"
        )
    return Finding(bad, verdict, advice if bad else "", part="model")


def _copied(data: xr.Dataset) -> Iterator[Finding]:
    """Whether rows that were held out are copies of rows to learn from, in all modalities that they have."""
    (known, others), (present, views) = (tensors(data, split) for split in ("train", "test"))
    copied = np.zeros(len(present), dtype=bool)
    for pattern in torch.unique(present, dim=0):
        if not pattern.any():
            continue
        rows = (present == pattern).all(1)
        candidates = known[:, pattern].all(1)
        # Codes of words are whole numbers, and so equal where they are near.
        first, second = (
            torch.cat([view[some].double().flatten(1) for view, there in zip(part, pattern, strict=True) if there], 1)
            for part, some in ((views, rows), (others, candidates))
        )
        copied[rows.numpy()] = near_copies(first.numpy(), second.numpy(), _COPY)
    if copied.any():
        share = float(copied.mean())
        verdict = f"{int(copied.sum())} of {len(copied)} rows held out ({share:.1%}) are copies of rows to learn from "
        verdict += f"in every modality that they have (below {_COPIES:.0%})"
        advice = "what was learned by heart is taken for what was found: hold out groups of equal rows with split"
        yield Finding(share >= _COPIES, verdict, advice, part="model")


def _in_order(data: xr.Dataset) -> Iterator[Finding]:
    """Whether rows are like the rows next to them in the order given, while rows held out lie between the others."""
    test = data["split"].values == "test"
    at_random = 2 * test.sum() * (~test).sum() / len(test)  # changes of split between rows in a row
    alike = [str(name) for name in data["modality"].values if _like_neighbours(data, str(name))]
    if len(alike) > 1 and (test[1:] != test[:-1]).sum() > at_random / 2:
        verdict = (
            f"rows are more like the next one in the order given than like others, in {', '.join(alike)}, and rows "
        )
        verdict += "held out lie between rows to learn from"
        advice = "rows that follow each other in time are not independent: hold out blocks with split; rows that are "
        advice += "only sorted, as by class, are no matter"
        yield Finding(False, verdict, advice, part="model")


def _like_neighbours(data: xr.Dataset, name: str) -> bool:
    """Whether rows that have a modality are surely closer to the next one of them than in a random order."""
    view, rng = data[name], np.random.default_rng(0)
    rows = view.values[data["present"].sel(modality=name).values.astype(bool)]
    if len(rows) < _FEWEST:
        return False
    if kind_of(view) == "texts":  # sums of random directions of words
        places = rng.normal(size=(data.sizes[f"{name}_word"], _DIRECTIONS))
        places[0] = 0  # no word
        rows = np.stack([places[codes].sum(0) for codes in rows])
    else:
        rows = rows.reshape(len(rows), -1).astype(np.float64)
        rows = rows - rows.mean(0)
        rows /= np.where(rows.std(0) > 0, rows.std(0), 1.0)
        if rows.shape[1] > _DIRECTIONS:
            rows = rows @ rng.normal(size=(rows.shape[1], _DIRECTIONS))

    def step(order: NDArray[np.float64]) -> float:
        return float(np.linalg.norm(np.diff(order, axis=0), axis=1).mean())

    shuffled = np.array([step(rows[rng.permutation(len(rows))]) for _ in range(_PERMUTATIONS // 4)])
    return step(rows) < float(shuffled.mean() - _SURE * shuffled.std())


def _fused(result: Result) -> Iterator[Finding]:
    """Whether a fusion encoder scores partners above other rows that were held out."""
    for row in fused_scores(result).to_dict("records"):
        if "partner" not in row or row["N"] < _FEWEST:
            continue
        needed = 0.5 + _SURE * 0.5 / np.sqrt(row["N"])
        verdict = f"{row['first']} and {row['second']}: the fusion encoder scores {row['partner']:.1%} of {row['N']} "
        verdict += f"partners held out above another row (chance 50 %, surely above it from {needed:.1%} on)"
        bad = row["partner"] <= needed
        advice = "the fusion encoder tells partners no better than by chance: more steps or rows, or leave it out"
        yield Finding(bad, verdict, advice if bad else "", part="model")


def _near_prior(result: Result, site: str, what: str, start: float, advice: str) -> Finding:
    """Whether a positive site with a log-normal prior of unit sd about ``start`` is where its prior allows."""
    shift = float(np.log(result.posterior[site]).mean()) - float(np.log(start))
    verdict = f"{what} is {np.exp(shift):.3g} times the median of its prior "
    verdict += f"({abs(shift):.1f} sds of its logarithm, at most {_PRIOR_SDS:g})"
    bad = abs(shift) > _PRIOR_SDS
    return Finding(bad, verdict, advice if bad else "")


def _matched(what: str, similarity: NDArray[np.float64]) -> Finding:
    """Whether rows find their partners among the nearest tenth surely more often than shuffled partners are found."""
    count = len(similarity)
    k = max(count // 10, 1)
    # Whether a candidate is among the k nearest of a row, in each direction.
    near = similarity >= np.sort(similarity, 1)[:, -k, None]
    others = similarity.T
    near_other = others >= np.sort(others, 1)[:, -k, None]
    hits = near.astype(float) + near_other.T
    rng = np.random.default_rng(0)
    rows = np.arange(count)
    shuffled = np.array([hits[rows, rng.permutation(count)].mean() for _ in range(_PERMUTATIONS)]) / 2
    found = float(np.diag(hits).mean()) / 2
    needed = float(shuffled.mean() + _SURE * shuffled.std())
    verdict = f"{what}: {found:.1%} of {count} rows held out find their partner among the nearest {k} "
    verdict += f"(chance {shuffled.mean():.1%}, surely above it from {needed:.1%} on)"
    bad = found <= needed
    advice = "rows are matched no better than by chance: do the rows belong together? then more rows or steps"
    return Finding(bad, verdict, advice if bad else "", part="model")
