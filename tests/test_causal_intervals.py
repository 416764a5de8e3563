"""Intervals of the effects of a causal autoencoder: against least squares, the truth of simulated tables, and none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from probmodels import Problem, Result, fit_svi
from probmodels.causal_vae import make_problem
from probmodels.causal_vae.interventions import effect, refine
from probmodels.causal_vae.mechanism_draws import MechanismDraws
from probmodels.datasets.causal import hide_labels, make_concepts
from probmodels.guides.causal_vae import Mechanisms

PAIR = torch.tensor([[0, 1], [0, 0]])


def chain(num_rows: int = 300, seed: int = 0) -> xr.Dataset:
    """b = 0.8 a, c = 1.2 b - 0.5 a with noise, all seen with an error: from -1 to 1, a has effects of 1.6 and 0.92."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=num_rows)
    b = 0.8 * a + 0.6 * rng.normal(size=num_rows)
    z = np.stack([a, b, 1.2 * b - 0.5 * a + 0.4 * rng.normal(size=num_rows)], 1)
    graph = [["a", "b"], ["a", "c"], ["b", "c"]]
    return make_concepts(z + 0.3 * rng.normal(size=z.shape), z, names=["a", "b", "c"], graph=graph)


def by_least_squares(mechanisms: Mechanisms, label: np.ndarray) -> None:
    """Linear mechanisms as regressions have them."""
    with torch.no_grad():
        for i, causes in enumerate(mechanisms.parents):
            design = np.column_stack([np.ones(len(label)), label[:, causes]])
            found = np.linalg.lstsq(design, label[:, i], rcond=None)[0]
            mechanisms.base[i] = float(found[0])
            mechanisms.weight[causes, i] = torch.as_tensor(found[1:]).to(mechanisms.weight)
            mechanisms.log_scale[i] = float(np.log((label[:, i] - design @ found).std() - 0.02))


def unmoved(data: xr.Dataset, **options: Any) -> tuple[Problem, Result]:
    """A fit that stays at its start, which for linear mechanisms is least squares."""
    problem = make_problem(data, hidden=4, **options)
    if options.get("mechanism") == "linear" and not data["label"].isnull().any() and "label_weight" not in options:
        assert problem.data is not None
        by_least_squares(problem.model.mechanisms, problem.data["label"].values)  # type: ignore[union-attr, arg-type]
    return problem, fit_svi(problem, num_steps=1, lr=1e-9, num_samples=1, progress=False)


def drawn_effects(mechanisms: Mechanisms, label: Tensor, values: tuple[float, float], num_draws: int) -> np.ndarray:
    """Draws of the effect of the first of two concepts on the second (draw,)."""
    draws = MechanismDraws(mechanisms, ["a", "b"], label, [1])
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(num_draws):
        carry = draws.draw(generator)
        low, high = (float(carry(label[:1], {"a": value})[0, 1]) for value in values)
        found.append(high - low)
    return np.array(found)


def test_linear_effects_are_as_uncertain_as_least_squares() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=40)
    label = np.stack([a, 0.7 * a + rng.normal(size=40)], 1)
    mechanisms = Mechanisms(PAIR, "linear")
    by_least_squares(mechanisms, label)
    found = drawn_effects(mechanisms, torch.as_tensor(label, dtype=torch.float32), (-1.0, 1.0), 1000)
    slope, cut = np.polyfit(*label.T, 1)
    left = label[:, 1] - slope * label[:, 0] - cut
    error = 2 * np.sqrt(left @ left / 38 / ((a - a.mean()) ** 2).sum())
    assert found.mean() == pytest.approx(2 * slope, abs=4 * error / np.sqrt(1000))
    assert found.std() == pytest.approx(error, rel=4 / np.sqrt(2000))


def test_a_fit_that_ended_early_has_wider_intervals() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=200)
    label = np.stack([a, 0.7 * a + rng.normal(size=200)], 1)
    mechanisms = Mechanisms(PAIR, "linear")
    by_least_squares(mechanisms, label)
    seen = torch.as_tensor(label, dtype=torch.float32)
    best = drawn_effects(mechanisms, seen, (0.0, 1.0), 200)
    with torch.no_grad():
        mechanisms.weight[0, 1] += 0.5
    off = drawn_effects(mechanisms, seen, (0.0, 1.0), 200)
    assert off.std() > 0.35
    assert best.std() < 0.1


