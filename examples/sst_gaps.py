# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Gaps in maps of sea surface temperature
#
# A diffusion model of complete fields is a prior from which gaps of later months are drawn, beside the Bayesian SVD of
# all months, gaps and all. Run it on a field of your own,
#
#     python examples/sst_gaps.py ersst_v5_north_pacific_1950_2019.nc --until 2004 --out gaps.png
#
# with any NetCDF file of (time, lat, lon) that `load_sst` reads. Without a file it makes one up, of waves that travel
# over a small sea. Takes about 10 seconds on one core without a file; `PROBMODELS_EXAMPLE_DRAWS` shortens it.

# %%
import argparse
import os

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from probmodels import fit_svi, get_method, run_mcmc
from probmodels.datasets.sst import load_sst
from probmodels.diffusion import make_problem
from probmodels.diffusion.fitted import make_field
from probmodels.scores.gaps import fill_gaps, leading_modes

parser = argparse.ArgumentParser()
parser.add_argument("file", nargs="?", help="NetCDF file of monthly fields")
parser.add_argument("--until", type=int, default=2004, help="last year of the training months")
parser.add_argument("--region", help="such as 30,66,150,250; all by default")
parser.add_argument("--share", type=float, default=0.5, help="of the cells that are hidden")
parser.add_argument("--modes", type=int, help="number of modes; 60, or 10 of the field that is made up")
parser.add_argument("--noise", type=float, default=0.05, help="sd of what the modes leave out")
parser.add_argument("--rank", type=int, help="of the Bayesian SVD; 20, or 10")
parser.add_argument("--out", help="file of the figure")
args = parser.parse_args()
draws = int(os.environ.get("PROBMODELS_EXAMPLE_DRAWS", "100"))

# %% [markdown]
# ## Fields
#
# Anomalies from the mean seasonal cycle of the training months; cells with gaps of their own are left out.


# %%
def made_up() -> xr.DataArray:
    """Waves of random phases, (time, lat, lon), with an island."""
    rng = np.random.default_rng(0)
    lat, lon = np.arange(30.0, 46.0, 2.0), np.arange(160.0, 190.0, 2.0)
    field = np.zeros((240, len(lat), len(lon)))
    for wave in ((0.1, 0.2), (0.25, 0.1), (0.3, -0.2), (0.05, 0.4)):
        phase = wave[0] * lat[:, None] + wave[1] * lon
        size, turn = rng.gamma(2.0, 0.4, (240, 1, 1)), rng.uniform(0, 2 * np.pi, (240, 1, 1))
        field += size * np.cos(phase + turn)
    field += 0.05 * rng.standard_normal(field.shape)
    field[:, 3:5, 6:9] = np.nan
    time = np.arange("1990-01", "2010-01", dtype="datetime64[M]").astype("datetime64[ns]")
    return xr.DataArray(field, {"time": time, "lat": lat, "lon": lon}, ("time", "lat", "lon"), attrs={"units": "degC"})


if args.file:
    field = load_sst(args.file, region=args.region, base_period=f"1800-{args.until}", min_valid=0.99)
else:
    field = made_up()
field = field.where(field.notnull().all("time"))
num_modes, rank = (args.modes or 60, args.rank or 20) if args.file else (args.modes or 10, args.rank or 10)
train = field.sel(time=slice(None, str(args.until)))
truth = field.sel(time=slice(str(args.until + 1), None))[::12][:3]
rng = np.random.default_rng(1)
observed = truth.where(rng.random(truth.shape) >= args.share)
print(f"{train.sizes['time']} months to fit, {truth.sizes['time']} to fill, {int(truth[0].notnull().sum())} cells")

# %% [markdown]
# ## The diffusion prior
#
# A network of few coordinates along the leading modes; it starts as a normal prior, and with few months it is no
# better. Then draws of complete fields given the cells that were observed.

