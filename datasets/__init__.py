"""Labelled data sets and readers.

`load` is what a spec calls: ``load("sst", path="sst.mnmean.nc", region="north_pacific")``. Loaders are imported
when they are asked for, so that importing this package stays light.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from probmodels.errors import DataError

__all__ = ["LOADERS", "get_loader", "load"]

LOADERS = {
    "cancer": "probmodels.datasets.graphs:load_cancer",
    "causal_table": "probmodels.datasets.concept_files:load_causal_table",
    "celeba": "probmodels.datasets.concept_files:load_celeba",
    "concept_images": "probmodels.datasets.concept_files:load_concept_images",
    "conllu": "probmodels.datasets.text:load_conllu",
    "csbm": "probmodels.datasets.graphs:simulate_csbm",
    "digits": "probmodels.datasets.graphs:load_digits",
    "discrete_network": "probmodels.datasets.bayesian_networks:simulate_discrete_network",
    "earnings": "probmodels.datasets.earnings:simulate_earnings",
    "explainer": "probmodels.datasets.graphs:load_explainer",
    "flow": "probmodels.datasets.scenes:simulate_flow",
    "gaussian_network": "probmodels.datasets.bayesian_networks:simulate_gaussian_network",
    "graph": "probmodels.datasets.graphs:load_graph",
    "images": "probmodels.datasets.images:load_images",
    "motifs": "probmodels.datasets.graph_motifs:simulate_motifs",
    "pendulum": "probmodels.datasets.scenes:simulate_pendulum",
    "petals": "probmodels.datasets.petals:simulate_petals",
    "planetoid": "probmodels.datasets.graphs:load_planetoid",
    "sem": "probmodels.datasets.sem:simulate_sem",
    "sentences": "probmodels.datasets.text:simulate_sentences",
    "sst": "probmodels.datasets.sst:load_sst",
    "tu": "probmodels.datasets.graphs:load_tu",
    "wine": "probmodels.datasets.graphs:load_wine",
}


def get_loader(name: str) -> Callable[..., Any]:
    """The function behind `load`, whose signature lists the keywords that a data set takes.

    Raises
    ------
    DataError
        If no data set has this name.
    """
    if name not in LOADERS:
        close = get_close_matches(str(name), LOADERS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise DataError(f"unknown data set {name!r}; {hint}known: {', '.join(sorted(LOADERS))}")
    module, function = LOADERS[name].split(":")
    return getattr(import_module(module), function)


def load(name: str, **kw: Any) -> Any:
    """Load a data set by name.

    Parameters
    ----------
    name
        One of `LOADERS`.
    **kw
        Keywords of that data set's loader, see `get_loader`.

    Returns
    -------
    xr.DataArray or xr.Dataset
        Labelled data, as documented by the loader.

    Raises
    ------
    DataError
        If the name is unknown or the data cannot be used.
    """
    return get_loader(name)(**kw)


if __name__ != "probmodels.datasets":
    raise ImportError(
        "this folder is imported as probmodels.datasets, not as datasets; install the project with 'pip install -e .'"
    )
