"""Labelled data sets and readers."""

if __name__ != "probmodels.datasets":
    raise ImportError("this folder is imported as probmodels.datasets, not as datasets; install the project with 'pip install -e .'")
