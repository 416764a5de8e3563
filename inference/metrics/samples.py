"""How well a set of samples agrees with a reference set: distances between the two, and tests of their equality.

All functions take two sets, arrays or tensors (sample, *event), whose events are flattened, and compute in float64.
Sums over pairs are taken in blocks of bounded memory; what needs the whole matrix of distances has a limit.

References
----------
Székely, G. J. and Rizzo, M. L. (2013). Energy statistics: a class of statistics based on distances. Journal of
Statistical Planning and Inference 143(8).
Gretton, A., Borgwardt, K. M., Rasch, M. J., Schölkopf, B. and Smola, A. (2012). A kernel two-sample test. JMLR 13.
Bonneel, N., Rabin, J., Peyré, G. and Pfister, H. (2015). Sliced and Radon Wasserstein barycenters of measures. Journal
of Mathematical Imaging and Vision 51.
Lopez-Paz, D. and Oquab, M. (2017). Revisiting classifier two-sample tests. ICLR. https://arxiv.org/abs/1610.06545
Phipson, B. and Smyth, G. K. (2010). Permutation p-values should never be zero. Statistical Applications in Genetics
and Molecular Biology 9(1).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
import xarray as xr
from annotated_types import Interval, Len
from scipy import optimize, stats
from torch import Tensor

from probmodels.datasets.checks import as_array
from probmodels.datasets.labelled import arranged, labels_of
from probmodels.errors import DiagnosticsError
from probmodels.options import OneOf, Positive, Seed, checked

__all__ = [
    "LEAST_CLASSIFIED",
    "Classifier",
    "Samples",
    "TwoSampleTest",
    "classifier_two_sample",
    "compare_samples",
    "energy_distance",
    "mmd",
    "paired",
    "permutation_pvalues",
    "sliced_wasserstein",
    "wasserstein",
]

_BLOCK = 2_000_000  # entries of a block of the matrix of distances
_WHOLE = 25_000_000  # entries of a matrix of distances that is kept whole
_MEDIAN_ROWS = 2000  # samples, evenly spaced among more, that the median distance is taken of
LEAST_CLASSIFIED = 20  # samples of each set that a classifier needs

Samples: TypeAlias = np.ndarray | Tensor | xr.DataArray
Bandwidth: TypeAlias = Positive | Annotated[Sequence[Positive], Len(1)] | None
Kernel: TypeAlias = Callable[[Tensor], Tensor]  # of distances
Projections = Annotated[int, Interval(ge=1, le=1_000_000)]
Permutations = Annotated[int, Interval(ge=1, le=100_000)]

_MEANINGS = {
    "energy_distance": "squared energy distance, unbiased: 0 on average where the distributions agree",
    "mmd": "squared maximum mean discrepancy, unbiased: 0 on average where the distributions agree",
    "sliced_wasserstein": "sliced 2-Wasserstein distance: 0 for equal sets, above 0 for two sets of one distribution",
    "wasserstein": "2-Wasserstein distance: 0 for equal sets, above 0 for two sets of one distribution",
    "classifier_two_sample": "held-out accuracy of a classifier of the two sets: 0.5 where the distributions agree",
}
_PERMUTED = ("energy_distance", "mmd")
_PARTS = {
    "samples": "number of samples that are held against the reference",
    "se": "standard error",
    "pvalue": "p-value of the two distributions being one: by relabelling, or of the accuracy being 1/2",
}
_SUFFIX = {"accuracy": "", "se": "_se", "pvalue": "_pvalue"}


@runtime_checkable
class Classifier(Protocol):
    """What scikit-learn's classifiers have."""

    def fit(self, x: Any, y: Any) -> Any:
        """Learn from events (sample, event) and their labels (sample,)."""

    def predict(self, x: Any) -> Any:
        """Labels (sample,) of events."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Settings, from which a fresh one can be made."""


class TwoSampleTest(NamedTuple):
    """What a classifier that tells two sets apart achieves on samples that it was not trained on."""

    accuracy: float
    se: float
    pvalue: float


