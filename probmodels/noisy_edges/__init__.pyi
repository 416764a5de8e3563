from .checks import check_model as check_model
from .model import (
    ENGINES as ENGINES,
    REFERENCE as REFERENCE,
    NoisyCount as NoisyCount,
    Prior as Prior,
    edge_logits as edge_logits,
    evidence as evidence,
    make_problem as make_problem,
    model as model,
    tiny as tiny,
    write_outputs as write_outputs,
)

__all__ = [
    "ENGINES",
    "REFERENCE",
    "NoisyCount",
    "Prior",
    "check_model",
    "edge_logits",
    "evidence",
    "make_problem",
    "model",
    "tiny",
    "write_outputs",
]
