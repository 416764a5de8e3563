"""Guide of VIB-GSL: random edges from node features, and an encoder that reads the graph that was drawn.

For a graph with features x and observed edges o, over its candidate pairs (u, v)::

    h_u = network(x_u)
    edge_uv ~ Bernoulli(sigmoid(h_u . h_v / sqrt(width) + level + shift o_uv))
    weight_uv = skip o_uv + (1 - skip) edge_uv
    z ~ Normal(encoder(x, weight))

Edges are drawn as 0 and 1 and have the derivative of a concrete variable. Nodes have self-loops of weight 1 throughout.

References
----------
Sun, Q., Li, J., Peng, H., Wu, J., Fu, X., Ji, C. and Yu, P. S. (2022). Graph structure learning with variational
information bottleneck. AAAI. https://arxiv.org/abs/2112.08903
Kipf, T. N. and Welling, M. (2017). Semi-supervised classification with graph convolutional networks. ICLR.
Veličković, P. et al. (2018). Graph attention networks. ICLR.
Xu, K., Hu, W., Leskovec, J. and Jegelka, S. (2019). How powerful are graph neural networks? ICLR.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from probmodels.errors import ProblemError
from probmodels.guides.edges import EdgeSet
from probmodels.guides.nets import pool_mean, propagate
from probmodels.guides.relaxed import BernoulliConcrete
from probmodels.inference.runtime.memory import check_memory

__all__ = [
    "BACKBONES",
    "GAT",
    "GCN",
    "GIN",
    "HEADS",
    "POOLINGS",
    "EdgeNetwork",
    "Encoder",
    "FeatureMask",
    "Standardised",
    "VIBGSLGuide",
    "check_step",
    "choose_graphs",
    "pair_sites",
    "step_bytes",
]

POOLINGS = ("mean", "sum")
HEADS = 4  # of a layer of attention
_MAX_LOGIT = 30.0  # of attention over that of the self-loop, whose exponential stays finite
_MASK_ROWS = 512  # kept of the features to draw noise from
_MIN_SPREAD = 1e-3  # of a column that is to be standardised: one that hardly varies stays small
_MIN_SCALE = 1e-3  # of the embedding, so that its divergence stays finite


class EdgeNetwork(nn.Module):
    """Log odds of candidate pairs, symmetric in their nodes.

    Parameters
    ----------
    num_features
        Columns of ``x``.
    width
        Hidden units, and length of h.
    informed
        Whether log odds know which pairs were observed; otherwise they depend on the features of the two nodes alone,
        as in the paper.
    """

    def __init__(self, num_features: int, width: int, informed: bool = True) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(num_features, width), nn.ReLU(), nn.Linear(width, width))
        self.level = nn.Parameter(torch.zeros(()))
        self.shift = nn.Parameter(torch.zeros(())) if informed else None
        self.width = width

    def start(self, rate: float, observed_rate: float) -> None:
        """Start from these probabilities of unobserved and of observed pairs, as far as features say nothing.

        Where it is not known which pairs were observed, the first is that of all.
        """
        low, high = (math.log(value / (1 - value)) for value in (rate, observed_rate))
        nn.init.constant_(self.level, low)
        if self.shift is not None:
            nn.init.constant_(self.shift, high - low)

    def forward(self, x: Tensor, edges: EdgeSet) -> Tensor:
        """Log odds (pair,) from features (node, feature)."""
        h = self.network(x)
        logits = (_rows(h, edges.source) * _rows(h, edges.target)).sum(-1) / math.sqrt(self.width) + self.level
        return logits if self.shift is None else logits + self.shift * edges.observed.to(logits)


class FeatureMask(nn.Module):
    """Features of which a learned share is replaced by noise from their own empirical distribution.

    Parameters
    ----------
    x
        Features (node, feature), of which at most 512 nodes are kept to draw from.
    """

    rows: Tensor

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.full((x.shape[1],), 2.0))
        self.register_buffer("rows", x[torch.randperm(len(x))[:_MASK_ROWS]].clone())

    def forward(self, x: Tensor) -> Tensor:
        """``noise + share * (x - noise)`` of shape (node, feature), every entry of the noise drawn by itself."""
        row = torch.randint(len(self.rows), x.shape, device=x.device)
        noise = self.rows.gather(0, row)
        return noise + torch.sigmoid(self.logit) * (x - noise)


class Standardised(nn.Module):
    """``(value - shift) * gain`` by column, which starts with columns of mean 0 and standard deviation 1.

    Batch statistics would tie the graphs of a step together, and differ between fit and prediction.

    References
    ----------
    Salimans, T. and Kingma, D. P. (2016). Weight normalization. NeurIPS. (Data-dependent initialisation.)
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift, self.gain = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.ones(width))
        self.starting = False

    def forward(self, value: Tensor) -> Tensor:
        """From (row, column) to the same."""
        if self.starting:
            spread, mean = torch.std_mean(value, dim=0, correction=0)
            self.shift.data, self.gain.data = mean, 1 / (spread + _MIN_SPREAD)
        return (value - self.shift) * self.gain


