"""fit_em: exact EM where the guide holds the posterior, wake-sleep against enumeration, phases, resumption, errors."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from probmodels.errors import CheckpointError, ProblemError
from probmodels.inference import Phase, Problem, fit_em
from probmodels.inference.flows.balance import VarGrad
from probmodels.inference.variational.losses import wake_phi

quick = partial(fit_em, num_rounds=10, num_samples=5, progress=False)
F64 = torch.float64


def mixture_data() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    left = torch.rand(300, generator=generator) < 0.3
    return (torch.where(left, -1.5, 1.0) + 0.7 * torch.randn(300, generator=generator)).to(F64)


def mixture(x: Tensor) -> None:
    """Two normals with one spread."""
    weights = pyro.param("weights", lambda: torch.full((2,), 0.5, dtype=F64), constraint=constraints.simplex)
    means = pyro.param("means", lambda: torch.tensor([-0.5, 0.5], dtype=F64))
    spread = pyro.param("spread", lambda: torch.ones((), dtype=F64), constraint=constraints.positive)
    with pyro.plate("data", len(x)) as i:
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(means[k], spread), obs=x[i])


class Assignment(nn.Module):
    """The posterior of a component is logistic in x, so that this guide can hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1).to(F64)
        nn.init.constant_(self.line.weight, 0.5)
        nn.init.zeros_(self.line.bias)

    def forward(self, x: Tensor) -> None:
        pyro.module("assignment", self)
        with pyro.plate("data", len(x)) as i:
            logit = self.line(x[i].unsqueeze(-1))
            pyro.sample("k", dist.Categorical(logits=torch.cat([torch.zeros_like(logit), logit], -1)))


def mixture_problem(**changes) -> Problem:
    fields = {"name": "mixture", "model": mixture, "guide": Assignment(), "args": (mixture_data(),)}
    return Problem(**{**fields, "batch_plates": ("data",), **changes})


def exact_em(x: Tensor, rounds: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, means and spread of largest likelihood, by EM in closed form."""
    weights, means, spread = torch.full((2,), 0.5, dtype=F64), torch.tensor([-0.5, 0.5], dtype=F64), torch.ones(())
    for _ in range(rounds):
        share = (weights.log() + dist.Normal(means, spread).log_prob(x[:, None])).softmax(-1)
        weights, means = share.mean(0), (share * x[:, None]).sum(0) / share.sum(0)
        spread = ((share * (x[:, None] - means).square()).sum() / len(x)).sqrt()
    return weights, means, spread


def log_likelihood(params, x: Tensor) -> float:
    logs = params["weights"].log() + dist.Normal(params["means"], params["spread"]).log_prob(x[:, None])
    return float(logs.logsumexp(-1).mean())


@pytest.mark.parametrize("guide_phase", ["e_step", "wake_phi", "sleep", "replay"])
def test_every_way_to_move_the_guide_leads_to_exact_em(guide_phase):
    x = mixture_data()
    weights, means, spread = exact_em(x)
    best = log_likelihood({"weights": weights, "means": means, "spread": spread}, x)
    rounds, several = 300, guide_phase in ("wake_phi", "replay")
    guide = {"objective": guide_phase, "lr": 0.1, "num_particles": 3 if several else None}
    model = {"objective": "wake", "lr": 0.02, "schedule": lambda step: 0.05 ** (step / rounds)}
    result = quick(mixture_problem(), num_rounds=rounds, phases=[guide, model])
    params = result.params()
    # Rounds of one draw each leave noise: a standard error of the means from 300 rows is 0.06.
    assert best - log_likelihood(params, x) < 0.003
    assert abs(params["means"] - means).max() < 0.12
    assert abs(params["weights"] - weights).max() < 0.06
    share = (params["weights"].log() + dist.Normal(params["means"], params["spread"]).log_prob(x[:, None])).softmax(-1)
    line = nn.functional.linear(x[:, None], params["assignment$$$line.weight"], params["assignment$$$line.bias"])
    assert abs(line.squeeze(-1).sigmoid() - share[:, 1]).mean() < 0.05
    start = {"weights": torch.full((2,), 0.5), "means": torch.tensor([-0.5, 0.5]), "spread": torch.ones(())}
    assert best - log_likelihood(start, x) > 0.1  # the bound above is not met by standing still


def test_a_model_alone_does_not_reach_exact_em():
    x = mixture_data()
    weights, means, spread = exact_em(x)
    best = log_likelihood({"weights": weights, "means": means, "spread": spread}, x)
    alone = quick(mixture_problem(), num_rounds=300, lr=0.02, phases=["wake"])
    assert best - log_likelihood(alone.params(), x) > 0.01


def factor_data(size: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    loading = torch.tensor([1.0, -0.7, 0.5, 0.3], dtype=F64)
    noise = torch.randn(size, 4, generator=generator, dtype=F64)
    return torch.randn(size, 1, generator=generator, dtype=F64) * loading + 0.5 * noise


def factors(x: Tensor) -> None:
    """Probabilistic principal components with one component."""
    loading = pyro.param("loading", lambda: torch.tensor([0.5, 0.1, 0.1, 0.1], dtype=F64))
    spread = pyro.param("spread", lambda: torch.ones((), dtype=F64), constraint=constraints.positive)
    with pyro.plate("data", len(x)) as i:
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1) * loading, spread).to_event(1), obs=x[i])


class Scores(PyroModule):
    """The posterior of a score is normal, linear in x."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.full((4,), 0.1, dtype=F64))
        self.width = PyroParam(torch.ones((), dtype=F64), constraint=constraints.positive)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)) as i:
            pyro.sample("z", dist.Normal(x[i] @ self.slope, self.width))


