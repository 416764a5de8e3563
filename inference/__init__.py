"""Inference engines, results and diagnostics; knows no method, no guide and no data set."""

if __name__ != "probmodels.inference":
    raise ImportError(
        "this folder is imported as probmodels.inference, not as inference; install the project with 'pip install -e .'"
    )

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probmodels.inference.back_and_forth import BackAndForth as BackAndForth
    from probmodels.inference.back_and_forth import guided_kernel as guided_kernel
    from probmodels.inference.balance import DetailedBalance as DetailedBalance
    from probmodels.inference.balance import SubTrajectoryBalance as SubTrajectoryBalance
    from probmodels.inference.balance import TrajectoryBalance as TrajectoryBalance
    from probmodels.inference.balance import VarGrad as VarGrad
    from probmodels.inference.bilevel import fit_bilevel as fit_bilevel
    from probmodels.inference.calibration import coverage as coverage
    from probmodels.inference.calibration import sbc as sbc
    from probmodels.inference.calibration import vsbc as vsbc
    from probmodels.inference.checkpoint import CheckpointError as CheckpointError
    from probmodels.inference.comparison import compare as compare
    from probmodels.inference.comparison import kfold as kfold
    from probmodels.inference.comparison import loo as loo
    from probmodels.inference.diagnostics import Report as Report
    from probmodels.inference.diagnostics import diagnose as diagnose
    from probmodels.inference.distributed import MapError as MapError
    from probmodels.inference.distributed import dask_map as dask_map
    from probmodels.inference.distributed import map_problems as map_problems
    from probmodels.inference.distributed import process_map as process_map
    from probmodels.inference.em import Phase as Phase
    from probmodels.inference.em import fit_em as fit_em
    from probmodels.inference.evidence import check_exact as check_exact
    from probmodels.inference.evidence import check_weights as check_weights
    from probmodels.inference.evidence import enumerate_posterior as enumerate_posterior
    from probmodels.inference.importance import importance_resample as importance_resample
    from probmodels.inference.kernels import Kernel as Kernel
    from probmodels.inference.kernels import NUTSKernel as NUTSKernel
    from probmodels.inference.loop import FitError as FitError
    from probmodels.inference.mcmc import ChainError as ChainError
    from probmodels.inference.mcmc import run_mcmc as run_mcmc
    from probmodels.inference.predictive import discrete_marginals as discrete_marginals
    from probmodels.inference.predictive import infer_discrete as infer_discrete
    from probmodels.inference.predictive import log_likelihood as log_likelihood
    from probmodels.inference.predictive import posterior_predictive as posterior_predictive
    from probmodels.inference.predictive import prior_predictive as prior_predictive
    from probmodels.inference.problem import Outer as Outer
    from probmodels.inference.problem import Problem as Problem
    from probmodels.inference.problem import ProblemError as ProblemError
    from probmodels.inference.result import Result as Result
    from probmodels.inference.result import ResultError as ResultError
    from probmodels.inference.sample_quality import TwoSampleTest as TwoSampleTest
    from probmodels.inference.sample_quality import classifier_two_sample as classifier_two_sample
    from probmodels.inference.sample_quality import compare_samples as compare_samples
    from probmodels.inference.sample_quality import energy_distance as energy_distance
    from probmodels.inference.sample_quality import mmd as mmd
    from probmodels.inference.sample_quality import permutation_pvalues as permutation_pvalues
    from probmodels.inference.sample_quality import sliced_wasserstein as sliced_wasserstein
    from probmodels.inference.sample_quality import wasserstein as wasserstein
    from probmodels.inference.svi import fit_svi as fit_svi
    from probmodels.inference.varying import with_fixed_sites as with_fixed_sites

_EXPORTS = {
    "BackAndForth": "back_and_forth",
    "ChainError": "mcmc",
    "CheckpointError": "checkpoint",
    "DetailedBalance": "balance",
    "FitError": "loop",
    "Kernel": "kernels",
    "MapError": "distributed",
    "NUTSKernel": "kernels",
    "Outer": "problem",
    "Phase": "em",
    "Problem": "problem",
    "ProblemError": "problem",
    "Report": "diagnostics",
    "Result": "result",
    "ResultError": "result",
    "SubTrajectoryBalance": "balance",
    "TrajectoryBalance": "balance",
    "TwoSampleTest": "sample_quality",
    "VarGrad": "balance",
    "check_exact": "evidence",
    "check_weights": "evidence",
    "classifier_two_sample": "sample_quality",
    "compare": "comparison",
    "compare_samples": "sample_quality",
    "coverage": "calibration",
    "dask_map": "distributed",
    "diagnose": "diagnostics",
    "discrete_marginals": "predictive",
    "energy_distance": "sample_quality",
    "enumerate_posterior": "evidence",
    "fit_bilevel": "bilevel",
    "fit_em": "em",
    "fit_svi": "svi",
    "guided_kernel": "back_and_forth",
    "importance_resample": "importance",
    "infer_discrete": "predictive",
    "kfold": "comparison",
    "log_likelihood": "predictive",
    "loo": "comparison",
    "map_problems": "distributed",
    "mmd": "sample_quality",
    "permutation_pvalues": "sample_quality",
    "posterior_predictive": "predictive",
    "prior_predictive": "predictive",
    "process_map": "distributed",
    "run_mcmc": "mcmc",
    "sbc": "calibration",
    "sliced_wasserstein": "sample_quality",
    "vsbc": "calibration",
    "wasserstein": "sample_quality",
    "with_fixed_sites": "varying",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Import an exported name on first use, so that importing this package costs nothing (PEP 562)."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_EXPORTS]
