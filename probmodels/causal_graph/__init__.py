"""Causal graphs of labelled continuous concepts: which is a direct cause of which, with probabilities."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
