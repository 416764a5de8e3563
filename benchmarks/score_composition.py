"""Composition of scores on problems with exact answers: samplers, line integrals, guidance, inverse problems.

    python benchmarks/score_composition.py product
    python benchmarks/score_composition.py steps
    python benchmarks/score_composition.py integral
    python benchmarks/score_composition.py guidance
    python benchmarks/score_composition.py inverse
    python benchmarks/score_composition.py learned
    python benchmarks/score_composition.py cost

``product``: a ring of eight normals (radius 0.5, sd 0.03) times the uniform density of a bar, [-0.2, 0.2] x [-1, 1], at
100 levels of the cosine schedule of Nichol and Dhariwal (2021), from scores in closed form. Two modes of the ring lie
in the bar. Columns: share of draws within 4 sd of them; mean log density of the product, whose bar has 1 % of its mass
on [-1.1, 1.1]^2 to keep it finite; mean error of the two variances; squared MMD (bandwidth 0.1) and 2-Wasserstein
distance from exact draws; acceptance over all levels; scores computed for each draw; CPU seconds. The last rows hold
exact draws: of level 0, whose noise is taken off by Tweedie's formula as that of all samplers is, and of the product.
Rows with a predictor take one step of the reverse process before those that leave a level invariant.

``steps``: HMC of longer and longer steps, in units of the scale of a mode at each level, five steps a level: sd of the
draws of level 0 within the modes over the exact one, and the share of chains that are lost (not finite, or beyond 3).

``integral``: error of rules for the log ratio of densities of an HMC proposal, for points of the product at three
levels, and its order in the step size.

``guidance``: ``p(z) p(y | z)^4`` for one of eight overlapping normals, against exact draws by rejection.

``inverse``: a mixture in six dimensions of which three sums are observed, against the exact posterior.

``learned``: the product again, of two networks fitted to 100,000 points of the ring and of the bar by the bound in
continuous time: one pair that predicts the velocity, and one whose predictions are the gradient of a scalar, so that
energies are known. First table: squared error of the networks' scores over the squared exact ones, at draws of a level.
Second: samplers as above, each with the networks of every seed; rows of exact scores are at the same levels.

``cost``: CPU milliseconds of a step of HMC (``curve-simpson``, three leapfrog steps) in a uniform box, whose scores
cost as much in every direction, by chains and by dimensions, medians of seven rounds in turn; the exponent
between the two largest.

Intervals are Student's over groups of draws, one for each seed; chains are independent and run at once. Cells that are
done are kept in ``benchmarks/results``.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from probmodels import fit_svi, run_mcmc
from probmodels.diffusion import model as diffusion
from probmodels.diffusion.fitted import make_field
from probmodels.guides.schedules import CosineSchedule, LinearSchedule, TableSchedule
from probmodels.inference.mcmc.line_integrals import RULES, log_ratio
from probmodels.inference.metrics.samples import mmd, wasserstein
from probmodels.score_composition import levels_of, make_move, make_problem
from probmodels.scores.closed import GaussianMixture, UniformBox
from probmodels.scores.fields import Conditioned, Field, Product, ScoreOnly, linear_observation
from probmodels.scores.samplers import sample, weighted

Figures = list[dict[str, float]]  # of groups of draws
LEVELS, SD, RADIUS = 100, 0.03, 0.5
LOW, HIGH = [-0.2, -1.0], [0.2, 1.0]
MODES = torch.tensor([[0.0, RADIUS], [0.0, -RADIUS]], dtype=torch.float64)
OUTSIDE = 0.01  # of the mass of the bar, for log densities of draws beyond it


def cosine_table(num_levels: int = LEVELS) -> TableSchedule:
    """The schedule of Nichol and Dhariwal (2021), its betas clipped at 0.999."""
    place = torch.arange(num_levels + 1, dtype=torch.float64) / num_levels
    curve = torch.cos((place + 0.008) / 1.008 * math.pi / 2) ** 2
    return TableSchedule(torch.cumprod(1 - (1 - curve[1:] / curve[:-1]).clamp(max=0.999), 0))


SCHEDULE = cosine_table()
ANGLES = torch.arange(8, dtype=torch.float64) * math.pi / 4
CIRCLE = torch.stack([ANGLES.cos(), ANGLES.sin()], -1)
RING = GaussianMixture(SCHEDULE, RADIUS * CIRCLE, SD**2)
BAR = UniformBox(SCHEDULE, LOW, HIGH)
KNOWN, SCORES = Product([RING, BAR]), Product([ScoreOnly(RING), ScoreOnly(BAR)])

# -- the product of a ring and a bar ----------------------------------------------------------------------------------


def exact_product(num_samples: int, seed: int) -> Tensor:
    """Draws (sample, 2) of the ring that lie in the bar."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(8, (20 * num_samples,), generator=generator)
    noise = torch.randn(len(chosen), 2, dtype=torch.float64, generator=generator)
    x = RADIUS * CIRCLE[chosen] + SD * noise
    inside = ((x > torch.tensor(LOW)) & (x < torch.tensor(HIGH))).all(-1)
    return x[inside][:num_samples]


