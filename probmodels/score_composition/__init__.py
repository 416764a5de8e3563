"""Draws from composed scores, level by level, each with a Metropolis test made of scores alone."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
