"""Labelled datasets from arrays of draws, and the shape of what holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import xarray as xr

from probmodels.errors import ResultError
from probmodels.inference.problem import Problem

__all__ = ["ResultLike", "group_of", "read_json", "take_marginals", "to_dataset"]


@runtime_checkable
class ResultLike(Protocol):
    """What holds draws in a tree of labelled groups: a `Result`."""

    tree: xr.DataTree


def group_of(tree: xr.DataTree, name: str) -> xr.Dataset:
    """A group of a tree; an empty dataset where it is absent."""
    return tree[name].to_dataset() if name in tree.children else xr.Dataset()


def read_json(attrs: Mapping[Any, Any], name: str, default: Any) -> Any:
    """A root attribute of a tree that holds JSON: a table or a list as ``default`` is, or for None a list or null.

    Raises
    ------
    ResultError
        If it holds something else.
    """
    try:
        found = json.loads(attrs[name]) if name in attrs else default
    except (TypeError, ValueError):
        found = object()
    if not isinstance(found, list | None if default is None else type(default)):
        kind = {"dict": "table", "list": "list"}.get(type(default).__name__, "list or null")
        raise ResultError(f"root attribute {name!r} of the result is no JSON {kind}")
    return found


def to_dataset(
    arrays: Mapping[str, np.ndarray],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Sequence[Any]],
    sample_dims: tuple[str, ...] = ("chain", "draw"),
) -> xr.Dataset:
    """Dataset of arrays (sample dims, site dims); axes without a name get ``<site>_dim_<axis>``."""
    variables = {}
    for name, array in arrays.items():
        own = array.ndim - len(sample_dims)
        named = list(dims.get(name, ()))
        if len(named) != own:
            named = [f"{name}_dim_{axis}" for axis in range(own)]
        variables[name] = ((*sample_dims, *named), array)
    dataset = xr.Dataset(variables)
    labels = {dim: np.arange(dataset.sizes[dim]) for dim in sample_dims if dim in dataset.sizes}
    for dim, values in coords.items():
        if dim in dataset.sizes and len(values) == dataset.sizes[dim]:
            labels[dim] = np.asarray(values)
    return dataset.assign_coords({dim: (dim, values) for dim, values in labels.items()})


def take_marginals(problem: Problem, arrays: dict[str, np.ndarray]) -> dict[str, xr.Dataset]:
    """Group ``marginals`` of means and sds of transient sites, which are taken out of arrays; empty without any."""
    names = [name for site in problem.transient for name in (site, f"{site}_sd") if name in arrays]
    if not names:
        return {}
    dims = {name: problem.dims()[name.removesuffix("_sd")] for name in names}
    return {"marginals": to_dataset({name: arrays.pop(name) for name in names}, dims, problem.coords, ())}
