"""Bayesian singular value decomposition with structured orthonormal modes."""
