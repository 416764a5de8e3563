"""Maximal and total information coefficients against published values, brute force and what holds for all data."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from probmodels.errors import ProblemError
from probmodels.inference.metrics.dependence import characteristic_matrix, mic, tic

GRID = np.linspace(0, 1, 1000)


def relations() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    noise = np.random.RandomState(0).uniform(-1, 1, 1000)
    wave = np.sin(10 * np.pi * GRID) + GRID
    angle = 2 * np.pi * GRID + 1  # at 0, values would tie but for rounding
    one, other = np.random.RandomState(1).uniform(size=(2, 1000))
    few = np.random.RandomState(2)
    levels = few.randint(0, 5, 300).astype(float)
    return {
        "line": (GRID, GRID),
        "parabola": (GRID, (GRID - 0.5) ** 2),
        "sine": (GRID, np.sin(12 * GRID)),
        "cubic": (GRID, 4 * GRID**3 + GRID**2 - 4 * GRID),
        "circle": (np.cos(angle), np.sin(angle)),
        "wave": (GRID, wave),
        "noisy_wave": (GRID, wave + noise),
        "independent": (one, other),
        "ties": (levels, np.round(levels**2 / 4 + few.normal(size=300), 1)),
    }


# MIC, normalised TIC, the largest asymmetry and the largest entry at the edge of the characteristic matrix; MIC_e and
# normalised TIC_e: by minepy 1.2.6, alpha 0.6 and c 15, an implementation that this one shares no code with.
REFERENCE = {
    "line": (1.000000000000, 0.999999584497, 0.000000000000, 1.000000000000, 1.000000000000, 0.989478612869),
    "parabola": (1.000000000000, 0.735412508430, 0.688721875541, 1.000000000000, 1.000000000000, 0.712103220331),
    "sine": (1.000000000000, 0.624747456669, 0.704179971712, 1.000000000000, 0.956709240908, 0.536663808726),
    "cubic": (1.000000000000, 0.788718425866, 0.602601949323, 1.000000000000, 0.996257296838, 0.744945755537),
    "circle": (0.685076576301, 0.493459058122, 0.008903612481, 0.321962460114, 0.685076576301, 0.491643203889),
    "wave": (1.000000000000, 0.457170469954, 0.726071574374, 1.000000000000, 0.768926853415, 0.318225228075),
    "noisy_wave": (0.505716693417, 0.194255626320, 0.365399904262, 0.505716693417, 0.396159934068, 0.132403194221),
    "independent": (0.143925588608, 0.051167788474, 0.022963943154, 0.143925588608, 0.037554820349, 0.020178346353),
    "ties": (0.562812478027, 0.427721975522, 0.109112274656, 0.562812478027, 0.504663477233, 0.411194345435),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_values(name: str) -> None:
    x, y = relations()[name]
    scores = characteristic_matrix(x, y).values
    edge = np.nanmax([np.nanmax(scores[0]), np.nanmax(scores[:, 0])])
    found = [mic(x, y), tic(x, y), np.nanmax(abs(scores - scores.T)), edge]
    found += [mic(x, y, equipartition=True), tic(x, y, equipartition=True)]
    np.testing.assert_allclose(found, REFERENCE[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wave", (1.0, 0.726071574374, 1.0, 67.6612295532)),
        ("noisy_wave", (0.505716693417, 0.365399904262, 0.505716693417, 28.7498326953)),
    ],
)
def test_published_example(name: str, expected: tuple[float, ...]) -> None:
    """What the example of minepy prints: https://minepy.sourceforge.net/docs/1.0.0/python.html; TIC from its 1.2.6."""
    x, y = relations()[name]
    scores = characteristic_matrix(x, y).values
    edge = np.nanmax([np.nanmax(scores[0]), np.nanmax(scores[:, 0])])
    found = mic(x, y), np.nanmax(abs(scores - scores.T)), edge, tic(x, y, normalised=False)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


# -- definition -------------------------------------------------------------------------------------------------------


def information(count: np.ndarray) -> float:
    p = count / count.sum()
    independent = p.sum(axis=1, keepdims=True) * p.sum(axis=0)
    return float(np.sum(p[p > 0] * np.log(p[p > 0] / independent[p > 0])))