@checked(DiagnosticsError)
def energy_distance(x: Samples, y: Samples) -> float:
    r"""Squared energy distance :math:`2 E|X - Y| - E|X - X'| - E|Y - Y'|` (Székely and Rizzo 2013).

    Parameters
    ----------
    x, y
        Two sets (sample, \*event).

    Returns
    -------
    float
        The unbiased estimate, by means over pairs of different samples, which may fall below 0.

    Raises
    ------
    DiagnosticsError
        If a set has fewer than 2 samples or values that are not finite, or events differ in size.
    """
    return _discrepancy(*paired(x, y), torch.neg)


@checked(DiagnosticsError)
def mmd(x: Samples, y: Samples, bandwidth: Bandwidth = None) -> float:
    r"""Squared maximum mean discrepancy of the kernel :math:`\exp(-|x - y|^2 / 2 h^2)` (Gretton et al. 2012, eq. 3).

    Parameters
    ----------
    x, y
        Two sets (sample, \*event).
    bandwidth
        h; of several, the mean of their kernels is taken. None for the median distance between samples of both sets:
        give a number where values for several sets are to be compared.

    Returns
    -------
    float
        The unbiased estimate, which may fall below 0.

    Raises
    ------
    DiagnosticsError
        As for ``energy_distance``, or if a bandwidth is not above 0.
    """
    x, y = paired(x, y)
    return _discrepancy(x, y, _gaussian(_bandwidths(bandwidth, x, y)))


