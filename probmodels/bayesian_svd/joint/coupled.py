"""What couples two fields of a joint decomposition: maximum covariance analysis and canonical correlations.

In a draw the covariance of one time is ``L L' + noise`` with loadings ``L = U diag(d)``, cells of both fields stacked.
So that between two fields is ``L_x L_y'``, of rank k, and everything follows from matrices of k by k:

- maximum covariance analysis is the singular value decomposition of ``L_x L_y'``,
- canonical correlations are the singular values of ``S_x^-1/2 L_x L_y' S_y^-1/2`` with ``S_x = L_x L_x' + noise``: with
  ``G_x = L_x' noise^-1 L_x`` those of ``H_x^1/2 H_y^1/2``, ``H = G (1 + G)^-1``.

Each field is first reduced to its leading patterns: the leading eigenvectors of ``G`` whose variance is above that of
the noise, and at most half as many as there are joint modes. Canonical correlations do not weigh patterns by their
variance: a direction that a field hardly has would count by what the draws leave open about it. And k joint modes hold
k directions of both fields together: of more than k / 2 in each, some would be shared, and count as coupled, whatever
the data.

References
----------
Bretherton, C. S., Smith, C. and Wallace, J. M. (1992). An intercomparison of methods for finding coupled patterns in
climate data. J. Climate 5, 541-560.
Barnett, T. P. and Preisendorfer, R. (1987). Origins and levels of monthly and seasonal forecast skill for United States
surface air temperatures determined by canonical correlation analysis. Mon. Weather Rev. 115, 1825-1850.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
import xarray as xr
from annotated_types import Len

from probmodels.bayesian_svd.draws import Draws, blocks, expand, read_draws
from probmodels.bayesian_svd.patterns.planes import main_axes
from probmodels.errors import SummaryError
from probmodels.options import Count, Fraction, checked, hint

__all__ = ["couple"]


@checked(SummaryError)
def couple(
    tree: xr.DataTree,
    fields: Annotated[Sequence[str], Len(2, 2)],
    *,
    method: Literal["mca", "cca"] = "mca",
    num_patterns: Count | None = None,
    level: Fraction = 0.95,
) -> xr.Dataset:
    """Coupled modes of two fields with their posterior, from the covariance of the population.

    Parameters
    ----------
    tree
        Result of a problem of stacked fields whose series are a process.
    fields
        Names of the two.
    method
        ``"mca"``, maximum covariance analysis, or ``"cca"``, canonical correlation analysis.
    num_patterns
        Patterns of each field that are kept, at most half the number of joint modes. By default those of them with more
        variance than the noise has along them, in the posterior mean.
    level
        Probability of the intervals.

    Returns
    -------
    xr.Dataset
        Over mode, each with ``_mean``, ``_sd``, ``_lower``, ``_upper``: ``correlation`` of the two series of a coupled
        mode with the noise of both, the canonical correlation under ``"cca"``; and under ``"mca"``
        ``squared_covariance_fraction``. Over mode and the stacked cells, NaN in other fields: ``map_*``, what goes in
        one field with a standard deviation of the other's series. Modes are sorted in each draw, by covariance or
        correlation. `probmodels.bayesian_svd.joint.stack.split_fields` puts maps on grids, in units of each field.

    Raises
    ------
    SummaryError
        If the result holds no such fields, or knows only the modes of its times, or an option is out of range.
    """
    draws = read_draws(tree, "population")
    constant = tree["constant_data"].to_dataset()
    names = _names_of(constant, fields)
    one, two = (np.flatnonzero(names == name) for name in fields)
    if (num_patterns or 1) > (most := draws.d.shape[1] // 2):
        raise SummaryError(
            f"num_patterns={num_patterns or 1}; {draws.d.shape[1]} joint modes can tell how {most} patterns of each "
            "field correlate, since more would share directions whatever the data; infer with a higher rank"
        )
    kept = [_leading(draws, cells, num_patterns) for cells in (one, two)]
    numbers, turns = (_covariance if method == "mca" else _canonical)(draws, one, two, kept)
    few = min(side.values.shape[1] for side in kept)
    numbers = {name: values[:, :few] for name, values in numbers.items()}
    sides = [side.reduced() @ turn[:, :, :few] for side, turn in zip(kept, turns, strict=True)]
    bounds = np.array([(1 - level) / 2, (1 + level) / 2])
    out = xr.Dataset(coords={"mode": np.arange(1, numbers["correlation"].shape[1] + 1, dtype=np.int32)})
    for name, values in numbers.items():
        for key, value in _reduced(values, bounds):
            out[f"{name}_{key}"] = "mode", value
    for name, array in _maps(draws, (one, two), sides, bounds).items():
        out[name] = ("mode", "cell"), array, {"units": str(constant["data"].attrs.get("units", "1"))}
    out.attrs = {"method": method, "fields": list(fields), "interval_level": level}
    return out.assign_coords(field=("cell", names))


def _names_of(constant: xr.Dataset, fields: Sequence[str]) -> np.ndarray:
    """Name of the field of each cell, where the two that are asked for are among them."""
    if "field" not in constant.coords:
        raise SummaryError("the result is not that of several fields; stack them by stack_fields before make_problem")
    names = constant["field"].values.astype(str)
    for name in fields:
        if name not in names:
            raise SummaryError(f"fields={list(fields)}; there is no {name!r}{hint(name, sorted(set(names)))}")
    if fields[0] == fields[1]:
        raise SummaryError(f"fields={list(fields)}; name two different fields")
    return names


def _maps(
    draws: Draws, fields: tuple[np.ndarray, np.ndarray], sides: Sequence[np.ndarray], bounds: np.ndarray
) -> dict[str, np.ndarray]:
    """Maps (mode, cell) of both fields, reduced over draws; NaN in other fields."""
    sign = _signs(draws, sides[0])
    shape = sides[0].shape[2], len(draws.basis_space)
    maps = {f"map_{key}": np.full(shape, np.nan) for key in ("mean", "sd", "lower", "upper")}
    for cells, turn in zip(fields, sides, strict=True):
        coordinates = np.einsum("rsj,sjk->rsk", draws.space * draws.d, turn * sign[:, None, :], optimize=True)
        for block in blocks(len(cells), len(draws.d), turn.shape[2]):
            basis = draws.basis_space[cells[block]] / np.sqrt(draws.weight[cells[block]])[:, None]
            for key, value in _reduced(expand(basis, coordinates), bounds):
                maps[f"map_{key}"][:, cells[block]] = value.T
    return maps


def _reduced(values: np.ndarray, bounds: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Mean, sd and quantiles over draws."""
    yield "mean", values.mean(0)
    yield "sd", values.std(0, ddof=1)
    yield from zip(("lower", "upper"), np.quantile(values, bounds, axis=0), strict=True)


