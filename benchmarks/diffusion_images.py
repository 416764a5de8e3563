"""Diffusion of images: Fashion-MNIST, and guidance by a classifier.

    python benchmarks/diffusion_images.py fashion --root DIR
    python benchmarks/diffusion_images.py fashion_classes --root DIR
    python benchmarks/diffusion_images.py classifier

``fashion``: Fashion-MNIST (IDX files in DIR), 28 x 28 with 256 values; bits per dimension of 300 test images. The U-Net
of log odds of values in continuous time, shown the classes, is fitted to few images for a few minutes, a small part of
what published models take; independent pixels and a mixture of products of categoricals are fitted to 9,000 images,
their pseudo-counts chosen on 1,000 others.

``fashion_classes``: a U-Net of the velocity, of intensities as densities between fewer levels of noise, where classes
show; shares of new images, 10 of each class, that a support vector machine takes for the class asked for.

``classifier``: the U-Net of the digits of `diffusion.py`, fitted without labels, and a classifier of noised digits, as
`probmodels.diffusion.classifier` has it; shares of new images, 10 of each class, taken for the class asked for by a
support vector machine: by the reverse process, and by a step of it and two of corrected HMC on each of 50 levels.
Intervals are Student's over seeds.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
import itertools
import math
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusion import DIGITS, DIGITS_FIT, GUIDANCE, NETWORKS, digits
from image_models import counted, mixture_of_products, mixture_score
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC

from probmodels import fit_svi
from probmodels.datasets import load
from probmodels.diffusion import make_problem
from probmodels.diffusion.classifier import class_likelihood, make_problem as make_classifier
from probmodels.diffusion.fitted import bound, make_field
from probmodels.diffusion.outputs import generate
from probmodels.inference.runtime.ops import isolated
from probmodels.score_composition import make_move
from probmodels.scores.fields import Conditioned
from probmodels.scores.samplers import reverse_step, sample

FASHION: dict[str, Any] = {"num_values": 256, "prediction": "values", "network": "unet", "hidden": 16}
FASHION |= {"gamma": (-12.5, 4.0), "conditional": True}
FIELD: dict[str, Any] = {"prediction": "velocity", "network": "unet", "hidden": 16, "gamma": (-5.0, 5.0)}
FIELD |= {"conditional": True}
FASHION_FIT: dict[str, Any] = {"lr": 3e-3, "schedule": "warmup_cosine", "batch_size": 32}
FASHION_FIT |= {"keep": "average", "num_samples": 1}
FASHION_STEPS = 30
CLASSIFIER: dict[str, Any] = {"hidden": 128, "dropout": 0.3}
CLASSIFIER_FIT: dict[str, Any] = {"num_steps": 1500, "lr": 2e-3, "schedule": "warmup_cosine", "batch_size": 256}
CLASSIFIER_FIT |= {"keep": "average", "num_samples": 2}
NUM_DRAWN = 10  # of each class
LEVELS, MOVES = 50, 2


def mixture_cell(root: str, num_components: int) -> dict[str, float]:
    """Bits per dimension of the test images, with the pseudo-counts that are best on others."""
    images = load("images", dataset="idx", root=root, threshold=None, num_train=10_000, num_test=300)
    x, test = counted(images, "train", 256), counted(images, "test", 256)
    scale = -1 / (test.shape[1] * math.log(2))
    start, found = time.process_time(), []
    for pseudo in (0.1, 0.3, 1.0):
        fitted = mixture_of_products(x[:9000], num_components, 256, pseudo, 0, num_rounds=10)
        found.append((scale * mixture_score(x[9000:], *fitted), pseudo, scale * mixture_score(test, *fitted)))
    _, pseudo, bits = min(found)
    return {"test": bits, "pseudo": pseudo, "fit": time.process_time() - start}


def fashion_cell(root: str, seed: int, steps: int, num_train: int) -> dict[str, float]:
    """Bits per dimension by the bound, and shares of new images of the right class."""
    source = {"dataset": "idx", "root": root, "threshold": None}
    images = load("images", **source, num_train=num_train, num_test=300)
    figures, start = {}, time.process_time()
    problem = make_problem(images, **FASHION, seed=seed)
    fit = fit_svi(problem, num_steps=steps, **FASHION_FIT, seed=seed, progress=False)
    figures["fit"] = time.process_time() - start
    print(figures, flush=True)
    terms = bound(make_problem(images, **FASHION, split="test"), fit, num_draws=10, seed=seed)
    figures |= {"test": terms.attrs["bits_per_dim"], "test error": terms.attrs["bits_per_dim_error"]}
    # Over images, of which the 300 are a sample.
    spread = float(terms["elbo"].std()) / math.sqrt(terms.sizes["data"])
    figures["sampling error"] = spread / (28 * 28 * math.log(2))
    for name in ("reconstruction", "steps", "prior"):
        figures[name] = -float(terms[name].mean()) / (28 * 28 * math.log(2))
    return figures


def fashion_classes_cell(root: str, seed: int, steps: int, num_train: int) -> dict[str, float]:
    """Shares of new images of the right class."""
    many = load("images", dataset="idx", root=root, threshold=None, num_train=6000, num_test=1000)
    flat, train = many["image"].values.reshape(many.sizes["data"], -1), many["split"].values == "train"
    label = many["label"].values
    judge = make_pipeline(PCA(60, random_state=0), SVC(C=10)).fit(flat[train], label[train])
    figures, start = {"test images": float(judge.score(flat[~train], label[~train]))}, time.process_time()
    problem = make_problem(many.isel(data=slice(num_train)), **FIELD, seed=seed)
    fit = fit_svi(problem, num_steps=steps, **FASHION_FIT, seed=seed, progress=False)
    figures["fit"] = time.process_time() - start
    for weight in GUIDANCE:
        right = []
        for name in np.unique(label):
            options = {"label": name, "guidance": weight, "num_steps": FASHION_STEPS, "seed": seed, "progress": False}
            drawn = generate(fit, NUM_DRAWN, **options)
            # Without values to round to, intensities are those of the scale of the noise.
            right.append(judge.predict((drawn.values.reshape(NUM_DRAWN, -1).clip(-1, 1) + 1) / 2) == name)
        figures[f"weight {weight:g}"] = float(np.mean(right))
        print(figures, flush=True)
    return figures


def fashion(args: argparse.Namespace) -> None:
    """Fashion-MNIST."""
    rows: list[dict[str, Any]] = []
    for count in (1, 10):
        run = partial(mixture_cell, args.root, count)
        cell = common.cell("diffusion", args.until, run, part="fashion", model=f"mixture of {count}")
        rows.append({"model": f"mixture of {count}", "test": cell["test"], "CPU s": cell["fit"]})
    for seed in args.seeds:
        chosen = {"seed": seed, "steps": args.steps, "num_train": args.num_train}
        run = partial(fashion_cell, args.root, **chosen)
        try:
            cell = common.cell("diffusion", args.until, run, part="fashion", **chosen, **FASHION, **FASHION_FIT)
        except common.OutOfTime:
            break
        names = ("test error", "sampling error")
        row = {"model": f"diffusion, seed {seed}", "test": cell["test"], "CPU s": cell["fit"]}
        rows.append(row | {name: cell[name] for name in names})
    common.report("diffusion_fashion", rows[::-1], options=FASHION, fit=FASHION_FIT, steps=args.steps, drawn=NUM_DRAWN)


def fashion_classes(args: argparse.Namespace) -> None:
    """Classes of new images of Fashion-MNIST."""
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        chosen = {"seed": seed, "steps": args.steps, "num_train": args.num_train}
        run = partial(fashion_classes_cell, args.root, **chosen)
        try:
            cell = common.cell("diffusion", args.until, run, part="fashion classes", **chosen, **FIELD, **FASHION_FIT)
        except common.OutOfTime:
            break
        names = ("test images", *(f"weight {weight:g}" for weight in GUIDANCE))
        rows.append({"seed": seed, "CPU s": cell["fit"], **{name: cell[name] for name in names}})
    common.report("diffusion_fashion_classes", rows, options=FIELD, fit=FASHION_FIT, steps=args.steps, drawn=NUM_DRAWN)


def classifier_cell(seed: int) -> dict[str, float]:
    """Shares of new images of the right class, by sampler and weight of the classifier."""
    images = digits(False)
    flat, train = images["image"].values.reshape(images.sizes["data"], -1), images["split"].values == "train"
    label = images["label"].values
    judge = SVC(C=10, gamma=0.3).fit(flat[train], label[train])
    options = {name: value for name, value in NETWORKS["values, unet"].items() if name != "num_steps"}
    problem = make_problem(images, **DIGITS, **options, seed=seed)
    steps = NETWORKS["values, unet"]["num_steps"]
    fit = fit_svi(problem, num_steps=steps, **DIGITS_FIT, num_samples=2, seed=seed, progress=False)
    field, start = make_field(fit), time.process_time()
    noisy = make_classifier(images, field, **CLASSIFIER, seed=seed)
    fitted = fit_svi(noisy, **CLASSIFIER_FIT, seed=seed, progress=False)
    figures = {"test images": float(judge.score(flat[~train], label[~train])), "fit": time.process_time() - start}
    wanted = np.repeat(np.unique(label), NUM_DRAWN)
    likelihood = class_likelihood(noisy, fitted, wanted.tolist())

    def right(drawn: torch.Tensor) -> float:
        shades = field.model.decode(drawn).flatten(1).double().numpy() / (DIGITS["num_values"] - 1)
        return float((judge.predict(shades) == wanted).mean())

    for weight in GUIDANCE:
        guided = Conditioned(field, likelihood, weight)
        start = time.process_time()
        figures[f"reverse, weight {weight:g}"] = right(sample(guided, len(wanted), seed=seed, progress=False))
        between = time.process_time()
        figures[f"hmc, weight {weight:g}"] = right(corrected(guided, len(wanted), seed))
        figures |= {"reverse, seconds": between - start, "hmc, seconds": time.process_time() - between}
        print(figures, flush=True)
    return figures


def corrected(field: Conditioned, count: int, seed: int) -> torch.Tensor:
    """Draws (sample, *shape) by a reverse step and a few of corrected HMC on each level."""
    times = field.schedule.levels(LEVELS).tolist()
    move = make_move(field, num_steps=MOVES, sampler="hmc", width=0.1)
    with isolated(seed), torch.no_grad():
        z = torch.randn(count, *field.shape)
        for level, (t, s) in enumerate(itertools.pairwise(times), 1):
            z, _ = move(reverse_step(field, z, t, s), s, level)
        # The noise of level 0 is that of the images; what it hides is not the classifier's to say.
        return field.field.denoise(z, times[-1])


def classifier(args: argparse.Namespace) -> None:
    """Guidance by a classifier."""
    cells = []
    for seed in args.seeds:
        try:
            cells.append(
                common.cell("diffusion", args.until, partial(classifier_cell, seed), part="classifier", seed=seed)
            )
        except common.OutOfTime:
            break
        print(cells[-1], flush=True)
    names = [f"{kind}, weight {weight:g}" for kind in ("reverse", "hmc") for weight in GUIDANCE]
    rows = [
        {"images": name, "right, %": common.interval(100 * cell[name] for cell in cells)}
        for name in ["test images", *names]
    ]
    seconds = {name: common.spread([cell[f"{name}, seconds"] for cell in cells]) for name in ("reverse", "hmc")}
    common.report("diffusion_classifier", rows, seeds=len(cells), drawn=NUM_DRAWN, seconds=seconds)


def main() -> None:
    """Run the part that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("fashion", "fashion_classes", "classifier"))
    parser.add_argument("--root", help="folder of the IDX files")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600, help="of the fit to Fashion-MNIST")
    parser.add_argument("--num-train", type=int, default=2000, help="images of it")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after these")
    args = parser.parse_args()
    args.until = time.monotonic() + 60 * args.minutes
    if args.part != "classifier" and not args.root:
        parser.error("Fashion-MNIST needs --root, the folder of its IDX files")
    {"fashion": fashion, "fashion_classes": fashion_classes, "classifier": classifier}[args.part](args)


if __name__ == "__main__":
    main()
