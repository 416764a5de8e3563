"""CPU seconds of `import probmodels`, of commands that only print, and of the first use.

Each row is a process of its own, run ``--repeats`` times after one run that is not counted and that fills the caches of
the file system and of compiled Python files. The first row is the interpreter alone.
"""

from __future__ import annotations

import common  # isort: skip  (pins threads before numpy is loaded)

import argparse
import resource
import subprocess
import sys

PROBMODELS = ["-m", "probmodels.cli"]
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import probmodels": ["-c", "import probmodels"],
    "probmodels --help": [*PROBMODELS, "--help"],
    "probmodels list": [*PROBMODELS, "list"],
    "import torch": ["-c", "import torch"],
    "import pyro": ["-c", "import pyro"],
    "run_mcmc, imported": ["-c", "from probmodels import run_mcmc"],
}


def cpu_seconds(arguments: list[str]) -> float:
    """CPU seconds, user and system, of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rows = []
    for name, arguments in COMMANDS.items():
        seconds = [cpu_seconds(arguments) for _ in range(options.repeats + 1)][1:]
        rows.append({"what": name, "CPU s, median (range)": common.spread(seconds)})
    common.report("startup", rows, **vars(options))


if __name__ == "__main__":
    main()
