"""Latent modality structures: sites against plain formulas, bad input, verdicts, theorem 3.1, law of the bridge."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor

from probmodels import Result, diagnose, fit_svi
from probmodels.datasets.paired.views import make_views
from probmodels.errors import DataError
from probmodels.inference.runtime.ops import isolated
from probmodels.modality_structure import information_bound, make_problem, measure, modality_gap, recall_at
from probmodels.modality_structure.structures import bridge_covariance, normaliser, sample_bridge

WEIGHTS = {
    "orthogonality": 1.5,
    "contrast": 0.25,
    "uniformity": 0.1,
    "bridge": 0.3,
    "consistency": 0.05,
    "augmented_consistency": 0.07,
}


def views(num_rows: int, seed: int = 0, noise: float = 0.3, related: bool = True, **options: Any) -> Any:
    """Two noisy linear views of three shared factors, or of unrelated ones."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(2, num_rows, 3))
    a, b = rng.normal(size=(2, 3, 6))
    noises = noise * rng.normal(size=(2, num_rows, 6))
    first, second = shared[0] @ a + noises[0], shared[0 if related else 1] @ b + noises[1]
    return make_views({"image": first, "text": second}, **options)


def nce(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.arange(len(logits)))


@pytest.mark.parametrize("normalize", ["N", "N2"])
def test_log_densities_are_the_printed_losses_up_to_the_normaliser(normalize: Any) -> None:
    data = views(24, split=np.where(np.arange(24) < 18, "train", "test"))
    problem = make_problem(data, size=4, hidden=8, temperature=0.2, in_modal=True, normalize=normalize, **WEIGHTS)
    problem = problem.mapped(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    model: Any = problem.model
    with isolated(seed=0), torch.no_grad():
        trace = poutine.trace(model).get_trace(*problem.args)
        trace.compute_log_prob()
        (v, vi), (t, ti) = model.embed(problem.args[1:]).values()
        (va, via), (ta, tia) = model.near(problem.args[1:]).values()
    found = {name: float(node["log_prob_sum"]) for name, node in trace.nodes.items() if "log_prob_sum" in node}
    n = len(v)
    pairs = 1 / n if normalize == "N" else 1 / n**2
    mu = F.normalize(0.25 * v + 0.75 * t, dim=-1)

    def kernel(z: Tensor) -> Tensor:
        return torch.exp(-2 * torch.cdist(z, z).square()).sum()

    loss = {
        "match_image_to_text": nce(v @ t.T / 0.2),
        "match_text_to_image": nce(t @ v.T / 0.2),
        "match_image_to_augmented": nce(v @ va.T / 0.2),
        "match_text_to_augmented": nce(t @ ta.T / 0.2),
        "orthogonality_image": 1.5 * (v * vi).sum(-1).square().mean(),
        "orthogonality_text": 1.5 * (t * ti).sum(-1).square().mean(),
        "contrast_image": 0.25 * nce(vi @ via.T / 0.2),
        "contrast_text": 0.25 * nce(ti @ tia.T / 0.2),
        "uniformity": 0.1 * torch.log(pairs * (kernel(vi) + kernel(ti))),
        "bridge_image_to_text": 0.3 * (va - mu).square().sum() / n,
        "cross_image_to_text": 0.05 * pairs * (v @ t.T - t @ v.T).square().sum(),
        "between_image_to_text": 0.05 * pairs * (v @ v.T - t @ t.T).square().sum(),
        "within_image": 0.07 * pairs * (v @ v.T - va @ va.T).square().sum(),
        "within_text": 0.07 * pairs * (t @ t.T - ta @ ta.T).square().sum(),
        "paired_image_to_text": 0.07 * ((v * t).sum(-1) - (va * ta).sum(-1)).square().mean(),
    }
    double = 2 if normalize == "N" else 2 / n
    half = n * (n - 1) // 2
    constant = {
        "orthogonality_image": normaliser(1.5, n),
        "orthogonality_text": normaliser(1.5, n),
        "bridge_image_to_text": normaliser(0.3, 4 * n),
        "cross_image_to_text": normaliser(0.05 * double, half),
        "between_image_to_text": normaliser(0.05 * double, half),
        "within_image": normaliser(0.07 * double, half),
        "within_text": normaliser(0.07 * double, half),
        "paired_image_to_text": normaliser(0.07, n),
    }
    assert loss.keys() <= found.keys()
    for name, value in loss.items():
        assert found[name] == pytest.approx(-n * float(value) + constant.get(name, 0.0), rel=1e-6, abs=1e-6), name


def test_rows_that_lack_a_modality_are_no_candidates() -> None:
    present = np.ones((20, 2), dtype=bool)
    present[:5, 1] = False
    split = np.where(np.arange(20) < 15, "train", "test")
    with_gaps = make_problem(
        views(20, present=present, split=split), size=4, hidden=8, temperature=0.2, consistency=1.0
    )
    model: Any = with_gaps.model
    found = poutine.trace(model).get_trace(*with_gaps.args)
    found.compute_log_prob()
    seen, image, text = with_gaps.args
    alone = poutine.trace(model).get_trace(seen[5:], image[5:], text[5:])
    alone.compute_log_prob()
    for name in ("match_image_to_text", "match_text_to_image", "cross_image_to_text", "between_image_to_text"):
        torch.testing.assert_close(found.nodes[name]["log_prob"], alone.nodes[name]["log_prob"], rtol=1e-4, atol=1e-4)
    short = {"image": np.ones((4, 2)), "text": np.arange(1.0, 7.0).reshape(3, 2)}
    filled = make_views(short, present=[[1, 1], [1, 0], [1, 1], [1, 1]], split=["train", "train", "train", "test"])
    assert filled["text"].values.tolist() == [[1, 2], [0, 0], [3, 4], [5, 6]]


def test_bad_input_is_refused_before_training() -> None:
    a, b = np.ones((10, 2)), np.arange(1.0, 21.0).reshape(10, 2)
    with pytest.raises(DataError, match="different numbers of rows"):
        make_views({"a": a, "b": b[:9]})
    with pytest.raises(DataError, match="have it"):
        make_views({"a": a, "b": b[:9]}, present=np.ones((10, 2)))
    empty = b.copy()
    empty[4] = 0
    with pytest.raises(DataError, match="all zero in 1 rows, as row 4"):
        make_views({"a": a, "b": empty})
    with pytest.raises(DataError, match="held_out=0"):
        make_views({"a": a, "b": b}, held_out=0)
    with pytest.raises(DataError, match="held out"):
        make_views({"a": a, "b": b}, split=["train"] * 10)
    frames = {"a": pd.DataFrame(b, index=list("abcdefghij")), "b": pd.DataFrame(b, index=list("abcdefghji"))}
    for present in (None, np.ones((10, 2))):
        with pytest.raises(DataError, match="labelled otherwise"):
            make_views(frames, present=present)
    alone = np.repeat([[1, 1, 0], [1, 1, 0], [0, 0, 1], [1, 1, 0], [0, 0, 1]], 2, axis=0)
    with pytest.raises(DataError, match="modality 'c' shares fewer than 2 rows"):
        make_problem(make_views({"a": a, "b": b, "c": b}, present=alone, split=["train"] * 6 + ["test"] * 4))
    with pytest.raises(DataError, match="bridge_time"):
        make_problem(make_views({"a": a, "b": b}), bridge_time=0.5)
    with pytest.raises(DataError, match="inferred"):
        make_problem(make_views({"a": a, "b": b}), inferred=["bridge"])


def fit(data: Any, **options: Any) -> Result:
    problem = make_problem(data, size=8, hidden=32, **options)
    return fit_svi(
        problem,
        num_steps=150,
        lr=0.005,
        batch_size=100,
        num_samples=10,
        progress=False,
    )


def test_views_that_belong_together_pass_and_unrelated_ones_fail() -> None:
    related = fit(views(500, held_out=0.4))
    report = diagnose(related)
    assert report.ok, str(report)
    assert "cannot exceed log 200" in str(report)
    test = measure(related).set_index("split").loc["test"]
    assert test["information"] > 1.5
    assert test["recall_10"] > 0.5
    report = diagnose(fit(views(500, held_out=0.4, related=False)))
    assert report.model == "failed"
    assert "no better than by chance" in str(report)


def test_a_weight_that_follows_the_towers_away_from_its_prior_fails() -> None:
    problem = make_problem(views(120), size=3, hidden=16, consistency=0.1, inferred=["consistency"])
    result = fit_svi(problem, num_steps=250, lr=0.05, num_samples=10, progress=False)
    report = diagnose(result)
    assert report.inference == "failed", str(report)
    assert "the weight of 'consistency' is" in str(report)
    assert "fix this weight" in str(report)


def test_rows_learned_by_heart_are_said_and_few_held_out_do_not_pass() -> None:
    report = diagnose(fit(views(300, noise=1.0, held_out=0.4), temperature=0.2))
    assert "far above those held out" in str(report), str(report)
    report = diagnose(fit(views(300, noise=2.0, held_out=0.4), temperature=0.2))
    assert report.model == "failed"
    assert "surer than it is right" in str(report)
    report = diagnose(fit(views(120, held_out=0.1), temperature=0.2))
    assert report.inference == "not judged"
    assert "too few to judge (at least 20)" in str(report)


def test_measures_have_their_closed_forms() -> None:
    rng = np.random.default_rng(0)
    assert information_bound(np.zeros((7, 7))) == pytest.approx(0)
    assert information_bound(100 * np.eye(7)) == pytest.approx(math.log(7))
    assert recall_at(np.zeros((5, 5)), 1) == 0
    assert recall_at(np.eye(5), 1) == 1
    z = rng.normal(size=(200, 3))
    assert modality_gap(z, z + np.array([1.0, 2.0, 0.0])) == pytest.approx((5.0, 0.0), abs=1e-6)
    centroid, distribution = modality_gap(z - z.mean(0), 2 * (z - z.mean(0)))
    assert centroid == pytest.approx(0, abs=1e-9)
    assert distribution == pytest.approx(float(z.var(0).sum()))


def entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def common_part(joint: np.ndarray) -> np.ndarray:
    """The Gács-Körner common part as component (first,) of each value: connected values have one."""
    linked = (joint > 0).astype(int) @ (joint > 0).astype(int).T > 0
    for _ in range(len(linked)):
        linked = (linked.astype(int) @ linked.astype(int)) > 0
    return linked.argmax(1)


def loss_and_gap(joint: np.ndarray) -> tuple[float, float]:
    """H(Y | common part) - H(Y | both), and |I(T; Y) - I(V; Y)|, of a joint (t, v, y)."""
    part = common_part(joint.sum(2))
    shared = np.zeros((len(part), joint.shape[2]))
    np.add.at(shared, part, joint.sum(1))
    y = entropy(joint.sum((0, 1)))
    about = [y + entropy(joint.sum((axis, 2))) - entropy(joint.sum(axis)) for axis in (1, 0)]
    with_part = entropy(shared.ravel()) - entropy(shared.sum(1))
    with_both = entropy(joint.ravel()) - entropy(joint.sum(2).ravel())
    return with_part - with_both, abs(about[0] - about[1])


def test_theorem_3_1_holds_for_random_joints_and_is_tight() -> None:
    rng = np.random.default_rng(0)
    split = 0
    for _ in range(2000):
        shape = rng.integers(2, 5, size=3)
        weight = rng.dirichlet(np.full(shape.prod(), 0.3)).reshape(shape)
        weight *= (rng.random(shape[:2]) < 0.45)[..., None]  # so that many have a common part
        if weight.sum() < 1e-3:
            weight[0, 0] += 1.0
        joint = weight / weight.sum()
        cost, gap = loss_and_gap(joint)
        assert cost >= gap - 1e-12
        split += len(np.unique(common_part(joint.sum(2))[joint.sum((1, 2)) > 0])) > 1
    assert split > 200
    tight = np.zeros((4, 4, 4))
    tight[:, np.arange(4), np.arange(4)] = 1 / 16  # Y is V, and T is independent of both
    assert loss_and_gap(tight) == pytest.approx((math.log(4), math.log(4)))


def test_paths_have_the_law_of_a_brownian_bridge() -> None:
    torch.manual_seed(0)
    times = torch.tensor([0.1, 0.25, 0.6, 0.9], dtype=torch.float64)
    start, end = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    count = 40_000
    paths = sample_bridge(start.expand(count, 2), end.expand(count, 2), times)
    mean = (1 - times.unsqueeze(-1)) * start + times.unsqueeze(-1) * end
    expected = bridge_covariance(times)
    torch.testing.assert_close(expected[0, 2], times[0] * (1 - times[2]))
    error = (times * (1 - times) / count).sqrt().unsqueeze(-1)
    assert ((paths.mean(0) - mean).abs() < 4.5 * error).all()
    left = paths - mean
    found = torch.einsum("nid,njd->ij", left, left) / (2 * count)
    spread = ((expected.diagonal().unsqueeze(1) * expected.diagonal() + expected.square()) / (2 * count)).sqrt()
    assert ((found - expected).abs() < 4.5 * spread).all()


def test_a_modality_may_be_called_as_a_method_of_a_module_is() -> None:
    rng = np.random.default_rng(0)
    problem = make_problem(make_views({name: rng.normal(size=(40, 3)) for name in ("keys", "forward")}))
    result = fit_svi(problem, num_steps=2, num_samples=2, progress=False)
    assert {"match_keys_to_forward", "match_forward_to_keys"} <= set(result.tree["observed_data"].data_vars)
