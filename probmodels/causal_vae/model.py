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
the same function of both: a label says where its concept is. What the published objective has and a bound on the log
likelihood has not can be asked for: ``entropy="paper"`` counts the entropy of the guide twice, as the divergences of
both noise and concepts do; ``equations_weight`` fits mechanisms to the labels (their l_u), ``mask_weight`` shrinks what
mechanisms leave (their l_m).

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

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from probmodels.datasets.causal import as_graph, check_concepts, make_concepts, position_of
from probmodels.errors import DataError, ResultError
from probmodels.guides.causal_vae import MECHANISMS, AbductionGuide, Mechanisms
from probmodels.guides.nets import make_reader, make_writer
from probmodels.inference.problem import Problem
from probmodels.inference.result import Result
from probmodels.inference.runtime.ops import isolated
from probmodels.options import check_counts

if TYPE_CHECKING:
    pass

__all__ = [
    "ENGINES",
    "REFERENCE",
    "CausalVAE",
    "fitted_model",
    "fitted_problem",
    "make_problem",
    "observation_of",
    "tiny",
]

REFERENCE = "Yang et al. (2021), https://arxiv.org/abs/2004.08697"
ENGINES = ("svi",)

NETWORKS = ("mlp", "conv")
ENTROPIES = ("exact", "paper")
_LEAST_SD = 0.01  # of what is observed
_LABEL_SD = 0.1  # of labels of which nothing is said


