"""Near copies against comparing all numbers of all rows."""

from __future__ import annotations

import numpy as np
import pytest

from probmodels.inference.metrics import copies
from probmodels.inference.metrics.copies import near_copies


@pytest.mark.parametrize("chunk", [1, 2**22])
def test_copies_are_those_of_all_comparisons(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "_CHUNK", chunk)
    rng = np.random.default_rng(0)
    for shape in ((1,), (2,), (3, 4), (1, 8, 8)):
        others = rng.normal(size=(60, *shape))
        others[::3] = others[0]  # many of one sum
        rows = np.concatenate(
            [others[:20] + 1e-3 * rng.uniform(-2, 2, size=(20, *shape)), rng.normal(size=(20, *shape))]
        )
        rows[5] = others[7]
        gaps = np.abs(rows[:, None] - others).reshape(40, 60, -1).max(-1)
        for tolerance in (0.0, 1e-3, 0.05):
            np.testing.assert_array_equal(near_copies(rows, others, tolerance), gaps.min(1) <= tolerance)


def test_what_is_not_finite_is_no_copy_and_none_is_of_no_rows() -> None:
    rows = np.array([[1.0, np.nan], [1.0, 2.0], [np.inf, 0.0]])
    assert near_copies(rows, rows, 0.1).tolist() == [False, True, False]
    assert not near_copies(rows, rows[:0], 0.1).any()
    assert near_copies(rows[:0], rows, 0.1).shape == (0,)
    with pytest.raises(ValueError, match="shape"):
        near_copies(rows, rows[:, :1], 0.1)
