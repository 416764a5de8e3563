"""Tables and pictures in files of the user's own."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from annotated_types import Interval
from numpy.typing import NDArray

from probmodels.datasets.checks import check_size, existing_file
from probmodels.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Pixels", "read_images", "read_table", "want_columns"]

Pixels = Annotated[int, Interval(ge=1, le=2048)]


def read_table(source: Any, what: str, text: Sequence[str] = ()) -> tuple[pd.DataFrame, str]:
    """A data frame and what to call it; columns ``text`` are kept as they are written."""
    import pandas as pd

    if isinstance(source, pd.DataFrame):
        rows, where = source.rename(columns=str), what
        header = rows.columns.to_series()
    elif isinstance(source, str | os.PathLike):
        path = existing_file(source, what)
        try:
            rows, where = pd.read_csv(path, dtype=dict.fromkeys(text, str), skipinitialspace=True), path.name
            header = pd.read_csv(path, header=None, nrows=1, dtype=str, skipinitialspace=True).iloc[0]
        except (OSError, ValueError) as error:  # of pandas, and of other encodings
            raise DataError(f"{path} cannot be read as CSV: {error}; it needs a header, and commas between") from error
    else:
        raise DataError(f"{what} is a {type(source).__name__}; give a CSV file, or a data frame of pandas")
    if not len(rows):
        raise DataError(f"{where} has no rows")
    again = header[header.duplicated()]
    if len(again):
        raise DataError(f"{where} has more than one column {again.iloc[0]!r}; names have to differ")
    return rows, where


def want_columns(rows: pd.DataFrame, names: Sequence[str], where: str) -> None:
    """Check that a table has columns."""
    absent = [name for name in names if name not in rows.columns]
    if absent:
        raise DataError(f"{where} has no column {absent[0]!r}; it has {', '.join(map(repr, rows.columns))}")


def read_images(paths: Sequence[Path], size: int, colour: bool, crop: bool) -> NDArray[np.float32]:
    """Images (data, channel, size, size) in [0, 1]; what is transparent becomes white."""
    from PIL import Image

    channels = 3 if colour else 1
    check_size(images=len(paths), channels=channels, size=size, width=size)
    images = np.empty((len(paths), channels, size, size), dtype=np.float32)
    for place, path in enumerate(paths):
        try:
            with Image.open(path) as opened:
                picture = opened.convert("RGBA")
        except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
            raise DataError(f"cannot read the image {path}: {error}") from error
        if crop:
            width, height = picture.size
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            picture = picture.crop((left, top, left + side, top + side))
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture).convert("RGB" if colour else "L")
        pixels = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))
        images[place] = np.moveaxis(np.atleast_3d(pixels), -1, 0) / np.float32(255)
    return images
