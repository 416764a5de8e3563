"""Distributions of orthonormal matrices and covariances of space and time; known to every floor."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