@checked(DiagnosticsError)
def sliced_wasserstein(x: Samples, y: Samples, num_projections: Projections = 200, seed: Seed = 0) -> float:
    r"""Root mean square, over random directions, of the 2-Wasserstein distance of the projected sets.

    Parameters
    ----------
    x, y
        Two sets (sample, \*event), whose sizes may differ.
    num_projections
        Directions, uniform on the sphere.
    seed
        Seed of the directions.

    Returns
    -------
    float
        For sets that differ by a shift of length s in d dimensions, about :math:`s / \sqrt{d}`.

    Raises
    ------
    DiagnosticsError
        As for ``energy_distance``, or if ``num_projections`` is below 1.
    """
    x, y = paired(x, y)
    directions = np.random.default_rng(seed).normal(size=(num_projections, x.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    rows = max(1, _BLOCK // (len(x) + len(y)))
    parts = torch.from_numpy(directions).split(rows)
    return float(
        np.sqrt(sum(float(_squared_quantile(x @ part.T, y @ part.T).sum()) for part in parts) / len(directions))
    )


@checked(DiagnosticsError)
def wasserstein(x: Samples, y: Samples) -> float:
    r"""2-Wasserstein distance of two sets, by the best of all transport plans.

    Parameters
    ----------
    x, y
        Two sets (sample, \*event). Sets of different sizes need POT, unless the event is one number.

    Returns
    -------
    float
        Falls slowly with the sizes of two sets of one distribution: compare it only with values for equal sizes.

    Raises
    ------
    DiagnosticsError
        As for ``energy_distance``, if there are more than 25 million pairs, or POT is needed and not installed.
    """
    x, y = paired(x, y)
    _check_sizes("wasserstein", x, y)
    if x.shape[1] == 1:
        return float(_squared_quantile(x, y).sqrt())
    costs = torch.cdist(x, y).square_().numpy()
    if len(x) == len(y):
        row, column = optimize.linear_sum_assignment(costs)
        return float((x[row] - y[column]).square().sum(1).mean().sqrt())
    import ot

    squared, log = ot.emd2([], [], costs, numItermax=100_000_000, log=True)  # no weights: all alike
    if log["warning"] is not None:
        raise DiagnosticsError(f"the transport plan was not found ({log['warning']}); use sliced_wasserstein")
    return float(np.sqrt(max(squared, 0.0)))


@checked(DiagnosticsError)
def classifier_two_sample(
    x: Samples, y: Samples, seed: Seed = 0, *, classifier: Classifier | None = None
) -> TwoSampleTest:
    r"""Train a classifier to tell the sets apart on one half of them, and judge it by the other (Lopez-Paz and Oquab).

    Parameters
    ----------
    x, y
        Two sets (sample, \*event) of at least 20. Of the larger one, as many are drawn as the smaller one has, so that
        guessing has accuracy 1/2.
    seed
        Seed of the halves and of the default classifier.
    classifier
        Any of scikit-learn's. None for a network of two hidden layers on standardised events.

    Returns
    -------
    TwoSampleTest
        Accuracy on the other half with its standard error, and the binomial p-value of one that large by guessing.

    Raises
    ------
    DiagnosticsError
        As for ``energy_distance``, or if there are fewer than 20 samples of a set.
    """
    from sklearn.base import clone
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import train_test_split
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = paired(x, y)
    _check_sizes("classifier_two_sample", x, y)
    count = min(len(x), len(y))
    rng = np.random.default_rng(seed)
    events = np.concatenate([z.numpy()[rng.permutation(len(z))[:count]] for z in (x, y)])
    labels = np.repeat([0, 1], count)
    state = int(rng.integers(2**31))
    train, test, train_labels, test_labels = train_test_split(
        events, labels, test_size=0.5, stratify=labels, random_state=state
    )
    if classifier is None:
        network = MLPClassifier(
            (64, 64), batch_size=min(64, count), learning_rate_init=3e-3, max_iter=100, random_state=state
        )
        classifier = make_pipeline(StandardScaler(), network)
    with warnings.catch_warnings():  # a network that still moves is a weaker test, not a wrong one
        warnings.simplefilter("ignore", ConvergenceWarning)
        right = clone(classifier).fit(train, train_labels).predict(test) == test_labels
    accuracy = float(right.mean())
    pvalue = stats.binomtest(int(right.sum()), len(right), 0.5, alternative="greater").pvalue
    return TwoSampleTest(accuracy, float(np.sqrt(accuracy * (1 - accuracy) / len(right))), float(pvalue))


@checked(DiagnosticsError)
def permutation_pvalues(
    x: Samples,
    y: Samples,
    *,
    metrics: Annotated[Sequence[Annotated[str, OneOf(_PERMUTED)]], Len(1)] = _PERMUTED,
    num_permutations: Permutations = 999,
    bandwidth: Bandwidth = None,
    seed: Seed = 0,
) -> dict[str, float]:
    r"""P-values of the sets being of one distribution: share of random relabellings that lie as far apart.

    Parameters
    ----------
    x, y
        Two sets (sample, \*event), together at most 5000 samples.
    metrics
        ``"energy_distance"``, ``"mmd"`` or both, from one matrix of distances and the same relabellings.
    num_permutations
        Relabellings, of which the sets as they are count as one more (Phipson and Smyth 2010).
    bandwidth
        As for ``mmd``.
    seed
        Seed of the relabellings.

    Returns
    -------
    dict of str to float
        By metric.

    Raises
    ------
    DiagnosticsError
        As for ``mmd``, or if there are too many samples, or another metric is asked for.
    """
    x, y = paired(x, y)
    _check_sizes("permutation_pvalues", x, y)
    distances = torch.cdist(pooled := torch.cat([x, y]), pooled)
    labels = np.tile(np.arange(len(pooled)) < len(x), (1 + num_permutations, 1))
    np.random.default_rng(seed).permuted(labels[1:], axis=1, out=labels[1:])
    first = torch.from_numpy(labels.T).to(distances)  # (sample, relabelling): 1 in the first set
    found = {}
    for name in metrics:
        kernel = torch.neg if name == "energy_distance" else _gaussian(_bandwidths(bandwidth, x, y))
        values = kernel(distances).fill_diagonal_(0.0)
        within = (first * (values @ first)).sum(0)
        between = values.sum(1) @ first - within
        moved = _unbiased(within, values.sum() - within - 2 * between, between, len(x), len(y))
        slack = 1e-10 * values.abs().mean()  # relabellings of equal value differ by rounding
        found[name] = float((moved >= moved[0] - slack).double().mean())
    return found


@checked(DiagnosticsError)
def compare_samples(
    x: Samples,
    reference: Samples,
    *,
    metrics: Annotated[Sequence[Annotated[str, OneOf(_MEANINGS)]], Len(1)] = (
        "energy_distance",
        "mmd",
        "sliced_wasserstein",
        "classifier_two_sample",
    ),
    floor: Samples | None = None,
    bandwidth: Bandwidth = None,
    num_projections: Projections = 200,
    num_permutations: Permutations | None = None,
    seed: Seed = 0,
) -> xr.Dataset:
    r"""Distances of samples from a reference set, beside those of a second exact set from it.

    Parameters
    ----------
    x
        The samples (sample, \*event) to be judged.
    reference
        Samples of the exact distribution.
    metrics
        Some of ``"energy_distance"``, ``"mmd"``, ``"sliced_wasserstein"``, ``"wasserstein"`` and
        ``"classifier_two_sample"``.
    floor
        A second, independent set of the exact distribution, best as large as ``x``: what perfect samples would score.
    bandwidth
        Bandwidth of ``mmd``; None for the median distance within the reference, so that values for several ``x``
        compare.
        The p-values then take the median over both sets, as relabellings must not move it.
    num_projections
        Number of projections of ``sliced_wasserstein``.
    num_permutations
        Relabellings for p-values of ``energy_distance`` and ``mmd``; None for no p-values.
    seed
        Seed of directions, classifiers and relabellings, the same for both sets.

    Returns
    -------
    xarray.Dataset
        Each metric (set,), where set is "samples" and, if given, "floor"; with ``_pvalue`` and ``_se`` appended to its
        name where there are any; ``num_samples`` (set,).

    Raises
    ------
    DiagnosticsError
        As the metrics, before any of them is computed.
    """
    given = {"samples": x} if floor is None else {"samples": x, "floor": floor}
    pairs = {label: paired(one, reference, (label, "reference")) for label, one in given.items()}
    exact = pairs["samples"][1]
    widths = _bandwidths(bandwidth, exact) if "mmd" in metrics else []
    permuted = [name for name in metrics if name in _PERMUTED and num_permutations is not None]
    for one, other in pairs.values():
        for name in [*metrics, *(["permutation_pvalues"] if permuted else [])]:
            _check_sizes(name, one, other)

    def measure(one: Tensor, other: Tensor) -> dict[str, float]:
        found: dict[str, float] = {"num_samples": len(one)}
        if "energy_distance" in metrics:
            found["energy_distance"] = energy_distance(one, other)
        if "mmd" in metrics:
            found["mmd"] = mmd(one, other, widths)
        if "sliced_wasserstein" in metrics:
            found["sliced_wasserstein"] = sliced_wasserstein(one, other, num_projections, seed)
        if "wasserstein" in metrics:
            found["wasserstein"] = wasserstein(one, other)
        if "classifier_two_sample" in metrics:
            test = classifier_two_sample(one, other, seed)
            found |= {"classifier_two_sample" + _SUFFIX[part]: value for part, value in test._asdict().items()}
        if permuted and num_permutations is not None:
            pvalues = permutation_pvalues(
                one, other, metrics=permuted, num_permutations=num_permutations, bandwidth=bandwidth, seed=seed
            )
            found |= {name + _SUFFIX["pvalue"]: value for name, value in pvalues.items()}
        return found

    rows = [measure(*pair) for pair in pairs.values()]
    dataset = xr.Dataset({name: ("set", [row[name] for row in rows]) for name in rows[0]}, {"set": list(pairs)})
    for name in rows[0]:
        dataset[name].attrs["long_name"] = _MEANINGS.get(name) or _PARTS[name.rpartition("_")[2]]
    used = {
        "bandwidth": widths,
        "num_projections": num_projections * ("sliced_wasserstein" in metrics),
        "num_permutations": (num_permutations or 0) * bool(permuted),
    }
    dataset.attrs = {"num_reference": len(exact), "event_size": exact.shape[1], "seed": seed}
    return dataset.assign_attrs({name: value for name, value in used.items() if value})


def paired(x: Samples, y: Samples, names: tuple[str, str] = ("x", "y")) -> tuple[Tensor, Tensor]:
    """Both sets as (sample, event) in float64, moved so that those of ``y`` have mean 0: distances lose no digits."""
    if isinstance(y, xr.DataArray):  # events in the order of the reference
        axes = {str(dim): labels_of(y, str(dim), axis) if axis else None for axis, dim in enumerate(y.dims)}
        x = arranged(x, names[0], axes, error=DiagnosticsError)
    one, other = (_flat(values, name) for values, name in zip((x, y), names, strict=True))
    if one.shape[1] != other.shape[1]:
        sizes = " and ".join(f"{name} {flat.shape[1]}" for name, flat in zip(names, (one, other), strict=True))
        raise DiagnosticsError(f"events differ in size: {sizes} values per sample; the first axis is that of samples")
    centre = other.mean(0)
    return one - centre, other - centre


def _flat(values: Samples, name: str) -> Tensor:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    numbers = as_array(array, name, numbers=True, error=DiagnosticsError)
    flat = torch.from_numpy(np.array(numbers, dtype=np.float64, order="C"))
    if flat.ndim == 0 or len(flat) < 2 or flat.numel() == 0:
        raise DiagnosticsError(f"{name} has shape {tuple(flat.shape)}; at least 2 samples (sample, *event) are needed")
    flat = flat.reshape(len(flat), -1)
    if bad := int((~flat.isfinite()).any(1).sum()):
        raise DiagnosticsError(f"{bad} of {len(flat)} samples of {name} are not finite; mend or drop them, and say so")
    return flat


def _discrepancy(x: Tensor, y: Tensor, kernel: Kernel) -> float:
    """Unbiased squared discrepancy of a kernel of distances; the energy distance is that of the negative distance."""

    def total(one: Tensor, other: Tensor) -> float:
        found, rows = 0.0, max(1, _BLOCK // len(other))
        for start in range(0, len(one), rows):
            values = kernel(torch.cdist(one[start : start + rows], other))
            if one is other:
                values.diagonal(start).zero_()
            found += float(values.sum())
        return found

    return _unbiased(total(x, x), total(y, y), total(x, y), len(x), len(y))


def _unbiased(within_x: Any, within_y: Any, between: Any, num_x: int, num_y: int) -> Any:
    """Means over ordered pairs from their sums, a sample with itself left out (Gretton et al. 2012, eq. 3)."""
    return within_x / (num_x * (num_x - 1)) + within_y / (num_y * (num_y - 1)) - 2 * between / (num_x * num_y)


def _gaussian(widths: Sequence[float]) -> Kernel:
    def kernel(distances: Tensor) -> Tensor:
        values = torch.zeros_like(distances)
        for width in widths:
            values += (distances / width).square_().mul_(-0.5).exp_()
        return values / len(widths)

    return kernel


def _bandwidths(bandwidth: Bandwidth, *sets: Tensor) -> list[float]:
    if bandwidth is not None:
        return [float(width) for width in np.ravel(np.asarray(bandwidth))]
    pooled = torch.cat(sets)
    chosen = np.linspace(0, len(pooled) - 1, min(len(pooled), _MEDIAN_ROWS)).round().astype(int)
    median = float(np.median(torch.pdist(pooled[chosen]).numpy()))
    if median == 0:
        raise DiagnosticsError("the median distance between samples is 0, as most of them are equal; give a bandwidth")
    return [median]


def _squared_quantile(x: Tensor, y: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance (column,) of the columns of two sets: mean over levels of their quantiles."""
    ends_x, ends_y = (np.arange(1, n + 1) * other for n, other in ((len(x), len(y)), (len(y), len(x))))
    ends = np.union1d(ends_x, ends_y)  # levels at which a quantile jumps, times both sizes: whole numbers, thus exact
    share = torch.from_numpy(np.diff(ends, prepend=0) / (len(x) * len(y)))
    quantile_x, quantile_y = x.sort(0).values[(ends - 1) // len(y)], y.sort(0).values[(ends - 1) // len(x)]
    return share @ (quantile_x - quantile_y).square()


def _check_sizes(metric: str, x: Tensor, y: Tensor) -> None:
    """Check that a metric can be computed of sets of these sizes."""
    sizes = len(x), len(y)
    if metric == "classifier_two_sample" and min(sizes) < LEAST_CLASSIFIED:
        raise DiagnosticsError(f"sets have {sizes} samples; a classifier needs {LEAST_CLASSIFIED} of each or more")
    if metric == "permutation_pvalues":
        _check_whole(metric, sum(sizes), sum(sizes))
    if metric == "wasserstein" and x.shape[1] > 1:
        _check_whole(metric, *sizes)
        if len(x) != len(y):
            try:
                import ot  # noqa: F401
            except ImportError as error:
                raise DiagnosticsError(
                    f"POT is not installed, which wasserstein needs for sets of different sizes {sizes}; "
                    "pip install probmodels[ot], give sets of equal size, or use sliced_wasserstein"
                ) from error


def _check_whole(metric: str, rows: int, columns: int) -> None:
    if rows * columns > _WHOLE:
        raise DiagnosticsError(
            f"{metric} needs the whole matrix of {rows} x {columns} distances, and {_WHOLE:,} entries is the limit; "
            "give fewer samples, or use a metric without that matrix"
        )
