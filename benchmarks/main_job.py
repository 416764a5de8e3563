"""The Bayesian SVD of the embedded field as one command: wall time, and its diagnostics.

Without arguments the embedded field with 4 modes; with a file, or with ``--simulate CELLS TIMES`` a field of so many
months, that field with ``--rank`` modes; ``--noise`` and ``--ice`` as for ``probmodels sst``. Each seed is one run of
``probmodels sst`` in a process of its own, with everything that it writes. Peak memory is that of all its processes
together, pages that they share counted once (Linux; every half second).
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
import contextlib
import ctypes
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from probmodels.bayesian_svd.eof import compare_eof
from probmodels.bayesian_svd.summary import summarise_modes
from probmodels.inference.diagnostics.report import diagnose
from probmodels.inference.result import Result

_PR_SET_CHILD_SUBREAPER = 36  # of Linux's prctl


def run(arguments: list[str], seed: int) -> dict[str, Any]:
    """One run: seconds, diagnostics, and agreement with the deterministic EOFs."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "probmodels.cli", "sst", *arguments, "--seed", str(seed), "--quiet"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.perf_counter()
        memory = _run([*command, "--out", folder])
        wall = time.perf_counter() - start
        _wait_for_orphans()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        size = (Path(folder) / "result.nc").stat().st_size
        everything = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        result = Result.load(Path(folder))
    report = diagnose(result)
    table = report.table.loc[[name for name in report.table.index if name in result]]
    modes = summarise_modes(result.tree)
    comparison = compare_eof(result.tree, modes)
    return {
        "seed": seed,
        "wall s": wall,
        "result.nc, MB": round(size / 1e6, 1),
        "all files, MB": round(everything / 1e6, 1),
        "peak memory, MB": round(memory / 1e6),
        "CPU s": (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime),
        "passed": "yes" if report.ok else "no",
        "r_hat <= 1.01, %": round(100 * _share(result, list(table.index)), 2),
        "r_hat max": float(table["r_hat_max"].max()),
        "bulk ess min": float(table["ess_bulk_min"].min()),
        "EOF correlation": " ".join(f"{x:.3f}" for x in np.asarray(comparison["pattern_correlation"])),
        "PDO leads": _pdo(modes),
        "verdict": " ".join([report.head, *(f"[{x.verdict}]" for x in report.findings if x.harmful)]),
    }


def _run(command: list[str]) -> float:
    """Run a command; peak memory of its processes in bytes, nan where the system does not say."""
    peak = float("nan")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if (memory := _memory(process.pid)) > 0:
                peak = np.fmax(peak, memory)
            time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with status {process.returncode}")
    return float(peak)


def _memory(process: int) -> float:
    """Bytes of a process and all that it started, pages that several share divided among them."""
    own = Path(f"/proc/{process}")
    try:
        rows = (own / "smaps_rollup").read_text().splitlines()
        children = [int(x) for file in own.glob("task/*/children") for x in file.read_text().split()]
    except OSError:  # it has ended, or this is no Linux
        return 0.0
    return sum(1024.0 * int(x.split()[1]) for x in rows if x.startswith("Pss:")) + sum(map(_memory, children))


def _adopt_orphans() -> None:
    """Have processes whose parent ends come to this one: chains run in grandchildren, whose CPU seconds count too."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _wait_for_orphans() -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def _share(result: Result, names: list[str]) -> float:
    """Share of all judged entries of the posterior with r_hat of at most 1.01."""
    from probmodels.inference.diagnostics.convergence import convergence

    good = total = 0
    for name in names:
        r_hat = np.asarray(convergence(result.posterior[name].values)["r_hat"])
        good, total = good + int((r_hat <= 1.01).sum()), total + r_hat.size
    return good / total


def simulated(cells: int, times: int, file: Path) -> None:
    """Write monthly anomalies on two rows of cells 2 degrees apart: four smooth red modes and white noise."""
    rng = np.random.default_rng(0)
    lon = 180.0 + 2.0 * np.arange(cells // 2)
    x = np.linspace(0, np.pi, len(lon))
    patterns = np.stack([np.cos(i * x + row) for row in (0.0, 0.3) for i in range(1, 5)]).reshape(2, 4, -1)
    series = rng.standard_normal((times, 4))
    for t in range(1, times):
        series[t] = 0.8 * series[t - 1] + 0.6 * series[t]
    values = np.einsum("tk,rkc->trc", series * [2.0, 1.4, 1.0, 0.7], patterns)
    time = (np.datetime64("1854-01", "M") + np.arange(times)).astype("datetime64[ns]")
    coords = {"time": time, "lat": [0.0, 2.0], "lon": lon}
    field = xr.DataArray(values + 0.5 * rng.standard_normal(values.shape), coords, ("time", "lat", "lon"), name="sst")
    field.assign_attrs(units="degC").to_netcdf(file)


def _pdo(modes: xr.Dataset) -> str:
    """Whether the first pattern is the horseshoe: central North Pacific against the American coast."""
    first = modes["mode_mean"].isel(mode=0)
    if not {"lat", "lon"} <= set(first.dims) or first["lat"].max() < 50:
        return "-"
    centre = float(first.sel(lat=slice(35, 43), lon=slice(170, 205)).mean())
    coast = float(first.sel(lat=slice(45, 58), lon=slice(218, 236)).mean())
    return "yes" if centre * coast < 0 else "no"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*")
    parser.add_argument("--simulate", type=int, nargs=2, metavar=("CELLS", "TIMES"))
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--thin", type=int, default=1)
    parser.add_argument("--noise", choices=["white", "correlated"], help="default: that of the command")
    parser.add_argument("--ice", type=float, help="temperature at or below which a value is sea ice")
    parser.add_argument("--season", help="months to average")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.pop(name, None)  # the command decides for itself, as for a user
    if options.simulate:
        file = Path(tempfile.mkdtemp()) / "simulated.nc"
        simulated(*options.simulate, file)
        options.files = [str(file)]
    arguments = [*options.files, "--rank", str(options.rank), "--thin", str(options.thin)]
    given = {"noise": options.noise, "ice": options.ice, "season": options.season}
    arguments += [f"--{name}={value}" for name, value in given.items() if value is not None]
    _adopt_orphans()
    rows = []
    for seed in options.seeds:
        rows.append(run(arguments, seed))
        print(*(f"{key}: {value}" for key, value in rows[-1].items()), sep="\n", flush=True)
    common.report("main_job", rows, **vars(options))


if __name__ == "__main__":
    main()
