"""The published sampler on a problem of ours, for comparison in one result format."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from probmodels.bayesian_svd.model import MatrixData
from probmodels.bayesian_svd.published.sampler import PublishedGibbs
from probmodels.distributions.covariance import time_distance
from probmodels.errors import ProblemError
from probmodels.inference.problem import Problem
from probmodels.options import checked

__all__ = ["PublishedOnProblem", "published_gibbs"]


class PublishedOnProblem(PublishedGibbs):
    """`PublishedGibbs` whose kept draws are in the base coordinates and units of a `Problem`.

    Parameters
    ----------
    problem
        Problem of `probmodels.bayesian_svd.make_problem`, see `published_gibbs`.
    """

    def __init__(self, problem: Problem) -> None:
        from probmodels.bayesian_svd.effects import time_in_years
        from probmodels.bayesian_svd.sides import space_distance

        if not problem.args or not isinstance(problem.args[0], MatrixData) or problem.data is None:
            raise ProblemError(
                f"the published sampler runs on problems of bayesian_svd.make_problem, not {problem.name!r}"
            )
        data: MatrixData = problem.args[0]
        self._bases = {"U": data.space.basis.numpy(), "V": data.time.basis.numpy()}
        if any(basis.shape[0] != basis.shape[1] for basis in self._bases.values()):
            raise ProblemError(
                "the published sampler moves full vectors, but this problem works on truncated or restricted bases: "
                "make it with tail=0, and with fixed_effects=() or a proper prior such as effect_scale=10"
            )
        if data.gaps is not None or len(data.shared):
            raise ProblemError(
                "the published sampler knows neither gaps nor effects shared by all cells; fill or drop them"
            )
        self._weight = np.sqrt(data.weight.numpy())[:, None]
        kernels = {name: str(problem.data.attrs[f"kernel_{name}"]) for name in ("space", "time")}
        scales = {name: side.length_scales.numpy() for name, side in (("space", data.space), ("time", data.time))}
        design = problem.data["fixed_effects_design"].values if data.design.shape[1] else None
        super().__init__(
            problem.data["data"].values * self._weight,
            space_distance(problem.data["data"]).numpy(),
            time_distance(time_in_years(problem.data["time"])).numpy(),
            data.space.log_weights.shape[0],
            kernel_space=kernels["space"],
            kernel_time=kernels["time"],
            bounds_space=_bounds(scales["space"]),
            bounds_time=_bounds(scales["time"]),
            length_scale_space=float(np.median(scales["space"])) or None,
            length_scale_time=float(np.median(scales["time"])) or None,
            covariates=design,
        )

    def export(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """The draw as the model names it."""
        out = {name: value for name, value in params.items() if name != "beta"}
        for name, basis in self._bases.items():
            out[name] = torch.from_numpy(basis.T @ params[name].numpy())
        if "beta" in params:
            out["fixed_effects"] = torch.from_numpy(params["beta"].numpy() / self._weight)
        return out


@checked(ProblemError)
def published_gibbs(problem: Problem) -> PublishedOnProblem:
    """Kernel of the published conditionals: ``run_mcmc(problem, kernel=published_gibbs)``.

    What it samples is no posterior; see `PublishedGibbs`. The problem has to be complete, on full-rank bases, with one
    kernel a side, and its local effects must have a proper prior, for which the paper's Normal(0, 100) is then taken.

    Raises
    ------
    ProblemError
        If the problem is none of these.
    """
    return PublishedOnProblem(problem)


def _bounds(length_scales: np.ndarray) -> tuple[float, float] | None:
    return (float(length_scales.min()), float(length_scales.max())) if len(length_scales) > 1 else None
