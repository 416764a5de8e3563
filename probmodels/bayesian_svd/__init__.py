"""Bayesian singular value decomposition with structured orthonormal modes.

`make_problem` turns a labelled matrix into a `Problem`; `run_mcmc` on it runs the exact block sampler, `fit_svi` the
guide of `probmodels.guides.bayesian_svd`; `write_outputs` makes maps and a report of the result."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
