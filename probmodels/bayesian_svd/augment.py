"""What the block sampler draws besides the modes: missing entries, shared effects, local effects of proper prior.

All of them change the data that the modes see. This module keeps the data in reduced coordinates current from sweep
to sweep without forming an n x m matrix; the cost of a sweep with gaps is linear in their number plus one product
with a basis.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from probmodels.bayesian_svd.model import MatrixData, SideData

__all__ = ["ReducedData", "basis_of"]

Array = NDArray[np.float64]


def basis_of(side: SideData) -> Any:
    """Basis of a side (N, r): an array, or a sparse identity where coordinates are the points themselves."""
    if not len(side.basis):
        return scipy.sparse.identity(side.values.shape[-1], format="csr")
    return side.basis.numpy()


class ReducedData:
    """The data as the modes see them: ``z (ru, rv)``, its squared norm before reduction ``total``, its entries
    ``count``.

    Parameters
    ----------
    data
        Reduced data of the model.

    Attributes
    ----------
    static
        True where nothing is drawn: no gaps, no shared effects, local effects absent or of flat prior.
    shared, effects
        Coefficients of the shared covariates (p,) and, under a proper prior, of the orthonormal design (n, q).
    """

    def __init__(self, data: MatrixData) -> None:
        self._space, self._time = basis_of(data.space), basis_of(data.time)
        self._design = data.design.numpy()
        self._effect_precision = float(data.effect_precision)
        self._shared_precision = float(data.shared_precision)
        self._flat = self._effect_precision == 0.0
        num_cells, num_effects = len(self._space), self._design.shape[1]
        # Zero under a flat prior, where the basis avoids the design.
        self._design_time = self._time.T @ self._design
        self._process = data.series is not None
        self._back = np.linalg.inv(data.design_root.numpy())
        self._root_weight = np.sqrt(data.weight.numpy())[:, None]
        self._columns = data.shared.numpy()
        self._columns_gram = data.shared_gram.numpy() + np.einsum("pij,qij->pq", self._columns, self._columns)
        self._columns_design = data.shared_design.numpy()
        self.shared = np.zeros(len(self._columns))
        self.effects = np.zeros((num_cells, num_effects))
        self._proper = not self._flat and num_effects > 0
        self.static = data.gaps is None and not len(self._columns) and not self._proper

        # Of the completed data Y: between the bases, squared norm (off the design where flat), times design, times
        # columns.
        self._z_data = np.ascontiguousarray(data.z.numpy())
        self._norm = float(data.z.square().sum() + data.rest)
        self._along = data.z_design.numpy()
        self._cross = data.shared_cross.numpy() + np.einsum("pij,ij->p", self._columns, self._z_data)
        self.count = float(data.num_free)
        self._gaps = None if data.gaps is None else _Gaps(data)
        if data.gaps is not None:
            self.count = float(data.gaps.mask.numel() - (num_cells * num_effects if self._flat else 0))
        if self._proper:  # a start from the whole data would hand their means to the modes
            self.effects = self._along.copy()
        if len(self.shared):  # likewise
            ridge = 1e-9 * np.trace(self._columns_gram) * np.eye(len(self.shared))
            self.shared = np.linalg.solve(self._columns_gram + ridge, self._cross)
        self._compose()

    def _compose(self) -> None:
        """The data less all effects that are part of the state."""
        total = self._norm - 2.0 * self.shared @ self._cross + self.shared @ self._columns_gram @ self.shared
        z = self._z_data - np.einsum("p,pij->ij", self.shared, self._columns)
        if self._process and self._flat and self._gaps is not None:
            z = z - (z @ self._design) @ self._design.T
        if self._proper:
            along = self._along - np.einsum("p,pnq->nq", self.shared, self._columns_design)
            total += float((self.effects**2).sum() - 2.0 * (self.effects * along).sum())
            z = z - (self._space.T @ self.effects) @ self._design_time.T
        self.z, self.total = np.ascontiguousarray(z), float(total)
        self.z_transposed = np.ascontiguousarray(self.z.T)

    def draw(self, rng: np.random.Generator, u: Array, d: Array, v: Array, noise: float) -> None:
        """Draw what is missing and all effects, given frames by rows (k, ru), (k, rv), d (k,), the noise variance."""
        if self.static:
            return
        cells, times = self._space @ (u.T * d), self._time @ v.T  # (n, k), (m, k)
        if self._gaps is not None:
            state = self._gaps.draw(rng, cells, times, self.shared, noise, self._effect_precision)
            self._z_data, norm, self._along, self._cross = state
            self._norm = norm - (float((self._along**2).sum()) if self._flat else 0.0)
        signal_along = cells @ (v @ self._design_time)
        if len(self.shared):  # local effects integrated out: flat ones are centred away, proper ones shrink
            known = self._cross - np.einsum("pij,ij->p", self._columns, (u.T * d) @ v)
            gram = self._columns_gram
            if self._proper:
                share = 1.0 / (1.0 + noise * self._effect_precision)
                known = known - share * np.einsum("pnq,nq->p", self._columns_design, self._along - signal_along)
                gram = gram - share * np.einsum("pnq,rnq->pr", self._columns_design, self._columns_design)
            precision = gram / noise + self._shared_precision * np.eye(len(known))
            self.shared = _normal(rng, known / noise, precision)
        if self._proper:
            along = self._along - np.einsum("p,pnq->nq", self.shared, self._columns_design)
            precision = 1.0 / noise + self._effect_precision
            mean = (along - signal_along) / noise / precision
            self.effects = mean + rng.standard_normal(mean.shape) / np.sqrt(precision)
        self._compose()

    def local_effects(self, rng: np.random.Generator, u: Array, d: Array, v: Array, noise: float) -> Array:
        """Coefficients of the named design in the units of the data (n, q), drawn here where integrated out."""
        effects = self.effects
        if self._flat:
            mean = self._along - np.einsum("p,pnq->nq", self.shared, self._columns_design)
            if self._process:  # the part of the series along the design, which the data do not see
                mean = mean - (self._space @ (u.T * d)) @ (v @ self._design_time)
            effects = mean + np.sqrt(noise) * rng.standard_normal(mean.shape)
        return effects @ self._back.T / self._root_weight

    def state(self) -> dict[str, Array]:
        """What a chain needs to go on."""
        return {"shared": self.shared.copy(), "effects": self.effects.copy()}

    def load(self, state: Mapping[str, Array]) -> None:
        """Go on from `state`."""
        self.shared, self.effects = state["shared"].copy(), state["effects"].copy()


class _Gaps:
    """Missing entries, drawn with the local effects of their cells integrated out."""

    def __init__(self, data: MatrixData) -> None:
        assert data.gaps is not None
        observed, mask = data.gaps.observed.numpy(), data.gaps.mask.numpy()
        self._space, self._time = basis_of(data.space), basis_of(data.time)
        self._design = data.design.numpy()
        columns = data.gaps.shared.numpy()
        self._rows, self._cols = np.nonzero(~mask)
        cells, self._row_of_entry = np.unique(self._rows, return_inverse=True)
        self._cells = cells
        size = len(self._rows)
        self._sum_by_cell = scipy.sparse.csr_matrix(
            (np.ones(size), (self._row_of_entry, np.arange(size))), (len(cells), size)
        )
        # Values are put in at each draw; np.nonzero goes row by row, as the format wants its entries.
        starts = np.searchsorted(self._rows, np.arange(len(mask) + 1))
        self._filled = scipy.sparse.csr_matrix((np.zeros(size), self._cols, starts), mask.shape)
        self._gram = np.einsum("nt,tq,ts->nqs", mask[cells].astype(float), self._design, self._design)
        self._columns_at = columns[:, self._rows, self._cols]  # (p, L)
        self._columns_design = np.einsum("pnt,tq->pnq", columns * mask, self._design)[:, cells]
        self._observed_along = observed @ self._design
        self._observed_z = self._space.T @ observed @ self._time
        self._observed_norm = float((observed**2).sum())
        flat = float(data.effect_precision) == 0.0
        centred = columns - (columns @ self._design) @ self._design.T if flat else columns
        self._observed_cross = np.einsum("pnm,nm->p", centred, observed)
        self._cross_at = centred[:, self._rows, self._cols]

    def draw(
        self, rng: np.random.Generator, cells: Array, times: Array, shared: Array, noise: float, effect_precision: float
    ) -> tuple[Array, float, Array, Array]:
        """Complete the data; what changes with them: between the bases, squared norm, times design, times shared
        columns.

        ``cells (n, k)`` and ``times (m, k)`` have the signal as their product.
        """
        rows, cols, design = self._rows, self._cols, self._design
        at = np.einsum("lk,lk->l", cells[rows], times[cols])
        missing = at + shared @ self._columns_at
        if design.shape[1]:
            here = cells[self._cells]
            along = self._observed_along[self._cells] - here @ (times.T @ design)
            along += self._sum_by_cell @ (at[:, None] * design[cols])
            along -= np.einsum("p,pnq->nq", shared, self._columns_design)
            precision = self._gram / noise + effect_precision * np.eye(design.shape[1])
            effects = _normal(rng, along / noise, precision)
            missing += np.einsum("lq,lq->l", effects[self._row_of_entry], design[cols])
        missing += np.sqrt(noise) * rng.standard_normal(len(missing))
        filled = self._filled
        filled.data[:] = missing
        if filled.shape[1] <= filled.shape[0]:
            z = (filled.T @ self._space).T @ self._time
        else:
            z = self._space.T @ (filled @ self._time)
        along_design = self._observed_along + filled @ design
        norm = self._observed_norm + float(missing @ missing)
        return self._observed_z + z, norm, along_design, self._observed_cross + self._cross_at @ missing


def _normal(rng: np.random.Generator, shift: Array, precision: Array) -> Array:
    """Draw from N(precision^-1 shift, precision^-1), over leading batch dimensions."""
    factor = np.linalg.cholesky(precision)
    mean = np.linalg.solve(precision, shift[..., None])
    noise = np.linalg.solve(np.swapaxes(factor, -1, -2), rng.standard_normal(shift.shape)[..., None])
    return (mean + noise)[..., 0]