def _mass(low: Sequence[float], high: Sequence[float]) -> float:
    """Mass of the ring in a box."""
    ends = [torch.special.ndtr((torch.tensor(side) - RADIUS * CIRCLE) / SD) for side in (low, high)]
    return float((ends[1] - ends[0]).prod(-1).mean())


def log_product(x: Tensor) -> Tensor:
    """Normalised log density (sample,) of the product, 1 % of the bar's mass around it."""
    square = [-1.1, -1.1], [1.1, 1.1]
    within, around = (1 - OUTSIDE) / 0.8, OUTSIDE / 2.2**2
    constant = within * _mass(LOW, HIGH) + around * _mass(*square)
    ring = -0.5 * ((x.unsqueeze(1) - RADIUS * CIRCLE) ** 2).sum(-1) / SD**2 - math.log(8 * 2 * math.pi * SD**2)
    inside = ((x > torch.tensor(LOW)) & (x < torch.tensor(HIGH))).all(-1)
    return ring.logsumexp(-1) + torch.log(inside * within + around) - math.log(constant)


def product_figures(x: Tensor, seed: int) -> dict[str, float]:
    """Columns of the table, for draws (sample, 2)."""
    x = x.double()
    exact = exact_product(len(x), 10_000 + seed)
    distance = (x.unsqueeze(1) - MODES).norm(dim=-1).amin(1)
    variance = torch.tensor([exact_product(10**5, 5)[:, i].var() for i in range(2)])
    return {
        "in modes": float((distance < 4 * SD).double().mean()),
        "log density": float(log_product(x).mean()),
        "variance error": float((x.var(0) - variance).abs().mean()),
        "MMD2": mmd(x, exact, 0.1),
        "W2": wasserstein(x, exact),
    }


def chains(field: Field, num_chains: int, per_level: int, seed: int, num_levels: int = LEVELS, **options: Any) -> Any:
    """Draws (sample, size) of one annealed run, and what happened on its levels."""
    width = options.pop("width", SD)
    draws = options.pop("draws", 1)
    problem = make_problem(field, num_levels=num_levels, width=width)
    result = run_mcmc(
        problem,
        num_samples=draws,
        warmup_steps=num_levels * per_level,
        num_chains=num_chains,
        kernel_options=options,
        seed=seed,
        progress=False,
    )
    x = torch.as_tensor(result.tree["posterior"]["x"].values)
    return x.reshape(-1, x.shape[-1]), levels_of(result)


def annealed_cell(
    num_samples: int,
    seeds: Sequence[int],
    exact: bool = False,
    per_level: int = 10,
    field: Field | None = None,
    **options: Any,
) -> Figures:
    """Annealed runs of some steps a level, all at once: chains are independent."""
    field = field or (KNOWN if exact else SCORES)
    x, levels = chains(field, num_samples * len(seeds), per_level, seeds[0], **options)
    shared = {
        "acceptance": float(levels["acceptance_rate"].mean()),
        "scores": float(levels["evaluations"].sum()) + 1,
    }
    return [product_figures(part, seed) | shared for part, seed in zip(x.split(num_samples), seeds, strict=True)]


def reverse_cell(num_samples: int, seeds: Sequence[int], field: Field = SCORES) -> Figures:
    """The reverse process."""
    shared = {"acceptance": math.nan, "scores": float(LEVELS)}
    return [
        product_figures(sample(field, num_samples, num_steps=LEVELS - 1, seed=seed, progress=False), seed) | shared
        for seed in seeds
    ]


