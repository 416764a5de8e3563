"""Policy of trees: sentences are built bottom up, each step joining two neighbouring roots under a label.

A state is a forest over the words of a sentence, an action a pair of neighbouring roots with the label of the node that
joins them. The log odds of an action start from what it adds to the log density of the forest under the grammar as it
stands, the labels above being unknown: a policy that follows the grammar while this is learned. A transformer on
embeddings of the roots adds what that leaves out; the embedding of a new root is composed of those of its children and
its label. The orders in which one tree can be built are weighed by a backward policy that takes apart
one of the roots that are no words, uniformly at random. So a tree z has density::

    q(path | x) / p_B(path | z)

at the path by which it was drawn, the actions being auxiliary sites; see the notes on sets and graphs in the
documentation of discrete latents.

References
----------
Hu, E. J., Malkin, N., Jain, M., Everett, K., Graikos, A. and Bengio, Y. (2023). GFlowNet-EM for learning compositional
latent variable models. ICML. https://arxiv.org/abs/2302.06576
Vaswani, A. et al. (2017). Attention is all you need. NeurIPS. https://arxiv.org/abs/1706.03762
Xiong, R. et al. (2020). On layer normalization in the transformer architecture. ICML. https://arxiv.org/abs/2002.04745
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

__all__ = ["TreePolicy", "backward_path"]


class _Block(nn.Module):
    """Attention and a hidden layer, each on normalised input and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, absent: Tensor) -> Tensor:
        """From (row, root, width) to the same; ``absent`` (row, 1, 1, root) is -inf where there is no root."""
        rows, roots, width = x.shape
        parts = self.project(self.before(x)).reshape(rows, roots, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        weight = (query @ key.mT * (width // self.heads) ** -0.5 + absent).softmax(-1)
        x = x + self.merge((weight @ value).transpose(1, 2).reshape(rows, roots, width))
        return x + self.outer(self.inner(self.after(x)).relu())


class TreePolicy(nn.Module):
    """Guide of a latent site ``tree`` (sentence,), as `probmodels.grammar.inside` describes trees.

    Parameters
    ----------
    num_words, num_labels
        Size of the vocabulary, and number of labels.
    max_length
        Most words of a sentence.
    width
        Size of embeddings, a multiple of ``heads``.
    layers, heads
        Size of the transformer.
    tables
        Gives the grammar as it stands: root, rule and emission, as `probmodels.grammar.inside.Tables` describes them;
        None for a policy that does not look at it. A method of the model, of which copies of both keep the right one.
    log_z
        Whether there is a site ``log_Z`` (sentence,), which `TrajectoryBalance` needs.
    seed
        Seed of the start.
    """

    def __init__(
        self,
        num_words: int,
        num_labels: int,
        max_length: int,
        *,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        tables: Callable[[], tuple[Tensor, Tensor, Tensor]] | None = None,
        log_z: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.num_labels, self.max_length, self.tables = num_labels, max_length, tables
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.word, self.label = nn.Embedding(num_words, width), nn.Embedding(num_labels, width)
            self.place = nn.Parameter(0.1 * torch.randn(max_length, width))
            self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
            self.first, self.second = nn.Linear(width, width), nn.Linear(width, width, bias=False)
            self.action = nn.Linear(width, num_labels)
            self.compose = nn.Sequential(nn.Linear(3 * width, width), nn.ReLU(), nn.Linear(width, width))
            self.evidence = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)) if log_z else None
            nn.init.zeros_(self.action.weight)  # all actions are equally probable at first
            nn.init.zeros_(self.action.bias)
        if tables is not None:
            self.trust = nn.Parameter(torch.ones(num_labels))

    def forward(self, word: Tensor, length: Tensor) -> None:
        """Auxiliary sites ``merge_0``, ... of actions, and ``tree`` (sentence,).

        An action is position * labels + label, the position being that of the left root; 0 once there is one root.

        Parameters
        ----------
        word, length
            As the model takes them.
        """
        pyro.module("policy", self)
        with pyro.plate("sentence", len(word), dim=-1) as rows:
            self._build(word[rows], length[rows])

    def retrace(self, values: Mapping[str, Tensor], word: Tensor, length: Tensor) -> dict[str, Tensor]:
        """Actions that lead to given trees, drawn by the backward policy: sites by name.

        Parameters
        ----------
        values
            Site ``tree`` (sentence, N - 1, 3), of all sentences or those of a batch.
        word, length
            As the model takes them.
        """
        path = backward_path(values["tree"], self.num_labels)
        return {f"merge_{step}": action for step, action in enumerate(path.unbind(-1))}

    def _build(self, word: Tensor, length: Tensor) -> None:
        count, size = word.shape
        labels = self.num_labels
        roots = self.word(word)
        start = torch.arange(size, device=word.device).expand(count, size)
        end = start + 1
        number, complex_roots = length, torch.zeros_like(length)  # of roots, and of those that are no words
        log_backward = roots.new_zeros(count)
        tree = word.new_full((count, size, 3), -1)
        forest = None if self.tables is None else _Forest(self.tables(), word)
        for step in range(size - 1):
            left = size - step  # most roots that there can be
            place = torch.arange(left, device=word.device)
            active = number > 1
            rows = active.nonzero().squeeze(-1)  # the others, half of all in a batch of mixed lengths, cost nothing
            present = place < number[rows].unsqueeze(-1)
            seen = self._encode(roots[rows], present)
            if step == 0 and self.evidence is not None:
                total = (self.evidence(seen).squeeze(-1) * present).sum(-1)
                pyro.deterministic("log_Z", total, event_dim=0)
            only = roots.new_full((count, (left - 1) * labels), -torch.inf).index_fill(1, place[:1], 0.0)
            gain = None if forest is None else forest.gains(rows, number[rows] == 2)
            fn = dist.Categorical(logits=only.index_copy(0, rows, self._logits(seen, present[:, 1:], gain)))
            action = pyro.sample(f"merge_{step}", fn, infer={"is_auxiliary": True})
            at, label = action // labels, action % labels
            pair = torch.stack([at, at + 1], 1)
            one, other = _rows(roots, pair).unbind(1)
            joined = one + other + self.compose(torch.cat([self.label(label), one, other], -1))
            (low, middle), high = start.gather(1, pair).unbind(1), end.gather(1, pair)[:, 1]
            joins = (middle - low > 1).long() + (high - middle > 1).long()
            complex_roots = torch.where(active, complex_roots + 1 - joins, complex_roots)
            log_backward = log_backward - torch.where(active, complex_roots, 1).to(roots.dtype).log()
            here = torch.where(active, middle - 1, size - 1)
            node = torch.stack([label, low, high], -1)
            tree = tree.scatter(1, here[:, None, None].expand(-1, 1, 3), node.unsqueeze(1))
            # Roots right of the pair move one place to the left; where nothing is left to do all stay.
            at = torch.where(active, at, left)
            source = place[:-1] + (place[:-1] > at.unsqueeze(-1))
            new = place[:-1] == at.unsqueeze(-1)
            roots = torch.where(new.unsqueeze(-1), joined.unsqueeze(1), _rows(roots, source))
            if forest is not None:
                forest.join(pair, label, source, new)
            start = start.gather(1, source)
            end = torch.where(new, high.unsqueeze(-1), end.gather(1, source))
            number = number - active.long()
        pyro.sample("tree", dist.Delta(tree[:, :-1], log_density=-log_backward, event_dim=2))

    def _encode(self, roots: Tensor, present: Tensor) -> Tensor:
        absent = torch.zeros_like(present, dtype=roots.dtype).masked_fill(~present, -torch.inf)[:, None, None]
        seen = roots + self.place[: roots.shape[1]]
        for block in self.blocks:
            seen = block(seen, absent)
        return seen

    def _logits(self, seen: Tensor, allowed: Tensor, gain: Tensor | None) -> Tensor:
        """Log odds (row, action), with pairs of which the right root is ``allowed`` (row, root - 1)."""
        pairs = (self.first(seen[:, :-1]) + self.second(seen[:, 1:])).relu()
        logits: Tensor = self.action(pairs)
        if gain is not None:
            logits = logits + self.trust * gain
        return logits.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(1)


class _Forest:
    """Weights (row, root, context, symbol) of the symbols of roots under a parent, given what is below them.

    Contexts are labels of the parent, or a single one, as in `probmodels.grammar.inside.Chart`; the largest weight of a
    root is 1.
    """

    def __init__(self, tables: tuple[Tensor, Tensor, Tensor], word: Tensor) -> None:
        self.root, self.rule, emission = (table.detach() for table in tables)
        self.labels, self.contexts = len(self.root), 1 if len(self.rule) == 1 else len(self.root)
        leaf = emission.T[word]
        weight = torch.cat([leaf.new_zeros(*word.shape, self.labels), leaf], -1)
        self.weight = _scaled(weight.unsqueeze(2).expand(-1, -1, self.contexts, -1))

    def gains(self, rows: Tensor, last: Tensor) -> Tensor:
        """What joining two roots under a label adds to the log density (row, root - 1, label), contexts averaged over.

        Parameters
        ----------
        rows
            Rows of the forests that are asked for.
        last
            Whether these have two roots, of which the root of the sentence is made.
        """
        weight = self.weight[rows]
        left, right = weight[:, :-1], weight[:, 1:]
        if self.contexts == 1:
            both = (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2).squeeze(2)  # (row, pair, symbols)
            value = (both @ self.rule.flatten(2)[0].T).unsqueeze(2)  # (row, pair, context, label)
        else:
            value = torch.einsum("xabc,rpab,rpac->rpxa", self.rule, left, right)
        inner = value[:, :, : self.contexts].mean(2)
        value = torch.where(last[:, None, None], value[:, :, -1] * self.root, inner)
        alone = _log(weight.sum(-1).mean(-1))
        return _log(value) - (alone[:, :-1] + alone[:, 1:]).unsqueeze(-1)

    def join(self, pair: Tensor, label: Tensor, source: Tensor, new: Tensor) -> None:
        """Put a root of a label in the place of each pair of roots.

        Parameters
        ----------
        pair
            Places (row, 2).
        label
            Labels of the new roots (row,).
        source
            Place of every root before (row, root).
        new
            Whether a root is the new one (row, root).
        """
        each = torch.arange(len(pair), device=pair.device)
        under = label if self.contexts > 1 else torch.zeros_like(label)
        left, right = self.weight[each, pair[:, 0], under], self.weight[each, pair[:, 1], under]
        value = torch.einsum("xrbc,rb,rc->rx", self.rule[: self.contexts, label], left, right)
        joined = torch.zeros_like(self.weight[:, 0]).scatter(
            2, label[:, None, None].expand(-1, self.contexts, 1), value.unsqueeze(-1)
        )
        kept = self.weight.gather(1, source[:, :, None, None].expand(-1, -1, *self.weight.shape[2:]))
        self.weight = torch.where(new[:, :, None, None], _scaled(joined.unsqueeze(1)), kept)


def _scaled(weight: Tensor) -> Tensor:
    return weight / weight.amax((-1, -2), keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)


def _log(value: Tensor) -> Tensor:
    return value.clamp(min=torch.finfo(value.dtype).tiny).log()


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows (row, place, width) of values by index (row, place); a plain gather, whose derivative is a plain sum."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


@torch.no_grad()
def backward_path(tree: Tensor, num_labels: int) -> Tensor:
    """Actions (row, N - 1) by which `TreePolicy` builds trees, drawn by the backward policy.

    Parameters
    ----------
    tree
        Trees (row, N - 1, 3).
    num_labels
        Number of labels.
    """
    rows, places = tree.shape[:2]
    each = torch.arange(rows, device=tree.device)
    label, start, end = tree.unbind(-1)
    whole = label >= 0  # nodes that have not been taken apart
    number = whole.sum(-1)
    actions = tree.new_zeros(rows, places)
    for step in reversed(range(places)):
        active = step < number
        covered = (start.unsqueeze(2) >= start.unsqueeze(1)) & (end.unsqueeze(2) <= end.unsqueeze(1))
        covered = (covered & whole.unsqueeze(1)).sum(2) > 1  # by another node than itself
        top = (whole & ~covered).to(torch.get_default_dtype())
        top[:, 0] = torch.where(active, top[:, 0], 1.0)
        node = torch.multinomial(top, 1).squeeze(-1)
        whole[each, node] &= ~active
        before = (whole & (end <= start[each, node].unsqueeze(-1))).sum(-1)
        action = (start[each, node] - before) * num_labels + label[each, node]
        actions[:, step] = torch.where(active, action, 0)
    return actions
