"""Labelled data sets and readers.

`load` is what a spec calls: ``load("sst", path="sst.mnmean.nc", region="north_pacific")``. Loaders are imported
when they are asked for, so that importing this package stays light.

Loaders of other packages are found by the names of their entry points in the group ``probmodels.loaders``::

    [project.entry-points."probmodels.loaders"]
    buoys = "my_package.buoys:load_buoys"

or by where they are, ``load("my_package.buoys:load_buoys", path="buoys.csv")``, where the function is decorated with
``@checked(DataError)`` of `probmodels.options`, as all loaders here are.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from probmodels.errors import DataError
from probmodels.methods import definitions, summary_of
from probmodels.options import check_options, checked, hint, options_of

__all__ = ["LOADERS", "get_loader", "list_loaders", "load"]

LOADERS = {
    "cancer": "probmodels.datasets.graphs:load_cancer",
    "captioned_images": "probmodels.datasets.paired.files:load_captioned_images",
    "causal_table": "probmodels.datasets.concept_files:load_causal_table",
    "celeba": "probmodels.datasets.concept_files:load_celeba",
    "concept_images": "probmodels.datasets.concept_files:load_concept_images",
    "conllu": "probmodels.datasets.text:load_conllu",
    "csbm": "probmodels.datasets.graph_noise:simulate_csbm",
    "digits": "probmodels.datasets.graphs:load_digits",
    "digit_halves": "probmodels.datasets.paired.views:load_digit_halves",
    "discrete_network": "probmodels.datasets.bayesian_networks:simulate_discrete_network",
    "earnings": "probmodels.datasets.earnings:simulate_earnings",
    "explainer": "probmodels.datasets.graph_noise:load_explainer",
    "flow": "probmodels.datasets.scenes:simulate_flow",
    "gaussian_network": "probmodels.datasets.bayesian_networks:simulate_gaussian_network",
    "graph": "probmodels.datasets.graph_tables:load_graph",
    "images": "probmodels.datasets.images:load_images",
    "motifs": "probmodels.datasets.graph_motifs:simulate_motifs",
    "paired_tables": "probmodels.datasets.paired.files:load_paired_tables",
    "pendulum": "probmodels.datasets.scenes:simulate_pendulum",
    "petals": "probmodels.datasets.petals:simulate_petals",
    "planetoid": "probmodels.datasets.graphs:load_planetoid",
    "sem": "probmodels.datasets.sem:simulate_sem",
    "sentences": "probmodels.datasets.text:simulate_sentences",
    "sst": "probmodels.datasets.sst:load_sst",
    "tu": "probmodels.datasets.graphs:load_tu",
    "wine": "probmodels.datasets.graphs:load_wine",
}
_GROUP = "probmodels.loaders"


@checked(DataError)
def get_loader(name: str) -> Callable[..., Any]:
    """The function behind `load`, whose signature lists the options that a data set takes.

    Parameters
    ----------
    name
        One of `LOADERS`, else the name of an entry point in the group ``probmodels.loaders`` of an installed package,
        else a function by where it is, ``package.module:function``. Such a function has to be decorated with
        `probmodels.options.checked`, which is read from its source before any code of its module runs: a spec, or the
        file of a result, calls nothing but loaders.

    Raises
    ------
    DataError
        If there is no such data set, two packages have one of this name, or its module cannot be imported.
    """
    if name in LOADERS:
        return _imported(LOADERS[name], name)
    points = entry_points(group=_GROUP)
    places = sorted({point.value for point in points if point.name == name})
    if len(places) > 1:
        raise DataError(f"data set {name!r} is both {' and '.join(places)}; give one of these in place of its name")
    if places:
        return _imported(places[0], name)
    if ":" not in name:
        raise DataError(f"unknown data set {name!r}{hint(name, sorted({*LOADERS, *points.names}))}")
    _check_source(name)
    return _imported(name, name)


def load(name: str, /, **options: Any) -> Any:
    """Load a data set by name.

    Parameters
    ----------
    name
        As in `get_loader`.
    **options
        Options of that data set's loader.

    Returns
    -------
    xr.DataArray or xr.Dataset
        Labelled data, as documented by the loader.

    Raises
    ------
    DataError
        If the name is unknown, an option is unknown, out of range or absent, or the data cannot be used.
    """
    loader = get_loader(name)
    check_options(loader, options, of=f" of data set {name!r}")
    absent = [option.name for option in options_of(loader).values() if option.required and option.name not in options]
    if absent:
        raise DataError(f"data set {name!r} needs {', '.join(absent)}; give {absent[0]}=...")
    return loader(**options)


def list_loaders() -> dict[str, str]:
    """Names of all data sets with a line on each, without importing what loads them.

    Returns
    -------
    dict
        First lines of the docstrings by name: those of `LOADERS`, then those of other packages' entry points.
    """
    points = entry_points(group=_GROUP)
    places = LOADERS | {point.name: point.value for point in points if point.name not in LOADERS}
    return {name: summary_of(*place.split(":", 1)) if ":" in place else "" for name, place in places.items()}


def _check_source(place: str) -> None:
    """Check, without importing it, that ``module:function`` is a loader."""
    module, _, function = place.partition(":")
    if place in LOADERS.values():
        return
    node = definitions(module).get(function) if all(map(str.isidentifier, module.split("."))) else None
    if not isinstance(node, ast.FunctionDef):
        raise DataError(
            f"data set {place!r}: there is no module {module!r} that defines a function {function!r}; write it as "
            "package.module:function, and install the package or add its folder to PYTHONPATH"
        )
    marks = {ast.unparse(mark).partition("(")[0].rpartition(".")[2] for mark in node.decorator_list}
    if "checked" not in marks or module.split(".")[0] == "probmodels":
        raise DataError(
            f"data set {place!r} is no loader: decorate the function with @checked(DataError) of probmodels.options"
        )


def _imported(place: str, name: str) -> Callable[..., Any]:
    """The function at ``module:function``."""
    module, _, path = place.partition(":")
    try:
        found: Any = import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever another package raises while it is imported
        raise DataError(f"data set {name!r}: cannot import {place!r}: {type(error).__name__}: {error}") from error
    if not inspect.isfunction(inspect.unwrap(found)):
        raise DataError(f"data set {name!r}: {place!r} is a {type(found).__name__}; name a function")
    function: Callable[..., Any] = found
    return function


if __name__ != "probmodels.datasets":
    raise ImportError(
        "this folder is imported as probmodels.datasets, not as datasets; install the project with 'pip install -e .'"
    )
