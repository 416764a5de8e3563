"""Inference engines, results and diagnostics; knows no method, no guide and no data set."""

if __name__ != "probmodels.inference":
    raise ImportError("this folder is imported as probmodels.inference, not as inference; install the project with 'pip install -e .'")
