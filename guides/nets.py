"""Networks that guides and models share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probmodels.guides.edges import EdgeSet
from probmodels.guides.sparse import Links, product

__all__ = [
    "GradientNetwork",
    "LevelEmbedding",
    "ResidualMLP",
    "UNet",
    "make_reader",
    "make_writer",
    "pool_mean",
    "propagate",
]


def propagate(values: Tensor, edges: EdgeSet, weight: Tensor, links: Links | None = None) -> Tensor:
    """Symmetrically normalised sum over neighbours, ``D^-1/2 (A + I) D^-1/2 values``.

    Differentiable any number of times in both values and weights.

    Parameters
    ----------
    values
        Values of every node (..., node, feature).
    edges
        Candidate pairs.
    weight
        Weight of every pair (..., pair), not negative; zero for an absent edge.
    links
        The pairs as `make_links` orders them, for a product that is an order of magnitude faster; with these neither
        values nor weights have further axes.

    Returns
    -------
    Tensor
        Same shape as ``values``, batch axes broadcast.

    References
    ----------
    Kipf, T. N. and Welling, M. (2017). Semi-supervised classification with graph convolutional networks.
    https://arxiv.org/abs/1609.02907
    """
    source, target = edges.source, edges.target
    degree = weight.new_ones(*weight.shape[:-1], edges.num_nodes)
    degree = degree.index_add(-1, source, weight).index_add(-1, target, weight)
    scale = degree.rsqrt().unsqueeze(-1)
    out = values * scale
    if links is not None:
        return scale * (out + product(links.pattern, weight.index_select(-1, links.pair), out))
    # index_select has a plain sum for a derivative, several times faster than that of indexing.
    share = weight.unsqueeze(-1)
    forward, backward = out.index_select(-2, target) * share, out.index_select(-2, source) * share
    return scale * out.index_add(-2, source, forward).index_add(-2, target, backward)


def pool_mean(values: Tensor, edges: EdgeSet) -> Tensor:
    """Mean over the nodes of every graph: (..., node, feature) to (..., graph, feature)."""
    total = values.new_zeros(*values.shape[:-2], edges.num_graphs, values.shape[-1])
    count = values.new_zeros(edges.num_graphs).index_add(0, edges.graph, values.new_ones(edges.num_nodes))
    return total.index_add(-2, edges.graph, values) / count.unsqueeze(-1)


class LevelEmbedding(nn.Module):
    """A level of noise in [0, 1], and a class where there are some, as a vector.

    Parameters
    ----------
    width
        Length of the vector.
    num_classes
        Number of classes of labels (row, class), indicators that are all zero where the class is not known; 0 for none.
    """

    frequencies: Tensor

    def __init__(self, width: int, num_classes: int = 0) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(0.0, 7.0))
        self.first = nn.Linear(2 * len(self.frequencies) + 1, width)
        self.second = nn.Linear(width, width)
        self.classes = nn.Linear(num_classes, width, bias=False) if num_classes else None

    def forward(self, level: Tensor, label: Tensor | None = None) -> Tensor:
        """Vectors (row, width) of levels (row,) and labels (row, class)."""
        angles = level.unsqueeze(-1) * self.frequencies
        found = self.second(F.silu(self.first(torch.cat([level.unsqueeze(-1), angles.sin(), angles.cos()], -1))))
        if self.classes is not None and label is not None:
            found = found + self.classes(label)
        return F.silu(found)


class ResidualMLP(nn.Module):
    """A function of points and a level of noise: residual blocks of two layers, each told the level.

    The last layer starts at zero.

    Parameters
    ----------
    shape
        Shape of a point, which is flattened.
    hidden, blocks
        Width and number of blocks.
    num_classes
        Number of classes, as in `LevelEmbedding`.
    frequencies
        Fourier features ``sin`` and ``cos`` of ``2^k pi x`` that are inputs beside every x, k = 0, 1, ...: fine detail
        that a smooth network is slow to learn.
    dropout
        Share of units inside of blocks that are left out while fitting.
    num_outputs
        Numbers for each number of a point, on an axis of their own; None for one, without that axis.
    """

    frequencies: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        *,
        hidden: int = 128,
        blocks: int = 3,
        num_classes: int = 0,
        frequencies: int = 0,
        dropout: float = 0.0,
        num_outputs: int | None = None,
    ) -> None:
        super().__init__()
        size = math.prod(shape)
        self.ends = () if num_outputs is None else (num_outputs,)
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(0.0, frequencies))
        self.embedding = LevelEmbedding(hidden, num_classes)
        self.read = nn.Linear(size * (1 + 2 * frequencies), hidden)
        self.told = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(blocks))
        self.inner = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(blocks))
        self.outer = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(blocks + 1))
        self.dropout = nn.Dropout(dropout)
        self.write = nn.Linear(hidden, size * math.prod(self.ends))
        for parameter in self.write.parameters():
            nn.init.zeros_(parameter)

    def forward(self, z: Tensor, level: Tensor, label: Tensor | None = None) -> Tensor:
        """Values (row, *shape, *output) at points (row, *shape) of levels (row,), of classes (row, class)."""
        flat = z.flatten(1)
        if len(self.frequencies):
            angles = (flat.unsqueeze(-1) * self.frequencies).flatten(1)
            flat = torch.cat([flat, angles.sin(), angles.cos()], -1)
        state, told = self.read(flat), self.embedding(level, label)
        for tell, inner, outer, norm in zip(self.told, self.inner, self.outer, self.norms, strict=False):
            state = state + outer(self.dropout(F.silu(inner(F.silu(norm(state) + tell(told))))))
        return self.write(F.silu(self.norms[-1](state))).reshape(*z.shape, *self.ends)


class UNet(nn.Module):
    """A function of images and a level of noise: convolutions at full, half and quarter resolution with shortcuts.

    The last layer starts at zero.

    Parameters
    ----------
    shape
        (row, column), or (channel, row, column); rows and columns need not be even.
    hidden
        Channels at full resolution; twice as many below.
    depth
        How often the resolution is halved.
    num_classes
        Number of classes, as in `LevelEmbedding`.
    dropout, num_outputs
        As in `ResidualMLP`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        hidden: int = 32,
        depth: int = 2,
        num_classes: int = 0,
        dropout: float = 0.0,
        num_outputs: int | None = None,
    ) -> None:
        super().__init__()
        channels = shape[0] if len(shape) == 3 else 1
        self.ends = () if num_outputs is None else (num_outputs,)
        widths = [hidden, *[2 * hidden] * depth]
        self.embedding = LevelEmbedding(2 * hidden, num_classes)
        self.read = nn.Conv2d(channels, hidden, 3, padding=1)
        make = partial(_Block, told=2 * hidden, dropout=dropout)
        self.down = nn.ModuleList(make(a, b) for a, b in itertools.pairwise([hidden, *widths]))
        self.middle = make(widths[-1], widths[-1])
        rising = widths[::-1]
        self.up = nn.ModuleList(make(a + b, b) for a, b in zip([rising[0], *rising[:-1]], rising, strict=True))
        self.norm = nn.GroupNorm(_groups(hidden), hidden)
        self.write = nn.Conv2d(hidden, channels * math.prod(self.ends), 3, padding=1)
        for parameter in self.write.parameters():
            nn.init.zeros_(parameter)

    def forward(self, z: Tensor, level: Tensor, label: Tensor | None = None) -> Tensor:
        """Values (row, *shape, *output) at images (row, *shape) of levels (row,), of classes (row, class)."""
        images = z if z.dim() == 4 else z.unsqueeze(1)
        told, state, kept = self.embedding(level, label), self.read(images), []
        for place, block in enumerate(self.down):
            state = block(state if place == 0 else F.avg_pool2d(state, 2, ceil_mode=True), told)
            kept.append(state)
        state = self.middle(state, told)
        for block in self.up:
            other = kept.pop()
            if state.shape[-2:] != other.shape[-2:]:
                state = F.interpolate(state, size=other.shape[-2:], mode="nearest")
            state = block(torch.cat([state, other], 1), told)
        found = self.write(F.silu(self.norm(state)))
        # Channels of the last layer are outputs of every channel of the image.
        return found.unflatten(1, (images.shape[1], -1)).movedim(2, -1).reshape(*z.shape, *self.ends)