class GCN(nn.Module):
    """Layer of a graph convolutional network: `propagate` of a linear map."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, width)

    def forward(self, h: Tensor, edges: EdgeSet, weight: Tensor) -> Tensor:
        """From (node, size) and weights (pair,) to (node, width)."""
        return propagate(self.linear(h), edges, weight)


class GIN(nn.Module):
    """Layer of a graph isomorphism network: ``network((1 + eps) h_u + sum_v weight_uv h_v)``."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(size, width), nn.Linear(width, width)
        self.norm = Standardised(width)
        self.eps = nn.Parameter(torch.zeros(()))

    def forward(self, h: Tensor, edges: EdgeSet, weight: Tensor) -> Tensor:
        """From (node, size) and weights (pair,) to (node, width)."""
        h = F.linear(h, self.first.weight)  # linear, so that it may come before the sum, where rows are shorter
        share = weight.unsqueeze(-1)
        total = (1 + self.eps) * h + self.first.bias
        total = total.index_add(0, edges.source, _rows(h, edges.target) * share)
        total = total.index_add(0, edges.target, _rows(h, edges.source) * share)
        return self.second(F.relu(self.norm(total)))


class GAT(nn.Module):
    """Layer of a graph attention network: the weight of an edge times its attention, normalised over neighbours.

    A weight of zero removes an edge; as a feature of the edge it would leave it there.
    """

    def __init__(self, size: int, width: int, heads: int = HEADS) -> None:
        super().__init__()
        if width % heads:
            raise ProblemError(f"width={width} is shared by {heads} attention heads; choose a multiple of {heads}")
        self.heads, self.linear = heads, nn.Linear(size, width, bias=False)
        self.sending, self.receiving = (nn.Parameter(torch.empty(heads, width // heads)) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(width))
        for value in (self.linear.weight, self.sending, self.receiving):
            nn.init.xavier_uniform_(value)

    def forward(self, h: Tensor, edges: EdgeSet, weight: Tensor) -> Tensor:
        """From (node, size) and weights (pair,) to (node, width)."""
        h = self.linear(h).unflatten(-1, self.sending.shape)  # (node, head, width / heads)
        sent, received = (h * self.sending).sum(-1), (h * self.receiving).sum(-1)  # (node, head)
        own = F.leaky_relu(sent + received, 0.2)  # of the self-loop, whose share is 1
        total, norm = h, torch.ones_like(own)
        for source, target in ((edges.source, edges.target), (edges.target, edges.source)):
            logit = F.leaky_relu(_rows(sent, source) + _rows(received, target), 0.2) - _rows(own, target)
            share = weight.unsqueeze(-1) * logit.clamp(max=_MAX_LOGIT).exp()
            total = total.index_add(0, target, share.unsqueeze(-1) * _rows(h, source))
            norm = norm.index_add(0, target, share)
        return (total / norm.unsqueeze(-1)).flatten(1) + self.bias


BACKBONES = {"gcn": GCN, "gat": GAT, "gin": GIN}


class Encoder(nn.Module):
    """Graph layers, pooling, and a linear map to mean and scale of the embedding.

    Parameters
    ----------
    num_features
        Columns of ``x``.
    width
        Columns of every layer.
    layers
        Number of graph layers.
    size
        Length of the embedding.
    backbone
        One of `BACKBONES`.
    pooling
        ``"mean"`` or ``"sum"`` over nodes.
    """

    def __init__(self, num_features: int, width: int, layers: int, size: int, backbone: str, pooling: str) -> None:
        super().__init__()
        sizes = [num_features] + [width] * layers
        self.layers = nn.ModuleList(BACKBONES[backbone](left, width) for left in sizes[:-1])
        self.norms = nn.ModuleList(Standardised(width) for _ in self.layers)
        self.pooled = Standardised(width * layers)
        self.out = nn.Linear(width * layers, 2 * size)
        self.pooling = pooling

    def forward(self, x: Tensor, edges: EdgeSet, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale, each (graph, size), from features (node, feature) and weights (pair,)."""
        pooled, h = [], x
        for layer, norm in zip(self.layers, self.norms, strict=True):
            h = F.relu(norm(layer(h, edges, weight)))
            pooled.append(_pool(h, edges, self.pooling))
        loc, raw = self.out(self.pooled(torch.cat(pooled, dim=-1))).chunk(2, dim=-1)
        return loc, F.softplus(raw) + _MIN_SCALE

    def start(self, x: Tensor, edges: EdgeSet, weight: Tensor) -> None:
        """Let columns be standardised for these graphs, in all layers."""
        parts = [part for part in self.modules() if isinstance(part, Standardised)]
        for part in parts:
            part.starting = True
        with torch.no_grad():
            self(x, edges, weight)
        for part in parts:
            part.starting = False


class VIBGSLGuide(PyroModule):
    """``q(edge | x, observed) q(z | x, edge)``.

    Parameters
    ----------
    edges
        Gives log odds of pairs.
    encoder
        Gives mean and scale of the embedding.
    mask
        Replaces part of the features by noise; None for none.
    temperature
        Temperature of the concrete variables, positive.
    skip
        Weight of the observed edges, in [0, 1]; drawn edges have the rest.
    beta
        Weight of the divergence of ``z``, in nats.
    edge_beta
        Weight of the divergence of every edge; 0 for edges that are drawn and not penalised.
    learn_edges
        Whether edges are learned; otherwise no gradient passes through them, and they stay as they started.
    refresh
        Whether every evaluation that takes a gradient draws random pairs anew. The model is none the wiser: to it, all
        pairs of a graph that were not observed are alike, and every graph has as many as before.
    """

    def __init__(
        self,
        edges: EdgeNetwork,
        encoder: Encoder,
        mask: FeatureMask | None,
        *,
        temperature: float,
        skip: float,
        beta: float,
        edge_beta: float,
        learn_edges: bool = True,
        refresh: bool = False,
    ) -> None:
        super().__init__()
        self.edges, self.encoder, self.mask = edges, encoder, mask
        self.temperature, self.skip, self.beta, self.edge_beta = temperature, skip, beta, edge_beta
        self.learn_edges, self.refresh = learn_edges, refresh

    def forward(self, x: Tensor, edges: EdgeSet, y: Tensor, labelled: Tensor) -> None:
        """Sites ``edge`` (pair,) and ``z`` (graph, component) of the graphs that plate ``graph`` chooses."""
        graphs = pyro.plate("graph", edges.num_graphs)
        x, some = choose_graphs(x, edges, graphs.indices)
        mask: Any = labelled if some is edges else labelled[graphs.indices]
        check_step(self.encoder, self.edges, x, num_pairs=some.num_pairs, num_graphs=some.num_graphs)
        x = x if self.mask is None else self.mask(x)
        if self.refresh and torch.is_grad_enabled():  # draws of a result are those of the pairs that it names
            some = some.refreshed()
        logits = self.edges(x, some)
        logits = logits if self.learn_edges else logits.detach()
        with pair_sites(some, mask, self.edge_beta * edges.num_graphs / some.num_graphs):
            edge = pyro.sample("edge", BernoulliConcrete(self.temperature, logits=logits))
        loc, scale = self.encoder(x, some, self.skip * some.observed.to(edge) + (1 - self.skip) * edge)
        with graphs, poutine.mask(mask=mask), poutine.scale(scale=self.beta):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    def edge_probability(self, x: Tensor, edges: EdgeSet) -> Tensor:
        """Probability (pair,) of every candidate pair; with a feature mask, given one draw of its noise."""
        x = x if self.mask is None else self.mask(x)
        return torch.sigmoid(self.edges(x, edges))


def choose_graphs(x: Tensor, edges: EdgeSet, chosen: Tensor) -> tuple[Tensor, EdgeSet]:
    """Nodes and pairs of some graphs, numbered through anew.

    Sizes are read out of tensors, so that a step over some of the graphs cannot be captured as a graph of operations.

    Parameters
    ----------
    x
        Features (node, feature).
    edges
        Candidate pairs, by ascending source.
    chosen
        Numbers of graphs, each once; where they are all graphs, these stay in their order.

    Returns
    -------
    tuple
        Features and pairs of the chosen graphs, in the order of ``chosen``; the arguments themselves for all graphs.
    """
    if len(chosen) == edges.num_graphs:
        return x, edges
    ends = torch.stack([chosen, chosen + 1])
    first, last = torch.searchsorted(edges.graph, ends)  # nodes of a graph lie side by side
    low, high = torch.searchsorted(edges.source, torch.stack([first, last]))  # and so do its pairs
    nodes, pairs = _ranges(first, last), _ranges(low, high)
    sizes = last - first
    graph = torch.repeat_interleave(torch.arange(len(chosen), device=x.device), sizes)
    shift = (sizes.cumsum(0) - sizes - first).repeat_interleave(high - low)  # from old to new numbers
    some = EdgeSet(
        edges.source[pairs] + shift, edges.target[pairs] + shift, edges.origin[pairs], graph, num_graphs=len(chosen)
    )
    return _rows(x, nodes), some


@contextlib.contextmanager
def pair_sites(edges: EdgeSet, labelled: Tensor, weight: float) -> Iterator[None]:
    """Plate ``pair`` with the weight of its divergence, for model and guide alike.

    Pyro takes the weight of an analytic divergence from the guide and that of a sampled one from both, so that both
    have to stand in this block.

    Parameters
    ----------
    edges
        Candidate pairs of the step.
    labelled
        Whether a graph takes part in the loss (graph,).
    weight
        Weight of each pair; 0 masks the site, so that it is drawn and not penalised.
    """
    with contextlib.ExitStack() as stack:
        if edges.num_pairs:  # a step may hold graphs of one node alone, and no plate is empty
            stack.enter_context(pyro.plate("pair", edges.num_pairs))
        if weight:
            mask: Any = labelled[edges.graph_of_pair]
            stack.enter_context(poutine.mask(mask=mask))
            stack.enter_context(poutine.scale(scale=weight))
        else:
            stack.enter_context(poutine.mask(mask=False))
        yield


def step_bytes(encoder: Encoder, network: EdgeNetwork, shape: tuple[int, ...], num_pairs: int) -> int:
    """Bytes that one evaluation of the guide needs: tensors by pair and node, all of them at once for a gradient.

    Parameters
    ----------
    encoder, network
        Whose widths count.
    shape
        Shape of the features (node, feature).
    num_pairs
        Candidate pairs of the step.
    """
    depth = len(encoder.layers)
    width, heads = encoder.out.in_features // depth, getattr(encoder.layers[0], "heads", 0)
    layer = 4 * width + 8 * heads  # gathered and weighted rows in both directions, logits of attention
    kept = depth if torch.is_grad_enabled() else 1
    by_pair = 8 + 3 * network.width + kept * layer
    by_node = shape[1] + 2 * network.width + kept * 8 * width
    number = torch.finfo(encoder.out.weight.dtype).bits // 8
    return number * (num_pairs * by_pair + shape[0] * by_node)


def check_step(encoder: Encoder, network: EdgeNetwork, x: Tensor, *, num_pairs: int, num_graphs: int) -> None:
    """Check that an evaluation of the guide fits into memory, with a gradient where gradients are enabled.

    Raises
    ------
    ProblemError
        If it needs more than is free.
    """
    check_memory(
        "vib_gsl",
        step_bytes(encoder, network, x.shape, num_pairs),
        x.device,
        f"{num_pairs:,} candidate pairs of {num_graphs:,} graphs",
        "take candidates='observed', fewer neighbours, narrower networks, a batch_size of fewer graphs, or predict "
        "fewer graphs at a time",
    )


def _rows(value: Tensor, index: Tensor) -> Tensor:
    """Rows by number; the derivative is a plain sum, several times faster than that of indexing."""
    return value.index_select(0, index)


def _ranges(first: Tensor, last: Tensor) -> Tensor:
    """Whole numbers from every first to before its last, one after the other."""
    sizes = last - first
    total = int(sizes.sum())  # differs between steps, which no captured graph can follow
    return torch.arange(total, device=first.device) + torch.repeat_interleave(
        first - (sizes.cumsum(0) - sizes), sizes, output_size=total
    )


def _pool(h: Tensor, edges: EdgeSet, pooling: str) -> Tensor:
    if pooling == "mean":
        return pool_mean(h, edges)
    return h.new_zeros(edges.num_graphs, h.shape[1]).index_add(0, edges.graph, h)
