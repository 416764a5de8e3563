"""Indices that are modes of a region, and published indices in terms of the modes of a field."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import signal

from probmodels import run_mcmc
from probmodels.bayesian_svd import make_problem
from probmodels.bayesian_svd.indices import outputs
from probmodels.bayesian_svd.indices.decadal import _regressed, mode_index, published_index
from probmodels.bayesian_svd.indices.outputs import index_findings, index_sentences, indices_to_folder
from probmodels.bayesian_svd.indices.series import load_series, match_series
from probmodels.datasets.sst import load_sst
from probmodels.errors import DataError, SummaryError

LAT, LON = np.arange(22.5, 60.0, 5.0), np.arange(152.5, 250.0, 5.0)
MONTHS = np.arange("1960-01", "1985-01", dtype="datetime64[M]").astype("datetime64[ns]")


def persistent(seed: int, decay: float, size: int) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(size)
    noise[1:] *= np.sqrt(1 - decay**2)
    return signal.lfilter([1.0], [1.0, -decay], noise)


def horseshoe() -> tuple[np.ndarray, np.ndarray]:
    """A pattern that is cool in the middle and warm at the coast, and one across it, (lat, lon)."""
    y, x = np.meshgrid(LAT, LON, indexing="ij")
    centre = np.exp(-(((x - 182) / 22) ** 2) - ((y - 38) / 9) ** 2)
    coast = np.exp(-(((x - 235) / 12) ** 2) - ((y - 45) / 18) ** 2)
    first, other = 0.8 * coast - centre, np.exp(-(((x - 200) / 40) ** 2)) * np.sin((y - 40) / 12)
    size = np.cos(np.deg2rad(y))
    return first, other * np.sqrt((size * first**2).sum() / (size * other**2).sum())


def made_up(second: float, seed: int = 0) -> tuple[xr.DataArray, np.ndarray]:
    """A field whose leading pattern is the horseshoe, and the series of that; ``second`` is the size of the other."""
    first, other = horseshoe()
    series = np.stack([persistent(seed + 10, 0.8, len(MONTHS)), second * persistent(seed + 20, 0.8, len(MONTHS))], 1)
    third = 0.2 * persistent(seed + 30, 0.5, len(MONTHS))[:, None, None] * np.cos(LON / 9) * np.ones((len(LAT), 1))
    values = np.tensordot(series, np.stack([first, other]), 1) + third
    values += 0.15 * np.random.default_rng(seed).standard_normal(values.shape)
    coords = {"time": MONTHS, "lat": LAT, "lon": LON}
    return xr.DataArray(values, coords, ("time", "lat", "lon"), attrs={"units": "degC"}), series[:, 0]


def inferred(data: xr.DataArray, rank: int = 3, draws: int = 150) -> xr.DataTree:
    problem = make_problem(data, rank=rank, series="ar1", num_length_scales=4, tail=1e-4)
    sampling = {"num_samples": draws, "warmup_steps": 100, "num_chains": 2, "chain_method": "sequential"}
    return run_mcmc(problem, **sampling, seed=0, progress=False).tree


@pytest.fixture(scope="module")
def made() -> tuple[xr.DataTree, np.ndarray]:
    data, series = made_up(0.4)
    return inferred(data), series


def test_the_index_is_the_series_of_the_leading_pattern(made: tuple[xr.DataTree, np.ndarray]) -> None:
    tree, series = made
    found = mode_index(tree, "pdo", base="1960-1979")
    mean = found["signal"].mean(("chain", "draw")).sel(index="pdo")
    assert np.corrcoef(mean, series)[0, 1] > 0.98  # the sign too
    base = found["signal"].sel(time=slice("1960", "1979"))
    np.testing.assert_allclose(base.mean("time"), 0, atol=1e-9)
    np.testing.assert_allclose(base.std("time", ddof=1), 1, atol=1e-9)
    assert int(found["base_times"][0]) == 240
    pattern = found["pattern"].sel(index="pdo")
    truth = horseshoe()[0] * series[:240].std(ddof=1)
    at = xr.DataArray(truth, {"lat": LAT, "lon": LON}, ("lat", "lon")).sel(lat=pattern["lat"], lon=pattern["lon"])
    assert float(abs(pattern - at).max()) < 0.15
    assert float(found["pattern_agreement"][0]) > 0.98
    assert not any("settle which pattern" in sentence for sentence in index_sentences(found))


def test_modes_that_explain_alike_widen_the_index_and_are_said() -> None:
    data, _ = made_up(1.0)
    found, sure = mode_index(inferred(data), "pdo"), mode_index(inferred(made_up(0.4)[0]), "pdo")
    assert float(found["pattern_agreement"][0]) < 0.9
    assert any("settle which pattern" in sentence for sentence in index_sentences(found))
    spread, other = (float(x["signal"].std(("chain", "draw")).mean()) for x in (found, sure))
    assert spread > 3 * other


def test_the_mean_of_the_region_may_be_taken_out(made: tuple[xr.DataTree, np.ndarray]) -> None:
    data, series = made_up(0.4)
    warming = 1.5 * persistent(40, 0.9, len(MONTHS))
    tree = inferred(data + xr.DataArray(warming, dims="time"), rank=4)
    means = [mode_index(tree, "pdo", remove_mean=x)["signal"].mean(("chain", "draw"))[0] for x in (False, True)]
    kept, removed = (abs(np.corrcoef(x, series)[0, 1]) for x in means)
    assert removed > 0.97 > kept
    assert any("global mean is not taken out" in sentence for sentence in index_sentences(mode_index(tree, "pdo")))


def test_npgo_is_the_second_mode() -> None:
    data, _ = made_up(0.6)
    tree = inferred(data, rank=4)
    found = mode_index(tree, "npgo")
    other = made_up(0.6)[0]
    field = (other * xr.DataArray(horseshoe()[1], dims=("lat", "lon"))).mean(("lat", "lon"))
    mean = found["signal"].mean(("chain", "draw")).sel(index="npgo")
    assert abs(np.corrcoef(mean, field)[0, 1]) > 0.8
    assert float(found["variance_share"][0]) < float(mode_index(tree, "pdo")["variance_share"][0])


def test_what_has_no_index_is_refused(made: tuple[xr.DataTree, np.ndarray]) -> None:
    tree, _ = made
    with pytest.raises(SummaryError, match="name='amo'"):
        mode_index(tree, "amo")
    with pytest.raises(DataError, match="base="):
        mode_index(tree, "pdo", base="never")
    found = mode_index(tree, "pdo", base="1984")
    assert found.attrs["base_period"].startswith("all times, since 12")
    assert any("all times" in sentence for sentence in index_sentences(found))
    few = inferred(made_up(0.4)[0], rank=2, draws=4)
    with pytest.raises(SummaryError, match="2 modes of the field are too few"):
        mode_index(few, "pdo")
    bare = tree.copy()
    bare["constant_data"] = xr.DataTree(tree["constant_data"].to_dataset().assign_coords(time=np.arange(len(MONTHS))))
    with pytest.raises(SummaryError, match="no dates"):
        mode_index(bare, "pdo")
    west = made_up(0.4)[0].isel(lon=slice(0, 12))
    with pytest.raises(SummaryError, match=r"the sign of pdo .* no cells"):
        mode_index(inferred(west, draws=4), "pdo")


# -- published series -------------------------------------------------------------------------------------------------


def test_a_regression_with_persistent_residuals_holds_its_coefficients() -> None:
    held, found = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        columns = np.stack([np.ones(150), persistent(seed + 500, 0.9, 150)], 1)
        target = columns @ [0.3, 1.0] + 0.5 * persistent(seed + 900, 0.8, 150)
        draws = [_regressed(columns, target, np.ones(149), rng) for _ in range(80)]
        low, high = np.quantile([x[0][1] for x in draws], [0.025, 0.975])
        held.append(low <= 1.0 <= high)
        found.append([np.mean([x[1] for x in draws]), np.mean([x[2] for x in draws])])
    assert 0.88 <= np.mean(held) <= 1.0
    np.testing.assert_allclose(np.mean(found, 0), [0.5, 0.8], atol=0.08)


def test_a_published_index_is_predicted_with_its_residual(made: tuple[xr.DataTree, np.ndarray]) -> None:
    tree, series = made
    values = 0.2 + 0.9 * series + 0.3 * persistent(77, 0.6, len(MONTHS))
    file = xr.DataArray(values, {"time": MONTHS}, ("time",), name="theirs")
    found = published_index(tree, file, fitted="1960-1974")
    assert int(found["num_elsewhere"][0]) == 120
    assert float(found["held_elsewhere"][0]) > 0.88
    assert float(found["correlation_elsewhere"][0]) > 0.9
    assert float(found["residual_sd"].mean()) == pytest.approx(0.3, abs=0.06)
    spread = found["published"].std(("chain", "draw")).mean()
    assert float(spread) > 2 * float(found["signal"].std(("chain", "draw")).mean())
    altered = file.copy()
    altered.loc[{"time": slice("1975", None)}] -= 3.0
    again = published_index(tree, altered, fitted="1960-1974")
    np.testing.assert_array_equal(again["signal"], found["signal"])  # what lies outside is not used
    assert any("intervals are too narrow" in sentence for sentence in index_sentences(again))
    assert not any("intervals are too narrow" in sentence for sentence in index_sentences(found))


def test_too_few_published_values_are_refused(made: tuple[xr.DataTree, np.ndarray]) -> None:
    tree, series = made
    file = xr.DataArray(series, {"time": MONTHS}, ("time",), name="theirs")
    with pytest.raises(DataError, match=r"24 values of 'theirs' lie in 1960-01/1961-12 .* 3 modes need 25"):
        published_index(tree, file, fitted="1960-1961")
    with pytest.raises(DataError, match="no dates in common"):
        published_index(tree, file.assign_coords(time=file["time"] + np.timedelta64(20000, "D")), fitted="1960-1974")


def test_a_published_index_that_the_modes_hardly_tell_fails(made: tuple[xr.DataTree, np.ndarray]) -> None:
    tree, series = made
    unlike = xr.DataArray(0.2 * series + persistent(78, 0.6, len(MONTHS)), {"time": MONTHS}, ("time",), name="pdo")
    for fitted in ("1960-1974", "1960-1984"):  # judged by values that were not used, and by the fit alone
        bad = [x for x in index_findings(published_index(tree, unlike, fitted=fitted)) if x.harmful]
        assert len(bad) == 1
        assert "modes and published values hardly agree" in bad[0].verdict
        alike = unlike.copy(data=series + 0.4 * unlike.values)
        assert not any(x.harmful for x in index_findings(published_index(tree, alike, fitted=fitted)))
    constant = unlike.where(unlike["time"] >= np.datetime64("1975-01"), 1.0)
    with pytest.raises(DataError, match="does not vary"):
        published_index(tree, constant, fitted="1960-1974")


# -- all that the command writes --------------------------------------------------------------------------------------


def test_all_kinds_come_together(made: tuple[xr.DataTree, np.ndarray], tmp_path: Path) -> None:
    tree, series = made
    lines = "\n".join(f"{str(t)[:7]},{v:.4f}" for t, v in zip(MONTHS, series, strict=True))
    (tmp_path / "theirs.csv").write_text(f"time,theirs\n{lines}\n")
    file = tmp_path / "theirs.csv"
    asked = {"boxes": ["west=30,45,170,195"], "modes": ["pdo"], "published": file, "fitted": "1960-1974"}
    said = indices_to_folder(tree, tmp_path / "out", **asked, series=file, max_lag=2)
    assert {x.verdict.split(":")[0] for x in said} >= {"pdo", "published theirs"}
    read = np.genfromtxt(tmp_path / "out" / "correlations.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    assert len(read) == 5 * (2 + 1 + 2)  # lags by estimands of the box, of pdo, of the published one
    chosen = read[(read["index"] == "pdo") & (read["lag"] == 0)]
    assert chosen["mean"][0] > 0.95
    west = read[(read["index"] == "west") & (read["lag"] == 0) & (read["estimand"] == "field")]
    assert west["upper"][0] < 0  # cool where the index is positive
    assert {"indices.csv", "indices.nc", "indices.png", "correlations.png"} <= {
        x.name for x in (tmp_path / "out").iterdir()
    }


def test_the_command_and_its_files_say_where_indices_hardly_agree(
    made: tuple[xr.DataTree, np.ndarray], tmp_path: Path
) -> None:
    tree, series = made
    unlike = 0.2 * series + persistent(78, 0.6, len(MONTHS))
    for name, values in (("pdo", unlike), ("rain", unlike), ("alike", series)):
        lines = "\n".join(f"{str(t)[:7]},{v:.4f}" for t, v in zip(MONTHS, values, strict=True))
        (tmp_path / f"{name}.csv").write_text(f"time,{name}\n{lines}\n")

    def failed(**asked: object) -> list[str]:
        found = indices_to_folder(tree, tmp_path / "out", modes=["pdo"], **asked)
        return [x.verdict for x in found if x.harmful]

    found = failed(published=tmp_path / "pdo.csv", fitted="1960-1974")
    assert [x.split(":")[0] for x in found] == ["pdo", "published pdo"]  # by definition, and in terms of modes
    with xr.open_datatree(tmp_path / "out" / "indices.nc") as written:
        assert "hardly agree" in written.attrs["verdict"]
        assert written["published"].attrs["verdict"].startswith("FAILED")
    table = pd.read_csv(tmp_path / "out" / "indices.csv")
    assert set(table["verdict"]) == {"FAILED"}
    # an index that is not the published one is compared, and not judged
    found = failed(published=tmp_path / "rain.csv", fitted="1960-1974")
    assert [x.split(":")[0] for x in found] == ["published rain"]
    table = pd.read_csv(tmp_path / "out" / "indices.csv")
    assert set(table[table["index"] == "pdo"]["verdict"]) == {"passed"}
    assert not failed(published=tmp_path / "alike.csv", fitted="1960-1974")
    with xr.open_datatree(tmp_path / "out" / "indices.nc") as written:
        assert written.attrs["verdict"] == "passed"
    assert not failed(series=tmp_path / "pdo.csv")  # whose correlation is what is asked for


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fitted": "1960-1970"}, "fitted.*not used with no published series"),
        ({"max_lag": 3}, "max_lag.*not used with no series"),
        ({"base": "1960-1970"}, "base.*not used with no modes"),
        ({"modes": ["pdo"], "effects": False}, "effects.*not used with no boxes"),
        ({"modes": ["amo"]}, "modes"),
        ({"nope": 1}, "unknown option 'nope'"),
    ],
)
def test_options_that_are_not_used_are_refused(
    made: tuple[xr.DataTree, np.ndarray], tmp_path: Path, options: dict, message: str
) -> None:
    with pytest.raises(SummaryError, match=message):
        indices_to_folder(made[0], tmp_path, **options)


def _file(folder: Path, times: np.ndarray, step: int = 1) -> Path:
    lines = "\n".join(f"{str(t)[:7]},{(7 * i) % 5}" for i, t in enumerate(times[::step]))
    (folder / "theirs.csv").write_text(f"time,theirs\n{lines}\n")
    return folder / "theirs.csv"


LATER = MONTHS + np.timedelta64(20000, "D")


@pytest.mark.parametrize(
    ("options", "times", "step", "message"),
    [
        ({"series": True}, LATER, 1, "no dates in common"),
        ({"series": True}, MONTHS, 12, "is yearly, the field monthly"),
        ({"series": True, "max_lag": 1200}, MONTHS, 1, "times in common at lag"),
        ({"series": True}, MONTHS[:8], 1, "8 times in common at lag 0"),
        ({"series": True, "column": "nope"}, MONTHS, 1, "no column 'nope'"),
        ({"published": True, "fitted": "1960-1961"}, MONTHS, 1, "modes need"),
        ({"published": True, "fitted": "1960-1974"}, LATER, 1, "no dates in common"),
        ({"published": True}, MONTHS, 1, "needs the period"),
        ({"modes": ["pdo"], "base": "soon"}, MONTHS, 1, "base"),
        ({"modes": ["pdo"], "boxes": ["there=1,2,3,4"]}, MONTHS, 1, "cover 0%"),
        ({"modes": ["npgo"], "boxes": ["west=30,45,170,195"]}, MONTHS, 1, "at least 4"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_computed_or_written(
    made: tuple[xr.DataTree, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict,
    times: np.ndarray,
    step: int,
    message: str,
) -> None:
    for name in ("box_indices", "mode_index", "published_index"):
        monkeypatch.setattr(outputs, name, lambda *_, **__: pytest.fail("computed before all was checked"))
    file = _file(tmp_path, times, step)
    asked = {name: file if value is True else value for name, value in options.items()}
    asked.setdefault("boxes", ["west=30,45,170,195"])
    with pytest.raises((DataError, SummaryError), match=message):
        indices_to_folder(made[0], tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_the_folder_is_refused(made: tuple[xr.DataTree, np.ndarray], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(SummaryError, match="cannot make the folder"):
        indices_to_folder(made[0], tmp_path / "out", boxes=["west=30,45,170,195"])


@pytest.mark.slow
def test_the_decadal_oscillation_of_the_pacific(test_data: Callable[[str], Path]) -> None:
    field = load_sst(str(test_data("sst/ersst_v5_north_pacific_1950_2019.nc")))
    noaa = load_series(test_data("sst/pdo_ncei.csv"))
    tree = inferred(field, rank=10, draws=60)
    found = published_index(tree, noaa, fitted="1950-1993")
    assert float(found["correlation_elsewhere"][0]) > 0.975
    assert float(found["held_elsewhere"][0]) > 0.9
    own = mode_index(tree, "pdo", remove_mean=True)["signal"].mean(("chain", "draw"))[0]
    assert np.corrcoef(own, match_series(noaa, field["time"]))[0, 1] > 0.93
