"""What a fitted diffusion model makes, and how good it is: new data, its bound by term and by level, figures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
import torch
import xarray as xr
from annotated_types import Interval, Len
from torch import Tensor

from probmodels.diffusion.fitted import NetworkField, classes_of, fitted_problem, terms
from probmodels.diffusion.model import Diffusion
from probmodels.errors import DataError, ProblemError, ResultError
from probmodels.inference.problem import Problem
from probmodels.inference.result import Result
from probmodels.inference.runtime.ops import isolated
from probmodels.options import Count, Draws, Fraction, OneOf, Probability, Seed, checked, refuse_unused
from probmodels.outputs import Dpi, Outputs, loss_figure, write_all
from probmodels.scores.fields import Field, guided
from probmodels.scores.samplers import METHODS, posterior_draws, sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["bound_by_level", "generate", "reverse_coverage", "write_outputs"]

_SHOWN = 12  # data in a row of a figure
_LEVELS = 5  # of noise in a figure
_JUDGED = 1000  # data by which the bound is judged
_TIMES = ((0.2, 0.0), (0.5, 0.2), (0.8, 0.5), (1.0, 0.8))


@checked(ProblemError)
def generate(
    result: Result,
    num_samples: Draws,
    *,
    label: str | int | None = None,
    guidance: Annotated[float, Interval(ge=-1e3, le=1e3)] = 1.0,
    method: Annotated[str, OneOf(METHODS)] = "ancestral",
    num_steps: Count = 100,
    seed: Seed = 0,
    progress: bool = True,
) -> xr.DataArray:
    """New data of a fitted model.

    Parameters
    ----------
    result
        Result of `probmodels.diffusion.make_problem` and `fit_svi`.
    num_samples
        How many.
    label
        Class of all of them, for a model with ``conditional=True``.
    guidance
        Weight of the class, where there is one: ``p(x | label)^w p(x)^(1 - w)`` level by level, which for weights
        other than one is not the noised form of any density (see `probmodels.score_composition`).
    method, num_steps, seed, progress
        Sampler and its options, see `probmodels.scores.samplers.sample`.

    Returns
    -------
    xr.DataArray
        (sample, ...) as the data are, intensities of images in [0, 1].

    Raises
    ------
    ProblemError
        If the model knows no such class, or an option is out of range or not used.
    ResultError
        If the result is not one of a diffusion model.
    """
    problem = fitted_problem(result)
    model, classes, observed = _model(problem), classes_of(problem), _data(problem)["observation"]
    field: Field = NetworkField(model)
    if label is None:
        refuse_unused(generate, "label=None", guidance=guidance)
    else:
        if str(label) not in classes:
            known = (
                f"it knows {classes}" if classes else "it was fitted without: make the problem with conditional=True"
            )
            raise ProblemError(f"label={label!r} is no class of the model; {known}")
        field = guided(NetworkField(model, classes.index(str(label))), field, guidance)
    drawn = sample(field, num_samples, method=method, num_steps=num_steps, seed=seed, progress=progress)
    values = _as_data(model, drawn)
    dims = [str(dim) for dim in observed.dims[1:]]
    coords = {dim: observed[dim] for dim in dims if dim in observed.coords}
    return xr.DataArray(values, coords, ("sample", *dims), name="sample")


@checked(DataError)
def bound_by_level(
    result: Result, *, num_levels: Annotated[int, Interval(ge=1, le=100_000)] = 20, num_draws: Draws = 8, seed: Seed = 0
) -> xr.Dataset:
    """Where along the levels the bound loses how much.

    Parameters
    ----------
    result
        Result of a diffusion model.
    num_levels
        Parts of the times from 0 to 1.
    num_draws
        Draws of the noise for each datum and part.
    seed
        Seed of these.

    Returns
    -------
    xr.Dataset
        ``loss`` in nats per datum and its Monte Carlo ``error`` (level,), which sum to minus the term ``steps`` of the
        bound; ``time`` and ``log_snr`` at the middle of each.
    """
    problem = fitted_problem(result)
    model, (data, label) = _model(problem), _some(problem)
    edges = np.linspace(0.0, 1.0, num_levels + 1)
    rows = []
    with isolated(seed), torch.no_grad():
        x = model.encode(data)
        shown = model.indicators(label, x)
        for low, high in itertools.pairwise(edges):
            found = [
                model.diffusion_term(x, torch.randn_like(x), low + (high - low) * torch.rand(len(x)).to(x), shown)
                for _ in range(num_draws)
            ]
            values = torch.cat(found).double() * (high - low)
            rows.append((float(values.mean()), float(values.std() / math.sqrt(len(values)))))
        middle = torch.as_tensor((edges[1:] + edges[:-1]) / 2).to(x)
        log_snr = -model.schedule.gamma(middle).double()
    loss, error = np.array(rows).T
    arrays = {"loss": loss, "error": error, "time": middle.double().numpy(), "log_snr": log_snr.numpy()}
    return xr.Dataset({name: ("level", value) for name, value in arrays.items()})


@checked(DataError)
def reverse_coverage(
    result: Result,
    *,
    times: Annotated[Sequence[tuple[Probability, Probability]], Len(1)] = (
        (0.2, 0.0),
        (0.5, 0.2),
        (0.8, 0.5),
        (1.0, 0.8),
    ),
    probs: Annotated[Sequence[Fraction], Len(1)] = (0.5, 0.9),
    num_draws: Annotated[int, Interval(ge=2, le=10_000_000)] = 99,
    num_steps: Count = 50,
    num_data: Annotated[int, Interval(ge=2)] = 100,
    seed: Seed = 0,
) -> xr.Dataset:
    """Whether intervals of the reverse process hold what they say, between pairs of levels.

    Data are noised to an early level and on from there to a late one; the model draws the early level given the late
    one, and central intervals of its draws, entry by entry, are held against the early level that there was.

    Parameters
    ----------
    result
        Result of a diffusion model; data that were held out are taken where it has some.
    times
        Late and early time of each pair.
    probs
        Probabilities of the intervals.
    num_draws, num_steps
        Draws of each datum, and steps of the reverse process.
    num_data
        How many data to take, at most.
    seed
        Seed of noise and draws.

    Returns
    -------
    xr.Dataset
        ``coverage`` (pair, prob), share of entries inside, and its ``error``, with data as units; ``late`` and
        ``early`` times (pair,).
    """
    problem = fitted_problem(result)
    for late, early in times:
        if late <= early:
            raise DataError(f"times={list(times)}; give pairs of a late time and an earlier one, such as (0.5, 0.2)")
    model = _model(problem)
    data, _ = _some(problem, "held_out" if "held_out" in _data(problem) else "observation")
    field, rows = NetworkField(model), []
    with isolated(seed), torch.no_grad():
        x = model.encode(data[:num_data])
        for late, early in times:
            (alpha, sigma), (alpha_t, sigma_t) = field.scales(early, x), field.scales(late, x)
            truth = alpha * x + sigma * torch.randn_like(x)
            share = alpha_t / alpha
            noised = share * truth + (sigma_t**2 - (share * sigma) ** 2).sqrt() * torch.randn_like(x)
            drawn = posterior_draws(
                field, noised, late, num_draws, until=early, num_steps=num_steps, seed=seed, progress=False
            )
            rank = (drawn < truth).sum(0).double() / num_draws
            inside = [((rank - 0.5).abs() <= prob / 2).double().flatten(1).mean(1) for prob in probs]
            rows.append([(float(part.mean()), float(part.std() / math.sqrt(len(part)))) for part in inside])
    coverage, error = np.moveaxis(np.array(rows), -1, 0)
    found = {"coverage": (("pair", "prob"), coverage), "error": (("pair", "prob"), error)}
    late, early = np.array(times).T
    return xr.Dataset(found, {"prob": list(probs), "late": ("pair", late), "early": ("pair", early)})


@checked(ResultError)
def write_outputs(result: Result, folder: str | Path, *, dpi: Dpi = 110) -> Outputs:
    """Write ``samples.nc``, ``levels.csv``, ``summary.txt`` and ``figures/*.png``.

    The figures: ``samples``, new data; ``denoising``, data at several levels of noise and what the model makes of them;
    ``levels``, the bound by level; ``loss``. Data that are neither images nor points in the plane have the last two.

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
        If the result is not one of a diffusion model.
    """
    problem = fitted_problem(result)
    classes, lines = classes_of(problem), [_judgement(problem, "observation")]
    if "held_out" in _data(problem):
        lines.append(_judgement(problem, "held_out"))
    levels = bound_by_level(result)
    worst = int(np.argmax(levels["loss"].values))
    lines.append(
        f"Most of the bound is lost near a log signal-to-noise ratio of {float(levels['log_snr'][worst]):.1f}: "
        f"{float(levels['loss'][worst]):.3g} of {float(levels['loss'].sum()):.4g} nats of the steps."
    )
    if classes:
        parts = [generate(result, _SHOWN, label=name, progress=False) for name in classes]
        drawn = xr.concat(parts, "class").assign_coords({"class": classes})
    else:
        drawn = generate(result, 6 * _SHOWN, progress=False)
    return write_all(
        result,
        folder,
        table="\n".join(lines),
        tables={"levels": levels.to_dataframe()},
        figures=_figures(problem, drawn, levels) | loss_figure(result),
        files={"samples.nc": lambda file: drawn.to_dataset(name="generated").to_netcdf(file)},
        dpi=dpi,
    )


# -- parts ------------------------------------------------------------------------------------------------------------


def _model(problem: Problem) -> Diffusion:
    model: Any = problem.model
    return cast(Diffusion, model)


def _data(problem: Problem) -> xr.Dataset:
    assert problem.data is not None
    return problem.data


def _some(problem: Problem, which: str = "observation") -> tuple[Tensor, Tensor | None]:
    """Some data, as the model takes them, with places of their classes."""
    known, model = _data(problem), _model(problem)
    like = next(model.network.parameters())
    values = torch.as_tensor(known[which].values[:_JUDGED]).to(like)
    name = "label" if which == "observation" else f"{which}_label"
    return values, torch.as_tensor(known[name].values[:_JUDGED]) if name in known and model.num_classes else None


def _judgement(problem: Problem, which: str) -> str:
    """A sentence on the bound of fitted data, or of those held out."""
    model, (data, label) = _model(problem), _some(problem, which)
    name = "fitted" if which == "observation" else "held-out"
    found = terms(model, data, label)
    if model.num_values is not None:
        unit = f"{found.attrs['bits_per_dim']:.4f} ± {found.attrs['bits_per_dim_error']:.4f} bits per number"
    else:
        unit = "a density"
    parts = ", ".join(f"{part} {-float(found[part].mean()):.4g}" for part in ("reconstruction", "steps", "prior"))
    spread = float(found["elbo"].std() / math.sqrt(len(data)))
    return (
        f"Bound on minus the log likelihood of {name} data: {found.attrs['nats_per_datum']:.4g} ± {spread:.2g} nats "
        f"each ({unit}; {parts}), {len(data):,} data."
    )


def _as_data(model: Diffusion, drawn: Tensor) -> np.ndarray:
    """Draws as the data are: intensities of images, numbers as they are."""
    scale = 1 if model.num_values is None else model.num_values - 1
    return (model.decode(drawn) / scale).double().cpu().numpy()


def _figures(problem: Problem, drawn: xr.DataArray, levels: xr.Dataset) -> dict[str, Figure]:
    from probmodels import plots

    figures: dict[str, Figure] = {"levels": _levels_figure(levels)}
    model, (data, label) = _model(problem), _some(problem)
    with torch.no_grad():  # levels at equal distances of the log signal-to-noise ratio
        times = torch.linspace(0.0, 1.0, 1001).to(data)
        gamma = model.schedule.gamma(times)
        wanted = torch.linspace(float(gamma[0]), float(gamma[-1]), _LEVELS + 2)[1:-1].to(gamma)
        times = times[torch.searchsorted(gamma, wanted)]
    with isolated(0), torch.no_grad():
        x = model.encode(data[: _SHOWN if len(model.shape) == 2 else 500])
        shown = None if label is None else int(label[0])
        noised, clean = [], []
        for t in times.tolist():
            field = NetworkField(model, shown if len(x) == 1 else None)
            alpha, sigma = field.scales(t, x)
            z = alpha * x + sigma * torch.randn_like(x)
            noised.append(z)
            clean.append(field.denoise(z, t))
    if len(model.shape) == 2:
        values = drawn.values.reshape(-1, _SHOWN, *model.shape)
        figures["samples"] = plots.image_grid(values, "new images")
        both = np.stack([_shown(part) for pair in zip(noised, clean, strict=True) for part in pair])
        figures["denoising"] = plots.image_grid(both, "noised images, and below each row what they are denoised to")
    elif model.shape == (2,):
        figures["samples"] = _points_figure(drawn.values.reshape(-1, 2), data.numpy())
    return figures


def _shown(images: Tensor) -> np.ndarray:
    return ((images + 1) / 2).clamp(0, 1).double().numpy()


def _levels_figure(levels: xr.Dataset) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    ax = figure.subplots()
    ax.errorbar(levels["log_snr"], levels["loss"], 2 * levels["error"], fmt="o-", ms=3, lw=1)
    ax.set(xlabel="log signal-to-noise ratio", ylabel="nats per datum", title="What each part of the levels costs")
    return figure


def _points_figure(drawn: np.ndarray, data: np.ndarray) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    for ax, points, title in zip(
        figure.subplots(1, 2, sharex=True, sharey=True), (data, drawn), ("data", "new"), strict=True
    ):
        ax.plot(points[:, 0], points[:, 1], ".", ms=2)
        ax.set(title=title, aspect="equal")
    return figure
