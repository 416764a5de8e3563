"""The command line: ``probmodels sst``, ``ranks``, ``processes``, ``run``, ``list``, ``schema``, ``show``,
``diagnose``, ``report``, ``compare``, ``predict``, ``indices``, ``forecast``, ``skill``, ``project`` and ``panels``.

Heavy imports happen inside the commands, so that ``--help`` answers at once.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
