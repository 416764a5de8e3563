"""What embeddings of several modalities are worth: information, retrieval, gap between modalities, and clusters."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from probmodels.errors import ResultError
from probmodels.inference.programs.programs import fitted
from probmodels.inference.result import Result
from probmodels.modality_structure.views import tensors
from probmodels.options import checked

__all__ = [
    "Embedded",
    "close_gap",
    "embed",
    "information_bound",
    "information_rows",
    "measure",
    "modality_gap",
    "recall_at",
    "shared_rows",
]

_LEAST = 2  # rows of a pair of modalities that is measured
_CANDIDATES = 1000  # from which a temperature is chosen
_RECALLS = (1, 5, 10)


class Embedded:
    """Embeddings of the rows of one split.

    Attributes
    ----------
    z
        Modality to shared embeddings (row, size).
    own
        Modality to independent embeddings (row, size), where there are any.
    present
        Modality to whether a row has it (row,).
    pairs
        Modalities that are matched.
    label
        Classes (row,), or None.
    temperature
        Of the matching; its posterior mean where it was inferred.
    """

    def __init__(self, model: Any, present: Any, views: Any, label: NDArray[Any] | None, temperature: float) -> None:
        found = model.embed(views)
        self.z = {name: shared.double().cpu().numpy() for name, (shared, _) in found.items()}
        self.own = {name: own.double().cpu().numpy() for name, (_, own) in found.items() if own is not None}
        self.present = {name: column.numpy() for name, column in zip(model.names, present.unbind(-1), strict=True)}
        self.pairs, self.label, self.temperature = model.pairs, label, temperature


@checked(ResultError)
def embed(result: Result, split: str = "test") -> Embedded:
    """Embeddings of the rows of a split, ``"test"`` or ``"train"``, by the fitted towers.

    Raises
    ------
    ResultError
        If the result is not one of this method, or no row has this split.
    """
    if result.tree.attrs.get("method") != "modality_structure":
        raise ResultError(f"the result is of {result.tree.attrs.get('method')!r}; give one of modality_structure")
    problem = result.rebuild()
    data = problem.data
    assert data is not None
    rows = data["split"].values == split
    if not rows.any():
        raise ResultError(f"split={split!r}; choose 'train' or 'test'")
    model: Any
    with fitted(problem, result.guide_state or {}, seed=0) as (model, _), torch.no_grad():
        fixed = model.temperature
        temperature = float(result.posterior["temperature"].mean()) if fixed is None else fixed
        label = data["label"].values[rows] if "label" in data else None
        return Embedded(model, *tensors(data, split), label, temperature)


def shared_rows(found: Embedded, a: str, b: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Embeddings (row, size) of the rows that have both of two modalities."""
    both = found.present[a] & found.present[b]
    return found.z[a][both], found.z[b][both]


def information_bound(logits: NDArray[np.float64]) -> float:
    """Lower bound ``log N - loss`` of the mutual information of two modalities, in nats; it cannot exceed log N.

    Parameters
    ----------
    logits
        Log odds (row, candidate) of which candidate belongs to a row; the right ones are on the diagonal. The loss is
        the mean of both directions.
    """
    return float(information_rows(logits).mean())


def information_rows(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """What each row adds to the bound (row,): `information_bound` is the mean."""

    def gain(table: NDArray[np.float64]) -> NDArray[np.float64]:
        top = table.max(1)
        own: NDArray[np.float64] = np.diag(table) - top - np.log(np.exp(table - top[:, None]).sum(1))
        return own

    return math.log(len(logits)) + (gain(logits) + gain(logits.T)) / 2


def recall_at(similarity: NDArray[np.float64], k: int) -> float:
    """Share of rows whose own candidate, on the diagonal, is among the k most similar ones; ties count against it."""
    own = np.diag(similarity)[:, None]
    better = (similarity >= own).sum(1) - 1
    return float((better < k).mean())


def modality_gap(z: NDArray[np.float64], other: NDArray[np.float64]) -> tuple[float, float]:
    """Squared Fréchet distance of two sets of embeddings (row, size), as the sum of two parts.

    Returns
    -------
    tuple
        The squared distance of the centroids, which adding a constant closes; and what then remains, the squared
        Wasserstein distance of centred normal distributions of the same covariances, which it does not.

    Raises
    ------
    ResultError
        If an embedding is not finite.
    """
    bad = sum(int((~np.isfinite(part).all(1)).sum()) for part in (z, other))
    if bad:
        raise ResultError(f"{bad} embeddings are not finite: the fit diverged; fit again with a smaller lr")
    centroid = float(np.square(z.mean(0) - other.mean(0)).sum())
    first, second = (np.cov(x.T, bias=True).reshape(x.shape[1], x.shape[1]) for x in (z, other))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    middle = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(min=0)).sum()
    return centroid, max(float(np.trace(first) + np.trace(second) - 2 * middle), 0.0)


