"""Several views of the same things, whose rows belong together."""
