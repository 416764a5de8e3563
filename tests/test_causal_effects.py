"""Average effects in tables: against regression, sums over paths, and what is set by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr

from probmodels.causal_graph.effects import average_effect
from probmodels.errors import DataError

CHAIN = [["a", "b"], ["b", "c"]]


def chain(num_rows: int = 400, seed: int = 0) -> xr.DataArray:
    """b = 2 a + noise, c = -1.5 b + noise, in units of their own."""
    rng = np.random.default_rng(seed)
    a = 5 + 3 * rng.normal(size=num_rows)
    b = 2 * a + rng.normal(size=num_rows)
    c = 100 - 1.5 * b + 2 * rng.normal(size=num_rows)
    return xr.DataArray(np.stack([a, b, c], -1), dims=("data", "concept"), coords={"concept": ["a", "b", "c"]})


def test_direct_effects_are_those_of_regression() -> None:
    data = chain()
    found = average_effect(data, CHAIN, "a", (0.0, 1.0), functions="linear", num_draws=4000)
    a, b = data.values[:, 0], data.values[:, 1]
    slope = np.cov(a, b)[0, 1] / a.var(ddof=1)
    residual = b - b.mean() - slope * (a - a.mean())
    error = np.sqrt(residual @ residual / (len(a) - 2) / ((a - a.mean()) ** 2).sum())
    draws = found["draws"].sel(concept="b").values
    # The prior of the weights is wide and that of the variance worth one row.
    assert draws.mean() == pytest.approx(slope, abs=4 * error / np.sqrt(4000) + 0.01 * error)
    assert draws.std() == pytest.approx(error, rel=4 / np.sqrt(2 * 4000) + 0.02)
    np.testing.assert_allclose(np.quantile(draws, [0.025, 0.975]), [found["low"][0], found["high"][0]])


def test_effects_along_a_chain_multiply_and_none_goes_back() -> None:
    data = chain(5000)
    found = average_effect(data, CHAIN, "a", (1.0, 3.0), functions="linear", num_draws=200)
    spread = found["draws"].std("draw")
    assert abs(found["effect"].sel(concept="c") + 2 * 2 * 1.5) < 4 * spread.sel(concept="c")
    back = average_effect(data, CHAIN, "c", (0.0, 1.0), num_draws=20)
    np.testing.assert_array_equal(back["draws"], 0.0)


def test_smooth_functions_find_effects_that_bend() -> None:
    rng = np.random.default_rng(1)
    a = rng.uniform(-2, 2, size=600)
    data = xr.DataArray(
        np.stack([a, a**2 + 0.2 * rng.normal(size=600)], -1),
        dims=("data", "concept"),
        coords={"concept": ["a", "b"]},
    )
    found = average_effect(data, [["a", "b"]], "a", (0.0, 1.5), num_draws=200)
    assert found["low"].item() < 2.25 < found["high"].item()
    assert found["high"].item() - found["low"].item() < 0.5
    straight = average_effect(data, [["a", "b"]], "a", (0.0, 1.5), functions="linear", num_draws=200)
    assert not straight["low"].item() < 2.25 < straight["high"].item()


def test_draws_of_graphs_are_mixed() -> None:
    graphs = np.zeros((2, 3, 3), dtype=int)
    graphs[1, 0, 1] = 1
    found = average_effect(chain(), graphs, "a", (0.0, 1.0), functions="linear", num_draws=100)
    draws = found["draws"].sel(concept="b").values
    assert (draws[::2] == 0).all()
    assert (np.abs(draws[1::2] - 2) < 0.2).all()


def test_conditional_effects_average_over_the_rows_that_are_given() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=500), rng.choice([-1.0, 1.0], size=500)
    c = a * b + 0.1 * rng.normal(size=500)
    data = xr.DataArray(np.stack([a, b, c], -1), dims=("data", "concept"), coords={"concept": ["a", "b", "c"]})
    options: dict[str, Any] = {"outcomes": ["c"], "num_draws": 100}
    graph = [["a", "c"], ["b", "c"]]
    for sign in (-1.0, 1.0):
        found = average_effect(data, graph, "a", (0.0, 1.0), given=b == sign, **options)
        assert found["effect"].item() == pytest.approx(sign, abs=0.1)
    same = average_effect(data, graph, "a", (0.0, 1.0), given=np.flatnonzero(b == 1.0), **options)
    xr.testing.assert_identical(same, found)


def test_rows_without_a_label_are_left_out() -> None:
    data = chain(50)
    data[7, 1] = np.nan
    rest = data.isel(data=[i for i in range(50) if i != 7])
    found, wanted = (average_effect(table, CHAIN, "a", (0.0, 1.0), num_draws=5) for table in (data, rest))
    np.testing.assert_allclose(found["draws"], wanted["draws"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"treatment": "d"}, "'d'"),
        ({"outcomes": ["d"]}, "'d'"),
        ({"values": (0.0, np.inf)}, r"values=\(0.0, inf\); give a list of 2"),
        ({"graph": [["a", "b"], ["b", "a"]]}, "cycle"),
        ({"functions": "cubic"}, "functions='cubic'"),
        ({"prob": 1.0}, "prob"),
        ({"num_draws": 1}, "num_draws=1"),
        ({"data": chain(9)}, "9 rows have all labels"),
        ({"given": np.zeros(400, dtype=bool)}, "0 of those given"),
        ({"given": [400]}, "given=.*; give places of rows below 400"),
        ({"given": "all"}, "given='all'; give places"),
        ({"data": xr.Dataset({"x": 1})}, "name the concepts' values 'label'"),
    ],
)
def test_input_is_checked(change: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"data": chain(), "graph": CHAIN, "treatment": "a", "values": (0.0, 1.0)} | change
    with pytest.raises(DataError, match=message):
        average_effect(asked.pop("data"), asked.pop("graph"), **asked)
