from .figures import (
    accuracy_against_noise as accuracy_against_noise,
    adjacency as adjacency,
    calibration_table as calibration_table,
    information_curve as information_curve,
    reliability as reliability,
)
from .outputs import edge_table as edge_table, write_edges as write_edges
from .summary import edge_marginals as edge_marginals, summarise_edges as summarise_edges

__all__ = [
    "accuracy_against_noise",
    "adjacency",
    "calibration_table",
    "edge_marginals",
    "edge_table",
    "information_curve",
    "reliability",
    "summarise_edges",
    "write_edges",
]
