from .auto import GUIDES as GUIDES, make_guide as make_guide, with_guide as with_guide

__all__ = [
    "GUIDES",
    "make_guide",
    "with_guide",
]