@pytest.mark.parametrize("batch_size", [None, 50])
def test_factor_analysis_finds_its_closed_form(batch_size):
    x = factor_data()
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    noise = values[:3].mean()  # maximum likelihood in closed form (Tipping and Bishop 1999)
    loading = (values[3] - noise).sqrt() * vectors[:, 3]
    decay = {"schedule": lambda step: 0.02 ** (step / 800)}
    phases = [Phase("e_step", lr=0.03, **decay), Phase("wake", lr=0.03, num_particles=2, **decay)]
    problem = Problem("factors", factors, Scores(), (x,), batch_plates=("data",), loss="TraceMeanField_ELBO")
    result = quick(problem, num_rounds=800, phases=phases, batch_size=batch_size)
    params = result.params()
    found = params["loading"] * torch.sign(params["loading"] @ loading)
    assert abs(found - loading).max() < 0.06
    assert abs(params["spread"].square() / noise - 1) < 0.06
    slope = params["slope"] * torch.sign(params["slope"] @ loading)
    assert abs(slope - loading / (loading @ loading + noise)).max() < 0.05
    assert result.tree.attrs["execution"] == "e_step: graph; wake: graph"
    assert result.posterior["z"].shape == (1, 5, 200)


def helmholtz(x: Tensor) -> None:
    """Two binary causes of four binary pixels."""
    prior = pyro.param("prior", lambda: torch.zeros(2, dtype=F64))
    weight = pyro.param("weight", lambda: torch.tensor([[0.5, 0.1, -0.1, 0.2], [-0.2, 0.3, 0.4, -0.3]], dtype=F64))
    bias = pyro.param("bias", lambda: torch.zeros(4, dtype=F64))
    with pyro.plate("data", len(x)) as i:
        z = pyro.sample("z", dist.Bernoulli(logits=prior).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=z @ weight + bias).to_event(1), obs=x[i])


def recognition(x: Tensor) -> None:
    weight = pyro.param("to_z", lambda: torch.zeros(4, 2, dtype=F64))
    bias = pyro.param("to_z_bias", lambda: torch.zeros(2, dtype=F64))
    with pyro.plate("data", len(x)) as i:
        pyro.sample("z", dist.Bernoulli(logits=x[i] @ weight + bias).to_event(1))


def pixels() -> Tensor:
    """Two bars, each of which is there half of the time, with some noise."""
    generator = torch.Generator().manual_seed(2)
    bars = (torch.rand(200, 2, generator=generator) < 0.5).to(F64) @ torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]).to(F64)
    flips = (torch.rand(200, 4, generator=generator) < 0.05).to(F64)
    return (bars - flips).abs()


def exact_nll(params, x: Tensor) -> float:
    """Mean of -log p(x) by the sum over all causes."""
    causes = torch.tensor(list(itertools.product([0.0, 1.0], repeat=2)), dtype=F64)
    log_prior = dist.Bernoulli(logits=params["prior"]).log_prob(causes).sum(-1)
    log_x = dist.Bernoulli(logits=causes @ params["weight"] + params["bias"]).log_prob(x[:, None]).sum(-1)
    return float(-(log_prior + log_x).logsumexp(-1).mean())


