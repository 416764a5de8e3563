"""Structures between modalities against matching alone: retrieval, zero-shot classes, private parts, clusters, gaps.

    python benchmarks/modality_structure.py digits --root DATA
    python benchmarks/modality_structure.py emoji --root DATA

``digits``: images of MNIST with spoken digits of the same class; the official test takes of the free spoken digit
dataset are held out, 900 pairs. Every image matches all sounds of its digit: ``same class @k`` is the share of the k
nearest that are of its class. ``emoji``: 731 held-out emoji and their names; ``recall @k`` is the share that find their
own partner among the k nearest. Both are means of the two directions, among all pairs held out. See `modality_data`.

``contrast`` is matching alone, two cross-modal InfoNCE terms. ``augmented`` adds the two in-modal ones, a control: it
sees the same augmented views as ``separation``, ``bridge`` and ``geometric``. ``consistency`` is that of CyCLIP,
``geometric`` adds that of augmented views. ``gap closed`` is ``contrast`` with each modality centred by its mean of the
rows to learn from and brought back to length 1: nothing is fitted.

Zero-shot classes are those of the nearest prototype, the mean of the embedded sounds or names of a class in the rows to
learn from: no label of an image is used. ``information`` is the bound log N - loss, N the pairs held out. Clusters are
by k-means of both modalities, as many as there are classes. Probes are logistic regressions on 64 numbers, fitted to
the rows to learn from: ``speaker, private`` reads the private part of the sound. For runs without one it is an
untrained head on their trunk, of the same size; its difference to that of ``contrast`` is the test of the private part.

Temperature, and the strength of each structure, were chosen on a development seed and rows for validation, which are
among those to learn from; then they were fixed, and fits of other seeds, on all rows to learn from, met the test. By
the criterion of ``digits``, zero-shot classes, except for ``separation``: its private speakers, if no more than .01 of
the zero-shot classes of ``contrast`` is lost. By that of ``emoji``, recall @10 and zero-shot classes together.
Differences are paired by seed, which draws starting values and batches; rows held out are the same for all. Intervals
are Student's of the mean over seeds.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from modality_data import Views, digits, emoji
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, v_measure_score
from sklearn.preprocessing import StandardScaler
from torch import nn

from probmodels import fit_svi
from probmodels.inference.programs.programs import fitted
from probmodels.modality_structure import information_bound, make_problem, modality_gap, recall_at
from probmodels.modality_structure.views import tensors

DEVELOPMENT = 100  # seed
SIZE, HIDDEN = 64, 128
FIT: dict[str, Any] = {"lr": 2e-3, "lr_decay": 0.1, "batch_size": 128, "num_samples": 2, "progress": False}
STEPS = {"digits": 350, "emoji": 350}
TEMPERATURES = (0.2, 0.1)
STRENGTHS = (0.1, 0.3)
STRUCTURES: dict[str, dict[str, float]] = {
    "contrast": {},
    "separation": {"orthogonality": 3.0, "contrast": 2.0, "uniformity": 0.3},
    "bridge": {"bridge": 1.0},
    "consistency": {"consistency": 0.2},
    "geometric": {"consistency": 0.2, "augmented_consistency": 0.2},
    "augmented": {},
}

Array = NDArray[np.floating[Any]]


class Found(NamedTuple):
    """Embeddings of both modalities, and private parts of the second, by split."""

    image: dict[str, Array]
    other: dict[str, Array]
    private: dict[str, Array]
    temperature: float


def fit(views: Views, steps: int, seed: int, temperature: float, strength: float, structure: str) -> Found:
    """Embeddings by fitted towers."""
    weights = {name: strength * weight for name, weight in STRUCTURES[structure].items()}
    settings: dict[str, Any] = {"size": SIZE, "hidden": HIDDEN, "temperature": temperature, "seed": seed}
    problem = make_problem(views.data, **settings, **weights, in_modal=structure == "augmented")
    result = fit_svi(problem, num_steps=steps, seed=seed, **FIT)
    image: dict[str, Array] = {}
    other: dict[str, Array] = {}
    private: dict[str, Array] = {}
    torch.manual_seed(seed)
    untrained = nn.Linear(HIDDEN, SIZE)
    model: Any
    with fitted(problem, result.guide_state or {}, seed=0) as (model, _), torch.no_grad():
        first, second = model.towers.values()
        for split in ("train", "test"):
            x, y = tensors(views.data, split)[1]
            image[split] = first(x)[0].double().numpy()
            state = F.silu(second.trunk(y))
            other[split] = F.normalize(second.shared(state), dim=-1).double().numpy()
            head = second.own or untrained
            private[split] = F.normalize(head(state), dim=-1).double().numpy()
    return Found(image, other, private, temperature)


def closed(found: Found) -> Found:
    """The same with both modalities centred by their training means."""

    def moved(z: dict[str, Array]) -> dict[str, Array]:
        shifted = {split: one - z["train"].mean(0) for split, one in z.items()}
        return {split: one / np.linalg.norm(one, axis=1, keepdims=True) for split, one in shifted.items()}

    return found._replace(image=moved(found.image), other=moved(found.other))


def probe(z: dict[str, Array], labels: dict[str, NDArray[Any]]) -> float:
    """Accuracy of a linear probe."""
    scale = StandardScaler().fit(z["train"])
    fit = LogisticRegression(C=0.1, max_iter=300).fit(scale.transform(z["train"]), labels["train"])
    return float(fit.score(scale.transform(z["test"]), labels["test"]))


def same_class(similarity: Array, label: NDArray[Any], k: int) -> float:
    """Share of the k nearest candidates that are of a row's class."""
    nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    return float((label[nearest] == label[:, None]).mean())


