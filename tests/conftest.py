"""What the tests share: real data where present, and one thread per process."""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # before numpy is imported: small matrices on shared cores gain nothing from more

from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import pyro  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Compile the sampler once, before parallel test processes could do so side by side."""
    if not hasattr(config, "workerinput"):
        from probmodels.bayesian_svd import BlockGibbs, tiny

        BlockGibbs.prepare(tiny())


@pytest.fixture(autouse=True)
def empty_store() -> None:
    """Clear Pyro's parameter store, where modules called as programs leave their parameters."""
    pyro.clear_param_store()


@pytest.fixture(scope="session")
def test_data() -> Callable[[str], Path]:
    """Path of a real data file by its relative name; the test is skipped where the file is absent."""
    root = Path(os.environ.get("PROBMODELS_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))

    def find(name: str) -> Path:
        path = root / name
        if not path.exists():
            pytest.skip(f"real data {name} not found under {root}; set PROBMODELS_TEST_DATA to its folder")
        return path

    return find
