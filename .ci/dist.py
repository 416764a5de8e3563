"""Build the source distribution and, from it, the wheel; check both in a new environment.

Needs nothing but a Python with pip:  python3.12 .ci/dist.py [--torch torch==2.13.0] [--constraints constraints.txt]

The archive has to hold every tracked file, and the wheel every module, stub and data file. From the installed wheel,
outside of the checkout, every module is imported and the command line is run; some tests of the unpacked archive run
against it. What was built lies in dist/ afterwards.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys, setuptools.build_meta as backend; print(backend.build_sdist(sys.argv[1]))"
NOT_SHIPPED = (".git", ".pre-commit", ".readthedocs")  # what serves the repository alone
IMPORT = """
import importlib, pkgutil, sys
import probmodels
assert "site-packages" in probmodels.__file__, probmodels.__file__
names = [module.name for module in pkgutil.walk_packages(probmodels.__path__, "probmodels.")]
for name in names:
    importlib.import_module(name)
assert set(sys.argv[1:]) == set(names), set(sys.argv[1:]) ^ set(names)
print(len(names), "modules imported from", probmodels.__path__[0], "by Python", sys.version.split()[0])
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Output of a command, which is shown if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\n{' '.join(str(part) for part in command)} failed")
    return done.stdout


def lacking(archive: Path) -> list[str]:
    """Tracked files that the source distribution does not hold; links go without, their folders are there."""
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    tracked = run("git", "ls-files", cwd=ROOT).splitlines()
    return [n for n in tracked if n not in held and not n.startswith(NOT_SHIPPED) and not (ROOT / n).is_symlink()]


def installed_name(path: Path) -> str:
    """Path inside of the wheel of a file of the source tree."""
    return path.as_posix() if path.parts[0] == "probmodels" else f"probmodels/{path.as_posix()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default="torch==2.13.0", help="requirement or file that is installed as torch")
    parser.add_argument("--constraints", type=Path, help="file of versions; none: the newest that are allowed")
    parser.add_argument("--extras", default="sst,test", help="extras that are installed with the wheel")
    parser.add_argument(
        "--tests",
        nargs="*",
        default=["test_layout.py", "test_options.py", "test_spec.py", "test_methods.py", "test_docs.py"],
        help="files of tests/ that are run",
    )
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        run(sys.executable, "-m", "venv", here / "venv", cwd=here)
        python = here / "venv" / "bin" / "python"
        run(python, "-m", "pip", "install", "setuptools>=77", cwd=here)

        dist = ROOT / "dist"
        shutil.rmtree(dist, ignore_errors=True)
        archive = dist / run(python, "-c", BUILD, dist, cwd=ROOT).splitlines()[-1]
        if (ROOT / ".git").exists() and (lost := lacking(archive)):
            sys.exit(f"{archive.name} lacks {', '.join(lost)}; see MANIFEST.in")
        with tarfile.open(archive) as file:
            file.extractall(here, filter="data")
        source = here / archive.name.removesuffix(".tar.gz")
        run(python, "-m", "pip", "wheel", "--no-deps", "-w", dist, source, cwd=here)
        (wheel,) = dist.glob("*.whl")

        folders = ("probmodels", "guides", "inference", "datasets")
        files = [path.relative_to(source) for name in folders for path in (source / name).rglob("*") if path.is_file()]
        expected = {installed_name(path) for path in files}
        with zipfile.ZipFile(wheel) as file:
            held = {name for name in file.namelist() if ".dist-info/" not in name}
        if held != expected:
            sys.exit(f"{wheel.name} and the source tree differ in {', '.join(sorted(held ^ expected))}; see setup.cfg")
        print(f"{archive.name}, {wheel.name}: {len(held)} files, {sum(n.endswith('.pyi') for n in held)} stubs")

        limits = ("-c", asked.constraints.resolve()) if asked.constraints else ()
        run(python, "-m", "pip", "install", asked.torch, cwd=here)
        run(python, "-m", "pip", "install", *limits, f"{wheel}[{asked.extras}]", cwd=here)
        print(run(python, "-m", "pip", "check", cwd=here).strip())
        modules = {n.removesuffix(".py").removesuffix("/__init__") for n in held if n.endswith(".py")} - {"probmodels"}
        print(run(python, "-c", IMPORT, *(name.replace("/", ".") for name in modules), cwd=here).strip())
        for arguments in ("--version", "--help", "list"):
            run(here / "venv" / "bin" / "probmodels", arguments, cwd=here)
        tests = [f"tests/{name}" for name in asked.tests]
        print(run(here / "venv" / "bin" / "pytest", "-q", "-m", "not slow", *tests, cwd=source).splitlines()[-1])


if __name__ == "__main__":
    main()
