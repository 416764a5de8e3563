from .checks import check_draws as check_draws
from .model import (
    ENGINES as ENGINES,
    REFERENCE as REFERENCE,
    Grammar as Grammar,
    draw_posterior_trees as draw_posterior_trees,
    exact_log_likelihood as exact_log_likelihood,
    exact_span_probabilities as exact_span_probabilities,
    fitted_tables as fitted_tables,
    make_problem as make_problem,
    tiny as tiny,
)
from .outputs import (
    bracketing as bracketing,
    bracketing_metrics as bracketing_metrics,
    branching_trees as branching_trees,
    least_risk_trees as least_risk_trees,
    plot_parses as plot_parses,
    summarise_parses as summarise_parses,
    write_outputs as write_outputs,
)

__all__ = [
    "ENGINES",
    "REFERENCE",
    "Grammar",
    "bracketing",
    "bracketing_metrics",
    "branching_trees",
    "check_draws",
    "draw_posterior_trees",
    "exact_log_likelihood",
    "exact_span_probabilities",
    "fitted_tables",
    "least_risk_trees",
    "make_problem",
    "plot_parses",
    "summarise_parses",
    "tiny",
    "write_outputs",
]