def test_intervals_of_curved_effects_cover() -> None:
    hits = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        a = rng.normal(size=200)
        label = torch.as_tensor(np.stack([a, np.sin(2 * a) + 0.5 * rng.normal(size=200)], 1), dtype=torch.float32)
        torch.manual_seed(seed)
        mechanisms = Mechanisms(PAIR, hidden=8)
        optimiser = torch.optim.Adam(mechanisms.parameters(), lr=0.03)
        for _ in range(150):
            optimiser.zero_grad()
            location = mechanisms.location(1, [label[:, 0]])
            loss = -torch.distributions.Normal(location, mechanisms.scale(1)).log_prob(label[:, 1]).mean()
            loss.backward()
            optimiser.step()
        found = np.quantile(drawn_effects(mechanisms, label, (0.0, 1.0), 99), [0.05, 0.95], method="weibull")
        hits.append(found[0] <= np.sin(2.0) <= found[1])
    assert 0.7 < np.mean(hits) < 1  # of 90 %, 3.6 standard errors


@pytest.mark.slow
def test_intervals_of_linear_effects_cover() -> None:
    hits = []
    for seed in range(30):
        problem, result = unmoved(chain(seed=seed), mechanism="linear")
        found = effect(problem, result, "a", (-1.0, 1.0), num_draws=99, prob=0.9, progress=False)
        hits.append((found["low"] <= [1.6, 0.92]) & (found["high"] >= [1.6, 0.92]))
    # Of 90 %, 3.6 standard errors of 30 sets; two effects of a set go together.
    assert (np.abs(np.mean(hits, 0) - 0.9) < 0.2).all()


def test_an_effect_has_an_interval_of_its_parameters_or_the_reason_why_not() -> None:
    problem, result = unmoved(chain(), mechanism="linear")
    found = effect(problem, result, "a", (-1.0, 1.0), num_draws=99, progress=False)
    width = (found["high"] - found["low"]).values
    assert (width > 0.2).all()  # 4 standard errors of the slope, twice it, are 0.28
    assert found.attrs["interval"].startswith("of rows drawn anew")
    back = effect(problem, result, "c", (-1.0, 1.0), num_draws=9, progress=False)
    np.testing.assert_array_equal(back[["low", "high"]].to_array(), 0.0)  # no effect, whatever the parameters
    soft = effect(problem, result, "b", (0.0, lambda natural: natural + 1), num_draws=9, progress=False)
    assert np.isfinite(soft["low"]).all()
    single, refined = refine(problem, result, num_steps=1, progress=False)
    for (given, fit), words in {
        "masked": (unmoved(chain(), mechanism="masked"), "parameters of 'masked' mechanisms have no draws"),
        "post_nonlinear": (unmoved(chain(), mechanism="post_nonlinear"), "parameters of 'post_nonlinear' mechanisms"),
        "weak": (unmoved(chain(), mechanism="linear", label_sd=0.5), "labels of sd 0.5"),
        "large": (unmoved(chain(), mechanism_hidden=80), "has 6,721 parameters, of at most 5,000"),
        "few": (unmoved(chain(40).pipe(some), mechanism="linear", semi_supervised=True), "0 rows have labels of 'b'"),
        "none": (unmoved(chain(), mechanism="linear", label_weight=0.0), "0 rows have labels of 'b'"),
        "refined": ((single, refined), "proposals were refined"),
        "by hand": ((problem, replace(result, tree=bare(result))), "the labels that mechanisms were fitted to are not"),
    }.values():
        found = effect(given, fit, "a", (-1.0, 1.0), num_draws=3, progress=False)
        assert words in found.attrs["interval"]
        assert found[["low", "high"]].to_array().isnull().all()
        assert np.isfinite(found["effect"]).all()


def some(data: xr.Dataset) -> xr.Dataset:
    """Labels of a and c alone, but for one row."""
    label = data["label"].copy()
    label[2:, 1] = np.nan
    label[:2, 0] = np.nan
    return data.assign(label=label)


def bare(result: Result) -> xr.DataTree:
    """Without the options of its problem."""
    tree = result.tree.copy()
    tree.attrs = {key: value for key, value in tree.attrs.items() if key != "options"}
    return tree


def test_rows_without_labels_leave_the_interval_to_the_others() -> None:
    data = chain()
    few = hide_labels(data, 0.75, seed=0)
    widths = []
    for given in (data, few):
        problem, result = unmoved(given, mechanism="linear", semi_supervised=True)
        assert problem.data is not None
        with torch.no_grad():
            by_least_squares(problem.model.mechanisms, problem.data["label"].dropna("data").values)  # type: ignore[union-attr, arg-type]
        result = fit_svi(problem, num_steps=1, lr=1e-9, num_samples=1, progress=False)
        found = effect(problem, result, "a", (-1.0, 1.0), num_draws=199, progress=False)
        widths.append((found["high"] - found["low"]).values)
    np.testing.assert_allclose(widths[1] / widths[0], 2.0, rtol=0.4)  # of a quarter of the rows
