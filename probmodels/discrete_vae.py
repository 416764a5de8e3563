"""A discrete variational autoencoder: binary images from a few codes, which explain an image together.

Generative model, for images n = 1..N, L latents of K codes each, and pixels d::

    code_nl ~ Categorical(1/K, ..., 1/K)
    image_nd ~ Bernoulli(sigmoid(decoder(code_n)_d))
    decoder(code) = MLP(embedding[1, code_1], ..., embedding[L, code_L])

Embeddings and network are parameters. All latents meet in one network, so that they depend on each other given the
image: the guide draws one given those before it. One that draws each from the image alone is there to compare with.

With few codes the log likelihood is a sum over all K^L states, `exact_log_likelihood`; with many it is estimated by
draws of the guide, `probmodels.inference.check_weights`.

References
----------
Hu, E. J., Malkin, N., Jain, M., Everett, K., Graikos, A. and Bengio, Y. (2023). GFlowNet-EM for learning compositional
latent variable models. ICML. https://arxiv.org/abs/2302.06576
van den Oord, A., Vinyals, O. and Kavukcuoglu, K. (2017). Neural discrete representation learning. NeurIPS 30.
https://arxiv.org/abs/1711.00937
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from annotated_types import Interval
from pyro.nn import PyroModule
from torch import Tensor, nn

from probmodels.datasets.images import check_images, make_images
from probmodels.errors import DataError, ResultError
from probmodels.guides.gflownet import make_policy
from probmodels.guides.policy_networks import NETWORKS
from probmodels.inference.diagnostics.evidence import check_weights
from probmodels.inference.diagnostics.findings import Finding
from probmodels.inference.diagnostics.guides import judge_evidence
from probmodels.inference.flows.balance import VarGrad
from probmodels.inference.problem import Problem
from probmodels.inference.programs.programs import fitted
from probmodels.inference.result import Result
from probmodels.inference.runtime.ops import isolated
from probmodels.options import Layers, OneOf, Seed, Width, checked
from probmodels.outputs import Dpi, Outputs, loss_figure, write_all

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "ENGINES",
    "REFERENCE",
    "DiscreteVAE",
    "check_draws",
    "check_model",
    "code_usage",
    "exact_log_likelihood",
    "make_problem",
    "tiny",
    "write_outputs",
]

REFERENCE = "Hu et al. (2023), https://arxiv.org/abs/2302.06576"
ENGINES = ("em",)

_MOST_STATES = 2**20  # whose sum is worth waiting for
_SUMMED = 2**16  # states that the outputs sum over
_FEWEST = 10  # images held out
_JUDGED = 1000  # images whose log likelihood goes to the outputs
_SHOWN = 12  # images in a row of a figure
_BLOCK = 4_000_000  # entries of a table of images and states that are held at a time


class DiscreteVAE(PyroModule):
    """The model.

    Parameters
    ----------
    num_latents, num_codes
        Number of latents, and of values of each.
    shape
        Rows and columns of an image.
    embedding
        Length of the vector of a code.
    hidden, layers
        Width and number of hidden layers of the decoder; 0 layers for a linear one.
    """

    def __init__(
        self,
        num_latents: int,
        num_codes: int,
        shape: tuple[int, int],
        *,
        embedding: int = 8,
        hidden: int = 128,
        layers: int = 2,
    ) -> None:
        super().__init__()
        self.num_latents, self.num_codes, self.shape = num_latents, num_codes, tuple(shape)
        self.embedding = nn.Parameter(torch.randn(num_latents, num_codes, embedding) / 2)
        widths = [num_latents * embedding, *[hidden] * layers]
        steps = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
        self.network = nn.Sequential(*steps, nn.Linear(widths[-1], math.prod(shape)))

    def decode(self, code: Tensor) -> Tensor:
        """Log odds (..., row, column) of pixels from codes (..., latent)."""
        vectors = self.embedding[torch.arange(self.num_latents, device=code.device), code]
        return self.network(vectors.flatten(-2)).unflatten(-1, self.shape)

    def forward(self, image: Tensor) -> None:
        """Sites ``code`` (data, latent) and ``image`` (data, row, column); the argument holds the images."""
        logits = image.new_zeros(self.num_latents, self.num_codes)
        codes = dist.Categorical(logits=logits).to_event(1)
        latent: Any = {"event_dims": ["latent"]}
        axes: Any = {"event_dims": ["row", "column"]}
        with pyro.plate("data", len(image)) as rows:
            code = pyro.sample("code", codes, infer=latent)
            pixels = dist.Bernoulli(logits=self.decode(code)).to_event(2)
            pyro.sample("image", pixels, obs=image[rows], infer=axes)

    def states(self) -> Iterator[Tensor]:
        """All codes (state, latent), in blocks, the last latent fastest."""
        total = self.num_codes**self.num_latents
        size = max(1, min(total, _BLOCK // math.prod(self.shape)))
        place = self.num_codes ** torch.arange(self.num_latents - 1, -1, -1, device=self.embedding.device)
        for block in torch.arange(total, device=self.embedding.device).split(size):
            yield block.unsqueeze(-1) // place % self.num_codes

    def log_joint(self, image: Tensor, code: Tensor) -> Tensor:
        """Log density (data, state) of images (data, row, column) with codes (state, latent)."""
        logits = self.decode(code).flatten(1)
        # log Bernoulli(x; l) = x l - log(1 + exp(l)), so that one product serves all pairs.
        density = image.flatten(1) @ logits.mT - nn.functional.softplus(logits).sum(-1)
        return density - self.num_latents * math.log(self.num_codes)

    def log_likelihood(self, image: Tensor) -> Tensor:
        """Exact log likelihood (data,) of images (data, row, column), a sum over all states."""
        found = []
        for block in self.states():
            parts = image.split(max(1, _BLOCK // len(block)))
            found.append(torch.cat([self.log_joint(part, block).logsumexp(-1) for part in parts]))
        return torch.stack(found).logsumexp(0)


@checked(DataError, keep=True)
def make_problem(
    data: xr.Dataset,
    *,
    num_latents: Annotated[int, Interval(ge=1, le=1000)] = 4,
    num_codes: Annotated[int, Interval(ge=2, le=10_000)] = 8,
    embedding: Annotated[int, Interval(ge=1, le=1000)] = 8,
    hidden: Width = 128,
    layers: Layers = 2,
    network: Annotated[str, OneOf(NETWORKS)] | None = None,
    guide_hidden: Width = 128,
    guide_layers: Layers = 1,
    num_particles: Annotated[int, Interval(ge=2, le=10_000)] = 4,
    log_z: bool = False,
    split: str = "train",
    seed: Seed = 0,
) -> Problem:
    """A discrete autoencoder of binary images.

    Parameters
    ----------
    data
        Images as `probmodels.datasets.images` describes them, pixels 0 and 1.
    num_latents, num_codes
        Latents of an image, and values of each.
    embedding, hidden, layers
        Length of the vector of a code, width and number of hidden layers of the decoder.
    network, guide_hidden, guide_layers
        Network of the guide, see `probmodels.guides.gflownet`: ``"mlp"`` or ``"gru"`` for codes that are drawn one
        given the others, ``"independent"`` for codes from the image alone; its width, and the number of layers that
        read the image before.
    num_particles
        Draws of each step of the guide, by whose variance it is judged.
    log_z
        Whether the guide has a site ``log_Z``, which objectives such as `TrajectoryBalance` need.
    split
        Images to take: those to fit, or with the options of a fit those to judge it by.
    seed
        Seed of the starting values of the decoder.

    Returns
    -------
    Problem
        For `fit_em`, whose default phases move guide and decoder by turns; plate ``data`` may be subsampled.

    Raises
    ------
    DataError
        If the images are not binary, none has the split, or an option is out of range.
    """
    check_images(data)
    rows = (data["split"] == split).values
    if not rows.any():
        known = ", ".join(repr(str(name)) for name in np.unique(data["split"].values))
        raise DataError(f"no image has split={split!r}; choose among {known}")
    chosen = data.isel(data=rows)
    image = torch.as_tensor(chosen["image"].values, dtype=torch.get_default_dtype())
    with isolated(seed):
        shape = (image.shape[1], image.shape[2])
        model = DiscreteVAE(num_latents, num_codes, shape, embedding=embedding, hidden=hidden, layers=layers)
    kept = chosen
    if split == "train" and not rows.all():
        others = data["image"].values[~rows]
        kept = kept.assign(held_out_image=(("held_out", "row", "column"), others.astype(np.uint8)))
    problem = Problem(
        name="discrete_vae",
        model=model,
        args=(image,),
        coords={"data": list(chosen["data"].values)},
        data=kept,
        batch_plates=("data",),
        loss=VarGrad(num_particles),
    )
    guide = make_policy(problem, network=network, hidden=guide_hidden, encoder=guide_layers, log_z=log_z)
    return replace(problem, guide=guide)


@checked(ResultError)
def exact_log_likelihood(problem: Problem, result: Result) -> xr.DataArray:
    """Log likelihood of every image, exact: a sum over all states of the latents.

    Parameters
    ----------
    problem
        The problem that was fitted, or one of other images, as ``make_problem(data, split="test")`` makes it.
    result
        Result of `fit_em`.

    Returns
    -------
    xr.DataArray
        In nats (data,).

    Raises
    ------
    DataError
        If there are more than a million states.
    ResultError
        If the result is not one of this problem.
    """
    model: Any
    with fitted(problem, result.guide_state or {}, seed=0) as (model, _), torch.no_grad():
        total = model.num_codes**model.num_latents
        if total > _MOST_STATES:
            raise DataError(
                f"{model.num_codes} codes of {model.num_latents} latents have {total:,} states, too many to sum over; "
                "take probmodels.inference.check_weights, which draws from the guide"
            )
        values = model.log_likelihood(problem.args[0])
    return xr.DataArray(values.double().cpu().numpy(), {"data": np.asarray(problem.coords["data"])}, ("data",))


@checked(ResultError)
def write_outputs(result: Result, folder: str | Path, *, dpi: Dpi = 110) -> Outputs:
    """Write ``codes.csv``, ``summary.txt`` and ``figures/*.png``.

    The figures: ``samples``, images of codes at random; ``reconstructions``, images beside the mean of what their codes
    are decoded to; ``codes``, the mean image of every code with its share; ``loss``.

    Parameters
    ----------
    result
        Result of `fit_em`.
    folder
        Where to; made where it is missing, files of the same names are replaced.
    dpi
        Resolution of the figures.

    Returns
    -------
    Outputs
        The folder, a table of log likelihoods and of the use of codes, and the verdict of the diagnostics.

    Raises
    ------
    ResultError
        If the result is not one of a discrete autoencoder.
    """
    problem = _fitted_problem(result)
    model: Any = problem.model
    usage = code_usage(result)
    return write_all(
        result,
        folder,
        table="\n".join([*_log_likelihoods(problem, result), "", *_usage_lines(usage)]),
        tables={"codes": usage.to_series().reset_index()},
        figures=_figures(result, model, usage) | loss_figure(result),
        dpi=dpi,
    )


def check_draws(result: Result) -> Iterator[Finding]:
    """Findings on the guide by the exact evidence of images, where there are few enough states to sum over."""
    problem = _fitted_problem(result)
    model: Any = problem.model
    total, image = model.num_codes**model.num_latents, problem.args[0]
    if total > _SUMMED:
        return
    rows = np.unique(np.linspace(0, len(image) - 1, min(len(image), max(_BLOCK // total, 100))).astype(int))
    with torch.no_grad():
        evidence = model.log_likelihood(image[rows].to(model.embedding))
    yield from judge_evidence(result.tree, evidence.double().cpu().numpy(), rows)


def check_model(result: Result) -> Iterator[Finding]:
    """Findings on the decoder: its log likelihood of images that were held out, where there are few states.

    It is compared with that of independent pixels, which a decoder that learned nothing does not exceed, and with that
    of fitted images.
    """
    problem = _fitted_problem(result)
    model: Any = problem.model
    if problem.data is None or "held_out_image" not in problem.data or model.num_codes**model.num_latents > _SUMMED:
        return
    fitted, others = (
        torch.as_tensor(problem.data[name].values[:_JUDGED]).to(model.embedding) for name in ("image", "held_out_image")
    )
    with torch.no_grad():
        known, found = (model.log_likelihood(images).double().cpu().numpy() for images in (fitted, others))
    if len(found) < _FEWEST:
        return
    chance = (fitted.double().sum(0) + 0.5) / (len(fitted) + 1)  # of every pixel
    alone = torch.distributions.Bernoulli(chance).log_prob(others.double()).flatten(1).sum(1).numpy()
    gain, error = float((found - alone).mean()), float((found - alone).std(ddof=1)) / math.sqrt(len(found))
    verdict = f"the log likelihood of {len(found):,} images held out is {found.mean():.4g} nats, that of independent "
    verdict += f"pixels {alone.mean():.4g} (more by {gain:.3g} ± {2 * error:.2g}, which must be surely above 0)"
    learned = gain > 2 * error
    yield Finding(not learned, verdict, "" if learned else "take more rounds, or a larger decoder", part="model")
    loss = float(known.mean() - found.mean())
    spread = math.hypot(*(values.std() / math.sqrt(len(values)) for values in (known, found)))
    verdict = (
        f"fitted images have {loss:.3g} nats more than those held out, of {gain:.3g} gained over independent pixels"
    )
    bad = loss - 2 * spread > max(gain, 0.0) / 2
    advice = "the decoder learned by heart: take fewer codes, or more images" if bad else ""
    yield Finding(bad, f"{verdict} (at most half)", advice, "model")


@checked(ResultError)
def code_usage(result: Result) -> xr.DataArray:
    """Share of every code of every latent (latent, code) among the draws of all images.

    Raises
    ------
    ResultError
        If the result is not one of a discrete autoencoder.
    """
    model: Any = _fitted_problem(result).model
    num_codes = model.num_codes
    drawn = result.posterior["code"].stack(all=("chain", "draw", "data")).transpose("latent", "all").values
    share = np.stack([np.bincount(row, minlength=num_codes) for row in drawn.astype(np.int64)]) / drawn.shape[1]
    labels = {"latent": np.arange(len(share)), "code": np.arange(num_codes)}
    return xr.DataArray(share, labels, ("latent", "code"), name="share")


def tiny() -> Problem:
    """Twelve images of 2 x 3 pixels, two latents of three codes, for the conformance tests."""
    images = np.random.default_rng(0).integers(2, size=(14, 2, 3))
    data = make_images(images, split=np.repeat(["train", "test"], [12, 2]))
    return make_problem(data, num_latents=2, num_codes=3, embedding=2, hidden=4, layers=1, guide_hidden=4)


def _fitted_problem(result: Result) -> Problem:
    """The problem of a result, its decoder as it was fitted, whatever the guide was."""
    problem = result.rebuild()
    model = problem.model
    if not isinstance(model, DiscreteVAE):
        raise ResultError(f"the result is one of {problem.name!r} and not of a discrete autoencoder")
    state = {name.replace("$$$", "."): value for name, value in result.params().items()}
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    model.to(state["embedding"].dtype)
    return problem


def _log_likelihoods(problem: Problem, result: Result) -> list[str]:
    """Sentences on the log likelihood of images, fitted ones and others."""
    model: Any = problem.model
    lines: list[str] = []
    for name, variable in (("fitted", "image"), ("held out", "held_out_image")):
        if problem.data is None or variable not in problem.data:
            continue
        images = problem.data[variable].values[:_JUDGED]
        if model.num_codes**model.num_latents <= _SUMMED:
            with torch.no_grad():
                found = model.log_likelihood(torch.as_tensor(images).to(model.embedding)).double().numpy()
            how = "exact"
        else:
            others = make_problem(make_images(images), **{**problem.options, "split": "train"})
            try:
                estimate = check_weights(others, result, num_draws=200)
            except ResultError:
                lines.append(f"Log likelihood of {name} images: not estimated, the guide is not the method's own.")
                continue
            found = estimate["log_evidence"].values
            effective = float(np.median(estimate["ess"].values))
            how = f"at least, by 200 draws of the guide, of which {effective:.0f} are effective in the median"
        mean = f"{found.mean():.3f} ± {found.std() / math.sqrt(len(found)):.3f}"
        lines.append(f"Log likelihood of {name} images: {mean} nats each, {len(found):,} images, {how}.")
    return lines


def _usage_lines(usage: xr.DataArray) -> list[str]:
    """Effective numbers of codes."""
    share = usage.values
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(1)
    lines = [f"Codes in use, of {share.shape[1]} (exp of the entropy of their shares, and codes above 1 %):"]
    return lines + [
        f"  latent {latent}: {math.exp(nats):5.2f}  {(row > 0.01).sum():4d}"
        for latent, (nats, row) in enumerate(zip(entropy, share, strict=True))
    ]


def _figures(result: Result, model: DiscreteVAE, usage: xr.DataArray) -> dict[str, Figure]:
    from probmodels import plots

    generator = torch.Generator().manual_seed(0)

    def random_codes(*shape: int) -> Tensor:
        return torch.randint(model.num_codes, (*shape, model.num_latents), generator=generator)

    with torch.no_grad():
        samples = model.decode(random_codes(6, _SHOWN)).sigmoid().numpy()
        codes = result.posterior["code"].isel(data=slice(_SHOWN), draw=slice(100)).stack(all=("chain", "draw"))
        drawn = torch.as_tensor(codes.transpose("all", "data", "latent").values.astype(np.int64))
        means = model.decode(drawn).sigmoid().mean(0).numpy()
        shown = min(model.num_codes, 2 * _SHOWN)
        others = random_codes(model.num_latents, shown, 200)
        for latent in range(model.num_latents):
            others[latent, :, :, latent] = torch.arange(shown).unsqueeze(-1)
        prototypes = model.decode(others).sigmoid().mean(2).numpy()
    images = result.tree["observed_data"].to_dataset()["image"].values[: len(means)]
    shares = [[f"{share:.0%}" for share in row[:shown]] for row in usage.values]
    return {
        "samples": plots.image_grid(samples, "images of random codes"),
        "reconstructions": plots.image_grid(np.stack([images, means]), "images, and what their codes are decoded to"),
        "codes": plots.image_grid(
            prototypes, "mean image of every code (column) of every latent (row), and its share", shares
        ),
    }
