"""Whether class probabilities of graphs or nodes that took no part in the fit can be trusted."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from probmodels.inference.diagnostics.findings import Finding, Part
from probmodels.inference.labels import group_of
from probmodels.inference.metrics.copies import near_copies

__all__ = ["class_probabilities", "column", "judge_classes", "judge_copies"]

_FEWEST, _ENOUGH = 10, 30  # units held out, for a judgement at all, and for one that may be unfavourable
_EXCESS = 0.1  # nats of log loss that the probabilities themselves do not expect
_COPIES, _COPIES_OF_TWO = 0.05, 0.25  # share of held-out images; the second where there are but two intensities
_HALF_LEVEL = 0.5 / 255 + 1e-9  # difference of intensities of copies
_FLOOR = 1e-6  # of a probability, whose logarithm is taken


def column(tree: xr.DataTree, name: str) -> NDArray[np.generic]:
    """Values of a variable of the data that a result keeps, observed or constant.

    Raises
    ------
    KeyError
        If the result does not keep it.
    """
    for group in ("observed_data", "constant_data"):
        if name in (found := group_of(tree, group)):
            return np.asarray(found[name].values)
    raise KeyError(name)


def class_probabilities(tree: xr.DataTree) -> NDArray[np.float64]:
    """Mean class probabilities (unit, class) of the draws of a result, or of its marginals."""
    for group in ("posterior", "marginals"):
        if "class_probability" in (found := group_of(tree, group)):
            values = found["class_probability"]
            return values.mean([dim for dim in ("chain", "draw") if dim in values.dims], dtype=float).values
    raise KeyError("class_probability")


def judge_classes(
    probability: NDArray[np.float64], y: NDArray[np.integer], shares: NDArray[np.float64], *, units: str, advice: str
) -> Iterator[Finding]:
    """Findings on class probabilities of units that were held out.

    Checked are their log loss against that of the shares of the classes, which know nothing of a unit; and their log
    loss against the one that they themselves expect, which it exceeds where they are too sure.

    Parameters
    ----------
    probability
        (unit, class).
    y
        Position of the true class (unit,).
    shares
        Shares of the classes among the units of the fit (class,).
    units
        What a unit is, in the plural.
    advice
        What to do where nothing was learned.
    """
    if len(y) < _FEWEST:
        verdict = f"{len(y)} {units} of known class were held out, too few to judge the class probabilities"
        yield Finding(False, verdict, f"hold out {_ENOUGH} or more, as split 'test'", judged=False)
        return
    logs = np.log(probability.clip(_FLOOR, 1))
    found, guess = logs[np.arange(len(y)), y], np.log(shares.clip(_FLOOR, 1))[y]
    accuracy, claimed = float((probability.argmax(1) == y).mean()), float(probability.max(1).mean())
    gain, error = float((found - guess).mean()), float((found - guess).std(ddof=1)) / math.sqrt(len(y))
    verdict = f"{accuracy:.0%} of {len(y):,} {units} held out are classified right, and their log loss is "
    verdict += f"{-found.mean():.2f} nats, where the shares of the classes have {-guess.mean():.2f} "
    verdict += f"(less by {gain:.2f} ± {2 * error:.2f}, which must be surely above 0)"
    learned = gain > 2 * error
    judged = learned or len(y) >= _ENOUGH
    yield Finding(judged and not learned, verdict, "" if learned else advice, judged=judged)
    entropy = -(probability * logs).sum(1)
    variance = (probability * (logs + entropy[:, None]) ** 2).sum(1)
    limit = _EXCESS + 2 * math.sqrt(float(variance.mean()) / len(y))
    excess = float((-found - entropy).mean())
    verdict = f"class probabilities expect to be right in {claimed:.0%} of the {units} held out and a log loss of "
    verdict += f"{entropy.mean():.2f} nats; they are right in {accuracy:.0%}, with {-found.mean():.2f} nats "
    verdict += f"(more by at most {limit:.2f})"
    if excess > limit:
        yield Finding(True, f"{verdict}: they are too sure", "take fewer steps, a smaller network or more data")
    elif -excess > limit:
        yield Finding(False, f"{verdict}: they are not sure enough", "take more steps, or less regularisation")
    else:
        yield Finding(False, verdict)


def judge_copies(fitted: NDArray[np.float64], held_out: NDArray[np.float64], *, part: Part = "inference") -> Finding:
    """Finding on held-out images (image, ...) that are copies of fitted ones, within half a grey level.

    Copies from 5 % of them on are harmful, of black and white images, some of which are alike by chance, from 25 % on.
    This holds where images come more than once in all the data, too: what was fitted to an image does not judge it.
    """
    found = near_copies(held_out, fitted, _HALF_LEVEL)
    share = float(found.mean()) if len(found) else 0.0
    most = _COPIES_OF_TWO if np.isin(held_out, (0.0, 1.0)).all() else _COPIES
    bad = share >= most
    verdict = f"{found.sum():,} of {len(found):,} held-out images are copies of fitted ones (below {most:.0%})"
    advice = "they say nothing of new images: hold out all copies of an image together" if bad else ""
    return Finding(bad, verdict, advice or ("leave out the copies" if share else ""), part=part)
