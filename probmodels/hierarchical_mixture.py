"""A mixture of flowers: super-clusters, each a ring of petals of a known shape, in which normal points lie.

Generative model, for points n = 1..N in the plane, C super-clusters and J petals of each::

    cluster_n ~ Categorical(weights),  petal_n ~ Categorical(petal_weights)
    x_n ~ Normal(mean[cluster_n] + offset[petal_n], sigma^2 I)

The offsets lie on a circle, offset_j = radius (cos a_j, sin a_j) with a_j = (j + 1/2) 2 pi / J. The means are
parameters; weights and sigma are, if asked for. Petals of different super-clusters may lie at one place, so that
cluster and petal depend on each other given the point: a factorised posterior moves the means to other places than the
exact one does. The guide draws the cluster given the point and the petal given both.

References
----------
Hu, E. J., Malkin, N., Jain, M., Everett, K., Graikos, A. and Bengio, Y. (2023). GFlowNet-EM for learning compositional
latent variable models. ICML. https://arxiv.org/abs/2302.06576
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from annotated_types import Interval
from numpy.typing import NDArray
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

from probmodels.datasets.petals import petal_offsets, simulate_petals
from probmodels.errors import DataError
from probmodels.guides.gflownet import make_policy
from probmodels.guides.policy_networks import NETWORKS
from probmodels.inference.diagnostics.findings import Finding
from probmodels.inference.diagnostics.guides import judge_evidence
from probmodels.inference.flows.balance import VarGrad
from probmodels.inference.problem import Problem
from probmodels.inference.result import Result
from probmodels.options import OneOf, Seed, Width, checked, refuse_unused

__all__ = ["ENGINES", "REFERENCE", "HierarchicalMixture", "check_draws", "make_problem", "tiny"]

REFERENCE = "Hu et al. (2023), https://arxiv.org/abs/2302.06576"
ENGINES = ("em",)

_Length = Annotated[float, Interval(gt=0, le=1e9)]  # squares stay within single precision


class HierarchicalMixture(PyroModule):
    """The model.

    Parameters
    ----------
    means
        Means of super-clusters at the start (cluster, axis).
    offsets
        Offsets of petals from them (petal, axis).
    sigma
        Standard deviation of points around their petal.
    learn_sigma, learn_weights
        Whether these are parameters, beside the means.
    """

    def __init__(
        self,
        means: Tensor,
        offsets: Tensor,
        sigma: float,
        *,
        learn_sigma: bool = False,
        learn_weights: bool = False,
    ) -> None:
        super().__init__()
        self.means: Any = PyroParam(means.clone())
        self.register_buffer("offsets", offsets.clone())
        self.sigma: Any
        scale = torch.as_tensor(sigma, dtype=means.dtype, device=means.device)
        if learn_sigma:
            self.sigma = PyroParam(scale, constraints.positive)
        else:
            self.register_buffer("sigma", scale)
        for name, size in (("weights", len(means)), ("petal_weights", len(offsets))):
            equal = means.new_full((size,), 1 / size)
            if learn_weights:
                setattr(self, name, PyroParam(equal, constraints.simplex))
            else:
                self.register_buffer(name, equal)

    def forward(self, x: Tensor) -> None:
        """Sites ``cluster``, ``petal`` (data,) and ``x`` (data, axis); the argument holds the points."""
        axis: Any = {"event_dims": ["axis"]}
        with pyro.plate("data", len(x)) as rows:
            cluster = pyro.sample("cluster", dist.Categorical(self.weights))
            petal = pyro.sample("petal", dist.Categorical(self.petal_weights))
            middle = self.means[cluster] + self.offsets[petal]
            pyro.sample("x", dist.Normal(middle, self.sigma).to_event(1), obs=x[rows], infer=axis)

    def log_joint(self, x: Tensor) -> Tensor:
        """Log density (data, cluster, petal) of points (data, axis) with every cluster and petal.

        Its logsumexp over the last two axes is the log likelihood, its softmax the exact posterior.
        """
        middle = self.means.unsqueeze(1) + self.offsets
        density = dist.Normal(middle, self.sigma).log_prob(x[:, None, None]).sum(-1)
        return density + self.weights.log().unsqueeze(-1) + self.petal_weights.log()


@checked(DataError, keep=True)
def make_problem(
    data: xr.Dataset | xr.DataArray,
    *,
    num_clusters: Annotated[int, Interval(ge=2, le=10_000)] = 4,
    num_petals: Annotated[int, Interval(ge=2, le=10_000)] = 4,
    sigma: _Length = 0.25,
    radius: _Length = 1.0,
    init: Sequence[Sequence[float]] | None = None,
    learn_sigma: bool = False,
    learn_weights: bool = False,
    network: Annotated[str, OneOf(NETWORKS)] | None = None,
    hidden: Width = 64,
    num_particles: Annotated[int, Interval(ge=2, le=10_000)] = 4,
    log_z: bool = False,
    seed: Seed = 0,
) -> Problem:
    """Super-clusters of petals for points in the plane.

    Parameters
    ----------
    data
        Points (data, axis), two numbers each; in a Dataset, the variable ``x``.
    num_clusters, num_petals
        Super-clusters, and petals of each.
    sigma
        Standard deviation of points around their petal, the starting one where it is learned.
    radius
        Distance of a petal from the mean of its super-cluster.
    init
        Where the means start (num_clusters, 2); None for points of the data.
    learn_sigma, learn_weights
        Whether ``sigma``, and the probabilities of super-clusters and petals, are learned as well.
    network, hidden
        Network and width of the guide, an autoregressive policy; see `probmodels.guides.gflownet`.
    num_particles
        Draws of each step of the guide, by whose variance it is judged.
    log_z
        Whether the guide has a site ``log_Z``, which objectives such as `TrajectoryBalance` need.
    seed
        Seed of the choice of points that the means start from.

    Returns
    -------
    Problem
        For `fit_em`, whose default phases move guide and means by turns; plate ``data`` may be subsampled.

    Raises
    ------
    DataError
        If the points are not finite pairs, there are fewer than super-clusters, or an option is out of range or not
        used.
    """
    points = _points(data)
    if num_clusters > len(points):
        raise DataError(f"num_clusters={num_clusters} is out of range: there are {len(points)} points")
    if init is None:
        start = points.values[np.random.default_rng(seed).choice(len(points), num_clusters, replace=False)]
    else:
        refuse_unused(make_problem, "init", seed=seed)
        start = _starts(init, num_clusters)
    dtype = torch.get_default_dtype()
    means, offsets = (torch.as_tensor(value, dtype=dtype) for value in (start, petal_offsets(num_petals, radius)))
    model = HierarchicalMixture(means, offsets, sigma, learn_sigma=learn_sigma, learn_weights=learn_weights)
    known: Any = data if isinstance(data, xr.Dataset) else xr.Dataset()
    problem = Problem(
        name="hierarchical_mixture",
        model=model,
        args=(torch.as_tensor(points.values, dtype=dtype),),
        coords={
            "data": list(points["data"].values),
            "axis": list(points["axis"].values),
        },
        data=known.assign(x=points),
        batch_plates=("data",),
        loss=VarGrad(num_particles),
    )
    return replace(problem, guide=make_policy(problem, network=network, hidden=hidden, log_z=log_z))


def check_draws(result: Result) -> Iterator[Finding]:
    """Findings on the guide by the exact evidence of every point, a sum over flowers and petals."""
    problem = result.rebuild()
    model: Any = problem.model
    for name, value in result.params().items():
        if name in ("means", "sigma", "weights", "petal_weights"):
            setattr(model, name, value)
    with torch.no_grad():
        evidence = model.log_joint(problem.args[0].to(model.means)).flatten(1).logsumexp(-1)
    yield from judge_evidence(result.tree, evidence.double().numpy())


def tiny() -> Problem:
    """Twenty points around two pairs of petals, for the conformance tests."""
    data = simulate_petals(20, num_clusters=2, num_petals=2)
    return make_problem(data, num_clusters=2, num_petals=2, learn_sigma=True, learn_weights=True, hidden=4)


def _starts(init: Sequence[Sequence[float]], num_clusters: int) -> NDArray[np.float64]:
    """Means (cluster, axis) that were given."""
    if len(init) != num_clusters or any(len(row) != 2 for row in init):
        lengths = ", ".join(str(len(row)) for row in init)
        raise DataError(f"init has rows of {lengths or 'no'} numbers; give {num_clusters} pairs of numbers")
    return np.asarray(init, dtype=np.float64)


def _points(data: xr.Dataset | xr.DataArray) -> xr.DataArray:
    """Points (data, axis), finite."""
    if isinstance(data, xr.Dataset):
        if "x" not in data:
            raise DataError(f"data has no variable 'x', the points (data, axis); it has {list(data.data_vars)}")
        data = data["x"]
    if data.ndim != 2 or data.shape[1] != 2 or not data.shape[0]:
        raise DataError(f"points have shape {data.shape}; give pairs of numbers, dims (data, axis)")
    if data.dtype.kind not in "iuf":
        raise DataError(f"points are of type {data.dtype}; give pairs of numbers, dims (data, axis)")
    wrong = np.argwhere(~np.isfinite(data.values))
    if len(wrong):
        raise DataError(f"point {int(wrong[0][0])} is {data.values[wrong[0][0]]}; drop points with missing numbers")
    return data.rename(dict(zip(data.dims, ("data", "axis"), strict=True)))
