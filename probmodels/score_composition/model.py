"""Draws from composed scores, level by level, each with a Metropolis test made of scores alone.

The target at time t is what `probmodels.scores.fields` composes there. Chains start in noise and walk down the levels,
taking some steps on each and, if asked for, a reverse step of the diffusion in between; the draws are of level 0::

    x_T ~ Normal(0, 1);  x_s from x_t by steps that leave target_s invariant, for one level after the other

The acceptance probability needs the ratio of the target's densities at two points. Where it is not known, it is the
line integral of the score between them, so that any score network can be composed as it is, while networks of energies
have to be trained for it.

References
----------
Sjöberg, A., Lindqvist, J., Önnheim, M., Jirstrand, M. and Svensson, L. (2023). MCMC-correction of score-based diffusion
models for model composition. https://arxiv.org/abs/2307.14012
Du, Y. et al. (2023). Reduce, reuse, recycle: compositional generation with energy-based diffusion models and MCMC.
ICML. https://arxiv.org/abs/2302.11552
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from annotated_types import Interval
from torch import Tensor

from probmodels.errors import DataError, ProblemError, ResultError, SpecError
from probmodels.inference.mcmc.line_integrals import evaluate_start
from probmodels.inference.mcmc.score_kernels import Damping, Points, RuleName, ScoreKernel, Transition
from probmodels.inference.problem import Problem
from probmodels.inference.result import Result
from probmodels.inference.runtime.ops import isolated
from probmodels.inference.runtime.tensors import device_of
from probmodels.options import Count, Fraction, OneOf, Positive, Seed, checked, refuse_unused
from probmodels.outputs import Dpi, Outputs, write_all
from probmodels.score_composition.specs import load_fields
from probmodels.scores.fields import Field
from probmodels.scores.samplers import reverse_step

__all__ = [
    "ENGINES",
    "LOADERS",
    "REFERENCE",
    "AnnealedKernel",
    "Composed",
    "levels_of",
    "make_move",
    "make_problem",
    "tiny",
    "walk",
    "write_outputs",
]

REFERENCE = "Sjöberg et al. (2023), https://arxiv.org/abs/2307.14012"
ENGINES = ("mcmc",)
LOADERS = {"fields": load_fields}

SAMPLERS = {
    "ula": ("langevin", False),
    "mala": ("langevin", True),
    "uhmc": ("hamiltonian", False),
    "hmc": ("hamiltonian", True),
}

Sampler = Annotated[str, OneOf(SAMPLERS)]
_DIMS = {1: ("feature",), 2: ("row", "column"), 3: ("channel", "row", "column")}


class Composed:
    """The model: a point whose density, where it is known, is that of a field at level 0.

    Parameters
    ----------
    field
        A field, composed or not.
    times
        Times of the levels, falling to 0.
    width
        Smallest scale of the target at level 0, to which step sizes are proportional.
    dims
        Names of the axes of a datum.
    """

    def __init__(self, field: Field, times: Sequence[float], width: float, dims: Sequence[str]) -> None:
        self.field, self.times, self.width, self.dims = field, tuple(times), width, tuple(dims)

    def __call__(self) -> None:
        """Site ``x`` (*shape)."""
        # The normal names and shapes the site; its density does not count.
        zeros = torch.zeros(self.field.shape, device=device_of(self.field))
        free = dist.Normal(zeros, 1.0).to_event(len(self.field.shape)).mask(False)
        axes: Any = {"event_dims": list(self.dims)}
        x = pyro.sample("x", free, infer=axes)
        if self.field.has_density:
            pyro.factor("density", self.field.log_density(x.unsqueeze(0), self.times[-1]).squeeze(0))

    def scale(self, t: float) -> float:
        """Smallest scale of the target at a time, about."""
        alpha, sigma = (float(value) for value in self.field.scales(t, torch.zeros((), dtype=torch.float64)))
        return math.sqrt((alpha * self.width) ** 2 + sigma**2)


class AnnealedKernel(ScoreKernel):
    """Walks down the levels in warm-up, and draws from level 0.

    Parameters
    ----------
    problem
        As `make_problem` makes it.
    num_chains
        Number of chains.
    sampler
        ``"ula"``, ``"mala"``, ``"uhmc"`` or ``"hmc"``: Langevin or Hamiltonian steps, without or with the test.
    step_size
        Leapfrog step in units of the smallest scale of each level; for Langevin steps ``h = step^2 / 2``.
    predictor
        Whether a reverse step of the diffusion goes before the first step on a level.
    denoise
        Whether draws are freed of the noise of level 0.
    adapt, target_accept
        Whether step sizes are tuned on each level, where there is a test, and to what; see `ScoreKernel`.
    rule, num_points
        How the test computes line integrals, see `Transition`.
    num_leapfrog, damping
        Leapfrog steps of a Hamiltonian step, and the share of the momentum that is kept; see `Transition`.
    check_points
        Points of a finer rule that every line integral is compared with, see `Transition`.

    Raises
    ------
    ProblemError
        If the problem is another, or an option is out of range or not used with the sampler.
    """

    @checked(ProblemError)
    def __init__(
        self,
        problem: Problem,
        *,
        num_chains: Count,
        sampler: Sampler = "hmc",
        step_size: Positive = 0.8,
        predictor: bool = False,
        denoise: bool = True,
        adapt: bool = False,
        target_accept: Fraction | None = None,
        rule: RuleName | None = None,
        num_points: Points = 5,
        num_leapfrog: Count = 3,
        damping: Damping = 0.5,
        check_points: Points | None = None,
    ) -> None:
        model = problem.model
        if not isinstance(model, Composed):
            raise ProblemError(f"{problem.name}: AnnealedKernel takes problems of score_composition.make_problem")
        proposal, corrected = SAMPLERS[sampler]
        of_test = {"rule": rule, "num_points": num_points, "adapt": adapt, "target_accept": target_accept}
        if not corrected:
            refuse_unused(AnnealedKernel.__init__, f"sampler={sampler!r}, which has no test", **of_test)
        elif not adapt:
            refuse_unused(AnnealedKernel.__init__, "adapt=False", target_accept=target_accept)
        if proposal == "langevin":
            of_path: dict[str, Any] = {"num_leapfrog": num_leapfrog, "damping": damping}
            refuse_unused(AnnealedKernel.__init__, f"sampler={sampler!r}, which takes one step", **of_path)
        field, times = model.field, model.times

        def between(level: int, x: Tensor) -> Tensor:
            return reverse_step(field, x, times[level - 1], times[level])

        super().__init__(
            problem,
            num_chains=num_chains,
            targets=[partial(_evaluate, field, t) for t in times],
            names=[f"t={t:.4g}" for t in times],
            start=partial(_noise, field.shape),
            step_size=[step_size * model.scale(t) for t in times],
            proposal=proposal,
            corrected=corrected,
            rule=rule,
            num_points=num_points,
            num_leapfrog=num_leapfrog,
            damping=damping,
            check_points=check_points,
            adapt=adapt,
            target_accept=target_accept,
            between=between if predictor else None,
            final=partial(_denoise, field, times[-1]) if denoise else None,
        )


def _evaluate(field: Field, t: float, x: Tensor) -> Any:
    return field.evaluate(x, t)


def _noise(shape: Sequence[int], count: int) -> Tensor:
    return torch.randn(count, *shape)


def _denoise(field: Field, t: float, x: Tensor) -> Tensor:
    return field.to_data(field.denoise(x, t))


@checked(DataError, keep=True)
def make_problem(
    field: Field | xr.Dataset,
    *,
    num_levels: Annotated[int, Interval(ge=2, le=100_000)] = 100,
    width: Annotated[float, Interval(gt=0, le=1e6)] = 0.1,
    dims: Sequence[str] | None = None,
) -> Problem:
    """Draws from a field of scores, by `run_mcmc` with ``warmup_steps`` some ten times ``num_levels``.

    Parameters
    ----------
    field
        A field of `probmodels.scores.fields`, composed or not; or the data of a problem of one that `load_fields` made,
        which hold the tables that it was made from.
    num_levels
        Levels of noise, at equal distances in time.
    width
        Smallest scale of the target at level 0, to which step sizes are proportional.
    dims
        Names of the axes of a datum; ``("feature",)``, ``("row", "column")`` or ``("channel", "row", "column")`` for
        None.

    Returns
    -------
    Problem
        With `AnnealedKernel`, whose options are ``kernel_options`` of `run_mcmc`. Where the field has a log density, so
        has the model, and Pyro's own kernels draw from it as well.

    Raises
    ------
    DataError
        If the field cannot be made again, its noise does not increase, scores at the first or last level are not
        finite, or an option is out of range.
    """
    made = _made_again(field) if isinstance(field, xr.Dataset) else field
    named = _DIMS.get(len(made.shape)) if dims is None else tuple(dims)
    if named is None or len(set(named)) != len(made.shape):
        raise DataError(f"dims={named} for data of shape {made.shape}; name every axis, each differently")
    generator = torch.Generator().manual_seed(0)
    try:
        made.schedule.check()
        times = made.schedule.levels(num_levels - 1).tolist()
        for t in (times[0], times[-1]):
            try:
                evaluate_start(partial(_evaluate, made, t), torch.randn(4, *made.shape, generator=generator))
            except ProblemError as error:
                raise DataError(f"score_composition: at t={t}: {error}") from error
    except ProblemError as error:
        raise DataError(str(error)) from error
    return Problem(
        name="score_composition",
        model=Composed(made, times, width, named),
        coords={dim: list(range(size)) for dim, size in zip(named, made.shape, strict=True)},
        data=None if made.tables is None else xr.Dataset({"fields": ((), json.dumps(made.tables))}),
        kernel=AnnealedKernel,
    )


def _made_again(data: xr.Dataset) -> Field:
    """The field whose tables data hold."""
    if "fields" not in data:
        raise DataError(
            "the data hold no tables of fields: the field was made in Python, and no file holds it; give the field"
        )
    try:
        return load_fields(**json.loads(str(data["fields"].item())))
    except (SpecError, TypeError, ValueError) as error:
        raise DataError(f"the field cannot be made again: {error}") from error


@checked(ResultError)
def levels_of(result: Result) -> xr.Dataset:
    """What happened on each level of a run.

    Returns
    -------
    xr.Dataset
        ``acceptance_rate``, ``step_size``, ``evaluations`` per chain, ``divergences`` over all chains, and where it was
        asked for by ``check_points`` the mean absolute ``line_error``, all (level,), with the ``time`` of each.

    Raises
    ------
    ResultError
        If the result is not one of `AnnealedKernel`.
    """
    kept = result.group("sample_stats").attrs.get("levels")
    if kept is None:
        raise ResultError("the result has no levels; it is not one of score_composition with its own kernel")
    found = json.loads(kept) if isinstance(kept, str) else dict(kept)
    times = [float(name.removeprefix("t=")) for name in found.pop("name")]
    arrays = {name: ("level", np.array(values, dtype=np.float64)) for name, values in found.items()}
    return xr.Dataset(arrays, {"level": np.arange(len(times)), "time": ("level", times)})


@checked(ProblemError)
def walk(
    problem: Problem, *, num_chains: Count = 200, per_level: Count = 5, seed: Seed = 0, **options: Any
) -> xr.DataArray:
    """Positions of chains on their way from noise to level 0, for pictures; draws are those of `run_mcmc`.

    Parameters
    ----------
    problem
        As `make_problem` makes it.
    num_chains
        Number of chains.
    per_level
        Steps on each level.
    seed
        Seed of the chains.
    options
        Options of `AnnealedKernel`.

    Returns
    -------
    xr.DataArray
        (level, chain, ...), the noise that chains start from and then where they are at the end of each level, with
        the ``time`` of the level.

    Raises
    ------
    ProblemError
        If the problem is another, or an option is out of range.
    """
    kernel = AnnealedKernel(problem, num_chains=num_chains, **options)
    model: Any = problem.model
    with isolated(seed):
        kernel.setup(per_level * len(model.times))
        params = kernel.initial_params
        found = [params["z"]]
        for _ in model.times:
            for _ in range(per_level):
                params = kernel.sample(params)
            found.append(params["z"])
    positions = torch.stack(found).reshape(len(found), num_chains, *model.field.shape)
    coords = dict(problem.coords) | {"time": ("level", [model.times[0], *model.times])}
    return xr.DataArray(positions.cpu().numpy(), coords, ("level", "chain", *model.dims), name="x")


@checked(ResultError)
def write_outputs(result: Result, folder: str | Path, *, problem: Problem | None = None, dpi: Dpi = 110) -> Outputs:
    """Write ``levels.csv``, ``summary.txt`` and ``figures``.

    The figures: ``levels.png``, acceptance and step sizes along the levels; ``samples.png``, the draws, of points in
    the plane and of images. And of points in the plane, where the problem is known: ``density.png``, chains over the
    composed density of some levels; ``walk.gif``, the way of chains down all of them.

    Parameters
    ----------
    result
        Result of `run_mcmc` with the method's own kernel.
    folder
        Where to; made where it is missing, files of the same names are replaced.
    problem
        What was drawn from; made again from the result where its fields are in tables, as those of a spec are.
    dpi
        Resolution of the figures.

    Raises
    ------
    ResultError
        If the result is not one of `AnnealedKernel`, or its fields cannot be made any more, such as those of runs that
        are gone; all but the last two figures are written then.
    """
    from probmodels.score_composition import figures as composition_plots

    draws, levels = result.posterior["x"], levels_of(result)
    attrs = result.tree["sample_stats"].attrs
    corrected = json.loads(str(attrs["corrected"]).lower())  # a text in files
    table = (
        f"{draws.sizes['chain']:,} chains of {draws.sizes['draw']:,} draws through {levels.sizes['level']} levels, "
        f"{attrs['proposal']}, rule {attrs['rule']!r}{'' if corrected else ', uncorrected'}.\n"
        f"Acceptance: mean {float(levels['acceptance_rate'].mean()):.2f}, lowest "
        f"{float(levels['acceptance_rate'].min()):.2f}, at level 0 {float(levels['acceptance_rate'][-1]):.2f}.\n"
        f"Scores: {float(levels['evaluations'].sum()):,.0f} a chain; divergences: "
        f"{float(levels['divergences'].sum()):,.0f} in all.\n"
        "Chains stay in the modes that they come down to: where modes lie apart, R-hat says no more than that."
    )
    figures = {"levels": composition_plots.levels(levels)}
    if (shown := composition_plots.samples(draws)) is not None:
        figures["samples"] = shown
    animation: Callable[[Path], object] | None = None
    lost: ResultError | None = None
    spec = json.loads(result.tree.attrs.get("spec", "{}"))
    if problem is None and draws.shape[2:] == (2,) and "fields" in result.group("constant_data"):
        try:
            problem = result.rebuild()
        except ResultError as error:
            lost = error
    if problem is not None and draws.shape[2:] == (2,):
        model: Any = problem.model
        sampler = {steps: name for name, steps in SAMPLERS.items()}[attrs["proposal"], corrected]
        walked = walk(problem, **{"sampler": sampler} | spec.get("inference", {}).get("kernel_options", {}))
        figures["density"] = composition_plots.density(model.field, walked)
        animation = partial(composition_plots.animate, walked, field=model.field)
    written = write_all(
        result,
        folder,
        table=table,
        tables={"levels": levels.to_dataframe()},
        figures=figures,
        files={"figures/walk.gif": animation},
        dpi=dpi,
    )
    if lost is not None:
        raise lost
    return written


@checked(ProblemError)
def make_move(
    field: Field,
    *,
    num_steps: Count = 2,
    sampler: Sampler = "hmc",
    step_size: Positive = 0.8,
    width: Positive = 0.1,
    **options: Any,
) -> Callable[[Tensor, float, int], tuple[Tensor, int]]:
    """Moves for `probmodels.scores.samplers.weighted`, which leave the density of a level invariant.

    Parameters
    ----------
    field
        A field of scores.
    num_steps
        Moves on each level.
    sampler, step_size, width
        As those of `AnnealedKernel` and `make_problem`.
    options
        Options of `Transition`.

    Raises
    ------
    ProblemError
        If an option is out of range.
    """
    proposal, corrected = SAMPLERS[sampler]
    transition = Transition(proposal, corrected=corrected, **options)
    scale = Composed(field, (0.0,), width, ()).scale

    def move(z: Tensor, t: float, level: int) -> tuple[Tensor, int]:
        target = partial(_evaluate, field, t)
        evaluation, momentum, count = target(z), None, 1
        for _ in range(num_steps):
            moved = transition(target, z, momentum, evaluation, step_size * scale(t))
            z, momentum, evaluation = moved.x, moved.v, moved.evaluation
            count += moved.evaluations
        return z, count

    return move


def tiny() -> Problem:
    """A ring of normals times a box, at six levels, for the conformance tests."""
    tables = {
        "ring": {"kind": "gaussian_mixture", "means": [[0.0, 0.5], [0.0, -0.5], [0.5, 0.0]], "covariances": 0.04},
        "bar": {"kind": "uniform_box", "low": [-0.2, -1.0], "high": [0.2, 1.0]},
        "both": {"kind": "product", "fields": ["ring", "bar"]},
    }
    return make_problem(load_fields(tables, "both", gamma=(-5.0, 4.0)), num_levels=6)
