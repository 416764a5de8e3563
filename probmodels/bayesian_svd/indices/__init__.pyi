from .boxes import (
    NINO_BOXES as NINO_BOXES,
    box_indices as box_indices,
    index_table as index_table,
    summarise_indices as summarise_indices,
)
from .correlation import correlate as correlate
from .decadal import DEFINITIONS as DEFINITIONS, mode_index as mode_index, published_index as published_index
from .el_nino import el_nino_sentences as el_nino_sentences, el_nino_table as el_nino_table
from .outputs import (
    indices_to_folder as indices_to_folder,
    write_correlations as write_correlations,
    write_indices as write_indices,
)
from .series import load_series as load_series

__all__ = [
    "DEFINITIONS",
    "NINO_BOXES",
    "box_indices",
    "correlate",
    "el_nino_sentences",
    "el_nino_table",
    "index_table",
    "indices_to_folder",
    "load_series",
    "mode_index",
    "published_index",
    "summarise_indices",
    "write_correlations",
    "write_indices",
]
