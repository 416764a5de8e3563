"""A fusion encoder: tokens of one modality attend to those of another, to say whether rows match and which words lack.

For a pair of modalities the text, or else the second one, asks and the other answers. Each view is read as tokens, the
first of which is learned and says what was found. With hard negatives, rows that the towers take for partners::

    fused_a_to_b  ~ Bernoulli(score)         (3, row): observed to be 1 for partners, 0 for negatives of either modality
    masked_a_to_b ~ Categorical(logits)      (row, token): the words that were hidden from the encoder

The log densities are minus the sums of the binary and the categorical cross-entropies.

References
----------
Li, J., Selvaraju, R. R., Gotmare, A. D., Joty, S., Xiong, C. and Hoi, S. (2021). Align before fuse. NeurIPS.
https://arxiv.org/abs/2107.07651
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Generator, Tensor, nn

from probmodels.modality_structure.structures import matching_logits

__all__ = ["Encoder", "Fusion", "Layout", "Tokens", "hard_negatives", "hide_words"]

_PARTS = 4  # tokens of a vector, and of a picture along a side


class Layout(NamedTuple):
    """What a view is made of.

    Attributes
    ----------
    kind
        ``"vectors"``, ``"pictures"`` or ``"texts"``.
    shape
        Shape of a row.
    num_words
        Codes of a text, that of none included.
    """

    kind: str
    shape: tuple[int, ...]
    num_words: int = 0


class Tokens(nn.Module):
    """A view as tokens: patches of a picture, words of a text, or four linear maps of a vector.

    Parameters
    ----------
    layout
        Of the view.
    width
        Numbers of a token.
    """

    def __init__(self, layout: Layout, width: int) -> None:
        super().__init__()
        self.kind, self.width = layout.kind, width
        if layout.kind == "texts":
            self.read: nn.Module = nn.Embedding(layout.num_words + 1, width)  # the last is of hidden words
            count = layout.shape[0]
        elif layout.kind == "pictures":
            _, height, breadth = layout.shape
            patch = math.ceil(height / _PARTS), math.ceil(breadth / _PARTS)
            self.read = nn.Conv2d(layout.shape[0], width, patch, patch)
            count = (height // patch[0]) * (breadth // patch[1])
        else:
            self.read = nn.Linear(layout.shape[0], _PARTS * width)
            count = _PARTS
        self.start = nn.Parameter(0.1 * torch.randn(width))
        self.place = nn.Parameter(0.1 * torch.randn(count, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (row, 1 + token, width), the first a learned one, and which of them are there (row, 1 + token)."""
        found = self.read(x)
        if self.kind == "pictures":
            found = found.flatten(2).mT
        elif self.kind == "vectors":
            found = found.unflatten(-1, (_PARTS, self.width))
        found = torch.cat([self.start.expand(len(x), 1, -1), found + self.place], 1)
        there = torch.ones(found.shape[:2], dtype=torch.bool, device=found.device)
        if self.kind == "texts":
            there[:, 1:] = x > 0
        return found, there


