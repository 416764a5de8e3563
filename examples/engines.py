# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Eight schools: a bare Pyro model on every engine
#
# The effect of coaching in eight schools, each estimated with a known standard error (Rubin 1981; Gelman et al.,
# *Bayesian Data Analysis*, section 5.5). The model is plain Pyro. This file is a script (`python examples/engines.py`)
# and, through jupytext, a notebook. Takes about 10 seconds on one core; `PROBMODELS_EXAMPLE_DRAWS` shortens it.

# %%
import os

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from probmodels import Problem, compare, diagnose, fit_svi, loo, plots, run_mcmc, with_guide
from probmodels.inference import importance_resample, posterior_predictive, prior_predictive

draws = min(int(os.environ.get("PROBMODELS_EXAMPLE_DRAWS", "250")), 250)
effect = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
error = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def hierarchy(error: torch.Tensor, effect: torch.Tensor) -> None:
    """Effects of schools scatter about a common mean, by how much is unknown."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(effect)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta, event_dim=0)
        pyro.sample("effect", dist.Normal(theta, error), obs=effect)


def alike(error: torch.Tensor, effect: torch.Tensor) -> None:
    """One effect for all schools."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("school", len(effect)):
        pyro.sample("effect", dist.Normal(mu, error), obs=effect)


# %% [markdown]
# ## Chains
#
# Three lines. All chains move at once on a captured graph of the model.

# %%
problem = Problem("eight_schools", hierarchy, args=(error, effect), coords={"school": list("ABCDEFGH")})
result = run_mcmc(problem, num_samples=draws, seed=0)
report = diagnose(result)
print(report)
print(result.summary(["mu", "tau", "theta"]).round(2).to_string())

# %% [markdown]
# ## A guide
#
# The k-hat of its importance weights says how far the guide can be trusted, and resampling by the weights brings
# its draws closer to the posterior.

# %%
fitted = fit_svi(with_guide(problem, "full_rank"), num_steps=3000, lr=0.02, lr_decay=0.01, num_samples=4000, seed=0)
judged = diagnose(fitted)
print(judged)
corrected = importance_resample(fitted, seed=0)
for name, found in {"chains": result, "guide": fitted, "guide, resampled": corrected}.items():
    mu, tau = found.posterior["mu"], found.posterior["tau"]
    print(f"{name:17} mu {float(mu.mean()):.2f}, tau {float(tau.mean()):.2f} ± {float(tau.std()):.2f}")

# %% [markdown]
# ## Which model predicts better?
#
# With one effect for all, the same data are predicted about as well: eight schools cannot tell.

# %%
pooled = Problem("one_effect", alike, args=(error, effect), coords={"school": list("ABCDEFGH")})
together = run_mcmc(pooled, num_samples=draws, seed=0)
comparison = compare({"hierarchy": loo(result, problem), "one effect": loo(together, pooled)})
print(comparison)

# %% [markdown]
# The posterior of one normal mean is known exactly.

# %%
precision = 1 / 25 + float((1 / error**2).sum())
exact_mean, exact_sd = float((effect / error**2).sum()) / precision, precision**-0.5
mean, sd = float(together.posterior["mu"].mean()), float(together.posterior["mu"].std())
print(f"one effect: mean {mean:.2f} (exact {exact_mean:.2f}), sd {sd:.2f} (exact {exact_sd:.2f})")

# %% [markdown]
# ## Predictions
#
# Does the prior allow what was observed, and does the posterior reproduce it?

# %%
before = prior_predictive(problem, num_samples=1000, seed=0)["effect"]
after = posterior_predictive(problem, result.posterior, seed=0)["effect"]
for name, values in {"prior": before, "posterior": after}.items():
    low, high = values.quantile([0.05, 0.95], dim=("chain", "draw")).values
    inside = (low < effect.numpy()) & (effect.numpy() < high)
    print(f"{name}: 90 % intervals hold {inside.sum()} of {len(effect)} effects")
share = float((after.max("school") > float(effect.max())).mean())
print(f"the largest effect is exceeded in {share:.0%} of the replications")

# %% [markdown]
# ## Figures

# %%
figures = {
    "trace": plots.plot_trace(result.posterior, ["mu", "tau"]),
    "rank": plots.rank(result.posterior, ["mu", "tau"]),
    "loss": plots.loss(fitted.tree["fit"].to_dataset()),
    "models": plots.ranking(comparison.table),
}

# %% [markdown]
# The numbers to expect. Errors are those of the simulation: with 32 chains of 40 draws, about 0.1 for `mu`.

# %%
posterior = result.posterior
assert report.divergences is not None
assert report.divergences < 0.002 * 32 * draws
assert abs(float(posterior["mu"].mean()) - 4.4) < 0.4, "the reference mean of mu is 4.4"
assert abs(float(posterior["tau"].mean()) - 3.6) < 0.6, "the reference mean of tau is 3.6"
assert abs(mean - exact_mean) < 0.4
assert abs(sd / exact_sd - 1) < 0.1
assert judged.khat is not None
assert judged.khat < 0.9
assert abs(float(corrected.posterior["mu"].mean()) - float(posterior["mu"].mean())) < 0.8
assert abs(comparison.table["elpd_diff"].iloc[-1]) < 4, "eight schools cannot tell the models apart"
assert 0.05 < share < 0.95
assert np.isclose(comparison.table["weight"].sum(), 1)
