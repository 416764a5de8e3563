"""``python -m probmodels.cli``: the command line."""

from probmodels.cli.entry import main

if __name__ == "__main__":
    main()
