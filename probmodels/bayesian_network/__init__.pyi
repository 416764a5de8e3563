from .checks import check_draws as check_draws
from .model import (
    ENGINES as ENGINES,
    REFERENCE as REFERENCE,
    BayesianNetwork as BayesianNetwork,
    Rising as Rising,
    make_problem as make_problem,
    tiny as tiny,
)
from .outputs import (
    class_graph as class_graph,
    draw_arrows as draw_arrows,
    draw_network as draw_network,
    network_table as network_table,
    summarise_network as summarise_network,
    write_outputs as write_outputs,
)

__all__ = [
    "ENGINES",
    "REFERENCE",
    "BayesianNetwork",
    "Rising",
    "check_draws",
    "class_graph",
    "draw_arrows",
    "draw_network",
    "make_problem",
    "network_table",
    "summarise_network",
    "tiny",
    "write_outputs",
]
