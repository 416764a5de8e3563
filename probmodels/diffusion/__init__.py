"""Diffusion models as hierarchical autoencoders whose guide is a fixed noising process."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
