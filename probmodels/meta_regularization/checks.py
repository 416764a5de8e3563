"""Whether class probabilities of images that took no part in the fit can be trusted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probmodels.edges.checks import class_probabilities, column, judge_classes, judge_copies
from probmodels.inference.diagnostics.findings import Finding
from probmodels.inference.diagnostics.guides import still_falling
from probmodels.inference.result import Result

__all__ = ["check_draws", "expected_calibration_error", "positions"]

_BINS = 10
_DRAWS, _QUANTILE = 999, 0.999  # of the error that calibrated probabilities have by chance
_TOLERATED = 0.05  # beyond it
_FEWEST = 30  # images held out
_COPIES = 0.01  # share of images that may occur twice in data
_LEAKED = {
    "validation": "their loss is no fair judge of the finder: fit the generator to images of role 'train' alone",
    "test": "what it makes of these tells the classifier of them: fit it to other images",
}


def check_draws(result: Result) -> Iterator[Finding]:
    """Findings on the classes of test images, in place of those on the guide as a posterior.

    Training images chose the classifier and validation images the finder and the round, so that only test images show
    what the class probabilities are worth. Checked are accuracy and log loss against the shares of the classes, and
    whether the probabilities are as sure as they may be, by log loss and by the expected calibration error. Whether
    generated images look like real ones is not judged, nor whether the finder brought anything.
    """
    tree = result.tree
    yield from still_falling(tree)
    probability, role = class_probabilities(tree), column(tree, "role").astype(str)
    label = positions(result)
    shares = np.bincount(label[role == "train"], minlength=probability.shape[1])
    test = role == "test"
    advice = "take more rounds (num_rounds) or inner_steps, a smaller weight, or more training images"
    yield from judge_classes(probability[test], label[test], shares / shares.sum(), units="images", advice=advice)
    if test.sum() >= _FEWEST:
        yield _calibration(probability[test], label[test])
    if test.any() and "constant_data" in tree and "image" in tree["constant_data"]:
        images = column(tree, "image")
        yield judge_copies(images[~test], images[test])
    yield from _leaks(tree)
    verdict = "latents are chosen by the finder to lower the log loss of validation images: they are no posterior, and "
    verdict += "are not judged"
    yield Finding(False, verdict, "what the finder brought shows a fit with a small hyper_lr beside this one")


def _leaks(tree: Any) -> Iterator[Finding]:
    """Whether a generator of a result saw images that judge finder or classifier; test images are harmful."""
    attrs = tree["observed_data"].attrs if "observed_data" in tree else {}
    attrs = {**(tree["constant_data"].attrs if "constant_data" in tree else {}), **attrs}
    if "generator_saw_test" not in attrs:
        return
    role = column(tree, "role").astype(str)
    for name in ("validation", "test"):
        found, count = int(attrs[f"generator_saw_{name}"]), int((role == name).sum())
        verdict = f"the generator was fitted to {found:,} of the {count:,} {name} images"
        yield Finding(name == "test" and found > _COPIES * count, verdict, _LEAKED[name] if found else "")


def expected_calibration_error(probability: NDArray[np.float64], label: NDArray[np.integer]) -> float:
    """Mean distance between how sure and how often right predictions are, in ten bins of their probability.

    Parameters
    ----------
    probability
        (image, class).
    label
        Position of the true class (image,).

    References
    ----------
    Guo, C., Pleiss, G., Sun, Y. and Weinberger, K. Q. (2017). On calibration of modern neural networks. ICML.
    https://arxiv.org/abs/1706.04599
    """
    return float(_distance(probability.max(1), (probability.argmax(1) == label)[None])[0])


def _distance(sure: NDArray[np.float64], right: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The error of predictions that are right or not (draw, image), for each draw."""
    place = np.minimum((sure * _BINS).astype(int), _BINS - 1)
    member = np.eye(_BINS)[place]  # (image, bin)
    found: NDArray[np.float64] = np.abs((right - sure) @ member).sum(1) / len(sure)
    return found


def _calibration(probability: NDArray[np.float64], label: NDArray[np.integer]) -> Finding:
    """Finding on the expected calibration error, against that of calibrated probabilities of as many images."""
    sure = probability.max(1)
    found = expected_calibration_error(probability, label)
    chance = np.random.default_rng(0).random((_DRAWS, len(sure))) < sure
    limit = _TOLERATED + float(np.quantile(_distance(sure, chance), _QUANTILE))
    verdict = f"the expected calibration error of {len(label):,} test images is {found:.3f} (at most {limit:.3f})"
    bad = found > limit
    return Finding(bad, verdict, "do not take the probabilities for frequencies: scale them on other images" * bad)


def positions(result: Result) -> NDArray[np.int64]:
    """Position of the class of every image."""
    tree: Any = result.tree
    label = column(tree, "label")
    classes = next(
        tree[g]["class"].values for g in ("posterior", "marginals") if g in tree and "class" in tree[g].coords
    )
    return np.searchsorted(classes, label.astype(classes.dtype)).astype(np.int64)
