from .effects import average_effect as average_effect
from .model import (
    ENGINES as ENGINES,
    REFERENCE as REFERENCE,
    CausalGraph as CausalGraph,
    ExactGraphs as ExactGraphs,
    edge_probabilities as edge_probabilities,
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
    "edge_probabilities",
    "make_problem",
    "tiny",
    "write_outputs",
]
