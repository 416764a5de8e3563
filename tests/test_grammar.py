"""Grammars against enumeration of all trees; the policy against enumeration of all its paths."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor

from probmodels import fit_em, fit_svi
from probmodels.datasets.text import load_conllu, make_sentences, simulate_sentences
from probmodels.errors import DataError, ProblemError
from probmodels.grammar import (
    Grammar,
    draw_posterior_trees,
    exact_log_likelihood,
    exact_span_probabilities,
    fitted_tables,
    make_problem,
    tiny,
    write_outputs,
)
from probmodels.grammar.inside import (
    Tables,
    draw_trees,
    draw_words,
    leaf_weights,
    log_likelihood,
    span_grid,
    span_probabilities,
    split_states,
    tree_log_weight,
)
from probmodels.grammar.outputs import (
    bracketing,
    bracketing_metrics,
    branching_trees,
    least_risk_trees,
    summarise_parses,
)
from probmodels.guides.grammar import TreePolicy, _Forest, backward_path
from probmodels.inference.variational.svi import fitted

LABELS, CLASSES, WORDS, SIZE = 2, 2, 3, 5


def random_tables(parents: bool, seed: int = 0) -> Tables:
    generator = torch.Generator().manual_seed(seed)
    symbols = LABELS + CLASSES

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).softmax(-1)

    rule = draw(LABELS + 1 if parents else 1, LABELS, symbols**2).unflatten(-1, (symbols, symbols))
    return Tables(draw(LABELS), rule, draw(CLASSES, WORDS))


def all_trees(length: int, size: int = SIZE, labels: int = LABELS) -> Tensor:
    """Every tree of a sentence, (tree, size - 1, 3)."""

    def below(start: int, end: int) -> list[dict[int, tuple[int, int, int]]]:
        if end - start == 1:
            return [{}]
        return [
            {**left, **right, middle - 1: (label, start, end)}
            for middle in range(start + 1, end)
            for left, right in itertools.product(below(start, middle), below(middle, end))
            for label in range(labels)
        ]

    found = below(0, length)
    trees = torch.full((len(found), size - 1, 3), -1)
    for row, nodes in enumerate(found):
        for place, node in nodes.items():
            trees[row, place] = torch.tensor(node)
    return trees


def by_hand(tables: Tables, nodes: Tensor, word: Tensor, length: int) -> float:
    """Log probability of a tree with its words, by recursion over its nodes and all preterminals."""
    rows = {(int(s), int(e)): (k + 1, int(a)) for k, (a, s, e) in enumerate(nodes) if a >= 0}

    def symbol(start: int, end: int, parent: int) -> Tensor:
        """Probability of what lies below each symbol."""
        below = torch.zeros(LABELS + CLASSES)
        if end - start == 1:
            below[LABELS:] = tables.emission[:, word[start]]
            return below
        middle, label = rows[start, end]
        left, right = symbol(start, middle, label), symbol(middle, end, label)
        context = 0 if len(tables.rule) == 1 else parent
        below[label] = left @ tables.rule[context, label] @ right
        return below

    return float((tables.root * symbol(0, length, LABELS)[:LABELS]).sum().log())


def total_variation(draws: Tensor, values: Tensor, chance: Tensor) -> tuple[float, float]:
    """Between draws (draw, ...) and the distribution of values (value, ...), and what the draws' noise alone gives."""
    keys = {tuple(value.flatten().tolist()): place for place, value in enumerate(values)}
    share = torch.zeros(len(values))
    for draw in draws:
        share[keys[tuple(draw.flatten().tolist())]] += 1 / len(draws)
    noise = 0.5 * (2 / np.pi) ** 0.5 * (chance * (1 - chance) / len(draws)).sqrt().sum()
    return float((share - chance).abs().sum() / 2), float(noise)


def a_sentence(length: int) -> tuple[Tensor, Tensor]:
    return torch.tensor([0, 2, 1, 1, 0][:length] + [0] * (SIZE - length)), torch.tensor(length)