class CausalVAE(PyroModule):
    """The model.

    Parameters
    ----------
    mechanisms
        Between concepts.
    writer
        From concepts and style (..., concept + style) to data (..., *shape).
    shape
        Of a datum.
    names
        Of the concepts.
    num_style
        Latents beside the concepts.
    label_sd, label_weight
        Sd of labels around concepts, of all or of each (concept,), and what their log density is multiplied by.
    beta
        Weight of the divergence of the latents.
    equations_weight, mask_weight
        Of the published penalties.
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
        label_sd: float | Tensor = 0.1,
        label_weight: float = 1.0,
        beta: float = 1.0,
        equations_weight: float = 0.0,
        mask_weight: float = 0.0,
        dims: Sequence[str] = (),
        squash: bool = False,
    ) -> None:
        super().__init__()
        self.mechanisms, self.writer, self.shape, self.names = mechanisms, writer, tuple(shape), tuple(names)
        self.num_style, self.label_weight, self.beta = num_style, label_weight, beta
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
        """Of data around their means ()."""
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
                    style = pyro.sample("style", unit, infer=_axes("style"))
                latent = torch.cat([z, style.expand(*z.shape[:-1], self.num_style)], -1)
            else:
                latent = z
            if self.mask_weight:
                pyro.factor("masks", -self.mask_weight * torch.stack(left, -1).square().sum(-1))
            if label is not None and known is not None and self.label_weight:
                seen, there = label[rows], known[rows]
                with poutine.scale(scale=self.label_weight):
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


def make_problem(
    data: xr.Dataset,
    *,
    graph: Any = "data",
    mechanism: str = "additive",
    mechanism_hidden: int = 32,
    network: str = "mlp",
    hidden: int = 256,
    num_style: int = 0,
    label_sd: float | Mapping[str, float] = 0.1,
    label_weight: float = 20.0,
    semi_supervised: bool = False,
    beta: float = 1.0,
    entropy: str = "exact",
    equations_weight: float = 0.0,
    mask_weight: float = 0.0,
    split: str = "train",
    seed: int = 0,
) -> Problem:
    """A causal autoencoder of images or tables with labelled concepts.

    Parameters
    ----------
    data
        As `probmodels.datasets.causal.make_concepts` returns it.
    graph
        ``"data"`` for the one that comes with the data; edges (cause, effect), as an array or as pairs of names; None
        for none.
    mechanism
        ``"additive"``, ``"post_nonlinear"``, ``"linear"`` or ``"masked"``, see `Mechanisms`.
    mechanism_hidden
        Width of the networks in mechanisms.
    network, hidden
        Reader and decoder: ``"mlp"``, or ``"conv"`` for images, and the width of their layers.
    num_style
        Latents beside the concepts, for what these do not tell of the observation.
    label_sd, label_weight
        Sd of labels around concepts, in sds of the concept, for all or by name, 0.1 for others: weak labels have
        a large one. And the power of their density: images have so many pixels that labels of weight 1 would hardly
        count. A weight of 0 is no supervision.
    semi_supervised
        Whether labels may be missing, as NaN.
    beta
        Weight of the divergence of the latents from their prior.
    entropy
        ``"exact"``, or ``"paper"`` for the published objective, see above.
    equations_weight, mask_weight
        Of the published penalties l_u and l_m, see above.
    split
        Rows to take.
    seed
        Of the starting values.

    Returns
    -------
    Problem
        For `fit_svi`, best with ``batch_size``.

    Raises
    ------
    DataError
        If data are missing, concepts are constant or not labelled, the graph has a cycle, or an option is out of range.
    """
    options = {name: value for name, value in locals().items() if name not in ("data", "split", "graph")}
    check_concepts(data)
    check_counts(1, mechanism_hidden=mechanism_hidden, hidden=hidden)
    check_counts(0, num_style=num_style)
    _check_options(options)
    names = [str(name) for name in data["concept"].values]
    for name in label_sd if isinstance(label_sd, Mapping) else ():
        position_of(name, names)
    edges = _edges(data, graph, names)
    table = observation_of(data)
    if network == "conv" and table.ndim != 4:
        raise DataError(f"network='conv' for data of shape {table.shape[1:]}; it takes images, and 'mlp' takes all")
    rows = (data["split"] == split).values
    if not rows.any():
        known = ", ".join(repr(str(name)) for name in np.unique(data["split"].values))
        raise DataError(f"no row has split={split!r}; choose among {known}")
    labels = data["label"].values
    training = labels[(data["split"] == "train").values]
    centre, scale = np.nanmean(training, 0), np.nanstd(training, 0)
    missing = np.isnan(labels[rows])
    if missing.any() and label_weight and not semi_supervised:
        row, column = (int(i) for i in np.argwhere(missing)[0])
        raise DataError(
            f"concept {names[column]!r} has no label at row {row} of split={split!r}; give semi_supervised=True, or "
            "drop such rows"
        )
    kept = xr.Dataset(
        {
            "observation": table[rows],
            "label": (("data", "concept"), (labels[rows] - centre) / scale),
            "graph": (("cause", "effect"), edges.astype(np.int8)),
            "centre": ("concept", centre),
            "scale": ("concept", scale),
            "least": ("concept", np.nanmin(training, 0)),
            "most": ("concept", np.nanmax(training, 0)),
        },
        coords={"concept": names, "cause": names, "effect": names},
        attrs=data.attrs | {"options": json.dumps(options)},
    )
    return _problem(kept if label_weight else kept.drop_vars("label"), options)


def _problem(kept: xr.Dataset, options: Mapping[str, Any]) -> Problem:
    """Of what a problem keeps of its data, and options of `make_problem`."""
    table, names = kept["observation"], [str(name) for name in kept["concept"].values]
    shape, dims = tuple(table.shape[1:]), [str(dim) for dim in table.dims[1:]]
    size, network = len(names) + options["num_style"], {key: options[key] for key in ("network", "hidden")}
    with isolated(options["seed"]):
        mechanisms = Mechanisms(
            torch.as_tensor(kept["graph"].values),
            options["mechanism"],
            hidden=options["mechanism_hidden"],
            names=names,
        )
        reader = make_reader(shape, 2 * size, **network)
        writer = make_writer(shape, size, **network)
    weights = ("num_style", "label_sd", "label_weight", "beta", "equations_weight", "mask_weight")
    chosen = {key: options[key] for key in weights}
    if isinstance(options["label_sd"], Mapping):
        chosen["label_sd"] = torch.tensor([options["label_sd"].get(name, _LABEL_SD) for name in names])
    model = CausalVAE(mechanisms, writer, shape, names, dims=dims, squash=len(shape) == 3, **chosen)
    guide = AbductionGuide(
        mechanisms, reader, names, options["num_style"], beta=options["beta"], entropy=options["entropy"]
    )
    dtype = torch.get_default_dtype()
    args: tuple[Tensor, ...] = (torch.as_tensor(table.values, dtype=dtype),)
    if "label" in kept:
        label = torch.as_tensor(kept["label"].values, dtype=dtype)
        args += (label.nan_to_num(), ~label.isnan())
    sites = [f"noise_{name}" for name in names] + (["style"] if options["num_style"] else [])
    coords: dict[str, Any] = {"concept": names, "cause": names, "effect": names}
    coords |= {dim: list(table[dim].values) for dim in dims if dim in table.coords}
    return Problem(
        name="causal_vae",
        model=model,
        guide=guide,
        args=args,
        coords=coords,
        data=kept,
        batch_plates=("data",),
        loss="TraceMeanField_ELBO" if options["entropy"] == "exact" else "Trace_ELBO",
        transient=tuple([*sites, *names]) if len(table) > 1000 else (),
    )


def fitted_problem(result: Result, num_rows: int | None = None) -> Problem:
    """The problem that a result is of, from a file too, with the fitted parameters in its model and guide.

    Parameters
    ----------
    result
        Of `make_problem` and `fit_svi`.
    num_rows
        How many of the data it shall have, at most, at equal distances; None for all.

    Raises
    ------
    ResultError
        If the result is not one of it.
    """
    groups = [result.tree[name].to_dataset() for name in ("observed_data", "constant_data") if name in result.tree]
    if result.tree.attrs.get("method") != "causal_vae" or not any("options" in group.attrs for group in groups):
        raise ResultError("the result is not one of a causal model made by probmodels.causal_vae.make_problem")
    kept = xr.merge(groups, compat="override", join="outer", combine_attrs="override")
    if num_rows is not None and num_rows < kept.sizes["data"]:
        kept = kept.isel(data=np.linspace(0, kept.sizes["data"] - 1, num_rows).round().astype(int))
    problem = _problem(kept, json.loads(kept.attrs["options"]))
    state = {name.replace("$$$", "."): value for name, value in result.params().items()}
    if "table" in state:
        raise ResultError(
            "the result holds proposals that were refined for their data, and no reader of others; give the one that "
            "was refined, or use it with the problem that refine returned"
        )
    like = next(iter(state.values()))
    for part in (problem.model, problem.guide):
        assert isinstance(part, nn.Module)
        part.to(like).load_state_dict({name: state.get(name, value) for name, value in part.state_dict().items()})
    return replace(problem, args=tuple(arg.to(like) if arg.is_floating_point() else arg for arg in problem.args))


def fitted_model(result: Result) -> CausalVAE:
    """The fitted model alone, see `fitted_problem`."""
    model = fitted_problem(result, 1).model
    assert isinstance(model, CausalVAE)
    return model.requires_grad_(False).eval()


def observation_of(data: xr.Dataset) -> xr.DataArray:
    """Images (data, channel, row, column) or a table (data, feature)."""
    return data["image"] if "image" in data else data["observation"]


def _edges(data: xr.Dataset, graph: Any, names: Sequence[str]) -> np.ndarray:
    """(cause, effect)."""
    if graph is None:
        return np.zeros((len(names), len(names)), dtype=np.int8)
    if isinstance(graph, str):
        if graph != "data" or "graph" not in data:
            why = "the data come without one" if graph == "data" else "choose 'data'"
            raise DataError(f"graph={graph!r}: {why}; or give edges as an array or as pairs of names, or None")
        graph = data["graph"].values
    return as_graph(graph, names)


def _check_options(options: Mapping[str, Any]) -> None:
    """See that names are known and numbers in range."""
    for name, known in (("mechanism", MECHANISMS), ("network", NETWORKS), ("entropy", ENTROPIES)):
        if options[name] not in known:
            raise DataError(f"{name}={options[name]!r}; choose one of {known}")
    given = options["label_sd"]
    for sd in given.values() if isinstance(given, Mapping) else (given,):
        if not 0 < sd < math.inf:
            raise DataError(f"label_sd={given}; it must be positive")
    if not 0 < options["beta"] < math.inf:
        raise DataError(f"beta={options['beta']}; it must be positive")
    for name in ("label_weight", "equations_weight", "mask_weight"):
        if not 0 <= options[name] < math.inf:
            raise DataError(f"{name}={options[name]}; it must not be negative")


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
