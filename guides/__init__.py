"""Guides: what approximates a posterior."""

if __name__ != "probmodels.guides":
    raise ImportError(
        "this folder is imported as probmodels.guides, not as guides; install the project with 'pip install -e .'"
    )

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probmodels.guides.auto import GUIDES as GUIDES
    from probmodels.guides.auto import make_guide as make_guide
    from probmodels.guides.auto import with_guide as with_guide

_EXPORTS = {"GUIDES": "auto", "make_guide": "auto", "with_guide": "auto"}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Import an exported name on first use, so that importing this package costs nothing (PEP 562)."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_EXPORTS]
