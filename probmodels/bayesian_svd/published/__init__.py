"""The sampler that was published, for comparison, and what makes its problems."""
