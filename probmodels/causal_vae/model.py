"""A causal variational autoencoder: concepts that cause one another behind images or tables.

Generative model, for data n = 1..N and concepts i = 1..K in the order of a graph::

    noise_ni ~ Normal(0, 1)
    z_ni     = f_i(z_n,parents, noise_ni)                            a mechanism, see `probmodels.guides.causal_vae`
    style_n  ~ Normal(0, 1)                                          what no concept tells, if any
    label_ni ~ Normal(z_ni, label_sd)                                where it is known
    x_n      ~ Normal(decoder(z_n, style_n), sd)

Concepts are deterministic sites by their names, so that `pyro.poutine.do` sets them, and
`probmodels.causal_vae.interventions` does so for fitted models, with the noise abducted by the guide.

Labels and concepts have the density of Yang et al.'s conditional prior ``p(z | u) = Normal(z; u, label_sd)``, which is
the same function of both: a label says where its concept is. The guide infers concepts from observations and from the
labels that are known, so that mechanisms and decoder learn from labels themselves; its proposals from observations
alone are as wide as they are wrong about labels, see `probmodels.guides.causal_vae`.

What the published objective has and a bound on the log likelihood has not can be asked for: ``entropy="paper"`` counts
the entropy of the guide twice, as the divergences of both noise and concepts do; ``equations_weight`` fits mechanisms
to the labels (their l_u), ``mask_weight`` shrinks what mechanisms leave (their l_m).

Without a graph and labels this is a variational autoencoder, with ``beta`` above 1 the beta-VAE of Higgins et al.
(2017), and with labels but no graph one with a conditional prior.

References
----------
Yang, M., Liu, F., Chen, Z., Shen, X., Hao, J. and Wang, J. (2021). CausalVAE: disentangled representation learning via
neural structural causal models. CVPR. https://arxiv.org/abs/2004.08697
Pearl, J. (2009). Causality, 2nd edition. Cambridge University Press.
Komanduri, A., Wu, Y., Huang, W., Chen, F. and Wu, X. (2022). SCM-VAE: learning identifiable causal representations via
structural knowledge. IEEE BigData. https://doi.org/10.1109/BigData55660.2022.10021114 (mechanisms with additive noise)
Higgins, I. et al. (2017). beta-VAE. ICLR. https://openreview.net/forum?id=Sy2fzU9gl
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from annotated_types import Interval
from numpy.typing import NDArray
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from probmodels.datasets.causal import Edges, as_graph, check_concepts, make_concepts, position_of
from probmodels.errors import DataError
from probmodels.guides.causal_vae import MECHANISMS, AbductionGuide, Mechanisms
from probmodels.guides.nets import make_reader, make_writer
from probmodels.inference.problem import Problem
from probmodels.inference.runtime.ops import isolated
from probmodels.options import OneOf, Seed, Width, checked, refuse_unused

__all__ = [
    "ENGINES",
    "REFERENCE",
    "CausalVAE",
    "make_problem",
    "observation_of",
    "tiny",
]

REFERENCE = "Yang et al. (2021), https://arxiv.org/abs/2004.08697"
ENGINES = ("svi",)

NETWORKS = ("mlp", "conv")
ENTROPIES = ("exact", "paper")
_LEAST_SD = 0.01  # of what is observed
_LABEL_SD = 0.005  # of labels of which nothing is said: next to none
_HELD_OUT = 500  # rows of other splits that a problem keeps, to judge what is fitted
_SUPERVISION = ("label", "held_out_label", "held_out_observation")
_KEPT = {"observation", "centre", "scale", "least", "most"}  # what tells data that a problem keeps from others


class CausalVAE(PyroModule):
    """The model.

    Parameters
    ----------
    mechanisms
        Between concepts.
    writer
        From concepts and style (..., concept + style) to data (..., *shape).
    shape
        Shape of a datum.
    names
        Names of the concepts.
    num_style
        Latents beside the concepts.
    label_sd
        Sd of labels around concepts, of all or of each (concept,).
    beta
        Weight of the divergence of the latents.
    equations_weight, mask_weight
        Weights of the published penalties.
    dims
        Names of the axes of a datum.
    squash
        Whether means lie in (0, 1), as of intensities.
    """

    label_sd: Tensor

    def __init__(
        self,
        mechanisms: Mechanisms,
        writer: nn.Module,
        shape: tuple[int, ...],
        names: Sequence[str],
        *,
        num_style: int = 0,
        label_sd: float | Tensor = _LABEL_SD,
        beta: float = 1.0,
        equations_weight: float = 0.0,
        mask_weight: float = 0.0,
        dims: Sequence[str] = (),
        squash: bool = False,
    ) -> None:
        super().__init__()
        self.mechanisms, self.writer, self.shape, self.names = mechanisms, writer, tuple(shape), tuple(names)
        self.num_style, self.beta = num_style, beta
        self.register_buffer("label_sd", torch.as_tensor(label_sd, dtype=torch.get_default_dtype()))
        self.equations_weight, self.mask_weight = equations_weight, mask_weight
        self.axes = _axes(*dims)
        self.squash = squash
        self.log_sd = nn.Parameter(torch.tensor(-1.0))

    def decode(self, latent: Tensor) -> Tensor:
        """Means (..., *shape) of data with concepts and style (..., concept + style)."""
        mean = self.writer(latent.flatten(0, -2)).reshape(*latent.shape[:-1], *self.shape)
        return torch.sigmoid(mean) if self.squash else mean

    @property
    def sd(self) -> Tensor:
        """Standard deviation of data around their means ()."""
        return _LEAST_SD + self.log_sd.exp()

    def equations(self, values: Tensor) -> Tensor:
        """What mechanisms leave of values (data, concept) taken for concepts and causes alike."""
        columns = list(values.unbind(-1))
        return torch.stack([columns[i] - self.mechanisms.location(i, columns) for i in range(len(columns))], -1)

    def forward(
        self, observation: Tensor | None = None, label: Tensor | None = None, known: Tensor | None = None
    ) -> None:
        """Sites ``noise_<name>`` and ``<name>`` (data,), ``style``, ``label`` and ``observation``.

        Parameters
        ----------
        observation
            (data, *shape).
        label
            Labels (data, concept), standardised, of any value where they are not known.
        known
            Whether they are (data, concept).
        """
        assert observation is not None
        with pyro.plate("data", len(observation)) as rows:
            left: list[Tensor] = []

            def drawn(i: int, location: Tensor) -> Tensor:
                with poutine.scale(scale=self.beta):
                    left.append(pyro.sample(f"noise_{self.names[i]}", dist.Normal(torch.zeros_like(location), 1.0)))
                return left[-1]

            concepts = self.mechanisms.propagate(drawn, lambda i, z: pyro.deterministic(self.names[i], z))
            z = torch.stack(torch.broadcast_tensors(*concepts), -1)
            if self.num_style:
                unit = dist.Normal(z.new_zeros(self.num_style), 1.0).to_event(1)
                with poutine.scale(scale=self.beta):
                    style = pyro.sample("style", unit, infer=_axes("style_axis"))
                latent = torch.cat([z, style.expand(*z.shape[:-1], self.num_style)], -1)
            else:
                latent = z
            if self.mask_weight:
                pyro.factor("masks", -self.mask_weight * torch.stack(left, -1).square().sum(-1))
            if label is not None and known is not None:
                seen, there = label[rows], known[rows]
                near = dist.Normal(z, self.label_sd).mask(there).to_event(1)
                pyro.sample("label", near, obs=seen, infer=_axes("concept"))
                if self.equations_weight:
                    whole = there.all(-1).to(z)
                    error = self.equations(seen).square().sum(-1)
                    pyro.factor("equations", -self.equations_weight * whole * error)
            fn = dist.Normal(self.decode(latent), self.sd).to_event(len(self.shape))
            pyro.sample("observation", fn, obs=observation[rows], infer=self.axes)


def _axes(*names: str) -> Any:
    """Names of the event axes of a site."""
    return {"event_dims": list(names)}


_Sd = Annotated[float, Interval(ge=1e-6, le=1e6)]
_Weight = Annotated[float, Interval(ge=0, le=1e6)]


@checked(DataError, keep=True)
def make_problem(
    data: xr.Dataset,
    *,
    graph: Literal["data"] | Edges | None = "data",
    mechanism: Annotated[str, OneOf(MECHANISMS)] = "additive",
    mechanism_hidden: Annotated[int, Interval(ge=1, le=1024)] = 32,
    network: Annotated[str, OneOf(NETWORKS)] = "mlp",
    hidden: Width = 256,
    num_style: Annotated[int, Interval(ge=0, le=10_000)] = 0,
    label_sd: _Sd | Mapping[str, _Sd] = _LABEL_SD,
    label_weight: _Weight = 20.0,
    semi_supervised: bool = False,
    beta: Annotated[float, Interval(gt=0, le=1e6)] = 1.0,
    entropy: Annotated[str, OneOf(ENTROPIES)] = "exact",
    equations_weight: _Weight = 0.0,
    mask_weight: _Weight = 0.0,
    split: Literal["train", "test"] = "train",
    seed: Seed = 0,
) -> Problem:
    """A causal autoencoder of images or tables with labelled concepts.

    Parameters
    ----------
    data
        As `probmodels.datasets.causal.make_concepts` returns it; or what a problem keeps of it, ``problem.data``, whose
        rows are chosen and whose labels are standardised already.
    graph
        ``"data"`` for the one that comes with the data; edges (cause, effect), as an array or as pairs of names; None
        for none.
    mechanism
        ``"additive"``, ``"post_nonlinear"``, ``"linear"`` or ``"masked"``, see `Mechanisms`.
    mechanism_hidden
        Width of the networks in mechanisms other than ``"linear"``.
    network, hidden
        Reader and decoder: ``"mlp"``, or ``"conv"`` for images, and the width of their layers.
    num_style
        Latents beside the concepts, for what these do not tell of the observation.
    label_sd, label_weight
        Sd of labels around concepts, in sds of the concept, for all or by name, 0.005 for others, which takes labels as
        all but exact; weak labels have a large one. And the weight of how well concepts are told from observations,
        beside that of observations without labels, as images have many pixels. A weight of 0 is no supervision.
    semi_supervised
        Whether labels may be missing, as NaN.
    beta
        Weight of the divergence of the latents from their prior.
    entropy
        ``"exact"``, or ``"paper"`` for the published objective, see above.
    equations_weight, mask_weight
        Weights of the published penalties l_u and l_m, see above.
    split
        Rows to take.
    seed
        Seed of the starting values.

    Returns
    -------
    Problem
        For `fit_svi`, best with ``batch_size``.

    Raises
    ------
    DataError
        If data are missing, concepts are constant or not labelled, the graph has a cycle, or an option is out of range
        or not used.
    """
    if mechanism == "linear":
        refuse_unused(make_problem, "mechanism='linear'", mechanism_hidden=mechanism_hidden)
    if not label_weight:
        unused = {"label_sd": label_sd, "semi_supervised": semi_supervised, "equations_weight": equations_weight}
        refuse_unused(make_problem, "label_weight=0", **unused)
    kept = data if set(data.data_vars) >= _KEPT else _standardised(data, split)
    names = [str(name) for name in kept["concept"].values]
    edges = _edges(kept, graph, names)
    kept = kept.assign_coords(cause=names, effect=names).assign(graph=(("cause", "effect"), edges))
    kept = (
        _labelled(kept, semi_supervised=semi_supervised)
        if label_weight
        else kept.drop_vars(_SUPERVISION, errors="ignore")
    )
    table = kept["observation"]
    shape, dims = tuple(table.shape[1:]), [str(dim) for dim in table.dims[1:]]
    if network == "conv" and len(shape) != 3:
        raise DataError(f"network='conv' for data of shape {shape}; it takes images, and 'mlp' takes all")
    size = len(names) + num_style
    with isolated(seed):
        mechanisms = Mechanisms(torch.as_tensor(edges), mechanism, hidden=mechanism_hidden, names=names)
        reader = make_reader(shape, AbductionGuide.num_outputs(len(names), num_style), network=network, hidden=hidden)
        writer = make_writer(shape, size, network=network, hidden=hidden)
    sds = _sds(label_sd, names)
    model = CausalVAE(
        mechanisms,
        writer,
        shape,
        names,
        num_style=num_style,
        label_sd=sds,
        beta=beta,
        equations_weight=equations_weight,
        mask_weight=mask_weight,
        dims=dims,
        squash=len(shape) == 3,
    )
    dtype = torch.get_default_dtype()
    args: tuple[Tensor, ...] = (torch.as_tensor(table.values, dtype=dtype),)
    if "label" in kept:
        label = torch.as_tensor(kept["label"].values, dtype=dtype)
        args += (label.nan_to_num(), ~label.isnan())
    sites = [f"noise_{name}" for name in names] + (["style"] if num_style else [])
    coords: dict[str, Any] = {"concept": names, "cause": names, "effect": names}
    coords |= {dim: list(table[dim].values) for dim in dims if dim in table.coords}
    return Problem(
        name="causal_vae",
        model=model,
        guide=AbductionGuide(
            mechanisms,
            reader,
            names,
            num_style,
            label_sd=sds,
            label_weight=label_weight,
            beta=beta,
            entropy=entropy,
        ),
        args=args,
        coords=coords,
        data=kept,
        batch_plates=("data",),
        loss="TraceMeanField_ELBO" if entropy == "exact" else "Trace_ELBO",
        transient=(*sites, *names) if len(table) > 1000 else (),
    )


def _standardised(data: xr.Dataset, split: str) -> xr.Dataset:
    """Rows of a split, with labels in standard deviations of the training rows', and what these were.

    With the training rows come some of the labelled others, for `probmodels.causal_vae.checks`.
    """
    check_concepts(data)
    rows = (data["split"] == split).values
    if not rows.any():
        raise DataError(f"no row has split={split!r}; choose another, or mark rows with it")
    labels = data["label"].values
    training = labels[(data["split"] == "train").values]
    centre, scale = np.nanmean(training, 0), np.nanstd(training, 0)
    others = np.flatnonzero(~rows & ~np.isnan(labels).all(1)) if split == "train" else np.empty(0, dtype=int)
    if len(others) > _HELD_OUT:
        others = others[np.linspace(0, len(others) - 1, _HELD_OUT).round().astype(int)]
    held_out = {
        "held_out_observation": observation_of(data)[others].rename(data="held_out"),
        "held_out_label": (("held_out", "concept"), (labels[others] - centre) / scale),
    }
    return xr.Dataset(
        {
            "observation": observation_of(data)[rows],
            "label": (("data", "concept"), (labels[rows] - centre) / scale),
            "centre": ("concept", centre),
            "scale": ("concept", scale),
            "least": ("concept", np.nanmin(training, 0)),
            "most": ("concept", np.nanmax(training, 0)),
            **({"graph": data["graph"]} if "graph" in data else {}),
            **(held_out if len(others) else {}),
        },
        coords={"concept": [str(name) for name in data["concept"].values]},
        attrs=data.attrs,
    )


def _labelled(kept: xr.Dataset, *, semi_supervised: bool) -> xr.Dataset:
    """The same, with labels checked."""
    if "label" not in kept:
        raise DataError("the data keep no labels; give label_weight=0, or the data that they were made from")
    missing = np.isnan(kept["label"].values)
    if missing.any() and not semi_supervised:
        row, column = (int(i) for i in np.argwhere(missing)[0])
        raise DataError(
            f"concept {str(kept['concept'].values[column])!r} has no label at row {row} of those taken; give "
            "semi_supervised=True, or drop such rows"
        )
    return kept


def _sds(given: float | Mapping[str, float], names: Sequence[str]) -> float | Tensor:
    """Sd of the labels, of all or of each concept."""
    if not isinstance(given, Mapping):
        return given
    for name in given:
        position_of(name, names)
    return torch.tensor([float(given.get(name, _LABEL_SD)) for name in names])


def observation_of(data: xr.Dataset) -> xr.DataArray:
    """Images (data, channel, row, column) or a table (data, feature)."""
    return data["image"] if "image" in data else data["observation"]


def _edges(data: xr.Dataset, graph: Edges | str | None, names: Sequence[str]) -> NDArray[np.int8]:
    """(cause, effect)."""
    if graph is None:
        return np.zeros((len(names), len(names)), dtype=np.int8)
    if isinstance(graph, str):
        if "graph" not in data:
            raise DataError("graph='data': the data come without one; give an array, pairs of names, or None")
        graph = data["graph"]
    return as_graph(graph, names)


def tiny() -> Problem:
    """Sixteen rows of three concepts in a chain, and a table of five numbers, for the conformance tests."""
    rng = np.random.default_rng(0)
    first = rng.normal(size=16)
    second = first**2 + 0.1 * rng.normal(size=16)
    values = np.stack([first, second, np.tanh(second) + 0.1 * rng.normal(size=16)], -1)
    graph = np.eye(3, k=1)
    table = values @ rng.normal(size=(3, 5))
    data = make_concepts(table, values, names=["a", "b", "c"], graph=graph)
    return make_problem(data, hidden=8, mechanism_hidden=4, num_style=1)