def weighted_cell(num_samples: int, seeds: Sequence[int], weights: str, steps: int) -> Figures:
    """Sequential Monte Carlo, one run for each seed."""
    field = KNOWN if weights == "energy" else SCORES
    move = make_move(field, num_steps=steps, width=SD) if steps else None
    options: dict[str, Any] = {"num_steps": LEVELS - 1, "weights": weights, "move": move, "progress": False}
    found = [weighted(field, num_samples, seed=seed, **options) for seed in seeds]
    return [
        product_figures(one.samples, seed) | {"acceptance": math.nan, "scores": one.evaluations + 1.0}
        for one, seed in zip(found, seeds, strict=True)
    ]


def exact_cell(num_samples: int, seeds: Sequence[int]) -> Figures:
    """Exact draws against exact draws."""
    shared = {"acceptance": math.nan, "scores": 0.0}
    return [product_figures(exact_product(num_samples, seed), seed) | shared for seed in seeds]


def noised_cell(num_samples: int, seeds: Sequence[int]) -> Figures:
    """Exact draws of the product of the densities of level 0, its noise taken off as samplers do."""
    found, shared = [], {"acceptance": math.nan, "scores": 0.0}
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        z = RING.sample(20 * num_samples, generator=generator)
        chance = (BAR.log_density(z, 0.0) - BAR.log_density(torch.zeros(1, 2).double(), 0.0)).exp()
        z = z[torch.rand(len(z), dtype=torch.float64, generator=generator) < chance][:num_samples]
        found.append(product_figures(KNOWN.denoise(z, 0.0), seed) | shared)
    return found


_HMC: dict[str, Any] = {"sampler": "hmc", "step_size": 0.8}
_LANGEVIN: dict[str, Any] = {"step_size": 0.7}
SAMPLERS: dict[str, Callable[..., Figures]] = {
    "reverse": reverse_cell,
    "U-LA": partial(annealed_cell, sampler="ula", **_LANGEVIN),
    "LA, exact": partial(annealed_cell, sampler="mala", exact=True, **_LANGEVIN),
    "LA, trapezoid of 2": partial(annealed_cell, sampler="mala", rule="curve", **_LANGEVIN),
    "LA, simpson of 5": partial(annealed_cell, sampler="mala", rule="simpson", **_LANGEVIN),
    "U-HMC": partial(annealed_cell, sampler="uhmc", step_size=0.8),
    "predictor, 1 HMC": partial(annealed_cell, per_level=1, predictor=True, rule="curve-newton", **_HMC),
    "predictor, 3 HMC": partial(annealed_cell, per_level=3, predictor=True, rule="curve-newton", **_HMC),
    "3 HMC": partial(annealed_cell, per_level=3, rule="curve-newton", **_HMC),
    "HMC, exact": partial(annealed_cell, exact=True, **_HMC),
    "HMC, curve-newton": partial(annealed_cell, rule="curve-newton", **_HMC),
    "SMC, energy": partial(weighted_cell, weights="energy", steps=0),
    "SMC, energy, 2 HMC": partial(weighted_cell, weights="energy", steps=2),
    "SMC, scores": partial(weighted_cell, weights="feynman_kac", steps=0),
    "SMC, scores, 2 HMC": partial(weighted_cell, weights="feynman_kac", steps=2),
    "HMC, curve-simpson": partial(annealed_cell, rule="curve-simpson", **_HMC),
    "exact at level 0": noised_cell,
    "exact": exact_cell,
}
DIGITS = {"in modes": 3, "log density": 2, "variance error": 4, "MMD2": 4, "W2": 3, "acceptance": 3, "scores": 0}


def product(args: argparse.Namespace) -> None:
    """All samplers."""
    rows = []
    for name, run in SAMPLERS.items():
        found = groups("product", args, partial(run, args.samples, args.seeds), sampler=name)
        row = {"sampler": name}
        for key, digits in DIGITS.items():
            row[key] = common.interval([one[key] for one in found["groups"]], digits=digits)
        row["scores"] = f"{found['groups'][0]['scores']:.0f}"
        row["CPU s"] = f"{found['cpu'] / len(args.seeds):.1f}"
        rows.append({key: "" if "nan" in str(value) else value for key, value in row.items()})
    common.report("score_composition_product", rows, samples=args.samples, seeds=len(args.seeds))


