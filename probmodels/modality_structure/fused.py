"""What a fusion encoder is worth on rows that were held out: partners told from others, and hidden words found."""

from __future__ import annotations

from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from probmodels.errors import ResultError
from probmodels.inference.programs.programs import fitted
from probmodels.inference.result import Result
from probmodels.modality_structure.fusion import Fusion, hide_words
from probmodels.modality_structure.views import tensors
from probmodels.options import Seed, checked

__all__ = ["fused_scores"]

_FEWEST = 3  # rows of a pair


@checked(ResultError)
def fused_scores(result: Result, split: Literal["train", "test"] = "test", *, seed: Seed = 0) -> pd.DataFrame:
    """How well a fusion encoder tells partners, and finds hidden words.

    Parameters
    ----------
    result
        Result of `fit_svi` with a weight of ``fusion`` or ``masked``.
    split
        Whose rows.
    seed
        Seed of the other rows and of the hidden words.

    Returns
    -------
    pandas.DataFrame
        Columns ``first``, ``second``; ``N``, the number of rows that have both; ``partner``, the share of rows whose
        partner gets a higher score than another row (chance is a half); and, of texts, ``words``, the share of hidden
        words that are found, beside ``words_other``, with another row in the place of the partner, and
        ``words_common``, by always naming the commonest word of these hidden ones.

    Raises
    ------
    ResultError
        If the result is not one of this method with a fusion encoder.
    """
    if result.tree.attrs.get("method") != "modality_structure":
        raise ResultError(f"the result is of {result.tree.attrs.get('method')!r}; give one of modality_structure")
    problem = result.rebuild()
    assert problem.data is not None
    present, views = tensors(problem.data, split)
    generator = torch.Generator().manual_seed(seed)
    model: Any
    with fitted(problem, result.guide_state or {}, seed=0) as (model, _), torch.no_grad():
        fusion: Fusion | None = model.fusion
        if fusion is None:
            raise ResultError("the fit has no fusion encoder; give make_problem a weight of fusion or masked")
        seen = dict(zip(model.names, present.unbind(-1), strict=True))
        found = []
        for pair in fusion.pairs:
            rows = torch.nonzero(seen[pair[0]] & seen[pair[1]]).squeeze(-1)
            if len(rows) >= _FEWEST:
                own = {name: x[rows] for name, x in zip(model.names, views, strict=True) if name in pair}
                found.append(
                    {"first": pair[0], "second": pair[1], "N": len(rows)} | _pair(fusion, pair, own, generator)
                )
    return pd.DataFrame(found)


def _pair(
    fusion: Fusion, pair: tuple[str, str], views: dict[str, Tensor], generator: torch.Generator
) -> dict[str, float]:
    """Columns of one pair, of rows that have both modalities."""
    read, found = fusion.read(views), {}
    asking, answering = fusion.ordered(pair)
    own = torch.arange(len(views[asking]))
    order = torch.randperm(len(own), generator=generator)
    other = torch.empty_like(own)
    other[order] = order.roll(1)  # a single cycle: nobody's own
    if fusion.weights["fusion"]:
        right, wrong = (fusion.scores(pair, read, {asking: own, answering: rows}) for rows in (own, other))
        found["partner"] = float((right > wrong).float().mean() + (right == wrong).float().mean() / 2)
    if fusion.encoder(pair).words is not None:
        codes = views[asking]
        hidden = hide_words(codes, fusion.share, generator)
        for name, rows in (("words", own), ("words_other", other)):
            answer = read[answering][0][rows], read[answering][1][rows]
            guess = fusion.word_logits(pair, codes, hidden, answer).argmax(-1)
            found[name] = float((guess == codes)[hidden].float().mean())
        found["words_common"] = float(codes[hidden].bincount().max() / hidden.sum())
    return found
