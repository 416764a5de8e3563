"""Bayesian singular value decomposition with structured orthonormal modes.

`make_problem` turns a labelled matrix into a `Problem`; `run_mcmc` on it runs the exact block sampler, `fit_svi` the
guide of `probmodels.guides.bayesian_svd`; `write_outputs` makes maps and a report of the result.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "REFERENCE": "model",
    "model": "model",
    "make_problem": "prepare",
    "tiny": "prepare",
    "BlockGibbs": "sampler",
    "write_outputs": "outputs",
}

__all__ = ["REFERENCE", "BlockGibbs", "make_problem", "model", "tiny", "write_outputs"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
