"""Maps of curvilinear grids: their cells cover the globe once, and results keep the grid that they came from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.path import Path as Outline

from probmodels import run_mcmc
from probmodels.bayesian_svd import make_problem, write_outputs
from probmodels.bayesian_svd.grids import to_cells, to_grid
from probmodels.bayesian_svd.maps import draw_map, grid_of_maps, stipple
from probmodels.bayesian_svd.meshes import cell_corners, mesh_extent, mesh_polygons
from probmodels.datasets.regions import arrange_longitudes
from probmodels.datasets.sst import load_sst

CHECK = """
import sys
from compliance_checker.runner import CheckSuite, ComplianceChecker
CheckSuite.load_all_available_checkers()
passed, errors = ComplianceChecker.run_checker(sys.argv[1], ["cf:1.11"], 0, "normal", output_filename="-")
sys.exit(not passed or errors)
"""


def rotated(lat: np.ndarray, lon: np.ndarray, tilt: float = 50.0, turn: float = 30.0) -> tuple[np.ndarray, np.ndarray]:
    """Places of a grid of latitudes and longitudes whose pole is tilted, longitudes in one piece."""
    phi, lam = np.meshgrid(np.deg2rad(lat), np.deg2rad(lon), indexing="ij")
    x, y, z = np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)
    cos, sin = np.cos(np.deg2rad(tilt)), np.sin(np.deg2rad(tilt))
    x, z = cos * x - sin * z, sin * x + cos * z
    east = np.rad2deg(np.arctan2(y, x)) + turn
    west = arrange_longitudes(east.ravel())[1][0]
    return np.rad2deg(np.arcsin(np.clip(z, -1, 1))), west + (east - west + 1e-4) % 360 - 1e-4


GLOBES = {
    "rotated": rotated(np.arange(-87.0, 88, 6), np.arange(0.0, 360, 6)),
    "a pole in a cell": rotated(np.arange(-87.0, 88, 6), np.arange(0.0, 360, 6), tilt=51.3, turn=-140.0),
    "a pole at a corner": rotated(np.arange(-87.0, 88, 6), np.arange(3.0, 363, 6), tilt=48.0),
    "not tilted": rotated(np.arange(-85.0, 86, 10), np.arange(5.0, 365, 10), tilt=0.0),
}


@pytest.mark.parametrize("name", list(GLOBES))
def test_cells_cover_the_globe_once(name: str) -> None:
    lat, lon = GLOBES[name]
    everywhere = np.ones(lat.shape, dtype=bool)
    west, east, south, north = extent = mesh_extent(lat, lon, everywhere)
    assert east - west == pytest.approx(360)
    assert (south, north) == (-90, 90)
    polygons, place = mesh_polygons(lat, lon, everywhere, extent)
    assert set(place) == set(range(lat.size))
    rng = np.random.default_rng(0)
    points = np.stack([rng.uniform(west, east, 1500), rng.uniform(-90, 90, 1500)], axis=1)
    held = np.zeros((len(points), lat.size), dtype=int)
    for polygon, at in zip(polygons, place, strict=True):
        held[:, at] |= Outline(polygon).contains_points(points)
    count = held.sum(axis=1)
    # Edges of cells are drawn straight in longitude and latitude, where great circles are not: near poles a few differ.
    assert np.mean(count == 1) > 0.98
    assert np.mean(count == 0) < 0.02


def test_corners_of_a_rectangular_grid_are_half_way() -> None:
    lat, lon = np.meshgrid(np.arange(-20.0, 21, 1), np.arange(176.0, 190, 1), indexing="ij")
    corner_lat, corner_lon = cell_corners(lat, lon)
    np.testing.assert_allclose(corner_lat[:, 3], np.arange(-20.5, 21, 1), atol=2e-3)
    np.testing.assert_allclose(corner_lon[20] % 360, np.arange(175.5, 190, 1), atol=2e-3)
    lat[:2, :2] = np.nan
    gone, _ = cell_corners(lat, lon)
    assert np.isnan(gone[:2, :2]).all()
    np.testing.assert_allclose(gone[3:], corner_lat[3:])


def test_a_cell_on_the_frame_is_drawn_on_both_sides() -> None:
    lat, lon = np.meshgrid(np.arange(-10.0, 11, 10), np.arange(0.0, 360, 10), indexing="ij")
    shown = np.zeros(lat.shape, dtype=bool)
    shown[1, 0] = True
    polygons, place = mesh_polygons(lat, lon, shown, (0.0, 360.0, -15.0, 15.0))
    assert list(place) == [36, 36]
    assert sorted(float(p[:, 0].min()) for p in polygons) == pytest.approx([-5, 355], abs=0.01)


def test_a_map_of_a_mesh_has_a_polygon_for_each_cell_and_stations_stay_dots() -> None:
    lat, lon = rotated(np.arange(-10.0, 11, 4), np.arange(-12.0, 13, 4))
    values = np.arange(lat.size, dtype=float).reshape(lat.shape)
    values[0, :2] = np.nan
    mesh = xr.DataArray(values, dims=("y", "x"), coords={"lat": (("y", "x"), lat), "lon": (("y", "x"), lon)})
    figure, axes = grid_of_maps(mesh, 1, 2)
    drawn = draw_map(figure, axes[0, 0], mesh, "degC", cmap="RdBu_r", vmin=0, vmax=50)
    assert isinstance(drawn, PolyCollection)
    np.testing.assert_array_equal(drawn.get_array(), values[np.isfinite(values)])
    assert drawn.get_clim() == (0, 50)
    first = drawn.get_paths()[0].vertices
    assert Outline(first).contains_point((lon[0, 2], lat[0, 2]))
    stipple(axes[0, 0], mesh > 30)
    dots = axes[0, 0].collections[-1].get_offsets()
    np.testing.assert_allclose(dots, np.stack([lon[values > 30], lat[values > 30]], axis=1))
    scattered = mesh.stack(cell=("y", "x")).dropna("cell").drop_vars(["cell", "y", "x"])
    assert isinstance(draw_map(figure, axes[0, 1], scattered, "degC"), PathCollection)


def ocean(folder: Path, *, gone: bool = False) -> tuple[Path, np.ndarray, np.ndarray]:
    """A file on a rotated grid over the date line, with land and, where ``gone``, cells without a place."""
    lat, lon = rotated(np.arange(-12.0, 13, 3), np.arange(-14.0, 15, 4), tilt=40.0, turn=178.0)
    rng = np.random.default_rng(0)
    time = (np.datetime64("1990-01", "M") + np.arange(60)).astype("datetime64[ns]")
    values = rng.standard_normal(60)[:, None, None] * np.cos(np.deg2rad(4 * (lat - 40)))
    values = values + 0.2 * rng.standard_normal(values.shape)
    values[:, 3, 2:4] = np.nan
    places = [lat.copy(), (lon + 180) % 360 - 180]
    if gone:
        values[:, 0, 0] = np.nan
        for array in places:
            array[0, 0] = np.nan
    data = xr.Dataset(
        {"tos": (("time", "j", "i"), values, {"units": "degC", "coordinates": "nav_lat nav_lon"})},
        {
            "time": time,
            "nav_lat": (("j", "i"), places[0], {"units": "degrees_north"}),
            "nav_lon": (("j", "i"), places[1], {"units": "degrees_east"}),
        },
    )
    data.to_netcdf(folder / "tos.nc")
    return folder / "tos.nc", lat, lon


@pytest.mark.parametrize("gone", [False, True])
def test_a_result_keeps_the_grid_and_its_file_keeps_to_the_cf_conventions(gone: bool, tmp_path: Path) -> None:
    pytest.importorskip("compliance_checker")
    path, lat, lon = ocean(tmp_path, gone=gone)
    problem = make_problem(load_sst(path), rank=1, series="ar1")
    result = run_mcmc(problem, num_chains=2, num_samples=40, warmup_steps=30, chain_method="sequential", progress=False)
    result.save(tmp_path / "result")
    result = type(result).load(tmp_path / "result")
    write_outputs(result, tmp_path / "out", dpi=30)
    with xr.open_dataset(tmp_path / "out" / "modes.nc") as modes:
        assert modes["mode_mean"].dims == ("mode", "y", "x")
        assert modes["mode_mean"].encoding["coordinates"].split() == ["lat", "lon"]
        known = np.isfinite(modes["lat"].values)
        assert np.sum(~known) == gone
        np.testing.assert_allclose(modes["lat"].values[known], lat[known], atol=1e-4)
        np.testing.assert_allclose(modes["lon"].values[known] % 360, lon[known] % 360, atol=2e-4)
        land = np.isnan(modes["mode_mean"].values[0])
        assert np.sum(land) == 2 + gone
        assert land[3, 2:4].all()
        pattern = np.cos(np.deg2rad(4 * (lat - 40)))[~land]
        assert abs(np.corrcoef(modes["mode_mean"].values[0][~land], pattern)[0, 1]) > 0.98
        cells = to_cells(modes["mode_mean"], result.tree["constant_data"].to_dataset())
    assert cells.shape == (1, lat.size - 2 - gone)
    done = subprocess.run(
        [sys.executable, "-c", CHECK, str(tmp_path / "out" / "modes.nc")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    constant = result.tree["constant_data"].to_dataset()
    back = to_grid(xr.Dataset({"x": (("mode", "cell"), cells)}), constant)["x"]
    np.testing.assert_array_equal(to_cells(back, constant), cells)


def test_a_field_as_it_lies_in_a_file_is_mapped_from_south_and_in_one_piece() -> None:
    """North first, and longitudes that the date line cuts: given to the model without a loader."""
    lat, lon = np.arange(25.0, -26, -10), np.array([-175.0, -165.0, -155.0, 155.0, 165.0, 175.0])
    rng = np.random.default_rng(0)
    values = rng.standard_normal((30, lat.size, lon.size))
    coords = {"time": np.arange(30.0), "lat": lat, "lon": lon}
    given = xr.DataArray(values, coords, ("time", "lat", "lon"))
    constant = make_problem(given, rank=1, series="ar1", num_length_scales=3).data
    found = to_grid(xr.Dataset({"x": ("cell", constant["data"].values[:, 0])}), constant)["x"]
    np.testing.assert_array_equal(found["lat"], np.sort(lat))
    np.testing.assert_allclose(found["lon"], np.arange(155.0, 206, 10))
    moved = given[0].assign_coords(lon=given["lon"] % 360).sortby(["lat", "lon"])
    np.testing.assert_array_equal(found.values, moved.values)
    np.testing.assert_array_equal(to_cells(found, constant), constant["data"].values[:, 0])
