"""Mixtures, whose assignments are summed out."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import config_enumerate
from pyro.ops.indexing import Vindex
from torch import Tensor, nn

from pyro_models.listing import PARALLEL, listed, random


@listed("Gaussian mixture", "tutorial gmm", args=lambda: (torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0]),))
@config_enumerate
def gmm(data: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(data)):
        assignment = pyro.sample("assignment", dist.Categorical(weights))
        pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)


def stick_breaking(beta: Tensor) -> Tensor:
    rest = (1 - beta).cumprod(-1)
    return nn.functional.pad(beta, (0, 1), value=1) * nn.functional.pad(rest, (1, 0), value=1)


@listed("Dirichlet process mixture", "tutorial dirichlet_process_mixture", args=lambda: (random(12, 2),))
def dirichlet_process(data: Tensor, t: int = 4) -> None:
    with pyro.plate("beta_plate", t - 1):
        beta = pyro.sample("beta", dist.Beta(1, 1.3))
    with pyro.plate("mu_plate", t):
        mu = pyro.sample("mu", dist.MultivariateNormal(torch.zeros(2), 5 * torch.eye(2)))
    with pyro.plate("data", len(data)):
        z = pyro.sample("z", dist.Categorical(stick_breaking(beta)), infer=PARALLEL)
        pyro.sample("obs", dist.MultivariateNormal(mu[z], torch.eye(2)), obs=data)


@listed(
    "latent Dirichlet allocation",
    "examples/lda.py",
    args=lambda: (torch.randint(0, 6, (5, 3), generator=torch.Generator().manual_seed(0)),),
)
def lda(data: Tensor, topics: int = 2, words: int = 6) -> None:
    with pyro.plate("topics", topics):
        topic_weights = pyro.sample("topic_weights", dist.Gamma(1.0 / topics, 1.0))
        topic_words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(words) / words))
    with pyro.plate("documents", data.shape[1]) as ind:
        data = data[:, ind]
        doc_topics = pyro.sample("doc_topics", dist.Dirichlet(topic_weights))
        with pyro.plate("words", data.shape[0]):
            word_topics = pyro.sample("word_topics", dist.Categorical(doc_topics), infer=PARALLEL)
            pyro.sample("doc_words", dist.Categorical(topic_words[word_topics]), obs=data)


@listed(
    "toy mixture",
    "examples/toy_mixture_model_discrete_enumeration.py",
    args=lambda: ({"A": torch.tensor([1.0, 0, 1, 1]), "C": torch.tensor([0.0, 0, 1, 1])},),
)
@config_enumerate
def toy_mixture(obs: dict[str, Tensor]) -> None:
    p_a = pyro.sample("p_A", dist.Beta(1, 1))
    p_b = pyro.sample("p_B", dist.Beta(torch.ones(2), torch.ones(2)).to_event(1))
    p_c = pyro.sample("p_C", dist.Beta(torch.ones(2), torch.ones(2)).to_event(1))
    with pyro.plate("data_plate", 4):
        a = pyro.sample("A", dist.Bernoulli(p_a.expand(4)), obs=obs["A"])
        b = pyro.sample("B", dist.Bernoulli(Vindex(p_b)[a.type(torch.long)]), infer=PARALLEL)
        pyro.sample("C", dist.Bernoulli(Vindex(p_c)[b.type(torch.long)]), obs=obs["C"])


@listed("mixture of one family", "documentation of MixtureSameFamily", args=lambda: (random(12),))
def mixture_same_family(data: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    locs = pyro.sample("locs", dist.Normal(torch.zeros(3), 5.0).to_event(1))
    components = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(locs, 1.0))
    with pyro.plate("data", len(data)):
        pyro.sample("obs", components, obs=data)
