"""Models of Pyro's tutorials, examples and documentation, written anew on small data, each as a problem.

`MODELS` maps a name to an `Entry`. docs/pyro_models.md shows the list; test_pyro_models.py runs it.
"""

from pyro_models import mixtures, networks, others, regressions, sequences, series
from pyro_models.listing import MODELS, Entry

__all__ = ["MODELS", "Entry", "mixtures", "networks", "others", "regressions", "sequences", "series"]