def groups(part: str, args: argparse.Namespace, compute: Callable[[], Figures], **key: Any) -> dict[str, Any]:
    """Figures of every group of draws, one for each seed, from one cell."""
    return common.cell(
        f"score_composition_{part}_cells",
        args.until,
        lambda: {"groups": compute()},
        samples=args.samples,
        seeds=args.seeds,
        **key,
    )


# -- step sizes -------------------------------------------------------------------------------------------------------


def exact_sd() -> float:
    """Sd of a coordinate within 4 scales of a mode, of the density of level 0, by quadrature."""
    alpha, sigma = (float(value) for value in RING.scales(0.0, torch.zeros((), dtype=torch.float64)))
    radius = 4 * math.hypot(alpha * SD, sigma)
    axis = torch.linspace(-radius, radius, 801, dtype=torch.float64)
    offset = torch.cartesian_prod(axis, axis)
    offset = offset[offset.norm(dim=-1) < radius]
    share = KNOWN.log_density(alpha * MODES[0] + offset, 0.0).softmax(0)
    return math.sqrt(float((share * (offset**2).sum(-1)).sum()) / 2)


def steps_cell(num_samples: int, seeds: Sequence[int], step: float, sampler: str, rule: str | None) -> Figures:
    """Spread within modes of draws of level 0."""
    count, accepted = num_samples * len(seeds), 1.0
    if sampler == "uhmc":  # run_mcmc refuses to go on with chains whose scores are lost
        torch.manual_seed(seeds[0])
        move = make_move(SCORES, num_steps=5, sampler=sampler, step_size=step, width=SD)
        x = torch.randn(count, 2)
        for level, t in enumerate(SCHEDULE.levels(LEVELS - 1).tolist()):
            x, _ = move(x, t, level)
    else:
        field = KNOWN if rule == "exact" else SCORES
        options: dict[str, Any] = {"sampler": sampler, "step_size": step, "rule": rule, "denoise": False}
        x, levels = chains(field, count, 5, seeds[0], **options)
        accepted = float(levels["acceptance_rate"].mean())
    return [spread_within(part.double()) | {"acceptance": accepted} for part in x.split(num_samples)]


def spread_within(x: Tensor) -> dict[str, float]:
    """Sd of a coordinate of draws (sample, 2) within 4 scales of a mode, and shares there and lost."""
    lost = ~x.isfinite().all(-1) | (x.abs().amax(-1) > 3)
    alpha, sigma = (float(value) for value in RING.scales(0.0, torch.zeros((), dtype=torch.float64)))
    offset = x[~lost].unsqueeze(1) - alpha * MODES
    nearest = offset.norm(dim=-1).argmin(1)
    offset = offset[torch.arange(len(offset)), nearest]
    near = offset[offset.norm(dim=-1) < 4 * math.hypot(alpha * SD, sigma)]
    return {
        "sd": math.sqrt(float((near**2).sum(-1).mean()) / 2) if len(near) else math.nan,
        "lost": float(lost.double().mean()),
        "in modes": len(near) / len(x),
    }


def steps(args: argparse.Namespace) -> None:
    """Table of samplers with longer and longer steps."""
    rows, truth = [], exact_sd()
    kinds: dict[str, tuple[str, str | None]] = {"U-HMC": ("uhmc", None)}
    kinds |= {f"HMC, {rule}": ("hmc", rule) for rule in ("curve", "curve-newton", "curve-simpson", "exact")}
    for step in (0.8, 1.1, 1.4):
        for name, (sampler, rule) in kinds.items():
            compute = partial(steps_cell, args.samples, args.seeds, step, sampler, rule)
            found = groups("steps", args, compute, step=step, sampler=name)["groups"]
            figures = {key: [one[key] for one in found] for key in ("sd", "lost", "in modes", "acceptance")}
            rows.append(
                {
                    "step": step,
                    "sampler": name,
                    "sd / exact": common.interval([value / truth for value in figures["sd"]]),
                    "lost": common.interval(figures["lost"]),
                    "in modes": common.interval(figures["in modes"]),
                    "acceptance": "" if sampler == "uhmc" else f"{figures['acceptance'][0]:.3f}",
                }
            )
    common.report("score_composition_steps", rows, exact_sd=truth, samples=args.samples, seeds=len(args.seeds))


