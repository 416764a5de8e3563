"""Inference engines, results and diagnostics; knows no method, no guide and no data set."""

if __name__ != "probmodels.inference":
    raise ImportError(
        "this folder is imported as probmodels.inference, not as inference; install the project with 'pip install -e .'"
    )

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