@checked(ResultError)
def close_gap(result: Result, split: str = "test") -> Embedded:
    """Embeddings with the gap between modalities closed after training.

    From each modality its mean over the rows to learn from is subtracted, and embeddings are brought back to length 1.
    No label and no row held out is looked at. The temperature is the one at which the rows to learn from, so changed,
    are matched best, since that of the fit is for other similarities. Independent embeddings are left as they are.

    Parameters
    ----------
    result
        Result of `fit_svi`.
    split
        ``"test"`` or ``"train"``.

    Raises
    ------
    ResultError
        If the result is not one of this method, or no row has this split.

    References
    ----------
    Liang, W. et al. (2022). Mind the gap. NeurIPS. https://arxiv.org/abs/2203.02053
    """
    found, known = embed(result, split), embed(result, "train")
    closed = copy.copy(found)
    means = {name: z[known.present[name]].mean(0) for name, z in known.z.items()}
    closed.z = {name: _unit(z - means[name]) for name, z in found.z.items()}
    known.z = {name: _unit(z - means[name]) for name, z in known.z.items()}
    closed.temperature = _best_temperature(known)
    return closed


def _unit(z: NDArray[np.float64]) -> NDArray[np.float64]:
    return z / np.linalg.norm(z, axis=-1, keepdims=True).clip(min=1e-12)


def _best_temperature(found: Embedded) -> float:
    """Temperature at which rows are matched with the least loss, all pairs of modalities together."""
    from scipy.optimize import minimize_scalar

    some = []
    for a, b in found.pairs:
        z, other = (part[:_CANDIDATES] for part in shared_rows(found, a, b))
        some.append(z @ other.T)
    best = minimize_scalar(
        lambda log: -sum(information_bound(table / math.exp(log)) for table in some),
        bounds=(math.log(1e-3), math.log(1e2)),
        method="bounded",
    )
    return math.exp(float(best.x))


@checked(ResultError)
def measure(result: Result, *, closed: bool = False) -> pd.DataFrame:
    """What the embeddings are worth, for each pair of modalities and split.

    Parameters
    ----------
    result
        Result of `fit_svi`.
    closed
        Whether to close the gap between modalities first, as `close_gap` does.

    Returns
    -------
    pandas.DataFrame
        Columns ``first``, ``second``, ``split``; ``N``, the number of candidates; ``loss`` of the matching and
        ``information``, the bound log N - loss, both in nats; ``recall_1``, ``recall_5``, ``recall_10``, the mean of
        both directions (chance is k / N); ``gap_centroid`` and ``gap_distribution``, see `modality_gap`; with labels
        ``v_measure`` and ``ari`` of as many clusters as there are classes, by k-means of both modalities together; NaN
        where the rows are of fewer than two classes, or each is of its own.

    Raises
    ------
    ResultError
        If the result is not one of this method, or an embedding is not finite.
    """
    rows = []
    for split in ("train", "test"):
        found = close_gap(result, split) if closed else embed(result, split)
        for a, b in found.pairs:
            z, other = shared_rows(found, a, b)
            if len(z) < _LEAST:
                continue
            similarity = z @ other.T
            information = information_bound(similarity / found.temperature)
            row: dict[str, Any] = {"first": a, "second": b, "split": split, "N": len(z)}
            row |= {"loss": math.log(len(z)) - information, "information": information}
            row |= {f"recall_{k}": (recall_at(similarity, k) + recall_at(similarity.T, k)) / 2 for k in _RECALLS}
            row |= dict(zip(("gap_centroid", "gap_distribution"), modality_gap(z, other), strict=True))
            if found.label is not None:
                row |= _clusters(z, other, found.label[found.present[a] & found.present[b]])
            rows.append(row)
    return pd.DataFrame(rows)


def _clusters(z: NDArray[np.float64], other: NDArray[np.float64], label: NDArray[Any]) -> dict[str, float]:
    """How well clusters of embeddings, by k-means, agree with classes."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, v_measure_score

    count = len(np.unique(label))
    if count in {0, 1, len(label)}:  # either measure would be 1 or 0 whatever the embeddings
        return {"v_measure": math.nan, "ari": math.nan}
    both, classes = np.concatenate([z, other]), np.concatenate([label, label])
    clusters = KMeans(count, n_init=4, random_state=0).fit_predict(both)
    return {
        "v_measure": float(v_measure_score(classes, clusters)),
        "ari": float(adjusted_rand_score(classes, clusters)),
    }