START = {
    "prior": torch.zeros(2, dtype=F64),
    "weight": torch.tensor([[0.5, 0.1, -0.1, 0.2], [-0.2, 0.3, 0.4, -0.3]], dtype=F64),
    "bias": torch.zeros(4, dtype=F64),
}


def test_wake_sleep_improves_the_exact_likelihood_and_sleep_alone_does_not():
    x = pixels()
    problem = Problem("helmholtz", helmholtz, recognition, (x,), batch_plates=("data",))
    run = partial(quick, problem, num_rounds=400, lr=0.05)
    start = exact_nll(START, x)
    fitted = {
        "wake-sleep": run(phases=("wake", "sleep")),
        "reweighted": run(phases=(Phase("wake", num_particles=2), Phase("wake_phi", num_particles=3))),
        "batches": run(phases=("wake", "sleep"), batch_size=40),
    }
    free = entropy(x)
    for name, result in fitted.items():
        gap = (exact_nll(result.params(), x) - free) / (start - free)
        assert gap < 0.45, name  # of the distance to the empirical distribution, which no such model reaches
    idle = run(phases=("sleep",), num_rounds=50)
    assert exact_nll(idle.params(), x) == pytest.approx(start, abs=1e-12)
    blind = run(phases=("wake",))  # a guide that does not learn to recognise the causes
    assert exact_nll(blind.params(), x) > exact_nll(fitted["wake-sleep"].params(), x) + 0.2


def entropy(x: Tensor) -> float:
    """Smallest NLL of any distribution."""
    _, counts = x.unique(dim=0, return_counts=True)
    share = counts / len(x)
    return float(-(share * share.log()).sum())


def test_the_bound_tightens_with_particles_and_ends_at_the_likelihood():
    x = pixels()
    problem = Problem("helmholtz", helmholtz, recognition, (x,))
    means = []
    for count in (1, 4, 20):
        phases = [Phase("wake", num_particles=count, lr=1e-14)]
        means.append(quick(problem, num_rounds=60, phases=phases).tree["fit"]["loss"].values / len(x))
    nll = exact_nll(START, x)
    values = [value.mean() for value in means]
    assert values[0] > values[1] > values[2] > nll - 4 * means[2].std() / np.sqrt(60)
    assert abs(values[2] - nll) < 0.2 * (values[0] - nll)


def test_dreams_find_their_arguments():
    x = pixels()

    def keyed(scale, *, data):
        return helmholtz(data)

    def keyed_guide(scale, *, data):
        return recognition(data)

    run = partial(quick, num_rounds=30, phases=("sleep", "wake"))
    plain = run(Problem("h", helmholtz, recognition, (x,)))
    named = Problem("h", keyed, keyed_guide, (torch.ones(3),), {"data": x})
    inserted = {"x": "data"}
    for given in (None, inserted, lambda args, kwargs, dreams: (args, {"data": dreams["x"]})):
        losses = run(named, observed_args=given).tree["fit"]["loss"]
        np.testing.assert_array_equal(losses, plain.tree["fit"]["loss"])

    def doubled(x2):
        return helmholtz(x2 / 2)

    def doubled_guide(x2):
        return recognition(x2 / 2)

    hidden = Problem("h", doubled, doubled_guide, (2 * x,))
    with pytest.raises(ProblemError, match="data of site 'x' is no argument of the model as it stands"):
        run(hidden)
    double = run(hidden, observed_args=lambda args, kwargs, dreams: ((2 * dreams["x"],), kwargs))
    np.testing.assert_allclose(double.tree["fit"]["loss"], plain.tree["fit"]["loss"])
    twice = Problem("h", lambda a, b: helmholtz(a), lambda a, b: recognition(a), (x, x.clone()))
    with pytest.raises(ProblemError, match="more than one argument"):
        run(twice)
    run(twice, observed_args={"x": 0})


def energy(model, guide, *args, **kwargs):
    """Squared distance of log p(x, z) - log q(z | x) from its mean: an objective of one's own."""
    trace = pyro.poutine.trace(guide).get_trace(*args, **kwargs)
    trace.compute_log_prob()
    other = pyro.poutine.trace(pyro.poutine.replay(model, trace=trace)).get_trace(*args, **kwargs)
    other.compute_log_prob()
    gap = other.nodes["z"]["log_prob"] + other.nodes["x"]["log_prob"] - trace.nodes["z"]["log_prob"]
    return (gap - gap.mean()).square().mean()