# -- line integrals ---------------------------------------------------------------------------------------------------

_RULES = [("curve", 0), ("curve-newton", 0), ("curve-simpson", 0)]
_RULES += [("trapezoid", 3), ("trapezoid", 5), ("simpson", 3), ("simpson", 5), ("gauss", 3), ("gauss", 6)]


def integral_cell(num_samples: int, seed: int, level: int) -> dict[str, float]:
    """Mean absolute errors of all rules at a step and at half of it."""
    t = level / (LEVELS - 1)
    generator = torch.Generator().manual_seed(seed)
    ring = RING.sample(30 * num_samples, t, generator=generator)
    share = BAR.log_density(ring, t).softmax(0)
    x = ring[torch.multinomial(share, num_samples, replacement=True, generator=generator)]
    alpha, sigma = (float(value) for value in RING.scales(t, torch.zeros((), dtype=torch.float64)))
    momentum = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    found = {}
    for label, step in (("", 0.8), (" at half", 0.4), (" at quarter", 0.2)):
        size = step * math.hypot(alpha * SD, sigma)
        target = partial(_score_at, t)
        points, evaluations, v = [x], [target(x)], momentum
        for _ in range(3):
            v = v + 0.5 * size * evaluations[-1].score
            points.append(points[-1] + size * v)
            evaluations.append(target(points[-1]))
            v = v + 0.5 * size * evaluations[-1].score
        truth = KNOWN.log_density(points[-1], t) - KNOWN.log_density(x, t)
        found["change" + label] = float(truth.abs().mean())
        for rule, count in _RULES:
            change, extra = log_ratio(rule, target, points, evaluations, count)
            found[f"{rule} {count}{label}"] = float((change - truth).abs().mean())
            found[f"{rule} {count} scores"] = float(extra)
    return found


def _score_at(t: float, x: Tensor) -> Any:
    return SCORES.evaluate(x, t)


def integral(args: argparse.Namespace) -> None:
    """All rules at three levels."""
    rows: list[dict[str, Any]] = []
    assert {name for name, _ in _RULES} <= set(RULES)
    cells = {
        level: [
            common.cell(
                "score_composition_integral_cells", args.until, partial(integral_cell, args.samples, seed, level),
                level=level, samples=args.samples, seed=seed,
            )
            for seed in args.seeds
        ]
        for level in (3, 10, 40)
    }  # fmt: skip
    for rule, count in _RULES:
        key = f"{rule} {count}"
        row: dict[str, Any] = {
            "rule": f"{rule} of {count}" if count else rule,
            "further scores": f"{cells[3][0][key + ' scores']:.0f}",
        }
        for level, found in cells.items():
            error, fine, finer = (
                float(np.mean([cell[key + suffix] for cell in found])) for suffix in ("", " at half", " at quarter")
            )
            row[f"level {level}"] = f"{error:.2g}"
            row[f"order at {level}"] = f"{math.log2(error / fine):.1f}, {math.log2(fine / finer):.1f}"
        rows.append(row)
    change = {level: np.mean([cell["change"] for cell in found]) for level, found in cells.items()}
    rows.append(
        {"rule": "(mean change of log density)"} | {f"level {level}": f"{v:.2g}" for level, v in change.items()}
    )
    common.report("score_composition_integral", rows, samples=args.samples, seeds=len(args.seeds))


# -- guidance ---------------------------------------------------------------------------------------------------------

OVERLAPPING = GaussianMixture(SCHEDULE, RADIUS * CIRCLE, 0.2**2)
WEIGHT, LABEL = 4.0, 2


def log_label(z: Tensor, t: float) -> Tensor:
    """Log probability (sample,) of the label given a point."""
    return OVERLAPPING.components(z, t)[0].log_softmax(-1)[:, LABEL]


GUIDED = Conditioned(OVERLAPPING, log_label, WEIGHT)
GUIDED_SCORES = Conditioned(ScoreOnly(OVERLAPPING), log_label, WEIGHT)


