"""Values that most options refuse, by what is wrong with them."""

from __future__ import annotations

import math
from typing import Any

WRONG: dict[str, Any] = {
    "object": object(),
    "nan": math.nan,
    "infinity": math.inf,
    "negative": -1,
    "zero": 0,
    "true": True,
    "list": [1],
    "text": "text",
    "empty text": "",
    "empty list": [],
    "huge": 10**30,
    "nested": {"a": {"b": [1]}},
    "none": None,
}
