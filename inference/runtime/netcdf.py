"""What the netCDF files of results can hold: names of variables and dimensions, and labels."""

from __future__ import annotations

import unicodedata
from typing import Any

import numpy as np

__all__ = ["fault_of_labels", "fault_of_name"]

_MOST_BYTES = 240  # netCDF has room for 255, and results make names such as "<site>_dim_0" and "<site>_value"
_KINDS = ("string", "datetime", "datetime64", "timedelta", "timedelta64")  # of objects, in the words of pandas


def fault_of_name(name: Any) -> str:
    """Why a variable or dimension of a file cannot have a name; empty where it can."""
    if not isinstance(name, str) or not name:
        return "a name is a text that is not empty"
    if "/" in name:
        return "files nest groups by '/'"
    if not (name[0].isalnum() or name[0] == "_" or name[0] > "\x7f"):
        return "the first character must be a letter, a digit or '_'"
    if any(character < " " or character == "\x7f" or "\ud800" <= character <= "\udfff" for character in name):
        return "a name has no control characters"
    if name != name.strip():
        return "a name does not begin or end with a space"
    if unicodedata.normalize("NFC", name) != name:
        return "its accents are characters of their own; normalise it with unicodedata.normalize('NFC', name)"
    if (size := len(name.encode())) > _MOST_BYTES:
        return f"it takes {size} bytes, and {_MOST_BYTES} are the most"
    return ""


def fault_of_labels(labels: Any) -> str:
    """Why a file cannot hold the labels of a dimension; empty where it can."""
    try:
        array = np.asarray(labels)
    except ValueError:  # lists of different lengths
        return "each label must be one value"
    if array.ndim != 1:
        return f"labels are a list of single values, and these make an array of shape {array.shape}"
    kind: str = array.dtype.kind
    if kind == "O":
        kind, why = _object_kind(array)
        if why:
            return why
    if kind == "f" and array.dtype.itemsize not in (4, 8):
        return f"files hold no {array.dtype}"
    if kind not in "biufUSMm":
        return f"files hold no values of type {array.dtype}"
    if kind == "U" and not _is_plain("".join(array.tolist())):
        bad = next(label for label in array.tolist() if not _is_plain(label))
        return f"the text {bad!r} holds characters that files cannot"
    return ""


def _object_kind(array: np.ndarray) -> tuple[str, str]:
    """Kind of an array of Python objects, and why files cannot hold it."""
    from pandas.api.types import infer_dtype

    found = infer_dtype(array, skipna=False)
    if found not in _KINDS:
        kinds = sorted({type(label).__name__ for label in array.tolist()})
        return "O", f"files hold no values of type {', '.join(kinds)}; convert them to texts, numbers or numpy dates"
    if any(getattr(label, "tzinfo", None) is not None for label in array.tolist()):
        return "O", "files hold no time zones; convert to UTC and drop the zone"
    return ("U" if found == "string" else "M"), ""


def _is_plain(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text
