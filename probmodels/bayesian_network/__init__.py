"""Bayesian networks of unknown structure: which variables depend directly on which, with probabilities."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
