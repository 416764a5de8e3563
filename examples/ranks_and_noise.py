# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # How many modes, what prior, what noise
#
# An analysis of modes makes three choices: their number, the prior of their patterns, and what the rest of the field
# is taken for. Here each is put to the test on the winter means of the Pacific. This file is a script
# (`python examples/ranks_and_noise.py`) and, through jupytext, a notebook. Takes about 60 seconds on one core;
# `PROBMODELS_EXAMPLE_DRAWS` shortens it.

# %%
import os

import arviz as az
import numpy as np

from probmodels import run_mcmc
from probmodels.bayesian_svd import make_problem
from probmodels.bayesian_svd.checks import misfit
from probmodels.bayesian_svd.gaps.rank_outputs import draw_ranks
from probmodels.bayesian_svd.gaps.ranks import compare_ranks
from probmodels.bayesian_svd.summary import residual_checks, summarise_modes
from probmodels.datasets import load

draws = int(os.environ.get("PROBMODELS_EXAMPLE_DRAWS", "400"))
field = load("sst")
effects = ["intercept", "trend"]

# %% [markdown]
# ## How many modes
#
# Blocks of three winters and 3 x 4 cells are hidden, and filled by fits of each number of modes. Single hidden cells
# would not do: their neighbours tell nearly all of them, so that they reward modes that fit noise.

# %%
comparison = compare_ranks(field, (1, 2, 3, 4, 6, 8), fixed_effects=effects, block=(3, 3, 4), progress=False)
print(comparison[["rmse", "crps", "coverage", "num_modes"]].to_dataframe().round(3).to_string())
print(comparison.attrs["sentence"])
figure = draw_ranks(comparison)

# %% [markdown]
# ## What noise
#
# White noise takes what four modes leave for independent errors of one level. Correlated noise has a level of each
# cell, and errors of near cells and winters hang together. The residuals tell which of the two the data are like.

# %%
options = {"rank": 4, "series": "ar1", "fixed_effects": effects}
chains = {"num_samples": draws, "warmup_steps": max(draws // 2, 50), "num_chains": 2, "seed": 0, "progress": False}
results = {noise: run_mcmc(make_problem(field, noise=noise, **options), **chains) for noise in ("white", "correlated")}
for name, result in results.items():
    found = misfit(residual_checks(result.tree))
    print(f"{name:12s}" + ", ".join(f"{key} {value:.2f}" for key, value in found.items()))
white, correlated = (misfit(residual_checks(result.tree))["neighbour"] for result in results.values())

# %% [markdown]
# Under white noise residuals of neighbouring cells are as good as the same. Correlated noise takes most of this in.
# What it changes of the answer is the share of variance and its interval:

# %%
for name, result in results.items():
    modes = summarise_modes(result.tree)
    share = [100 * modes[f"explained_variance_fraction_{part}"].values for part in ("mean", "lower", "upper")]
    print(name, *(f"{mean:.1f} [{low:.1f}, {high:.1f}] %" for mean, low, high in zip(*share, strict=True)))
az.plot_forest(
    [result.posterior for result in results.values()], model_names=list(results), var_names=["d"], combined=True
)

# %% [markdown]
# ## What prior
#
# Patterns of the default prior are smooth, each with a length-scale of its own. The uniform prior knows nothing of
# where cells lie. With fifty winters of 450 cells the data decide: means of the leading pattern agree, and the smooth
# prior makes the uncertain ones less ragged.

# %%
uniform = run_mcmc(make_problem(field, frame_prior="uniform", **options), **chains)
smooth_map, free_map = (summarise_modes(r.tree)["mode_mean"].values for r in (results["white"], uniform))
ocean = np.isfinite(smooth_map[0])
agreement = [abs(np.corrcoef(a[ocean], b[ocean])[0, 1]) for a, b in zip(smooth_map, free_map, strict=True)]
print("correlation of mean patterns under the two priors:", np.round(agreement, 3))

# %% [markdown]
# ## What is asserted
#
# This notebook runs in the tests, where it fails if these are not so.

# %%
assert comparison.attrs["chosen"] >= 2, "one mode is not enough for the Pacific"
assert white > 0.7, "white noise misses the correlation of neighbours"
assert abs(correlated) < 0.6 * white, "correlated noise takes most of it in"
assert agreement[0] > 0.98, "the leading pattern does not depend on the prior"
