from .checks import check_draws as check_draws, check_model as check_model
from .figures import embedding_map as embedding_map
from .fused import fused_scores as fused_scores
from .measures import (
    close_gap as close_gap,
    embed as embed,
    information_bound as information_bound,
    information_rows as information_rows,
    measure as measure,
    modality_gap as modality_gap,
    recall_at as recall_at,
)
from .model import (
    ENGINES as ENGINES,
    REFERENCE as REFERENCE,
    ModalityStructure as ModalityStructure,
    make_problem as make_problem,
    tiny as tiny,
)
from .outputs import write_outputs as write_outputs
from .queries import embed_new as embed_new
from .weights import weights_problem as weights_problem

__all__ = [
    "ENGINES",
    "REFERENCE",
    "ModalityStructure",
    "check_draws",
    "check_model",
    "close_gap",
    "embed",
    "embed_new",
    "embedding_map",
    "fused_scores",
    "information_bound",
    "make_problem",
    "measure",
    "modality_gap",
    "recall_at",
    "tiny",
    "weights_problem",
    "write_outputs",
]