def test_objectives_of_ones_own_and_thresholds():
    problem = Problem("helmholtz", helmholtz, recognition, (pixels(),))
    seen = []

    def threshold(round_):
        seen.append(round_)
        return 2.0 if round_ < 5 else -1.0

    phases = [Phase(energy, moves="guide", steps=7, until=threshold), Phase("wake", label="m_step")]
    result = quick(problem, phases=phases, num_rounds=8)
    order = result.tree["fit"]["phase"].values.tolist()
    assert set(order) == {"energy", "m_step"}
    runs = [len(list(group)) for label, group in itertools.groupby(order) if label == "energy"]
    assert runs == [1] * 5 + [7] * 3  # the loss is below 2 at once, and never below -1
    assert sorted(set(seen)) == list(range(8))
    assert result.tree.attrs["execution"].startswith("energy: eager")
    captured = quick(problem, phases=[Phase(energy, moves="guide", static=True)], compile="graph")
    assert captured.tree.attrs["execution"] == "graph"
    elbo = quick(problem, phases=[Phase(Trace_ELBO(), moves="guide"), "wake", "wake"])
    assert elbo.tree["fit"]["phase"].values.tolist()[:3] == ["Trace_ELBO", "wake", "wake_2"]


@pytest.mark.parametrize("phase", ["e_step", "wake_phi", "sleep"])
def test_phases_run_alike_as_graphs_and_as_written(phase):
    problem = mixture_problem()
    written, graph = (
        quick(problem, phases=(Phase(phase, num_particles=2), "wake"), batch_size=64, compile=compile)
        for compile in ("eager", "graph")
    )
    assert graph.tree.attrs["execution"] == f"{phase}: graph; wake: graph"
    np.testing.assert_allclose(graph.tree["fit"]["loss"], written.tree["fit"]["loss"], rtol=1e-8)
    assert (written.tree["fit"]["grad_norm"] > 0).all()


def test_phases_move_only_what_is_theirs():
    problem = mixture_problem()
    start = quick(problem, phases=("e_step",), num_rounds=1, lr=1e-14).params()
    for phase, moved in (("e_step", "assignment"), ("wake", "means"), ("wake_phi", "assignment"), ("replay", "assig")):
        params = quick(problem, phases=(phase,)).params()
        for name, value in params.items():
            same = torch.allclose(value, start[name], atol=1e-10)
            assert same == (not name.startswith(moved) and (moved != "means" or name.startswith("assignment"))), name


def test_resumed_phases_are_those_of_an_uninterrupted_run(tmp_path):
    phases = ["wake", {"objective": "sleep", "steps": 2}, Phase("replay", num_particles=3, until=900.0, steps=3)]
    run = partial(quick, mixture_problem(), phases=phases, num_rounds=6, batch_size=70, clip_norm=50.0)
    plain = run()

    def stop(step):
        if step.number in (4, 11, 12):
            raise RuntimeError("killed")

    for _ in range(3):
        with pytest.raises(RuntimeError, match="killed"):
            run(checkpoint=tmp_path, checkpoint_every=0.0, callbacks=[stop])
    resumed = run(checkpoint=tmp_path)
    np.testing.assert_array_equal(resumed.tree["fit"]["loss"], plain.tree["fit"]["loss"])
    np.testing.assert_array_equal(resumed.tree["fit"]["phase"], plain.tree["fit"]["phase"])
    assert resumed.posterior.identical(plain.posterior)
    assert all(torch.equal(value, plain.params()[name]) for name, value in resumed.params().items())
    with pytest.raises(CheckpointError, match="phases"):
        run(checkpoint=tmp_path, phases=["wake"])


def test_seeds_callbacks_and_files(tmp_path):
    problem = mixture_problem()
    first, again, other = (quick(problem, seed=seed) for seed in (1, 1, 2))
    assert first.posterior.identical(again.posterior)
    assert not first.tree["fit"]["loss"].equals(other.tree["fit"]["loss"])
    labels = []
    stopped = quick(problem, callbacks=[lambda step: labels.append(step.phase) or step.number == 5])
    assert labels == ["e_step", "wake"] * 2 + ["e_step"]
    assert stopped.tree["fit"].sizes["step"] == 5
    first.save(tmp_path)
    loaded = type(first).load(tmp_path, problem)
    assert loaded.tree["fit"]["phase"].values.tolist() == ["e_step", "wake"] * 10
    assert loaded.tree.attrs["engine"] == "em"
    assert loaded.predict(problem, num_samples=3)["x"].shape == (1, 3, 300)


