"""GFlowNet-EM on models with exact sums: a mixture of flowers and a discrete autoencoder.

    python benchmarks/gflownet_em.py mixture             # 20 starts: exact EM, EM of a factorised posterior, ours
    python benchmarks/gflownet_em.py vae                 # digits: likelihoods of models trained by each method
    python benchmarks/gflownet_em.py fixed               # one trained decoder: how well guides fit its posterior

``mixture``
    4,000 points of the data set ``petals``; means start at points of the data. ``exact`` is EM in closed form,
    ``factorised`` EM with the best product of a posterior of clusters and one of petals, by coordinate ascent, and
    ``gflownet`` is `fit_em` with an autoregressive guide. Log likelihoods are exact; TV is the total variation
    between guide and exact posterior at the fitted means, averaged over points.
``vae``
    Digits of 8 x 8, 1,500 to train and 297 to test. All decoders are alike, log likelihoods are sums over all states:
    ``exact`` ascends that sum itself, in fewer steps, each of which decodes all states; ``autoregressive`` and
    ``factorised`` are `fit_em` with one schedule and either guide; ``vq`` is a VQ-VAE with codebooks by moving averages
    (decay 0.999, commitment 0.25). A TV without its log likelihood says little: a model that ignores its codes has one
    of nearly zero.
``fixed``
    The decoder that ``exact`` left; guides alone are fitted, on training images and on dreams of the decoder.

A cell is one fit; see `common.cell`. Intervals are Student's over seeds.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probmodels import fit_em
from probmodels.datasets import load
from probmodels.discrete_vae import DiscreteVAE, make_problem as make_vae
from probmodels.hierarchical_mixture import HierarchicalMixture, make_problem as make_mixture
from probmodels.inference import Phase, check_exact
from probmodels.inference.problem import Problem
from probmodels.inference.programs.programs import fitted
from probmodels.inference.result import Result

interval = partial(common.interval, digits=3)


# -- what is measured -------------------------------------------------------------------------------------------------


def nearness(problem: Problem, result: Result) -> dict[str, float]:
    """TV and KL divergence of a guide to the exact posterior, means over data.

    The divergence is also the error of log Z(x) as VarGrad knows it: the mean log weight of draws of the guide.
    """
    found = check_exact(problem, result).mean()
    return {"tv": float(found["total_variation"]), "kl": float(found["kl"])}


# -- the mixture ------------------------------------------------------------------------------------------------------

MIXTURE: dict[str, Any] = {"rounds": 300, "e_steps": 4, "batch": 256, "particles": 4, "lr": 0.03, "m_lr": 0.1}


def responsibilities(log_joint: Tensor, factorised: bool, start: tuple[Tensor, Tensor] | None) -> Any:
    """Posterior (data, cluster, petal), the exact one or the product found by coordinate ascent; and its factors."""
    if not factorised:
        return log_joint.flatten(1).softmax(1).reshape(log_joint.shape), None
    one, two = start or (
        log_joint.logsumexp(2).softmax(1),
        torch.full_like(log_joint[:, 0], 1 / log_joint.shape[2]),
    )
    for _ in range(10):
        one = torch.einsum("nij,nj->ni", log_joint, two).softmax(1)
        two = torch.einsum("nij,ni->nj", log_joint, one).softmax(1)
    return one.unsqueeze(2) * two.unsqueeze(1), (one, two)


def closed_em(model: HierarchicalMixture, x: Tensor, factorised: bool, rounds: int = 1000) -> dict[str, Any]:
    """EM with closed M-steps from the model's means, which it moves."""
    start, before = None, -np.inf
    away = x.unsqueeze(1) - model.offsets
    for _ in range(rounds):
        log_joint = model.log_joint(x)
        now = float(log_joint.flatten(1).logsumexp(1).mean())
        if not factorised and now - before < 1e-8:
            break
        before = now
        weight, start = responsibilities(log_joint, factorised, start)
        means = torch.einsum("nij,njd->id", weight, away) / weight.sum((0, 2)).clamp(min=1e-9).unsqueeze(1)
        if factorised and float((means - model.means).abs().max()) < 1e-6:
            break
        model.means = means
    return {"log_likelihood": now}


