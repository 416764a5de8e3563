from .checks import check_draws as check_draws, check_model as check_model
from .model import (
    ENGINES as ENGINES,
    REFERENCE as REFERENCE,
    ConditionalVAE as ConditionalVAE,
    make_problem as make_problem,
    tiny as tiny,
)
from .outputs import write_outputs as write_outputs
from .sampling import (
    image_evidence as image_evidence,
    image_fidelity as image_fidelity,
    latent_information as latent_information,
    sample_images as sample_images,
)

__all__ = [
    "ENGINES",
    "REFERENCE",
    "ConditionalVAE",
    "check_draws",
    "check_model",
    "image_evidence",
    "image_fidelity",
    "latent_information",
    "make_problem",
    "sample_images",
    "tiny",
    "write_outputs",
]
