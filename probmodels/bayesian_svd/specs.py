"""What a spec of a Bayesian SVD may hold beyond what the annotations of its functions say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from probmodels.errors import SpecError

__all__ = ["check_spec"]


def check_spec(spec: Mapping[str, Any]) -> None:
    """Check options of a spec that depend on each other, before data are read.

    Parameters
    ----------
    spec
        With all tables, whose keys and values are checked.

    Raises
    ------
    SpecError
        If rotation is asked of one mode.
    """
    rank, rotation = spec["model"].get("rank"), spec["output"].get("rotation")
    if rotation is not None and rank == 1:
        raise SpecError(f"[output] rotation={rotation!r} of one mode; rotation needs two modes or more (model.rank)")
