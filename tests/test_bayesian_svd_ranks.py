"""Number of modes: the conditional of what is missing, hidden blocks, scores, the choice, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from probmodels.bayesian_svd.gaps.blocks import hide_blocks
from probmodels.bayesian_svd.gaps.quick import Table, quick_fit, shrunken
from probmodels.bayesian_svd.gaps.rank_outputs import draw_ranks, write_ranks
from probmodels.bayesian_svd.gaps.ranks import _Filled, _scored, _sentence, compare_ranks
from probmodels.bayesian_svd.gaps.states import States
from probmodels.bayesian_svd.noise import Noise, unfiltered_by
from probmodels.errors import DataError


def field(rank: int = 2, times: int = 150, seed: int = 0, strength: float = 3.0) -> xr.DataArray:
    """White noise on a grid of 6 x 8 cells and a few strong modes of persistent series; months."""
    rng = np.random.default_rng(seed)
    cells = 48
    patterns = np.linalg.qr(rng.standard_normal((cells, rank)))[0] * strength * np.arange(rank, 0, -1)
    series = unfiltered_by(rng.standard_normal((rank, times)), np.full(times - 1, 0.7))
    values = patterns @ series + rng.standard_normal((cells, times)) + 10
    months = (np.datetime64("1990-01", "M") + np.arange(times)).astype("datetime64[ns]")
    coords = {"time": months, "lat": np.arange(0.0, 12.0, 2.0), "lon": np.arange(160.0, 176.0, 2.0)}
    return xr.DataArray(values.T.reshape(times, 6, 8), coords, ("time", "lat", "lon"))


def test_what_is_missing_has_its_exact_conditional() -> None:
    rng = np.random.default_rng(0)
    n, times, variance, decay = 5, 7, 0.7, np.array([0.9, 0.3])
    root = rng.standard_normal((n, n))
    values, vectors = np.linalg.eigh(root @ root.T + np.eye(n))
    noise = Noise(vectors, values, 0.6, "matern12", 1.0, np.ones(n))
    steps = np.array([1.0, 1.0, 2.0, 1.0, 1.0, 1.0])
    lag = np.abs(np.subtract.outer(*[np.concatenate([[0.0], np.cumsum(steps)])] * 2))
    modes = rng.standard_normal((n, 2))
    dense = variance * np.kron((vectors * values) @ vectors.T, 0.6**lag)
    for mode, rho in zip(modes.T, decay, strict=True):
        dense += np.kron(np.outer(mode, mode), rho**lag)
    seen = rng.random((n, times)) > 0.3
    states = States(seen, steps, noise.whitener, 0.6**steps, noise.whitener @ modes, decay, variance)
    data = rng.standard_normal((n, times))
    mean, _, moments, spread, _ = states.conditional(np.where(seen, data, 0.0), rng)

    there = seen.ravel()
    gain = dense[np.ix_(~there, there)] @ np.linalg.inv(dense[np.ix_(there, there)])
    conditional = dense[np.ix_(~there, ~there)] - gain @ dense[np.ix_(there, ~there)]
    np.testing.assert_allclose(mean.ravel()[~there], gain @ data.ravel()[there], rtol=1e-9)
    np.testing.assert_allclose(spread.ravel()[~there], conditional.diagonal(), rtol=1e-9)
    full = np.zeros((n * times, n * times))
    full[np.ix_(~there, ~there)] = conditional
    expected = np.einsum("itjs,ts->ij", full.reshape(n, times, n, times), np.linalg.inv(0.6**lag))
    np.testing.assert_allclose(moments, noise.whitener @ expected @ noise.whitener.T, atol=1e-9)
    draws = np.array([states.conditional(np.where(seen, data, 0.0), rng)[4][~seen] for _ in range(1500)])
    np.testing.assert_allclose(np.cov(draws.T), conditional, atol=6 * conditional.max() / np.sqrt(1500))


def test_variances_are_shrunken_to_what_the_axes_hold() -> None:
    rng = np.random.default_rng(1)
    n, times, strength = 100, 400, 4.0
    values = rng.standard_normal((n, times))
    values[0] += np.sqrt(strength) * rng.standard_normal(times)
    spectrum, vectors = np.linalg.eigh(values @ values.T / times)
    along = strength * vectors[0, -1] ** 2  # variance of the signal along the axis found
    assert shrunken(spectrum[-1:], n, times)[0] == pytest.approx(along, rel=0.15)
    assert (shrunken(spectrum[:-1], n, times) == 0).all()  # noise alone


def test_noise_without_modes_gives_none() -> None:
    rng = np.random.default_rng(2)
    values = rng.standard_normal((30, 200))
    seen = np.ones_like(values, dtype=bool)
    seen[5:9, 20:40] = False
    distance = np.abs(np.subtract.outer(np.arange(30.0), np.arange(30.0)))
    table = Table(np.where(seen, values, 0.0), seen, np.ones((200, 1)), np.ones(199), distance)
    fit = quick_fit(table, 3, correlated=False, rng=rng)
    assert fit.spectrum[0] < fit.edge
    assert np.abs(fit.mean[~seen]).max() < 0.5  # the mean of each cell
    assert fit.variance[~seen] == pytest.approx(1.0, abs=0.1)
    assert (fit.variance[seen] == 0).all()
    np.testing.assert_array_equal(fit.mean[seen], values[seen])


@pytest.fixture(scope="module")
def comparison() -> xr.Dataset:
    found: xr.Dataset = compare_ranks(field(), [1, 2, 3, 4], noise="white", progress=False)
    return found


def test_the_right_number_is_chosen_and_said(comparison: xr.Dataset) -> None:
    assert comparison.attrs["chosen"] == 2
    sentence = comparison.attrs["sentence"]
    assert sentence.startswith("With white noise, 2 modes fill ")
    assert "2 are chosen" in sentence
    np.testing.assert_array_equal(comparison["num_modes"], [1, 2, 2, 2])
    assert float(comparison["rmse"].sel(rank=1)) > 1.02 * float(comparison["rmse"].sel(rank=2))
    assert float(comparison["coverage"].sel(rank=2)) == pytest.approx(0.95, abs=0.03)
    assert float(comparison["crps"].sel(rank=2)) == pytest.approx(
        0.564 * float(comparison["rmse"].sel(rank=2)), rel=0.05
    )


def test_standard_errors_are_of_blocks(comparison: xr.Dataset) -> None:
    square, size = comparison["square"].values, comparison["size"].values
    np.testing.assert_allclose(np.sqrt(square.sum(1) / size.sum()), comparison["rmse"])
    rng = np.random.default_rng(0)
    places = rng.integers(len(size), size=(2000, len(size)))
    means = square[0][places].sum(1) / size[places].sum(1)
    assert float(comparison["rmse_se"][0]) == pytest.approx(np.sqrt(means).std(), rel=0.1)


def test_numbers_that_blocks_do_not_tell_apart_are_said() -> None:
    """Two numbers of one error: the smaller is chosen; a third that is worse in all blocks alike is told apart."""
    rng = np.random.default_rng(0)
    count, size = 40, 25
    block = np.repeat(np.arange(count), size)
    truth = rng.standard_normal(count * size)
    noise = rng.standard_normal(truth.shape)
    means = np.stack([truth + scale * noise for scale in (1.5, 1.0, 1.0)])
    means[2] += 0.03 * rng.standard_normal(truth.shape)
    sds = np.stack([np.full(truth.shape, scale) for scale in (1.5, 1.0, 1.0)])
    part = _Filled(truth, block, means, sds, np.array([2, 3, 4]), np.ones((3, 6)), np.ones(3))
    found = _scored([part, part._replace(block=block[::-1])], [2, 3, 4])
    found.attrs |= {"noise": "white", "units": "1"}
    assert found.sizes["block"] == 2 * count  # blocks of the two repeats are others
    assert found.attrs["chosen"] == 3
    np.testing.assert_array_equal(found["alike"], [False, True, True])
    best = found.attrs["best"]
    assert f"do not tell {7 - best} apart from {best}" in _sentence(found, (6, 3, 4))
    alone = _scored([part._replace(num_modes=np.array([2, 3, 3]))], [2, 3, 4])  # the fourth mode is in the noise
    alone.attrs |= {"noise": "white", "units": "1"}
    np.testing.assert_array_equal(alone["alike"], [False, True, False])
    assert "All other numbers are worse by more than two standard errors" in _sentence(alone, (6, 3, 4))


def test_values_and_intervals_may_prefer_other_numbers() -> None:
    """The least error is of the first, but its intervals are much too wide."""
    rng = np.random.default_rng(1)
    block = np.repeat(np.arange(30), 20)
    truth = rng.standard_normal(600)
    means = truth + np.array([[0.5], [0.55]]) * rng.standard_normal(600)
    sds = np.stack([np.full(600, 5.0), np.full(600, 0.55)])
    found = _scored([_Filled(truth, block, means, sds, np.array([1, 2]), np.ones((2, 4)), np.ones(2))], [1, 2])
    found.attrs |= {"noise": "correlated", "units": "degC"}
    assert (found.attrs["best_rmse"], found.attrs["best_crps"]) == (1, 2)
    sentence = _sentence(found, (6, 3, 4))
    assert "error is least with 1, which is best where the filled values alone count" in sentence
    assert "CRPS is least with 2" in sentence


def test_the_largest_rank_of_all_is_said_to_be_so() -> None:
    found = compare_ranks(field(rank=4), [1, 2], noise="white", progress=False)
    assert "compare more than 2" in found.attrs["sentence"]


def test_correlated_noise_is_not_taken_for_modes() -> None:
    rng = np.random.default_rng(4)
    data = field(rank=1, seed=4)
    lat, lon = (x.ravel() for x in np.meshgrid(np.arange(6), np.arange(8), indexing="ij"))
    root = np.linalg.cholesky(np.exp(-np.hypot(np.subtract.outer(lat, lat), np.subtract.outer(lon, lon)) / 2))
    data = data + (rng.standard_normal((150, 48)) @ root.T).reshape(data.shape)
    found = compare_ranks(data, [1, 2, 3], progress=False)
    white = compare_ranks(data, [1, 2, 3], noise="white", progress=False)
    assert found.attrs["chosen"] == 1
    assert int(white["num_modes"][-1]) == 3  # the control: white noise needs modes for what is local
    assert float(found["crps"].min()) < float(white["crps"].min())


def test_blocks_are_boxes_of_a_grid_and_neighbours_without_one() -> None:
    lat, lon = (x.ravel() for x in np.meshgrid(np.arange(6), np.arange(8), indexing="ij"))
    data = xr.DataArray(np.zeros((48, 60)), dims=("cell", "time"))
    grid = data.assign_coords(lat_index=("cell", lat), lon_index=("cell", lon))
    seen = np.ones((48, 60), dtype=bool)
    places = np.stack([lat, lon], 1)
    distance = np.hypot(np.subtract.outer(lat, lat), np.subtract.outer(lon, lon))
    for array in (grid, data):
        blocks = hide_blocks(array.to_dataset(name="data"), seen, places, (5, 2, 3), 0.2, 1, 0)
        assert (blocks >= 0).mean() == pytest.approx(0.2, abs=0.02)
        assert ((blocks < 0).sum(1) >= 0.4 * 60).all()
        whole = [b for b in range(blocks.max() + 1) if (blocks == b).sum() == 5 * 6]
        assert len(whole) > 3
        for number in whole:
            cells, times = np.nonzero(blocks == number)
            assert np.ptp(times) == 4
            assert np.ptp(lat[cells]) <= (1 if array is grid else 3)
            assert distance[np.ix_(cells, cells)].max() <= 4.0


def test_what_is_missing_is_never_scored() -> None:
    seen = np.random.default_rng(0).random((48, 60)) > 0.3
    data = xr.Dataset({"data": (("cell", "time"), np.zeros((48, 60)))})
    blocks = hide_blocks(data, seen, np.arange(48.0)[:, None], (5, 2, 2), 0.2, 1, 0)
    assert (blocks[~seen] == -1).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block": (200, 1, 1)}, "150 times, of which a block may have 75"),
        ({"block": (3, 5, 2)}, "6 cells along latitude"),
        ({"block": (3, 2, 9)}, "8 cells along longitude"),
        ({"block": (75, 3, 4)}, "at least 10 are needed"),
        ({"share": 0.001}, "at least 10 are needed"),
        ({"share": 0.0}, "share=0.0"),
        ({"share": 1.0}, "share=1.0"),
        ({"ranks": [60]}, "rank=60 is out of range"),
        ({"ranks": []}, "ranks="),
        ({"ranks": [0]}, "ranks"),
        ({"noise": "red"}, "noise='red'"),
        ({"repeats": 0}, "repeats=0"),
        ({"block": (3, 2)}, "block"),
    ],
)
def test_what_cannot_be_compared_is_refused_first(
    options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("refused too late")

    monkeypatch.setattr("probmodels.bayesian_svd.gaps.ranks.quick_fit", never)
    with pytest.raises(DataError, match=words):
        compare_ranks(field(), **{"ranks": [1, 2], "progress": False, **options})


def test_the_figure_shows_errors_and_variances_beyond_the_choice(comparison: xr.Dataset) -> None:
    left, right = draw_ranks(comparison).axes
    assert [line.get_label() for line in left.lines if "least" in str(line.get_label())] == ["least: 2"]
    labels = {str(line.get_label()): line for line in right.lines}
    assert np.asarray(labels["the 2 chosen"].get_ydata()).min() > float(comparison["edge"][-1])
    beyond = np.asarray(labels["beyond them"].get_ydata())
    assert len(beyond) >= 5
    assert beyond.max() < float(comparison["edge"][-1])


def test_what_is_written_can_be_read_again(comparison: xr.Dataset, tmp_path: Path) -> None:
    text = write_ranks(comparison, tmp_path / "out")
    assert len(text.splitlines()) == 2 + comparison.sizes["rank"]
    with xr.open_dataset(tmp_path / "out" / "ranks.nc") as found:
        xr.testing.assert_allclose(found[["rmse", "spectrum"]], comparison[["rmse", "spectrum"]])
        assert found.attrs["chosen"] == comparison.attrs["chosen"]
    lines = (tmp_path / "out" / "ranks.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["rank", "1", "2", "3", "4"]
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write"):
        write_ranks(comparison, tmp_path / "file" / "below")
