"""What is known of the trees of sentences: spans, trees of least risk, agreement with given ones, pictures.

With draws of trees, the probability of a span is the share of draws in which it is that of a node. The tree of most
expected right spans is that of least risk (Goodman 1996). Trees are compared with given constituents by unlabelled F1,
the harmonic mean of precision and recall over all spans of all sentences, but for whole sentences, which are always
right. Where given trees are not binary no tree has precision 1.

References
----------
Goodman, J. (1996). Parsing algorithms and metrics. ACL. https://arxiv.org/abs/cmp-lg/9605036
Klein, D. and Manning, C. D. (2002). A generative constituent-context model for improved grammar induction. ACL.
https://aclanthology.org/P02-1017
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from annotated_types import Len
from numpy.typing import NDArray

from probmodels.errors import DataError, ResultError
from probmodels.grammar.inside import best_trees, span_grid
from probmodels.inference.result import Result
from probmodels.options import Natural, checked
from probmodels.outputs import Dpi, Outputs, write_all

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "bracketing",
    "bracketing_metrics",
    "branching_trees",
    "least_risk_trees",
    "plot_parses",
    "summarise_parses",
    "write_outputs",
]

_SHOWN = 12  # sentences in the table that goes to the terminal
_PLOTTED = 6


def bracketing_metrics(trees: NDArray[Any], gold: NDArray[Any], length: NDArray[Any]) -> dict[str, float]:
    """Unlabelled ``precision``, ``recall`` and ``f1`` of trees, over all their spans but whole sentences.

    Parameters
    ----------
    trees
        Trees (..., sentence, N - 1, 3), as `probmodels.grammar.inside` describes them; counts of several draws are
        added.
    gold
        Constituents (sentence, N, N + 1) by start and end.
    length
        Words of each sentence (sentence,).
    """
    found = span_grid(torch.as_tensor(np.asarray(trees))).numpy()
    true = np.broadcast_to(gold, found.shape)
    rows = np.arange(len(length))
    proper = np.ones(gold.shape, dtype=bool)
    proper[rows, 0, length] = False
    right, drawn, given = ((grid & proper).sum() for grid in (found & true, found, true))
    nothing = float("nan")
    return {
        "precision": float(right / drawn) if drawn else nothing,
        "recall": float(right / given) if given else nothing,
        "f1": float(2 * right / (drawn + given)) if drawn + given else nothing,
    }


def branching_trees(length: NDArray[Any], size: int, *, right: bool = True) -> NDArray[np.int64]:
    """Trees (sentence, N - 1, 3), of label 0, that branch to the right, or to the left, everywhere: a baseline."""
    split = np.arange(size - 1)
    inside = split < np.asarray(length)[:, None] - 1
    start = split if right else np.zeros_like(split)
    end = np.asarray(length)[:, None] if right else split + 2
    nodes = np.stack(np.broadcast_arrays(0, start, end), -1)
    nodes = np.broadcast_to(nodes, (len(length), size - 1, 3))
    return np.where(inside[..., None], nodes, -1)


def least_risk_trees(chance: NDArray[Any], length: NDArray[Any]) -> NDArray[np.int64]:
    """Trees (sentence, N - 1, 3), of label 0, of most expected right spans.

    Parameters
    ----------
    chance
        Probabilities (sentence, N, N + 1) of spans by start and end.
    length
        Words of each sentence (sentence,).
    """
    return best_trees(torch.as_tensor(chance), torch.as_tensor(length)).numpy()


def bracketing(tree: NDArray[Any], words: Sequence[str]) -> str:
    """A tree (N - 1, 3) of words in brackets, as in ``((the dog) (saw it))``."""
    nodes = {(int(start), int(end)): place + 1 for place, (label, start, end) in enumerate(tree) if label >= 0}

    def write(start: int, end: int) -> str:
        if end - start == 1:
            return words[start]
        middle = nodes[start, end]
        return f"({write(start, middle)} {write(middle, end)})"

    return write(0, len(words))


@checked(ResultError)
def summarise_parses(result: Result) -> xr.Dataset:
    """Spans, trees of least risk and their agreement with given trees.

    Parameters
    ----------
    result
        Result of a grammar, with draws of ``tree``.

    Returns
    -------
    xr.Dataset
        ``span_probability`` (sentence, start, end); ``tree`` (sentence, split, node) of least risk; its
        ``expected_accuracy`` (sentence,), the mean probability of its spans but the whole sentence, 1 where there are
        none; ``sentence_words`` (sentence,); and where constituents are given attributes ``f1_drawn``, of all draws,
        ``f1_least_risk``, ``f1_right_branching`` and ``f1_left_branching``.

    Raises
    ------
    ResultError
        If the result holds no trees.
    """
    constant = result.group("constant_data")
    if "tree" not in result.posterior or "length" not in constant:
        raise ResultError("the result has no draws of trees with their sentences; give that of a grammar")
    length, vocabulary = constant["length"].values, constant["vocabulary"].values
    word = result.tree["observed_data"].to_dataset()["word"].values
    draws = result.posterior["tree"].values
    draws = draws.reshape(-1, *draws.shape[2:])
    chance = sum(span_grid(torch.as_tensor(draw)).double() for draw in draws).numpy() / len(draws)  # type: ignore[union-attr]
    best = least_risk_trees(chance, length)
    rows = np.arange(len(length))
    spans = span_grid(torch.as_tensor(best)).numpy()
    spans[rows, 0, length] = False
    count = spans.sum((1, 2))
    expected = np.where(count > 0, (spans * chance).sum((1, 2)) / np.maximum(count, 1), 1.0)
    texts = [" ".join(vocabulary[codes[:n]]) for codes, n in zip(word, length, strict=True)]
    out = xr.Dataset(
        {
            "span_probability": (("sentence", "start", "end"), chance),
            "tree": (("sentence", "split", "node"), best),
            "expected_accuracy": ("sentence", expected),
            "sentence_words": ("sentence", np.asarray(texts, dtype=str)),
        },
        {name: result.posterior[name] for name in ("sentence", "split", "node") if name in result.posterior.coords},
    )
    if "gold" in constant:
        gold, size = constant["gold"].values.astype(bool), word.shape[1]
        out["gold"] = constant["gold"].variable
        compared = {
            "drawn": draws,
            "least_risk": best,
            "right_branching": branching_trees(length, size),
            "left_branching": branching_trees(length, size, right=False),
        }
        out.attrs |= {f"f1_{name}": bracketing_metrics(trees, gold, length)["f1"] for name, trees in compared.items()}
        out.attrs["gold_from"] = str(
            constant.attrs.get("gold_from", result.tree["constant_data"].attrs.get("gold_from", ""))
        )
    return out


@checked(DataError)
def plot_parses(summary: xr.Dataset, sentences: Annotated[Sequence[Natural], Len(1)] | None = None) -> Figure:
    """Trees of least risk with the probabilities of their spans.

    Parameters
    ----------
    summary
        What `summarise_parses` returns.
    sentences
        Positions of the sentences; None for some of the longest.

    Raises
    ------
    DataError
        If there is no such sentence.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = (summary["tree"].values[:, :, 0] >= 0).sum(1) + 1
    if sentences is None:
        sentences = sorted(np.argsort(-lengths, kind="stable")[:_PLOTTED].tolist())
    if max(sentences) >= len(lengths):
        raise DataError(f"sentences={list(sentences)}; there are {len(lengths)}, counted from 0")
    figure = Figure(figsize=(8, 2.6 * len(sentences)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, row in zip(np.ravel(figure.subplots(len(sentences), 1)), sentences, strict=True):
        _plot_tree(axes, summary.isel(sentence=row))
    return figure


def _plot_tree(axes: Any, one: xr.Dataset) -> None:
    words = str(one["sentence_words"].values).split()
    nodes = {(int(s), int(e)): place + 1 for place, (label, s, e) in enumerate(one["tree"].values) if label >= 0}
    chance = one["span_probability"].values

    def draw(start: int, end: int) -> tuple[float, int]:
        """Place of a node: the middle of its children, one above the higher of them."""
        if end - start == 1:
            axes.text(start, 0, words[start], ha="center", va="top", fontsize=9)
            return float(start), 0
        middle = nodes[start, end]
        below = [draw(start, middle), draw(middle, end)]
        x, y = (below[0][0] + below[1][0]) / 2, max(height for _, height in below) + 1
        for other in below:
            axes.plot([x, other[0]], [y, other[1]], color="0.6", linewidth=1, zorder=1)
        sure = float(chance[start, end])
        colour = (1, 1 - 0.5 * (1 - sure), 1 - 0.8 * (1 - sure))
        axes.text(
            x,
            y,
            f"{sure:.2f}",
            ha="center",
            va="center",
            fontsize=8,
            zorder=2,
            bbox={"boxstyle": "round", "facecolor": colour, "edgecolor": "0.6"},
        )
        return x, y

    _, height = draw(0, len(words))
    axes.set_xlim(-0.6, len(words) - 0.4)
    axes.set_ylim(-0.8, height + 0.6)
    axes.set_axis_off()


@checked(ResultError)
def write_outputs(result: Result, folder: str | Path, *, dpi: Dpi = 110) -> Outputs:
    """Write ``summary.txt``, ``trees.csv`` and ``trees.png``.

    Parameters
    ----------
    result
        Result of a grammar.
    folder
        Where to; made where it is missing.
    dpi
        Resolution of the figure.
    """
    summary = summarise_parses(result)
    sentences = [str(text).split() for text in summary["sentence_words"].values]
    frame = pd.DataFrame(
        {
            "sentence": summary["sentence"].values,
            "tree": [bracketing(t, words) for t, words in zip(summary["tree"].values, sentences, strict=True)],
            "expected_accuracy": summary["expected_accuracy"].values,
        }
    )
    metrics = {name: value for name, value in summary.attrs.items() if name.startswith("f1_")}
    lines = [f"{len(frame)} sentences, {sum(map(len, sentences))} words"]
    for name, value in metrics.items():
        lines.append(f"unlabelled F1, {name.removeprefix('f1_').replace('_', ' ')}: {value:.3f}")
    if summary.attrs.get("gold_from"):
        lines.append(f"given trees: {summary.attrs['gold_from']}")
    lines += ["", "trees of least risk, with the expected share of right spans:"]
    lines += [f"  {row.expected_accuracy:.2f}  {row.tree}" for row in frame.head(_SHOWN).itertuples()]
    figure = plot_parses(summary)
    return write_all(
        result,
        folder,
        table="\n".join(lines),
        tables={"trees": frame},
        files={"trees.png": lambda file: figure.savefig(file, dpi=dpi)},
    )
