# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Exploring a field
#
# What is in a field of sea surface temperature before any model, what a Bayesian SVD makes of it, and which winters
# were El Niño. Works on any file that `load_sst` reads,
#
#     python examples/explore_field.py sst.nc --region pacific --season NDJFM
#
# and without one on the embedded field, winter means of the Pacific 1963 to 2012 on a grid of 5 degrees.
# Takes about 15 seconds on one core; `PROBMODELS_EXAMPLE_DRAWS` shortens it.

# %%
import argparse
import json
import os

import arviz as az
import numpy as np

from probmodels import run_mcmc
from probmodels.bayesian_svd import make_problem
from probmodels.bayesian_svd.indices import box_indices, correlate, summarise_indices
from probmodels.bayesian_svd.indices.outputs import draw_indices, index_sentences
from probmodels.bayesian_svd.summary import summarise_modes, summary_table
from probmodels.datasets.sst import load_sst

parser = argparse.ArgumentParser()
parser.add_argument("file", nargs="?", help="NetCDF file; the embedded field by default")
parser.add_argument("--region", help="such as pacific, or 20,65,110,260")
parser.add_argument("--season", help="months to average, such as NDJFM")
parser.add_argument("--rank", type=int, default=4)
args = parser.parse_args()
draws = int(os.environ.get("PROBMODELS_EXAMPLE_DRAWS", "400"))

# %% [markdown]
# ## What was read
#
# A field carries its labels, and says what had to be mended.

# %%
field = load_sst(args.file, region=args.region, season=args.season)
print(field.coords)
print("mended:", json.loads(field.attrs["mends"]) or "nothing")
gaps = float(field.isnull().where(field["ocean"]).mean())
print(f"{int(field['ocean'].sum())} cells, {field.sizes['time']} times, {gaps:.1%} of the entries missing")

# %% [markdown]
# ## Before any model
#
# How much varies where, how much of it is a trend, and how persistent it is. Means over the globe or a region are
# weighted by area.

# %%
area = field["area_weight"]
sd = field.std("time")
years = field["time"].dt.year + field["time"].dt.dayofyear / 365.25
slope = (field * (years - years.mean())).mean("time") / (years - years.mean()).var()
lagged = (field[1:].values * field[:-1].values).mean(0) / (field.values**2).mean(0)
largest = sd.where(sd == sd.max(), drop=True)
print(f"sd: mean {float(sd.weighted(area).mean()):.2f}, largest {float(sd.max()):.2f} {field.attrs['units']}")
print(f"   at {float(largest['lat'][0]):g} N, {float(largest['lon'][0]):g} E")
print(f"trend: mean {10 * float(slope.weighted(area).mean()):+.3f} {field.attrs['units']} in ten years")
print(f"autocorrelation over one step: median {np.nanmedian(lagged):.2f}")

# %% [markdown]
# ## Modes
#
# With `series="ar1"` modes are those of the climate of which these times are a sample. ArviZ reads the posterior with
# its labels. `r_hat` compares the chains, `ess` counts what they are worth.

# %%
problem = make_problem(field, rank=args.rank, fixed_effects=["intercept", "trend"], series="ar1")
sampling = {"num_samples": draws, "warmup_steps": max(draws // 2, 50), "num_chains": 4, "chain_method": "sequential"}
result = run_mcmc(problem, **sampling, seed=0, progress=False)
print(az.summary(result.posterior[["d", "sigma", "autocorrelation"]], round_to=3))
modes = summarise_modes(result.tree)
print(summary_table(modes))

# %% [markdown]
# ## Which winters were El Niño?
#
# The mean over the box of Niño 3.4. As the field is observed in the whole box, its mean is a number; what the modes say
# of it, the signal, is uncertain. Every question about it is one of the share of draws. Where the modes leave more than
# their noise says, a sentence tells so: the probabilities are then too sure.

# %%
index = box_indices(result.tree)
print("\n".join(index_sentences(index)))
summary = summarise_indices(index)
warm = (index["signal"].sel(index="nino34") > 0.5).mean(("chain", "draw"))
for time, probability in zip(index["time"].dt.year.values, warm.values, strict=True):
    if probability > 0.05:
        print(f"{time}: warmer by more than half a degree with probability {probability:.2f}")
figure = draw_indices([summary])

# %% [markdown]
# ArviZ's diagnostics take an index as well, since it has chains and draws.

# %%
sizes = az.ess(index[["signal"]].sel(index="nino34"))["signal"]
print(f"effective draws of the index: {float(sizes.min()):.0f} to {float(sizes.max()):.0f}")

# %% [markdown]
# How closely are two boxes related? The interval of a correlation holds that other winters would have given another.

# %%
east = index["field"].sel(index="nino3").mean(("chain", "draw")).rename("nino3")
found = correlate(index["signal"].sel(index="nino34"), east)
low, high = found["correlation"].quantile([0.025, 0.975]).values
print(
    f"correlation of Nino 3.4 with Nino 3: {low:.3f} to {high:.3f}, from "
    f"{float(found['effective_times'].mean()):.0f} effectively independent times"
)

# %% [markdown]
# What modes say follows what was observed, and the winters of 1982/83 and 1997/98 stand out in the embedded field.

# %%
observed = index["field"].sel(index="nino34").mean(("chain", "draw"))
agreement = float(np.corrcoef(summary["signal_mean"].sel(index="nino34"), observed)[0, 1])
assert agreement > 0.9, f"modes say little of Nino 3.4: correlation {agreement:.2f}"
if args.file is None:
    strongest = set(observed["time"].dt.year.values[np.argsort(observed.values)[-2:]])
    assert strongest == {1983, 1998}, f"the strongest winters should be 1983 and 1998, not {strongest}"
    assert low > 0.8, f"the two boxes overlap and should be alike, but the interval reaches down to {low:.2f}"
