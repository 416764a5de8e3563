from .checks import check_model as check_model
from .forecasts.figures import fan_charts as fan_charts
from .forecasts.forecasting import forecast as forecast
from .forecasts.projection import project as project
from .forecasts.tables import forecast_table as forecast_table
from .forecasts.weights import box_weights as box_weights
from .joint.load import FURTHER_LOADERS as FURTHER_LOADERS
from .model import ENGINES as ENGINES, REFERENCE as REFERENCE
from .outputs import write_outputs as write_outputs
from .prepare import make_problem as make_problem, tiny as tiny
from .sampler import BlockGibbs as BlockGibbs
from .specs import check_spec as check_spec

__all__ = [
    "ENGINES",
    "FURTHER_LOADERS",
    "REFERENCE",
    "BlockGibbs",
    "box_weights",
    "check_model",
    "check_spec",
    "fan_charts",
    "forecast",
    "forecast_table",
    "make_problem",
    "project",
    "tiny",
    "write_outputs",
]
