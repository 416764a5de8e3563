from .checks import check_draws as check_draws
from .fitted import (
    NetworkField as NetworkField,
    bound as bound,
    classes_of as classes_of,
    fitted_model as fitted_model,
    fitted_problem as fitted_problem,
    make_field as make_field,
    terms as terms,
)
from .model import (
    ENGINES as ENGINES,
    REFERENCE as REFERENCE,
    Diffusion as Diffusion,
    make_problem as make_problem,
    tiny as tiny,
)
from .outputs import (
    bound_by_level as bound_by_level,
    generate as generate,
    reverse_coverage as reverse_coverage,
    write_outputs as write_outputs,
)

__all__ = [
    "ENGINES",
    "REFERENCE",
    "Diffusion",
    "NetworkField",
    "bound",
    "bound_by_level",
    "check_draws",
    "classes_of",
    "fitted_model",
    "fitted_problem",
    "generate",
    "make_field",
    "make_problem",
    "reverse_coverage",
    "terms",
    "tiny",
    "write_outputs",
]