def mixture_cell(method: str, seed: int) -> dict[str, Any]:
    """A fit from the start of a seed."""
    data = load("petals")
    problem = make_mixture(data, seed=seed, num_particles=MIXTURE["particles"], hidden=64)
    x = problem.args[0].double()
    if method != "gflownet":
        model = make_mixture(data, seed=seed).model.double()
        with torch.no_grad():
            return closed_em(model, x, method == "factorised")
    total = MIXTURE["rounds"] * MIXTURE["e_steps"]
    phases = [
        Phase("e_step", steps=MIXTURE["e_steps"], lr=MIXTURE["lr"], schedule=lambda step: decay(step / total)),
        Phase("wake", num_particles=1, lr=MIXTURE["m_lr"], schedule=lambda step: decay(step / MIXTURE["rounds"])),
    ]
    result = fit_em(
        problem,
        phases=phases,
        num_rounds=MIXTURE["rounds"],
        batch_size=MIXTURE["batch"],
        num_samples=2,
        seed=seed,
        progress=False,
    )
    with fitted(problem, result.guide_state or {}, seed=0) as (model, _), torch.no_grad():
        found = float(model.log_joint(problem.args[0]).flatten(1).logsumexp(1).mean())
    return {"log_likelihood": found, **nearness(problem, result)}


def decay(share: float, last: float = 0.01) -> float:
    """Factor of a step size: one in the first half of a fit, then down to ``last``."""
    return float(last ** max(0.0, 2 * share - 1))


# -- the autoencoder --------------------------------------------------------------------------------------------------

VAE: dict[str, Any] = {"steps": 2000, "exact_steps": 1300, "batch": 128, "lr": 0.002, "particles": 4, "sleep": 0.1}
FIXED: dict[str, Any] = {
    "rounds": 1000,
    "sleep_steps": 20,
    "batch": 128,
    "sleep_lr": 0.004,
    "lr": 0.001,
    "particles": 4,
    "hidden": 256,
    "layers": 3,
    "power": {"start": 0.2, "over": 0.6},
}
VQ = {"decay": 0.999, "commitment": 0.25}
JUDGED = 100  # test images of which the exact posterior is compared with the guide
NETWORKS = {"autoregressive": "mlp", "factorised": "independent"}


@lru_cache(maxsize=8)
def digits(
    latents: int,
    seed: int,
    network: str = "mlp",
    split: str = "train",
    few: bool = False,
    hidden: int = 128,
    layers: int = 1,
) -> Problem:
    """The problem of a seed, which is that of starting values; of the test images all, or those that guides see."""
    images = load("images", num_test=JUDGED if few else None)
    options: dict[str, Any] = {"network": network, "guide_hidden": hidden, "guide_layers": layers, "seed": seed}
    return make_vae(images, num_latents=latents, num_particles=VAE["particles"], split=split, **options)


def minibatches(image: Tensor, steps: int, seed: int) -> Any:
    """Images (row of a batch, ...) of every step."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield image[torch.randint(len(image), (VAE["batch"],), generator=generator)]


def ascend(
    loss: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], image: Tensor, steps: int, seed: int
) -> None:
    """Adam, with the step sizes of the other methods."""
    optimiser = torch.optim.Adam(parameters, lr=VAE["lr"])
    for step, batch in enumerate(minibatches(image, steps, seed)):
        optimiser.param_groups[0]["lr"] = VAE["lr"] * decay(step / steps)
        optimiser.zero_grad()
        loss(batch).backward()
        optimiser.step()


def exactly_trained(latents: int, seed: int) -> DiscreteVAE:
    """A decoder that ascended the exact likelihood; kept in a file beside the results."""
    path = common.RESULTS / f"gflownet_em_decoder_{latents}_{seed}.pt"
    problem = digits(latents, seed)
    model: DiscreteVAE = problem.programs()[0]
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        loss, parameters = (lambda batch: -model.log_likelihood(batch).mean()), list(model.parameters())
        ascend(loss, parameters, problem.args[0], VAE["exact_steps"], seed)
        common.RESULTS.mkdir(exist_ok=True)
        torch.save(model.state_dict(), path)
    return model


class VectorQuantiser(nn.Module):
    """A VQ-VAE whose decoder is that of the model, with a codebook for every latent.

    References
    ----------
    van den Oord, A., Vinyals, O. and Kavukcuoglu, K. (2017). Neural discrete representation learning. NeurIPS 30.
    https://arxiv.org/abs/1711.00937, with the moving averages of its appendix A.1.
    """

    def __init__(self, model: DiscreteVAE, hidden: int = 128) -> None:
        super().__init__()
        self.model, (latents, codes, width) = model, model.embedding.shape
        sizes = (int(np.prod(model.shape)), hidden, hidden, latents * width)
        layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
        self.encoder = nn.Sequential(*layers[:-1], nn.Unflatten(1, (latents, width)))
        self.book = model.embedding.detach().clone()
        self.count, self.total = torch.ones(latents, codes), self.book.clone()

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (row, latent, width) and the nearest codes (row, latent)."""
        vectors = self.encoder(image.flatten(1))
        return vectors, (vectors.unsqueeze(2) - self.book).square().sum(-1).argmin(-1)

    def loss(self, image: Tensor) -> Tensor:
        """Reconstruction and commitment; moves the codebooks."""
        vectors, code = self.encode(image)
        nearest = self.book[torch.arange(code.shape[1]), code]
        with torch.no_grad():
            hot = F.one_hot(code, self.book.shape[1]).to(vectors)
            self.count.lerp_(hot.sum(0), 1 - VQ["decay"])
            self.total.lerp_(torch.einsum("nlk,nld->lkd", hot, vectors), 1 - VQ["decay"])
            self.book = self.total / self.count.unsqueeze(-1).clamp(min=1e-5)
        through = vectors + (nearest - vectors).detach()
        logits = self.model.network(through.flatten(1)).unflatten(1, self.model.shape)
        rebuilt = F.binary_cross_entropy_with_logits(logits, image, reduction="sum")
        return (rebuilt + VQ["commitment"] * (vectors - nearest).square().sum()) / len(image)

    def finished(self) -> DiscreteVAE:
        """The model with the codebooks in the place of its embeddings."""
        with torch.no_grad():
            self.model.embedding.copy_(self.book)
        return self.model


