"""Probabilistic models on Pyro."""

from probmodels._version import __version__

__all__ = ["__version__"]
