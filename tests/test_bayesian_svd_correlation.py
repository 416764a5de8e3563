"""Correlation of an index with a user's series: coverage, lags, effective times; and the files of such series."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from scipy import signal

from probmodels.bayesian_svd.indices.autoregression import _log_prior
from probmodels.bayesian_svd.indices.correlation import correlate, correlation_sentences, effective_times
from probmodels.bayesian_svd.indices.series import load_series, match_series
from probmodels.errors import DataError, SummaryError

MONTHS = np.arange("1950-01", "2000-01", dtype="datetime64[M]").astype("datetime64[ns]")


def persistent(seed: int, decay: float, count: int, size: int = 300) -> np.ndarray:
    """Series of a first-order autoregressive process, unit variance (count, size)."""
    noise = np.random.default_rng([seed, size]).standard_normal((count, size))
    noise[:, 1:] *= np.sqrt(1 - decay**2)
    return signal.lfilter([1.0], [1.0, -decay], noise, axis=1)


def known(values: np.ndarray, draws: int = 400, start: int = 0) -> xr.DataArray:
    """An index that every draw has alike."""
    time = MONTHS[start : start + len(values)]
    copies = np.broadcast_to(values, (1, draws, len(values)))
    return xr.DataArray(copies, dims=("chain", "draw", "time"), coords={"time": time})


def series(values: np.ndarray, start: int = 0) -> xr.DataArray:
    return xr.DataArray(values, {"time": MONTHS[start : start + len(values)]}, ("time",), name="rain")


def interval(found: xr.Dataset, lag: int = 0) -> np.ndarray:
    return found["correlation"].sel(lag=lag).quantile([0.025, 0.975], ("chain", "draw")).values


@pytest.mark.parametrize(
    ("true", "decays", "size"), [(0.0, (0.9, 0.9), 300), (0.6, (0.9, 0.9), 300), (0.8, (0.0, 0.9), 100)]
)
def test_intervals_of_persistent_series_hold_the_truth(true: float, decays: tuple[float, float], size: int) -> None:
    """Decays may differ: the usual formula, which is for independent series, holds .65 of the last case."""
    x, noise = persistent(0, decays[0], 60, size), persistent(1, decays[1], 60, size)
    y = true * x + np.sqrt(1 - true**2) * noise
    held, naive, width = [], [], []
    for seed, (one, other) in enumerate(zip(x, y, strict=True)):
        low, high = interval(correlate(known(one, 200), series(other), seed=seed))
        held.append(low <= true <= high)
        width.append(high - low)
        z = np.arctanh(np.corrcoef(one, other)[0, 1]) - np.arctanh(true)
        naive.append(abs(z) < 1.96 / np.sqrt(size - 3))
    assert np.mean(width) < 1.1  # of 2
    assert np.mean(held) >= 0.87  # .95 less three binomial sd
    assert np.mean(naive) < 0.75  # what as many independent months would have


@pytest.mark.slow
def test_strong_correlations_of_persistent_series_are_missed_on_both_sides_alike() -> None:
    """A prior that is flat in the correlation draws it towards zero: 9 of 100 were then above their interval."""
    x, noise = persistent(2, 0.9, 200, 100), persistent(3, 0.9, 200, 100)
    y = 0.8 * x + 0.6 * noise
    ends = np.array(
        [interval(correlate(known(a, 200), series(b), seed=i)) for i, (a, b) in enumerate(zip(x, y, strict=True))]
    )
    assert np.sum(ends[:, 1] < 0.8) <= 12
    assert np.sum(ends[:, 0] > 0.8) <= 15
    assert np.mean(np.ptp(ends, axis=1)) < 1.2


def test_white_and_alike_series_have_the_posterior_of_independent_times() -> None:
    """Without persistence it is that of a bivariate normal, near Fisher's transform."""
    x, y = np.random.default_rng(11).standard_normal((2, 300))
    found = correlate(known(x, 4000), series(0.7 * x + 0.7 * y))
    z = np.arctanh(found["correlation"].values.ravel())
    assert z.std() == pytest.approx(1 / np.sqrt(297), rel=0.1)
    assert z.mean() == pytest.approx(np.arctanh(float(found["sample_correlation"].mean())), abs=0.3 / np.sqrt(297))


