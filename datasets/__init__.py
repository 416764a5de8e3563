"""Labelled data sets and readers.

`load` is what a spec calls: ``load("sst", path="sst.mnmean.nc", region="north_pacific")``. Loaders are imported
when they are asked for, so that importing this package stays light.

Loaders of other packages are found by the names of their entry points in the group ``probmodels.loaders``::

    [project.entry-points."probmodels.loaders"]
    buoys = "my_package.buoys:load_buoys"

or by where they are, ``load("my_package.buoys:load_buoys", path="buoys.csv")``.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from probmodels.errors import DataError
from probmodels.options import check_options, checked, hint, options_of

__all__ = ["LOADERS", "get_loader", "list_loaders", "load"]

LOADERS = {
    "cancer": "probmodels.datasets.graphs:load_cancer",
    "causal_table": "probmodels.datasets.concept_files:load_causal_table",
    "celeba": "probmodels.datasets.concept_files:load_celeba",
    "concept_images": "probmodels.datasets.concept_files:load_concept_images",
    "conllu": "probmodels.datasets.text:load_conllu",
    "csbm": "probmodels.datasets.graph_noise:simulate_csbm",
    "digits": "probmodels.datasets.graphs:load_digits",
    "discrete_network": "probmodels.datasets.bayesian_networks:simulate_discrete_network",
    "earnings": "probmodels.datasets.earnings:simulate_earnings",
    "explainer": "probmodels.datasets.graph_noise:load_explainer",
    "flow": "probmodels.datasets.scenes:simulate_flow",
    "gaussian_network": "probmodels.datasets.bayesian_networks:simulate_gaussian_network",
    "graph": "probmodels.datasets.graph_tables:load_graph",
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
_GROUP = "probmodels.loaders"


@checked(DataError)
def get_loader(name: str) -> Callable[..., Any]:
    """The function behind `load`, whose signature lists the options that a data set takes.

    Parameters
    ----------
    name
        One of `LOADERS`, else the name of an entry point in the group ``probmodels.loaders`` of an installed package,
        else a function by where it is, as ``package.module:function``.

    Raises
    ------
    DataError
        If there is no such data set, two packages have one of this name, or its module cannot be imported.
    """
    found = LOADERS.get(name)
    if found is None:
        points = entry_points(group=_GROUP)
        named = {point.value for point in points if point.name == name}
        if len(named) > 1:
            raise DataError(f"data set {name!r} is {' and '.join(sorted(named))}; give one of these in place of it")
        if not named and ":" not in name:
            raise DataError(f"unknown data set {name!r}{hint(name, sorted({*LOADERS, *points.names}))}")
        found = named.pop() if named else name
    return _imported(found, name)


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
    others = {point.name: point for point in entry_points(group=_GROUP) if point.name not in LOADERS}
    ours = {
        name: _first_line(Path(__file__).parent, place.removeprefix(f"{__name__}.")) for name, place in LOADERS.items()
    }
    return ours | {name: _first_line_of_entry(others[name]) for name in sorted(others)}


def _imported(place: str, name: str) -> Callable[..., Any]:
    """The function at ``module:function``."""
    module, _, path = place.partition(":")
    try:
        found: Any = import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever another package raises while it is imported
        raise DataError(
            f"data set {name!r}: cannot import {place!r} ({type(error).__name__}: {error}); is its package installed, "
            "and the place written as package.module:function?"
        ) from error
    try:
        inspect.signature(found)
    except (TypeError, ValueError) as error:
        raise DataError(f"data set {name!r}: {place!r} is no function whose options can be read ({error})") from error
    function: Callable[..., Any] = found
    return function


def _first_line_of_entry(point: EntryPoint) -> str:
    """First line of the docstring of an entry point's function, else of where it is from."""
    top, *rest = point.module.split(".")
    try:
        package = find_spec(top)  # a name without dots is found without importing anything
    except ValueError:
        package = None
    folders = list(package.submodule_search_locations or []) if package is not None else []
    if package is not None and not rest and package.origin is not None:
        folders, rest = [str(Path(package.origin).parent)], [Path(package.origin).stem]
    for folder in folders:
        if said := _first_line(Path(folder), f"{'.'.join(rest)}:{point.attr}"):
            return said
    return f"{point.value}{f', of {point.dist.name}' if point.dist is not None else ''}"


def _first_line(folder: Path, place: str) -> str:
    """First line of the docstring of ``module:function`` below a folder; empty where it cannot be read."""
    module, _, function = place.partition(":")
    stem = folder.joinpath(*module.split("."))
    path = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return ""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


if __name__ != "probmodels.datasets":
    raise ImportError(
        "this folder is imported as probmodels.datasets, not as datasets; install the project with 'pip install -e .'"
    )
