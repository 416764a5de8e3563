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
        If rotation is asked of one mode, or what couples fields where there is one, or where it cannot be said.
    """
    rank, rotation = spec["model"].get("rank"), spec["output"].get("rotation")
    if rotation is not None and rank == 1:
        raise SpecError(f"[output] rotation={rotation!r} of one mode; rotation needs two modes or more (model.rank)")
    coupling, data = spec["output"].get("coupling"), spec["data"]
    if coupling is None:
        return
    if data.get("name") != "joint" or len(data["fields"]) < 2:
        raise SpecError(f"[output] coupling={coupling!r} is of several fields; [data] names one")
    if spec["model"].get("series", "frame") == "frame" or rank == 1:
        raise SpecError(
            f"[output] coupling={coupling!r} is of modes of the population, two or more: take model.series='ar1' or "
            "'iid', and a higher model.rank"
        )