def test_white_series_have_as_many_times_as_there_are() -> None:
    x, y = np.random.default_rng(0).standard_normal((2, 40, 300))
    sizes = [effective_times(a, b, np.arange(300)) for a, b in zip(x, y, strict=True)]
    assert np.mean(sizes) == pytest.approx(300, rel=0.03)
    x, y = persistent(2, 0.9, 40), persistent(3, 0.9, 40)
    sizes = [effective_times(a, b, np.arange(300)) for a, b in zip(x, y, strict=True)]
    assert np.median(sizes) == pytest.approx(300 * 0.19 / 1.81, rel=0.25)


def test_a_positive_lag_means_that_the_index_leads() -> None:
    x = persistent(4, 0.5, 1, 303)[0]
    found = correlate(known(x[3:]), series(x[:-3] + 0.1 * persistent(5, 0.0, 1, 300)[0]), max_lag=4)
    assert int(found["sample_correlation"].mean(("chain", "draw")).idxmax("lag")) == 3
    np.testing.assert_array_equal(found["num_pairs"], 300 - np.abs(np.arange(-4, 5)))
    assert float(found["correlation"].sel(lag=3).mean()) > 0.95


def test_what_an_index_does_not_know_widens_the_interval() -> None:
    rng = np.random.default_rng(6)
    x = rng.standard_normal(300)
    y = 0.8 * x + 0.6 * rng.standard_normal(300)
    sure = correlate(known(x), series(y))
    blurred = known(x) + rng.normal(size=(1, 400, 1)) * rng.standard_normal(300)  # each draw a pattern of its own
    unsure = correlate(blurred, series(y))
    assert np.ptp(interval(unsure)) > 2 * np.ptp(interval(sure))


def test_trends_are_taken_out_where_that_is_asked() -> None:
    line = np.linspace(0, 8, 300)
    x, y = np.random.default_rng(7).standard_normal((2, 300))
    found = correlate(known(x + line), series(y + line))
    assert float(found["sample_correlation"].mean()) > 0.8
    assert any("the two lines" in sentence for sentence in correlation_sentences(found))
    assert not correlation_sentences(correlate(known(x + line), series(y)))  # a trend of one alone misleads nobody
    low, high = interval(correlate(known(x + line), series(y + line), detrend=True))
    assert low < 0 < high < 0.2
    assert not correlation_sentences(correlate(known(x + line), series(y + line), detrend=True))


def test_months_without_a_partner_are_left_out() -> None:
    x = persistent(8, 0.5, 1)[0]
    keep = np.random.default_rng(0).random(300) < 0.7
    found = correlate(known(x), series(x)[keep])
    assert int(found["num_pairs"][0]) == keep.sum()
    assert float(found["sample_correlation"].min()) == pytest.approx(1.0)
    assert float(found["effective_times"].mean()) < keep.sum()


def test_few_independent_times_and_a_cycle_of_the_year_are_said() -> None:
    x, y = persistent(9, 0.97, 1, 36)[0], persistent(10, 0.97, 1, 36)[0]
    found = correlate(known(x), series(y))
    assert any("independent ones" in sentence for sentence in correlation_sentences(found))
    white, other = np.random.default_rng(1).standard_normal((2, 300))
    assert not correlation_sentences(correlate(known(white), series(other)))
    cyclic = other + np.cos(2 * np.pi * np.arange(300) / 12)
    said = correlation_sentences(correlate(known(white), series(cyclic)))
    assert any("cycle of the year" in sentence for sentence in said)


