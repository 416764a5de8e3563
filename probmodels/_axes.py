"""What figures share: colours, the size of small text, axes without a box."""

from __future__ import annotations

from matplotlib.axes import Axes

__all__ = ["BLUE", "COLOURS", "GREY", "RED", "SMALL", "clean"]

BLUE, RED, GREY = "#2f5d8a", "#b5452c", "0.45"
COLOURS = (BLUE, RED, "#5b8c5a", "#c29a2c", "#6d5a8c", "#3f9aa3", "#8c5a3c", "#777777")
SMALL = 8.0  # points, of ticks and notes


def clean(ax: Axes) -> None:
    """Small ticks, and no lines at the top and on the right."""
    ax.tick_params(labelsize=SMALL, length=2.5)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
