"""Climate indices with posterior uncertainty: means over boxes, modes of a region, published series, correlations."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