def test_what_cannot_be_correlated_is_refused() -> None:
    x = np.random.default_rng(2).standard_normal(120)
    with pytest.raises(DataError, match=r"no dates in common: 1990-01 to 1999-12 and 1950-01 to 1959-12"):
        correlate(known(x), series(x, start=480))
    with pytest.raises(DataError, match="have 5 times in common at lag 0; at least 10"):
        correlate(known(x), series(x, start=115))
    with pytest.raises(DataError, match="have 9 times in common at lag -111"):
        correlate(known(x), series(x), max_lag=111)
    with pytest.raises(DataError, match="does not vary"):
        correlate(known(x), series(0 * x + 0.1))
    scattered = series(x)[np.cumsum([0, *(1, 2) * 5, 1])]
    with pytest.raises(DataError, match="how long the two persist cannot be told"):
        correlate(known(x), scattered)
    with pytest.raises(SummaryError, match=r"give \(chain, draw, \.\.\., time\)"):
        correlate(known(x)[0], series(x))
    with pytest.raises(SummaryError, match="max_lag=-1"):
        correlate(known(x), series(x), max_lag=-1)
    yearly = xr.DataArray(x[:40], {"time": MONTHS[::12][:40]}, ("time",), name="rain")
    with pytest.raises(DataError, match="'rain' is yearly, the field monthly"):
        correlate(known(x), yearly)
    numbered = known(x).assign_coords(time=np.arange(120.0))
    with pytest.raises(DataError, match="the field has no dates"):
        correlate(numbered, series(x))


def test_days_are_matched_by_day_and_years_by_year() -> None:
    days = np.arange("2000-01-01", "2000-03-01", dtype="datetime64[D]").astype("datetime64[ns]")
    one = xr.DataArray(np.arange(60.0), {"time": days}, ("time",), name="one")
    np.testing.assert_array_equal(match_series(one, one["time"][5:10], shift=2), np.arange(7.0, 12.0))
    pentads = one[::5]
    np.testing.assert_array_equal(match_series(pentads, pentads["time"][:3], shift=1), [5.0, 10.0, 15.0])
    with pytest.raises(DataError, match="steps of 5 days, the field of 1"):
        match_series(pentads, one["time"])
    winters = xr.DataArray(np.zeros(20), {"time": MONTHS[::12][:20]}, ("time",), name="winters")
    july = xr.DataArray(np.arange(20.0), {"time": MONTHS[6::12][:20]}, ("time",), name="july")
    np.testing.assert_array_equal(match_series(july, winters["time"]), np.arange(20.0))


# -- files ------------------------------------------------------------------------------------------------------------

WIDE = "Year,Jan,Feb,Mar,Apr,May,Jun,Jul,Aug,Sep,Oct,Nov,Dec\n1950,0,1,2,3,4,5,6,7,8,9,10,11\n1951,12,13,,,,,,,,,,\n"


@pytest.mark.parametrize(
    "text",
    [
        "time,pdo\n1950-01,0\n1950-02,1\n1950-03,2\n",
        "# from a server\ndate;pdo\n1950-03;2\n1950-01;0\n1950-02;1\n",
        "time\tpdo\n195001\t0\n195002\t1\n195003\t2\n",
        "year,month,pdo\n1950,1,0\n1950,2,1\n1950,3,2\n",
        "time,pdo\n1950-01-15,0\n1950-02-15,1\n1950-03-15,2\n1950-04-15,\n1950-05-15,NaN\n",
    ],
    ids=["months", "unsorted", "digits", "year and month", "gaps"],
)
def test_layouts_that_are_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "pdo.csv").write_text(text)
    found = load_series(tmp_path / "pdo.csv")
    np.testing.assert_array_equal(found, [0.0, 1.0, 2.0])
    assert [str(t)[:7] for t in found["time"].values] == ["1950-01", "1950-02", "1950-03"]
    assert found.name == "pdo"