def exact_guided(num_samples: int, seed: int) -> Tensor:
    """Draws (sample, 2): of the label's component, accepted by ``p(y | z)^(weight - 1)``, the noise taken off."""
    generator = torch.Generator().manual_seed(seed)
    one = GaussianMixture(SCHEDULE, OVERLAPPING.means[[LABEL]], OVERLAPPING.covariances[[LABEL]])
    z = one.sample(8 * num_samples, generator=generator)
    chance = ((WEIGHT - 1) * log_label(z, 0.0)).exp()
    z = z[torch.rand(len(z), dtype=torch.float64, generator=generator) < chance][:num_samples]
    if len(z) < num_samples:
        raise RuntimeError(f"{len(z)} draws of {num_samples} were accepted")
    return GUIDED.denoise(z, 0.0)


def guidance_cell(num_samples: int, seeds: Sequence[int], name: str) -> Figures:
    """Moments and distance of one sampler."""
    count = num_samples * len(seeds)
    if name == "reverse":
        x = sample(GUIDED_SCORES, count, num_steps=LEVELS - 1, batch_size=count, progress=False)
    elif name == "exact":
        x = exact_guided(count, 0)
    else:
        options = {"sampler": "uhmc" if name == "U-HMC" else "hmc", "step_size": 0.8, "width": 0.15}
        x, _ = chains(GUIDED if name == "HMC, exact" else GUIDED_SCORES, count, 10, seeds[0], **options)
    truth = exact_guided(10**5, 99)
    return [
        {
            "radial mean": float(part[:, 1].mean() - truth[:, 1].mean()),
            "radial sd": float(part[:, 1].std() / truth[:, 1].std()),
            "tangential sd": float(part[:, 0].std() / truth[:, 0].std()),
            "log p(y given x)": float(log_label(part, 0.0).mean()),
            "log p(x)": float(OVERLAPPING.log_density(part, 0.0).mean()),
            "MMD2": mmd(part, exact_guided(num_samples, 10_000 + seed), 0.1),
        }
        for part, seed in zip(x.double().split(num_samples), seeds, strict=True)
    ]


def guidance(args: argparse.Namespace) -> None:
    """Reverse process and corrected chains under a guidance of four."""
    rows = []
    for name in ("reverse", "U-HMC", "HMC, exact", "HMC, curve-simpson", "exact"):
        found = groups("guidance", args, partial(guidance_cell, args.samples, args.seeds, name), sampler=name)["groups"]
        keys = {key: 4 if key == "MMD2" else 3 for key in found[0]}
        rows.append(
            {"sampler": name}
            | {key: common.interval([one[key] for one in found], digits=digits) for key, digits in keys.items()}
        )
    common.report("score_composition_guidance", rows, weight=WEIGHT, samples=args.samples, seeds=len(args.seeds))


# -- inverse problems -------------------------------------------------------------------------------------------------


def inverse_cell(num_samples: int, seed: int, bridge: str, sampler: str) -> dict[str, Any]:
    """A new mixture, observation and truth."""
    generator = torch.Generator().manual_seed(seed)
    size, count, schedule = 6, 3, LinearSchedule(-10.0, 5.0)
    normal = partial(torch.randn, dtype=torch.float64, generator=generator)
    factors = 0.35 * normal(count, size, size)
    covariances = factors @ factors.mT + 0.1 * torch.eye(size, dtype=torch.float64)
    prior = GaussianMixture(schedule, 0.8 * normal(count, size), covariances, torch.tensor([0.5, 0.3, 0.2]))
    matrix, sd = normal(3, size), 0.3
    truth = prior.sample(1, generator=generator)[0]
    observed = matrix @ truth + sd * normal(3)
    exact = prior.given(matrix, observed, sd)
    posterior = linear_observation(ScoreOnly(prior), matrix, observed, sd, bridge=bridge or "noised")
    mean = exact.weights @ exact.means
    centred = exact.means - mean
    covariance = torch.einsum(
        "k,kij->ij", exact.weights, exact.covariances + torch.einsum("ki,kj->kij", centred, centred)
    )
    width = float(torch.linalg.eigvalsh(exact.covariances).min().sqrt())
    if sampler == "exact":
        x = exact.sample(num_samples, generator=generator)
    elif sampler == "reverse":
        x = sample(posterior, num_samples * 5, num_steps=100, seed=seed, progress=False)
    else:
        x, _ = chains(
            posterior, num_samples, 5, seed, num_levels=40, width=width, draws=10, step_size=0.8, num_leapfrog=5,
        )  # fmt: skip
    x = x.double()
    covered, many = {}, exact.sample(10**5, generator=generator)
    for share in (0.5, 0.9):
        low, high = (torch.quantile(x, (1 + sign * share) / 2, dim=0) for sign in (-1, 1))
        covered[f"{share:.0%}"] = float(((truth > low) & (truth < high)).double().mean())
        covered[f"mass of {share:.0%}"] = float(((many > low) & (many < high)).double().mean())
    return {
        "mean": float(((x.mean(0) - mean) ** 2).mean().sqrt() / covariance.diagonal().mean().sqrt()),
        "covariance": float((x.T.cov() - covariance).norm() / covariance.norm()),
        **covered,
    }


