"""The methods, one line each, and how those of other packages are found.

A method of another package is named in a spec by the entry point of group ``probmodels.methods`` that its package
declares, or by the dotted path of its module. The names that a method has to define are read from its source before any
code of it runs, so that a spec, or the file of a result, imports nothing but methods.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from probmodels.errors import ProbmodelsError, SpecError
from probmodels.options import hint

__all__ = [
    "ENGINES",
    "METHODS",
    "Listed",
    "definitions",
    "foreign_code",
    "get_method",
    "list_methods",
    "names_of_methods",
    "refuse_code",
    "summary_of",
]

METHODS = {
    "acyclic_sem": "probmodels.acyclic_sem",
    "bayesian_network": "probmodels.bayesian_network",
    "bayesian_svd": "probmodels.bayesian_svd",
    "causal_graph": "probmodels.causal_graph",
    "causal_vae": "probmodels.causal_vae",
    "conditional_vae": "probmodels.conditional_vae",
    "discrete_vae": "probmodels.discrete_vae",
    "diffusion": "probmodels.diffusion",
    "grammar": "probmodels.grammar",
    "hierarchical_mixture": "probmodels.hierarchical_mixture",
    "lds": "probmodels.lds",
    "meta_regularization": "probmodels.meta_regularization",
    "modality_structure": "probmodels.modality_structure",
    "noisy_edges": "probmodels.noisy_edges",
    "score_composition": "probmodels.score_composition",
    "vib_gsl": "probmodels.vib_gsl",
}

ENGINES = {"mcmc": "run_mcmc", "svi": "fit_svi", "em": "fit_em", "bilevel": "fit_bilevel"}

_GROUP = "probmodels.methods"
_CONTRACT = {
    "make_problem": "make_problem(data, **options) -> Problem",
    "tiny": "tiny() -> Problem",
    "REFERENCE": 'REFERENCE = "Author (year), https://..."',
    "ENGINES": f"ENGINES, a tuple of names of {', '.join(ENGINES)}",
}


@dataclass(frozen=True)
class Listed:
    """What is said of a method without importing it.

    Attributes
    ----------
    name
        For ``method`` in a spec.
    module
        Dotted path.
    summary
        First line of its docstring.
    reference
        Its source.
    """

    name: str
    module: str
    summary: str
    reference: str


def names_of_methods() -> dict[str, str]:
    """Name to module of all methods: built in, and those that other packages declare."""
    from importlib.metadata import entry_points

    return {point.name: point.module for point in entry_points(group=_GROUP)} | METHODS


def list_methods() -> list[Listed]:
    """All methods with summary and reference, read from their sources: nothing is imported."""
    return [_listed(name, module) for name, module in names_of_methods().items()]


def summary_of(module: str, name: str) -> str:
    """First line of the docstring of a function or class, read from the source; empty where there is none."""
    node = definitions(module).get(name)
    if not isinstance(node, ast.FunctionDef | ast.ClassDef):
        return ""
    return (ast.get_docstring(node) or "").partition("\n")[0]


def get_method(name: str) -> ModuleType:
    """The module of a method, with ``make_problem``, ``tiny``, ``REFERENCE`` and ``ENGINES``.

    Parameters
    ----------
    name
        One of `METHODS`, an entry point of group ``probmodels.methods``, or the dotted path of a module.

    Raises
    ------
    SpecError
        If there is no such method, the message names the closest; or if a module of another package does not define
        what a method has to.
    """
    if not isinstance(name, str):
        raise SpecError(f"method={name!r}; give the name of a method, or the dotted path of its module")
    if name in METHODS:
        return importlib.import_module(METHODS[name])
    known = names_of_methods()
    module = known.get(name, name)
    if name not in known and ("." not in name or not all(part.isidentifier() for part in name.split("."))):
        near = hint(name, known, otherwise=False)
        if not near and name.isidentifier() and _locate(name) is not None:
            near = (
                f"; a module of your own is named by a dotted path: put {name}.py into a folder, such as mine, and "
                f"write mine.{name}"
            )
        raise SpecError(f"unknown method {name!r}{near or hint(name, known)}")
    _check_source(name, module)
    try:
        method = importlib.import_module(module)
    except Exception as error:
        raise SpecError(f"method {name!r}: cannot import {module}: {type(error).__name__}: {error}") from error
    _check_values(name, {key: getattr(method, key, None) for key in _CONTRACT})
    return method


@contextlib.contextmanager
def foreign_code(method: ModuleType, name: str, function: str, error: type[ProbmodelsError]) -> Iterator[None]:
    """Run a function of a method; what fails in a method of another package is told in one line, with its place.

    Parameters
    ----------
    method, name
        The module, and how it was named.
    function
        What is run, for the message.
    error
        What is raised in place of anything but a `ProbmodelsError`.
    """
    try:
        yield
    except ProbmodelsError:
        raise
    except Exception as fault:
        if method.__name__ in METHODS.values():  # a fault of ours, whose traceback is wanted
            raise
        own = [frame for frame in traceback.extract_tb(fault.__traceback__) if frame.filename == method.__file__]
        at = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
        raise error(f"method {name!r}: {function} failed: {type(fault).__name__}: {fault}{at}") from fault


def refuse_code(*names: Any) -> None:
    """Refuse places of code that a result file names, such as ``package.module:function``, unless imported already.

    A file may come from anywhere: what it names must not be imported, and so run, because it was opened.

    Raises
    ------
    SpecError
        For the first module that this process has not imported.
    """
    for name in names:
        module = str(name).partition(":")[0]
        if "." in module and module not in sys.modules:
            raise SpecError(
                f"the result file names the code {str(name)!r}, which is not run because a file says so; pass "
                f"--allow-code (in Python: import {module} first), or declare it as an entry point"
            )


def _check_source(name: str, module: str) -> None:
    """Check, without importing it, that a module exists and defines what a method has to."""
    if _locate(module) is None:
        raise SpecError(f"method {name!r}: there is no module {module!r}; install it, or add its folder to PYTHONPATH")
    if fault := _fault_of_source(module):
        raise SpecError(f"method {name!r}: {module} cannot be imported: {fault}")
    lacking = [said for key, said in _CONTRACT.items() if key not in definitions(module)]
    if lacking:
        raise SpecError(f"method {name!r}: {module} is no method, it lacks {'; '.join(lacking)}")


def _check_values(name: str, found: Mapping[str, Any]) -> None:
    for key, value in found.items():
        fits = isinstance(value, str) if key == "REFERENCE" else callable(value)
        if key == "ENGINES":
            fits = isinstance(value, tuple | list) and bool(value) and all(engine in ENGINES for engine in value)
        if not fits:
            raise SpecError(f"method {name!r}: {key}={value!r}; expected {_CONTRACT[key]}")
    try:
        inspect.signature(found["make_problem"]).bind_partial(None)
    except TypeError:
        raise SpecError(f"method {name!r}: make_problem takes no data; expected {_CONTRACT['make_problem']}") from None
    except ValueError:  # of callables that have no signature
        pass


# -- sources, read without being imported -----------------------------------------------------------------------------


def _listed(name: str, module: str) -> Listed:
    tree = _tree(module)
    if tree is None:
        return Listed(name, module, f"cannot be used: there is no module {module!r}", "")
    summary = (ast.get_docstring(tree) or "").strip().partition("\n")[0]
    reference = _literal(module, "REFERENCE")
    return Listed(name, module, summary, reference if isinstance(reference, str) else "")


def _locate(module: str) -> ModuleSpec | None:
    """Where a module lies; the packages around it are not imported either."""
    found: ModuleSpec | None = None
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        path = None if found is None else found.submodule_search_locations
        if count > 1 and path is None:
            return None
        asked = ".".join(parts[:count])
        finders = (finder.find_spec for finder in sys.meta_path if hasattr(finder, "find_spec"))
        found = next((spec for find in finders if (spec := find(asked, path)) is not None), None)
        if found is None:
            return None
    return found


def _tree(module: str) -> ast.Module | None:
    """The parsed source of a module, with that of the stub beside a lazy package."""
    found = _locate(module)
    if found is None or found.origin is None or not found.origin.endswith(".py"):
        return None
    file = Path(found.origin)
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        stub = file.with_suffix(".pyi")
        if stub.is_file():
            tree.body += ast.parse(stub.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, ValueError):
        return None
    return tree


def _fault_of_source(module: str) -> str:
    """Why the source of a module cannot be parsed; empty where it can."""
    found = _locate(module)
    if found is None or found.origin is None or not found.origin.endswith(".py"):
        return ""
    try:
        ast.parse(Path(found.origin).read_text(encoding="utf-8"))
    except SyntaxError as error:
        return f"{Path(found.origin).name}, line {error.lineno}: {error.msg}"
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def definitions(module: str) -> dict[str, ast.stmt]:
    """Names of the top level of a module to the statements that define them; nothing is imported."""
    tree, found = _tree(module), dict[str, ast.stmt]()
    for node in tree.body if tree is not None else []:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= dict.fromkeys((alias.asname or alias.name for alias in node.names), node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    return found


def _literal(module: str, name: str) -> Any:
    """Value of a name where it is written out, in the module itself or where it is imported from; else None."""
    node = definitions(module).get(name)
    if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
        try:
            return ast.literal_eval(node.value)
        except ValueError:
            return None
    if isinstance(node, ast.ImportFrom) and node.module is not None:
        alias = next(alias for alias in node.names if (alias.asname or alias.name) == name)
        package = f"{module}.{node.module}" if node.level == 1 else node.module
        return _literal(package, alias.name) if package != module else None
    return None
