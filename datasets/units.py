"""Units of temperature in the spellings that files use."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Temperature", "read_temperature", "same_units"]

_DEGREES = r"(?:[°º˚]|deg(?:ree)?s?\.?)"
_SCALES = {
    "degC": rf"(?:{_DEGREES}[ _]*)?(?:c|cel[sc]ius|centigrade)|℃",
    "K": rf"(?:{_DEGREES}[ _]*)?(?:k|kelvins?)",
    "degF": rf"{_DEGREES}[ _]*(?:f|fahrenheit)|fahrenheit|℉",
}
_FACTOR = r"\d*\.?\d+(?:e[-+]?\d+)?"


@dataclass(frozen=True)
class Temperature:
    """A scale of temperature: "degC", "K" or "degF", and what values have to be multiplied by to be on it."""

    scale: str
    factor: float = 1.0


def read_temperature(units: str) -> Temperature | None:
    """The scale that units name, as in ``"Celsius"``, ``"deg_K"`` or ``"0.01 degC"``; None where they name none."""
    text = units.strip().lower()
    for scale, spelling in _SCALES.items():
        if re.fullmatch(spelling, text):
            return Temperature(scale)
        for pattern in (rf"({_FACTOR})[ *]*(?:{spelling})", rf"(?:{spelling})[ *]+({_FACTOR})"):
            if (match := re.fullmatch(pattern, text)) and float(match[1]) > 0:
                return Temperature(scale, float(match[1]))
    return None


def same_units(one: str, other: str) -> bool:
    """Whether two units are the same, or two spellings of one scale of temperature."""
    known = read_temperature(one)
    return one.strip() == other.strip() or (known is not None and known == read_temperature(other))
