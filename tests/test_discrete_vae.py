"""The discrete autoencoder against sums over all its states, and short fits against the exact posterior."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
import xarray as xr
from pyro import poutine
from scipy.special import logsumexp
from scipy.stats import bernoulli

from probmodels import Problem, Result, fit_em
from probmodels.datasets.images import make_images
from probmodels.discrete_vae import (
    DiscreteVAE,
    code_usage,
    exact_log_likelihood,
    make_problem,
    tiny,
    write_outputs,
)
from probmodels.errors import DataError, ResultError
from probmodels.inference import Phase, check_weights
from probmodels.inference.programs.programs import fitted

STATES = list(itertools.product(range(3), repeat=2))


@pytest.fixture(autouse=True)
def own_parameters() -> None:
    """Parameters of a module that is called as a program go to pyro's store."""
    pyro.clear_param_store()


@pytest.fixture
def model() -> DiscreteVAE:
    torch.manual_seed(1)
    return DiscreteVAE(2, 3, (2, 3), embedding=4, hidden=5, layers=2).double()


def brute_force(model: DiscreteVAE, image: np.ndarray) -> np.ndarray:
    """Log density (data, state) from probabilities of single pixels."""
    with torch.no_grad():
        chance = [model.decode(torch.tensor(state)).sigmoid().double().numpy() for state in STATES]
    table = [[bernoulli.logpmf(x, p).sum() - 2 * math.log(3) for p in chance] for x in image]
    return np.array(table)


def bars(num_rows: int, seed: int = 0) -> xr.Dataset:
    """Images of 4 x 4 with one bar of four across and one of four down, pixels turned over with probability 0.02."""
    rng = np.random.default_rng(seed)
    across, down = rng.integers(4, size=(2, num_rows))
    clean = (np.arange(4)[:, None] == across[:, None, None]) | (np.arange(4) == down[:, None, None])
    split = np.where(np.arange(num_rows) % 5 == 4, "test", "train")
    return make_images(clean ^ (rng.random((num_rows, 4, 4)) < 0.02), split=split)


@pytest.fixture(scope="module")
def bars_problem() -> Problem:
    return make_problem(bars(500), num_latents=2, num_codes=6, embedding=4, hidden=32, layers=1, guide_hidden=32)


@pytest.fixture(scope="module")
def bars_result(bars_problem: Problem) -> Result:
    phase = Phase("joint", num_particles=4, lr=0.02, schedule=lambda step: 0.05 ** (step / 600), plus={"sleep": 0.1})
    return fit_em(bars_problem, phases=[phase], num_rounds=600, batch_size=100, num_samples=40, progress=False)


def test_the_likelihood_is_the_sum_over_all_states(model: DiscreteVAE) -> None:
    image = np.random.default_rng(0).integers(2, size=(7, 2, 3)).astype(float)
    table = brute_force(model, image)
    with torch.no_grad():
        assert [tuple(state) for block in model.states() for state in block.tolist()] == STATES
        np.testing.assert_allclose(model.log_joint(torch.as_tensor(image), torch.tensor(STATES)), table, atol=1e-12)
        found = model.log_likelihood(torch.as_tensor(image))
    np.testing.assert_allclose(found, logsumexp(table, axis=1), atol=1e-12)


def test_blocks_of_states_and_images_change_nothing(model: DiscreteVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.randint(2, (7, 2, 3)).double()
    with torch.no_grad():
        whole = model.log_likelihood(image)
        monkeypatch.setattr("probmodels.discrete_vae._BLOCK", 12)  # two states at a time, six images
        assert len(list(model.states())) == 5
        torch.testing.assert_close(model.log_likelihood(image), whole)


def test_the_likelihood_of_all_images_sums_to_one(model: DiscreteVAE) -> None:
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6)), dtype=torch.float64).reshape(-1, 2, 3)
    with torch.no_grad():
        assert float(model.log_likelihood(every).logsumexp(0)) == pytest.approx(0.0, abs=1e-12)


def test_the_program_has_the_density_of_the_table(model: DiscreteVAE) -> None:
    image = torch.randint(2, (5, 2, 3)).double()
    table = brute_force(model, image.numpy())
    for place, state in enumerate(STATES):
        given = {"code": torch.tensor(state).expand(5, 2)}
        trace = poutine.trace(poutine.condition(model, given)).get_trace(image)
        trace.compute_log_prob()
        found = trace.nodes["code"]["log_prob"] + trace.nodes["image"]["log_prob"]
        np.testing.assert_allclose(found.detach(), table[:, place], atol=1e-6)  # the prior is of single precision


def test_a_fit_finds_the_bars(bars_problem: Problem, bars_result: Result) -> None:
    # 16 images are equally likely, and every pixel is turned over or not: the entropy of the simulation.
    entropy = math.log(16) - 16 * (0.02 * math.log(0.02) + 0.98 * math.log(0.98))
    found = exact_log_likelihood(bars_problem, bars_result)
    assert found.dims == ("data",)
    # The standard error of the mean of 400 images is 0.13; the decoder fits a little of their noise.
    assert abs(float(found.mean()) + entropy) < 0.6


