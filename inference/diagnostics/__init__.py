"""Verdicts, their tests and comparisons of models."""
