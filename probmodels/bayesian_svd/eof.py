"""The deterministic EOF analysis that a Bayesian SVD is held against.

Both decompose the same matrix: the anomalies (data less the least-squares fit of the fixed effects at each cell) times
the square root of the area weight. An EOF map is given in data units per standard deviation of its principal component,
as the maps of the posterior are.

References
----------
North, G. R., Bell, T. L., Cahalan, R. F. and Moeng, F. J. (1982). Sampling errors in the estimation of empirical
orthogonal functions. Mon. Weather Rev. 110. https://doi.org/10.1175/1520-0493(1982)110<0699:SEITEO>2.0.CO;2
Bretherton, C. S. et al. (1999). The effective number of spatial degrees of freedom of a time-varying field.
J. Climate 12. https://doi.org/10.1175/1520-0442(1999)012<1990:TENOSD>2.0.CO;2
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import xarray as xr

from probmodels.bayesian_svd.grids import to_cells, to_grid
from probmodels.errors import SummaryError
from probmodels.inference.labels import group_of

__all__ = ["Anomalies", "compare_eof", "eof_baseline", "make_anomalies"]


@dataclass(frozen=True)
class Anomalies:
    """Data less the fixed effects, with what removed them.

    Attributes
    ----------
    values
        Anomalies in data units, (cell, time); zero at gaps.
    observed
        True where there was a value, (cell, time).
    weight
        Area weight of each cell, (cell,).
    effects
        Orthonormal basis of the fixed effects over the observed times of each cell, (cell or 1, time, effect).
    dof
        Observed times less fixed effects of each cell, (cell,).
    """

    values: np.ndarray
    observed: np.ndarray
    weight: np.ndarray
    effects: np.ndarray
    dof: np.ndarray

    @property
    def complete(self) -> bool:
        """Whether no value is missing."""
        return bool(self.observed.all())

    @property
    def total(self) -> float:
        """Weighted sum of squares of the anomalies; a gap counts as the mean square of its cell."""
        count = np.maximum(self.observed.sum(1), 1)
        return float(np.sum(self.weight * np.sum(self.values**2, axis=1) * self.values.shape[1] / count))

    def remove_effects(self, field: np.ndarray) -> np.ndarray:
        """Take the fixed effects out of another field (cell, time) as they were taken out of the data."""
        field = np.where(self.observed, field, 0.0)
        if len(self.effects) == 1:
            return field - (field @ self.effects[0]) @ self.effects[0].T
        return field - np.einsum("nmq,nq->nm", self.effects, np.einsum("nmq,nm->nq", self.effects, field))


def make_anomalies(constant: xr.Dataset, shared: np.ndarray | None = None) -> Anomalies:
    """Anomalies of the data in a result's ``constant_data`` group.

    Parameters
    ----------
    constant
        Holds ``data`` (cell, time), NaN at gaps; optionally ``weight`` (cell) and
        ``fixed_effects_design`` (time, effect).
    shared
        Posterior mean of the effects that all cells share, taken out first where ``shared_effects_design``
        (time, shared_effect) is there too.

    Raises
    ------
    SummaryError
        If ``data`` is absent or has other dims, or a weight is not positive.
    """
    if "data" not in constant or set(constant["data"].dims) != {"cell", "time"}:
        raise SummaryError("constant_data has no variable 'data' with dims (cell, time); was the result cut down?")
    data = constant["data"].transpose("cell", "time").values.astype(float)
    if shared is not None and "shared_effects_design" in constant:
        data = data - constant["shared_effects_design"].transpose("time", ...).values @ shared
    observed = np.isfinite(data)
    filled = np.where(observed, data, 0.0)
    weight = cell_weights(constant)
    if "fixed_effects_design" in constant:
        design = constant["fixed_effects_design"].transpose("time", ...).values.astype(float)
    else:
        design = np.zeros((data.shape[1], 0))
    masked = design[None] if observed.all() else observed[:, :, None] * design  # (cell or 1, time, effect)
    # Orthonormal columns through the eigenvectors of the Gram matrix: cells with few values may be rank deficient.
    gram = np.swapaxes(masked, 1, 2) @ masked
    size, vectors = np.linalg.eigh(gram) if design.shape[1] else (np.zeros((len(masked), 0)), gram)
    kept = size > 1e-10 * size.max(axis=1, keepdims=True, initial=1e-300)
    effects = masked @ (vectors * np.where(kept, 1 / np.sqrt(np.where(kept, size, 1.0)), 0.0)[:, None, :])
    bare = Anomalies(filled, observed, weight, effects, observed.sum(1) - kept.sum(1))
    return Anomalies(bare.remove_effects(filled), observed, weight, effects, bare.dof)


def cell_weights(constant: xr.Dataset) -> np.ndarray:
    """Weights of the cells that a result keeps, (cell,); ones where there are none."""
    if "weight" not in constant:
        return np.ones(constant.sizes["cell"])
    weight = constant["weight"].values.astype(float)
    if not (weight > 0).all():
        raise SummaryError(
            f"{np.sum(~(weight > 0))} cells have a weight that is not positive; leave them out of the field"
        )
    return weight


def shared_mean(tree: xr.DataTree) -> np.ndarray | None:
    """Posterior mean of the effects that all cells share, (shared_effect,); None without."""
    posterior = group_of(tree, "posterior")
    if "shared_effects" not in posterior:
        return None
    return np.atleast_1d(posterior["shared_effects"].mean(("chain", "draw")).values)


def _fill_gaps(field: np.ndarray, observed: np.ndarray, rank: int, num_steps: int = 100) -> np.ndarray:
    """Fill missing entries by the rank-k SVD of the field, repeated until they stay (Beckers and Rixen, 2003)."""
    filled = field
    for _ in range(num_steps):
        u, s, vt = np.linalg.svd(filled, full_matrices=False)
        update = np.where(observed, field, (u[:, :rank] * s[:rank]) @ vt[:rank])
        change = np.linalg.norm(update - filled)
        filled = update
        if change < 1e-5 * np.linalg.norm(filled):
            break
    return filled


def eof_baseline(anomalies: Anomalies, num_modes: int) -> xr.Dataset:
    """Leading EOFs of weighted anomalies by singular value decomposition.

    Parameters
    ----------
    anomalies
        From `make_anomalies`. Gaps are filled by the leading EOFs themselves.
    num_modes
        EOFs kept.

    Returns
    -------
    xr.Dataset
        ``eof`` (mode, cell) in data units per standard deviation of the PC, ``eof_pc`` (mode, time) of unit standard
        deviation, ``eof_fraction`` (mode) of variance explained, ``eof_singular_value`` (mode), ``eof_fraction_error``
        (mode) by North's rule with the effective sample size of the PC, and ``north_neighbour`` (mode): the mode from
        which sampling error does not separate it, 0 where there is none.
    """
    root = np.sqrt(anomalies.weight)[:, None]
    field = root * anomalies.values
    if not anomalies.complete:
        field = _fill_gaps(field, anomalies.observed, num_modes)
    u, s, vt = np.linalg.svd(field, full_matrices=False)
    # The PC may have a mean where the fixed effects hold no intercept, but its spread alone is the unit of the map.
    spread = vt.std(axis=1, ddof=1)
    pcs = vt / np.maximum(spread, 1e-300)[:, None]
    fraction = s**2 / anomalies.total
    error = fraction * np.sqrt(2 / _effective_sample_size(pcs))
    count = min(num_modes + 1, len(s))  # the first EOF left out may be the neighbour of the last one kept
    gap = np.abs(fraction[:count, None] - fraction[None, :count]) + np.diag(np.full(count, np.inf))
    nearest = gap.argmin(axis=1)
    close = gap.min(axis=1) < np.maximum(error[:count], error[nearest])
    keep = slice(num_modes)
    return xr.Dataset(
        {
            "eof": (("mode", "cell"), ((u * s * spread) / root).T[keep]),
            "eof_pc": (("mode", "time"), pcs[keep]),
            "eof_fraction": ("mode", fraction[keep]),
            "eof_fraction_error": ("mode", error[keep]),
            "eof_singular_value": ("mode", s[keep]),
            "north_neighbour": ("mode", np.where(close, nearest + 1, 0)[keep].astype(np.int32)),
        },
        coords={"mode": np.arange(1, num_modes + 1, dtype=np.int32)},
    )


def _effective_sample_size(pcs: np.ndarray) -> np.ndarray:
    """Independent samples for a variance, N (1 - r^2) / (1 + r^2) with r the lag-1 autocorrelation, per row."""
    centred = pcs - pcs.mean(axis=1, keepdims=True)
    r = np.sum(centred[:, 1:] * centred[:, :-1], axis=1) / np.maximum(np.sum(centred**2, axis=1), 1e-300)
    r = np.clip(r, 0.0, 0.99)
    return np.maximum(pcs.shape[1] * (1 - r**2) / (1 + r**2), 2.0)


def compare_eof(tree: xr.DataTree, modes: xr.Dataset) -> xr.Dataset:
    """Hold the posterior means of the modes against the deterministic EOFs of the same weighted anomalies.

    Parameters
    ----------
    tree
        The result; its ``constant_data`` is used.
    modes
        What `summarise_modes` made of it.

    Returns
    -------
    xr.Dataset
        The variables of `eof_baseline`, on the grid of ``modes`` and with the sign of its modes, and per mode
        ``pattern_correlation`` (area-weighted, centred), ``pc_correlation``, ``fraction_difference`` (posterior mean
        less EOF) and ``plane_correlation``: the smallest canonical correlation between the patterns of the group of
        modes that North's rule does not separate and the EOFs of the same numbers. The attribute ``sentences`` (JSON)
        says in words where the two differ and why, ``eofs_check`` how far our EOFs lie from those of the package
        `eofs` (largest difference relative to the largest value; absent where it is not installed or data have gaps).
    """
    constant = tree["constant_data"].to_dataset()
    anomalies = make_anomalies(constant, shared_mean(tree))
    num_modes = modes.sizes["mode"]
    base = eof_baseline(anomalies, num_modes)
    check = _check_with_eofs(anomalies, base)
    cells = to_cells(modes["mode_mean"], constant)  # (mode, cell)
    root = np.sqrt(anomalies.weight)
    sign = np.sign(np.sum(root**2 * cells * base["eof"].values, axis=1))
    sign[sign == 0] = 1.0
    base["eof"] = base["eof"] * xr.DataArray(sign, dims="mode")
    base["eof_pc"] = base["eof_pc"] * xr.DataArray(sign, dims="mode")

    eofs = base["eof"].values
    base["pattern_correlation"] = "mode", _weighted_correlation(cells, eofs, anomalies.weight)
    base["pc_correlation"] = "mode", _weighted_correlation(modes["pc_mean"].values, base["eof_pc"].values, None)
    base["fraction_difference"] = modes["explained_variance_fraction_mean"] - base["eof_fraction"]
    groups = _groups(base["north_neighbour"].values)
    plane = np.empty(num_modes)
    for group in groups:
        ours, theirs = (np.linalg.qr((root * patterns[group]).T)[0] for patterns in (cells, eofs))
        plane[group] = np.linalg.svd(ours.T @ theirs, compute_uv=False).min()
    base["plane_correlation"] = "mode", plane
    out = to_grid(base, constant).assign_coords(time=modes["time"])
    out.attrs["sentences"] = json.dumps(_sentences(out, modes, groups, anomalies))
    if check is not None:
        out.attrs["eofs_check"] = check
    return out


def _weighted_correlation(a: np.ndarray, b: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
    """Correlation of the rows of ``a`` and ``b`` (mode, n) under a weight (n,)."""
    w = np.ones(a.shape[1]) if weight is None else weight
    a, b = (x - np.sum(w * x, axis=1, keepdims=True) / w.sum() for x in (a, b))
    return np.sum(w * a * b, axis=1) / np.sqrt(np.sum(w * a**2, axis=1) * np.sum(w * b**2, axis=1))


def _groups(neighbour: np.ndarray) -> list[list[int]]:
    """Indices of modes joined by North's rule, in order; a mode of its own is a group of one."""
    label = np.arange(len(neighbour))
    for i, number in enumerate(neighbour):
        if 0 < number <= len(neighbour):
            label[label == label[number - 1]] = label[i]
    groups = [np.flatnonzero(label == value).tolist() for value in np.unique(label)]
    return sorted(groups)


