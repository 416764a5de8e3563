from .checks import check_draws as check_draws, expected_calibration_error as expected_calibration_error
from .generators import LinearGenerator as LinearGenerator
from .model import (
    ENGINES as ENGINES,
    REFERENCE as REFERENCE,
    MetaRegularization as MetaRegularization,
    make_problem as make_problem,
    tiny as tiny,
)
from .transforms import Drawn as Drawn, Transform as Transform

__all__ = [
    "ENGINES",
    "REFERENCE",
    "Drawn",
    "LinearGenerator",
    "MetaRegularization",
    "Transform",
    "check_draws",
    "expected_calibration_error",
    "make_problem",
    "tiny",
]