def judged(model: DiscreteVAE, latents: int, seed: int) -> dict[str, float]:
    """Exact negative log likelihoods of training and test images."""
    with torch.no_grad():
        return {
            f"{split}_nll": -float(model.log_likelihood(digits(latents, seed, split=split).args[0]).mean())
            for split in ("train", "test")
        }


def vae_cell(method: str, latents: int, seed: int) -> dict[str, Any]:
    """A trained model of digits."""
    if method == "exact":
        return judged(exactly_trained(latents, seed), latents, seed)
    problem = digits(latents, seed, NETWORKS.get(method, "mlp"))
    if method == "vq":
        torch.manual_seed(seed)
        quantiser = VectorQuantiser(problem.programs()[0])
        parameters = [*quantiser.encoder.parameters(), *quantiser.model.network.parameters()]
        ascend(quantiser.loss, parameters, problem.args[0], VAE["steps"], seed)
        model = quantiser.finished()
        with torch.no_grad():
            test = digits(latents, seed, split="test", few=True).args[0]
            place = model.num_codes ** torch.arange(latents - 1, -1, -1)
            chosen = (quantiser.encode(test)[1] * place).sum(-1)
            posterior = model.log_joint(test, torch.cat(list(model.states()))).softmax(-1)
        tv = 1 - posterior.gather(1, chosen.unsqueeze(1)).mean()  # of the nearest codes, all of whose mass is on one
        return judged(model, latents, seed) | {"tv": float(tv)}
    phase = Phase(
        "joint",
        num_particles=VAE["particles"],
        lr=VAE["lr"],
        schedule=lambda step: decay(step / VAE["steps"]),
        plus={"sleep": {"start": 0.0, "end": VAE["sleep"]}},
    )
    result = fit_em(
        problem,
        phases=[phase],
        num_rounds=VAE["steps"],
        batch_size=VAE["batch"],
        num_samples=2,
        seed=seed,
        progress=False,
    )
    test = digits(latents, seed, NETWORKS[method], "test", True)
    with fitted(problem, result.guide_state or {}, seed=0) as (model, _):
        found = judged(model, latents, seed)
    return found | nearness(test, result)


def fixed_cell(method: str, latents: int, seed: int) -> dict[str, Any]:
    """A guide for the decoder of a seed, which stays as it is."""
    trained = exactly_trained(latents, seed)
    train, test = (
        replace(digits(latents, seed, NETWORKS[method], split, True, FIXED["hidden"], FIXED["layers"]), model=trained)
        for split in ("train", "test")
    )
    rounds, dreams = FIXED["rounds"], FIXED["sleep_steps"]
    phases = [
        Phase("sleep", steps=dreams, lr=FIXED["sleep_lr"], schedule=lambda step: decay(step / (rounds * dreams))),
        Phase("e_step", num_particles=FIXED["particles"], lr=FIXED["lr"], schedule=lambda step: decay(step / rounds)),
    ]
    result = fit_em(
        train,
        phases=phases,
        num_rounds=rounds,
        reward_power=FIXED["power"],
        batch_size=FIXED["batch"],
        num_samples=2,
        seed=seed,
        progress=False,
    )
    return judged(trained, latents, seed) | nearness(test, result)


# -- tables -----------------------------------------------------------------------------------------------------------


def cells(part: str, until: float, compute: Callable[..., dict[str, Any]], keys: Sequence[Mapping[str, Any]]) -> Any:
    """Rows of all cells that there was time for."""
    rows = []
    for key in keys:
        try:
            row = common.cell("gflownet_em", until, partial(compute, **key), part=part, **key)
        except common.OutOfTime:
            break
        print(part, key, {k: v for k, v in row.items() if isinstance(v, float)}, flush=True)
        rows.append({**key, **row})
    return rows