def _sentences(comparison: xr.Dataset, modes: xr.Dataset, groups: list[list[int]], anomalies: Anomalies) -> list[str]:
    """Where the posterior and the EOFs differ and why, in plain words."""
    out = []
    fraction, low, high = (modes[f"explained_variance_fraction_{x}"].values * 100 for x in ("mean", "lower", "upper"))
    eof = comparison["eof_fraction"].values * 100
    correlation = comparison["pattern_correlation"].values
    share = modes["rotation_share"].values if "rotation_share" in modes else None
    left_out = len(correlation) + 1
    for group in groups:
        names = _names(group)
        if len(group) > 1:
            plane = float(comparison["plane_correlation"][group[0]])
            singles = ", ".join(f"{correlation[i]:.3f}" for i in group)
            out.append(
                f"{names}: by North's rule of thumb the sampling errors of these eigenvalues overlap, so that another "
                "period could turn the patterns into one another. Taken singly they correlate with their EOFs at "
                f"{singles}; the space that they span together agrees with that of the EOFs to {plane:.3f} (1 is the "
                "same)."
            )
        for i in group:
            if correlation[i] >= 0.97:
                text = f"Mode {i + 1} has the pattern of EOF {i + 1} (correlation {correlation[i]:.3f})."
            elif len(group) > 1:
                text = (
                    f"Mode {i + 1} differs from EOF {i + 1} (correlation {correlation[i]:.3f}), mostly as a rotation "
                    f"within {names.lower()}."
                )
            else:
                text = (
                    f"Mode {i + 1} differs from EOF {i + 1} (correlation {correlation[i]:.3f}) though North's rule "
                    "sets it apart: the prior has taken small-scale noise out of the pattern, or the two methods "
                    "order the modes otherwise."
                )
            if comparison["north_neighbour"].values[i] == left_out:
                text += (
                    f" North's rule does not separate it from EOF {left_out}, which is not in the model: add a mode "
                    "and see whether it stays."
                )
            if share is not None and len(fraction) > 1:
                others = np.delete(share[i], i)
                j = int(np.delete(np.arange(len(others) + 1), i)[others.argmax()])
                if others.max() > 0.25:
                    text += f" {100 * others.max():.0f} % of its posterior variance is rotation towards mode {j + 1}."
            out.append(text)
    sigma = float(modes["sigma_mean"])
    num_cells, num_times = anomalies.values.shape
    excess = 100 * sigma**2 * (num_cells + num_times - anomalies.effects.shape[2]) / anomalies.total
    lower = [i for i in range(len(fraction)) if high[i] < eof[i]]
    if lower:
        pairs = "; ".join(
            f"mode {i + 1}: {fraction[i]:.1f} [{low[i]:.1f}, {high[i]:.1f}] against {eof[i]:.1f} %" for i in lower
        )
        out.append(
            f"EOFs explain more than the posterior allows ({pairs}): an EOF also fits the noise that happens to lie "
            f"along its pattern, which for independent noise adds about {excess:.1f} points to each mode; the model "
            "takes it off."
        )
    else:
        out.append("The variance explained by each EOF lies within, or below, the interval of the posterior.")
    if not anomalies.complete:
        gaps = 100 * (1 - anomalies.observed.mean())
        out.append(f"{gaps:.1f} % of the values are missing: the EOFs needed them filled first, the model did not.")
    return out


def _names(group: list[int]) -> str:
    numbers = [str(i + 1) for i in group]
    return f"Mode {numbers[0]}" if len(group) == 1 else f"Modes {', '.join(numbers[:-1])} and {numbers[-1]}"


def _check_with_eofs(anomalies: Anomalies, base: xr.Dataset) -> float | None:
    """Largest difference of our EOF maps and PCs from those of the package `eofs`, relative to the largest value."""
    if not anomalies.complete or find_spec("eofs") is None:
        return None
    from eofs.standard import Eof

    num_modes = base.sizes["mode"]
    solver = Eof(anomalies.values.T, weights=np.sqrt(anomalies.weight), center=False, ddof=1)
    pcs = solver.pcs(npcs=num_modes).T
    spread = pcs.std(axis=1, ddof=1, keepdims=True)
    maps = solver.eofs(neofs=num_modes) * spread / np.sqrt(anomalies.weight)
    worst = 0.0
    for ours, theirs in ((base["eof"].values, maps), (base["eof_pc"].values, pcs / spread)):
        sign = np.sign(np.sum(ours * theirs, axis=1, keepdims=True))
        worst = max(worst, float(np.abs(ours - sign * theirs).max() / np.abs(theirs).max()))
    return worst
