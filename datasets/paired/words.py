"""Captions as codes of words, with the words that rows to learn from hold as the vocabulary."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probmodels.datasets.checks import as_array, check_size
from probmodels.errors import DataError

__all__ = ["UNKNOWN", "encode", "encode_new", "words_of"]

UNKNOWN = "<unknown>"
_MOST_CODES = 1_000_000  # each of which has an embedding
_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """Words of a text in lower case: runs of letters and digits, so that punctuation and symbols are left out."""
    return _WORD.findall(text.lower())


def encode(
    values: Any, name: str, there: NDArray[np.bool_], training: NDArray[np.bool_], min_count: int
) -> tuple[NDArray[np.int32], list[str]]:
    """Codes (row, token) of the words of every row, 0 after the last, and the words by their codes.

    Words that rows to learn from do not hold often enough are left out. Where a row has no others, it is one unknown
    word.

    Parameters
    ----------
    values
        Texts (row,), or codes (row, token) of words, 0 for none.
    name
        Of the modality, for messages.
    there
        Rows (row,) that have a text; the others are not read.
    training
        Rows (row,) to learn from.
    min_count
        How often a word has to occur in them.

    Raises
    ------
    DataError
        If a row that has a text has no word in it, or codes are no whole numbers from 0 on.
    """
    array = as_array(values, f"modality {name!r}")
    if array.dtype.kind in "iu" and array.ndim == 2:
        return _codes(array, name, there), [str(code) for code in range(int(array.max(initial=0)) + 1)]
    if array.ndim != 1 or array.dtype.kind not in "UO":
        raise DataError(
            f"modality {name!r} of type {array.dtype} and shape {array.shape} is no texts; give a text for each row, "
            "or codes (row, token) of words as whole numbers, 0 for none"
        )
    found = [_words(text, name, row) if there[row] else [] for row, text in enumerate(array.tolist())]
    counts = Counter(word for row in np.flatnonzero(there & training) for word in found[row])
    words = ["", UNKNOWN, *sorted(word for word, count in counts.items() if count >= min_count)]
    return _coded(found, words), words


def encode_new(texts: Sequence[str], name: str, words: Sequence[str]) -> NDArray[np.int32]:
    """Codes (row, token) of other texts by the words of `encode`.

    Raises
    ------
    DataError
        If a text has no word in it.
    """
    return _coded([_words(text, name, row) for row, text in enumerate(texts)], words)


def _coded(rows: Sequence[Sequence[str]], words: Sequence[str]) -> NDArray[np.int32]:
    """Codes of the words that are known, or of one unknown word; none of rows without a word."""
    code_of = {word: code for code, word in enumerate(words)}
    return _padded([[code_of[word] for word in row if word in code_of] or [1] * bool(row) for row in rows])


def _words(text: Any, name: str, row: int) -> list[str]:
    if not isinstance(text, str):
        raise DataError(
            f"modality {name!r}: row {row} holds {text!r} where a text is expected; write one, drop the row, or mark "
            "by present that it lacks the modality"
        )
    if not (found := words_of(text)):
        raise DataError(
            f"modality {name!r}: the text {text!r} of row {row} has no words: an empty caption says nothing; drop the "
            "row, or mark by present that it lacks the modality"
        )
    return found


def _codes(array: NDArray[Any], name: str, there: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Codes of words as they were given."""
    array = np.where(there[:, None], array, 0)
    outside = np.argwhere((array < 0) | (array >= _MOST_CODES))
    if len(outside):
        row, column = map(int, outside[0])
        raise DataError(
            f"modality {name!r}: code {array[row, column]} of row {row}, column {column}, is out of range; codes of "
            f"words lie between 1 and {_MOST_CODES - 1}, and 0 is none"
        )
    return array.astype(np.int32)


def _padded(codes: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    longest = max(map(len, codes), default=0)
    check_size(rows=len(codes), words=longest)
    found = np.zeros((len(codes), longest), dtype=np.int32)
    for place, row in enumerate(codes):
        found[place, : len(row)] = row
    return found
