"""Grammar induction: trees of sentences, and the grammar that explains them, from words alone."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
