"""``python -m probmodels``: the command line."""

from probmodels.cli import main

if __name__ == "__main__":
    main()