def with_factor(x):
    mixture(x)
    pyro.factor("extra", torch.zeros(()))


def with_auxiliary(x):
    pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    with pyro.plate("data", len(x)):
        pyro.sample("k", dist.Categorical(pyro.param("q", torch.full((2,), 0.5, dtype=F64))))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"guide": None}, {}, "use run_mcmc"),
        ({}, {"num_rounds": 0}, "num_rounds=0"),
        ({}, {"lr": -1.0}, "lr=-1"),
        ({}, {"phases": ()}, r"phases=\(\); give a list of at least 1"),
        ({}, {"phases": ("wak",)}, "did you mean 'wake'"),
        ({}, {"phases": ({"objective": "wake", "step": 3},)}, "did you mean 'steps'"),
        ({}, {"phases": ({"steps": 3},)}, "lacks its objective"),
        ({}, {"phases": (3,)}, r"phases=\(3,\); give a list"),
        ({}, {"phases": (Phase("wake", steps=0),)}, "phase wake: steps=0"),
        ({}, {"phases": (Phase("wake", lr=0.0),)}, "phase wake: lr=0.0; give a number above 0"),
        ({}, {"phases": (Phase("wake", moves="all"),)}, "phase wake: moves='all'; choose one of guide, model, both"),
        ({}, {"phases": (Phase("wake", moves="guide"),)}, "the loss of wake depends on no parameter of the guide"),
        ({}, {"phases": (Phase("wake", static=True),)}, "static=True is not used with a named objective"),
        ({}, {"phases": (Phase("VarGrad", num_particles=4, options={"num_particles": 4}),)}, "give it once"),
        ({}, {"phases": (Phase(VarGrad(4), num_particles=2),)}, "num_particles not used with an objective of your own"),
        ({}, {"observed_args": {"x": 0}}, "observed_args is not used without a phase 'sleep'"),
        ({}, {"phases": (Phase("wake_phi", num_particles=1),)}, "num_particles=1; give a whole number of at least 2"),
        ({}, {"phases": ("sleep",), "observed_args": {"z": 0}}, r"observed_args names \['z'\]"),
        ({}, {"phases": ("sleep",), "observed_args": {"x": 4}}, "holds no such tensor"),
        ({"model": with_factor}, {"phases": ("sleep",)}, "cannot be dreamed from"),
        ({"guide": with_auxiliary}, {"phases": ("sleep",)}, r"auxiliary sites \['u'\]"),
        ({"guide": with_auxiliary}, {"phases": ("replay",)}, r"auxiliary sites \['u'\]"),
        ({"guide": lambda x: None}, {}, "does not sample 'k'"),
        ({}, {"batch_size": 301}, "from 1 to 300"),
    ],
)
def test_what_cannot_be_run_is_refused(changes, options, message):
    with pytest.raises(ProblemError, match=message):
        quick(mixture_problem(**changes), **options)


def test_a_phase_that_moves_nothing_is_refused():
    def fixed(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.full((2,), 0.5, dtype=F64)))
            pyro.sample("x", dist.Normal(k.to(F64), 1.0), obs=x)

    with pytest.raises(ProblemError, match="wake has nothing to move: the model has no parameter of its own"):
        quick(mixture_problem(model=fixed))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda model, guide, *data: torch.ones(()), "the loss of mine depends on no parameter of the guide or model"),
        (lambda model, guide, *data: torch.ones(3), r"mine gives a Tensor of shape \(3,\); return a loss, Tensor \(\)"),
        (lambda model, guide, *data: 3, r"mine gives a int; return a loss, Tensor \(\)"),
    ],
)
def test_an_objective_that_has_no_gradient_is_refused(objective, message):
    with pytest.raises(ProblemError, match=message):
        quick(mixture_problem(), phases=[Phase(objective, label="mine")])


def test_guides_whose_transforms_remember_values_are_moved_by_wake_phi():
    coupling = dist.transforms.affine_coupling(2, hidden_dims=[4]).double()

    def model():
        pyro.sample("z", dist.Normal(torch.ones(2, dtype=F64), 0.5).to_event(1))

    def guide():
        pyro.module("coupling", coupling)
        base = dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(base, [coupling]))

    torch.manual_seed(0)
    loss = wake_phi(4)(model, guide)
    found = torch.autograd.grad(loss, list(coupling.parameters()), allow_unused=True)
    assert any(value is not None and bool(value.any()) for value in found)
