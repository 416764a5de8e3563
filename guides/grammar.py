"""Policy of trees: sentences are built bottom up, each step joining two neighbouring roots under a label.

A state is a forest over the words of a sentence, an action a pair of neighbouring roots with the label of the node that
joins them. A transformer on embeddings of the roots scores actions; the embedding of a new root is composed of those of
its children and its label. The orders in which one tree can be built are weighed by a backward policy that takes apart
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

from collections.abc import Mapping

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
    """Guide of a latent site ``tree`` (sentence,), as `probmodels.inside` describes trees.

    Parameters
    ----------
    num_words, num_labels
        Size of the vocabulary, and number of labels.
    max_length
        Most words of a sentence.
    width
        Size of embeddings, a multiple of ``heads``.
    layers, heads
        Of the transformer.
    log_z
        Whether there is a site ``log_Z`` (sentence,), which `TrajectoryBalance` needs.
    seed
        Of the start.
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
        log_z: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.num_labels, self.max_length = num_labels, max_length
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
            fn = dist.Categorical(logits=only.index_copy(0, rows, self._logits(seen, present[:, 1:])))
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

    def _logits(self, seen: Tensor, allowed: Tensor) -> Tensor:
        """Log odds (row, action), with pairs of which the right root is ``allowed`` (row, root - 1)."""
        pairs = (self.first(seen[:, :-1]) + self.second(seen[:, 1:])).relu()
        logits: Tensor = self.action(pairs).masked_fill(~allowed.unsqueeze(-1), -torch.inf)
        return logits.flatten(1)


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
