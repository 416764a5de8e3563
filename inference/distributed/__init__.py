"""Many problems over processes or a cluster."""
