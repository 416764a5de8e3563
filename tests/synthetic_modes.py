"""A posterior of a Bayesian SVD made up around the SVD of a field, for tests of what is drawn and written from it."""

from __future__ import annotations

import json

import numpy as np
import xarray as xr


def toy_field(seed: int = 0, num_times: int = 40) -> xr.DataArray:
    """Three smooth standing waves and noise over (time, lat, lon), with some cells of land."""
    rng = np.random.default_rng(seed)
    lat, lon = np.arange(20.0, 61.0, 5.0), np.arange(120.0, 241.0, 10.0)
    y, x = np.meshgrid((lat - 20) / 40, (lon - 120) / 120, indexing="ij")
    waves = [np.sin(np.pi * y) * np.sin(np.pi * x), np.sin(2 * np.pi * x) * (1 - y), np.cos(2 * np.pi * y) * x]
    pcs = rng.normal(size=(num_times, 3)) * [2.0, 1.0, 0.8]
    field = np.tensordot(pcs, np.array(waves), 1) + 0.2 * rng.normal(size=(num_times, *x.shape))
    field[:, (y > 0.8) & (x < 0.3)] = np.nan
    time = np.datetime64("1970-01-15", "ns") + np.arange(num_times) * np.timedelta64(365, "D")
    coords = {"time": time, "lat": lat, "lon": lon}
    return xr.DataArray(field, coords, ("time", "lat", "lon"), attrs={"units": "degC"})


def synthetic_result(
    field: xr.DataArray,
    rank: int = 3,
    num_chains: int = 2,
    num_draws: int = 50,
    seed: int = 0,
    gaps: float = 0.0,
    weighted: bool = True,
) -> xr.DataTree:
    """Result tree whose draws scatter about the SVD of the field as first-order theory says.

    Fixed effects are intercept and trend; V is orthogonal to them. Patterns rotate into one another with the standard
    deviation sigma sqrt(d_i^2 + d_j^2) / |d_i^2 - d_j^2| and carry independent noise of sigma / d_i.
    """
    rng = np.random.default_rng(seed)
    cells = field.stack(cell=("lat", "lon")).transpose("cell", "time").dropna("cell", how="all")
    data = cells.values.astype(float)
    num_cells, num_times = data.shape
    weight = np.cos(np.deg2rad(cells["lat"].values)) if weighted else np.ones(num_cells)
    t = np.linspace(-1, 1, num_times)
    design = np.stack([np.ones(num_times), t], axis=1)
    effects = np.linalg.qr(design)[0]
    z = np.sqrt(weight)[:, None] * (data - data @ effects @ effects.T)
    u, s, vt = np.linalg.svd(z, full_matrices=False)
    sigma = np.sqrt(np.sum(s[rank:] ** 2) / (num_cells * (num_times - 2)))
    d = np.sqrt(np.maximum(s[:rank] ** 2 - sigma**2 * (num_cells + num_times), 0.1 * s[:rank] ** 2))
    basis_space = u  # spans more than the modes, so that expansion is tested
    basis_time = np.linalg.qr(np.concatenate([vt.T[:, : num_times - 2], effects], axis=1))[0][:, : num_times - 2]

    total = num_chains * num_draws
    scatter = sigma / d
    gap = np.abs(d[:, None] ** 2 - d[None, :] ** 2) + np.eye(rank)
    angle = np.triu(np.minimum(sigma * np.sqrt(d[:, None] ** 2 + d[None, :] ** 2) / gap, 0.5), 1)

    def frames(centre: np.ndarray) -> np.ndarray:
        turn = angle * rng.normal(size=(total, rank, rank))
        frame = centre @ (np.eye(rank) + turn - turn.transpose(0, 2, 1))
        frame = frame + scatter * rng.normal(size=(total, *centre.shape))
        q, r = np.linalg.qr(frame)
        return q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None, :]

    def chained(values: np.ndarray) -> np.ndarray:
        return values.reshape(num_chains, num_draws, *values.shape[1:])

    posterior = xr.Dataset(
        {
            "U": (("chain", "draw", "basis_space", "mode"), chained(frames(basis_space.T @ u[:, :rank]))),
            "V": (("chain", "draw", "basis_time", "mode"), chained(frames(basis_time.T @ vt[:rank].T))),
            "d": (("chain", "draw", "mode"), chained(d + sigma * rng.normal(size=(total, rank)))),
            "sigma": (("chain", "draw"), chained(sigma * np.exp(0.01 * rng.normal(size=total)))),
            "length_scale_space": (
                ("chain", "draw", "mode"),
                chained(1500 * np.exp(0.2 * rng.normal(size=(total, rank)))),
            ),
        },
        coords={"chain": range(num_chains), "draw": range(num_draws), "mode": range(rank)},
    )
    posterior["length_scale_space"].attrs["units"] = "km"
    data = np.where(rng.random(data.shape) < gaps, np.nan, data)
    constant = xr.Dataset(
        {
            "basis_space_matrix": (("cell", "basis_space"), basis_space),
            "basis_time_matrix": (("time", "basis_time"), basis_time),
            "weight": ("cell", weight),
            "data": (("cell", "time"), data, {"units": str(field.attrs.get("units", "degC")), "title": "toy field"}),
            "fixed_effects_design": (("time", "effect"), design),
        },
        coords={
            "time": field["time"].values,
            "lat": ("cell", cells["lat"].values.astype(float)),
            "lon": ("cell", cells["lon"].values.astype(float)),
        },
    )
    loss = 1000 + 500 * np.exp(-np.arange(300) / 40) + 10 * rng.normal(size=300)
    fit = xr.Dataset({"loss": ("step", loss)})
    tree = xr.DataTree.from_dict({"posterior": posterior, "constant_data": constant, "fit": fit})
    tree.attrs = {
        "method": "bayesian_svd",
        "engine": "mcmc",
        "seed": 0,
        "spec": json.dumps({"method": "bayesian_svd", "model": {"rank": rank}}),
        "versions": json.dumps({"probmodels": "0.1.0", "numpy": np.__version__}),
        "created": "2020-01-01T00:00:00Z",
    }
    return tree