def test_the_guide_is_near_the_exact_posterior(bars_problem: Problem, bars_result: Result) -> None:
    rows = len(bars_problem.args[0])
    with fitted(bars_problem, bars_result.guide_state or {}, seed=0) as (model, guide), torch.no_grad():
        states = torch.cat(list(model.states()))
        exact = model.log_joint(bars_problem.args[0], states).softmax(-1)
        tables = []
        for state in states:
            given = {"code": state.expand(rows, 2)}
            trace = poutine.trace(poutine.condition(guide, given)).get_trace(*bars_problem.args)
            trace.compute_log_prob()
            tables.append(trace.nodes["code"]["log_prob"].exp())
    q = torch.stack(tables, 1)
    torch.testing.assert_close(q.sum(1), torch.ones(rows), atol=1e-4, rtol=0)
    assert float((q - exact).abs().sum(1).mean() / 2) < 0.05


def test_importance_sampling_agrees_with_the_sum(bars_result: Result) -> None:
    options = {"num_latents": 2, "num_codes": 6, "embedding": 4, "hidden": 32, "layers": 1, "guide_hidden": 32}
    test = make_problem(bars(500), split="test", **options)
    exact = exact_log_likelihood(test, bars_result)
    estimate = check_weights(test, bars_result, num_draws=200)
    # A guide with a total variation of 0.05 has weights of a relative sd of some 0.3, of whose 200 the mean has 0.02.
    assert float(abs(estimate["log_evidence"] - exact).mean()) < 0.05
    np.testing.assert_array_equal(exact["data"], np.arange(4, 500, 5))


def test_outputs_say_likelihoods_and_the_use_of_codes(
    bars_problem: Problem, bars_result: Result, tmp_path: Path
) -> None:
    bars_result.save(tmp_path / "result")
    loaded = Result.load(tmp_path / "result")
    written = write_outputs(loaded, tmp_path / "out")
    mean = float(exact_log_likelihood(bars_problem, bars_result).mean())
    assert f"fitted images: {mean:.3f}" in written.table
    assert "held out images" in written.table
    assert written.report.read_text(encoding="utf-8").startswith(written.table)
    figures = {path.stem for path in (tmp_path / "out" / "figures").iterdir()}
    assert figures == {"samples", "reconstructions", "codes", "loss"}
    usage = code_usage(loaded)
    np.testing.assert_allclose(usage.sum("code"), 1.0)
    drawn = bars_result.posterior["code"].values
    assert float(usage[1, 2]) == pytest.approx((drawn[..., 1] == 2).mean())
    # The four bars of either kind are about as frequent as each other, and a code shows no more than one.
    assert usage.values.max() < 0.4


@pytest.mark.slow
def test_outputs_of_many_states_come_from_draws(
    bars_result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("probmodels.discrete_vae._SUMMED", 35)
    assert "by 200 draws of the guide" in write_outputs(bars_result, tmp_path).table


def test_seeds_choose_the_start_and_splits_the_images() -> None:
    data = bars(20)
    one, same, other = (make_problem(data, seed=seed) for seed in (0, 0, 1))
    for first, second, equal in ((one, same, True), (one, other, False)):
        assert torch.equal(first.model.embedding, second.model.embedding) is equal
    assert one.args[0].shape == (16, 4, 4)
    assert one.data["held_out_image"].shape == (4, 4, 4)
    assert make_problem(data, split="test").args[0].shape == (4, 4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_latents": 0}, "num_latents=0; give a whole number of at least 1"),
        ({"num_codes": 1}, "num_codes=1; give a whole number of at least 2"),
        ({"layers": -1}, "layers=-1; give a whole number of at least 0"),
        ({"hidden": 2.5}, "hidden=2.5"),
        ({"network": "tree"}, "network='tree'; choose one of mlp, gru, independent"),
        ({"split": "valid"}, "no image has split='valid'; choose among 'test', 'train'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_problem(bars(10), **options)


def test_what_does_not_fit_is_refused(bars_result: Result) -> None:
    grey = make_images(np.full((3, 2, 2), 0.5), threshold=None)
    with pytest.raises(DataError, match=r"image\[0, 0, 0\] is 0.5; pixels have to be 0 or 1"):
        make_problem(grey)
    with pytest.raises(ResultError, match="differ in"):
        exact_log_likelihood(tiny(), bars_result)
    many = make_problem(bars(10), num_latents=20, num_codes=4, network="gru")
    result = fit_em(many, num_rounds=1, num_samples=2, progress=False)
    with pytest.raises(DataError, match="too many to sum over"):
        exact_log_likelihood(many, result)
