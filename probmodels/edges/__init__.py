"""What methods on graphs share: summaries, outputs and figures of edges."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