class _Layer(nn.Module):
    """Attention of tokens to each other, then to those of the other modality, and a network of two layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.inside = nn.MultiheadAttention(width, heads, batch_first=True)
        self.across = nn.MultiheadAttention(width, heads, batch_first=True)
        self.change = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, absent: Tensor, other: Tensor, other_absent: Tensor) -> Tensor:
        state = self.norms[0](x)
        x = x + self.inside(state, state, state, key_padding_mask=absent, need_weights=False)[0]
        x = x + self.across(self.norms[1](x), other, other, key_padding_mask=other_absent, need_weights=False)[0]
        found: Tensor = x + self.change(self.norms[2](x))
        return found


class Encoder(nn.Module):
    """Layers of self-attention and cross-attention.

    Parameters
    ----------
    width
        Numbers of a token.
    layers
        Number of layers.
    num_words
        Codes of the words of which one is told from the others; 0 for none.
    """

    def __init__(self, width: int, layers: int, num_words: int) -> None:
        super().__init__()
        heads = next(count for count in (4, 2, 1) if width % count == 0)
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.match = nn.Linear(width, 1)
        self.words = nn.Linear(width, num_words) if num_words else None

    def forward(self, asking: tuple[Tensor, Tensor], answering: tuple[Tensor, Tensor]) -> Tensor:
        """States (row, 1 + token, width) of the asking tokens, of those that `Tokens` gives for both."""
        x = asking[0]
        for layer in self.layers:
            x = layer(x, ~asking[1], answering[0], ~answering[1])
        found: Tensor = self.norm(x)
        return found


def hard_negatives(logits: Tensor, seen: Tensor, generator: Generator | None = None) -> Tensor:
    """A candidate (row,) for each row, not its own, drawn by how probable the towers take it to be its partner.

    Parameters
    ----------
    logits
        Log odds (row, candidate).
    seen
        Rows (row,) that have both modalities; the others are no candidates. Where there is no candidate, any is drawn.
    """
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    free = ~own & seen
    chance = logits.detach().masked_fill(~free, -math.inf).masked_fill(~free.any(1, keepdim=True), 0.0).softmax(-1)
    return torch.multinomial(chance, 1, generator=generator).squeeze(-1)


def hide_words(codes: Tensor, share: float, generator: Generator | None = None) -> Tensor:
    """Which words (row, token) are hidden: a random share of them, one at least of every text."""
    chance = torch.rand(codes.shape, generator=generator, device=codes.device).masked_fill(codes == 0, 2.0)
    first = chance.argmin(1, keepdim=True) == torch.arange(codes.shape[1], device=codes.device)
    return ((chance < share) | first) & (codes > 0)


class Fusion(nn.Module):
    """The fusion encoder of each pair of modalities.

    Parameters
    ----------
    layouts
        Of each modality.
    pairs
        Modalities that are matched.
    weights
        Weight of the matching (``"fusion"``) and of the hidden words (``"masked"``); 0 for none.
    width
        Numbers of a token.
    layers
        Layers of each encoder.
    share
        Share of the words of a text that are hidden.
    """

    def __init__(
        self,
        layouts: Mapping[str, Layout],
        pairs: Sequence[tuple[str, str]],
        weights: Mapping[str, float],
        *,
        width: int,
        layers: int,
        share: float,
    ) -> None:
        super().__init__()
        self.layouts, self.weights, self.share = dict(layouts), dict(weights), share
        self.pairs = [pair for pair in pairs if weights["fusion"] or self._words(pair)]
        used = [name for name in layouts if any(name in pair for pair in self.pairs)]
        self.tokens = nn.ModuleDict({f"tokens_{name}": Tokens(layouts[name], width) for name in used})
        encoders = [(f"{a}_to_{b}", self._words((a, b))) for a, b in self.pairs]
        self.encoders = nn.ModuleDict({name: Encoder(width, layers, words) for name, words in encoders})

    def ordered(self, pair: tuple[str, str]) -> tuple[str, str]:
        """The modality of a pair that asks, and the one that answers."""
        a, b = pair
        return (a, b) if self.layouts[a].kind == "texts" != self.layouts[b].kind else (b, a)

    def _words(self, pair: tuple[str, str]) -> int:
        """Codes of the words that are hidden of a pair; 0 where none are."""
        return self.layouts[self.ordered(pair)[0]].num_words if self.weights["masked"] else 0

    def encoder(self, pair: tuple[str, str]) -> Encoder:
        """Encoder of a pair."""
        found = self.encoders[f"{pair[0]}_to_{pair[1]}"]
        assert isinstance(found, Encoder)
        return found

    def read(self, views: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Tokens of each modality, and which of them are there."""
        return {name: self.tokens[f"tokens_{name}"](views[name]) for name in views if f"tokens_{name}" in self.tokens}

    def scores(
        self, pair: tuple[str, str], read: Mapping[str, tuple[Tensor, Tensor]], rows: Mapping[str, Tensor]
    ) -> Tensor:
        """Log odds (row,) that rows of the two modalities, by their places, are partners."""
        asking, answering = ((read[name][0][rows[name]], read[name][1][rows[name]]) for name in self.ordered(pair))
        encoder = self.encoder(pair)
        found: Tensor = encoder.match(encoder(asking, answering)[:, 0]).squeeze(-1)
        return found

    def word_logits(
        self, pair: tuple[str, str], codes: Tensor, hidden: Tensor, answering: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Log odds (row, token, code) of each word of a text of which some are hidden, given the other modality."""
        name, encoder = self.ordered(pair)[0], self.encoder(pair)
        asking = self.tokens[f"tokens_{name}"](codes.masked_fill(hidden, self.layouts[name].num_words))
        assert encoder.words is not None
        found: Tensor = encoder.words(encoder(asking, answering)[:, 1:])
        return found

    def forward(
        self,
        views: Mapping[str, Tensor],
        z: Mapping[str, Tensor],
        seen: Mapping[str, Tensor],
        temperature: Tensor | float,
        generator: Generator | None = None,
    ) -> None:
        """The sites above.

        Parameters
        ----------
        views
            Rows of each modality.
        z
            Their embeddings (row, size), by which hard negatives are drawn.
        seen
            Whether a row has a modality (row,).
        temperature
            Of the matching of embeddings.
        generator
            Of negatives and hidden words.
        """
        read = self.read(views)
        for a, b in self.pairs:
            both = seen[a] & seen[b]
            if self.weights["fusion"]:
                logits = matching_logits(z[a], z[b], temperature)
                own = torch.arange(len(logits), device=logits.device)
                others = hard_negatives(logits, both, generator), hard_negatives(logits.mT, both, generator)
                rows = {a: torch.cat([own, own, others[1]]), b: torch.cat([own, others[0], own])}
                score = self.scores((a, b), read, rows).unflatten(0, (3, -1))
                counted = torch.stack([both, *[both & (both.sum() > 1)] * 2])
                truth = torch.zeros_like(score).detach()
                truth[0] = 1.0
                fn = dist.Bernoulli(logits=score).mask(counted).to_event(2)
                with poutine.scale(scale=self.weights["fusion"]):
                    _observe(f"fused_{a}_to_{b}", fn, truth, ["fused_part", "fitted_row"])
            if self._words((a, b)):
                name, other = self.ordered((a, b))
                hidden = hide_words(views[name], self.share, generator)
                words = self.word_logits((a, b), views[name], hidden, read[other])
                text = dist.Categorical(logits=words).mask(hidden & both.unsqueeze(-1)).to_event(2)
                with poutine.scale(scale=self.weights["masked"]):
                    _observe(f"masked_{a}_to_{b}", text, views[name], ["fitted_row", f"{name}_token"])


def _observe(name: str, fn: dist.TorchDistribution, value: Tensor, dims: list[str]) -> None:
    pyro.sample(name, fn, obs=value, infer={"event_dims": dims})  # type: ignore[arg-type]
