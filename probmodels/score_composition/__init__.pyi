from .checks import check_draws as check_draws
from .model import (
    ENGINES as ENGINES,
    LOADERS as LOADERS,
    REFERENCE as REFERENCE,
    AnnealedKernel as AnnealedKernel,
    Composed as Composed,
    levels_of as levels_of,
    make_move as make_move,
    make_problem as make_problem,
    tiny as tiny,
    walk as walk,
    write_outputs as write_outputs,
)

__all__ = [
    "ENGINES",
    "LOADERS",
    "REFERENCE",
    "AnnealedKernel",
    "Composed",
    "check_draws",
    "levels_of",
    "make_move",
    "make_problem",
    "tiny",
    "walk",
    "write_outputs",
]
