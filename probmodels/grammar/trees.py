"""Distributions of trees and of words, given a grammar and the lengths of sentences."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from probmodels.grammar.inside import Tables, draw_trees, draw_words, leaf_weights, log_likelihood, tree_log_weight

__all__ = ["Trees", "Words"]


class _OfSentences(TorchDistribution):
    """Distribution of integers that belong to sentences, given a grammar.

    Parameters
    ----------
    tables
        The grammar.
    length
        Words of each sentence (...).
    size
        Positions N.
    event
        Shape of an event.
    word
        Words (..., N) where they are given.
    tree
        Trees (..., N - 1, 3) where they are given.
    """

    arg_constraints = {}  # noqa: RUF012  (as torch has it)

    def __init__(
        self,
        tables: Tables,
        length: Tensor,
        size: int,
        *,
        word: Tensor | None = None,
        tree: Tensor | None = None,
    ) -> None:
        self.tables, self.length, self.size, self.word, self.tree = tables, length, size, word, tree
        super().__init__(length.shape, self._event(size), validate_args=False)

    @staticmethod
    def _event(size: int) -> torch.Size:
        raise NotImplementedError

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same over a larger batch."""
        shape = torch.Size(batch_shape)
        word = None if self.word is None else self.word.expand(*shape, self.size)
        tree = None if self.tree is None else self.tree.expand(*shape, self.size - 1, 3)
        return type(self)(self.tables, self.length.expand(shape), self.size, word=word, tree=tree)

    def _many(self, sample_shape: Any) -> tuple[torch.Size, Tensor]:
        """Shape of draws without that of an event, and lengths (row,)."""
        shape = torch.Size(sample_shape) + self.batch_shape
        return shape, self.length.expand(shape).reshape(-1)


class Trees(_OfSentences):
    """Trees under a grammar, given lengths; given words too, where there are any, and then normalised."""

    @constraints.dependent_property(is_discrete=True, event_dim=2)
    def support(self) -> Any:
        """Labels and positions, -1 beyond the end of a sentence."""
        return constraints.independent(constraints.integer_interval(-1, 10**9), 2)

    @staticmethod
    def _event(size: int) -> torch.Size:
        return torch.Size((size - 1, 3))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of trees, of the grammar as a whole; given words, of the tree among those of the sentence."""
        like = self.length.new_zeros(*value.shape[:-2], self.size)
        word = None if self.word is None else self.word.expand(like.shape)
        found = tree_log_weight(self.tables, value, leaf_weights(self.tables, word, like), self.length)
        if self.word is None:
            return found
        leaf = leaf_weights(self.tables, self.word, self.word).reshape(-1, self.size, len(self.tables.emission))
        return found - log_likelihood(self.tables, leaf, self.length.reshape(-1)).reshape(self.batch_shape)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  (as torch has it)
        """Exact draws by the inside algorithm."""
        shape, length = self._many(sample_shape)
        like = length.new_zeros(1, self.size)
        if self.word is not None:
            like = self.word.expand(*shape, self.size).reshape(-1, self.size)
        leaf = leaf_weights(self.tables, None if self.word is None else like, like)
        return draw_trees(self.tables, leaf, length).reshape(*shape, self.size - 1, 3)


class Words(_OfSentences):
    """Words of sentences: given trees, or with trees marginalised where there are none."""

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> Any:
        """Codes of words."""
        return constraints.independent(constraints.integer_interval(0, self.tables.emission.shape[-1] - 1), 1)

    @staticmethod
    def _event(size: int) -> torch.Size:
        return torch.Size((size,))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of words."""
        leaf = leaf_weights(self.tables, value, value)
        if self.tree is None:
            rows = value.shape[:-1].numel()
            length = self.length.expand(value.shape[:-1]).reshape(rows)
            return log_likelihood(self.tables, leaf.reshape(rows, *leaf.shape[-2:]), length).reshape(value.shape[:-1])
        tree = self.tree.expand(*value.shape[:-1], self.size - 1, 3)
        alone = tree_log_weight(self.tables, tree, leaf_weights(self.tables, None, value), self.length)
        return (tree_log_weight(self.tables, tree, leaf, self.length) - alone).where(alone > -torch.inf, 0.0)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  (as torch has it)
        """Draw trees where there are none, then words."""
        shape, length = self._many(sample_shape)
        if self.tree is None:
            tree = Trees(self.tables, length, self.size).sample()
        else:
            tree = self.tree.expand(*shape, self.size - 1, 3).reshape(-1, self.size - 1, 3)
        return draw_words(self.tables, tree, length).reshape(*shape, self.size)
