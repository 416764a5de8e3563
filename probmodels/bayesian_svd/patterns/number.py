"""How many modes a population has, as a posterior.

The number of modes is that of independent directions in which the population's signal varies more than its noise. With
the covariance between cells of the signal S and of the noise N at one time, it is the number of eigenvalues of
``N^-1 S`` above one: of ``d_i^2 / sigma^2`` where noise is white. It does not depend on coordinates, and is right or
wrong of a population. Draws know it where more modes are sampled than there are, and those that the data do not ask for
can vanish (``make_problem(shrinkage="log_uniform")``). Where all of them exceed the noise, there may be more, and the
number says no more than what ``rank`` was.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from numpy.typing import NDArray

from probmodels._axes import BLUE, RED, SMALL, clean
from probmodels.bayesian_svd.draws import Draws, read_draws
from probmodels.errors import SummaryError
from probmodels.inference.diagnostics.findings import Finding
from probmodels.inference.labels import group_of
from probmodels.options import Fraction, checked

__all__ = ["check_number", "draw_number", "has_number", "number_of_modes", "number_sentence", "signal_to_noise"]

Array = NDArray[np.float64]

_LIMITED = 0.05  # probability of the largest number there can be, from which it is worth raising


def signal_to_noise(draws: Draws) -> Array:
    """Variance of the signal over that of the noise in each direction, largest first (draw, mode).

    Parameters
    ----------
    draws
        Of modes of the population.

    Returns
    -------
    ndarray
        The eigenvalues of ``N^-1 S`` that are not zero.
    """
    basis = draws.basis_space if draws.noise is None else draws.noise.whitener @ draws.basis_space
    loading = draws.space * draws.d  # (basis, draw, mode)
    gram = np.einsum("rsi,rsj->sij", loading, np.tensordot(basis.T @ basis, loading, 1))
    return np.linalg.eigvalsh(gram)[:, ::-1] / draws.sigma[:, None] ** 2


def has_number(tree: xr.DataTree) -> bool:
    """Whether the modes of a result can vanish, so that it knows their number."""
    return "constant_data" in tree.children and "shrinkage" in tree["constant_data"].attrs


@checked(SummaryError)
def number_of_modes(tree: xr.DataTree, *, level: Fraction = 0.95) -> xr.Dataset:
    """Posterior of the number of modes whose variance in the population exceeds that of the noise.

    Parameters
    ----------
    tree
        Result of a problem made with ``shrinkage="log_uniform"``.
    level
        Probability of the set of numbers.

    Returns
    -------
    xr.Dataset
        Over ``count``, 0 to the rank: ``number_of_modes_probability``. Numbers: ``number_of_modes``, the most probable;
        ``number_of_modes_lower`` and ``_upper``, the ends of the most probable numbers that have ``level`` together.

    Raises
    ------
    SummaryError
        If modes of the result could not vanish.
    """
    if not has_number(tree):
        raise SummaryError(
            "the modes of this result could not vanish, so that it has no posterior of their number; infer with "
            "shrinkage='log_uniform' (--set model.shrinkage=log_uniform) and a rank above the number expected"
        )
    above = (signal_to_noise(read_draws(tree, "population")) > 1).sum(axis=1)
    rank = tree["posterior"].sizes["mode"]
    probability = np.bincount(above, minlength=rank + 1) / len(above)
    order = np.argsort(-probability, kind="stable")
    chosen = order[: 1 + int(np.searchsorted(np.cumsum(probability[order]), level - 1e-12))]
    out = xr.Dataset(coords={"count": np.arange(rank + 1, dtype=np.int32)})
    out["number_of_modes_probability"] = "count", probability
    for name, value in (("", order[0]), ("_lower", chosen.min()), ("_upper", chosen.max())):
        out[f"number_of_modes{name}"] = (), np.int32(value)
    for array in out.data_vars.values():
        array.attrs["units"] = "1"
    what = "number of modes of larger variance in the population than the noise in one direction"
    out["count"].attrs |= {"long_name": what, "units": "1"}
    out["number_of_modes_probability"].attrs["long_name"] = f"posterior probability of the {what}"
    out["number_of_modes"].attrs["long_name"] = f"most probable {what}"
    for name, end in (("lower", "least"), ("upper", "largest")):
        words = f"{end} of the most probable numbers that have {level:g} together"
        out[f"number_of_modes_{name}"].attrs["long_name"] = words
    out.attrs["interval_level"] = level
    return out


def number_sentence(found: xr.Dataset) -> str:
    """What `number_of_modes` found, in words; of the modes of a summary too."""
    best, low, high = (int(found[f"number_of_modes{part}"]) for part in ("", "_lower", "_upper"))
    probability = found["number_of_modes_probability"].values
    level = 100 * float(found.attrs["interval_level"])
    verb = "varies" if best == 1 else "vary"
    words = f"{best} mode{'s' * (best != 1)} {verb} more than the noise (probability {probability[best]:.2f}; "
    words += f"{level:g} %: {low}" + (f" to {high})" if high > low else " alone)")
    if probability[-1] > _LIMITED:
        words += f"; the number is limited by the rank, {len(probability) - 1}, and may be larger"
    return words


@checked(SummaryError)
def draw_number(found: xr.Dataset) -> Figure:
    """Posterior probability of each number of modes.

    Parameters
    ----------
    found
        From `number_of_modes`, or the summary of the modes.
    """
    figure = Figure(figsize=(6, 3), layout="constrained")
    ax = figure.subplots()
    count, probability = found["count"].values, found["number_of_modes_probability"].values
    inside = (count >= int(found["number_of_modes_lower"])) & (count <= int(found["number_of_modes_upper"]))
    level = 100 * float(found.attrs["interval_level"])
    for which, colour, words in ((inside, BLUE, f"{level:g} % of the probability"), (~inside, "0.7", "")):
        ax.bar(count[which], probability[which], color=colour, label=words or None)
    if probability[-1] > _LIMITED:
        ax.bar(count[-1:], probability[-1:], color=RED, label="the largest that the rank allows")
    ax.set_xticks(count)
    ax.set_ylim(0, 1)
    ax.set_xlabel("number of modes that vary more than the noise")
    ax.set_ylabel("probability")
    ax.legend(fontsize=SMALL, frameon=False)
    clean(ax)
    return figure


def check_number(tree: xr.DataTree) -> Iterator[Finding]:
    """Whether the rank leaves room for the number of modes, and noise was estimated about that number."""
    if not has_number(tree) or "F" not in group_of(tree, "posterior"):
        return
    probability = number_of_modes(tree)["number_of_modes_probability"].values
    rank = len(probability) - 1
    verdict = f"{probability[-1]:.0%} of the draws have as many modes above the noise as the rank allows, {rank} "
    verdict += f"(at most {_LIMITED:.0%})"
    bad = bool(probability[-1] > _LIMITED)
    advice = f"the number of modes is limited by the rank: raise it (--rank {2 * rank})"
    yield Finding(bad, verdict, advice if bad else "", part="model")
    about = group_of(tree, "constant_data").attrs.get("noise_rank")
    if about is not None:
        about, best = int(about), int(probability.argmax())
        bad = bool(probability[about] < _LIMITED)
        verdict = (
            f"noise was estimated about {about} modes, a number of probability {probability[about]:.2f} (at least "
        )
        verdict += f"{_LIMITED})"
        advice = f"the number and the noise do not agree: estimate it about {best} (--set model.noise_rank={best}) and "
        yield Finding(bad, verdict, advice + "see which of the two agrees with itself" if bad else "", part="model")