# %%
modes = leading_modes(train, num_modes, noise=args.noise)
problem = make_problem(modes.coordinates(train), hidden=128, blocks=1, dropout=0.3, gamma=(-1.5, 5.0))
fit = {"lr": 1e-3, "schedule": "warmup_cosine", "batch_size": 128, "keep": "average", "num_samples": 2}
result = fit_svi(problem, num_steps=10 * draws, **fit, progress=False)
filled = fill_gaps(make_field(result), observed, sd=0.01, modes=modes, num_draws=draws, progress=False)
print(filled)

# %% [markdown]
# ## The Bayesian SVD
#
# It is fitted to training months and months with gaps at once; their signal, and noise around it, are its answer. What
# is missing is drawn in every sweep and moves slowly where most is: look at longer chains before you believe it.

# %%
data = xr.concat([train, observed], "time")
svd = get_method("bayesian_svd").make_problem(data, rank=rank, fixed_effects=[], num_length_scales=8, tail=1e-4)
chains = {"num_chains": 1, "chain_method": "sequential", "progress": False}
drawn = run_mcmc(svd, num_samples=draws, warmup_steps=5 * draws, seed=0, **chains)
posterior, constant = drawn.posterior.isel(chain=0), drawn.tree["constant_data"].to_dataset()
series = (constant["basis_time_matrix"] @ posterior["V"]).isel(time=slice(-truth.sizes["time"], None))
signal = ((constant["basis_space_matrix"] @ posterior["U"]) * posterior["d"]).dot(series, "mode")
weight = np.sqrt(constant["weight"])
spread = np.hypot(signal.std("draw"), posterior["sigma"].mean()) / weight
ocean = truth[0].notnull().values
other = {}
for name, part in (("mean", signal.mean("draw") / weight), ("sd", spread)):
    other[name] = xr.full_like(truth, np.nan)
    other[name].values[:, ocean] = part.transpose("time", "cell").values

# %% [markdown]
# ## How far off they are, in cells that were hidden

# %%
hidden = observed.isnull() & truth.notnull()
for name, mean, sd in (
    ("diffusion prior", filled["mean"], filled["sd"]),
    ("Bayesian SVD", other["mean"], other["sd"]),
    ("climatology", 0 * truth, xr.zeros_like(truth) + train.std("time")),
):
    error = (mean - truth).where(hidden)
    inside = (abs(error) < 1.645 * sd).where(hidden).mean()
    print(f"{name:16s} RMSE {float(np.sqrt((error**2).mean())):.3f}, within 90 % intervals {float(inside):.2f}")

# %% [markdown]
# ## Maps

# %%
maps = {
    "truth": truth,
    "observed": observed,
    "diffusion, mean": filled["mean"],
    "diffusion, sd": filled["sd"],
    "SVD, mean": other["mean"],
    "SVD, sd": other["sd"],
}
figure = Figure(figsize=(3 * len(maps), 2 * truth.sizes["time"]), layout="constrained")
axes = figure.subplots(truth.sizes["time"], len(maps), squeeze=False)
limit = float(abs(truth).max())
for column, (name, part) in enumerate(maps.items()):
    for row in range(truth.sizes["time"]):
        if name.endswith("sd"):
            options = {"vmin": 0, "vmax": float(max(filled["sd"].max(), other["sd"].max())), "cmap": "viridis"}
        else:
            options = {"vmin": -limit, "vmax": limit, "cmap": "RdBu_r"}
        shown = axes[row, column].pcolormesh(part["lon"], part["lat"], part[row].values, **options)
        axes[row, column].set_title(f"{name}, {str(truth['time'].values[row])[:7]}", fontsize=8)
    figure.colorbar(shown, ax=axes[:, column], location="bottom", shrink=0.8)
if args.out:
    figure.savefig(args.out, dpi=110)

# %% [markdown]
# Cells that were observed are kept, and what is hidden is known less well.

# %%
kept = abs(filled["mean"] - observed)
assert float(kept.max()) < 0.05, f"an observed cell moved by {float(kept.max()):.3f}"
assert float(filled["sd"].where(hidden).mean()) > 2 * float(filled["sd"].where(observed.notnull()).mean())
