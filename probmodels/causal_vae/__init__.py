"""A causal variational autoencoder: concepts that cause one another behind images or tables."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
