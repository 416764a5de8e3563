"""New rows of one modality among those of a fitted result: queries, and descriptions of classes."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Len
from numpy.typing import NDArray

from probmodels.datasets.checks import as_array
from probmodels.datasets.paired.views import kind_of, read_rows
from probmodels.datasets.paired.words import encode_new
from probmodels.errors import DataError, ResultError
from probmodels.inference.programs.programs import fitted
from probmodels.inference.result import Result
from probmodels.modality_structure.views import as_tensor
from probmodels.options import checked

__all__ = ["embed_new"]


@checked(ResultError)
def embed_new(result: Result, modality: Annotated[str, Len(1)], rows: Any) -> NDArray[np.float64]:
    """Embed rows of one modality that the data need not hold, such as a caption to search with.

    Inner products with the embeddings of another modality, see `embed`, rank its rows by how well they match.

    Parameters
    ----------
    result
        Result of `fit_svi`.
    modality
        Name of the modality.
    rows
        Its rows, as `probmodels.datasets.paired.views.make_views` takes them: numbers, pictures or texts. Words that
        the fit did not know are left out.

    Returns
    -------
    numpy.ndarray
        Shared embeddings (row, size), of length 1.

    Raises
    ------
    ResultError
        If the result is not one of this method, there is no such modality, or the rows are not of its kind and shape.
    """
    if result.tree.attrs.get("method") != "modality_structure":
        raise ResultError(f"the result is of {result.tree.attrs.get('method')!r}; give one of modality_structure")
    problem = result.rebuild()
    data = problem.data
    assert data is not None
    names = [str(name) for name in data["modality"].values]
    if modality not in names:
        raise ResultError(f"modality={modality!r}; choose one of {', '.join(names)}")
    view = data[modality]
    try:
        values = as_array(rows, f"rows of {modality!r}")
        if kind_of(view) == "texts" and values.dtype.kind in "UO":
            values = encode_new(np.atleast_1d(values).tolist(), modality, data[f"{modality}_word"].values.tolist())
        else:
            values = read_rows(modality, kind_of(view), values, data.sizes.get(f"{modality}_word", 0))
    except DataError as error:
        raise ResultError(str(error)) from error
    if kind_of(view) != "texts" and values.shape[1:] != view.shape[1:]:
        raise ResultError(
            f"rows of {modality!r} have the shape {values.shape[1:]}, and those that were fitted {view.shape[1:]}"
        )
    model: Any
    with fitted(problem, result.guide_state or {}, seed=0) as (model, _), torch.no_grad():
        shared = model.towers[f"tower_{modality}"](as_tensor(data, modality, values))[0]
    found: NDArray[np.float64] = shared.double().cpu().numpy()
    return found
