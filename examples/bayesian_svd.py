# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Modes of the Pacific, with their uncertainty
#
# An EOF analysis gives patterns and series and says nothing of how well the data determine them. The Bayesian SVD
# gives draws from their posterior. This file is a script (`python examples/bayesian_svd.py`) and, through jupytext, a
# notebook. Takes about 40 seconds on one core; `PROBMODELS_EXAMPLE_DRAWS` shortens it.

# %%
import os

import numpy as np

from probmodels import get_method, run_mcmc
from probmodels.bayesian_svd import figures as mode_figures
from probmodels.bayesian_svd.summary import summarise_modes, summary_table
from probmodels.datasets import load
from probmodels.datasets.regions import REGIONS

draws = int(os.environ.get("PROBMODELS_EXAMPLE_DRAWS", "1000"))

# %% [markdown]
# ## Four lines
#
# Winter means (November to March) of 1963 to 2012 on a 5-degree grid, each cell with a mean and a trend of its own.

# %%
field = load("sst")
problem = get_method("bayesian_svd").make_problem(field, rank=4, fixed_effects=["intercept", "trend"])
result = run_mcmc(problem, num_samples=draws, warmup_steps=max(draws // 2, 50), thin=2, num_chains=4, seed=0)
print(result.diagnose())

# %% [markdown]
# ## The posterior
#
# Everything is labelled. `U` and `V` are kept in coordinates of two bases, which `constant_data` holds; `d` and `sigma`
# are in units of the weighted data.

# %%
posterior, constant = result.posterior, result.tree["constant_data"].to_dataset()
print(posterior)
print(result.summary(["d", "sigma", "length_scale_space"]).round(3).to_string())

# %% [markdown]
# ## The modes
#
# `summarise_modes` expands the draws to maps and series. The spread of a pattern is not noise alone: modes of similar
# size turn into one another.

# %%
modes = summarise_modes(result.tree)
print(summary_table(modes))
figure = mode_figures.mode_maps(modes)

# %% [markdown]
# How much do modes 2 and 3 turn? To first order the angle between them has the posterior standard deviation
# $\sigma\sqrt{d_2^2 + d_3^2} / |d_2^2 - d_3^2|$, which grows as the two become alike (see `docs/bayesian_svd.md`).

# %%
u = posterior["U"]
mean_pattern = u.mean(("chain", "draw"))
mean_pattern = mean_pattern / np.sqrt((mean_pattern**2).sum("basis_space"))
turn = np.arcsin((u.sel(mode=2) * mean_pattern.sel(mode=3)).sum("basis_space"))
d, sigma = posterior["d"].mean(("chain", "draw")), float(posterior["sigma"].mean())
d2, d3 = (float(d.sel(mode=k)) for k in (2, 3))
print(
    f"angle between modes 2 and 3: sd {np.rad2deg(float(turn.std())):.1f} degrees, "
    f"to first order {np.rad2deg(sigma * np.hypot(d2, d3) / abs(d2**2 - d3**2)):.1f}"
)

# %% [markdown]
# ## An index of one's own
#
# Any function of modes and data has a posterior: evaluate it at each draw. Here: how closely does the leading series
# follow the mean of the field over the NINO3.4 box, each cell's mean and trend removed?

# %%
south, north, west, east = REGIONS["nino34"]
box = field.sel(lat=slice(south, north), lon=slice(west, east))
nino34 = box.weighted(box["area_weight"]).mean(("lat", "lon"))
design = constant["fixed_effects_design"].values
nino34 = nino34 - design @ np.linalg.lstsq(design, nino34.values, rcond=None)[0]

leading = constant["basis_time_matrix"] @ posterior["V"].sel(mode=1)  # (time, chain, draw)
pattern = constant["basis_space_matrix"] @ posterior["U"].sel(mode=1)  # (cell, chain, draw)
inside = (constant["lat"] >= south) & (constant["lat"] <= north) & (constant["lon"] >= west) & (constant["lon"] <= east)
sign = np.sign(pattern.where(inside).mean("cell"))  # a mode's sign is free: let warm water in the box be positive
nino34 = nino34 - nino34.mean("time")
leading = sign * (leading - leading.mean("time"))
correlation = (leading * nino34).sum("time") / np.sqrt((leading**2).sum("time") * (nino34**2).sum("time"))
low, middle, high = correlation.quantile([0.025, 0.5, 0.975], dim=("chain", "draw")).values
print(f"correlation of the leading series with NINO3.4: {middle:.3f}, 95 % interval {low:.3f} to {high:.3f}")

# %% [markdown]
# The leading mode is El Niño, whatever the draw.

# %%
assert low > 0.95, f"the leading mode should follow NINO3.4, but the interval reaches down to {low:.3f}"
assert high - low < 0.05, f"the interval is wider than the data allow: {low:.3f} to {high:.3f}"