def figures(found: Found, views: Views, paired: bool) -> dict[str, float]:
    """What embeddings are worth; ``paired``: whether a row has one right partner."""
    split = views.data["split"].values
    shared = {part: views.shared[split == part] for part in ("train", "test")}
    z, other, label = found.image["test"], found.other["test"], shared["test"]
    similarity = z @ other.T
    row: dict[str, float] = {}
    for k in (1, 10):
        directions = (similarity, similarity.T)
        if paired:
            row[f"recall @{k}"] = float(np.mean([recall_at(one, k) for one in directions]))
        else:
            row[f"same class @{k}"] = float(np.mean([same_class(one, label, k) for one in directions]))
    classes = np.unique(shared["train"])
    prototypes = np.stack([found.other["train"][shared["train"] == one].mean(0) for one in classes])
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    row["zero-shot"] = float((classes[(z @ prototypes.T).argmax(1)] == label).mean())
    row["probe, image"] = probe(found.image, shared)
    if views.private is not None:
        private = {part: views.private[split == part] for part in ("train", "test")}
        row["speaker, shared"] = probe(found.other, private)
        row["speaker, private"] = probe(found.private, private)
        row["digit, private"] = probe(found.private, shared)
    both, known = np.concatenate([z, other]), np.concatenate([label, label])
    clusters = KMeans(len(np.unique(label)), n_init=4, random_state=0).fit_predict(both)
    row["V-measure"], row["ARI"] = v_measure_score(known, clusters), adjusted_rand_score(known, clusters)
    row["gap, centroids"], row["gap, distributions"] = modality_gap(z, other)
    row["information"] = information_bound(similarity / found.temperature)
    return {name: float(value) for name, value in row.items()}


def measured(
    what: str, root: Path, part: str, seed: int, temperature: float, strength: float, structure: str
) -> dict[str, Any]:
    """Figures of one fit, and of the same with the gap closed where it is of matching alone."""
    views = LOADERS[what](root, part)
    found = fit(views, STEPS[what], seed, temperature, strength, structure)
    rows = {"figures": figures(found, views, what == "emoji")}
    if structure == "contrast":
        rows["closed"] = figures(closed(found), views, what == "emoji")
    return rows


LOADERS: dict[str, Callable[[Path, str], Views]] = {"digits": digits, "emoji": emoji}


