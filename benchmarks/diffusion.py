"""Diffusion: its bound beside exact likelihoods, variance of the loss by schedule, likelihoods of digits.

    python benchmarks/diffusion.py bound
    python benchmarks/diffusion.py schedule
    python benchmarks/diffusion.py digits
    python benchmarks/diffusion.py classes

``bound``: eight normal components on the unit circle (sd 0.1), whose exact denoiser takes the place of the network, so
that nothing but the number of steps stands between the bound and the exact negative log likelihood of the same 5,000
points. The chain of sites (``explicit``) by Pyro's two ELBOs, sampled times of the same number of steps, and continuous
time. Errors are standard errors over repeated noise.

``schedule``: the same mixture and denoiser in continuous time. A learned schedule alone is fitted by `fit_svi`;
variance of the loss of a point over times and noise, beside that of linear and cosine schedules of the same ends, and
the bounds, which must be equal; and the least variance that any schedule of these ends can have. Student's intervals
over seeds.

``digits``: the 8 x 8 digits of scikit-learn, 17 values, 1500 images to fit and 297 to test, bits per dimension.
Models, and CPU seconds of the fit on one thread: independent pixels; mixtures of products of categoricals by EM; an
autoencoder with Gaussian latents, by importance weights and by its bound, of about as many parameters as the U-Net;
diffusion with a network that predicts the velocity, or log odds of values. Pseudo-counts of the baselines, and width,
dropout and steps of the networks, were chosen on 300 of the 1500 images (``--validate``: fits on the other 1200, scored
on these), never on the test images. Intervals are Student's over seeds, which draw starts, batches, times and noise;
the split is fixed.

``classes``: the U-Net of digits again, shown the classes nine times of ten; shares of new images, 50 of each class,
that a support vector machine fitted to the 1500 images takes for the class asked for, with and without guidance.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
import copy
import math
import time
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from image_models import counted, make_vae, mixture_of_products, mixture_score
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from sklearn.svm import SVC
from torch import Tensor, nn

from probmodels import Problem, fit_svi
from probmodels.datasets import load
from probmodels.diffusion import Diffusion, make_problem
from probmodels.diffusion.fitted import bound
from probmodels.diffusion.outputs import generate
from probmodels.guides.diffusion import NoisingGuide, convert
from probmodels.guides.schedules import CosineSchedule, LearnedSchedule, LinearSchedule, NoiseSchedule
from probmodels.inference.diagnostics.evidence import check_weights
from probmodels.inference.programs.programs import fitted
from probmodels.inference.variational.losses import SampledBound
from probmodels.scores.closed import GaussianMixture

ENDS = (-13.3, 6.0)
SD = 0.1
ANGLES = torch.arange(8, dtype=torch.float64) * math.pi / 4
MEANS = torch.stack([ANGLES.cos(), ANGLES.sin()], -1)
NUM_POINTS = 5000
FIT: dict[str, Any] = {"num_steps": 1000, "lr": 0.05, "lr_decay": 0.05, "batch_size": 512, "keep": "average"}

NUM_VALUES = 17
NETWORKS: dict[str, dict[str, Any]] = {
    "values, unet": {"prediction": "values", "network": "unet", "hidden": 16, "dropout": 0.1, "num_steps": 1000},
    "values, mlp": {"prediction": "values", "hidden": 128, "dropout": 0.5, "num_steps": 1000},
    "velocity, unet": {"prediction": "velocity", "network": "unet", "hidden": 16, "dropout": 0.1, "num_steps": 1000},
}
VAES: dict[str, dict[str, Any]] = {
    f"vae of {size}, dropout {share:g}": {"num_latents": size, "hidden": 64, "dropout": share, "num_steps": 1500}
    for size, share in ((16, 0.1), (16, 0.3), (32, 0.2))
}
DIGITS: dict[str, Any] = {
    "num_values": NUM_VALUES,
    "schedule": "learned",
    "gamma": (-6.4, 3.4),
    "learn_ends": True,
}
DIGITS_FIT: dict[str, Any] = {"lr": 2e-3, "schedule": "warmup_cosine", "batch_size": 128, "keep": "average"}

# -- a mixture whose denoiser is known --------------------------------------------------------------------------------


class Exact(nn.Module):
    """Velocity by the posterior mean of a point of the mixture given its noised form."""

    def forward(self, z: Tensor, level: Tensor, label: Tensor | None = None) -> Tensor:
        """Velocity (row, 2) of points (row, 2) at levels (row,)."""
        gamma = (ENDS[0] + (ENDS[1] - ENDS[0]) * level).unsqueeze(-1)
        alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        variance = alpha**2 * SD**2 + sigma**2
        away = z.unsqueeze(1) - alpha.unsqueeze(-1) * MEANS.to(z)  # (row, component, 2)
        share = (-0.5 * away.square().sum(-1) / variance).softmax(-1).unsqueeze(-1)
        x0 = (share * (MEANS.to(z) + (alpha * SD**2 / variance).unsqueeze(-1) * away)).sum(1)
        return convert(x0, "x0", "velocity", z, alpha, sigma)


def points(seed: int) -> tuple[Tensor, float]:
    """Draws (row, 2) of the mixture, and their mean negative log likelihood."""
    truth = GaussianMixture(LinearSchedule(*ENDS), MEANS, SD**2)
    # Other numbers than those of the noise, whose seeds are small.
    x = truth.sample(NUM_POINTS, generator=torch.Generator().manual_seed(10_000 + seed))
    return x, -float(truth.log_density(x, 0.0).mean())


def exact_problem(schedule: NoiseSchedule, x: Tensor, **options: Any) -> Problem:
    """Diffusion with the exact denoiser."""
    model = Diffusion(schedule, Exact(), (2,), **options)
    guide = NoisingGuide(schedule, (2,), model.encode, model.num_steps if model.explicit else None)
    loss = TraceMeanField_ELBO() if model.explicit else SampledBound()
    return Problem(
        "exact", model, guide, args=(x,), batch_plates=("data",), loss=loss, transient=("noise", "noise_0", "time")
    )


def repeated(problem: Problem, loss: Any, repeats: int) -> tuple[float, float]:
    """Mean loss in nats a point and its standard error over noise."""
    with torch.no_grad():
        found = [loss.loss(problem.model, problem.guide, *problem.args) / NUM_POINTS for _ in range(repeats)]
    return float(np.mean(found)), float(np.std(found, ddof=1) / math.sqrt(repeats))


def bound_cell(num_steps: int | None, form: str, repeats: int) -> dict[str, float]:
    """Minus the bound."""
    torch.manual_seed(0)
    x, exact = points(0)
    losses = {"chain, KL": TraceMeanField_ELBO, "chain, sampled": Trace_ELBO, "times": SampledBound}
    problem = exact_problem(LinearSchedule(*ENDS), x, num_steps=num_steps, explicit=form != "times")
    mean, error = repeated(problem, losses[form](), repeats)
    return {"mean": mean, "error": error, "exact": exact}


def bounds(args: argparse.Namespace) -> None:
    """The bound against the number of steps."""
    rows = []
    for steps in (10, 50, 200, 1000, None):
        row: dict[str, Any] = {"steps": "continuous" if steps is None else steps}
        for form, repeats in (("chain, KL", 10), ("chain, sampled", 10), ("times", 200)):
            if form != "times" and (steps is None or steps > 50):
                continue
            run = partial(bound_cell, steps, form, repeats)
            cell = common.cell("diffusion", args.until, run, part="bound", steps=steps, form=form, repeats=repeats)
            row |= {form: f"{cell['mean']:.3f} ± {cell['error']:.3f}", "exact": cell["exact"]}
        rows.append(row)
        print(row, flush=True)
    common.report("diffusion_bound", rows, ends=ENDS, num_points=NUM_POINTS)


# -- schedules --------------------------------------------------------------------------------------------------------


def loss_figures(schedule: NoiseSchedule, x: Tensor, repeats: int) -> tuple[float, float]:
    """Variance of the loss of a point over times and noise, and mean in nats."""
    model = Diffusion(schedule, Exact(), (2,))
    found, bounds = [], []
    with torch.no_grad():
        for _ in range(repeats):
            time = torch.rand(len(x), dtype=x.dtype)
            steps = model.diffusion_term(x, torch.randn_like(x), time, None)
            gamma = schedule.gamma(x.new_zeros(()))
            z = torch.sigmoid(-gamma).sqrt() * x + torch.sigmoid(gamma).sqrt() * torch.randn_like(x)
            found.append(steps)
            bounds.append((model.prior_term(x) + steps - model.likelihood(z).log_prob(x)).mean())
    return float(torch.stack(found).var()), float(torch.stack(bounds).mean())


def schedule_cell(seed: int) -> dict[str, float]:
    """Figures of three schedules."""
    x, exact = points(seed)
    problem = exact_problem(LearnedSchedule(*ENDS), x.float())
    result = fit_svi(problem, **FIT, num_samples=2, seed=seed, progress=False)
    with fitted(problem, result.guide_state or {}, seed=0) as (model, _):
        learned = copy.deepcopy(model.schedule).double()
    found: dict[str, float] = {"exact": exact}
    schedules = {
        "linear": LinearSchedule(*ENDS),
        "cosine": CosineSchedule(*ENDS),
        "learned": learned,
    }
    torch.manual_seed(seed)
    for name, schedule in schedules.items():
        variance, mean = loss_figures(schedule, x, 100)
        found |= {f"variance, {name}": variance, f"bound, {name}": mean}
    return found


def floor_cell(seed: int, num_times: int = 200) -> dict[str, float]:
    """Variance under the best of all schedules of these ends.

    With loss l per unit of gamma, and density p of levels, the second moment is the integral of l^2 / p, which is least
    for p in proportion to the root of the mean of l^2.
    """
    x, _ = points(seed)
    model = Diffusion(LinearSchedule(*ENDS), Exact(), (2,))
    torch.manual_seed(seed)
    first, second = [], []
    with torch.no_grad():
        for place in range(num_times):
            time = torch.full((len(x),), (place + 0.5) / num_times, dtype=x.dtype)
            loss = model.diffusion_term(x, torch.randn_like(x), time, None)
            first.append(loss.mean())
            second.append(loss.square().mean())
    return {"variance": float(torch.stack(second).sqrt().mean() ** 2 - torch.stack(first).mean() ** 2)}


def schedules(args: argparse.Namespace) -> None:
    """Table of the variance of the loss by schedule."""
    cells = [
        common.cell("diffusion", args.until, partial(schedule_cell, seed), part="schedule", seed=seed, **FIT)
        for seed in args.seeds
    ]
    rows = [
        {
            "schedule": name,
            "seeds": len(cells),
            "variance": common.interval((c[f"variance, {name}"] for c in cells), digits=1),
            "of the linear one's": common.interval(c[f"variance, {name}"] / c["variance, linear"] for c in cells),
            "bound - linear": common.interval(c[f"bound, {name}"] - c["bound, linear"] for c in cells),
            "bound - exact": common.interval(c[f"bound, {name}"] - c["exact"] for c in cells),
        }
        for name in ("linear", "cosine", "learned")
    ]
    floors = [
        common.cell("diffusion", args.until, partial(floor_cell, seed), part="schedule floor", seed=seed)
        for seed in args.seeds
    ]
    ratio = (floor["variance"] / c["variance, linear"] for floor, c in zip(floors, cells, strict=True))
    variance = common.interval((floor["variance"] for floor in floors), digits=1)
    rows.append(
        {"schedule": "best", "seeds": len(floors), "variance": variance, "of the linear one's": common.interval(ratio)}
    )
    common.report("diffusion_schedule", rows, ends=ENDS, fit=FIT, seeds=args.seeds)


# -- digits -----------------------------------------------------------------------------------------------------------


def digits(validate: bool) -> xr.Dataset:
    """Images with a split into train and test, or the former once more."""
    images = load("images", threshold=None)
    if not validate:
        return images
    train = np.flatnonzero(images["split"].values == "train")
    split = np.full(images.sizes["data"], "other", dtype="U5")
    split[train] = "train"
    split[np.random.default_rng(0).permutation(train)[:300]] = "test"
    return images.assign(split=("data", split))


def mixture_cell(num_components: int, pseudo: float, seed: int, validate: bool) -> dict[str, float]:
    """Bits per dimension."""
    images, figures = digits(validate), {}
    start = time.process_time()
    fitted = mixture_of_products(counted(images, "train", NUM_VALUES), num_components, NUM_VALUES, pseudo, seed)
    figures["fit"] = time.process_time() - start
    for split in ("train", "test"):
        x = counted(images, split, NUM_VALUES)
        figures[split] = -mixture_score(x, *fitted) / x.shape[1] / math.log(2)
    return figures


def vae_cell(seed: int, validate: bool, *, num_steps: int, **sizes: Any) -> dict[str, float]:
    """Bits per dimension by importance weights, and by the bound."""
    images, figures = digits(validate), {}
    start = time.process_time()
    problem = make_vae(images, "train", NUM_VALUES, **sizes, seed=seed)
    fit = fit_svi(problem, num_steps=num_steps, **DIGITS_FIT, num_samples=2, seed=seed, progress=False)
    figures["fit"] = time.process_time() - start
    figures["parameters"] = sum(value.numel() for value in fit.params().values())
    for split, draws in (("train", 100), ("test", 512)):
        held = make_vae(images, split, NUM_VALUES, **sizes)
        found = check_weights(held, fit, num_draws=draws, seed=seed)
        scale = -1 / (math.prod(held.args[0].shape[1:]) * math.log(2))
        figures[split] = scale * float(found["log_evidence"].mean())
        figures[f"{split} error"] = -scale * float(np.sqrt((found["mcse"] ** 2).sum())) / len(found["mcse"])
        figures[f"{split} bound"] = scale * float(found["elbo"].mean())
        figures[f"{split} khat > 0.7"] = float((found["khat"] > 0.7).mean())
    return figures


def diffusion_cell(seed: int, validate: bool, *, num_steps: int, **options: Any) -> dict[str, float]:
    """Bits per dimension by the bound."""
    images, figures = digits(validate), {}
    start = time.process_time()
    problem = make_problem(images, **DIGITS, **options, seed=seed)
    fit = fit_svi(problem, num_steps=num_steps, **DIGITS_FIT, num_samples=2, seed=seed, progress=False)
    figures["fit"] = time.process_time() - start
    for split, draws in (("train", 10), ("test", 100)):
        found = bound(make_problem(images, **DIGITS, **options, split=split), fit, num_draws=draws, seed=seed)
        figures |= {split: found.attrs["bits_per_dim"], f"{split} error": found.attrs["bits_per_dim_error"]}
    return figures


def likelihoods(args: argparse.Namespace) -> None:
    """Bits per dimension of digits."""
    rows = []
    models: dict[str, tuple[Any, dict[str, Any]]] = {
        "independent pixels": (mixture_cell, {"num_components": 1, "pseudo": args.pseudo}),
        "mixture of 10": (mixture_cell, {"num_components": 10, "pseudo": args.pseudo}),
        "mixture of 20": (mixture_cell, {"num_components": 20, "pseudo": args.pseudo}),
    }
    models |= {name: (vae_cell, VAES[name]) for name in args.networks if name in VAES}
    models |= {f"diffusion, {name}": (diffusion_cell, NETWORKS[name]) for name in args.networks if name in NETWORKS}
    for name, (compute, options) in models.items():
        cells = []
        for seed in args.seeds:
            key = {"part": "digits", "model": name, "seed": seed, "validate": args.validate, **options}
            run = partial(compute, seed=seed, validate=args.validate, **options)
            try:
                cells.append(common.cell("diffusion", args.until, run, **key))
            except common.OutOfTime:
                break
        if not cells:
            print(f"{name}: out of time", flush=True)
            continue
        rows.append(
            {
                "model": name,
                "seeds": len(cells),
                "test": common.interval(cell["test"] for cell in cells),
                "train": common.interval(cell["train"] for cell in cells),
                "bound": common.interval(cell.get("test bound", cell["test"]) for cell in cells),
                "error of a bound": max(cell.get("test error", 0.0) for cell in cells),
                "CPU s": common.spread([cell["fit"] for cell in cells]),
            }
        )
        print(rows[-1], flush=True)
    name = "diffusion_digits_validation" if args.validate else "diffusion_digits"
    common.report(name, rows, options=DIGITS, fit=DIGITS_FIT, networks=NETWORKS, seeds=args.seeds)


GUIDANCE = (1.0, 2.0, 4.0)
NUM_DRAWN = 50  # of each class


def classes_cell(seed: int) -> dict[str, float]:
    """Share of new images classified as the class asked for, by weight of guidance, and of test images."""
    images = digits(False)
    flat, train = images["image"].values.reshape(images.sizes["data"], -1), images["split"].values == "train"
    label = images["label"].values
    judge = SVC(C=10, gamma=0.3).fit(flat[train], label[train])
    options = {name: value for name, value in NETWORKS["values, unet"].items() if name != "num_steps"}
    problem = make_problem(images, **DIGITS, **options, conditional=True, seed=seed)
    steps = NETWORKS["values, unet"]["num_steps"]
    fit = fit_svi(problem, num_steps=steps, **DIGITS_FIT, num_samples=2, seed=seed, progress=False)
    found = {"test images": float(judge.score(flat[~train], label[~train]))}
    for weight in GUIDANCE:
        right = [
            judge.predict(
                generate(fit, NUM_DRAWN, label=name, guidance=weight, seed=seed, progress=False).values.reshape(
                    NUM_DRAWN, -1
                )
            )
            == name
            for name in np.unique(label)
        ]
        found[f"weight {weight:g}"] = float(np.mean(right))
    return found


def classes(args: argparse.Namespace) -> None:
    """Classes of new images."""
    cells = []
    for seed in args.seeds:
        try:
            cells.append(common.cell("diffusion", args.until, partial(classes_cell, seed), part="classes", seed=seed))
        except common.OutOfTime:
            break
        print(cells[-1], flush=True)
    names = ["test images", *(f"weight {weight:g}" for weight in GUIDANCE)]
    rows = [{"images": name, "right, %": common.interval(100 * cell[name] for cell in cells)} for name in names]
    common.report("diffusion_classes", rows, seeds=len(cells), drawn=NUM_DRAWN)


def main() -> None:
    """Run the part that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("bound", "schedule", "digits", "classes"))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(5)))
    parser.add_argument("--networks", nargs="*", choices=[*NETWORKS, *VAES], default=[*NETWORKS, next(iter(VAES))])
    parser.add_argument("--pseudo", type=float, default=0.3, help="counts added to every value of every pixel")
    parser.add_argument("--validate", action="store_true", help="score 300 of the images to fit, not the test images")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after these")
    args = parser.parse_args()
    args.until = time.monotonic() + 60 * args.minutes
    {"bound": bounds, "schedule": schedules, "digits": likelihoods, "classes": classes}[args.part](args)


if __name__ == "__main__":
    main()
