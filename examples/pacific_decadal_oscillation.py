# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # The Pacific Decadal Oscillation, with its uncertainty
#
# The index of the Pacific Decadal Oscillation is the leading principal component of sea surface temperature north of
# 20 N. Which pattern leads depends on the years there are. Here each draw of the posterior has a leading pattern of its
# own, and the index an interval.
#
# With a folder of files, named as an argument or by PROBMODELS_TEST_DATA, which holds
# `sst/ersst_v5_north_pacific_1950_2019.nc` and two published indices, `sst/pdo_ncei.csv` (1854 to 2021) and
# `sst/pdo_jisao.csv` (1900 to 2018), it is that of months; without, that of the winters of the embedded field.
# Takes about 23 seconds on one core with the files; `PROBMODELS_EXAMPLE_DRAWS` shortens it.

# %%
import os
import sys
from pathlib import Path

import arviz as az
import numpy as np

from probmodels import run_mcmc
from probmodels.bayesian_svd import make_problem
from probmodels.bayesian_svd.indices import load_series, mode_index, published_index, summarise_indices
from probmodels.bayesian_svd.indices.outputs import draw_indices, index_sentences
from probmodels.bayesian_svd.indices.series import match_series
from probmodels.datasets.sst import load_sst

draws = int(os.environ.get("PROBMODELS_EXAMPLE_DRAWS", "200"))
folder = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("PROBMODELS_TEST_DATA", "data")) / "sst"
monthly = (folder / "ersst_v5_north_pacific_1950_2019.nc").exists()

# %% [markdown]
# ## The field and its modes

# %%
if monthly:
    field, rank, base = load_sst(folder / "ersst_v5_north_pacific_1950_2019.nc"), 10, "1950-1993"
else:
    field, rank, base = load_sst(region="north_pacific"), 5, "1963-1993"
settings = {"fixed_effects": ["intercept"], "series": "ar1", "num_length_scales": 8, "tail": 1e-4}
problem = make_problem(field, rank=rank, **settings)
sampling = {"num_samples": draws, "warmup_steps": max(draws // 2, 50), "num_chains": 2, "chain_method": "sequential"}
result = run_mcmc(problem, **sampling, seed=0, progress=False)
print(az.summary(result.posterior[["d", "autocorrelation"]], round_to=3))

# %% [markdown]
# ## The index by its definition
#
# The leading mode of the region in each draw, with the sign of its positive phase: cool in the middle, warm at the
# American coast. Where a second mode explains nearly as much, draws do not agree on the pattern, and we are told.

# %%
index = mode_index(result.tree, "pdo", base=base)
print("\n".join(index_sentences(index)))
summary = summarise_indices(index)
figure = draw_indices([summary])
signal = index["signal"].sel(index="pdo")
print(f"share of variance of the mode in the signal: {float(index['variance_share'][0]):.2f}")

# %% [markdown]
# ArviZ sees chains and draws of an index as of any other quantity.

# %%
r_hat = az.rhat(index[["signal"]])["signal"]
print(f"largest r_hat of the index at any time: {float(r_hat.max()):.2f}")

# %% [markdown]
# ## Was it a warm phase or a cool one?
#
# The probability that the mean of ten years was positive: the share of draws in which it was.

# %%
years = signal["time"].dt.year
for decade in range(int(years.min()) // 10 * 10, int(years.max()), 10):
    inside = signal.sel(time=(years >= decade) & (years < decade + 10))
    if inside.sizes["time"] >= (60 if monthly else 5):
        print(f"{decade}s: positive with probability {float((inside.mean('time') > 0).mean()):.2f}")

# %% [markdown]
# ## Beside what is published
#
# NOAA's index comes from the same product, but from a region that reaches down to 20 N. Learned on the months up to
# 1993, it can be said in terms of our modes, and predicted for the years after. JISAO's came from other products: what
# they disagree about is in the interval of `published`.

# %%
if monthly:
    noaa, jisao = (load_series(folder / f"pdo_{name}.csv") for name in ("ncei", "jisao"))
    definition = np.corrcoef(signal.mean(("chain", "draw")), match_series(noaa, signal["time"]))[0, 1]
    print(f"correlation of the mean index with NOAA's: {definition:.3f}")
    told = {name: published_index(result.tree, x, fitted="1950-1993") for name, x in (("noaa", noaa), ("jisao", jisao))}
    for name, found in told.items():
        print(f"in terms of modes, {name}:", *index_sentences(found))
    correlation = float(told["noaa"]["correlation_elsewhere"][0])

# %% [markdown]
# The index is cool in the middle of the ocean, and, with the files, NOAA's index of 1994 to 2019 is told from its
# earlier years.

# %%
pattern = index["pattern"].sel(index="pdo")
centre = (pattern["lat"] > 30) & (pattern["lat"] < 45) & (pattern["lon"] > 160) & (pattern["lon"] < 205)
assert float(pattern.where(centre).mean()) < -0.1, "the positive phase should be cool in the middle"
if monthly:
    assert correlation > 0.97, f"NOAA's index of later years should be told by ten modes: {correlation:.3f}"
