"""How good the synthetic samples of a generator are, held against its training samples and samples held out from it.

Four questions, each with an interval, for all samples and by class:

- **Are samples copies?** The nearest neighbour of a synthetic sample, among training and held-out samples together, is
  a training sample as often as there are training samples, if the generator knows the distribution and not the
  samples. ``memorised`` is the share of copies that explains what is beyond that: 0 for fresh samples, 1 for copies of
  training samples only. Its p-value is that of a permutation of training and held-out samples, which is exact.
- **Are they nearer to training samples than held-out ones are?** ``closer`` is the probability that the distance of a
  synthetic sample to its nearest training sample is smaller than that of a held-out sample (Meehan et al. 2020): 1/2
  for fresh samples. It is large for copies, and also for averages of samples, such as blurred images.
- **Is anything missing?** ``coverage`` is the share of held-out samples that have a synthetic sample among their k
  nearest neighbours of training and synthetic samples together, beside what fresh samples reach on average
  (``coverage_expected``; compare Naeem et al. 2020). The p-value, of a coverage that small, permutes the two sets.
- **Can they be told apart?** ``accuracy`` of a classifier of synthetic and held-out samples, on samples that it was not
  trained on (`classifier_two_sample`): 1/2 if not.

References
----------
Meehan, C., Chaudhuri, K. and Dasgupta, S. (2020). A non-parametric test to detect data-copying in generative models.
AISTATS. https://arxiv.org/abs/2004.05675
Naeem, M. F., Oh, S. J., Uh, Y., Choi, Y. and Yoo, J. (2020). Reliable fidelity and diversity metrics for generative
models. ICML. https://arxiv.org/abs/2002.09797
Lopez-Paz, D. and Oquab, M. (2017). Revisiting classifier two-sample tests. ICLR. https://arxiv.org/abs/1610.06545
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import xarray as xr
from annotated_types import Interval
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm
from torch import Tensor

from probmodels.datasets.checks import as_array
from probmodels.errors import DiagnosticsError
from probmodels.inference.metrics.samples import (
    LEAST_CLASSIFIED,
    Classifier,
    Samples,
    classifier_two_sample,
    paired,
)
from probmodels.options import Fraction, Seed, checked

__all__ = ["fidelity", "fidelity_table"]

_BLOCK = 2_000_000  # entries of a block of the matrix of distances
_COVERED = 0.95  # share that fresh samples cover by the default number of neighbours
_MOST_NEIGHBOURS = 50
_ALL = "all"  # the row of all samples
_MEANINGS = {
    "memorised": "share of copies of training samples: 0 for fresh samples",
    "closer": "chance of being closer to a training sample than a held-out sample is: 0.5 for fresh samples",
    "coverage": "share of held-out samples with a synthetic sample among their nearest neighbours",
    "accuracy": "held-out accuracy of a classifier of synthetic and held-out samples: 0.5 for fresh samples",
    "coverage_expected": "coverage of fresh samples, on average",
    "neighbours": "nearest neighbours among which coverage looks for a synthetic sample",
    "num_synthetic": "synthetic samples",
    "num_train": "training samples",
    "num_held_out": "held-out samples",
}
_ENDS = {"low": "lower end of the interval", "high": "upper end of the interval", "pvalue": "p-value"}

Neighbours = Annotated[int, Interval(ge=1, le=1000)]
Permutations = Annotated[int, Interval(ge=19, le=100_000)]


@checked(DiagnosticsError)
def fidelity(
    synthetic: Samples,
    train: Samples,
    held_out: Samples,
    *,
    synthetic_label: ArrayLike | None = None,
    train_label: ArrayLike | None = None,
    held_out_label: ArrayLike | None = None,
    neighbours: Neighbours | None = None,
    classifier: Classifier | None = None,
    num_permutations: Permutations = 999,
    level: Fraction = 0.95,
    seed: Seed = 0,
) -> xr.Dataset:
    r"""Memorisation, coverage and distinguishability of synthetic samples, for all of them and by class.

    Parameters
    ----------
    synthetic
        Samples (sample, \*event) of a generator. Give features in place of raw values, here and below, where Euclidean
        distances between raw values mean little.
    train
        Samples that it was fitted to.
    held_out
        Samples of the same origin that it was not fitted to.
    synthetic_label, train_label, held_out_label
        Classes (sample,) of each set; all three or none. With these, the classifier of all samples is shown the class,
        and takes as many samples of a class from either set: how often classes occur is not judged.
    neighbours
        Neighbours k of coverage. None for the fewest with which fresh samples cover 95 % on average, at most 50.
    classifier
        As of `classifier_two_sample`.
    num_permutations
        Permutations of each p-value.
    level
        Probability of the intervals. Those of ``memorised`` and ``coverage`` are Wilson's; the former counts samples
        with the same nearest neighbour as one in part, by Kish's effective number. That of ``coverage`` takes training
        and synthetic samples as given.
    seed
        Seed of permutations, classifiers and the order of equal distances.

    Returns
    -------
    xarray.Dataset
        By ``class``, the first of which is ``"all"``: ``memorised``, ``closer``, ``coverage`` and ``accuracy``, each
        with ``_low`` and ``_high`` appended for its interval and all but ``closer`` with ``_pvalue``;
        ``coverage_expected``, ``neighbours``, and the numbers of samples. What cannot be computed is nan: everything
        of classes with fewer than 2 samples of a set, but for the coverage 0 of one that has no synthetic samples; and
        the accuracy where a set has fewer than 20.

    Raises
    ------
    DiagnosticsError
        If sets have fewer than 2 samples, values that are not finite or events of different sizes; if labels are given
        for some sets only, or their number differs from that of the samples; if a synthetic sample has a class of which
        no other sample is.
    """
    s, t = paired(synthetic, train, ("synthetic", "train"))
    h, _ = paired(held_out, train, ("held_out", "train"))
    events = {"synthetic": s, "train": t, "held_out": h}
    given = {"synthetic": synthetic_label, "train": train_label, "held_out": held_out_label}
    labels = _labels(given, {name: len(values) for name, values in events.items()})
    classes = [] if labels is None else sorted(set(labels["train"]) | set(labels["held_out"]))
    settings = (neighbours, num_permutations, level)
    rows = [_neighbours(events, *settings, np.random.default_rng(seed))]
    rows[0] |= _told_apart(*_shown(s, h, labels, classes, seed), classifier, level, seed)
    for number, name in enumerate(classes, 1):
        assert labels is not None
        own = {key: values[torch.from_numpy(labels[key] == name)] for key, values in events.items()}
        row = _neighbours(own, *settings, np.random.default_rng([seed, number]))
        rows.append(row | _told_apart(own["synthetic"], own["held_out"], classifier, level, seed))
    found = xr.Dataset(
        {name: ("class", [row.get(name, math.nan) for row in rows]) for name in rows[0]},
        {"class": [_ALL, *map(str, classes)]},
        {"level": level, "num_permutations": num_permutations, "event_size": s.shape[1], "seed": seed},
    )
    for name in found.data_vars:
        of, _, end = str(name).rpartition("_")
        meaning = _MEANINGS.get(str(name)) or f"{_ENDS[end]} of {of}"
        found[name].attrs["long_name"] = meaning
    return found


@checked(DiagnosticsError)
def fidelity_table(report: xr.Dataset) -> pd.DataFrame:
    """A row of text for each class: the four measures with their intervals.

    Parameters
    ----------
    report
        What `fidelity` returned.

    Raises
    ------
    DiagnosticsError
        If it is another data set.
    """
    if not {"class", "memorised", "closer", "coverage", "accuracy"} <= set(report.variables):
        raise DiagnosticsError("report is no report of fidelity; give what the function fidelity returned")

    def told(name: str, place: int) -> str:
        value, low, high = (float(report[name + end][place]) for end in ("", "_low", "_high"))
        return "-" if math.isnan(value) else f"{value:.2f} ({low:.2f} to {high:.2f})"

    rows = [
        {
            "samples": int(report["num_synthetic"][place]),
            "memorised": told("memorised", place),
            "closer to training": told("closer", place),
            "coverage": told("coverage", place),
            "of fresh": f"{float(report['coverage_expected'][place]):.2f}",
            "told apart": told("accuracy", place),
        }
        for place in range(report.sizes["class"])
    ]
    return pd.DataFrame(rows, pd.Index(report["class"].values, name="class"))


def _labels(given: Mapping[str, ArrayLike | None], sizes: Mapping[str, int]) -> dict[str, NDArray[np.str_]] | None:
    """Classes of every set as text; None without classes."""
    known = {name: value for name, value in given.items() if value is not None}
    if not known:
        return None
    if len(known) < len(given):
        absent = ", ".join(f"{name}_label" for name in given if name not in known)
        raise DiagnosticsError(f"labels of some sets and not of all: {absent} is not given")
    labels = {}
    for name, value in known.items():
        array = as_array(value, f"{name}_label", error=DiagnosticsError)
        if array.shape != (sizes[name],):
            raise DiagnosticsError(f"{name}_label of shape {array.shape} for {sizes[name]} samples; give one for each")
        labels[name] = array.astype(np.str_)
        if _ALL in labels[name]:
            raise DiagnosticsError(f"{name}_label names a class {_ALL!r}, as all samples are called; rename it")
    strange = np.setdiff1d(labels["synthetic"], np.union1d(labels["train"], labels["held_out"]))
    if len(strange):
        raise DiagnosticsError(f"synthetic samples of class {str(strange[0])!r}, of which no other sample is")
    return labels


def _neighbours(
    events: Mapping[str, Tensor],
    neighbours: int | None,
    num_permutations: int,
    level: float,
    rng: np.random.Generator,
) -> dict[str, float]:
    """What nearest neighbours say of the samples of a class, or of all."""
    s, t, h = events["synthetic"], events["train"], events["held_out"]
    found: dict[str, float] = {f"num_{name}": len(values) for name, values in events.items()}
    for name in ("memorised", "closer", "coverage"):
        found |= dict.fromkeys([name, f"{name}_low", f"{name}_high", f"{name}_pvalue"], math.nan)
    found |= {"coverage_expected": math.nan, "neighbours": math.nan}
    del found["closer_pvalue"]
    if not len(s) and len(h):
        low, high = _wilson(0.0, len(h), level)
        return found | {"coverage": 0.0, "coverage_low": low, "coverage_high": high}
    if min(len(s), len(t), len(h)) < 2:
        return found
    found |= _memorised(s, t, h, num_permutations, level, rng)
    found |= _closer(_nearest(s, t, 1)[0][:, 0], _nearest(h, t, 1)[0][:, 0], level)
    return found | _coverage(s, t, h, neighbours, num_permutations, level, rng)


def _memorised(
    s: Tensor, t: Tensor, h: Tensor, num_permutations: int, level: float, rng: np.random.Generator
) -> dict[str, float]:
    pool, trained = _shuffled(t, h, rng)
    nearest = _nearest(s, pool, 1)[1][:, 0]
    count = np.bincount(nearest, minlength=len(pool)).astype(float)
    share = float(count @ trained) / len(s)
    base = len(t) / len(pool)  # of training samples, and so the share on average
    effective = len(s) ** 2 / float(count @ count)
    low, high = ((end - base) / (1 - base) for end in _wilson(share, effective, level))
    moved = np.array([count @ rng.permutation(trained) for _ in range(num_permutations)]) / len(s)
    pvalue = (1 + (moved >= share - 1e-12).sum()) / (1 + num_permutations)
    value = (share - base) / (1 - base)
    return {"memorised": value, "memorised_low": low, "memorised_high": high, "memorised_pvalue": float(pvalue)}


def _closer(synthetic: NDArray[np.float64], held_out: NDArray[np.float64], level: float) -> dict[str, float]:
    """Chance that a distance of one set is below one of the other, equal ones by half, with DeLong's error."""

    def above(values: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
        ordered = np.sort(others)
        sides = ordered.searchsorted(values, "left") + ordered.searchsorted(values, "right")
        return 1 - sides / (2 * len(others))

    of_synthetic, of_held_out = above(synthetic, held_out), 1 - above(held_out, synthetic)
    value = float(of_synthetic.mean())
    error = math.sqrt(sum(x.var(ddof=1) / len(x) for x in (of_synthetic, of_held_out)))
    width = float(norm.isf((1 - level) / 2)) * error
    return {"closer": value, "closer_low": max(value - width, 0.0), "closer_high": min(value + width, 1.0)}


def _coverage(
    s: Tensor,
    t: Tensor,
    h: Tensor,
    neighbours: int | None,
    num_permutations: int,
    level: float,
    rng: np.random.Generator,
) -> dict[str, float]:
    pool, made = _shuffled(s, t, rng)
    if neighbours is None:
        wanted = math.ceil(math.log(1 - _COVERED) / math.log(len(t) / len(pool)))
        neighbours = min(wanted, _MOST_NEIGHBOURS)
    k = min(neighbours, len(t))
    # All k neighbours of a held-out sample are training samples with this chance, if the two sets are alike.
    missed = float(np.prod([(len(t) - i) / (len(pool) - i) for i in range(k)]))
    nearest = _nearest(h, pool, k)[1]
    share = float(made[nearest].any(1).mean())
    moved = np.array([rng.permutation(made)[nearest].any(1).mean() for _ in range(num_permutations)])
    pvalue = (1 + (moved <= share + 1e-12).sum()) / (1 + num_permutations)
    low, high = _wilson(share, len(h), level)
    found = {"coverage": share, "coverage_low": low, "coverage_high": high, "coverage_pvalue": float(pvalue)}
    return found | {"coverage_expected": 1 - missed, "neighbours": k}


def _shown(
    s: Tensor, h: Tensor, labels: Mapping[str, NDArray[np.str_]] | None, classes: list[str], seed: int
) -> tuple[Tensor, Tensor]:
    """Both sets as a classifier sees them: with indicators of classes, as many samples of a class from either set."""
    if labels is None:
        return s, h
    rng = np.random.default_rng(seed)
    parts: list[list[Tensor]] = [[], []]
    for place, name in enumerate(classes):
        rows = [np.flatnonzero(labels[key] == name) for key in ("synthetic", "held_out")]
        count = min(map(len, rows))
        for part, values, of in zip(parts, (s, h), rows, strict=True):
            mark = torch.zeros(count, len(classes), dtype=s.dtype)
            mark[:, place] = 1.0
            part.append(torch.cat([values[torch.from_numpy(rng.permutation(of)[:count])], mark], 1))
    return torch.cat(parts[0]), torch.cat(parts[1])


def _told_apart(s: Tensor, h: Tensor, classifier: Classifier | None, level: float, seed: int) -> dict[str, float]:
    names = ("accuracy", "accuracy_low", "accuracy_high", "accuracy_pvalue")
    count = min(len(s), len(h))
    if count < LEAST_CLASSIFIED:
        return dict.fromkeys(names, math.nan)
    test = classifier_two_sample(s, h, seed, classifier=classifier)
    return dict(zip(names, (test.accuracy, *_wilson(test.accuracy, count, level), test.pvalue), strict=True))


def _nearest(values: Tensor, pool: Tensor, k: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Distances to the k nearest of a pool, and their places (row, k)."""
    rows = max(1, _BLOCK // len(pool))
    blocks = [torch.cdist(block, pool).topk(k, largest=False) for block in values.split(rows)]
    return torch.cat([b.values for b in blocks]).numpy(), torch.cat([b.indices for b in blocks]).numpy()


def _shuffled(one: Tensor, other: Tensor, rng: np.random.Generator) -> tuple[Tensor, NDArray[np.bool_]]:
    """Two sets in one random order, so that equal distances favour neither, and which are of the first."""
    order = rng.permutation(len(one) + len(other))
    return torch.cat([one, other])[torch.from_numpy(order)], order < len(one)


def _wilson(share: float, count: float, level: float) -> tuple[float, float]:
    """Wilson's interval of a share of a number of samples."""
    z = float(norm.isf((1 - level) / 2))
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    width = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return min(max(middle - width, 0.0), share), max(min(middle + width, 1.0), share)
