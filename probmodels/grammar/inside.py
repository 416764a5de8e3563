"""Sums over the trees of a sentence by the inside algorithm: likelihood, exact draws, spans; weights of given trees.

A tree of n words has one inner node between each two neighbouring words: the one whose left child ends there. Trees are
therefore integers (..., N - 1, 3) for sentences of at most N words: row k holds label, start and end of the node that
splits words start, ..., k from words k + 1, ..., end - 1, and -1 where the sentence has no such word.

Rules may depend on a *context*: none, a single one; or the label of the parent, the last one being that of the root,
which has no parent. Sums over the latter are those of a context-free grammar whose states are pairs of labels.

References
----------
Baker, J. K. (1979). Trainable grammars for speech recognition. J. Acoust. Soc. Am. 65.
https://doi.org/10.1121/1.2017061
Goodman, J. (1996). Parsing algorithms and metrics. ACL. https://arxiv.org/abs/cmp-lg/9605036
Johnson, M. (1998). PCFG models of linguistic tree representations. Computational Linguistics 24(4).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Chart",
    "Tables",
    "best_trees",
    "draw_trees",
    "draw_words",
    "inside",
    "leaf_weights",
    "log_likelihood",
    "span_grid",
    "span_probabilities",
    "split_states",
    "tree_log_weight",
]


class Tables(NamedTuple):
    """Probabilities, or other weights, of a grammar in Chomsky normal form.

    Attributes
    ----------
    root
        Weights of the label of the root (nonterminal,).
    rule
        Weights of pairs of children (context, nonterminal, symbol, symbol), symbols being nonterminals, then
        preterminals.
    emission
        Weights of words (preterminal, word).
    """

    root: Tensor
    rule: Tensor
    emission: Tensor

    @property
    def num_nonterminals(self) -> int:
        """Number of labels of inner nodes."""
        return len(self.root)

    def weighted(self, left: float) -> Tables:
        """The same with a factor exp(-left) for every left child that is no word."""
        if not left:
            return self
        factor = self.rule.new_ones(self.rule.shape[-1])
        factor[: self.num_nonterminals] = -left
        factor[: self.num_nonterminals] = factor[: self.num_nonterminals].exp()
        return self._replace(rule=self.rule * factor.unsqueeze(-1))


class Chart(NamedTuple):
    """Inside weights of spans, each relative to the exponential of its scale.

    Attributes
    ----------
    vectors
        By width from 1: weights (row, start, context, symbol) of symbols under a parent, contexts being labels of the
        parent or a single one.
    scales
        By width from 1: logs (row, start).
    roots
        By width from 2: weights (row, nonterminal) of labels of a root that spans the first words.
    """

    vectors: list[Tensor]
    scales: list[Tensor]
    roots: list[Tensor]


def leaf_weights(tables: Tables, word: Tensor | None, like: Tensor) -> Tensor:
    """Weights of preterminals at words (..., N, preterminal): probabilities of words, or 1 for any word.

    Parameters
    ----------
    tables
        The grammar.
    word
        Codes (..., N); None for any word.
    like
        Integers (..., N) that say the shape.
    """
    if word is None:
        return tables.emission.new_ones(*like.shape, len(tables.emission))
    return tables.emission.T.index_select(0, word.flatten()).reshape(*word.shape, -1)


def inside(tables: Tables, leaf: Tensor, spans: Tensor | None = None) -> Chart:
    """Sums over all trees of all spans.

    Parameters
    ----------
    tables
        The grammar.
    leaf
        Weights of preterminals (row, N, preterminal).
    spans
        Logs of further weights (row, N, N + 1) of inner nodes by start and end; derivatives of a log likelihood by them
        are probabilities of spans.
    """
    root, rule, _ = tables
    rows, length, _ = leaf.shape
    labels, symbols, parents = len(root), rule.shape[-1], rule.shape[0]
    contexts = 1 if parents == 1 else labels
    tiny = torch.finfo(leaf.dtype).tiny
    # Of pairs of symbols, for every context of the children: one matrix for all labels, or one for each.
    pairs = rule.flatten(2).permute(1, 2, 0) if parents > 1 else rule.flatten(2).mT
    top = leaf.amax(-1).clamp(min=tiny).detach()
    vector = torch.cat([leaf.new_zeros(rows, length, labels), leaf / top.unsqueeze(-1)], -1)
    vectors = [vector.unsqueeze(2).expand(-1, -1, contexts, -1)]
    scales, roots = [top.log()], []
    for width in range(2, length + 1):
        count = length - width + 1
        cuts = range(1, width)
        left = torch.stack([vectors[cut - 1][:, :count] for cut in cuts], -1)
        right = torch.stack([vectors[width - cut - 1][:, cut : cut + count] for cut in cuts], -2)
        logs = torch.stack([scales[c - 1][:, :count] + scales[width - c - 1][:, c : c + count] for c in cuts], -1)
        base = logs.amax(-1)
        share = (logs - base.unsqueeze(-1)).exp()[:, :, None, None]
        both = ((left * share) @ right).reshape(rows * count, contexts, symbols**2).transpose(0, 1)
        found = both @ pairs  # (context, span, label), or (label, span, context)
        value = found[0].unsqueeze(-2) if contexts < labels or parents == 1 else found.permute(1, 2, 0)
        value = value.reshape(rows, count, parents, labels)
        if spans is not None:
            extra = torch.stack([spans[:, start, start + width] for start in range(count)], -1)
            value = value * extra.exp()[:, :, None, None]
        top = value.amax((-1, -2)).clamp(min=tiny).detach()
        value = value / top[:, :, None, None]
        roots.append(value[:, 0, -1] * root)
        scales.append(base + top.log())
        rest = leaf.new_zeros(rows, count, contexts, symbols - labels)
        vectors.append(torch.cat([value[:, :, :contexts], rest], -1))
    return Chart(vectors, scales, roots)


def log_likelihood(tables: Tables, leaf: Tensor, length: Tensor, spans: Tensor | None = None) -> Tensor:
    """Log probability (row,) of sentences, summed over their trees.

    Parameters
    ----------
    tables, leaf, spans
        As in `inside`.
    length
        Words of each sentence (row,), 2 or more.
    """
    chart = inside(tables, leaf, spans)
    own = length.unsqueeze(-1) - 2
    weight = torch.stack([root.sum(-1) for root in chart.roots], -1).gather(
        -1, own
    )  # before the log, which may be -inf
    scale = torch.stack([scale[:, 0] for scale in chart.scales[1:]], -1).gather(-1, own)
    return (weight.log() + scale).squeeze(-1)


def span_probabilities(tables: Tables, leaf: Tensor, length: Tensor) -> Tensor:
    """Posterior probability (row, N, N + 1), by start and end, that a span is that of an inner node."""
    size = leaf.shape[1]
    with torch.enable_grad():
        spans = leaf.new_zeros(len(leaf), size, size + 1).requires_grad_()
        fixed = Tables(*(table.detach() for table in tables))
        total = log_likelihood(fixed, leaf.detach(), length, spans).sum()
        (found,) = torch.autograd.grad(total, spans)
    return found


@torch.no_grad()
def draw_trees(tables: Tables, leaf: Tensor, length: Tensor) -> Tensor:
    """Exact draws of trees (row, N - 1, 3) from their distribution given leaves and lengths.

    Parameters
    ----------
    tables
        The grammar.
    leaf
        Weights of preterminals (row, N, preterminal), or (1, N, preterminal) for the same in all rows.
    length
        Words of each sentence (row,), 2 or more.
    """
    rule = tables.rule
    chart = inside(tables, leaf)
    rows, size, symbols = len(length), leaf.shape[1], rule.shape[-1]
    contexts = chart.vectors[0].shape[2]
    wide = [torch.nn.functional.pad(v, (0, 0, 0, 0, 0, size - v.shape[1])) for v in chart.vectors]
    vectors = torch.stack(wide, 2).flatten(0, 3)  # (row, start, width, context), symbol
    scales = [torch.nn.functional.pad(s, (0, size - s.shape[1]), value=-torch.inf) for s in chart.scales]
    scale = torch.stack(scales, 2).flatten()
    each = torch.arange(rows, device=length.device)
    source = each if len(leaf) > 1 else torch.zeros_like(each)
    tops = torch.stack(chart.roots, 1)[source, length - 2]
    queue = length.new_zeros(rows, size + 1, 4)  # start, end, label, context; the last row is never read
    queue[:, 0, 1], queue[:, 0, 3] = length, len(rule) - 1
    queue[:, 0, 2] = torch.multinomial(tops, 1).squeeze(-1)
    filled = torch.ones_like(length)
    tree = length.new_full((rows, size, 3), -1)
    cut = torch.arange(1, size, device=length.device)
    for node in range(size - 1):
        start, end, label, context = queue[:, node].unbind(-1)
        active = node < length - 1
        width = end - start
        allowed = active.unsqueeze(-1) & (cut < width.unsqueeze(-1))
        middle = (start.unsqueeze(-1) + cut).clamp(max=size - 1)
        at_left = (source * size + start).unsqueeze(-1) * size + cut - 1
        at_right = (source.unsqueeze(-1) * size + middle) * size + (width.unsqueeze(-1) - cut - 1).clamp(min=0)
        parent = (label if contexts > 1 else torch.zeros_like(label)).unsqueeze(-1)
        left, right = (vectors[at * contexts + parent] for at in (at_left, at_right))  # (row, cut, symbol)
        logs = (scale[at_left] + scale[at_right]).masked_fill(~allowed, -torch.inf)
        share = (logs - logs.amax(-1, keepdim=True)).exp().where(allowed, 0.0)
        pairs = rule[context, label]
        weight = (left * (right @ pairs.mT) * share.unsqueeze(-1)).flatten(1)
        weight[:, 0] = weight[:, 0].where(active, 1.0)
        choice = torch.multinomial(weight, 1).squeeze(-1)
        place, first = choice // symbols, choice % symbols
        weight = pairs[each, first] * right[each, place]
        weight[:, 0] = weight[:, 0].where(active, 1.0)
        second = torch.multinomial(weight, 1).squeeze(-1)
        middle = start + place + 1
        here = torch.where(active, middle - 1, size - 1)
        tree[each, here] = torch.stack([label, start, end], -1)
        for low, high, symbol in ((start, middle, first), (middle, end, second)):
            inner = active & (high - low > 1)
            child = torch.stack([low, high, symbol, label if len(rule) > 1 else torch.zeros_like(label)], -1)
            queue[each, torch.where(inner, filled, size)] = child
            filled = filled + inner
    tree[:, -1] = -1
    return tree[:, :-1]


class _Nodes(NamedTuple):
    """What the rules at the nodes of trees are about, (tree, N - 1, ...)."""

    active: Tensor
    rule: Tensor  # index of context and label
    left: Tensor  # label of the left child, -1 for a word
    right: Tensor
    start: Tensor
    middle: Tensor
    root: Tensor  # label of the root (tree,)


def _read(tables: Tables, tree: Tensor, length: Tensor) -> _Nodes:
    rows, places = tree.shape[0], tree.shape[1]
    size, labels = places + 1, tables.num_nonterminals
    position = torch.arange(places, device=tree.device)
    active = position < length.unsqueeze(-1) - 1
    label, start, end = tree.clamp(min=0).unbind(-1)
    middle = (position + 1).expand(rows, -1)
    last = size * (size + 1)  # where nodes that do not exist write
    here, lower, upper = (
        torch.where(active, low * (size + 1) + high, last)
        for low, high in ((start, end), (start, middle), (middle, end))
    )
    grid = label.new_full((rows, last + 1), -1).scatter(1, here, label)
    left, right = grid.gather(1, lower), grid.gather(1, upper)
    root = grid.gather(1, length.unsqueeze(-1)).squeeze(-1)
    context = torch.zeros_like(label)
    if len(tables.rule) > 1:
        above = label.new_full((rows, last + 1), labels).scatter(1, lower, label).scatter(1, upper, label)
        context = above.gather(1, here)
    return _Nodes(active, context * labels + label, left, right, start, middle, root)


def _children(nodes: _Nodes, leaf: Tensor, labels: int) -> tuple[Tensor, Tensor]:
    """Weights of symbols (tree, N - 1, symbol) of the left and right children."""
    vectors = []
    names = torch.arange(labels, device=leaf.device)
    for label, place in ((nodes.left, nodes.start), (nodes.right, nodes.middle)):
        words = leaf.gather(1, place.unsqueeze(-1).expand(-1, -1, leaf.shape[-1]))
        inner = (label.unsqueeze(-1) == names).to(leaf.dtype)
        vectors.append(torch.cat([inner, words * (label < 0).unsqueeze(-1)], -1))
    return vectors[0], vectors[1]


def tree_log_weight(tables: Tables, tree: Tensor, leaf: Tensor, length: Tensor) -> Tensor:
    """Log probability (...) of trees with their leaves, summed over the preterminals.

    Parameters
    ----------
    tables
        The grammar.
    tree
        Trees (..., N - 1, 3).
    leaf
        Weights of preterminals (..., N, preterminal).
    length
        Words of each sentence (...).
    """
    shape = tree.shape[:-2]
    tree, length = tree.reshape(-1, *tree.shape[-2:]), length.expand(shape).reshape(-1)
    leaf = leaf.expand(*shape, *leaf.shape[-2:]).reshape(-1, *leaf.shape[-2:])
    nodes = _read(tables, tree, length)
    left, right = _children(nodes, leaf, tables.num_nonterminals)
    pairs = tables.rule.flatten(0, 1).index_select(0, nodes.rule.flatten())
    weight = (left.flatten(0, 1) * (pairs @ right.flatten(0, 1).unsqueeze(-1)).squeeze(-1)).sum(-1)
    logs = weight.reshape(nodes.active.shape).where(nodes.active, 1.0).log()
    return (logs.sum(-1) + tables.root.log()[nodes.root]).reshape(shape)


@torch.no_grad()
def draw_words(tables: Tables, tree: Tensor, length: Tensor) -> Tensor:
    """Draws of words (..., N) given trees; 0 after the end of a sentence."""
    shape, size = tree.shape[:-2], tree.shape[-2] + 1
    tree, length = tree.reshape(-1, *tree.shape[-2:]), length.expand(shape).reshape(-1)
    labels, symbols = tables.num_nonterminals, tables.rule.shape[-1]
    nodes = _read(tables, tree, length)
    leaf = tables.emission.new_ones(len(tree), size, len(tables.emission))
    left, right = (vector.flatten(0, 1) for vector in _children(nodes, leaf, labels))
    pairs = tables.rule.flatten(0, 1).index_select(0, nodes.rule.flatten())
    weight = (pairs * left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(1)
    weight[:, 0] = weight[:, 0].where(nodes.active.flatten(), 1.0)
    choice = torch.multinomial(weight, 1).reshape(nodes.active.shape)
    preterminal = length.new_zeros(len(tree), size + 1)
    for symbol, label, place in (
        (choice // symbols, nodes.left, nodes.start),
        (choice % symbols, nodes.right, nodes.middle),
    ):
        here = torch.where(nodes.active & (label < 0), place, size)
        preterminal = preterminal.scatter(1, here, (symbol - labels).clamp(min=0))
    preterminal = preterminal[:, :-1]
    word = torch.multinomial(tables.emission[preterminal.flatten()], 1).reshape(-1, size)
    word = word.where(torch.arange(size, device=word.device) < length.unsqueeze(-1), 0)
    return word.reshape(*shape, size)


def span_grid(tree: Tensor) -> Tensor:
    """Whether a span is that of an inner node: bool (..., N, N + 1) by start and end, of trees (..., N - 1, 3)."""
    size = tree.shape[-2] + 1
    shape = tree.shape[:-2]
    flat = tree.reshape(-1, size - 1, 3)
    here = torch.where(flat[..., 0] >= 0, flat[..., 1] * (size + 1) + flat[..., 2], size * (size + 1))
    grid = torch.zeros(len(flat), size * (size + 1) + 1, dtype=torch.bool, device=tree.device)
    return grid.scatter(1, here, True)[:, :-1].reshape(*shape, size, size + 1)


def best_trees(chance: Tensor, length: Tensor) -> Tensor:
    """Trees of most expected spans, (row, N - 1, 3) with label 0: minimum risk where risk counts wrong spans.

    Parameters
    ----------
    chance
        Probability or worth (row, N, N + 1) of spans by start and end.
    length
        Words of each sentence (row,).
    """
    rows, size, _ = chance.shape
    best = {1: chance.new_zeros(rows, size)}
    where: dict[int, Tensor] = {}
    for width in range(2, size + 1):
        count = size - width + 1
        sums = [best[cut][:, :count] + best[width - cut][:, cut : cut + count] for cut in range(1, width)]
        value, place = torch.stack(sums, -1).max(-1)
        own = torch.stack([chance[:, start, start + width] for start in range(count)], -1)
        best[width], where[width] = value + own, place + 1
    tree = length.new_full((rows, size - 1, 3), -1)
    cuts = {width: found.tolist() for width, found in where.items()}
    for row, words in enumerate(length.tolist()):
        todo = [(0, words)]
        while todo:
            start, end = todo.pop()
            if end - start < 2:
                continue
            middle = start + cuts[end - start][row][start]
            tree[row, middle - 1] = torch.tensor([0, start, end])
            todo += [(start, middle), (middle, end)]
    return tree


def split_states(tables: Tables) -> Tables:
    """The context-free grammar that says the same as one whose rules depend on the parent's label.

    Its nonterminals are pairs (context, nonterminal), in this order.
    """
    root, rule, emission = tables
    parents, labels, symbols, _ = rule.shape
    if parents == 1:
        return tables
    states = parents * labels
    new_root = root.new_zeros(parents, labels)
    new_root[-1] = root
    # Symbol s below label a is state (a, s), or the preterminal that it was.
    place = torch.zeros(labels, symbols, states + symbols - labels, dtype=rule.dtype)
    for a in range(labels):
        for s in range(symbols):
            place[a, s, a * labels + s if s < labels else states + s - labels] = 1.0
    new_rule = torch.einsum("paxy,axu,ayv->pauv", rule, place, place)
    return Tables(new_root.flatten(), new_rule.reshape(1, states, *new_rule.shape[2:]), emission)
