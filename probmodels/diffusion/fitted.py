"""What to do with a fitted diffusion model: its scores as a field, and its bound on the log likelihood of any data."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, cast

import numpy as np
import torch
import xarray as xr
from annotated_types import Interval
from torch import Tensor

from probmodels.diffusion.model import Diffusion, in_blocks
from probmodels.errors import DataError, ProblemError, ResultError
from probmodels.guides.nets import GradientNetwork
from probmodels.guides.schedules import NoiseSchedule
from probmodels.inference.mcmc.line_integrals import Evaluation
from probmodels.inference.problem import Problem
from probmodels.inference.programs.programs import fitted
from probmodels.inference.result import Result
from probmodels.inference.runtime.ops import isolated
from probmodels.options import Seed, checked
from probmodels.scores.fields import Field, value_and_gradient

__all__ = ["NetworkField", "bound", "classes_of", "fitted_model", "fitted_problem", "make_field", "terms"]

_BLOCK = 512  # data whose terms are computed at a time
_Draws = Annotated[int, Interval(ge=2)]  # so that their error is known


class NetworkField(Field):
    """Scores of a fitted model.

    Parameters
    ----------
    model
        `Diffusion`.
    label
        Place of a class, for the density given it; None for that of all data.
    schedule
        Another than the one it was fitted with, between the same values of gamma: the network is told the level of
        noise and not the time.

    Raises
    ------
    ProblemError
        If the schedule goes to levels of noise that the network was not fitted to.
    """

    def __init__(self, model: Diffusion, label: int | None = None, schedule: NoiseSchedule | None = None) -> None:
        super().__init__(model.schedule if schedule is None else schedule, model.shape)
        self.model, self.label = model, label
        self.units = (model.location, model.scale) if model.standardised else None
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        with torch.no_grad():
            fitted, asked = (one.double_gamma(ends).tolist() for one in (model.schedule, self.schedule))
        if asked[0] < fitted[0] - 1e-4 or asked[1] > fitted[1] + 1e-4:
            raise ProblemError(
                f"the schedule runs from gamma={asked[0]:.4g} to {asked[1]:.4g}, and the network was fitted between "
                f"{fitted[0]:.4g} and {fitted[1]:.4g}; stay within"
            )

    @property
    def has_density(self) -> bool:  # type: ignore[override]
        """Whether the network is the gradient of a scalar."""
        return isinstance(self.model.network, GradientNetwork)

    def _inputs(self, z: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor | None]:
        points = z.to(next(self.model.network.parameters()))
        gamma = self.schedule.gamma(points.new_tensor(float(t))).expand(len(points))
        place = torch.full((len(points),), -1 if self.label is None else self.label, device=points.device)
        return points, gamma, self.model.indicators(place, points)

    def score(self, z: Tensor, t: float) -> Tensor:
        with torch.set_grad_enabled(z.requires_grad):
            return self.model.predict(*self._inputs(z, t), "score").to(z)

    def log_density(self, z: Tensor, t: float) -> Tensor:
        if not self.has_density:
            return super().log_density(z, t)
        with torch.set_grad_enabled(z.requires_grad):
            return self.model.log_density(*self._inputs(z, t)).to(z)

    def evaluate(self, z: Tensor, t: float) -> Evaluation:
        if not self.has_density:
            return super().evaluate(z, t)
        log_density, score = value_and_gradient(lambda points: self.log_density(points, t), z)
        return Evaluation(score, None, log_density)


@checked(ResultError)
def fitted_problem(result: Result) -> Problem:
    """The problem that was fitted, made again from its result, with the fitted parameters in its model.

    Raises
    ------
    ResultError
        If the result is not one of a problem of `make_problem`.
    """
    if result.tree.attrs.get("method") != "diffusion":
        raise ResultError("the result is not one of a diffusion model made by probmodels.diffusion.make_problem")
    problem = result.rebuild()
    model: Any = problem.model
    state = {name.replace("$$$", "."): value for name, value in result.params().items()}
    if not state:
        raise ResultError("the result has no fitted parameters; load it from the folder that Result.save wrote")
    like = next(iter(state.values()))
    model.to(like).load_state_dict({name: state.get(name, value) for name, value in model.state_dict().items()})
    model.requires_grad_(False).eval()
    return problem


@checked(ResultError)
def fitted_model(result: Result) -> Diffusion:
    """The model of `fitted_problem`."""
    model: Any = fitted_problem(result).model
    return cast(Diffusion, model)


@checked(ProblemError)
def classes_of(problem: Problem) -> list[str]:
    """Classes that the network of a problem is shown.

    Raises
    ------
    ProblemError
        If it is no problem of a diffusion model.
    """
    if problem.data is None or "classes" not in problem.data.attrs:
        raise ProblemError(f"{problem.name}: the problem is none of a diffusion model, whose data name their classes")
    found: list[str] = json.loads(problem.data.attrs["classes"])
    return found


@checked(DataError)
def make_field(
    result: Result, label: str | int | None = None, *, schedule: NoiseSchedule | None = None
) -> NetworkField:
    """Scores of a fitted model, for samplers and composition.

    Parameters
    ----------
    result
        Result of `make_problem` and `fit_svi`.
    label
        Class, as the data name it, of a model with ``conditional=True``.
    schedule
        Another than the one that was fitted, see `NetworkField`: fields of one schedule can be composed.

    Raises
    ------
    DataError
        If there is no such class.
    ProblemError
        If the schedule goes to other levels of noise.
    ResultError
        If the result is not one of a diffusion model.
    """
    problem = fitted_problem(result)
    model: Any = problem.model
    if label is None:
        return NetworkField(model, schedule=schedule)
    classes = classes_of(problem)
    if str(label) not in classes:
        raise DataError(f"label={label!r}; the model knows {classes}" if classes else "the model knows no labels")
    return NetworkField(model, classes.index(str(label)), schedule)


@checked(DataError)
def bound(problem: Problem, result: Result, *, num_draws: _Draws = 20, seed: Seed = 0) -> xr.Dataset:
    """Bound on the log likelihood of every datum, by its terms.

    Parameters
    ----------
    problem
        The problem that was fitted, or one of other data with the same options.
    result
        Result of `fit_svi`.
    num_draws
        Times and noises of each datum.
    seed
        Seed of these.

    Returns
    -------
    xr.Dataset
        ``prior``, ``steps`` and ``reconstruction``, whose sum is ``elbo``, with its Monte Carlo ``error``, in nats
        (data,). Attributes ``bits_per_dim`` and ``bits_per_dim_error`` for data of so many values; ``nats_per_datum``.
    """
    values, *labels = problem.args
    with fitted(problem, result.guide_state or {}, seed=0) as (model, _):
        found = terms(cast(Any, model), values, labels[0] if labels else None, num_draws=num_draws, seed=seed)
    return found.assign_coords(data=problem.coords["data"]) if "data" in problem.coords else found


@checked(DataError)
def terms(
    model: Diffusion, data: Tensor, label: Tensor | None = None, *, num_draws: _Draws = 20, seed: Seed = 0
) -> xr.Dataset:
    """The same for any data (data, *shape) with places of their classes (data,)."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("prior", "steps", "reconstruction", "error")}
    with isolated(seed), torch.no_grad():
        for start in range(0, len(data), _BLOCK):
            block = data[start : start + _BLOCK]
            x = model.encode(block)
            shown = None if label is None else model.indicators(label[start : start + _BLOCK], x)
            # Times of the draws of a datum lie at equal distances.
            times = (torch.rand(len(x), 1) + torch.arange(num_draws) / num_draws).to(x) % 1.0
            gamma = model.schedule.gamma(x.new_zeros(()))
            signal, noise = torch.sigmoid(-gamma).sqrt() * x, torch.sigmoid(gamma).sqrt()
            steps, likely = [], []
            for time in times.unbind(1):
                arrays = (x, torch.randn_like(x), time, shown)
                steps.append(-in_blocks(model.diffusion_term, model.num_values, *arrays))
                likely.append(model.likelihood(signal + noise * torch.randn_like(x)).log_prob(block))
            both = torch.stack([torch.stack(steps), torch.stack(likely)])
            parts = {"prior": -model.prior_term(x), "steps": both[0].mean(0), "reconstruction": both[1].mean(0)}
            for name, value in (parts | {"error": both.sum(0).std(0) / math.sqrt(num_draws)}).items():
                found[name].append(value.double().cpu().numpy())
    result = xr.Dataset({name: ("data", np.concatenate(parts)) for name, parts in found.items()})
    result["elbo"] = result["prior"] + result["steps"] + result["reconstruction"]
    mean, error = float(result["elbo"].mean()), float(np.sqrt((result["error"] ** 2).sum()) / len(data))
    result.attrs = {"units": "nats", "nats_per_datum": -mean, "nats_error": error}
    if model.num_values is not None:
        scale = math.prod(model.shape) * math.log(2)
        result.attrs |= {"bits_per_dim": -mean / scale, "bits_per_dim_error": error / scale}
    return result