def _gram(draws: Draws, matrix: np.ndarray) -> np.ndarray:
    """Products L' B'^-1 matrix B^-1 L of loadings (draw, mode, mode), for a matrix (basis, basis)."""
    loading = draws.space * draws.d
    return np.einsum("rsi,rsj->sij", loading, np.tensordot(matrix, loading, 1), optimize=True)


def _noise(draws: Draws, cells: np.ndarray) -> np.ndarray:
    """Covariance of the noise of the weighted field at some cells over sigma squared."""
    if draws.noise is None:
        return np.eye(len(cells))
    rows = draws.noise.vectors[cells]
    return np.asarray((rows * draws.noise.values) @ rows.T)


def _roots(matrices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric roots of matrices (draw, mode, mode), and their inverses on what they span."""
    values, vectors = np.linalg.eigh(matrices)
    root = np.sqrt(np.maximum(values, 0.0))
    inverse = np.where(root > 1e-7 * root[:, -1:], 1 / np.maximum(root, 1e-300), 0.0)
    turned = vectors.transpose(0, 2, 1)
    return (vectors * root[:, None, :]) @ turned, (vectors * inverse[:, None, :]) @ turned


class _Patterns(NamedTuple):
    """Leading patterns of a field as combinations of loadings: signal over noise (draw, pattern), and unit vectors
    (draw, mode, pattern)."""

    values: np.ndarray
    vectors: np.ndarray

    def reduced(self) -> np.ndarray:
        """Projection on the patterns (draw, mode, mode)."""
        return np.asarray(self.vectors @ self.vectors.transpose(0, 2, 1))


def _leading(draws: Draws, cells: np.ndarray, num_patterns: int | None) -> _Patterns:
    """Patterns of a field that are kept."""
    basis = draws.basis_space[cells]
    gram = _gram(draws, basis.T @ np.linalg.solve(_noise(draws, cells), basis)) / draws.sigma[:, None, None] ** 2
    values, vectors = np.linalg.eigh(gram)
    count = num_patterns or min(int((values.mean(0) > 1).sum()), values.shape[1] // 2)
    if not count:
        raise SummaryError("no pattern of a field has more variance than its noise; give num_patterns=1 to go on")
    return _Patterns(np.maximum(values[:, -count:], 0.0), vectors[:, :, -count:])


def _covariance(
    draws: Draws, one: np.ndarray, two: np.ndarray, kept: Sequence[_Patterns]
) -> tuple[dict[str, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Numbers (draw, mode) of maximum covariance analysis, and combinations of the loadings that are its maps."""
    root, inverse, spread = [], [], []
    for cells, side in zip((one, two), kept, strict=True):
        basis, reduced = draws.basis_space[cells], side.reduced()
        pair = _roots(reduced @ _gram(draws, basis.T @ basis) @ reduced)
        root.append(pair[0])
        inverse.append(pair[1] @ reduced)
    left, size, right = np.linalg.svd(root[0] @ root[1])
    axes = left, right.transpose(0, 2, 1)
    for cells, own, back, axis in zip((one, two), root, inverse, axes, strict=True):
        basis = draws.basis_space[cells]
        noisy = back @ _gram(draws, basis.T @ _noise(draws, cells) @ basis) @ back.transpose(0, 2, 1)
        variance = np.einsum("sik,sij,sjk->sk", axis, own @ own + draws.sigma[:, None, None] ** 2 * noisy, axis)
        spread.append(np.sqrt(np.maximum(variance, 1e-300)))
    numbers = {
        "squared_covariance_fraction": size**2 / np.sum(size**2, axis=1, keepdims=True),
        "correlation": size / (spread[0] * spread[1]),
    }
    return numbers, (root[1] @ axes[1] / spread[1][:, None, :], root[0] @ axes[0] / spread[0][:, None, :])


def _canonical(
    draws: Draws, one: np.ndarray, two: np.ndarray, kept: Sequence[_Patterns]
) -> tuple[dict[str, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Canonical correlations (draw, mode), and combinations of the loadings that are the maps."""
    root = []
    for side in kept:
        share = np.sqrt(side.values / (1 + side.values))[:, None, :]
        root.append((side.vectors * share) @ side.vectors.transpose(0, 2, 1))
    left, size, right = np.linalg.svd(root[0] @ root[1])
    return {"correlation": size}, (root[1] @ right.transpose(0, 2, 1), root[0] @ left)


def _signs(draws: Draws, turn: np.ndarray) -> np.ndarray:
    """Signs (draw, mode) by which the maps of the first field agree, with a positive sum."""
    frames = np.einsum("rsj,sjk->rsk", draws.space * draws.d, turn, optimize=True)
    sign = np.empty((len(turn), turn.shape[2]))
    for mode in range(sign.shape[1]):
        axis = main_axes(frames[:, :, [mode]], 1)[:, 0]
        axis = axis * np.where((draws.basis_space @ axis).sum() < 0, -1.0, 1.0)
        sign[:, mode] = np.where(axis @ frames[:, :, mode] < 0, -1.0, 1.0)
    return sign