class GradientNetwork(nn.Module):
    """The gradient of a scalar function, ``z . network(z)``: what it predicts belongs to a density.

    Any other network's predictions are a gradient only approximately. Fitting this one takes second derivatives, two to
    three times the time.

    Parameters
    ----------
    network
        From points (row, *shape), levels and classes to values (row, *shape), differentiable.

    References
    ----------
    Salimans, T. and Ho, J. (2021). Should EBMs model the energy or the score? ICLR workshop on energy based models.
    https://openreview.net/forum?id=9AS-TF2jRNb
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def potential(self, z: Tensor, level: Tensor, label: Tensor | None = None) -> Tensor:
        """The scalar (row,)."""
        return (z * self.network(z, level, label)).flatten(1).sum(-1)

    def forward(self, z: Tensor, level: Tensor, label: Tensor | None = None) -> Tensor:
        """Its gradient (row, *shape) at points (row, *shape) of levels (row,), of classes (row, class)."""
        fitting = torch.is_grad_enabled()
        with torch.enable_grad():
            points = z if z.requires_grad else z.detach().requires_grad_()
            value = self.potential(points, level, label).sum()
            (gradient,) = torch.autograd.grad(value, points, create_graph=fitting)
        return gradient


def make_reader(shape: Sequence[int], num_outputs: int, *, network: str = "mlp", hidden: int = 256) -> nn.Module:
    """A function of data (row, *shape) to numbers (row, output).

    Parameters
    ----------
    shape
        Shape of a datum; (channel, row, column) for convolutions.
    num_outputs
        Numbers.
    network
        ``"mlp"``: two hidden layers; ``"conv"``: three convolutions of stride 2 and a hidden layer.
    hidden
        Width of hidden layers.
    """
    if network == "mlp":
        widths = [math.prod(shape), hidden, hidden]
        layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.SiLU())]
        return nn.Sequential(nn.Flatten(1), *layers, nn.Linear(hidden, num_outputs))
    sizes, channels = [shape[0], 32, 64, 64], [-(-side // 8) for side in shape[1:]]
    folds = [part for a, b in itertools.pairwise(sizes) for part in (nn.Conv2d(a, b, 3, 2, 1), nn.SiLU())]
    flat = sizes[-1] * math.prod(channels)
    return nn.Sequential(*folds, nn.Flatten(1), nn.Linear(flat, hidden), nn.SiLU(), nn.Linear(hidden, num_outputs))


def make_writer(shape: Sequence[int], num_inputs: int, *, network: str = "mlp", hidden: int = 256) -> nn.Module:
    """A function of numbers (row, input) to data (row, *shape); see `make_reader`."""
    if network == "mlp":
        widths = [num_inputs, hidden, hidden]
        layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.SiLU())]
        return nn.Sequential(*layers, nn.Linear(hidden, math.prod(shape)), nn.Unflatten(-1, tuple(shape)))
    sizes, small = [64, 64, 32], [-(-side // 8) for side in shape[1:]]
    rises = [
        part
        for a, b in itertools.pairwise([*sizes, sizes[-1]])
        for part in (nn.Upsample(scale_factor=2.0), nn.Conv2d(a, b, 3, padding=1), nn.SiLU())
    ]
    first = [nn.Linear(num_inputs, hidden), nn.SiLU(), nn.Linear(hidden, sizes[0] * math.prod(small))]
    last = nn.Conv2d(sizes[-1], shape[0], 3, padding=1)
    return nn.Sequential(*first, nn.Unflatten(-1, (sizes[0], *small)), *rises, last, _Crop(shape[1:]))


class _Crop(nn.Module):
    """Images cut to a size."""

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.rows, self.columns = size

    def forward(self, images: Tensor) -> Tensor:
        return images[..., : self.rows, : self.columns]


class _Block(nn.Module):
    """Two convolutions with a shortcut, the second told the level."""

    def __init__(self, width: int, out: int, told: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(_groups(size), size) for size in (width, out))
        self.first, self.second = nn.Conv2d(width, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.told, self.dropout = nn.Linear(told, out), nn.Dropout(dropout)
        self.short = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, state: Tensor, told: Tensor) -> Tensor:
        inside = self.first(F.silu(self.norms[0](state))) + self.told(told)[..., None, None]
        return self.short(state) + self.second(self.dropout(F.silu(self.norms[1](inside))))


def _groups(width: int) -> int:
    """Groups of channels that are normalised together, of four or more: one alone at one place would become zero."""
    return next(groups for groups in (8, 4, 2, 1) if width % groups == 0 and (width >= 4 * groups or groups == 1))
