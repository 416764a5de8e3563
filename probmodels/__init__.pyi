from ._version import __version__ as __version__
from .guides.auto import with_guide as with_guide
from .inference.bilevel.fit import fit_bilevel as fit_bilevel
from .inference.diagnostics.calibration import sbc as sbc
from .inference.diagnostics.comparison import compare as compare, loo as loo
from .inference.diagnostics.report import diagnose as diagnose
from .inference.distributed.many import map_problems as map_problems
from .inference.mcmc.run import run_mcmc as run_mcmc
from .inference.metrics.samples import compare_samples as compare_samples
from .inference.problem import Problem as Problem
from .inference.result import Result as Result
from .inference.variational.em import fit_em as fit_em
from .inference.variational.svi import fit_svi as fit_svi
from .methods import METHODS as METHODS, get_method as get_method
from .report import write_report as write_report
from .spec import load_spec as load_spec, run_spec as run_spec

__all__ = [
    "METHODS",
    "Problem",
    "Result",
    "__version__",
    "compare",
    "compare_samples",
    "diagnose",
    "fit_bilevel",
    "fit_em",
    "fit_svi",
    "get_method",
    "load_spec",
    "loo",
    "map_problems",
    "run_mcmc",
    "run_spec",
    "sbc",
    "with_guide",
    "write_report",
]
