"""The layout: one package from four folders, imports that point down, light imports, nothing generic installed."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from probmodels._version import __version__

ROOT = Path(__file__).parents[1]
FLOORS = {"datasets": 1, "inference": 2, "guides": 3, "probmodels": 4}
LEAF_IMPORTS = {
    "probmodels.distributions.covariance",
    "probmodels.distributions._spectra",
    "probmodels.distributions._mixture",
}
GROUND = {
    "probmodels._version",
    "probmodels.errors",
    "probmodels.options",
    "probmodels.methods",
}  # known to every floor
LEAVES = {"probmodels.distributions", *GROUND, *LEAF_IMPORTS}  # know nothing of the floors


def modules(folder: str) -> list[Path]:
    return [p for p in (ROOT / folder).rglob("*.py") if not any(q.is_symlink() for q in p.parents)]


def imports(path: Path, *, typing: bool = False) -> set[str]:
    """Absolute names of what a module imports, in functions too; ``typing``: also in blocks for type checkers."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if (
            not typing
            and isinstance(node, ast.If)
            and isinstance(node.test, ast.Name)
            and node.test.id == "TYPE_CHECKING"
        ):
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return names


def floor(module: str) -> int:
    parts = module.split(".")
    if module in LEAVES or any(module.startswith(f"{leaf}.") for leaf in LEAVES):
        return 0
    return FLOORS[parts[1]] if len(parts) > 1 and parts[1] in FLOORS else FLOORS["probmodels"]


@pytest.mark.parametrize("folder", FLOORS)
def test_imports_point_down(folder: str) -> None:
    for path in modules(folder):
        for name in imports(path):
            if name.split(".")[0] != "probmodels":
                continue
            assert floor(name) <= FLOORS[folder], f"{path.relative_to(ROOT)} imports {name}, which stands above it"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "probmodels" else ("probmodels", *parts))


def test_no_modules_import_each_other() -> None:
    """Check direct and indirect cycles; lazy imports and those for type checkers count."""
    files = {module_name(p): p for folder in FLOORS for p in modules(folder) if p.name != "__init__.py"}
    graph = {name: imports(path, typing=True) & files.keys() - {name} for name, path in files.items()}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")
    assert len(order) == len(files) > 150


@pytest.mark.parametrize("leaf", ["frames", "covariance"])
def test_leaves_know_nothing_of_the_project(leaf: str) -> None:
    ours = {
        name for name in imports(ROOT / "probmodels" / "distributions" / f"{leaf}.py") if name.startswith("probmodels")
    }
    assert all(any(name.startswith(allowed) for allowed in LEAF_IMPORTS | GROUND) for name in ours), ours


def test_inference_knows_no_method() -> None:
    for path in modules("inference"):
        assert not [n for n in imports(path) if n.startswith(("probmodels.bayesian_svd", "probmodels.guides"))], path


@pytest.mark.parametrize("folder", ["guides", "inference", "datasets"])
def test_a_folder_imported_by_its_bare_name_says_the_right_one(folder: str) -> None:
    code = f"import {folder}"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert f"probmodels.{folder}" in run.stderr


def test_importing_the_package_stays_light() -> None:
    heavy = "torch", "pyro", "arviz", "xarray", "matplotlib", "numba"
    code = f"import sys, probmodels, probmodels.cli.entry; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"


def test_only_one_module_imports_arviz() -> None:
    files = [p for folder in FLOORS for p in modules(folder)]
    users = [p.name for p in files if any(n.split(".")[0] == "arviz" for n in imports(p))]
    assert set(users) <= {"_arviz.py"}


def packages() -> dict[str, Path]:
    """Folders of the source tree by the names under which they are imported."""
    inits = [path for folder in FLOORS for path in modules(folder) if path.name == "__init__.py"]
    return {module_name(path).removesuffix(".__init__"): path.parent for path in inits}


def test_setup_lists_every_package_and_where_it_lies() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert set(setup["options"]["packages"].split()) == packages().keys()
    places = dict(line.split(" = ") for line in setup["options"]["package_dir"].strip().splitlines())
    for name, folder in packages().items():
        place = places.get(name, name.replace(".", "/"))
        assert ROOT / place == folder, f"setup.cfg looks for {name} in {place}"


def test_groups_of_pyproject_are_the_extras_of_setup() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = setup["options.extras_require"]
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    for name in ("test", "docs"):
        assert extras[name].split() == groups[name]
        assert {"include-group": name} in groups["dev"]
    assert extras["dev"].split() == ["probmodels[test,docs]", *(n for n in groups["dev"] if isinstance(n, str))]


def test_the_citation_is_of_this_version() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", packages())
def test_a_folder_can_be_taken_in_at_a_glance(name: str) -> None:
    count = len(list(packages()[name].glob("*.py")))
    assert count <= 28, f"{name} holds {count} modules; part it"
