"""Checkpoints, fingerprints, random states, processes and memory."""