def mixture(until: float, seeds: Sequence[int]) -> None:
    """Table of the mixture."""
    keys = [{"method": method, "seed": seed} for seed in seeds for method in ("exact", "factorised", "gflownet")]
    rows = cells("mixture", until, mixture_cell, keys)
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["method"], {})[row["seed"]] = row
    best = max(row["log_likelihood"] for row in rows)
    lines = []
    for method, of_seed in found.items():
        exact = found["exact"]
        won = [seed for seed in of_seed if exact[seed]["log_likelihood"] > best - 0.005]
        loss = [exact[seed]["log_likelihood"] - of_seed[seed]["log_likelihood"] for seed in of_seed]
        near = [exact[seed]["log_likelihood"] - of_seed[seed]["log_likelihood"] < 0.005 for seed in won]
        line = {
            "EM": method,
            "starts": len(of_seed),
            "log likelihood": common.spread([row["log_likelihood"] for row in of_seed.values()], 5),
            "below exact EM": interval(loss),
            "within 0.005 where exact EM is best": f"{sum(near)} of {len(won)}",
            "CPU s": common.spread([row["cpu"] for row in of_seed.values()]),
        }
        if method == "gflownet":
            line |= {name: common.spread([row[key] for row in of_seed.values()]) for name, key in SHOWN}
        lines.append(line)
    common.report("gflownet_em_mixture", lines[::-1], **MIXTURE)


def vae(until: float, seeds: Sequence[int]) -> None:
    """Table of trained models: NLL beside TV, and differences to the autoregressive guide at equal seeds."""
    methods = ("exact", "autoregressive", "factorised", "vq")
    keys = [{"method": method, "latents": 4, "seed": seed} for seed in seeds for method in methods]
    rows = cells("vae", until, vae_cell, keys)
    found = {method: {row["seed"]: row for row in rows if row["method"] == method} for method in methods}
    lines = []
    for method in methods:
        both = sorted(set(found[method]) & set(found["autoregressive"]))
        paired = [found[method][seed]["test_nll"] - found["autoregressive"][seed]["test_nll"] for seed in both]
        lines.append({"method": method, "seeds": len(found[method])})
        for title, key in (("test NLL", "test_nll"), ("train NLL", "train_nll"), ("TV", "tv"), ("KL(q || p)", "kl")):
            values = [row[key] for row in found[method].values() if key in row]
            lines[-1][title] = interval(values) if values else ""
        lines[-1]["above autoregressive"] = interval(paired) if method != "autoregressive" and paired else ""
        lines[-1]["CPU s"] = common.spread([row["cpu"] for row in found[method].values()]) if found[method] else ""
    common.report("gflownet_em_vae", lines, **VAE)


def fixed(until: float, seeds: Sequence[int]) -> None:
    """Table of guides of decoders that are held."""
    keys = [
        {"method": method, "latents": latents, "seed": seed}
        for seed in seeds
        for latents in (4, 2)
        for method in NETWORKS
    ]
    rows = cells("fixed", until, fixed_cell, keys)
    lines = []
    for latents in (4, 2):
        of = {
            method: {row["seed"]: row for row in rows if (row["method"], row["latents"]) == (method, latents)}
            for method in NETWORKS
        }
        for method, found in of.items():
            if not found:
                continue
            both = sorted(set(found) & set(of["autoregressive"]))
            ratio = [found[seed]["kl"] / of["autoregressive"][seed]["kl"] for seed in both]
            line = {"latents": latents, "guide": method, "seeds": len(found)}
            for title, key in (("test NLL of the decoder", "test_nll"), ("TV", "tv"), ("KL(q || p)", "kl")):
                line[title] = interval(row[key] for row in found.values())
            line["KL by the autoregressive one's"] = interval(ratio) if ratio else ""
            lines.append(line | {"CPU s": common.spread([row["cpu"] for row in found.values()])})
    common.report("gflownet_em_fixed", lines, **FIXED)


SHOWN = (("TV", "tv"), ("error of log Z", "kl"))
PARTS: dict[str, Callable[[float, Sequence[int]], None]] = {"mixture": mixture, "vae": vae, "fixed": fixed}


def main() -> None:
    """Run the parts that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--seeds", type=int, default=None, help="how many; 20 for the mixture, else 5")
    parser.add_argument("--minutes", type=float, default=np.inf, help="start no cell after these")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    for part in options.parts:
        seeds = range(options.seeds or (20 if part == "mixture" else 5))
        PARTS[part](until, seeds)


if __name__ == "__main__":
    main()
