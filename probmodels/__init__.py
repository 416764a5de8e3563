"""Probabilistic models on Pyro: model/guide pairs, shared inference engines, ArviZ-ready posteriors."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
