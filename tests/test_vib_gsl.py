"""VIB-GSL against enumeration of all graphs, its gradients, minibatches of graphs, and predictions for new ones."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch
import xarray as xr
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor

import probmodels.guides.vib_gsl as parts
from probmodels import Problem, fit_svi
from probmodels.datasets.graph_data import import_pyg, make_graph
from probmodels.errors import DataError, ProblemError
from probmodels.guides.edges import RANDOM, EdgeSet, make_edges
from probmodels.guides.vib_gsl import BACKBONES, choose_graphs
from probmodels.inference.programs.checks import parameters_without_gradient
from probmodels.inference.runtime import memory
from probmodels.vib_gsl import make_problem, predict

LAYERS = sorted(BACKBONES)
quiet = partial(fit_svi, progress=False)
still = partial(quiet, lr=1e-14, num_samples=2)  # losses of one and the same guide


def collection(sizes: list[int], seed: int = 0, num_features: int = 2, **options) -> xr.Dataset:
    """Random graphs of the given sizes, of two classes in turn."""
    rng = np.random.default_rng(seed)
    graph = np.repeat(np.arange(len(sizes)), sizes)
    starts = np.cumsum(sizes) - sizes
    pairs = [
        (start + i, start + j)
        for start, size in zip(starts, sizes, strict=True)
        for i, j in itertools.combinations(range(size), 2)
        if rng.random() < 0.4
    ]
    x = rng.standard_normal((len(graph), num_features))
    return make_graph(x, np.arange(len(sizes)) % 2, np.array(pairs).reshape(-1, 2), graph=graph, **options)


def rings_and_paths(num_graphs: int, seed: int = 0) -> xr.Dataset:
    """Rings and paths of five to seven nodes with a useless feature: only the edges tell them apart."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(5, 8, num_graphs)
    graph, starts = np.repeat(np.arange(num_graphs), sizes), np.cumsum(sizes) - sizes
    ring = np.arange(num_graphs) % 2
    pairs = [(s + i, s + (i + 1) % n) for s, n, r in zip(starts, sizes, ring, strict=True) for i in range(n - 1 + r)]
    split = np.where(np.arange(num_graphs) < num_graphs // 2, "train", "test")
    return make_graph(np.ones((len(graph), 1)), ring, pairs, graph=graph, split=split)


def double(problem: Problem) -> tuple:
    """Copies of model and guide, and the arguments, in double precision."""
    model, guide = (part.double() for part in problem.programs())
    x, *rest = problem.args
    return model, guide, (x.double(), *rest)


# ------------------------------------------------------------------------------------------- all graphs enumerated

POINTS, WEIGHTS = (torch.from_numpy(value) for value in np.polynomial.hermite_e.hermegauss(80))
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def every_graph(guide, x: Tensor, edges: EdgeSet, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities of all sets of edges of one graph, log odds (pair,), mean and scale of z given each set."""
    x, one = choose_graphs(x, edges, torch.tensor([index]))
    logits = guide.edges(x, one)
    subsets = torch.tensor(list(itertools.product([0.0, 1.0], repeat=one.num_pairs)), dtype=x.dtype)
    probability = torch.distributions.Bernoulli(logits=logits).log_prob(subsets).sum(-1).exp()
    shift = torch.arange(len(subsets)).unsqueeze(1) * len(x)
    copies = EdgeSet(  # one graph for each configuration
        (one.source + shift).flatten(),
        (one.target + shift).flatten(),
        one.origin.repeat(len(subsets)),
        torch.arange(len(subsets)).repeat_interleave(len(x)),
        len(subsets),
    )
    weight = guide.skip * one.observed + (1 - guide.skip) * subsets
    loc, scale = guide.encoder(x.repeat(len(subsets), 1), copies, weight.flatten())
    return probability, logits, loc.squeeze(-1), scale.squeeze(-1)


def exactly(model, guide, args: tuple) -> tuple[Tensor, Tensor]:
    """Loss, and class probabilities (graph, class), for an embedding of one component, by sums and quadrature."""
    x, edges, y, labelled = args
    loss, classes = torch.zeros((), dtype=torch.float64), []
    low, high = model.rates
    for index in range(len(y)):
        probability, logits, loc, scale = every_graph(guide, x, edges, index)
        seen = choose_graphs(x, edges, torch.tensor([index]))[1].observed.double()
        z = (loc.unsqueeze(1) + scale.unsqueeze(1) * POINTS).unsqueeze(-1)  # (configuration, point, 1)
        log_p = model.classifier(z).log_softmax(-1)
        average = partial(torch.einsum, "s,p,spc->c", probability, WEIGHTS)
        classes.append(average(log_p.exp()))
        kl = (loc**2 + scale**2 - 1) / 2 - scale.log()
        if labelled[index]:
            prior = torch.distributions.Bernoulli(low + (high - low) * seen)
            edge_kl = torch.distributions.kl_divergence(torch.distributions.Bernoulli(logits=logits), prior).sum()
            loss = loss - average(log_p)[y[index]] + model.beta * probability @ kl + model.edge_beta * edge_kl
    return loss, torch.stack(classes)


def small(**options) -> Problem:
    data = collection([4, 3, 5, 2], split=["train", "train", "train", "test"], seed=3)
    plain = {"layers": 1, "seed": 1, "observed_rate": 0.8, "edge_rate": 0.4, "skip": 0.0, "edge_beta": 0.0}
    problem = make_problem(data, bottleneck=1, width=4, **{**plain, **options})
    with torch.no_grad():
        problem.guide.edges.level += 0.7  # away from the prior, where edges start
    return problem


@pytest.mark.parametrize(("backbone", "beta", "edge_beta"), [("gcn", 0.7, 0.0), ("gat", 0.2, 0.0), ("gin", 0.7, 0.4)])
def test_the_loss_is_that_of_all_graphs_enumerated(backbone, beta, edge_beta):
    problem = small(backbone=backbone, beta=beta, edge_beta=edge_beta, skip=0.3)
    exact = exactly(*double(problem))[0].item()
    losses = still(problem, num_steps=1000, dtype="float64").tree["fit"]["loss"].values
    error = losses.std() / np.sqrt(len(losses))
    assert abs(losses.mean() - exact) < 4 * error
    assert error < 0.01 * exact  # so that a weight left out on either side would show, as below


@pytest.mark.parametrize("weight", ["beta", "edge_beta"])
def test_a_weight_left_out_of_the_guide_would_show(weight):
    problem = small(beta=0.2, edge_beta=0.4)
    exact = exactly(*double(problem))[0].item()
    setattr(problem.guide, weight, 5.0 * getattr(problem.guide, weight))
    losses = still(problem, num_steps=150, dtype="float64").tree["fit"]["loss"].values
    assert abs(losses.mean() - exact) > 10 * losses.std() / np.sqrt(len(losses))


def test_the_bound_stays_below_the_evidence():
    model, guide, args = double(small(beta=1.0, edge_beta=1.0, edge_rate=0.3))
    log_p = model.classifier(POINTS.unsqueeze(-1)).log_softmax(-1)  # (point, class) at draws of the prior
    evidence = (WEIGHTS @ log_p.exp()).log()[args[2][args[3]]].sum()
    bound = -exactly(model, guide, args)[0]
    assert evidence - 10 < bound < evidence


@pytest.mark.parametrize("backbone", LAYERS)
def test_the_straight_through_gradient_points_where_the_exact_one_does(backbone):
    model, guide, args = double(small(backbone=backbone, beta=0.2, skip=0.2, seed=2))
    parameters = list(guide.edges.parameters())
    exact = torch.autograd.grad(exactly(model, guide, args)[0], parameters)
    loss = TraceMeanField_ELBO().differentiable_loss
    draws = [torch.autograd.grad(loss(model, guide, *args), parameters) for _ in range(300)]
    flat = [torch.cat([value.flatten() for value in found]) for found in (exact, *draws)]
    assert torch.cosine_similarity(torch.stack(flat[1:]).mean(0), flat[0], dim=0) > 0.9


def test_predictions_average_over_edges_and_embeddings():
    problem = small(beta=0.2)
    found = predict(still(problem, num_steps=1), problem, num_samples=1000, seed=2)
    exact = exactly(*double(problem))[1].detach().numpy()
    error = found["probability_sd"].values / np.sqrt(1000)
    assert (abs(found["probability"].values - exact) < 4 * error).all()
    assert (found["probability_sd"] > 0.005).all()  # there is something to average over
    np.testing.assert_allclose(found["probability"].sum("class"), 1, rtol=1e-6)
    np.testing.assert_array_equal(found["predicted"], exact.argmax(1))
    x, edges = problem.args[:2]
    np.testing.assert_allclose(found["edge_probability"], problem.guide.edges(x, edges).detach().sigmoid(), rtol=1e-5)


# --------------------------------------------------------------------------------------------------- random pairs


def with_random_pairs(**options) -> Problem:
    """Three graphs to learn from with one random pair each, among several that are free, and one without."""
    data = collection([4, 4, 5, 3], split=["train", "train", "train", "test"], seed=3)
    plain = {"bottleneck": 1, "width": 4, "layers": 1, "beta": 0.2, "edge_beta": 0.3, "seed": 2}
    few = {"candidates": "observed", "random": 3 / data.sizes["edge"]}
    problem = make_problem(data, **{**plain, **few, "observed_rate": 0.8, "edge_rate": 0.5, "skip": 0.0, **options})
    edges = problem.args[1]
    assert edges.graph_of_pair[edges.origin == RANDOM].tolist() == [0, 1, 2]
    return problem


def every_choice(args: tuple, index: int) -> list[tuple]:
    """Arguments with each pair that the random pair of a graph may be, that graph alone to learn from."""
    x, edges, y, labelled = args
    place = int(((edges.origin == RANDOM) & (edges.graph_of_pair == index)).nonzero())
    taken = {pair for pair, o in zip(zip(*edges[:2], strict=True), edges.origin, strict=True) if o != RANDOM}
    taken = {(int(low), int(high)) for low, high in taken}
    nodes = (edges.graph == index).nonzero().squeeze(1).tolist()
    found, one = [], torch.arange(len(y)) == index
    for low, high in set(itertools.combinations(nodes, 2)) - taken:
        source, target = edges.source.clone(), edges.target.clone()
        source[place], target[place] = low, high
        order = torch.argsort(source * edges.num_nodes + target)
        chosen = edges._replace(source=source[order], target=target[order], origin=edges.origin[order])
        found.append((x, chosen, y, one & labelled))
    return found


@pytest.mark.parametrize("batch_size", [None, pytest.param(1, marks=pytest.mark.slow)])
def test_the_loss_is_the_mean_over_random_pairs(batch_size):
    problem = with_random_pairs()
    model, guide, args = double(problem)
    fixed = exactly(model, guide, args)[0].item()
    choices = [every_choice(args, index) for index in range(3)]
    assert min(map(len, choices)) > 2
    exact = sum(np.mean([exactly(model, guide, choice)[0].item() for choice in part]) for part in choices)
    fit = still(problem, num_steps=400 if batch_size is None else 900, dtype="float64", batch_size=batch_size)
    assert (fit.tree.attrs["execution"] == "graph") == (batch_size is None)
    losses = fit.tree["fit"]["loss"].values.reshape(-1, 4).mean(1)  # of an epoch, where steps see one graph
    error = losses.std() / np.sqrt(len(losses))
    assert abs(losses.mean() - exact) < 4 * error
    assert abs(fixed - exact) > 6 * error  # that a fit to one draw of the pairs would show


def test_predictions_average_over_random_pairs():
    problem = with_random_pairs()
    model, guide, args = double(problem)
    found = predict(still(problem, num_steps=1), problem, num_samples=600, seed=1)
    for index in range(3):
        exact = np.mean(
            [exactly(model, guide, a)[1][index].detach().numpy() for a in every_choice(args, index)], axis=0
        )
        error = found["probability_sd"].values[index] / np.sqrt(600)
        assert (abs(found["probability"].values[index] - exact) < 4 * error).all()
    fixed = exactly(model, guide, args)[1].detach().numpy()
    assert (abs(found["probability"].values - fixed) > 6 * error).any()
    x, edges = problem.args[:2]  # edges are those of the pairs that are named
    np.testing.assert_allclose(found["edge_probability"], problem.guide.edges(x, edges).detach().sigmoid(), rtol=1e-5)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_fits_with_random_pairs_go_on_where_they_were_left(tmp_path, batch_size):
    run = partial(quiet, num_steps=12, num_samples=3, batch_size=batch_size)

    class Stop(Exception):
        pass

    def fail(step):
        if step.number == 7:
            raise Stop

    with pytest.raises(Stop):
        run(with_random_pairs(), checkpoint=tmp_path, checkpoint_every=0.0, callbacks=[fail])
    resumed, plain = run(with_random_pairs(), checkpoint=tmp_path), run(with_random_pairs())
    np.testing.assert_array_equal(resumed.tree["fit"]["loss"], plain.tree["fit"]["loss"])
    assert resumed.posterior.identical(plain.posterior)


# --------------------------------------------------------------------------------------------------------- layers


def pyg_layer(backbone: str, ours: torch.nn.Module) -> torch.nn.Module:
    """PyG's layer with the parameters of ours."""
    nn = import_pyg("nn")
    if backbone == "gcn":
        layer = nn.GCNConv(3, 8, bias=False)
        layer.lin.weight = ours.linear.weight
        torch.nn.init.zeros_(ours.linear.bias)  # which PyG adds after the sum
    elif backbone == "gin":
        network = torch.nn.Sequential(ours.first, ours.norm, torch.nn.ReLU(), ours.second)
        layer = nn.GINConv(network, eps=0.3, train_eps=True)
        torch.nn.init.constant_(ours.eps, 0.3)
        torch.nn.init.constant_(layer.eps, 0.3)
    else:
        layer = nn.GATConv(3, 2, heads=4)
        layer.lin.weight = ours.linear.weight
        layer.att_src.data, layer.att_dst.data = ours.sending.data[None], ours.receiving.data[None]
    return layer.double()


@pytest.mark.parametrize("backbone", LAYERS)
def test_layers_are_those_of_pyg_on_the_edges_that_are_there(backbone):
    torch.manual_seed(0)
    edges = make_edges([], np.zeros(7, dtype=int), all_pairs=True)
    x, weight = torch.randn(7, 3).double(), (torch.rand(edges.num_pairs) < 0.4).double()
    ours = BACKBONES[backbone](3, 8).double()
    theirs = pyg_layer(backbone, ours)
    there = torch.cat([weight, weight]) == 1
    torch.testing.assert_close(ours(x, edges, weight), theirs(x, edges.directed()[:, there]))


@pytest.mark.parametrize("backbone", LAYERS)
def test_layers_are_differentiable_in_the_weights_of_absent_edges_too(backbone):
    torch.manual_seed(1)
    edges = make_edges([], np.zeros(4, dtype=int), all_pairs=True)
    x, layer = torch.randn(4, 3).double(), BACKBONES[backbone](3, 8).double()
    weight = torch.tensor([0.0, 1.0, 0.0, 0.3, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    weight = (weight + 1e-3).detach().requires_grad_()  # differences to either side stay among the weights
    assert torch.autograd.gradcheck(lambda w: layer(x, edges, w), weight, eps=1e-6)
    (found,) = torch.autograd.grad(layer(x, edges, weight).square().sum(), weight)
    assert (found != 0).all()


def test_attention_stays_finite_where_an_absent_edge_would_have_all_of_it():
    edges = make_edges([], np.zeros(2, dtype=int), all_pairs=True)
    layer = BACKBONES["gat"](1, 4)
    weight = torch.zeros(1, requires_grad=True)
    out = layer(torch.tensor([[1e4], [-1e4]]), edges, weight)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(weight.grad).all()


# ------------------------------------------------------------------------------------- gradients reach the edges


@pytest.mark.parametrize("backbone", LAYERS)
@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_a_gradient_reaches_every_parameter_of_the_edges(backbone, pooling):
    problem = make_problem(collection([6, 5, 4]), backbone=backbone, pooling=pooling)  # a warning is an error here
    assert not parameters_without_gradient(problem.guide, problem.args, "z", "edges")
    before = dict(problem.guide.edges.named_parameters())
    after = quiet(problem, num_steps=5, num_samples=1).params()
    for name, value in before.items():
        assert not torch.equal(after[f"edges$$${name}"], value), name


def test_a_dead_learner_is_found_and_said():
    data = collection([6, 5, 4])
    control = make_problem(data, learn_edges=False)
    names = {name for name, _ in control.guide.edges.named_parameters()}
    assert set(parameters_without_gradient(control.guide, control.args, "z", "edges")) == names
    after = quiet(control, num_steps=5, num_samples=1).params()
    for name, value in control.guide.edges.named_parameters():
        assert torch.equal(after[f"edges$$${name}"], value)
    with pytest.warns(UserWarning, match="skip=1 leaves drawn edges no weight"):
        make_problem(data, skip=1.0)
    with pytest.warns(UserWarning, match=r"no gradient reaches .*standardise the features"):
        make_problem(data.assign(x=data["x"] * 1e6))


def test_an_encoder_that_forgets_the_weights_is_found(monkeypatch):
    plain = parts.Encoder.forward
    monkeypatch.setattr(parts.Encoder, "forward", lambda self, x, edges, w: plain(self, x, edges, torch.ones_like(w)))
    with pytest.warns(UserWarning, match="no gradient reaches"):
        make_problem(collection([6, 5, 4]))


# ---------------------------------------------------------------------------------------- minibatches of graphs


def test_chosen_graphs_are_those_of_the_collection():
    data = collection([3, 1, 5, 4, 2, 6], seed=1)
    x, edges, *_ = make_problem(data, candidates="observed", random=0.3).args
    chosen = torch.tensor([4, 0, 2, 1])
    some, few = choose_graphs(x, edges, chosen)
    assert few.num_graphs == 4
    found, wanted = [], []
    for place, graph in enumerate(chosen.tolist()):
        assert torch.equal(some[few.graph == place], x[edges.graph == graph])
        here, there = few.graph_of_pair == place, edges.graph_of_pair == graph
        first, start = (few.graph == place).nonzero()[0], (edges.graph == graph).nonzero()[0]
        for kept, part, mask, base in ((found, few, here, first), (wanted, edges, there, start)):
            rows = torch.stack([part.source[mask] - base, part.target[mask] - base, part.origin[mask].long()])
            kept.append(rows)
    assert all(torch.equal(left, right) for left, right in zip(found, wanted, strict=True))
    assert few.num_pairs == sum(rows.shape[1] for rows in wanted)
    assert choose_graphs(x, edges, torch.arange(6))[1] is edges


@pytest.mark.slow
def test_batches_are_unbiased_for_the_loss_of_all_graphs():
    sizes = [2, 7, 3, 6, 2, 8, 4, 3]
    data = collection(sizes, seed=2, split=["train"] * 6 + ["test"] * 2)
    problem = make_problem(data, beta=0.5, edge_beta=0.5, width=4, bottleneck=2)
    whole = still(problem, num_steps=600).tree["fit"]["loss"].values
    parts = still(problem, num_steps=480, batch_size=2)
    assert "eager: " in parts.tree.attrs["execution"]
    assert "differs between steps" in parts.tree.attrs["execution"]
    means = parts.tree["fit"]["loss"].values.reshape(120, 4).mean(1)  # of an epoch
    error = np.hypot(means.std() / np.sqrt(120), whole.std() / np.sqrt(600))
    assert abs(means.mean() - whole.mean()) < 4 * error
    assert error < 0.01 * whole.mean()


def test_graphs_without_pairs_may_make_a_batch_of_their_own():
    problem = make_problem(collection([1, 4, 1, 3], seed=4), width=4, bottleneck=2, edge_beta=0.1)
    result = quiet(problem, num_steps=8, batch_size=1, num_samples=3)
    assert np.isfinite(result.tree["fit"]["loss"]).all()
    assert predict(result, problem, num_samples=2, batch_size=1).sizes["pair"] == 9


def test_graphs_of_other_splits_take_no_part():
    data = collection([4, 5, 3, 6], split=["train", "train", "test", "test"])
    other = data.assign(x=data["x"].where(data["graph_index"] < 2, 7.0), y=("graph", [0, 1, 1, 0]))
    fits = [still(make_problem(d, edge_beta=0.3, skip=0.2), num_steps=1).tree["fit"]["loss"] for d in (data, other)]
    np.testing.assert_allclose(*fits, rtol=1e-5)
    more = make_problem(data, edge_beta=0.3, skip=0.2, train=["train", "test"])
    assert still(more, num_steps=1).tree["fit"]["loss"] > 1.2 * fits[0]


# ------------------------------------------------------------------------------------------ fits and predictions


@pytest.fixture(scope="module")
def learned() -> tuple[Problem, object]:
    problem = make_problem(rings_and_paths(40), width=16, bottleneck=4, seed=0)
    return problem, quiet(problem, num_steps=400, lr=0.01, num_samples=20)


def test_what_only_edges_tell_is_learned_and_carries_over_to_new_graphs(learned):
    problem, result = learned
    found = predict(result, problem)
    right = found["predicted"].values == problem.data["y"].values
    assert right[problem.data["split"] == "train"].all()
    new = rings_and_paths(60, seed=7)
    # A graph is right by chance with 1/2: 48 of 60 right has a p-value below 1e-5.
    assert (predict(result, problem, new)["predicted"].values == new["y"].values).sum() >= 48
    posterior = result.posterior["class_probability"].mean(("chain", "draw"))
    assert abs(posterior - found["probability"]).max() < 0.25  # 20 draws
    assert (result.posterior["num_edges"] <= problem.args[1].num_pairs).all()
    assert 0.1 < found["rate"].mean() < 20  # nats: neither nothing nor everything


def test_the_verdict_is_on_classes_of_graphs_held_out(learned):
    problem, result = learned
    report = result.diagnose()
    assert report.ok
    assert "20 graphs held out" in str(report)
    assert "k-hat" not in str(report)
    untrained = quiet(problem, num_steps=1, lr=1e-9, num_samples=20).diagnose()
    assert untrained.inference == "not judged"  # 20 graphs are too few to say more
    assert "no posterior, and are not judged" in str(untrained)


def test_a_classifier_that_learned_by_heart_fails_its_verdict():
    """Labels that have nothing to do with the graphs."""
    data = rings_and_paths(120)
    rng = np.random.default_rng(0)
    shuffled = data.assign(y=("graph", rng.permutation(data["y"].values)))
    shuffled["x"] = data["x"].copy(data=rng.standard_normal(data["x"].shape).astype(np.float32))
    result = quiet(make_problem(shuffled, width=16, bottleneck=4), num_steps=300, lr=0.01, num_samples=20)
    report = result.diagnose()
    assert report.inference == "failed"
    assert "60 graphs held out" in str(report)
    none = make_problem(data.assign(split=("graph", np.full(120, ""))), width=4, bottleneck=2)
    assert "too few to judge" in str(quiet(none, num_steps=2, num_samples=2).diagnose())


def first_of(data: xr.Dataset) -> xr.Dataset:
    """The first graph of a collection."""
    nodes = data["graph_index"].values == 0
    edges = nodes[data["source"].values]
    return data.isel(node=nodes, edge=edges, graph=[0])


def test_predictions_do_not_depend_on_company_labels_or_splits(learned):
    problem, result = learned
    new = rings_and_paths(5, seed=9)
    together = predict(result, problem, new, num_samples=150)
    alone = predict(result, problem, first_of(new).drop_vars(["y", "split", "class"]), num_samples=150, seed=1)
    by_two = predict(result, problem, new, num_samples=150, batch_size=2, seed=2)
    np.testing.assert_allclose(by_two["edge_probability"], together["edge_probability"], rtol=1e-5)
    np.testing.assert_allclose(
        alone["edge_probability"], together["edge_probability"][: alone.sizes["pair"]], rtol=1e-5
    )
    error = np.sqrt(2 / 150) * together["probability_sd"]
    assert (abs(by_two["probability"] - together["probability"]) < 4 * error + 1e-3).all()
    assert (abs(alone["probability"] - together["probability"]) < 4 * error + 1e-3).all()


def test_features_are_matched_by_their_labels():
    data = collection([4, 5, 3, 6], num_features=3, features=["a", "b", "c"])
    problem = make_problem(data)
    result = still(problem, num_steps=1)
    wanted = predict(result, problem, data, num_samples=1)
    turned = predict(result, problem, data.isel(feature=[2, 0, 1]), num_samples=1)
    np.testing.assert_array_equal(turned["probability"], wanted["probability"])
    less = predict(result, problem, data.isel(feature=[0, 1]), num_samples=1)
    zero = predict(result, problem, data.assign(x=data["x"].where(data["feature"] != "c", 0.0)), num_samples=1)
    np.testing.assert_array_equal(less["probability"], zero["probability"])
    with pytest.raises(DataError, match="features d were not among those fitted, a, b, c"):
        predict(result, problem, data.assign_coords(feature=["a", "b", "d"]))
    with pytest.raises(DataError, match="1 features, but 3 were fitted"):
        predict(result, problem, data.isel(feature=[0]).drop_vars("feature"))


def test_seeds_reproduce_and_differ():
    data = collection([4, 5, 3, 6])
    fits = [
        quiet(make_problem(data, seed=a), num_steps=3, num_samples=2, seed=b).tree["fit"]["loss"].values
        for a, b in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    np.testing.assert_array_equal(fits[0], fits[1])
    assert abs(fits[0] - fits[2]).min() > 1e-4
    assert abs(fits[0] - fits[3]).min() > 1e-4
    problem = make_problem(data)
    result = still(problem, num_steps=1)
    first, again, other = (predict(result, problem, num_samples=3, seed=s)["probability"] for s in (5, 5, 6))
    assert first.equals(again)
    assert not first.equals(other)


def test_the_mask_draws_noise_from_the_features_and_keeps_a_share():
    x = torch.tensor([[0.0, 10.0], [1.0, 20.0], [2.0, 30.0]])
    mask = parts.FeatureMask(x)
    torch.nn.init.constant_(mask.logit, -30.0)
    noise = mask(x.repeat(200, 1))
    assert set(noise[:, 0].round(decimals=3).tolist()) == {0.0, 1.0, 2.0}
    assert set(noise[:, 1].round(decimals=3).tolist()) == {10.0, 20.0, 30.0}
    torch.nn.init.constant_(mask.logit, 30.0)
    torch.testing.assert_close(mask(x), x)


def test_many_pairs_are_kept_as_moments(monkeypatch):
    monkeypatch.setattr("probmodels.guides.edges._KEPT_PAIRS", 10)
    problem = make_problem(collection([6, 5, 4]))
    result = quiet(problem, num_steps=2, num_samples=30)
    marginals = result.tree["marginals"]
    assert "edge" not in result.posterior
    assert marginals["edge"].dims == ("pair",)
    probability = marginals["edge_probability"].values
    error = np.sqrt(probability * (1 - probability) / 30)
    assert (abs(marginals["edge"].values - probability) < 4.5 * error).all()


# --------------------------------------------------------------------------------------------- errors and memory


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "gnn"}, "backbone='gnn'; choose one of gcn, gat, gin"),
        ({"pooling": "max"}, "pooling='max'"),
        ({"candidates": "none"}, "candidates='none'"),
        ({"beta": -1.0}, "beta=-1.0"),
        ({"edge_beta": float("nan")}, "edge_beta=nan"),
        ({"skip": 1.5}, "skip=1.5"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"edge_rate": 1.0}, "edge_rate=1.0"),
        ({"bottleneck": 0}, "bottleneck=0"),
        ({"layers": True}, "layers=True"),
        ({"candidates": "observed", "neighbours": 5}, "neighbours=5, but the smallest graph has 3 nodes"),
        ({"train": ["stop"]}, r"no graph to learn from: train=\['stop'\]"),
        ({"train": "validation"}, "classes 1 have no graph"),
        ({"backbone": "gat", "width": 6}, "choose a multiple of 4"),
        ({"train": []}, r"train=\[\]; give a text or a list of at least 1"),
        ({"neighbours": 2}, "neighbours=2 is not used with candidates='all'"),
        ({"random": 0.5}, "random=0.5 is not used with candidates='all'"),
        ({"candidates": "observed", "metric": "euclidean"}, "metric='euclidean' is not used with neighbours=0"),
        ({"learn_edges": False, "temperature": 1.0}, "temperature=1.0 is not used with learn_edges=False"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    data = collection([4, 5, 3, 6], split=["train", "train", "validation", "test"])
    with pytest.raises(DataError, match=message):
        make_problem(data, **options)


def test_data_that_cannot_be_used_are_refused():
    data = collection([4, 5, 3, 6])
    with pytest.raises(DataError, match="hold one graph; take lds or noisy_edges"):
        make_problem(make_graph(np.ones((3, 1)), [0, 1, 0], [(0, 1)]))
    with pytest.raises(DataError, match="no pair of nodes could be an edge"):
        make_problem(make_graph(np.ones((2, 1)), [0, 1], graph=[0, 1]))
    with pytest.raises(DataError, match="lack the variable 'x'"):
        make_problem(data.drop_vars("x"))
    problem = make_problem(data)
    result = still(problem, num_steps=1)
    with pytest.raises(DataError, match="num_samples=0"):
        predict(result, problem, num_samples=0)
    with pytest.raises(DataError, match="hold one graph"):
        predict(result, problem, data.drop_vars("graph_index"))


def test_a_pass_that_does_not_fit_into_memory_is_refused_before_it_runs(monkeypatch):
    monkeypatch.setattr(memory, "_SMALL", 0)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    data = collection([4, 5, 3, 6])
    with pytest.raises(
        ProblemError, match=r"34 candidate pairs of 4 graphs need about .*predict fewer graphs at a time$"
    ):
        make_problem(data)
    with pytest.raises(ProblemError, match=rf"^vib_gsl: {data.sizes['edge']} candidate pairs of 4 graphs need about"):
        make_problem(data, candidates="observed")


def test_all_pairs_are_counted_before_they_are_listed(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("pairs were listed")

    monkeypatch.setattr("probmodels.guides.edges.pairs_of_numbers", fail)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**30)
    data = make_graph(np.ones((8000, 1)), [0, 1], graph=np.repeat([0, 1], 4000))
    with pytest.raises(ProblemError, match=r"15,996,000 candidate pairs of 2 graphs need about .* take candidates="):
        make_problem(data)


@pytest.mark.parametrize("backbone", LAYERS)
@pytest.mark.parametrize("width", [8, 32])
def test_the_estimate_of_memory_is_near_what_a_step_keeps(backbone, width):
    problem = make_problem(collection([40] * 10), backbone=backbone, width=width, layers=3)
    model, guide = problem.programs()
    kept: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        loss = TraceMeanField_ELBO().differentiable_loss(model, guide, *problem.args)
    needed = parts.step_bytes(guide.encoder, guide.edges, problem.args[0].shape, problem.args[1].num_pairs)
    assert torch.isfinite(loss)
    assert 0.8 < needed / sum(kept.values()) < 2.0
