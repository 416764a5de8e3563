from .bilevel.fit import fit_bilevel as fit_bilevel
from .diagnostics.calibration import coverage as coverage, sbc as sbc, vsbc as vsbc
from .diagnostics.comparison import compare as compare, kfold as kfold, loo as loo
from .diagnostics.evidence import (
    check_exact as check_exact,
    check_weights as check_weights,
    enumerate_posterior as enumerate_posterior,
)
from .diagnostics.findings import Finding as Finding, Report as Report
from .diagnostics.importance import importance_resample as importance_resample
from .diagnostics.modes import check_modes as check_modes
from .diagnostics.report import diagnose as diagnose
from .distributed.many import (
    MapError as MapError,
    dask_map as dask_map,
    map_problems as map_problems,
    process_map as process_map,
)
from .flows.back_and_forth import BackAndForth as BackAndForth, guided_kernel as guided_kernel
from .flows.balance import (
    DetailedBalance as DetailedBalance,
    SubTrajectoryBalance as SubTrajectoryBalance,
    TrajectoryBalance as TrajectoryBalance,
    VarGrad as VarGrad,
)
from .flows.seeding import AnnealedVarGrad as AnnealedVarGrad
from .mcmc.kernels import Kernel as Kernel, NUTSKernel as NUTSKernel
from .mcmc.run import run_mcmc as run_mcmc
from .metrics.fidelity import fidelity as fidelity, fidelity_table as fidelity_table
from .metrics.samples import (
    TwoSampleTest as TwoSampleTest,
    classifier_two_sample as classifier_two_sample,
    compare_samples as compare_samples,
    energy_distance as energy_distance,
    mmd as mmd,
    permutation_pvalues as permutation_pvalues,
    sliced_wasserstein as sliced_wasserstein,
    wasserstein as wasserstein,
)
from .predictive import (
    discrete_marginals as discrete_marginals,
    infer_discrete as infer_discrete,
    log_likelihood as log_likelihood,
    posterior_predictive as posterior_predictive,
    prior_predictive as prior_predictive,
)
from .problem import Outer as Outer, Problem as Problem
from .programs.varying import with_fixed_sites as with_fixed_sites
from .result import Result as Result
from .variational.em import Phase as Phase, fit_em as fit_em
from .variational.svi import fit_svi as fit_svi

__all__ = [
    "AnnealedVarGrad",
    "BackAndForth",
    "DetailedBalance",
    "Kernel",
    "MapError",
    "NUTSKernel",
    "Outer",
    "Phase",
    "Problem",
    "Report",
    "Result",
    "SubTrajectoryBalance",
    "TrajectoryBalance",
    "TwoSampleTest",
    "VarGrad",
    "check_exact",
    "check_modes",
    "check_weights",
    "classifier_two_sample",
    "compare",
    "compare_samples",
    "coverage",
    "dask_map",
    "diagnose",
    "discrete_marginals",
    "energy_distance",
    "enumerate_posterior",
    "fidelity",
    "fidelity_table",
    "fit_bilevel",
    "fit_em",
    "fit_svi",
    "guided_kernel",
    "importance_resample",
    "infer_discrete",
    "kfold",
    "log_likelihood",
    "loo",
    "map_problems",
    "mmd",
    "permutation_pvalues",
    "posterior_predictive",
    "prior_predictive",
    "process_map",
    "run_mcmc",
    "sbc",
    "sliced_wasserstein",
    "vsbc",
    "wasserstein",
    "with_fixed_sites",
]
