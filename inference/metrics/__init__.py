"""Measures of samples, graphs, latents, dependence and copies."""