def test_a_row_for_each_year(tmp_path: Path) -> None:
    (tmp_path / "pdo.csv").write_text(WIDE)
    found = load_series(tmp_path / "pdo.csv")
    np.testing.assert_array_equal(found, np.arange(14.0))
    assert str(found["time"].values[13])[:7] == "1951-02"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time,pdo\n1950-01,0\n1950-01,1\n", "stand there twice, the first 1950-01-01"),
        ("time,pdo\n1950-02-30,0\n1950-03-30,1\n", "no date of the standard calendar.*360_day"),
        ("time,pdo\n1950.04,0\n1950.12,1\n", "fraction of a year"),
        ("time,pdo\nspring,0\nsummer,1\n", "'spring' is not a date"),
        ("time,pdo\n02.01.1950,0\n03.01.1950,1\n", "is not a date"),
        ("time,pdo\n1950-01,0\n1950-02,warm\n", "'warm' at 1950-02-01 is no number"),
        ("time,pdo\n1950-01,0\n1950-02,inf\n", "1 infinite values"),
        ("time,pdo\n1950-01,0.3\n1950-02,0.5\n1950-03,-99.9\n", r"holds -99.9 1 times.*--missing=-99.9"),
        ("time,pdo,npgo\n1950-01,0,1\n1950-02,1,2\n", "has the columns pdo, npgo; name the one"),
        ("time\n1950-01\n", "holds 1 columns"),
        ("", "cannot be read as CSV"),
        ("time,pdo\n1950-01,0\n", "holds 1 values"),
    ],
    ids=lambda x: x[:20],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "pdo.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        load_series(tmp_path / "pdo.csv")


def test_a_column_and_marks_of_missing_values_may_be_named(tmp_path: Path) -> None:
    (tmp_path / "two.csv").write_text("time,pdo,npgo\n1950-01,0,1\n1950-02,1,-99.9\n1950-03,2,3\n")
    np.testing.assert_array_equal(load_series(tmp_path / "two.csv", column="npgo", missing=[-99.9]), [1.0, 3.0])
    with pytest.raises(DataError, match="no column 'npg'; did you mean 'npgo'"):
        load_series(tmp_path / "two.csv", column="npg")
    with pytest.raises(DataError, match="is no file"):
        load_series(tmp_path / "absent.csv")


# -- the prior --------------------------------------------------------------------------------------------------------


def test_the_prior_has_the_jacobian_of_unlike_decays() -> None:
    """Its density in (A, S) by numerical differentiation, from that in coordinates in which P is the identity."""
    rng = np.random.default_rng(0)

    def process(v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A, S and P of contractions (4,), logs of two standard deviations and Fisher's z."""
        sd, r = np.exp(v[4:6]), np.tanh(v[6])
        p = np.array([[1.0, r], [r, 1.0]]) * np.outer(sd, sd)
        values, vectors = np.linalg.eigh(p)
        root = vectors * np.sqrt(values) @ vectors.T
        a = root @ v[:4].reshape(2, 2) @ np.linalg.inv(root)
        return a, p - a @ p @ a.T, p

    def flat(v: np.ndarray) -> np.ndarray:
        a, s, _ = process(v)
        return np.array([*a.ravel(), s[0, 0], s[1, 1], s[0, 1]])

    apart = []
    for _ in range(20):
        contraction = rng.standard_normal((2, 2))
        contraction *= rng.uniform(0.3, 0.97) / np.linalg.norm(contraction, 2)
        v = np.array([*contraction.ravel(), *(0.5 * rng.standard_normal(2)), rng.uniform(-1.2, 1.2)])
        steps = 1e-6 * np.eye(7)
        jacobian = np.stack([(flat(v + e) - flat(v - e)) / 2e-6 for e in steps], axis=1)
        want = -0.5 * np.linalg.slogdet(np.eye(2) - contraction @ contraction.T)[1] - np.linalg.slogdet(jacobian)[1]
        apart.append(float(_log_prior(*process(v))) - want)
    np.testing.assert_allclose(apart, apart[0], atol=1e-5)  # equal up to a constant