def value_of(what: str, structure: str, row: dict[str, float], base: dict[str, float]) -> float:
    """What is largest for the strength that is chosen."""
    if what == "emoji":
        return row["recall @10"] + row["zero-shot"]
    if structure == "separation":
        return row["speaker, private"] if row["zero-shot"] >= base["zero-shot"] - 0.01 else row["zero-shot"] - 1
    return row["zero-shot"]


def choose(
    what: str, one: Callable[..., dict[str, Any]], names: Sequence[str]
) -> tuple[float, dict[str, float], list[str]]:
    """Temperature, strength of each structure, and the structures in their order, by the rows for validation."""

    def tried(temperature: float, strength: float, structure: str) -> dict[str, float]:
        found: dict[str, float] = one("validation", DEVELOPMENT, temperature, strength, structure)["figures"]
        return found

    bases = {t: tried(t, 1.0, "contrast") for t in TEMPERATURES}
    temperature = max(bases, key=lambda t: value_of(what, "contrast", bases[t], bases[t]))
    base, chosen = bases[temperature], {"contrast": 1.0, "augmented": 1.0}
    structures = [name for name in STRUCTURES if name in (*names, "contrast")]
    for structure in structures:
        if structure not in chosen:
            found = {s: value_of(what, structure, tried(temperature, s, structure), base) for s in STRENGTHS}
            chosen[structure] = max(found, key=lambda s: found[s])
    return temperature, chosen, structures


def main() -> None:
    """One data set: choose, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(LOADERS))
    parser.add_argument("--root", type=Path, required=True, help="folder of the data")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(5)))
    parser.add_argument("--structures", nargs="*", choices=list(STRUCTURES), default=list(STRUCTURES))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no fit after these")
    args = parser.parse_args()
    if DEVELOPMENT in args.seeds:
        parser.error(f"seed {DEVELOPMENT} is the one that settings are chosen by")
    until, what = time.monotonic() + 60 * args.minutes, args.what

    def one(part: str, seed: int, temperature: float, strength: float, structure: str) -> dict[str, Any]:
        key: dict[str, Any] = {"what": what, "part": part, "seed": seed, "structure": structure}
        key |= {"temperature": temperature, "strength": strength, "weights": STRUCTURES[structure], "fit": FIT}
        run = partial(measured, what, args.root, part, seed, temperature, strength, structure)
        cell = common.cell("modality_structure", until, run, **key, steps=STEPS[what])
        shown = {name: round(value, 3) for name, value in cell["figures"].items()}
        print(part, structure, seed, temperature, strength, shown, f"{cell['cpu']:.0f} s", flush=True)
        return cell

    try:
        temperature, chosen, structures = choose(what, one, args.structures)
    except common.OutOfTime:
        print("out of time before the settings were chosen", flush=True)
        return
    print(f"chosen: temperature {temperature}, {chosen}", flush=True)

    cells: dict[str, list[dict[str, float]]] = {name: [] for name in (*structures, "gap closed")}
    try:
        for seed in args.seeds:
            for structure in structures:
                cell = one("test", seed, temperature, chosen[structure], structure)
                cells[structure].append(cell["figures"])
                if structure == "contrast":
                    cells["gap closed"].append(cell["closed"])
    except common.OutOfTime:
        print("out of time", flush=True)
    if not cells["contrast"]:
        return
    settings = {"temperature": temperature, "strengths": chosen, "seeds": args.seeds}
    for name, minus in (("", False), ("_differences", True)):
        rows = []
        for structure, figures_of in cells.items():
            if not figures_of or (minus and structure == "contrast"):
                continue
            pairs = list(zip(figures_of, cells["contrast"], strict=False))
            row: dict[str, Any] = {"structure": structure, "seeds": len(figures_of)}
            for figure in figures_of[0]:
                row[figure] = common.interval(f[figure] - minus * g[figure] for f, g in pairs)
            rows.append(row)
        common.report(f"modality_structure_{what}{name}", rows, **settings)


if __name__ == "__main__":
    main()
