from .checks import check_draws as check_draws, check_model as check_model
from .edges import check_edges as check_edges, edge_probabilities as edge_probabilities
from .effects import average_effect as average_effect
from .model import (
    ENGINES as ENGINES,
    REFERENCE as REFERENCE,
    CausalGraph as CausalGraph,
    ExactGraphs as ExactGraphs,
    make_problem as make_problem,
    tiny as tiny,
    write_outputs as write_outputs,
)

__all__ = [
    "ENGINES",
    "REFERENCE",
    "CausalGraph",
    "ExactGraphs",
    "average_effect",
    "check_draws",
    "check_edges",
    "check_model",
    "edge_probabilities",
    "make_problem",
    "tiny",
    "write_outputs",
]