# -- sums over trees --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parents", [False, True])
@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_inside_is_the_sum_over_all_trees(parents: bool, length: int) -> None:
    tables, (word, n) = random_tables(parents), a_sentence(length)
    trees, leaf = all_trees(length), leaf_weights(tables, word, word)
    logs = tree_log_weight(tables, trees, leaf, n)
    for row in range(0, len(trees), max(1, len(trees) // 20)):
        assert float(logs[row]) == pytest.approx(by_hand(tables, trees[row], word, length), abs=1e-4)
    exact = log_likelihood(tables, leaf[None], n[None])
    assert float(exact) == pytest.approx(float(logs.logsumexp(0)), abs=1e-4)
    chance = (span_grid(trees) * logs.softmax(0)[:, None, None]).sum(0)
    assert span_probabilities(tables, leaf[None], n[None])[0].numpy() == pytest.approx(chance.numpy(), abs=1e-5)


def test_sentences_of_different_lengths_go_together() -> None:
    tables = random_tables(True)
    word, length = (torch.stack(x) for x in zip(*(a_sentence(n) for n in (5, 2, 4)), strict=True))
    together = log_likelihood(tables, leaf_weights(tables, word, word), length)
    for row, n in enumerate(length.tolist()):
        own = word[row : row + 1, :n]
        alone = log_likelihood(tables, leaf_weights(tables, own, own), length[row : row + 1])
        assert float(together[row]) == pytest.approx(float(alone), abs=1e-4)


def test_gradients_of_the_inside_algorithm_are_right() -> None:
    word, length = (x[None] for x in a_sentence(4))
    tables = [Tables(*(table.double().requires_grad_() for table in random_tables(p))) for p in (False, True)]
    for given in tables:

        def function(*values: Tensor) -> Tensor:
            found = Tables(*values)
            return log_likelihood(found, leaf_weights(found, word, word), length)

        assert torch.autograd.gradcheck(function, tuple(given))


@pytest.mark.parametrize("parents", [False, True])
def test_draws_of_trees_are_exact(parents: bool) -> None:
    torch.manual_seed(0)
    tables, (word, n) = random_tables(parents), a_sentence(4)
    trees = all_trees(4)
    for given in (word, None):
        leaf = leaf_weights(tables, given, word)
        chance = tree_log_weight(tables, trees, leaf, n).softmax(0)
        distance, noise = total_variation(draw_trees(tables, leaf[None], n.expand(4000)), trees, chance)
        assert distance < 1.3 * noise  # a sum over 40 trees, of relative spread about 1 / 10


@pytest.mark.parametrize("parents", [False, True])
def test_words_given_a_tree_are_a_distribution_and_drawn_from_it(parents: bool) -> None:
    torch.manual_seed(0)
    tables, n = random_tables(parents), torch.tensor(4)
    words = torch.cartesian_prod(*[torch.arange(WORDS)] * 4)
    words = torch.cat([words, torch.zeros(len(words), 1, dtype=torch.long)], 1)
    tree = all_trees(4)[17]
    many = tree.expand(len(words), -1, -1)
    logs = tree_log_weight(tables, many, leaf_weights(tables, words, words), n)
    alone = tree_log_weight(tables, tree, leaf_weights(tables, None, words[0]), n)
    chance = (logs - alone).exp()
    assert float(chance.sum()) == pytest.approx(1, abs=1e-5)
    distance, noise = total_variation(draw_words(tables, tree.expand(4000, -1, -1), n.expand(4000)), words, chance)
    assert distance < 1.3 * noise


def test_rules_that_depend_on_parents_are_a_grammar_of_split_states() -> None:
    tables, (word, n) = random_tables(True), a_sentence(5)
    split = split_states(tables)
    assert split.rule.shape[0] == 1
    torch.testing.assert_close(split.rule.sum((-1, -2)), torch.ones(1, 6))
    found = [log_likelihood(t, leaf_weights(t, word[None], word[None]), n[None]) for t in (tables, split)]
    torch.testing.assert_close(*found)
    merged = tables._replace(rule=tables.rule[:1].expand(3, -1, -1, -1))
    free = tables._replace(rule=tables.rule[:1])
    found = [log_likelihood(t, leaf_weights(t, word[None], word[None]), n[None]) for t in (merged, free)]
    torch.testing.assert_close(*found)


def test_trees_of_least_risk_are_the_best_of_all() -> None:
    chance = torch.rand(6, SIZE, SIZE + 1, generator=torch.Generator().manual_seed(0))
    length = torch.tensor([5, 5, 4, 3, 2, 5])
    found = torch.as_tensor(least_risk_trees(chance.numpy(), length.numpy()))
    worth = (span_grid(found) * chance).sum((1, 2))
    for row, n in enumerate(length.tolist()):
        best = (span_grid(all_trees(n, labels=1)) * chance[row]).sum((1, 2)).max()
        assert float(worth[row]) == pytest.approx(float(best), abs=1e-5)


# -- the model --------------------------------------------------------------------------------------------------------


def sentences(seed: int = 0, num: int = 12, **options: Any) -> xr.Dataset:
    return simulate_sentences(num, max_length=5, seed=seed, **options)


def short(words: list[list[int]]) -> xr.Dataset:
    return make_sentences([[f"w{code}" for code in row] for row in words], vocabulary=[f"w{i}" for i in range(WORDS)])


@pytest.mark.parametrize("parents", [False, True])
def test_the_joint_density_of_the_model_is_that_of_the_grammar(parents: bool) -> None:
    tables = random_tables(parents)
    problem = make_problem(short([[0, 2, 1, 1], [1, 0]]), tables=tables, left_branching=0.5)
    word, length = problem.args
    trees = torch.stack([all_trees(4, 4)[9], torch.tensor([[1, 0, 2], [-1, -1, -1], [-1, -1, -1]])])
    trace: Any = poutine.trace(poutine.condition(problem.model, {"tree": trees})).get_trace(word, length)
    energy = 0.5 * float(((trees[0, :, 0] >= 0) & (trees[0, :, 1] < torch.arange(3))).sum())
    wanted = by_hand(tables, trees[0], word[0], 4) + by_hand(tables, trees[1], word[1], 2) - energy
    assert float(trace.log_prob_sum().detach()) == pytest.approx(wanted, abs=1e-3)


def test_the_shape_prior_is_in_the_exact_likelihood() -> None:
    tables, data = random_tables(False), short([[0, 2, 1, 1, 0]])
    problem = make_problem(data, tables=tables, left_branching=0.7)
    trees = all_trees(5)
    logs = tree_log_weight(tables, trees, leaf_weights(tables, *problem.args[:1], problem.args[0])[0], torch.tensor(5))
    branches = ((trees[..., 0] >= 0) & (trees[..., 1] < torch.arange(4))).sum(-1)
    wanted = (logs - 0.7 * branches).logsumexp(0)
    assert float(exact_log_likelihood(problem)[0]) == pytest.approx(float(wanted), abs=1e-4)


def test_prior_draws_are_those_of_the_grammar_given_lengths() -> None:
    tables = random_tables(True)
    problem = make_problem(short([[0, 0, 0]] * 3000), tables=tables)
    torch.manual_seed(0)
    trace: Any = poutine.trace(poutine.uncondition(problem.model)).get_trace(*problem.args)
    trees, words = trace.nodes["tree"]["value"], trace.nodes["word"]["value"]
    every = all_trees(3, 3)
    pairs = [(tree, word) for tree in every for word in torch.cartesian_prod(*[torch.arange(WORDS)] * 3)]
    logs = torch.tensor([by_hand(tables, tree, word, 3) for tree, word in pairs])
    values = torch.stack([torch.cat([tree.flatten(), word]) for tree, word in pairs])
    distance, noise = total_variation(torch.cat([trees.flatten(1), words], 1), values, logs.softmax(0))
    assert distance < 1.2 * noise


def test_dirichlet_priors_count_once_whatever_the_batch() -> None:
    data, tables = short([[0, 2], [1, 1], [2, 0]]), random_tables(False)
    traces = []
    for concentration in (1.0, 0.5):
        problem = make_problem(data, tables=tables, concentration=concentration)
        torch.manual_seed(0)
        traces.append(float(poutine.trace(problem.model).get_trace(*problem.args).log_prob_sum().detach()))
    prior = -0.5 * float(tables.rule.log().sum() + tables.emission.log().sum())
    assert traces[1] - traces[0] == pytest.approx(prior, rel=1e-4)


# -- the policy -------------------------------------------------------------------------------------------------------


def a_policy(length: int, tables: Tables | None = None) -> tuple[TreePolicy, Tensor, Tensor]:
    looks = None if tables is None else lambda: tables
    policy = TreePolicy(WORDS, LABELS, SIZE, width=8, heads=2, layers=1, tables=looks, seed=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    word, n = a_sentence(length)
    return policy, word, n


def run(policy: TreePolicy, word: Tensor, length: Tensor, actions: Tensor) -> Any:
    """Trace of the policy at given actions (row, N - 1)."""
    values: Any = poutine.Trace()
    for step, action in enumerate(actions.unbind(-1)):
        node: Any = {"type": "sample", "is_observed": False, "infer": {"is_auxiliary": True}, "value": action}
        values.add_node(f"merge_{step}", name=f"merge_{step}", **node)
    rows = len(actions)
    with torch.no_grad():
        replayed = poutine.replay(policy, trace=values)
        trace: Any = poutine.trace(replayed).get_trace(word.expand(rows, -1), length.expand(rows))
    trace.compute_log_prob()
    return trace


@pytest.mark.parametrize("parents", [None, False, True])
@pytest.mark.parametrize("length", [2, 3, 4])
def test_paths_of_the_policy_sum_to_one_and_so_do_backward_paths(length: int, parents: bool | None) -> None:
    policy, word, n = a_policy(length, None if parents is None else random_tables(parents))
    steps = [torch.arange((SIZE - 1 - step) * LABELS if step < length - 1 else 1) for step in range(SIZE - 1)]
    actions = torch.cartesian_prod(*steps)
    trace = run(policy, word, n, actions)
    log_q = sum(trace.nodes[f"merge_{step}"]["log_prob"] for step in range(SIZE - 1))
    possible = log_q > -torch.inf
    assert float(log_q.exp().sum()) == pytest.approx(1, abs=1e-4)
    sums: dict[tuple[int, ...], float] = {}
    for tree, log in zip(
        trace.nodes["tree"]["value"][possible], trace.nodes["tree"]["log_prob"][possible], strict=True
    ):
        key = tuple(tree.flatten().tolist())
        sums[key] = sums.get(key, 0.0) + float((-log).exp())
    assert sums.keys() == {tuple(tree.flatten().tolist()) for tree in all_trees(length)}
    assert list(sums.values()) == pytest.approx([1.0] * len(sums), abs=1e-5)


def test_backward_paths_lead_back_to_their_trees_and_have_their_probabilities() -> None:
    policy, word, n = a_policy(5)
    torch.manual_seed(0)
    trees = all_trees(5)
    trace = run(policy, word, n, backward_path(trees, LABELS))
    assert torch.equal(trace.nodes["tree"]["value"], trees)
    spans = span_grid(trees)
    tree = trees[(spans[:, 0, 2] & spans[:, 2, 4] & spans[:, 0, 4]).nonzero()[0]]  # ((a b) (c d)) e, in two orders
    paths = backward_path(tree.expand(2000, -1, -1), LABELS)
    first = (paths[:, 0] // LABELS == 0).double().mean()
    assert len(paths.unique(dim=0)) == 2
    assert abs(float(first) - 0.5) < 4 * 0.5 / 2000**0.5


@pytest.mark.parametrize("parents", [False, True])
def test_gains_of_all_steps_are_the_log_density_of_the_tree(parents: bool) -> None:
    tables, (word, length) = random_tables(parents), a_sentence(5)
    trees = all_trees(5)
    rows = len(trees)
    forest = _Forest(tables, word.expand(rows, -1))
    each, total = torch.arange(rows), torch.zeros(rows)
    for step, action in enumerate(backward_path(trees, LABELS).unbind(-1)):
        at, label = action // LABELS, action % LABELS
        left = SIZE - step
        total += forest.gains(each, torch.full((rows,), left == 2))[each, at, label]
        source = torch.arange(left - 1) + (torch.arange(left - 1) > at.unsqueeze(-1))
        forest.join(torch.stack([at, at + 1], 1), label, source, torch.arange(left - 1) == at.unsqueeze(-1))
    leaf = leaf_weights(tables, word, word)
    exact = tree_log_weight(tables, trees, leaf, length)
    assert total.numpy() == pytest.approx((exact - leaf.sum(-1).log().sum()).numpy(), abs=1e-4)


@pytest.mark.parametrize("parents", [False, True])
def test_a_policy_that_looks_at_the_grammar_is_exact_for_two_words_untrained(parents: bool) -> None:
    tables, (word, length) = random_tables(parents, 2), a_sentence(2)
    policy = TreePolicy(WORDS, LABELS, SIZE, width=8, heads=2, layers=1, tables=lambda: tables)
    actions = torch.tensor([[label, 0, 0, 0] for label in range(LABELS)])
    trace = run(policy, word, length, actions)
    chance = tree_log_weight(tables, trace.nodes["tree"]["value"], leaf_weights(tables, word, word), length).softmax(0)
    assert trace.nodes["merge_0"]["log_prob"].exp().numpy() == pytest.approx(chance.numpy(), abs=1e-5)


def test_policies_look_at_the_grammar_that_is_fitted_and_leave_its_gradient_alone() -> None:
    options: dict[str, Any] = {"num_nonterminals": 2, "num_preterminals": 2, "width": 16, "layers": 1, "heads": 2}
    problem = make_problem(sentences(num=20), **options)
    before = fitted_tables(problem)
    result = fit_em(problem, phases=["joint"], num_rounds=5, lr=0.05, num_samples=2, compile="eager", progress=False)
    assert torch.equal(fitted_tables(problem).rule, before.rule)
    with fitted(problem, result.guide_state, seed=0) as (model, guide):
        assert torch.equal(guide.tables().rule, model.tables().rule)
        assert not torch.equal(guide.tables().rule, before.rule)
        trace: Any = poutine.trace(guide).get_trace(*problem.args)
        trace.compute_log_prob()
        trace.nodes["merge_0"]["log_prob"].sum().backward()
        assert model.rule.grad is None
        assert guide.trust.grad.abs().sum() > 0


def distance_to_posterior(problem: Any, result: Any, copies: int) -> tuple[float, float]:
    """Mean total variation between draws of the policy and the exact posterior, and what noise alone gives."""
    tables, found = fitted_tables(problem, result), []
    word, length = problem.args
    draws = torch.as_tensor(result.posterior["tree"].values[0])
    for row in range(0, len(word), copies):  # equal sentences stand together
        trees = all_trees(int(length[row]), word.shape[1], tables.num_nonterminals)
        chance = tree_log_weight(tables, trees, leaf_weights(tables, word[row], word[row]), length[row]).softmax(0)
        found.append(total_variation(draws[:, row : row + copies].flatten(0, 1), trees, chance))
    return tuple(np.mean(found, axis=0))  # type: ignore[return-value]


@pytest.mark.slow
@pytest.mark.parametrize(("look_ahead", "far"), [(False, 0.3), (True, 0.15)])
def test_the_policy_finds_the_exact_posterior_of_a_fixed_grammar(look_ahead: bool, far: float) -> None:
    copies, rows = 6, [[0, 2, 1, 1], [1, 0, 2], [2, 2, 0, 1], [0, 1, 1, 2]]
    data = short([row for row in rows for _ in range(copies)])
    options: dict[str, Any] = {"tables": random_tables(True, 3), "learn": False, "width": 32, "layers": 1, "heads": 2}
    problem = make_problem(data, loss="VarGrad", epsilon=0.03, look_ahead=look_ahead, **options)
    fit: dict[str, Any] = {"num_samples": 200, "compile": "eager", "progress": False}
    before = fit_svi(problem, num_steps=1, lr=1e-9, **fit)
    result = fit_svi(problem, num_steps=150, lr=1e-2, lr_decay=0.03, **fit)
    start, _ = distance_to_posterior(problem, before, copies)
    end, noise = distance_to_posterior(problem, result, copies)
    assert start > far
    assert end < noise + 0.03
    exact = float(exact_log_likelihood(problem).sum())
    assert float(result.tree["sample_stats"]["log_weight"].mean()) == pytest.approx(exact, rel=0.01)


def test_trajectory_balance_learns_the_evidence_of_each_sentence() -> None:
    data = short([[0, 2, 1], [1, 0], [2, 2, 2]])
    problem = make_problem(data, tables=random_tables(False), learn=False, width=16, layers=1, heads=2, num_particles=4)
    result = fit_svi(problem, num_steps=150, lr=2e-2, lr_decay=0.03, num_samples=10, compile="eager", progress=False)
    with fitted(problem, result.guide_state, seed=0) as (_, guide), torch.no_grad():
        trace: Any = poutine.trace(guide).get_trace(*problem.args)
    exact = exact_log_likelihood(problem).values
    assert trace.nodes["log_Z"]["value"].numpy() == pytest.approx(exact, abs=0.15)


def test_dreams_teach_the_policy() -> None:
    options: dict[str, Any] = {"num_nonterminals": 2, "num_preterminals": 2, "width": 16, "layers": 1, "heads": 2}
    # From uniform actions: those that start from the grammar leave less to learn.
    problem = make_problem(sentences(num=40), spread=3.0, look_ahead=False, **options)
    result = fit_em(problem, phases=["sleep"], num_rounds=60, num_samples=2, compile="eager", progress=False)
    loss = result.tree["fit"]["loss"].values
    assert loss[-10:].mean() < 0.7 * loss[:3].mean()


def test_em_and_exact_marginalisation_raise_the_likelihood() -> None:
    data = sentences(num=30)
    sizes: dict[str, Any] = {"num_nonterminals": 3, "num_preterminals": 4}
    exact, em = make_problem(data, exact=True, **sizes), make_problem(data, **sizes, width=16, layers=1, heads=2)
    start = float(exact_log_likelihood(em).sum())
    summed = fit_svi(exact, num_steps=60, lr=0.02, num_samples=20, compile="eager", progress=False)
    learned = fit_em(em, phases=["joint"], num_rounds=80, lr=0.01, num_samples=20, compile="eager", progress=False)
    best, found = (float(exact_log_likelihood(p, r).sum()) for p, r in ((exact, summed), (em, learned)))
    assert best > start + 60
    assert found > start + 20
    assert -summed.tree["fit"]["loss"].values[-1] == pytest.approx(best, rel=0.02)
    # Draws of trees beside the summed-out model are exact: their spans have the exact probabilities.
    drawn = span_grid(torch.as_tensor(summed.posterior["tree"].values[0])).double().mean(0).numpy()
    assert np.abs(drawn - exact_span_probabilities(exact, summed).values).max() < 5 * 0.5 / 20**0.5


# -- outputs, data and errors -----------------------------------------------------------------------------------------


def test_outputs_are_written_and_agree(tmp_path: Path) -> None:
    problem = tiny()
    result = fit_em(problem, num_rounds=2, num_samples=10, progress=False)
    written = write_outputs(result, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"summary.txt", "trees.csv", "trees.png"}
    summary = summarise_parses(result)
    length = problem.args[1].numpy()
    chance = summary["span_probability"].values
    np.testing.assert_allclose(chance.sum((1, 2)), length - 1)
    np.testing.assert_allclose(chance[np.arange(len(length)), 0, length], 1)
    assert f"{summary.attrs['f1_least_risk']:.3f}" in written.table


def test_scores_of_brackets() -> None:
    length = np.array([4, 3])
    right, left = branching_trees(length, 4), branching_trees(length, 4, right=False)
    assert bracketing(right[0], list("abcd")) == "(a (b (c d)))"
    assert bracketing(left[0], list("abcd")) == "(((a b) c) d)"
    assert bracketing(left[1], list("abc")) == "((a b) c)"
    gold = span_grid(torch.as_tensor(right)).numpy()
    assert bracketing_metrics(right, gold, length)["f1"] == 1
    assert bracketing_metrics(left, gold, length)["f1"] == 0
    gold[0, 1, 4] = False  # of three spans of right branching two are given
    found = bracketing_metrics(right, gold, length)
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["recall"] == 1


def test_simulated_sentences_have_the_likelihood_of_their_grammar() -> None:
    for grammar in ("english", "parents"):
        problem = make_problem(simulate_sentences(400, grammar=grammar, max_length=30, seed=1), learn=False)
        assert len(fitted_tables(problem).rule) == (5 if grammar == "parents" else 1)
        assert problem.data is not None
        gold = problem.data["gold"].values
        assert np.isfinite(exact_log_likelihood(problem)).all()
        # Given spans are as probable as the posterior says, E[sum p gold] = E[sum p^2], for this grammar alone.
        chance = exact_span_probabilities(problem).values
        gap = (chance * (gold - chance)).sum((1, 2))
        assert abs(gap.mean()) < 4 * gap.std() / len(gap) ** 0.5


CONLLU = """# text = The dog saw it .
1\tThe\tthe\tDET\t_\t_\t2\tdet\t_\t_
2\tdog\tdog\tNOUN\t_\t_\t3\tnsubj\t_\t_
3-4\tsawit\t_\t_\t_\t_\t_\t_\t_\t_
3\tsaw\tsee\tVERB\t_\t_\t0\troot\t_\t_
4\tit\tit\tPRON\t_\t_\t3\tobj\t_\t_
4.1\tghost\t_\t_\t_\t_\t_\t_\t_\t_
5\t.\t.\tPUNCT\t_\t_\t3\tpunct\t_\t_

1\tGo\tgo\tVERB\t_\t_\t0\troot\t_\t_

1\tdog\tdog\tNOUN\t_\t_\t3\tdep\t_\t_
2\tsaw\tsee\tVERB\t_\t_\t0\troot\t_\t_
3\tit\tit\tPRON\t_\t_\t2\tobj\t_\t_
"""


def test_treebanks_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.conllu"
    path.write_text(CONLLU, encoding="utf-8")
    data = load_conllu(path, min_count=1, max_length=6)
    words = data["vocabulary"].values
    assert [str(words[code]) for code in data["word"].values[0, :4]] == ["the", "dog", "saw", "it"]
    assert data["length"].values.tolist() == [4, 3]  # a sentence of one word is left out
    spans = [list(zip(*np.nonzero(grid), strict=True)) for grid in data["gold"].values]
    assert spans == [[(0, 2), (0, 4)], [(0, 3)]]  # "dog ... it" leaves a gap
    assert load_conllu(path, min_count=1, punctuation=True)["length"].values.tolist() == [5, 3]
    rare = load_conllu(path, min_count=2)
    assert rare["vocabulary"].values.tolist() == ["<unknown>", "dog", "it", "saw"]
    same = load_conllu(path, vocabulary=["<unknown>", "it"])
    assert same["word"].values[0, :4].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("\t_\t_\t2\tdet", "\t_\t_\tx\tdet"), "lines 1 to 9.*invalid literal.*'x'"),
        (("\t_\t_\t2\tdet", "\t_\t_\t9\tdet"), "heads of word 1 lead to no root"),
        (("dog\tNOUN", "dog NOUN"), "line 3 has 9 columns"),
    ],
)
def test_damaged_treebanks_are_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "a.conllu"
    path.write_text(CONLLU.replace(*change), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_conllu(path)


def test_data_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*absent.conllu"):
        load_conllu(tmp_path / "absent.conllu")
    with pytest.raises(DataError, match="is a folder; name a file in it"):
        load_conllu(tmp_path)
    with pytest.raises(DataError, match="min_count=1 is not used with vocabulary"):
        load_conllu(tmp_path / "absent.conllu", vocabulary=["it"], min_count=1)
    with pytest.raises(DataError, match="sentence 1 has 1 words"):
        make_sentences([["a", "b"], ["a"]])
    with pytest.raises(DataError, match="lacks 1 words, such as 'b'"):
        make_sentences([["a", "b"]], vocabulary=["a"])
    with pytest.raises(DataError, match=r"bracket \(0, 3\)"):
        make_sentences([["a", "b"]], [[(0, 3)]])
    with pytest.raises(DataError, match="grammar='french'"):
        simulate_sentences(3, grammar="french")
    data = sentences()
    with pytest.raises(DataError, match="'word' is absent"):
        make_problem(data.drop_vars("word"))
    with pytest.raises(DataError, match="codes of words run from 0 to 99"):
        make_problem(data.assign(word=data["word"].where(data["position"] > 0, 99)))
    with pytest.raises(DataError, match="lengths are from 0 to"):
        make_problem(data.assign(length=data["length"] * 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_nonterminals": 0}, "num_nonterminals=0"),
        ({"width": 10, "heads": 4}, "width=10 is no multiple"),
        ({"loss": "Trace_ELBO"}, "loss='Trace_ELBO'"),
        ({"concentration": 0.0}, "concentration=0.0"),
        ({"exact": True, "learn": False}, "leaves nothing to fit"),
        ({"exact": True, "width": 32}, "width=32 is not used with exact=True"),
        ({"exact": True, "look_ahead": False}, "look_ahead=False is not used with exact=True"),
        ({"learn": False, "num_nonterminals": 3}, "num_nonterminals=3 is not used with learn=False"),
        ({"learn": False, "concentration": 2.0}, "concentration=2.0 is not used with learn=False"),
        ({"tables": random_tables(False), "spread": 2.0}, "spread=2.0 is not used with tables"),
        ({"tables": random_tables(False), "exact": True, "seed": 1}, "seed=1 is not used with exact=True and tables"),
        ({"loss": "VarGrad", "num_particles": 1}, "num_particles=1 with loss='VarGrad'"),
        ({"num_nonterminals": 400, "num_preterminals": 400, "parents": True}, "rules; take fewer"),
        ({"tables": (1, 2, 3)}, "give a Tables or None"),
        ({"tables": random_tables(False)}, r"tables.emission has shape \(2, 3\)"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_problem(sentences(), **options)


def test_a_fixed_grammar_has_to_be_given() -> None:
    with pytest.raises(DataError, match="true_root"):
        make_problem(short([[0, 1]]), learn=False)
    tables = random_tables(False)
    with pytest.raises(DataError, match="no probabilities"):
        make_problem(short([[0, 1]]), tables=tables._replace(root=2 * tables.root))


def test_other_sentences_need_the_same_vocabulary() -> None:
    problem = make_problem(sentences())
    with pytest.raises(DataError, match="data have 3 words, the grammar has 12"):
        exact_log_likelihood(problem, data=short([[0, 1]]))
    other = sentences(1)
    assert exact_log_likelihood(problem, data=other).shape == (12,)
    assert draw_posterior_trees(problem, data=other).shape == (12, 4, 3)


def test_other_problems_have_no_grammar() -> None:
    from probmodels import Problem

    with pytest.raises(ProblemError, match="no problem of grammars"):
        fitted_tables(Problem("other", pyro.deterministic))
    assert isinstance(tiny().model, Grammar)
