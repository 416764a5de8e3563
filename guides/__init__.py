"""Guides: what approximates a posterior."""

if __name__ != "probmodels.guides":
    raise ImportError(
        "this folder is imported as probmodels.guides, not as guides; install the project with 'pip install -e .'"
    )

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
