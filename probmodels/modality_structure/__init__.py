"""Latent modality structures: views of the same things embedded by towers, every loss a site of a Pyro model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