def inverse(args: argparse.Namespace) -> None:
    """Table of both samplers with both bridges, over seeds."""
    rows = []
    seeds = range(args.problems)
    kinds = [(bridge, sampler) for sampler in ("reverse", "hmc") for bridge in ("noised", "denoised")]
    kinds.append(("", "exact"))
    for bridge, sampler in kinds:
        cells = [
            common.cell(
                "score_composition_inverse_cells",
                args.until,
                partial(inverse_cell, args.samples, seed, bridge, sampler),
                bridge=bridge, sampler=sampler, samples=args.samples, seed=seed,
            )
            for seed in seeds
        ]  # fmt: skip
        figures = {key: [cell[key] for cell in cells] for key in cells[0] if key not in ("key", "cpu")}
        row = {"sampler": sampler, "bridge": bridge}
        row |= {f"error of {key}": common.spread(figures[key], 2) for key in ("mean", "covariance")}
        row |= {
            f"{key} intervals": common.interval(figures[key]) for key in ("mass of 50%", "mass of 90%", "50%", "90%")
        }
        row["CPU s"] = f"{np.median([cell['cpu'] for cell in cells]):.1f}"
        rows.append(row)
    common.report("score_composition_inverse", rows, samples=args.samples, problems=args.problems)


# -- learned scores ---------------------------------------------------------------------------------------------------

COSINE = CosineSchedule(float(SCHEDULE.table[0]), 7.0)
RING_THERE, BAR_THERE = GaussianMixture(COSINE, RADIUS * CIRCLE, SD**2), UniformBox(COSINE, LOW, HIGH)
NETWORK: dict[str, Any] = {"hidden": 64, "blocks": 3, "frequencies": 4, "gamma": (COSINE.start, COSINE.end)}
FIT: dict[str, Any] = {"batch_size": 512, "lr": 2e-3, "schedule": "warmup_cosine", "keep": "average"}
NUM_STEPS, NUM_POINTS = 3000, 100_000
CHECKED = (0.0, 0.05, 0.1, 0.2, 0.5)  # times
LEARNED: dict[str, Callable[..., Figures]] = {
    "reverse": reverse_cell,
    "predictor, 3 HMC": partial(annealed_cell, per_level=3, predictor=True, **_HMC),
    "U-HMC": partial(annealed_cell, sampler="uhmc", step_size=0.8),
    "HMC": partial(annealed_cell, **_HMC),
}


def score_error(field: Field, exact: GaussianMixture | UniformBox, t: float) -> float:
    """Squared error of scores over the squared exact ones."""
    z = exact.sample(4000, t, generator=torch.Generator().manual_seed(1))
    wanted = exact.score(z, t)
    return float((field.score(z, t) - wanted).square().sum() / wanted.square().sum())


def learned_cell(num_samples: int, seed: int, kind: str) -> dict[str, Any]:
    """Figures of one seed: errors of two networks, and of draws by their scores."""
    generator = torch.Generator().manual_seed(1000 + seed)
    start, fields, found = time.process_time(), [], {}
    for name, exact in (("ring", RING_THERE), ("bar", BAR_THERE)):
        if kind == "exact":
            fields.append(exact)
            continue
        # Clean points: the density of level 0 holds noise that the fit adds itself.
        if name == "ring":
            chosen = torch.randint(8, (NUM_POINTS,), generator=generator)
            points = RADIUS * CIRCLE[chosen] + SD * torch.randn(NUM_POINTS, 2, generator=generator).double()
        else:
            low, high = torch.tensor(LOW), torch.tensor(HIGH)
            points = low + (high - low) * torch.rand(NUM_POINTS, 2, generator=generator)
        data = xr.DataArray(points.numpy().astype(np.float64), dims=("point", "feature"))
        problem = diffusion.make_problem(data, **NETWORK, energy=kind == "energy", seed=seed)
        result = fit_svi(problem, num_steps=NUM_STEPS, **FIT, num_samples=2, seed=seed, progress=False)
        field = make_field(result, schedule=COSINE)
        found |= {f"{name} {t:g}": score_error(field, exact, t) for t in CHECKED}
        fields.append(field)
    found["fit"] = time.process_time() - start
    for name, run in LEARNED.items():
        start = time.process_time()
        figures = run(num_samples, [seed], field=Product(fields))[0]
        found |= {f"{name}: {key}": value for key, value in figures.items()}
        found[f"{name}: CPU"] = time.process_time() - start
    return found


