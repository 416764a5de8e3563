"""Probabilistic models on Pyro: model/guide pairs, shared inference engines, ArviZ-ready posteriors."""

from __future__ import annotations

import importlib
from typing import Any

from probmodels._version import __version__

_EXPORTS = {
    "Problem": "inference.problem",
    "Result": "inference.result",
    "fit_bilevel": "inference.bilevel",
    "fit_em": "inference.em",
    "fit_svi": "inference.svi",
    "run_mcmc": "inference.mcmc",
    "compare": "inference.comparison",
    "compare_samples": "inference.sample_quality",
    "diagnose": "inference.diagnostics",
    "loo": "inference.comparison",
    "map_problems": "inference.distributed",
    "sbc": "inference.calibration",
    "with_guide": "guides.auto",
    "METHODS": "methods",
    "get_method": "methods",
    "load_spec": "spec",
    "run_spec": "spec",
}

__all__ = [
    "METHODS",
    "Problem",
    "Result",
    "__version__",
    "compare",
    "compare_samples",
    "diagnose",
    "fit_bilevel",
    "fit_em",
    "fit_svi",
    "get_method",
    "load_spec",
    "loo",
    "map_problems",
    "run_mcmc",
    "run_spec",
    "sbc",
    "with_guide",
]


def __getattr__(name: str) -> Any:
    # Importing probmodels stays light: torch, Pyro and ArviZ are loaded by the first name that needs them.
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
