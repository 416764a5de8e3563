from .entry import app as app, main as main

__all__ = ["app", "main"]
