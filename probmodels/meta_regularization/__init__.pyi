from .checks import check_draws as check_draws, expected_calibration_error as expected_calibration_error
from .fitted import FittedGenerator as FittedGenerator, fitted_generator as fitted_generator
from .generators import LinearGenerator as LinearGenerator
from .model import (
    ENGINES as ENGINES,
    REFERENCE as REFERENCE,
    MetaRegularization as MetaRegularization,
    make_problem as make_problem,
    tiny as tiny,
)
from .outputs import chosen_images as chosen_images, write_outputs as write_outputs
from .transforms import Drawn as Drawn, Transform as Transform

__all__ = [
    "ENGINES",
    "REFERENCE",
    "Drawn",
    "FittedGenerator",
    "LinearGenerator",
    "MetaRegularization",
    "Transform",
    "check_draws",
    "chosen_images",
    "expected_calibration_error",
    "fitted_generator",
    "make_problem",
    "tiny",
    "write_outputs",
]