def learned(args: argparse.Namespace) -> None:
    """Networks of scores and of energies."""
    errors, rows = [], []
    for kind in ("score", "energy", "exact"):
        cells = [
            common.cell(
                "score_composition_learned_cells",
                args.until,
                partial(learned_cell, args.samples, seed, kind),
                samples=args.samples, seed=seed, kind=kind, num_steps=NUM_STEPS, **NETWORK,
            )
            for seed in args.seeds
        ]  # fmt: skip
        if kind != "exact":
            for name in ("ring", "bar"):
                row = {"networks": kind, "of": name}
                row |= {
                    f"t = {t:g}": common.interval([cell[f"{name} {t:g}"] for cell in cells], digits=4) for t in CHECKED
                }
                errors.append(row | {"CPU s of both": common.spread([cell["fit"] for cell in cells])})
        for sampler in LEARNED:
            row = {"networks": kind, "sampler": sampler}
            for key, digits in DIGITS.items():
                values = [cell[f"{sampler}: {key}"] for cell in cells]
                row[key] = "" if np.isnan(values).any() else common.interval(values, digits=digits)
            row["scores"] = f"{cells[0][f'{sampler}: scores']:.0f}"
            row["CPU s"] = common.spread([cell[f"{sampler}: CPU"] for cell in cells])
            rows.append(row)
    shared = {"samples": args.samples, "seeds": args.seeds, "network": NETWORK, "fit": FIT, "num_steps": NUM_STEPS}
    common.report("score_composition_learned_errors", errors, **shared)
    common.report("score_composition_learned", rows, **shared)


# -- cost of a step ---------------------------------------------------------------------------------------------------


def milliseconds(num_chains: int, size: int, steps: int = 20) -> float:
    """CPU milliseconds of a step."""
    generator = torch.Generator().manual_seed(0)
    field = ScoreOnly(UniformBox(LinearSchedule(), -torch.ones(size), torch.ones(size)))
    move = make_move(field, num_steps=steps, width=0.5)
    z = torch.randn(num_chains, size, generator=generator)
    start = time.process_time()
    move(z, 0.1, 0)
    return (time.process_time() - start) / steps * 1000


def cost(args: argparse.Namespace) -> None:
    """Time of a step by the number of chains and of dimensions."""
    sweeps = {"chains": [(count, 16) for count in (1000, 4000, 16000)], "dimensions": [(4000, d) for d in (8, 32, 128)]}
    rows = []
    for name, sizes in sweeps.items():
        times = np.array([[milliseconds(*one) for one in sizes] for _ in range(8)])[1:]  # the first round warms up
        median = np.median(times, 0)
        row: dict[str, Any] = {"by": name}
        for place, one in enumerate(sizes):
            row[f"size {place + 1}"] = f"{one[0]} chains, {one[1]}-d: {median[place]:.2f}"
        ratio = sizes[-1][name == "dimensions"] / sizes[-2][name == "dimensions"]
        row["exponent"] = f"{math.log(median[-1] / median[-2]) / math.log(ratio):.2f}"
        rows.append(row)
    common.report("score_composition_cost", rows)


PARTS = {
    "cost": cost,
    "product": product,
    "steps": steps,
    "integral": integral,
    "guidance": guidance,
    "inverse": inverse,
    "learned": learned,
}


def main() -> None:
    """Run the part that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(5)))
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--problems", type=int, default=12, help="of inverse")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after these")
    args = parser.parse_args()
    args.until = time.monotonic() + 60 * args.minutes
    PARTS[args.part](args)


if __name__ == "__main__":
    main()
