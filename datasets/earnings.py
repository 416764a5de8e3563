"""A small made-up table with a known graph: how schooling, age and experience lead to earnings.

References
----------
Mincer, J. (1974). Schooling, experience, and earnings. NBER. The function for earnings is of its form; the numbers are
ours and describe nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import numpy as np
import xarray as xr
from annotated_types import Interval
from numpy.typing import NDArray

from probmodels.datasets.causal import make_concepts, position_of, split_rows
from probmodels.datasets.checks import Share
from probmodels.errors import DataError
from probmodels.options import Seed, checked

__all__ = ["sample_earnings", "simulate_earnings"]

Array = NDArray[np.float64]
_Rows = Annotated[int, Interval(ge=2, le=10_000_000)]

_EARNINGS = {
    "parents": "years",
    "education": "years",
    "age": "years",
    "experience": "years",
    "earnings": "thousand a year",
}
_EARNINGS_EDGES = [
    ["parents", "education"],
    ["education", "experience"],
    ["age", "experience"],
    ["parents", "earnings"],
    ["education", "earnings"],
    ["experience", "earnings"],
]


@checked(DataError)
def simulate_earnings(num_rows: _Rows = 2000, *, test: Share = 0.2, seed: Seed = 0) -> xr.Dataset:
    """A made-up table of people: schooling of the parents, own schooling, age, experience, and earnings.

    All numbers are simulated, to try things out; earnings follow the function of Mincer::

        parents      ~ Normal(12, 2.5)                                        years
        education    = 6 + 0.6 parents + Normal(0, 1.8)                       years
        age          ~ Uniform(30, 60)                                        years
        experience   = max(0, age - education - 6 - Exponential(2))           years
        log earnings = 1.7 + 0.01 parents + 0.09 education + 0.04 experience - 0.0006 experience^2 + Normal(0, 0.25)

    Earnings are in thousands a year. A year of schooling raises them by itself, and costs a year of experience.

    Parameters
    ----------
    num_rows
        Number of people.
    test
        Share of rows for testing, chosen at random.
    seed
        Seed of all draws.

    Returns
    -------
    xr.Dataset
        As `make_concepts` returns it, observed as it is, with ``unit`` (concept,).

    Raises
    ------
    DataError
        If an option is out of range.
    """
    people = sample_earnings(num_rows, seed=seed)
    return make_concepts(
        people,
        people,
        names=list(_EARNINGS),
        split=split_rows(num_rows, num_rows - round(test * num_rows), np.random.default_rng(seed)),
        graph=_EARNINGS_EDGES,
        units=list(_EARNINGS.values()),
        name="earnings",
        source=f"simulated: no real people; simulate_earnings, seed {seed}",
    )


@checked(DataError)
def sample_earnings(
    num_rows: _Rows = 2000, *, interventions: Mapping[str, float] | None = None, seed: Seed = 0
) -> Array:
    """Rows (row, concept) of `simulate_earnings` under interventions; with one seed, noise is that of any others.

    Parameters
    ----------
    num_rows
        Number of people.
    interventions
        Values to hold columns at, by name.
    seed
        Seed of the noise.

    Raises
    ------
    DataError
        If an option is out of range, or an intervention is on an unknown column.
    """
    names = list(_EARNINGS)
    held = {names[position_of(name, names)]: value for name, value in (interventions or {}).items()}
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((num_rows, 3)) * [2.5, 1.8, 0.25]
    drawn_age, idle = rng.uniform(30, 60, num_rows), rng.exponential(2, num_rows)

    def hold(name: str, value: Array) -> Array:
        return np.full(num_rows, float(held[name])) if name in held else value

    parents = hold("parents", 12 + noise[:, 0])
    education = hold("education", 6 + 0.6 * parents + noise[:, 1])
    age = hold("age", drawn_age)
    experience = hold("experience", np.maximum(0, age - education - 6 - idle))
    level = 1.7 + 0.01 * parents + 0.09 * education + 0.04 * experience - 0.0006 * experience**2 + noise[:, 2]
    with np.errstate(over="ignore"):
        people = np.stack([parents, education, age, experience, hold("earnings", np.exp(level))], axis=1)
    if not np.isfinite(people).all():
        raise DataError(f"interventions={held} lead to earnings that are not finite; choose smaller values")
    return people
