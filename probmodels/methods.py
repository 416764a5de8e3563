"""The methods, one line each."""

from __future__ import annotations

import importlib
from types import ModuleType

from probmodels.errors import SpecError
from probmodels.options import hint

__all__ = ["METHODS", "get_method"]

METHODS = {
    "bayesian_network": "probmodels.bayesian_network",
    "bayesian_svd": "probmodels.bayesian_svd",
    "causal_graph": "probmodels.causal_graph",
    "causal_vae": "probmodels.causal_vae",
    "discrete_vae": "probmodels.discrete_vae",
    "diffusion": "probmodels.diffusion",
    "grammar": "probmodels.grammar",
    "hierarchical_mixture": "probmodels.hierarchical_mixture",
    "lds": "probmodels.lds",
    "noisy_edges": "probmodels.noisy_edges",
    "score_composition": "probmodels.score_composition",
    "vib_gsl": "probmodels.vib_gsl",
}


def get_method(name: str) -> ModuleType:
    """The module of a method, with ``make_problem``, ``tiny`` and ``REFERENCE``.

    Raises
    ------
    SpecError
        If there is no such method; the message names the closest.
    """
    if name not in METHODS:
        raise SpecError(f"unknown method {name!r}{hint(name, METHODS)}")
    return importlib.import_module(METHODS[name])
