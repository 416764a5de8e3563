"""Hidden Markov models, capture and recapture, epidemics."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.epidemiology.models import SimpleSIRModel
from pyro.distributions.hmm import _sequential_logmatmulexp
from pyro.infer import config_enumerate
from pyro.infer.reparam import DiscreteCosineReparam
from pyro.ops.indexing import Vindex
from pyro.ops.special import safe_log
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_models.listing import PARALLEL, listed, made, random

# Hidden Markov models


def tones() -> tuple[Tensor, Tensor]:
    draws = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0))
    return (draws < 0.4).float(), torch.tensor([4, 3])


def styles(hidden: int, *shape: int) -> tuple[Tensor, Tensor]:
    probs_x = pyro.sample("probs_x", dist.Dirichlet(0.9 * torch.eye(hidden) + 0.1).to_event(1))
    probs_y = pyro.sample("probs_y", dist.Beta(0.1, 0.9).expand([hidden, *shape]).to_event(1 + len(shape)))
    return probs_x, probs_y


@listed("HMM: model 0", "examples/hmm.py", args=tones)
def hmm_0(sequences: Tensor, lengths: Tensor) -> None:
    probs_x, probs_y = styles(2, 3)
    tones_plate = pyro.plate("tones", 3, dim=-1)
    for i in pyro.plate("sequences", len(sequences)):
        length = lengths[i]
        sequence = sequences[i, :length]
        x: Any = 0
        for t in pyro.markov(range(length)):
            x = pyro.sample(f"x_{i}_{t}", dist.Categorical(probs_x[x]), infer=PARALLEL)
            with tones_plate:
                pyro.sample(f"y_{i}_{t}", dist.Bernoulli(probs_y[x.squeeze(-1)]), obs=sequence[t])


@listed("HMM: model 1", "examples/hmm.py", args=tones)
def hmm_1(sequences: Tensor, lengths: Tensor) -> None:
    assert lengths.max() <= sequences.shape[1]
    probs_x, probs_y = styles(2, 3)
    tones_plate = pyro.plate("tones", 3, dim=-1)
    with pyro.plate("sequences", len(sequences), dim=-2) as batch:
        lengths = lengths[batch]
        x: Any = 0
        for t in pyro.markov(range(lengths.max())):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer=PARALLEL)
                with tones_plate:
                    pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[x.squeeze(-1)]), obs=sequences[batch, t])


@listed("HMM: model 2", "examples/hmm.py", args=tones)
def hmm_2(sequences: Tensor, lengths: Tensor) -> None:
    probs_x, probs_y = styles(2, 2, 3)
    tones_plate = pyro.plate("tones", 3, dim=-1)
    with pyro.plate("sequences", len(sequences), dim=-2) as batch:
        lengths = lengths[batch]
        x, y = 0, 0
        for t in pyro.markov(range(lengths.max())):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer=PARALLEL)
                with tones_plate as tone:
                    fn = dist.Bernoulli(probs_y[x, y, tone])
                    y = pyro.sample(f"y_{t}", fn, obs=sequences[batch, t]).long()


@listed("HMM: model 3", "examples/hmm.py", args=tones)
def hmm_3(sequences: Tensor, lengths: Tensor) -> None:
    probs_w = pyro.sample("probs_w", dist.Dirichlet(0.9 * torch.eye(2) + 0.1).to_event(1))
    probs_x, probs_y = styles(2, 2, 3)
    tones_plate = pyro.plate("tones", 3, dim=-1)
    with pyro.plate("sequences", len(sequences), dim=-2) as batch:
        lengths = lengths[batch]
        w, x = 0, 0
        for t in pyro.markov(range(lengths.max())):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                w = pyro.sample(f"w_{t}", dist.Categorical(probs_w[w]), infer=PARALLEL)
                x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer=PARALLEL)
                with tones_plate as tone:
                    pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[w, x, tone]), obs=sequences[batch, t])


class TonesGenerator(nn.Module):
    def __init__(self, hidden: int, data: int) -> None:
        super().__init__()
        self.data = data
        self.x_to_hidden = nn.Linear(hidden, 3)
        self.y_to_hidden = nn.Linear(data, 3)
        self.conv = nn.Conv1d(1, 2, 3, padding=1)
        self.hidden_to_logits = nn.Linear(6, data)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        one_hot = y.new_zeros((*x.shape[:-1], self.x_to_hidden.in_features)).scatter_(-1, x, 1)
        hidden = (self.x_to_hidden(one_hot) + self.y_to_hidden(y)).relu()
        kept = hidden.shape[:-1]
        hidden = self.conv(hidden.reshape(-1, 1, 3)).relu()
        return self.hidden_to_logits(hidden.reshape(*kept, 6))


@made("HMM: model 5, with a network", "examples/hmm.py")
def hmm_5() -> Any:
    generator = TonesGenerator(2, 3)

    def model(sequences: Tensor, lengths: Tensor) -> None:
        pyro.module("tones_generator", generator)
        probs_x = pyro.sample("probs_x", dist.Dirichlet(0.9 * torch.eye(2) + 0.1).to_event(1))
        with pyro.plate("sequences", len(sequences), dim=-2) as batch:
            lengths = lengths[batch]
            x: Any = 0
            y = torch.zeros(3)
            for t in pyro.markov(range(lengths.max())):
                with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                    x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer=PARALLEL)
                    with pyro.plate(f"tones_{t}", 3, dim=-1):
                        y = pyro.sample(f"y_{t}", dist.Bernoulli(logits=generator(x, y)), obs=sequences[batch, t])

    return model, tones()


@listed("HMM: model 7, by DiscreteHMM", "examples/hmm.py", args=lambda: (tones()[0],))
def hmm_7(sequences: Tensor) -> None:
    probs_x, probs_y = styles(2, 3)
    init_logits = torch.full((2,), -math.inf)
    init_logits[0] = 0
    with pyro.plate("sequences", len(sequences)):
        hmm = dist.DiscreteHMM(init_logits, probs_x.log(), dist.Bernoulli(probs_y).to_event(1))
        pyro.sample("y", hmm, obs=sequences)


def dives() -> tuple[Any, ...]:
    steps = random(2, 3, 4).abs() + 0.1
    angles = random(2, 3, 4, seed=1).clamp(-3, 3)
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[1, 2, 2:] = False
    steps[0, 0, 1] = 1e-3
    return (steps, angles, mask)


@listed("mixed HMM", "examples/mixed_hmm/model.py", args=dives)
@config_enumerate
def mixed_hmm(steps: Tensor, angles: Tensor, seen: Tensor, missing: float = 1e-3) -> None:
    concentration = pyro.sample("step_concentration", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
    rate = pyro.sample("step_rate", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
    zi = pyro.sample("step_zi", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    angle_loc = pyro.param("angle_loc", lambda: torch.tensor([0.3, 1.0]))
    angle_concentration = pyro.param("angle_concentration", lambda: torch.ones(2), constraint=constraints.positive)
    with pyro.plate("group", 3, dim=-1):
        eps_g = pyro.sample("eps_g", dist.Normal(torch.zeros(4), torch.ones(4)).to_event(1))
        gamma = torch.zeros(4) + eps_g
        with pyro.plate("individual", 2, dim=-2):
            eps_i = pyro.sample("eps_i", dist.Normal(torch.zeros(3, 4), torch.ones(3, 4)).to_event(1))
            gamma = gamma + eps_i
            y = torch.tensor(0).long()
            for t in pyro.markov(range(steps.shape[-1])):
                with poutine.mask(mask=seen[..., t]):
                    gamma_t = gamma.reshape((*gamma.shape[:-1], 2, 2))
                    y = pyro.sample(f"y_{t}", dist.Categorical(logits=Vindex(gamma_t)[..., y, :]))
                    step = dist.Gamma(Vindex(concentration)[y], Vindex(rate)[y])
                    absent = pyro.sample(
                        f"step_zi_{t}", dist.Categorical(Vindex(zi)[y, :]), obs=(steps[..., t] == missing).long()
                    )
                    zero = dist.Delta(v=torch.tensor(missing))
                    pyro.sample(f"step_{t}", dist.MaskedMixture(absent.bool(), step, zero), obs=steps[..., t])
                    angle = dist.VonMises(Vindex(angle_loc)[y], Vindex(angle_concentration)[y])
                    pyro.sample(f"angle_{t}", angle, obs=angles[..., t])


def histories() -> tuple[Tensor, Tensor]:
    draws = torch.rand(6, 4, generator=torch.Generator().manual_seed(1))
    return (draws < 0.6).float(), torch.tensor([1.0, 0, 1, 0, 0, 1])


def seen_again(capture_history: Tensor, phi: Any, rho: Tensor) -> None:
    n, length = capture_history.shape
    z = torch.ones(n)
    first_capture_mask = torch.zeros(n).bool()
    animals_plate = pyro.plate("animals", n, dim=-1)
    for t in pyro.markov(range(length)):
        phi_t = phi(t)
        with animals_plate, poutine.mask(mask=first_capture_mask):
            mu_z_t = first_capture_mask.float() * phi_t * z + (1 - first_capture_mask.float())
            z = pyro.sample(f"z_{t}", dist.Bernoulli(mu_z_t), infer=PARALLEL)
            pyro.sample(f"y_{t}", dist.Bernoulli(rho * z), obs=capture_history[:, t])
        first_capture_mask |= capture_history[:, t].bool()


@listed("capture-recapture: model 1", "examples/capture_recapture/cjs.py", args=lambda: histories()[:1])
def cjs_1(history: Tensor) -> None:
    phi = pyro.sample("phi", dist.Uniform(0.0, 1.0))
    rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
    seen_again(history, lambda t: phi, rho)


@listed("capture-recapture: model 3", "examples/capture_recapture/cjs.py", args=lambda: histories()[:1])
def cjs_3(history: Tensor) -> None:
    phi_mean = pyro.sample("phi_mean", dist.Uniform(0.0, 1.0))
    mean = torch.log(phi_mean) - torch.log1p(-phi_mean)
    phi_sigma = pyro.sample("phi_sigma", dist.Uniform(0.0, 10.0))
    rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))

    def phi(t: int) -> Tensor:
        if t == 0:
            return torch.sigmoid(torch.tensor(0.0))
        return torch.sigmoid(pyro.sample(f"phi_logit_{t}", dist.Normal(mean, phi_sigma)))

    seen_again(history, phi, rho)


@listed("capture-recapture: model 5", "examples/capture_recapture/cjs.py", args=histories)
def cjs_5(history: Tensor, sex: Tensor) -> None:
    beta = sex * pyro.sample("phi_beta", dist.Normal(0.0, 10.0))
    rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))

    def phi(t: int) -> Tensor:
        gamma = pyro.sample(f"phi_gamma_{t}", dist.Normal(0.0, 10.0)) if t > 0 else 0.0
        return torch.sigmoid(beta + gamma)

    seen_again(history, phi, rho)


# Epidemics

CASES = torch.tensor([0.0, 1, 1])
POPULATION = 6
PATHS = {"S_aux": [5.1, 4.1, 3.1], "I_aux": [1.1, 1.9, 2.9]}


@listed("SIR: reparametrised and enumerated", "examples/sir_hmc.py", args=lambda: (CASES[:2], 3))
@config_enumerate
def sir_discrete(data: Tensor, population: int) -> None:
    prob_s = pyro.sample("prob_s", dist.Uniform(0, 1))
    prob_i = pyro.sample("prob_i", dist.Uniform(0, 1))
    rho = pyro.sample("rho", dist.Uniform(0, 1))
    s, i = torch.tensor(population - 1.0), torch.tensor(1.0)
    for t, datum in enumerate(data):
        with poutine.mask(mask=False):
            s_next = pyro.sample(f"S_{t}", dist.Binomial(population, 0.5))
            i_next = pyro.sample(f"I_{t}", dist.Binomial(population, 0.5))
        s2i = s - s_next
        i2r = i - i_next + s2i
        pyro.sample(f"S2I_{t}", dist.ExtendedBinomial(s, prob_s * i / population), obs=s2i)
        pyro.sample(f"I2R_{t}", dist.ExtendedBinomial(i, prob_i), obs=i2r)
        s, i = s_next, i_next
        pyro.sample(f"obs_{t}", dist.ExtendedBinomial(s2i.clamp(min=0), rho), obs=datum)


def quantize(name: str, x_real: Tensor) -> Tensor:
    lower = x_real.detach().floor()
    t = x_real - lower
    return lower + pyro.sample(name, dist.Bernoulli(t * t * (3 - 2 * t)))


@listed("SIR: continuous", "examples/sir_hmc.py", args=lambda: (CASES, POPULATION), near=PATHS)
@config_enumerate
def sir_continuous(data: Tensor, population: int) -> None:
    prob_s = pyro.sample("prob_s", dist.Uniform(0, 1))
    prob_i = pyro.sample("prob_i", dist.Uniform(0, 1))
    rho = pyro.sample("rho", dist.Uniform(0, 1))
    aux = dist.Uniform(-0.5, population + 0.5).expand(data.shape).to_event(1)
    s_aux, i_aux = pyro.sample("S_aux", aux), pyro.sample("I_aux", aux)
    s, i = torch.tensor(population - 1.0), torch.tensor(1.0)
    for t, datum in poutine.markov(enumerate(data)):
        s_next = quantize(f"S_{t}", s_aux[t]).clamp(min=0, max=population)
        i_next = quantize(f"I_{t}", i_aux[t]).clamp(min=0, max=population)
        s2i = s - s_next
        i2r = i - i_next + s2i
        pyro.sample(f"S2I_{t}", dist.ExtendedBinomial(s, prob_s * i / population), obs=s2i)
        pyro.sample(f"I2R_{t}", dist.ExtendedBinomial(i, prob_i), obs=i2r)
        s, i = s_next, i_next
        pyro.sample(f"obs_{t}", dist.ExtendedBinomial(s2i.clamp(min=0), rho), obs=datum)


@listed(
    "SIR: vectorised",
    "examples/sir_hmc.py",
    args=lambda: (CASES, POPULATION),
    near=PATHS,
    reparam={"S_aux": DiscreteCosineReparam(), "I_aux": DiscreteCosineReparam()},
)
def sir_vectorised(data: Tensor, population: int) -> None:
    prob_s = pyro.sample("prob_s", dist.Uniform(0, 1))
    prob_i = pyro.sample("prob_i", dist.Uniform(0, 1))
    rho = pyro.sample("rho", dist.Uniform(0, 1))
    aux = dist.Uniform(-0.5, population + 0.5).expand(data.shape).to_event(1)
    parts = []
    for value in (pyro.sample("S_aux", aux), pyro.sample("I_aux", aux)):
        lower = value.detach().floor()
        t = value - lower
        prob = t * t * (3 - 2 * t)
        states = torch.stack([lower, lower + 1], dim=-1).clamp(min=0, max=population)
        parts.append((states, safe_log(torch.stack([1 - prob, prob], dim=-1))))
    (s_curr, s_logp), (i_curr, i_logp) = parts
    s_prev = nn.functional.pad(s_curr[:-1], (0, 0, 1, 0), value=population - 1).reshape(-1, 2, 1, 1, 1)
    i_prev = nn.functional.pad(i_curr[:-1], (0, 0, 1, 0), value=1).reshape(-1, 1, 2, 1, 1)
    s_curr, s_logp = s_curr.reshape(-1, 1, 1, 2, 1), s_logp.reshape(-1, 1, 1, 2, 1)
    i_curr, i_logp = i_curr.reshape(-1, 1, 1, 1, 2), i_logp.reshape(-1, 1, 1, 1, 2)
    s2i = s_prev - s_curr
    i2r = i_prev - i_curr + s2i
    logp = s_logp + i_logp
    logp = logp + dist.ExtendedBinomial(s2i.clamp(min=0), rho).log_prob(data.reshape(-1, 1, 1, 1, 1))
    logp = logp + dist.ExtendedBinomial(s_prev, prob_s * i_prev / population).log_prob(s2i)
    logp = logp + dist.ExtendedBinomial(i_prev, prob_i).log_prob(i2r)
    logp = _sequential_logmatmulexp(logp.reshape(-1, 4, 4)).reshape(-1).logsumexp(0) - math.log(4)
    pyro.factor("obs", logp)


def outbreak(bins: int) -> Any:
    model = SimpleSIRModel(population=50, recovery_time=5.0, data=torch.tensor([1.0, 2, 0, 3, 4]))
    model.num_quant_bins = bins
    return (model._quantized_model if bins > 1 else model._relaxed_model), ()


infected = [[48.0, 45.0, 44.0, 40.0, 34.0], [2.0, 4.0, 4.0, 7.0, 11.0]]
made("epidemiology: quantised SIR", "tutorial epi_intro", near={"auxiliary": infected})(lambda: outbreak(4))
made("epidemiology: relaxed SIR", "tutorial epi_intro")(lambda: outbreak(1))


@listed("coalescent times", "documentation of CoalescentTimes", args=lambda: (torch.tensor([0.0, 0.0, 1.0, 2.0]),))
def coalescent(leaf_times: Tensor) -> None:
    rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
    times = torch.tensor([-3.0, -1.0, 0.5])
    pyro.sample("coal_times", dist.CoalescentTimes(leaf_times, rate), obs=times)


@listed(
    "inclined plane",
    "examples/inclined_plane.py",
    args=lambda: (torch.tensor([0.75, 0.72]),),
    reason=("reads a value out of a tensor", "while displacement < length:"),
)
def inclined_plane(times: Tensor) -> None:
    mu = pyro.sample("mu", dist.Uniform(0.0, 1.0))
    acceleration = 9.8 * (math.sin(math.pi / 6) - math.cos(math.pi / 6) * mu).clamp(min=0.1)
    elapsed, velocity, displacement, length = torch.zeros(()), torch.zeros(()), mu * 0, 1.0
    while displacement < length:
        velocity = torch.sqrt(velocity * velocity + 2.0 * 0.25 * acceleration)
        displacement = displacement + 0.25
        elapsed = elapsed + 0.25 / velocity
    for index in pyro.plate("times", len(times)):
        pyro.sample(f"obs_{index}", dist.Normal(elapsed, 0.02), obs=times[index])
