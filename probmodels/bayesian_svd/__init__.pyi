from .checks import check_model as check_model
from .model import ENGINES as ENGINES, REFERENCE as REFERENCE
from .outputs import write_outputs as write_outputs
from .prepare import make_problem as make_problem, tiny as tiny
from .sampler import BlockGibbs as BlockGibbs

__all__ = [
    "ENGINES",
    "REFERENCE",
    "BlockGibbs",
    "check_model",
    "make_problem",
    "tiny",
    "write_outputs",
]
