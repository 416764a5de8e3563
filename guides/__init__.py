"""Guides: what approximates a posterior."""

if __name__ != "probmodels.guides":
    raise ImportError(
        "this folder is imported as probmodels.guides, not as guides; install the project with 'pip install -e .'"
    )