def best(order: np.ndarray, row: np.ndarray, columns: int) -> float:
    """Largest mutual information over all ways to cut the points, in this order, into columns."""
    n, found = len(row), 0.0
    for cuts in itertools.combinations(range(1, n), columns - 1):
        column = np.searchsorted(cuts, np.arange(n), side="right")
        count = np.zeros((columns, row.max() + 1))
        np.add.at(count, (column, row[order]), 1)
        found = max(found, information(count))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_columns_are_best_among_all(seed: int) -> None:
    n = 12
    x, y = np.random.default_rng(seed).normal(size=(2, n))
    scores = characteristic_matrix(x, y, alpha=1, c=n)  # 12 cells, and every border is a candidate
    for k, l in [(2, 2), (2, 3), (3, 2), (3, 3), (4, 3), (6, 2), (2, 6)]:
        rows = np.argsort(np.argsort(y)) * l // n  # 2, 3, 4 and 6 divide 12
        columns = np.argsort(np.argsort(x)) * k // n
        expected = max(best(np.argsort(x), rows, k), best(np.argsort(y), columns, l)) / np.log(min(k, l))
        assert float(scores.sel(x_bins=k, y_bins=l)) == pytest.approx(expected, abs=1e-12)


def test_grids_of_too_many_cells_have_no_score() -> None:
    scores = characteristic_matrix(*relations()["noisy_wave"])
    size = np.multiply.outer(scores["x_bins"].values, scores["y_bins"].values)
    np.testing.assert_array_equal(np.isfinite(scores), size <= 1000**0.6)
    assert scores["x_bins"].values.tolist() == list(range(2, 32))


def test_only_ranks_count() -> None:
    x, y = relations()["noisy_wave"]
    for equipartition in (False, True):
        one = characteristic_matrix(x, y, equipartition=equipartition)
        other = characteristic_matrix(np.exp(5 * x), y**3, equipartition=equipartition)
        np.testing.assert_array_equal(one, other)
    order = np.random.default_rng(0).permutation(len(x))
    np.testing.assert_array_equal(characteristic_matrix(x, y), characteristic_matrix(x[order], y[order]))
    assert mic(-x, y) == pytest.approx(mic(x, y), abs=0.01)  # unequal counts fall elsewhere


@pytest.mark.parametrize("name", ["noisy_wave", "ties", "circle"])
def test_swapped_variables_transpose_the_matrix(name: str) -> None:
    x, y = relations()[name]
    np.testing.assert_array_equal(characteristic_matrix(x, y), characteristic_matrix(y, x).values.T)
    assert tic(x, y) == pytest.approx(tic(y, x), abs=1e-14)


def test_a_binary_variable_and_a_copy_depend_fully() -> None:
    x = np.repeat([0.0, 1.0], 50)
    for equipartition in (False, True):
        np.testing.assert_allclose(tic(x, x, equipartition=equipartition), 1)
        assert mic(x, np.ones(100), equipartition=equipartition) == 0


def test_noise_lowers_both() -> None:
    rng = np.random.default_rng(1)
    x, noise = rng.uniform(size=500), rng.normal(size=500)
    for measure in (mic, tic):
        found = [measure(x, np.sin(6 * x) + sd * noise) for sd in (0, 0.3, 1, 10)]
        assert found == sorted(found, reverse=True)
        assert found[0] > 2 * found[-1]


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y", "options", "says"),
    [
        (GRID, GRID[1:], {}, "by observation"),
        (GRID[:, None], GRID[:, None], {}, "by observation"),
        (GRID[:3], GRID[:3], {}, "at least 4"),
        (np.where(GRID > 0.5, np.nan, GRID), GRID, {}, "missing"),
        (GRID, np.where(GRID > 0.5, np.inf, GRID), {}, "infinite"),
        (GRID, GRID, {"alpha": 0}, "alpha"),
        (GRID, GRID, {"alpha": 1.5}, "alpha"),
        (GRID, GRID, {"c": 0}, "c=0"),
    ],
)
def test_refusals(x: np.ndarray, y: np.ndarray, options: dict[str, Any], says: str) -> None:
    for measure in (mic, tic, characteristic_matrix):
        with pytest.raises(ProblemError, match=says):
            measure(x, y, **options)
