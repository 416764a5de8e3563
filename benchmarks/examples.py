"""Time and memory of every file in examples/, each run as a person runs it, in a process and a folder of its own.

The table of `examples/README.md` and the times at the head of each example are these.
"""

from __future__ import annotations

import common  # isort: skip  (so that the packages of its table are those of the examples)

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "examples"


def run(path: Path, threads: dict[str, str]) -> dict[str, Any]:
    """One example: seconds and the largest memory of its process."""
    arguments = [str(path)] if path.suffix == ".py" else ["-m", "probmodels.cli", "run", str(path)]
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "said").open("w") as said:
        start = time.perf_counter()
        environment = {**{k: v for k, v in os.environ.items() if k not in threads}, **threads, "MPLBACKEND": "agg"}
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=folder, env=environment, stdout=said, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
    return {
        "example": path.name,
        "wall s": round(wall, 1),
        "CPU s": round(used.ru_utime + used.ru_stime, 1),
        "memory MB": round(used.ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)),
        "status": os.waitstatus_to_exitcode(status),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="files of examples/; all by default")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and BLAS")
    options = parser.parse_args()
    names = options.names or sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".toml", ".py"))
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads))
    common.report("examples", [run(FOLDER / name, threads) for name in names], **vars(options))


if __name__ == "__main__":
    main()
