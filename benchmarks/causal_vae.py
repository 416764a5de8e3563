"""Causal autoencoders of two simulated scenes, beside autoencoders without a graph, against true counterfactuals.

    python benchmarks/causal_vae.py scenes
    python benchmarks/causal_vae.py labels

``scenes``
    The pendulum and the flow of Yang et al. (2021), drawn anew at 20 x 20 pixels, three quarters of the images to fit.
    Of held-out images: R2 and MIC of each concept, abducted mean against the truth, the worst and the mean of four; TIC
    likewise, the mean; rows without supervision have latents matched to concepts first. Counterfactuals: each cause set
    to the values of other images, one after the other; root mean squared errors of the concepts against the simulator's
    true counterfactuals, in half ranges of a concept, the worst effect; of the images, over the error that the decoder
    makes of the true counterfactual's own concepts (its floor). ``copied`` leaves all as it is.
    ``refined`` counterfactuals follow from noise that was abducted of each image by itself, see
    `probmodels.causal_vae.interventions.refine`. ``additive``, ``post_nonlinear``, ``linear`` and ``masked`` are
    mechanisms on the true graph; ``conditional VAE`` has labels and no graph, ``VAE`` and ``beta-VAE`` (beta 4)
    neither.
``labels``
    The pendulum with the labels of a tenth of the training images.

A cell is one fit; see `common.cell`. Intervals are Student's over seeds, which draw starts, batches, noise, the split
and the labels that are kept.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
import time
import warnings
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from probmodels import Problem, Result, fit_svi
from probmodels.causal_vae import make_problem
from probmodels.causal_vae.interventions import OutsideSupportWarning, counterfactual, refine
from probmodels.datasets import load, scenes
from probmodels.datasets.causal import hide_labels
from probmodels.inference.metrics.dependence import mic, tic
from probmodels.inference.metrics.latents import match_latents
from probmodels.inference.programs.programs import fitted

SIZE = 20
FIT: dict[str, Any] = {"num_steps": 1500, "batch_size": 100, "lr": 2e-3, "schedule": "warmup_cosine"}
ROWS: dict[str, dict[str, Any]] = {
    "additive": {},
    "additive, refined": {"refined": True},
    "additive, 4000 steps": {"num_steps": 4000},
    "post_nonlinear": {"mechanism": "post_nonlinear"},
    "linear": {"mechanism": "linear"},
    "masked": {"mechanism": "masked"},
    "conditional VAE": {"graph": None},
    "VAE": {"graph": None, "label_weight": 0.0},
    "beta-VAE": {"graph": None, "label_weight": 0.0, "beta": 4.0},
}
Array = NDArray[np.float64]


def scene_cell(scene: str, options: dict[str, Any], seed: int, known: float = 1.0) -> dict[str, float]:
    """Figures of one fit."""
    data = load(scene, size=SIZE, seed=seed)
    shown = hide_labels(data, 1 - known, seed=seed) if known < 1 else data
    refined = options.get("refined", False)
    fit = FIT | {key: value for key, value in options.items() if key in FIT}
    options = {key: value for key, value in options.items() if key not in (*FIT, "refined")}
    start = time.process_time()
    supervised = options.get("label_weight", 1.0) > 0
    problem = make_problem(shown, **options, semi_supervised=supervised and known < 1, seed=seed)
    result = fit_svi(problem, **fit, num_samples=2, seed=seed, progress=False)
    found = {"fit": time.process_time() - start}
    test = make_problem(shown, **options, split="test")
    held_out = data.isel(data=np.flatnonzero(data["split"] == "test"))
    latents = abducted(test, result, held_out)
    for name, latent, label in zip(held_out["concept"].values, latents.T, held_out["label"].values.T, strict=True):
        found |= {
            f"R2 {name}": 1 - float(((latent - label) ** 2).mean() / label.var()),
            f"MIC {name}": mic(latent[:1000], label[:1000]),
            f"TIC {name}": tic(latent[:1000], label[:1000]),
        }
    if supervised:
        start = time.process_time()
        pair = refine(test, result, seed=seed, progress=False) if refined else (test, result)
        found |= {"refine": time.process_time() - start} if refined else {}
        found |= counterfactual_errors(scene, *pair, held_out, seed)
    return found


def abducted(problem: Problem, result: Result, data: xr.Dataset) -> Array:
    """Concepts (data, concept) in the units of the labels; of no supervision, matched by a straight line."""
    with fitted(problem, result.guide_state or {}, seed=0) as (_, guide), torch.no_grad():
        mean = guide.propose(problem.args[0])[0].double().numpy()
    assert problem.data is not None
    labels = data["label"].values
    latents = mean[:, : labels.shape[1]]
    if "label" in problem.data:
        return latents * problem.data["scale"].values + problem.data["centre"].values
    order = match_latents(latents, labels)["position"].values
    latents = latents[:, order]
    lines = [np.polyfit(latent, label, 1) for latent, label in zip(latents.T, labels.T, strict=True)]
    return np.stack([np.polyval(line, latent) for line, latent in zip(lines, latents.T, strict=True)], -1)


def counterfactual_errors(
    scene: str, problem: Problem, result: Result, data: xr.Dataset, seed: int
) -> dict[str, float]:  # fmt: skip
    """Errors of concepts and images when each cause takes the values of other images."""
    names = [str(name) for name in data["concept"].values]
    labels, graph = data["label"].values, data["graph"].values
    jitter = data["jitter"].values if "jitter" in data else None
    half = np.ptp(labels, axis=0) / 2
    rng, found = np.random.default_rng(seed), {}
    for cause, name in enumerate(names):
        if graph[:, cause].any():
            continue
        value = rng.permutation(labels[:, cause])
        truth, images = scenes.counterfactual(scene, labels, {name: value}, size=SIZE, jitter=jitter)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OutsideSupportWarning)
            ours = counterfactual(problem, result, {name: value}, num_draws=5, seed=seed, progress=False)
        with fitted(problem, result.guide_state or {}, seed=0) as (model, _), torch.no_grad():
            assert problem.data is not None
            z = (truth - problem.data["centre"].values) / problem.data["scale"].values
            if model.num_style:
                z = np.concatenate([z, np.zeros((len(z), model.num_style))], -1)
            floor = model.decode(torch.as_tensor(z, dtype=torch.float32)).numpy()
        effects = np.flatnonzero(np.abs(truth - labels).max(0) > 1e-9)
        means = ours["counterfactual"].mean("draw").values
        for effect in effects:
            if effect == cause:
                continue
            where = f"{name} -> {names[effect]}"
            found[f"do {where}"] = float(np.sqrt(((means - truth)[:, effect] ** 2).mean()) / half[effect])
            found[f"copied {where}"] = float(np.sqrt(((labels - truth)[:, effect] ** 2).mean()) / half[effect])
        error = float(np.sqrt(((ours["observation"].values - images) ** 2).mean()))
        found[f"floor {name}"] = error / float(np.sqrt(((floor - images) ** 2).mean()))
        found[f"image rmse {name}"] = error
        found[f"image copied {name}"] = float(np.sqrt(((data["image"].values - images) ** 2).mean()))
    return found


def summary(cell: dict[str, Any]) -> dict[str, float]:
    """Columns of the table."""

    def of(start: str) -> list[float]:
        return [value for key, value in cell.items() if key.startswith(start)]

    found = {
        "R2, worst": min(of("R2 ")),
        "MIC, worst": min(of("MIC ")),
        "MIC": float(np.mean(of("MIC "))),
        "TIC": float(np.mean(of("TIC "))),
    }
    if of("do "):
        found |= {"effects, worst": max(of("do ")), "copied": max(of("copied "))}
        found |= {"image over floor, worst": max(of("floor ")), "image RMSE": max(of("image rmse "))}
    return found


def run(args: argparse.Namespace, scene: str, rows: dict[str, dict[str, Any]], known: float = 1.0) -> None:
    """A table of one scene, and one of the errors of each effect."""
    table, effects = [], []
    for name, options in rows.items():
        cells = []
        for seed in args.seeds:
            key = {"scene": scene, "row": name, "seed": seed, "known": known, **FIT, **options, "size": SIZE}
            try:
                cells.append(
                    common.cell("causal_vae", args.until, partial(scene_cell, scene, options, seed, known), **key)
                )
            except common.OutOfTime:
                break
        if not cells:
            continue
        columns = [summary(cell) for cell in cells]
        row: dict[str, Any] = {"model": name, "seeds": len(cells)}
        row |= {key: common.interval([one[key] for one in columns]) for key in columns[0]}
        table.append(row | {"CPU s": common.spread([cell["fit"] for cell in cells])})
        errors = [key for key in cells[0] if key.startswith("do ")]
        if errors:
            effects.append({"model": name} | {key: common.interval([cell[key] for cell in cells]) for key in errors})
        print(table[-1], flush=True)
    part = f"causal_vae_{scene}" + ("" if known == 1 else "_labels")
    common.report(part, table, fit=FIT, size=SIZE, seeds=args.seeds, known=known)
    if effects:
        common.report(f"{part}_effects", effects, fit=FIT, size=SIZE, seeds=args.seeds, known=known)


def main() -> None:
    """Run the part that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("scenes", "labels"))
    parser.add_argument("--scenes", nargs="*", choices=("pendulum", "flow"), default=["pendulum", "flow"])
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(5)))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after these")
    args = parser.parse_args()
    args.until = time.monotonic() + 60 * args.minutes
    if args.part == "labels":
        run(args, "pendulum", {"additive": {}}, known=0.1)
        return
    for scene in args.scenes:
        run(args, scene, {name: ROWS[name] for name in args.rows})


if __name__ == "__main__":
    main()
