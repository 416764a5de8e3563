"""The errors of all floors, under one base class so that one except clause takes them."""

from __future__ import annotations

__all__ = [
    "CaptureError",
    "ChainError",
    "CheckpointError",
    "CovarianceError",
    "DataError",
    "DiagnosticsError",
    "FitError",
    "ImportanceError",
    "ProblemError",
    "ProbmodelsError",
    "RankError",
    "ResultError",
    "SpecError",
    "SummaryError",
]


class ProbmodelsError(Exception):
    """Whatever this package raises for a reader to mend: the message says what is wrong, where, and what to do."""


class DataError(ProbmodelsError, ValueError):
    """Data that cannot be used as they are; the message says what, where, and how to mend it."""


class ProblemError(ProbmodelsError, ValueError):
    """A problem that cannot be inferred as it stands: which part, why, and how to mend it."""


class CheckpointError(ProbmodelsError, RuntimeError):
    """A checkpoint folder that cannot be used: what is wrong with it and how to mend it."""


class CaptureError(ProbmodelsError, RuntimeError):
    """A function that has no faithful graph: why, so that an engine can say so and run it as it is."""


class ChainError(ProbmodelsError, RuntimeError):
    """A chain that failed: which one and how."""


class FitError(ProbmodelsError, RuntimeError):
    """A fit that broke down: at which step and what to try."""


class RankError(ProbmodelsError, RuntimeError):
    """Another process of a data-parallel fit is gone, or does something else."""


class ResultError(ProbmodelsError, RuntimeError):
    """A result that cannot be saved, read or used: what is wrong, where, and how to mend it."""


class DiagnosticsError(ProbmodelsError, ValueError):
    """Draws or arguments that cannot be diagnosed."""


class ImportanceError(ProbmodelsError, ValueError):
    """Draws that have no usable importance weights."""


class SummaryError(ProbmodelsError, ValueError):
    """A result lacks what its summary needs."""


class CovarianceError(ProbmodelsError, ValueError):
    """A distance, kernel or length-scale that gives no valid covariance."""


class SpecError(ProbmodelsError, ValueError):
    """A spec that cannot be run: which table, which key, and what to write instead."""
