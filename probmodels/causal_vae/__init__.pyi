from .checks import check_draws as check_draws, check_model as check_model
from .fitted import fitted_model as fitted_model
from .interventions import (
    Change as Change,
    Intervene as Intervene,
    OutsideSupportWarning as OutsideSupportWarning,
    attribute as attribute,
    counterfactual as counterfactual,
    effect as effect,
    refine as refine,
)
from .model import (
    ENGINES as ENGINES,
    REFERENCE as REFERENCE,
    CausalVAE as CausalVAE,
    make_problem as make_problem,
    observation_of as observation_of,
    tiny as tiny,
)
from .outputs import (
    compare_counterfactuals as compare_counterfactuals,
    edge_shares as edge_shares,
    summarise_concepts as summarise_concepts,
    unit_effects as unit_effects,
    write_outputs as write_outputs,
)

__all__ = [
    "ENGINES",
    "REFERENCE",
    "CausalVAE",
    "Change",
    "Intervene",
    "OutsideSupportWarning",
    "attribute",
    "check_draws",
    "check_model",
    "compare_counterfactuals",
    "counterfactual",
    "edge_shares",
    "effect",
    "fitted_model",
    "make_problem",
    "observation_of",
    "refine",
    "summarise_concepts",
    "tiny",
    "unit_effects",
    "write_outputs",
]
