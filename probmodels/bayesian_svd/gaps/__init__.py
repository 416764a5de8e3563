"""Gaps: blocks that are hidden, how well modes fill them, and fields filled with intervals."""
