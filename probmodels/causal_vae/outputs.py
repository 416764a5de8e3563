"""What a fitted causal autoencoder says: its concepts, its mechanisms, and its worlds as pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import xarray as xr
from annotated_types import Interval, Len
from numpy.typing import ArrayLike, NDArray
from pyro import poutine
from torch import Tensor

from probmodels.causal_vae.fitted import thinned
from probmodels.causal_vae.interventions import counterfactual
from probmodels.datasets.labelled import arranged
from probmodels.errors import ProblemError, ResultError
from probmodels.guides.causal_vae import Mechanisms
from probmodels.inference.problem import Problem
from probmodels.inference.programs.programs import fitted
from probmodels.inference.result import Result
from probmodels.inference.runtime.ops import isolated
from probmodels.options import Draws, Natural, Seed, checked
from probmodels.outputs import Outputs, loss_figure, write_all

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["compare_counterfactuals", "edge_shares", "summarise_concepts", "unit_effects", "write_outputs"]

_JUDGED = 1000  # data that numbers are taken from
_SHOWN = 5  # data in a figure
_VALUES = 7  # of a concept along a row of pictures
_DRAWS = 20  # of the noise
_POINTS = 80  # of a curve

Floats = NDArray[np.float64]


@checked(ResultError)
def summarise_concepts(result: Result, *, num_draws: Draws = _DRAWS, seed: Seed = 0) -> pd.DataFrame:
    """What there is to say of every concept, by up to 1000 of the fitted rows.

    Parameters
    ----------
    result
        Result of `probmodels.causal_vae.make_problem` and `fit_svi`.
    num_draws, seed
        Number of draws of the noise, and their seed.

    Returns
    -------
    pandas.DataFrame
        Row for each concept: ``parents``; ``noise_sd``, of what it has of its own, in units of the labels (before the
        increasing function of a post-nonlinear mechanism); ``explained``, the share of its variance that its causes
        explain; ``correlation`` and ``r2`` of its mean given the observation with the ``labelled`` rows' labels.

    Raises
    ------
    ResultError
        If the result is not one of a causal autoencoder.
    """
    problem = thinned(result, _JUDGED)
    return _summary(problem, _abducted(problem, result, num_draws, seed))


@checked(ResultError)
def edge_shares(result: Result, *, num_draws: Draws = _DRAWS, seed: Seed = 0) -> xr.DataArray:
    """Share of the variance of a concept that goes with each of its causes, the others held.

    That is half the mean squared difference which it makes to put a cause at its value in another row, over the
    variance: Sobol's total index, the squared standardised coefficient of a linear mechanism. Shares of causes sum to
    what these explain together where the mechanism is additive in independent causes. Where causes depend on each other
    and their effects cancel, a share may exceed 1.

    Parameters
    ----------
    result
        Result of a causal autoencoder.
    num_draws, seed
        Number of draws of the noise, and their seed.

    Returns
    -------
    xr.DataArray
        (cause, effect), 0 where there is no edge.

    References
    ----------
    Janzing, D., Balduzzi, D., Grosse-Wentrup, M. and Schoelkopf, B. (2013). Quantifying causal influences. Annals of
    Statistics 41. https://doi.org/10.1214/13-AOS1145
    """
    problem = thinned(result, _JUDGED)
    return _shares(problem, _abducted(problem, result, num_draws, seed), seed)


@checked(ResultError)
def unit_effects(result: Result, *, num_draws: Draws = _DRAWS, seed: Seed = 0) -> xr.DataArray:
    """Average effect of one standard deviation more of each concept on the others.

    Parameters
    ----------
    result
        Result of a causal autoencoder.
    num_draws, seed
        Number of draws of the noise, and their seed.

    Returns
    -------
    xr.DataArray
        (cause, effect) in standard deviations of the labels in training, over up to 1000 rows; see
        `probmodels.causal_vae.interventions.effect` for one effect with its interval.
    """
    problem = thinned(result, _JUDGED)
    assert problem.data is not None
    names = [str(name) for name in problem.data["concept"].values]
    scale = problem.data["scale"].values
    more = {name: {name: _more(float(sd))} for name, sd in zip(names, scale, strict=True)}
    found = counterfactual(
        problem, result, more, num_draws=num_draws, observations=False, seed=seed, progress=False
    )  # fmt: skip
    values = (found["counterfactual"] - found["factual"]).mean(("draw", "data")).values / scale
    return xr.DataArray(values, {"cause": names, "effect": names}, ("cause", "effect"), name="effect")


@checked(ResultError)
def write_outputs(
    result: Result, folder: str | Path, *, dpi: Annotated[int, Interval(ge=20, le=1200)] = 110
) -> Outputs:
    """Write ``concepts.csv``, ``edges.csv``, ``effects.csv``, ``summary.txt`` and ``figures/*.png``.

    The figures: ``graph``, with the shares of `edge_shares` at its edges; ``mechanisms``, every concept against each of
    its causes; ``effects``, those of `unit_effects`; ``loss``; and, of images, ``traversal_<concept>``: data in rows,
    what they would be under do(concept) from its least to its largest label in columns.

    Parameters
    ----------
    result
        Result of `fit_svi`.
    folder
        Where to; made where it is missing, files of the same names are replaced.
    dpi
        Resolution of the figures.

    Raises
    ------
    ResultError
        If the result is not one of a causal autoencoder.
    """
    problem = thinned(result, _JUDGED)
    worlds = _abducted(problem, result, _DRAWS, 0)
    concepts, shares, effects = _summary(problem, worlds), _shares(problem, worlds, 0), unit_effects(result)
    pairs = _edges(problem)
    edges = pd.DataFrame(pairs, columns=["cause", "effect"])
    edges["share"] = [float(shares.loc[pair]) for pair in pairs]
    edges["unit_effect"] = [float(effects.loc[pair]) for pair in pairs]
    return write_all(
        result,
        folder,
        table=_table(problem, concepts),
        tables={"concepts": concepts, "edges": edges, "effects": effects.to_pandas()},
        figures=_figures(result, problem, worlds, shares, effects) | loss_figure(result),
        dpi=dpi,
    )


@checked(ProblemError)
def compare_counterfactuals(
    found: xr.Dataset,
    truth_concepts: ArrayLike,
    truth_images: ArrayLike | None = None,
    *,
    rows: Annotated[Sequence[Natural], Len(1)] | None = None,
) -> Figure:
    """What a model says would have been, beside what would have been.

    Parameters
    ----------
    found
        What `probmodels.causal_vae.counterfactual` returns for one intervention.
    truth_concepts
        Concepts (data, concept) under the intervention.
    truth_images
        Images (data, channel, row, column) under it. With them the figure has for each row the factual image as the
        model sees it, its counterfactual and the true one, and the concepts that changed below. None for concepts
        alone: the model's against the true ones, with central 95 % intervals.
    rows
        Places of data to show; None for the first six of images, for 200 of concepts.

    Raises
    ------
    ProblemError
        If ``found`` holds several interventions, shapes do not fit, it has no images, or no true concept varies.
    """
    if "intervention" in found.dims:
        raise ProblemError("found holds a batch of interventions; choose one by found.sel(intervention=...)")
    drawn = found["counterfactual"]
    axes = {dim: drawn[dim].values if dim in drawn.coords else None for dim in ("data", "concept")}
    ordered = arranged(truth_concepts, "truth_concepts", axes, error=ProblemError)
    truth = np.asarray(ordered, dtype=np.float64)
    if truth.shape != drawn.shape[1:]:
        raise ProblemError(f"truth_concepts of shape {truth.shape} for concepts of shape {drawn.shape[1:]}")
    if rows is not None and max(rows) >= len(truth):
        raise ProblemError(f"rows={list(rows)}; there are {len(truth)}")
    places = np.arange(min(200 if truth_images is None else 6, len(truth))) if rows is None else np.asarray(rows)
    if truth_images is None:
        names = [str(name) for name in drawn["concept"].values]
        return _agreement(drawn.values[:, places], truth[places], names)
    image_axes = {dim: axes["data"] if dim == "data" else None for dim in ("data", "channel", "row", "column")}
    images = np.asarray(arranged(truth_images, "truth_images", image_axes, error=ProblemError))
    if "observation" not in found or found["observation"].shape != images.shape or images.ndim != 4:
        given = found["observation"].shape if "observation" in found else "none"
        raise ProblemError(f"truth_images of shape {images.shape} for images {given}; give those of the same rows")
    return _side_by_side(found, truth, images, places)


# -- parts ------------------------------------------------------------------------------------------------------------


class _Worlds(NamedTuple):
    """Draws of what is behind data, in units of the model, each (draw, data, concept)."""

    concepts: Tensor
    causes: Tensor
    location: Tensor
    noise: Tensor


def _abducted(problem: Problem, result: Result, num_draws: int, seed: int) -> _Worlds:
    found: list[tuple[Tensor, ...]] = []
    with fitted(problem, result.guide_state or {}, seed=seed) as (_, guide), isolated(seed), torch.no_grad():
        mechanisms, names = _mechanisms(problem), _names(problem)
        for _ in range(num_draws):
            nodes: Any = poutine.trace(guide).get_trace(problem.args[0]).nodes
            noise = torch.stack([nodes[f"noise_{name}"]["value"] for name in names], -1)
            concepts: list[Any] = [None] * len(names)
            causes, locations = list(concepts), list(concepts)
            for i in mechanisms.order:
                locations[i] = mechanisms.location(i, causes).expand(len(noise))
                concepts[i] = mechanisms.value(i, locations[i] + mechanisms.scale(i) * noise[:, i])
                causes[i] = mechanisms.cause(i, concepts[i], locations[i], causes)
            found.append((*(torch.stack(part, -1) for part in (concepts, causes, locations)), noise))
    return _Worlds(*(torch.stack(part) for part in zip(*found, strict=True)))


def _mechanisms(problem: Problem) -> Mechanisms:
    """With the fitted parameters, as `thinned` has them."""
    model: Any = problem.model
    return model.mechanisms


def _names(problem: Problem) -> list[str]:
    return [str(name) for name in problem.data["concept"].values] if problem.data is not None else []


def _edges(problem: Problem) -> list[tuple[str, str]]:
    names, parents = _names(problem), _mechanisms(problem).parents
    return [(names[j], names[i]) for i in range(len(names)) for j in parents[i]]


def _more(amount: float) -> Any:
    return lambda natural: natural + amount


def _summary(problem: Problem, worlds: _Worlds) -> pd.DataFrame:
    """Table of `summarise_concepts`."""
    data, mechanisms, names = problem.data, _mechanisms(problem), _names(problem)
    assert data is not None
    scale = data["scale"].values
    mean = worlds.concepts.double().mean(0).numpy()
    own = _scaled(mechanisms, worlds.noise)
    y = worlds.location + own
    rows: list[dict[str, Any]] = []
    for i, causes in enumerate(mechanisms.parents):
        label = data["label"].values[:, i] if "label" in data else np.full(len(mean), np.nan)
        there = ~np.isnan(label)
        seen, said = label[there], mean[there, i]
        varies = len(seen) > 1 and seen.std() > 0 and said.std() > 0
        rows.append(
            {
                "parents": " ".join(names[j] for j in causes),
                "noise_sd": float(mechanisms.scale(i).detach()) * scale[i],
                "explained": 1 - float(own[..., i].double().var() / y[..., i].double().var()) if causes else 0.0,
                "labelled": len(seen),
                "correlation": np.corrcoef(seen, said)[0, 1] if varies else np.nan,
                "r2": 1 - np.square(seen - said).mean() / seen.var() if varies else np.nan,
            }
        )
    return pd.DataFrame(rows, index=pd.Index(names, name="concept"))


def _scaled(mechanisms: Mechanisms, noise: Tensor) -> Tensor:
    """Noise (..., concept) in units of the concepts."""
    with torch.no_grad():
        return noise * torch.stack([mechanisms.scale(i) for i in range(mechanisms.size)])


def _shares(problem: Problem, worlds: _Worlds, seed: int) -> xr.DataArray:
    """Shares of `edge_shares`."""
    mechanisms, names = _mechanisms(problem), _names(problem)
    found = np.zeros((len(names), len(names)))
    with torch.no_grad(), isolated(seed):
        causes, own = worlds.causes.flatten(0, 1), _scaled(mechanisms, worlds.noise).flatten(0, 1)
        place = torch.randperm(len(causes))
        values = worlds.concepts.flatten(0, 1)
        for i in range(len(names)):
            for j in mechanisms.parents[i]:
                columns = list(causes.unbind(-1))
                columns[j] = columns[j][place]
                moved = mechanisms.value(i, mechanisms.location(i, columns) + own[:, i])
                found[j, i] = 0.5 * (moved - values[:, i]).double().square().mean() / values[:, i].double().var()
    return xr.DataArray(found, {"cause": names, "effect": names}, ("cause", "effect"), name="share")


def _table(problem: Problem, concepts: pd.DataFrame) -> str:
    assert problem.data is not None
    arrows = ", ".join(f"{cause} -> {effect}" for cause, effect in _edges(problem)) or "none"
    shown = concepts.assign(parents=concepts["parents"].replace("", "-"))
    return "\n".join(
        [
            f"Causal autoencoder of {len(concepts)} concepts, mechanisms {_mechanisms(problem).kind!r}; by "
            f"{problem.data.sizes['data']:,} of the fitted rows.",
            f"Edges: {arrows}.",
            "",
            shown.to_string(float_format=lambda value: f"{value:.4g}"),
        ]
    )


def _figures(
    result: Result, problem: Problem, worlds: _Worlds, shares: xr.DataArray, effects: xr.DataArray
) -> dict[str, Figure]:
    from matplotlib.figure import Figure

    from probmodels.bayesian_network.outputs import draw_arrows

    names = _names(problem)
    graph = Figure(figsize=(4.6, 4.6), layout="constrained")
    ax = graph.subplots()
    edges = _mechanisms(problem).edges.numpy() > 0
    draw_arrows(ax, np.where(edges, shares.values, -1.0), names, least=0.0, spelled=".0%")
    ax.set_title("Share of the variance that goes with a cause", fontsize=9)
    figures = {"graph": graph, "effects": _heat_map(effects)}
    if edges.any():
        figures["mechanisms"] = _mechanism_figure(problem, worlds)
    assert problem.data is not None
    if problem.data["observation"].ndim == 4:
        figures |= _traversals(result)
    return figures


def _traversals(result: Result) -> dict[str, Figure]:
    """One figure for each concept."""
    from probmodels import plots

    problem = thinned(result, _SHOWN)
    assert problem.data is not None
    data, figures = problem.data, {}
    for name, least, most in zip(_names(problem), data["least"].values, data["most"].values, strict=True):
        values = np.linspace(least, most, _VALUES)
        worlds = {str(value): {name: float(value)} for value in values}
        found = counterfactual(problem, result, worlds, num_draws=_SHOWN, progress=False)
        shown = np.concatenate([data["observation"].values[None], found["observation"].values]).swapaxes(0, 1)
        below = [["data", *(f"{value:.3g}" for value in values)]]
        labels = [[""] * (_VALUES + 1)] * (len(shown) - 1) + below
        title = f"do({name}) from {least:.3g} to {most:.3g}, its effects following"
        figures[f"traversal_{re.sub(r'[^0-9A-Za-z]+', '_', name)}"] = plots.image_grid(_picture(shown), title, labels)
    return figures


def _picture(images: NDArray[Any]) -> NDArray[Any]:
    """Images (..., channel, row, column) as figures take them: of colours, or of ink where there is one channel."""
    shown = np.moveaxis(images, -3, -1).clip(0.0, 1.0)
    return shown if shown.shape[-1] == 3 else 1 - shown.mean(-1)


def _mechanism_figure(problem: Problem, worlds: _Worlds) -> Figure:
    """Row for each concept that has causes, column for each cause; in units of the labels."""
    from matplotlib.figure import Figure

    from probmodels._axes import BLUE, GREY, SMALL, clean

    assert problem.data is not None
    mechanisms, names = _mechanisms(problem), _names(problem)
    centre, scale = problem.data["centre"].values, problem.data["scale"].values
    hidden = mechanisms.kind == "masked"  # the linear layer of a cause, and no concept, is what enters
    children = [i for i in range(len(names)) if mechanisms.parents[i]]
    width = max(len(mechanisms.parents[i]) for i in children)
    figure = Figure(figsize=(2.6 * width + 0.4, 2.1 * len(children) + 0.5), layout="constrained")
    figure.suptitle("Mechanisms: other causes at their means, band of 95 % for a concept's own noise", fontsize=9)
    causes, concepts = worlds.causes.mean(0), worlds.concepts.double().mean(0).numpy()
    for line, i in zip(figure.subplots(len(children), width, squeeze=False), children, strict=True):
        for ax in line[len(mechanisms.parents[i]) :]:
            ax.set_axis_off()
        for ax, j in zip(line, mechanisms.parents[i], strict=False):
            columns = list(causes.mean(0).expand(_POINTS, -1).unbind(-1))
            columns[j] = torch.linspace(float(causes[:, j].min()), float(causes[:, j].max()), _POINTS).to(causes)
            with torch.no_grad():
                location, half = mechanisms.location(i, columns), 1.96 * mechanisms.scale(i)
                low, middle, high = (
                    mechanisms.value(i, location + sign * half).double().numpy() * scale[i] + centre[i]
                    for sign in (-1, 0, 1)
                )
            x, seen = columns[j].double().numpy(), causes[:, j].double().numpy()
            if not hidden:
                x, seen = x * scale[j] + centre[j], seen * scale[j] + centre[j]
            ax.plot(seen, concepts[:, i] * scale[i] + centre[i], ".", ms=1.5, color=GREY, alpha=0.4)
            ax.fill_between(x, low, high, color=BLUE, alpha=0.2, lw=0)
            ax.plot(x, middle, color=BLUE, lw=1.2)
            ax.set_xlabel(f"linear layer of {names[j]}" if hidden else names[j], fontsize=SMALL)
            ax.set_ylabel(names[i], fontsize=SMALL)
            clean(ax)
    return figure


def _heat_map(effects: xr.DataArray) -> Figure:
    from matplotlib.figure import Figure

    names, values = [str(name) for name in effects["cause"].values], effects.values
    figure = Figure(figsize=(1.6 + 0.7 * len(names), 1.2 + 0.6 * len(names)), layout="constrained")
    ax = figure.subplots()
    most = float(np.abs(values).max()) or 1.0
    image = ax.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most)
    for (a, b), value in np.ndenumerate(values):
        if abs(value) > 1e-9:
            ax.text(
                b,
                a,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color="w" if abs(value) > 0.6 * most else "k",
            )
    ax.set(xlabel="on", ylabel="one sd more of", xticks=range(len(names)), yticks=range(len(names)))
    ax.set_xticklabels(names, rotation=45, ha="right")
    ax.set_yticklabels(names)
    ax.set_title("Average effects, in sd", fontsize=9)
    figure.colorbar(image, ax=ax, shrink=0.8)
    return figure


def _agreement(drawn: Floats, truth: Floats, names: Sequence[str]) -> Figure:
    """Concepts (draw, data, concept) against true ones (data, concept), where these differ between rows."""
    from matplotlib.figure import Figure

    from probmodels._axes import BLUE, GREY, SMALL, clean

    shown = [i for i in range(len(names)) if np.ptp(truth[:, i]) > 1e-9 * np.abs(truth[:, i]).max()]
    if not shown:
        raise ProblemError("no true concept differs between rows; there is nothing to compare")
    figure = Figure(figsize=(2.4 * len(shown) + 0.2, 2.6), layout="constrained")
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    mean = drawn.mean(0)
    for i, ax in zip(shown, figure.subplots(1, len(shown), squeeze=False)[0], strict=True):
        ax.vlines(truth[:, i], low[:, i], high[:, i], color=BLUE, lw=0.6, alpha=0.4)
        ax.plot(truth[:, i], mean[:, i], ".", ms=3, color=BLUE)
        ax.axline((truth[0, i], truth[0, i]), slope=1, color=GREY, lw=0.8)
        ax.set_title(names[i], fontsize=9)
        ax.set_xlabel("truth", fontsize=SMALL)
        clean(ax)
    return figure


def _side_by_side(found: xr.Dataset, truth: Floats, images: NDArray[Any], places: NDArray[Any]) -> Figure:
    """Factual, counterfactual and true images of some places, with the concepts that changed."""
    from probmodels import plots

    kinds = [found["factual_observation"].values, found["observation"].values, images]
    shown = np.stack([_picture(part[places]) for part in kinds], 1)
    names = [str(name) for name in found["concept"].values]
    factual, changed = (found[key].mean("draw").values[places] for key in ("factual", "counterfactual"))
    far = np.abs(changed - factual).max(0) > 1e-6 * (1 + np.abs(truth).max(0))
    moved = [int(k) for k in np.flatnonzero(far)]
    labels = [
        [_spelled(names, part[i], moved) for part in (factual, changed, truth[places])] for i in range(len(places))
    ]
    figure = plots.image_grid(shown, "factual | counterfactual | truth", labels)
    figure.set_size_inches(4.2, 1.3 * len(places) + 0.5)  # for what is written
    return figure


def _spelled(names: Sequence[str], values: Floats, places: Sequence[int]) -> str:
    return "\n".join(f"{names[k]} {values[k]:.3g}" for k in places)
